"""Runs that outlast a machine: kills, interrupts, full disks, other commands, batches that fail."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import NUMBERS, VARIED_REQUESTS, saved
from support import run as command
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import collect_statistics
from kedit_fast.editing.batch_record import BatchRecord
from kedit_fast.editing.batch_run import BatchRun
from kedit_fast.editing.editor import Editor
from kedit_fast.editing.solver_state import SolverState
from kedit_fast.errors import CheckpointError, EditError, SolveError
from kedit_fast.evaluation.evaluator import Evaluator
from kedit_fast.methods.registry import find_recipe
from kedit_fast.patches.patch import Patch
from kedit_fast.support import files, record_log
from kedit_fast.support.matrix_bits import sha256
from kedit_fast.support.record_log import Record, RecordLog
from kedit_fast.workflow import run_edits

HERE = Path(__file__).parents[1]
REQUESTS = VARIED_REQUESTS[:4]
FAST = {name: NUMBERS[name] for name in ("v_lr", "clamp_norm_factor", "v_weight_decay")} | {"v_num_grad_steps": 3}
FAST["context_template_length_params"] = ((2, 1),)
METHODS = {
    "memit": {"mom2_update_weight": "auto", "residual_share": 0.3},  # scales that the first batch decides
    "alphaedit": {"nullspace_threshold": 0.9, "L2": 1e-2},  # a memory of keys
    "rect": {"mom2_update_weight": 10.0},  # masks
    "ultraedit": {},  # a normalizer
}


@pytest.fixture(scope="module")
def statistics():
    torch.manual_seed(0)
    return collect_statistics(make_model("llama"), make_tokenizer(), TEXT * 2, (0, 1), progress=False)


@pytest.fixture
def run(statistics):
    """(method, folder, options) -> the report, and every bit that a run leaves."""

    def run(method="memit", folder=None, dtype=torch.float32, requests=REQUESTS, **options):
        recipe = find_recipe(method)
        numbers = {} if method == "ultraedit" else {"layers": (1,) if recipe.edits_one_layer else (0, 1)}
        numbers |= {**METHODS.get(method, {}), **options.pop("hparams", {})}
        if recipe.optimizes_values:
            numbers = {**FAST, **({"mom2_ridge": 1e-3} if recipe.uses_covariance else {}), **numbers}
        else:
            numbers["inner_params"] = ["model.layers.1.mlp.down_proj.weight"]
        model = make_model("llama", dtype)
        given = {"metrics": "cf.accuracy", "batch_size": 2, "on_error": "skip", **options}
        report = run_edits(
            model,
            make_tokenizer(),
            requests,
            method,
            statistics=statistics if recipe.uses_statistics else None,
            hparams=numbers,
            checkpoint=folder,
            **given,
        )
        return SimpleNamespace(report=report, model=model, bits=everything(report, model))

    return run


def everything(report, model):
    """Hashes of the weights, the patch, the state and the report without its times."""
    said = report.as_dict()
    del said["seconds"]
    editor = report.editor
    state = editor.solver_state
    tensors = {f"memory {layer} {n}": t for layer, m in state.memories.items() for n, t in m.tensors().items()}
    tensors |= {f"normalizer {shape} {n}": t for shape, m in state.normalizers.items() for n, t in m.tensors().items()}
    return {
        "weights": {name: sha256(t.reshape(1, -1)) for name, t in model.state_dict().items()},
        "patch": editor.patch().digest,
        "state": {name: sha256(t.reshape(1, -1)) for name, t in tensors.items()},
        "scales": state.scales,
        "batches in all": editor.ledger.count,
        "ledger": [[(e.name, e.backend, e.update.rank) for e in batch] for batch in editor.ledger.batches],
        "report": json.dumps(said),
        "batches": [(r.batch, r.losses, r.steps, r.residual, r.relative_norms, r.skipped) for r in report.results],
    }


class Stop(BaseException):
    """A process that ends here."""


def stopping_before(monkeypatch, batch, error=Stop):
    """The editor's call number `batch` raises; the function that ends this."""
    calls, before = [], Editor.edit

    def edit(self, *args, **options):
        calls.append(None)
        if len(calls) == batch:
            raise error()
        return before(self, *args, **options)

    monkeypatch.setattr(Editor, "edit", edit)
    return lambda: monkeypatch.setattr(Editor, "edit", before)


@pytest.mark.parametrize("method", [*METHODS, "alphaedit with a window"])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, run, monkeypatch, method):
    method, _, window = method.partition(" with ")
    dtype = torch.bfloat16 if method in ("memit", "rect") else torch.float32
    count = 3 if window else 2
    options = {"retention": 1, "checkpoint_every": 1, "batch_size": 1, "requests": REQUESTS[:count], "dtype": dtype}
    options["hparams"] = {"memory_window": 1} if window else {}
    whole = run(method, **{**options, "checkpoint_every": None})
    undo = stopping_before(monkeypatch, count)
    with pytest.raises(Stop):
        run(method, tmp_path, **options)
    undo()
    done = run(method, tmp_path, **options)
    assert whole.bits == done.bits
    assert done.report.seconds["checkpoint"] > 0 and len(list(tmp_path.glob("records-*"))) == count + 1


def test_metrics_of_every_kind_and_values_survive(tmp_path, run, monkeypatch):
    """Distributions, generated texts, scores right after each batch; values that are stored at the end; no number."""
    group = [replace(request, group="one") for request in (REQUESTS[1], replace(REQUESTS[1], target_new="French"))]
    options = {"metrics": "cf.accuracy,loc.kl/neighborhood,gen.entropy.greedy,pit", "batch_size": 1, "retention": 2}
    options |= {"requests": [*group, replace(REQUESTS[0], neighborhood_prompts=("Ebro is in",))]}
    options |= {"values": tmp_path / "values"}
    whole = run(folder=tmp_path / "whole", **options)
    assert {"first", "post"} <= set(whole.report.evaluation.metrics["pit.CS/explicit"].states)
    values = (tmp_path / "values").read_bytes()
    (tmp_path / "values").unlink()
    for batch in (1, 2):  # before the first batch, then before the second one
        undo = stopping_before(monkeypatch, batch)
        with pytest.raises(Stop):
            run(folder=tmp_path / "part", **options)
        undo()
    done = run(folder=tmp_path / "part", **options)
    again = run(folder=tmp_path / "part", **options)  # a run that is finished
    assert whole.bits == done.bits == again.bits and (tmp_path / "values").read_bytes() == values


PROGRAM = """
import os, random, signal, sys, time
sys.path[:0] = {paths!r}
from benchmarks.kills import at_random, forked, safe_batches
from pathlib import Path
from tiny_models import make_model, make_tokenizer
from kedit_fast.workflow import run_edits
import test_run_checkpoint as here, torch, json
torch.manual_seed(0)
root = Path(sys.argv[1])
def run(folder, name):
    def call():
        model = make_model("llama", torch.bfloat16)
        numbers = {{**here.FAST, "mom2_adjustment": False, "mom2_update_weight": 10.0, "layers": (0, 1)}}
        report = run_edits(model, make_tokenizer(), here.VARIED_REQUESTS, "memit-sequential", statistics=None,
                           hparams=numbers, batch_size=1, on_error="skip", metrics="cf.accuracy", retention=1,
                           checkpoint=folder, checkpoint_every=1)
        Path(name).write_text(json.dumps(here.everything(report, model), sort_keys=True))
    return call
run(root / "whole", root / "whole.json")()  # here, so that the forks find everything imported
begin = time.monotonic()
run(root / "timed", root / "timed.json")()
seconds = time.monotonic() - begin
rng, kills, before = random.Random(0), [], 0
while True:
    kill = at_random(rng, seconds / 2, len(kills)) if len(kills) < 5 else None
    status, phase, _ = forked(run(root / "run", root / "run.json"), root / "said", kill)
    assert safe_batches(root / "run") >= before
    before = safe_batches(root / "run")
    if status == 0:
        break
    assert status == -signal.SIGKILL, (root / "said.err").read_text()
    kills.append((phase, safe_batches(root / "run")))
print(json.dumps(kills))
"""


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    """SIGKILL at five random moments, also while a checkpoint is written (`python -m benchmarks.kills` does more)."""
    program = PROGRAM.format(paths=[str(HERE), str(HERE.parent), str(Path(__file__).parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) >= 3
    assert (tmp_path / "run.json").read_text() == (tmp_path / "whole.json").read_text()
    assert not list((tmp_path / "run").glob(".records-*"))  # what was being written


def test_another_run_is_refused_by_name(tmp_path, run, monkeypatch):
    options = {"requests": REQUESTS[:2], "batch_size": 1}
    run(folder=tmp_path / "run", **options)
    manifest = (tmp_path / "run" / "manifest.json").read_bytes()
    monkeypatch.setattr(Evaluator, "measure", None)  # nothing runs before the refusal
    for changed, message in (
        ({"hparams": {"v_num_grad_steps": 2}}, r"hyper-parameters: v_num_grad_steps \(3 there, 2 here\)"),
        ({"hparams": {"values_dtype": "bfloat16"}}, r"hyper-parameters: values_dtype \(model there, bfloat16 here\)"),
        ({"batch_size": 2}, r"batch size \(1 there, 2 here\)"),
        ({"requests": REQUESTS[1:3]}, "requests"),
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"metrics": "cf.success"}, "metrics"),
        ({"dtype": torch.bfloat16}, "model"),
        ({"method": "rect"}, r"method \(memit there, rect here\)"),
    ):
        with pytest.raises(CheckpointError, match=f"another run: different {message}"):
            run(folder=tmp_path / "run", **{**options, **changed})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"holds notes.txt and no manifest.json"):
        run(folder=tmp_path / "other", **options)
    with RecordLog.opened(tmp_path / "run", CheckpointError, ""), pytest.raises(CheckpointError, match="still going"):
        run(folder=tmp_path / "run", **options)
    assert (tmp_path / "run" / "manifest.json").read_bytes() == manifest


def test_a_disk_without_room_is_named_before_any_value(tmp_path, run, monkeypatch):
    monkeypatch.setattr(Editor, "edit", None)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        run(folder=tmp_path / "file" / "run")
    with monkeypatch.context() as patched:
        patched.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(CheckpointError, match=r"KiB are needed there, and the disk has 1000 bytes free"):
            run(folder=tmp_path / "small")
    with monkeypatch.context() as patched:  # a quota, which the size of the disk does not show
        patched.setattr(record_log.os, "posix_fallocate", full_disk)
        with pytest.raises(CheckpointError, match=r"cannot write [\d,]+ bytes in .*: No space left on device"):
            run(folder=tmp_path / "quota")


def full_disk(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_later_stops_nothing_and_loses_nothing(tmp_path, run, monkeypatch, caplog):
    """The second batch cannot be written: a warning, and the third one is written with it. Nothing is done again."""
    options = {"batch_size": 1, "checkpoint_every": 1, "requests": REQUESTS[:3]}
    writes: list[Path] = []
    before = record_log.write_text

    def write(path, *args):
        writes.append(path)
        if len(writes) == 2 + 2:
            raise CheckpointError(f"cannot write {path}: No space left on device")
        return before(path, *args)

    monkeypatch.setattr(record_log, "write_text", write)  # two are of what is known before the first batch
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        done = run(folder=tmp_path, **options)
    monkeypatch.setattr(record_log, "write_text", before)
    assert next(r.message for r in caplog.records if "No space" in r.message).endswith("and the run goes on")
    assert json.loads((tmp_path / "manifest.json").read_text())["records"] == 4  # written when there was room again
    monkeypatch.setattr(Editor, "edit", None)
    assert run(folder=tmp_path, **options).bits == done.bits


def test_a_batch_that_cannot_be_written_is_named_and_the_others_are_written(tmp_path, run, monkeypatch):
    without = run(requests=[REQUESTS[0], REQUESTS[2]], batch_size=1)
    before = SolverState.solve_batch

    def solve(self, layer, keys, *args, **options):
        if self.batches == 1 and not failed:
            failed.append(layer)
            raise SolveError("the system is not positive definite")
        return before(self, layer, keys, *args, **options)

    failed = []
    monkeypatch.setattr(SolverState, "solve_batch", solve)
    options = {"requests": REQUESTS[:3], "batch_size": 1, "checkpoint_every": 1}
    done = run(folder=tmp_path / "skip", **options)
    assert list(done.report.skipped) == [1] and "could not be written: the system is not" in done.report.skipped[1]
    assert done.report.edits == 2 and done.bits["weights"] == without.bits["weights"]
    assert run(folder=tmp_path / "skip", **options).bits == done.bits  # what failed stays failed

    failed.clear()
    model = make_model("llama")
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(sys.modules[__name__], "make_model", lambda *_: model)
    with pytest.raises(SolveError):
        run(folder=tmp_path / "raise", on_error="raise", **options)
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "raise" / "manifest.json").read_text())["records"] == 2  # the first batch is safe
    assert run(folder=tmp_path / "raise", on_error="raise", **options).report.edits == 3


def test_an_anchor_of_the_whole_run_is_measured_again_while_nothing_is_written(tmp_path, run, monkeypatch):
    """The first batch fails, and the run is killed after it: the second batch still has the anchor of all requests."""
    before, batches = BatchRun.find_values, []

    def find(self, *args):
        batches.append([prepared.request.subject for prepared in self.prepared])
        if batches[-1] == [REQUESTS[0].subject]:
            raise SolveError("the system is not positive definite")
        return before(self, *args)

    monkeypatch.setattr(BatchRun, "find_values", find)
    options = {"requests": REQUESTS[:3], "batch_size": 1, "checkpoint_every": 1, "hparams": {"norm_anchor": "auto"}}
    options["hparams"]["mom2_update_weight"] = 10.0
    whole = run(folder=tmp_path / "whole", **options)
    undo = stopping_before(monkeypatch, 2)
    with pytest.raises(Stop):
        run(folder=tmp_path / "part", **options)
    undo()
    assert run(folder=tmp_path / "part", **options).bits == whole.bits


def test_a_checkpoint_asks_for_no_statistics_that_the_run_does_not_read(tmp_path, run, monkeypatch):
    options = {"requests": REQUESTS[:1], "hparams": {"output_metric": True}}
    assert run("alphaedit", tmp_path / "idle", **options).report.edits == 1  # it does not read output_metric
    model = make_model("llama")
    both = collect_statistics(model, make_tokenizer(), TEXT, (0, 1), output_metric=True, progress=False)
    numbers = {**FAST, "layers": (0, 1), "mom2_update_weight": 10.0, "mom2_adjustment": False, "output_metric": True}
    report = run_edits(
        model,
        make_tokenizer(),
        REQUESTS[:1],
        "memit",
        statistics=replace(both, layers={}),
        hparams=numbers,
        checkpoint=tmp_path / "alone",
    )
    assert report.edits == 1


def test_something_else_that_changes_the_model_is_no_bad_batch(run, monkeypatch):
    def edit(self, *args):
        raise EditError("cannot write values: No space left on device") from OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Editor, "edit", edit)
    with pytest.raises(EditError, match="No space"):
        run()


def test_a_log_that_is_damaged_or_of_other_files_is_named(tmp_path):
    with RecordLog.opened(tmp_path, CheckpointError, "") as log:
        for number in range(3):
            log.append(Record({"number": number}, {"t": torch.full((2,), float(number)), "u": torch.zeros(0, 3)}))
            log.write({"seen": number})
        log.append(Record({}))  # never written
    again = RecordLog(tmp_path, CheckpointError)
    assert [record.facts["number"] for record in again] == [0, 1, 2] and again.facts == {"seen": 2}
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("records-*"))]
    assert len(sizes) == 3 and sizes[1] == sizes[2]  # a record costs no more behind others
    second = tmp_path / "records-000002.safetensors"
    second.write_bytes((tmp_path / "records-000001.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"records-000002.safetensors is damaged: it does not follow"):
        list(RecordLog(tmp_path, CheckpointError))
    second.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*000002"):
        list(RecordLog(tmp_path, CheckpointError))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        RecordLog(tmp_path, CheckpointError)


def test_a_log_is_what_it_was_where_a_write_fails(tmp_path):
    with RecordLog.opened(tmp_path, CheckpointError, "") as log:
        log.write({"seen": 0})
        log.append(Record({"number": 1}, {"t": torch.zeros(4000)}))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
        try:
            with pytest.raises(CheckpointError, match=r"cannot write .*records-000001.safetensors"):
                log.write({"seen": 1})
            with pytest.raises(CheckpointError, match="cannot write 20,000 bytes"):
                log.reserve(20_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert RecordLog(tmp_path, CheckpointError).facts == {"seen": 0} and not list(tmp_path.glob("*records*"))
        log.write({"seen": 2})
    assert [record.facts for record in RecordLog(tmp_path, CheckpointError)] == [{"number": 1}]


def test_other_bits_than_were_recorded_are_refused(tmp_path, run, monkeypatch, capsys):
    options = {"requests": REQUESTS[:2], "batch_size": 1, "retention": 1}
    run(folder=tmp_path, progress=True, **options)
    bar = capsys.readouterr().err
    assert re.search(r"edits: 100%.* 2/2, .* edits/s, 00:00 left, norm [\d.e-]+, residual [\d.e-]+, efficacy [01]", bar)
    before = BatchRecord.from_parts
    monkeypatch.setattr(
        BatchRecord,
        "from_parts",
        lambda *parts: replace(before(*parts), bits={"model.layers.0.mlp.down_proj.weight": 1}),
    )
    with pytest.raises(CheckpointError, match=r"batch 1: model.layers.0.mlp.down_proj.weight gets other bits"):
        run(folder=tmp_path, **options)


def test_the_command_says_how_to_go_on_and_does(tmp_path, monkeypatch):
    """Ctrl-C; then an end while the results are being saved, some of which are there; then nothing is in the way."""
    records = [{"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new} for r in REQUESTS[:3]]
    (tmp_path / "requests.json").write_text(json.dumps(records))
    plain = ("--set", "v_num_grad_steps=2", "--set", "mom2_adjustment=false", "--layers", "0-1", "--batch-size", "1")

    def edit(name, *more):
        paths = ("--out", tmp_path / name, "--patch", tmp_path / f"{name}.safetensors")
        return command("edit", saved_model, "--requests", tmp_path / "requests.json", *plain, *paths, *more)

    saved_model = saved(tmp_path / "model", "llama")
    assert edit("whole").returncode == 0
    there = ("--checkpoint", tmp_path / "run", "--checkpoint-every", "1")
    undo = stopping_before(monkeypatch, 2, KeyboardInterrupt)
    stopped = edit("part", *there)
    undo()
    assert stopped.returncode == 130 and stopped.stderr.strip().endswith(
        f"interrupted; 1 batch is safe in {tmp_path / 'run'}; the same command goes on from there"
    )
    with monkeypatch.context() as patched:
        patched.setattr(Patch, "save", stop)
        with pytest.raises(Stop):
            edit("part", *there)
    assert (tmp_path / "part" / "model.safetensors").exists()
    other = edit("whole", *there)  # another command has no claim to what is there
    assert other.returncode == 1 and "whole exists" in other.stderr
    done = edit("part", *there, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["edits"] == 3
    for name in ("/model.safetensors", ".safetensors"):
        assert (tmp_path / f"part{name}").read_bytes() == (tmp_path / f"whole{name}").read_bytes()
    wrong = edit("another", "--checkpoint", tmp_path / "requests.json")
    assert wrong.returncode == 1 and "requests.json" in wrong.stderr


def stop(*args):
    raise Stop()
