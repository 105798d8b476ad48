"""Runs of `kedit-fast edit --checkpoint` that are killed again and again, compared with runs that are not.

    python -m benchmarks.kills --runs 30 [--json FILE]

A process is sent SIGKILL at a random moment: every other one at a random time, the others shortly after a checkpoint
began to be written. The same command is then called again, with the same fate, until it comes through; what it has left
(model, state, patch, values, report without times) must equal, byte for byte, what a run without a kill leaves. Then
the next method begins. The processes are forks of one that has imported everything, with one thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are forked

import contextlib
import functools
import hashlib
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kedit_fast import demo
from kedit_fast.cli import edit as edit_command
from kedit_fast.cli import main as command_line
from kedit_fast.editing.batch_run import BatchRun
from kedit_fast.editing.editor import Editor
from kedit_fast.evaluation.evaluator import Evaluator
from kedit_fast.support.record_log import MANIFEST, RecordLog

METHODS: dict[str, tuple[str, ...]] = {
    "alphaedit": ("--values", "{work}/values"),
    "memit": ("--dtype", "bfloat16", "--metrics", "cf,ee.locality"),
    "rect": (),
    "ultraedit": (),
    "r-rome": ("--values", "{work}/values"),
    "prune": (),
}
"""Method -> what its command has beside the options of all."""


@dataclass
class Kill:
    """One process that was killed."""

    method: str
    seconds: float
    """From its start."""
    phase: str
    """What it was doing."""
    before: int
    """Batches that were safe when it began."""
    after: int
    """Batches that were safe when it was dead."""


@dataclass
class Outcome:
    """All runs."""

    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    """Runs that came through."""
    different: list[str] = field(default_factory=list)
    """Files that differ from those of the run without a kill."""


@contextlib.contextmanager
def marked(mark: Callable[[str], None]) -> Iterator[None]:
    """Call `mark` with the name of each phase when it begins, and of the one around it when it ends."""
    phases = ["elsewhere"]

    def during(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def marking(*args: Any, **options: Any) -> Any:
            phases.append(phase)
            mark(phase)
            try:
                return function(*args, **options)
            finally:
                phases.pop()
                mark(phases[-1])

        return marking

    @contextlib.contextmanager
    def timed(batch: BatchRun, phase: str) -> Iterator[None]:
        phases.append(phase)
        mark(phase)
        try:
            with before_timed(batch, phase):  # pyright: ignore[reportArgumentType]
                yield
        finally:
            phases.pop()
            mark(phases[-1])

    before_timed = BatchRun.timed
    places = [
        (edit_command, "load_model", "load"),
        (edit_command, "save_edited", "save"),
        (Evaluator, "measure", "evaluate"),
        (Editor, "repeat", "resume"),
        (RecordLog, "write", "checkpoint"),
    ]
    originals = [getattr(owner, name) for owner, name, _ in places]
    try:
        for (owner, name, phase), original in zip(places, originals, strict=True):
            setattr(owner, name, during(phase, original))
        BatchRun.timed = timed  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        BatchRun.timed = before_timed
        for (owner, name, _), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def command(method: str, work: Path, place: Path, batch: int) -> list[str]:
    """The command line of a run whose results go to `work`."""
    options = [
        "--checkpoint",
        "{work}/run",
        "--checkpoint-every",
        "1",
        "--out",
        "{work}/out",
        "--batch-size",
        str(batch),
    ]
    options += ["--patch", "{work}/patch.safetensors", "--method", method, "--requests", "{place}/requests.json"]
    options += ["--on-error", "skip", "--retention", "1", "--json", *METHODS[method]]
    if method != "ultraedit":
        options += ["--set", "v_num_grad_steps=3", "--stats", "{place}/stats"]
    return ["edit", str(demo.DATA), *(option.format(work=work, place=place) for option in options)]


def forked(
    run: Callable[[], None], said: Path, kill: Callable[[int, Iterator[str]], None] | None = None
) -> tuple[int, str, float]:
    """Call a function in a fork. Returns its exit status, -9 after a kill; its last phase; and its seconds.

    Args:
        run: the function; what it raises ends the process with status 70, SystemExit with its own.
        said: file for its stdout; stderr goes beside it.
        kill: called with the process and its phases as they begin; may kill it. None: it comes through.
    """
    reading, writing = os.pipe()
    begin = time.monotonic()
    process = os.fork()
    if process == 0:
        status = 70
        try:
            os.close(reading)
            for number, name in ((1, said), (2, said.with_suffix(".err"))):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            with marked(lambda phase: _write(writing, phase)):
                try:
                    run()
                    status = 0
                except SystemExit as stop:
                    status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    last = ["elsewhere"]
    with os.fdopen(reading) as lines:

        def phases() -> Iterator[str]:
            for line in lines:
                last[0] = line.strip()
                yield last[0]

        stream = phases()
        if kill is not None:
            kill(process, stream)
        for _ in stream:
            pass
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), last[0], time.monotonic() - begin


def _write(pipe: int, phase: str) -> None:
    os.write(pipe, f"{phase}\n".encode())


def calling(args: list[str]) -> Callable[[], None]:
    """A function that runs a command line."""
    return lambda: command_line.app(args, prog_name="kedit-fast")


def safe_batches(folder: Path) -> int:
    """Batches in a checkpoint."""
    path = folder / MANIFEST
    return max(0, json.loads(path.read_text())["records"] - 1) if path.exists() else 0


def everything(work: Path) -> dict[str, str]:
    """Name of a file that a run has left -> SHA-256 of it; of the report, without times and paths."""
    hashes = {}
    for path in sorted([*work.glob("out/*"), work / "patch.safetensors", *work.glob("values*")]):
        hashes[path.relative_to(work).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    said = json.loads((work / "said").read_text())
    for name in ("seconds", "out", "patch"):
        said.pop(name, None)
    hashes["report"] = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return hashes


def at_random(rng: random.Random, seconds: float, number: int) -> Callable[[int, Iterator[str]], None]:
    """What kills a process at a random moment of so many seconds; every other one while it writes a checkpoint."""

    def kill(process: int, phases: Iterator[str]) -> None:
        if number % 2:
            for _ in range(rng.randint(1, 2)):
                if not any(phase == "checkpoint" for phase in phases):
                    return
            time.sleep(rng.random() * 0.01)
        else:
            time.sleep(rng.random() * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    return kill


def killed(place: Path, runs: int, edits: int, batch: int, seed: int, say: Callable[[str], None]) -> Outcome:
    """Kill processes `runs` times, and compare what each run leaves at last."""
    rng, outcome = random.Random(seed), Outcome()
    records = [asdict(request) for request in demo.requests(edits)]
    names = ("prompt", "subject", "target_new", "target_true", "paraphrase_prompts", "neighborhood_prompts")
    (place / "requests.json").write_text(json.dumps([{name: record[name] for name in names} for record in records]))
    (place / "texts.txt").write_text("\n".join(demo.corpus(300)))
    collect = [
        "stats",
        str(demo.DATA),
        "--text",
        str(place / "texts.txt"),
        "--layers",
        "0-1",
        "--out",
        str(place / "stats"),
    ]
    assert forked(calling(collect), place / "said")[0] == 0, (place / "said.err").read_text()
    for method in itertools.cycle(METHODS):
        work = place / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        args = command(method, work, place, batch)
        status, _, seconds = forked(calling(args), work / "said")
        assert status == 0, (work / "said.err").read_text()
        whole = everything(work)
        shutil.rmtree(work)
        work.mkdir()
        while True:
            kill = at_random(rng, seconds, len(outcome.kills)) if len(outcome.kills) < runs else None
            before = safe_batches(work / "run")
            status, phase, spent = forked(calling(args), work / "said", kill)
            if status == -signal.SIGKILL:
                outcome.kills.append(Kill(method, round(spent, 3), phase, before, safe_batches(work / "run")))
                say(str(outcome.kills[-1]))
                assert outcome.kills[-1].after >= before
                continue
            assert status == 0, (work / "said.err").read_text()
            break
        done = everything(work)
        outcome.runs += 1
        outcome.different += [f"{method}: {name}" for name in {*whole, *done} if whole.get(name) != done.get(name)]
        say(f"{method}: {len(done)} files, {'different' if done != whole else 'the same'}")
        if len(outcome.kills) >= runs:
            return outcome
    raise AssertionError("unreachable")


def main(
    runs: Annotated[int, typer.Option(min=1, help="processes to kill")] = 30,
    edits: Annotated[int, typer.Option(min=1, help="requests of a run")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="requests of a batch")] = 2,
    seed: Annotated[int, typer.Option(help="of the moments")] = 0,
    json_: Annotated[Path | None, typer.Option("--json", help="file for the rows")] = None,
) -> None:
    """Kill `kedit-fast edit --checkpoint` at random moments, and compare what it leaves with a run that was not."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        outcome = killed(Path(folder), runs, edits, batch, seed, lambda text: typer.echo(text, err=True))
    by_phase = dict(Counter(kill.phase for kill in outcome.kills).most_common())
    typer.echo(f"{len(outcome.kills)} kills, {outcome.runs} runs that came through")
    for phase, count in by_phase.items():
        typer.echo(f"  {phase:12} {count}")
    typer.echo(f"different files: {', '.join(sorted(outcome.different)) or 'none'}")
    if json_ is not None:
        json_.write_text(json.dumps({**asdict(outcome), "by_phase": by_phase}, indent=1) + "\n")
    raise typer.Exit(1 if outcome.different else 0)


if __name__ == "__main__":
    typer.run(main)
