"""Two processes under torchrun give what one gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from kedit_fast import Editor, demo

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
RUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
NUMBERS = {"v_num_grad_steps": 6, "mom2_adjustment": False}
PROGRAM = """
import dataclasses
import os
import torch
from kedit_fast import Editor, demo
from kedit_fast.errors import KeditError
from kedit_fast.support import process_group
process_group.start()
rank, _ = process_group.world()
numbers = dict(v_num_grad_steps=2, mom2_adjustment=False)
editor = Editor(*demo.load(), "memit", prefixes=(), values="values", hparams=numbers)
first = editor.edit(demo.requests(4)).updates
editor.rollback()
again = editor.edit(demo.requests(4)).updates  # the first process alone has the file, the others follow it
editor.rollback()
same = all((first[name][0].left == again[name][0].left).all() for name in first)
merging = Editor(*demo.load(), "memit-merge", prefixes=(), hparams=numbers)
shared = [*demo.requests(3), *(dataclasses.replace(r, target_new="piano") for r in demo.requests(2))]
losses = merging.edit(shared).losses  # requests on one subject stay in one process
same = same and losses[0] == losses[3] and losses[1] == losses[4] and losses[0] != losses[1]
said = ""
try:
    editor.edit(demo.requests(4 + rank))
except Exception as error:
    said = f"{type(error).__name__}: {error}"
open(f"done{rank}", "w").write(f"{bool(same)} {len(editor.ledger.batches)} {said}")
if rank == 1:
    os._exit(0)  # without a word to the other
try:
    process_group.sum_(torch.zeros(3))
except KeditError as error:
    open("lost", "w").write(str(error))
os._exit(0)
"""


def under_torchrun(folder: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run((*RUN, *command), capture_output=True, text=True, cwd=folder, check=False)


def test_two_processes_equal_one(tmp_path, demo_model):
    """The command line under torchrun against an editor in one process: values, and the weights that follow."""
    requests, out = demo.requests(7), tmp_path / "two"
    records = [
        {"id": r.id, "prompt": r.prompt, "subject": r.subject, "target_new": r.target_new} for r in requests
    ]  # fmt: skip
    (tmp_path / "requests.json").write_text(json.dumps(records), encoding="utf-8")
    pairs = [text for name, value in NUMBERS.items() for text in ("--set", f"{name}={str(value).lower()}")]
    done = under_torchrun(
        tmp_path, "-m", "kedit_fast.cli", "edit", str(demo.DATA), "--requests", "requests.json", "--out", str(out),
        "--dtype", "float32", "--values", "values", "--json", *pairs,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]  # one process speaks
    assert json.loads(line)["edits"] == 7 and (tmp_path / "values").exists()
    model, tokenizer = demo_model
    editor = Editor(model, tokenizer, "memit", hparams=NUMBERS)
    before = {name: editor.view.weight(layer).clone() for layer, name in names(editor).items()}
    editor.edit(requests)
    written = load_file(out / "model.safetensors")
    one = {name: editor.view.weight(layer).clone() for layer, name in names(editor).items()}
    editor.restore()
    for name, weight in one.items():
        assert not torch.equal(weight, before[name])
        gap = (written[name] - weight).norm() / (weight - before[name]).norm()
        assert float(gap) < 1e-3, name  # the values' own bound, through the solve


def names(editor: Editor) -> dict[int, str]:
    return {layer: editor.view.weight_name(layer) for layer in editor.hparams.layers}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What a job of PROGRAM has written."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    done = under_torchrun(folder, "program.py")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("rank", (0, 1))
def test_processes_share_a_store_and_refuse_to_differ(shared, rank):
    same, batches, said = (shared / f"done{rank}").read_text().split(" ", 2)
    assert same == "True" and batches == "0"
    assert said.startswith("EditError") and "different requests" in said


def test_a_lost_connection_says_so(shared):
    assert "process 0 of 2 lost the others: one has ended" in (shared / "lost").read_text()


STATISTICS = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from tiny_models import TEXT, make_model, make_tokenizer
from kedit_fast import collect_statistics
from kedit_fast.support import process_group
from kedit_fast.statistics import checkpoint, corpus
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.resumable import collect_into
corpus.LEAST_WINDOW, corpus.BATCHES_A_WINDOW = 1000, 2
documents = [f"{{text}} Number {{i}}." for i, text in enumerate(TEXT * 20)]
process_group.start()
rank, _ = process_group.world()
model, tokenizer = make_model("gpt2"), make_tokenizer()
if "die" in sys.argv:
    before, count = checkpoint.save, []
    def save(*args):
        before(*args)
        count.append(1)
        if rank == 0:
            time.sleep(600)  # it ends with the other, and is not writing then
        if len(count) == 3:
            while not os.path.exists(os.path.join(f"{{sys.argv[1]}} all", "checkpoint-1-of-2.safetensors")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save = save
for how, numbers in (("tokens", dict(max_tokens=2000)), ("all", dict(seed=3))):
    if how not in sys.argv:
        continue
    found = collect_into(f"{{sys.argv[1]}} {{how}}", model, tokenizer, Corpus(documents, **numbers), (0, 2),
                         batch_tokens=200, checkpoint_every=0, resume=True, progress=False)
    whole = collect_statistics(model, tokenizer, documents, (0, 2), batch_tokens=200, progress=False, **numbers)
    kept = f"moment {{how}}.pt"
    same = torch.equal(whole.moment(2).moment, torch.load(kept)) if os.path.exists(kept) else ""
    # one write: processes share the stream
    print(f"{{how}} {{rank}} {{found.tokens}} {{found.resumed}} {{same}}\\n", end="", flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        torch.save(whole.moment(2).moment, kept)
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    process_group.stop()
"""


def moments(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: load_file(path)["second_moment"] for path in folder.glob("*.safetensors")}


def written(tmp_path: Path) -> Path:
    program = tmp_path / "program.py"
    program.write_text(STATISTICS.format(tests=str(Path(__file__).parents[1])), encoding="utf-8")
    return program


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A folder with the statistics of one process and of two, and what each said."""
    folder = tmp_path_factory.mktemp("collected")
    written(folder)
    command = (sys.executable, "program.py", "one", "tokens", "all")
    alone = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert alone.returncode == 0, alone.stderr
    both = under_torchrun(folder, "program.py", "two", "tokens", "all")
    assert both.returncode == 0, both.stderr
    return folder, *([line.split() for line in done.stdout.splitlines()] for done in (alone, both))


@pytest.mark.parametrize("how", ("tokens", "all"))
def test_statistics_of_two_processes_are_those_of_one(collected, how):
    folder, alone, both = collected
    one, two = moments(folder / f"one {how}"), moments(folder / f"two {how}")
    assert one.keys() == two.keys() and len(one) == 2
    for name in one:
        assert float((one[name] - two[name]).norm() / one[name].norm()) < 1e-12
    (tokens,) = (line[2] for line in alone if line[0] == how)
    said = sorted(line for line in both if line[0] == how)
    assert said == [[how, str(rank), tokens, "0", "True"] for rank in (0, 1)]
    for name in one:
        with safe_open(folder / f"one {how}" / name, "pt") as a, safe_open(folder / f"two {how}" / name, "pt") as b:
            assert a.metadata() == b.metadata()


def test_a_process_that_dies_ends_the_job_and_its_checkpoints_serve_the_next(tmp_path, collected):
    written(tmp_path)
    done = under_torchrun(tmp_path, "program.py", "part", "all", "die")
    assert done.returncode != 0 and "Signal 9 (SIGKILL) received" in done.stderr
    names = {path.name for path in (tmp_path / "part all").glob("*.safetensors")}
    assert names == {"checkpoint-1-of-2.safetensors", "checkpoint-2-of-2.safetensors"}
    again = under_torchrun(tmp_path, "program.py", "part", "all")
    assert again.returncode == 0, again.stderr
    resumed = {line.split()[3] for line in again.stdout.splitlines()}
    assert len(resumed) == 1 and int(resumed.pop()) > 0
    part, whole = moments(tmp_path / "part all"), moments(collected[0] / "two all")
    assert part.keys() == whole.keys() and all(torch.equal(part[name], whole[name]) for name in part)
