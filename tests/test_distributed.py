"""Two processes under torchrun give what one gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from kedit_fast import demo

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
RUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone")
FAST = ("--set", "v_num_grad_steps=6", "--set", "mom2_adjustment=false", "--method", "memit", "--dtype", "float32")


def records(path: Path, count: int) -> Path:
    rows = [
        {"id": r.id, "prompt": r.prompt, "subject": r.subject, "target_new": r.target_new, "target_true": r.target_true}
        for r in demo.requests(count)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def edit(start, requests: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    command = (*start, "-m", "kedit_fast.cli", "edit", str(demo.DATA), "--requests", str(requests), "--out", str(out))
    return subprocess.run((*command, *FAST, *more), capture_output=True, text=True, cwd=out.parent, check=False)


def test_two_processes_equal_one(tmp_path):
    requests, values = records(tmp_path / "requests.json", 7), tmp_path / "values.safetensors"
    one = edit((sys.executable,), requests, tmp_path / "one", "--json")
    assert one.returncode == 0, one.stderr
    two = edit(RUN, requests, tmp_path / "two", "--json", "--values", str(values))
    assert two.returncode == 0, two.stderr
    (line,) = [line for line in two.stdout.splitlines() if line.startswith("{")]  # one process speaks
    assert json.loads(line)["efficacy"] == json.loads(one.stdout)["efficacy"]
    a, b, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "one", tmp_path / "two", demo.DATA)
    )
    changed = [name for name in a if not torch.equal(a[name], before[name])]
    assert len(changed) == 2
    for name in changed:
        gap = (a[name] - b[name]).norm() / (a[name] - before[name]).norm()
        assert float(gap) < 1e-3, name  # the values' own bound, through the solve
    again = edit((sys.executable,), requests, tmp_path / "three", "--values", str(values))
    assert again.returncode == 0, again.stderr  # the file one of the two wrote


def test_values_are_used_again_after_a_rollback(tmp_path):
    """The first process alone has the file; the others follow it."""
    program = tmp_path / "again.py"
    program.write_text(
        "from kedit_fast import Editor, demo, distributed\n"
        "distributed.start()\n"
        "rank, _ = distributed.world()\n"
        "editor = Editor(*demo.load(), 'memit', prefixes=(), values='values', "
        "hparams=dict(v_num_grad_steps=2, mom2_adjustment=False))\n"
        "first = editor.edit(demo.requests(4)).updates\n"
        "editor.rollback()\n"
        "again = editor.edit(demo.requests(5)[:4]).updates\n"
        "same = all((first[n][0].left == again[n][0].left).all() for n in first)\n"
        "open(f'done{rank}', 'w').write(str(bool(same)))\n"
        "distributed.stop()\n",
        encoding="utf-8",
    )
    done = subprocess.run((*RUN, str(program)), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"done{rank}").read_text() for rank in (0, 1)] == ["True", "True"]


def test_processes_that_differ_are_told(tmp_path):
    program = tmp_path / "differ.py"
    program.write_text(
        "from kedit_fast import Editor, demo, distributed\n"
        "distributed.start()\n"
        "rank, _ = distributed.world()\n"
        "editor = Editor(*demo.load(), 'memit', prefixes=(), "
        "hparams=dict(v_num_grad_steps=2, mom2_adjustment=False))\n"
        "try:\n"
        "    editor.edit(demo.requests(4 + rank))\n"
        "except Exception as error:\n"
        "    print(rank, type(error).__name__, error, flush=True)\n"
        "distributed.stop()\n",
        encoding="utf-8",
    )
    done = subprocess.run((*RUN, str(program)), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    said = sorted(line for line in done.stdout.splitlines() if "EditError" in line)
    assert len(said) == 2 and all("different requests" in line for line in said), done.stdout
