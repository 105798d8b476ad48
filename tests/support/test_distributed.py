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
import sys
from kedit_fast import Editor, demo
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
process_group.stop()
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


def test_processes_share_a_store_and_refuse_to_differ(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    done = under_torchrun(tmp_path, "program.py")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        same, batches, said = (tmp_path / f"done{rank}").read_text().split(" ", 2)
        assert same == "True" and batches == "0"
        assert said.startswith("EditError") and "different requests" in said


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
            while not os.path.exists(os.path.join(sys.argv[1], "checkpoint-1-of-2.safetensors")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save = save
numbers = dict(max_tokens=2000) if "tokens" in sys.argv else dict(seed=3)
found = collect_into(sys.argv[1], model, tokenizer, Corpus(documents, **numbers), (0, 2), batch_tokens=200,
                     checkpoint_every=0, resume=True, progress=False)
whole = collect_statistics(model, tokenizer, documents, (0, 2), batch_tokens=200, progress=False, **numbers)
same = torch.equal(whole.moment(2).moment, torch.load("moment.pt")) if os.path.exists("moment.pt") else ""
print(f"{{rank}} {{found.tokens}} {{found.resumed}} {{same}}\\n", end="", flush=True)  # one write: processes share it
if int(os.environ.get("WORLD_SIZE", "1")) == 1:
    torch.save(whole.moment(2).moment, "moment.pt")
else:
    process_group.stop()
"""


def moments(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: load_file(path)["second_moment"] for path in folder.glob("*.safetensors")}


def written(tmp_path: Path) -> Path:
    program = tmp_path / "program.py"
    program.write_text(STATISTICS.format(tests=str(Path(__file__).parents[1])), encoding="utf-8")
    return program


@pytest.mark.parametrize("how", ("tokens", "all"))
def test_statistics_of_two_processes_are_those_of_one(tmp_path, how):
    written(tmp_path)
    command = (sys.executable, "program.py", "one", how)
    alone = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert alone.returncode == 0, alone.stderr
    done = under_torchrun(tmp_path, "program.py", "two", how)
    assert done.returncode == 0, done.stderr
    one, two = moments(tmp_path / "one"), moments(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 2
    for name in one:
        assert float((one[name] - two[name]).norm() / one[name].norm()) < 1e-12
    tokens = alone.stdout.split()[1]
    assert sorted(line.split() for line in done.stdout.splitlines()) == [
        [str(rank), tokens, "0", "True"] for rank in (0, 1)
    ]
    for name in one:
        with safe_open(tmp_path / "one" / name, "pt") as a, safe_open(tmp_path / "two" / name, "pt") as b:
            assert a.metadata() == b.metadata()


def test_a_process_that_dies_ends_the_job_and_its_checkpoints_serve_the_next(tmp_path):
    written(tmp_path)
    done = under_torchrun(tmp_path, "program.py", "part", "all", "die")
    assert done.returncode != 0 and "Signal 9 (SIGKILL) received" in done.stderr
    names = {path.name for path in (tmp_path / "part").glob("*.safetensors")}
    assert names == {"checkpoint-1-of-2.safetensors", "checkpoint-2-of-2.safetensors"}
    again = under_torchrun(tmp_path, "program.py", "part", "all")
    assert again.returncode == 0, again.stderr
    resumed = {line.split()[2] for line in again.stdout.splitlines()}
    assert len(resumed) == 1 and int(resumed.pop()) > 0
    assert under_torchrun(tmp_path, "program.py", "whole", "all").returncode == 0
    part, whole = moments(tmp_path / "part"), moments(tmp_path / "whole")
    assert part.keys() == whole.keys() and all(torch.equal(part[name], whole[name]) for name in part)


LOST = """
import os
from kedit_fast.support import process_group
from kedit_fast.errors import KeditError
import torch
process_group.start()
rank, _ = process_group.world()
if rank == 1:
    os._exit(0)
try:
    process_group.sum_(torch.zeros(3))
except KeditError as error:
    open("said", "w").write(str(error))
os._exit(0)
"""


def test_a_lost_connection_says_so(tmp_path):
    (tmp_path / "program.py").write_text(LOST, encoding="utf-8")
    assert under_torchrun(tmp_path, "program.py").returncode == 0
    assert "process 0 of 2 lost the others: one has ended" in (tmp_path / "said").read_text()
