"""Statistics that survive what happens to a job: kills, full disks, other jobs, other arguments."""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from floors import relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import load_statistics
from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.statistics import checkpoint, corpus, memory_plan, resumable
from kedit_fast.statistics.collect import collect_statistics, growing_statistics
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.moments import SecondMomentAccumulator
from kedit_fast.statistics.resumable import collect_into

DOCUMENTS = [f"{text} Number {i}." for i, text in enumerate(TEXT * 20)]
HERE = Path(__file__).parents[1]
D2 = 8 * 64 * 64  # bytes of one layer's sum in these models


@pytest.fixture
def two():
    return make_model("llama"), make_tokenizer()


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(corpus, "LEAST_WINDOW", 1000)
    monkeypatch.setattr(corpus, "BATCHES_A_WINDOW", 2)


def into(folder, two, layers=(0, 2), texts=DOCUMENTS, *, numbers=None, **options):
    options = {"batch_tokens": 200, "progress": False, "checkpoint_every": 1e9, **options}
    return collect_into(folder, *two, Corpus(texts, **(numbers or {})), layers, **options)


def tensors(folder):
    return {p.name: load_file(p)["second_moment"] for p in sorted(folder.glob("*.safetensors"))}


def same(a, b):
    left, right = tensors(a), tensors(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Stop(Exception):
    pass


def stopped_after(monkeypatch, batches, error=Stop):
    """The job ends by an error at the given batch."""
    count, before = [0], SecondMomentAccumulator.update

    def update(self, *args):
        count[0] += 1
        if count[0] > 2 * batches:  # two layers
            raise error()
        before(self, *args)

    monkeypatch.setattr(SecondMomentAccumulator, "update", update)
    return lambda: monkeypatch.setattr(SecondMomentAccumulator, "update", before)


def test_a_folder_holds_what_memory_would(tmp_path, two):
    found = into(tmp_path / "s", two)
    assert found.passes == 1 and found.resumed == 0 and found.documents == len(DOCUMENTS)
    whole = collect_statistics(*two, DOCUMENTS, (0, 2), batch_tokens=200, progress=False)
    loaded = load_statistics(tmp_path / "s", *two)
    for layer in (0, 2):
        assert torch.equal(loaded.moment(layer).moment, whole.moment(layer).moment)
        assert loaded.moment(layer).count == whole.moment(layer).count == found.tokens
    assert (loaded.corpus, loaded.documents, loaded.settings) == (whole.corpus, whole.documents, whole.settings)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [".lock", *(p.name for p in found.files)]


@pytest.mark.parametrize("batches", (1, 2, 5, 12))
@pytest.mark.parametrize("seed", (None, 5))
def test_a_stopped_job_goes_on_to_the_same_bits(tmp_path, two, monkeypatch, batches, seed):
    into(tmp_path / "whole", two, numbers={"seed": seed})
    go = stopped_after(monkeypatch, batches)
    with pytest.raises(Stop):
        into(tmp_path / "part", two, numbers={"seed": seed}, checkpoint_every=0)
    go()
    assert not list((tmp_path / "part").glob("model*"))
    found = into(tmp_path / "part", two, numbers={"seed": seed}, resume=True)
    assert 0 < found.resumed < found.tokens  # everything up to the batch that failed
    assert same(tmp_path / "whole", tmp_path / "part")
    assert into(tmp_path / "part", two, numbers={"seed": seed}, resume=True).passes == 0


def test_resume_starts_continues_and_finds_finished(tmp_path, two):
    first = into(tmp_path / "s", two, resume=True)
    assert first.passes == 1
    before = {p: p.stat().st_mtime_ns for p in first.files}
    again = into(tmp_path / "s", two, resume=True)
    assert again.passes == 0 and again.tokens == again.resumed == first.tokens and again.documents == first.documents
    assert before == {p: p.stat().st_mtime_ns for p in first.files}
    more = into(tmp_path / "s", two, (0, 1, 2), resume=True)  # a layer more: that one alone
    assert more.passes == 1 and before == {p: p.stat().st_mtime_ns for p in first.files}
    into(tmp_path / "all", two, (0, 1, 2))
    assert same(tmp_path / "s", tmp_path / "all")


def test_a_job_killed_between_two_files_goes_on(tmp_path, two, monkeypatch):
    into(tmp_path / "whole", two)
    before = resumable.save_statistics

    def first_file_alone(statistics, folder):
        if (folder / "model.layers.0.mlp.down_proj.safetensors").exists():
            raise Stop
        before(statistics, folder)

    monkeypatch.setattr(resumable, "save_statistics", first_file_alone)
    with pytest.raises(Stop):
        into(tmp_path / "part", two, checkpoint_every=0)
    monkeypatch.setattr(resumable, "save_statistics", before)
    assert len(list((tmp_path / "part").glob("model*"))) == 1
    into(tmp_path / "part", two, resume=True)
    assert same(tmp_path / "whole", tmp_path / "part")


@pytest.fixture
def one_thread():
    """As PROGRAM has it: the bits of a product may depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from tiny_models import TEXT, make_model, make_tokenizer
from kedit_fast.statistics import checkpoint, collect, corpus
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.statistics.resumable import collect_into
corpus.LEAST_WINDOW, corpus.BATCHES_A_WINDOW = 1000, 2
documents = [f"{{text}} Number {{i}}." for i, text in enumerate(TEXT * {repeats})]
before = checkpoint.save
def save(*args):
    before(*args)
    print(next(iter(args[2].values())).count, flush=True)
checkpoint.save = save
found = collect_into(sys.argv[1], make_model("llama"), make_tokenizer(), Corpus(documents), (0, 2), batch_tokens=200,
                     checkpoint_every=float(sys.argv[2]), resume=True, progress=False)
print("resumed", found.resumed, flush=True)
"""


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path, two, one_thread):
    """SIGKILL at random moments, in the middle of batches and of writes, until a call comes through."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(HERE), repeats=40))
    documents = [f"{text} Number {i}." for i, text in enumerate(TEXT * 40)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    rng, kept, kills = random.Random(0), 0, 0
    for _ in range(3):
        command = (sys.executable, str(program), str(tmp_path / "part"), "0")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(rng.randint(2, 12)):
            line = process.stdout.readline().split()
            if not line or line[0] == "resumed":
                break
            assert int(line[0]) > kept  # nothing before the last checkpoint is done again
            last = int(line[0])
        time.sleep(rng.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        if process.returncode == 0:
            break
        kills += 1
        kept = max([last, *map(int, (n for n in rest if n.isdigit()))])
        with safe_open(tmp_path / "part" / "checkpoint-1-of-1.safetensors", "pt") as file:
            assert file.metadata()["format_version"] == checkpoint.FORMAT_VERSION
    assert kills >= 2
    assert into(tmp_path / "part", two, texts=documents, resume=True).resumed >= kept
    into(tmp_path / "whole", two, texts=documents)
    assert same(tmp_path / "whole", tmp_path / "part")
    assert not list((tmp_path / "part").glob(".*.safetensors.*"))  # what was being written


def test_other_arguments_are_refused_by_name(tmp_path, two, monkeypatch):
    go = stopped_after(monkeypatch, 4)
    with pytest.raises(Stop):
        into(tmp_path / "s", two, checkpoint_every=0)
    go()
    cases = {
        "batch_tokens 200, not 100": dict(batch_tokens=100),
        "max_tokens not set, not 50": dict(numbers={"max_tokens": 50}),
        "seed not set, not 1": dict(numbers={"seed": 1}),
        "max_length 128, not 5": dict(numbers={"max_length": 5}),
        "checkpoint has layers 0, 2, this job wants 0, 1": dict(layers=(0, 1)),
        "its first": dict(texts=["Another text.", *DOCUMENTS]),
    }
    for message, options in cases.items():
        with pytest.raises(StatisticsError, match=message):
            into(tmp_path / "s", two, resume=True, **options)
    with pytest.raises(StatisticsError, match="another model: different weights"):
        into(tmp_path / "s", (make_model("llama", seed=1), two[1]), resume=True)
    with pytest.raises(StatisticsError, match="--resume continues it, --overwrite starts anew"):
        into(tmp_path / "s", two)
    assert into(tmp_path / "s", two, resume=True).resumed > 0  # nothing was lost by all that
    with pytest.raises(StatisticsError, match=r"down_proj.safetensors was made from something else: different seed"):
        into(tmp_path / "s", two, resume=True, numbers={"seed": 1})
    with pytest.raises(StatisticsError, match="different text"):
        into(tmp_path / "s", two, resume=True, texts=["Another text.", *DOCUMENTS])


def test_overwriting_keeps_the_old_files_until_the_new_are_there(tmp_path, two, monkeypatch):
    into(tmp_path / "s", two, (0, 1, 2))
    old = tensors(tmp_path / "s")
    texts = DOCUMENTS[:40]
    go = stopped_after(monkeypatch, 3)
    with pytest.raises(Stop):
        into(tmp_path / "s", two, texts=texts, overwrite=True, checkpoint_every=0)
    go()
    kept = tensors_of_layers(tmp_path / "s")
    assert all(torch.equal(kept[name], old[name]) for name in old)
    assert into(tmp_path / "s", two, texts=texts, resume=True).resumed > 0
    into(tmp_path / "new", two, texts=texts)
    for layer in (0, 2):
        assert torch.equal(
            load_statistics(tmp_path / "s", *two, (layer,)).moment(layer).moment,
            load_statistics(tmp_path / "new", *two, (layer,)).moment(layer).moment,
        )
    into(tmp_path / "s", two, texts=texts, overwrite=True)
    assert same(tmp_path / "s", tmp_path / "new")  # layer 1 of the old text is gone


def tensors_of_layers(folder):
    return {p.name: load_file(p)["second_moment"] for p in folder.glob("model*.safetensors")}


def test_two_jobs_do_not_share_a_folder(tmp_path, two):
    with (
        checkpoint.claimed(tmp_path / "s"),
        pytest.raises(StatisticsError, match=r"another process is collecting statistics into .*s"),
    ):
        into(tmp_path / "s", two, resume=True)
    into(tmp_path / "s", two, resume=True)


def test_damaged_checkpoints_are_named_and_kept(tmp_path, two, monkeypatch):
    go = stopped_after(monkeypatch, 4)
    with pytest.raises(Stop):
        into(tmp_path / "s", two, checkpoint_every=0)
    go()
    path = tmp_path / "s" / "checkpoint-1-of-1.safetensors"
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], b"", b"x" * len(good)):
        path.write_bytes(bad)
        with pytest.raises(StatisticsError, match=r"checkpoint-1-of-1.safetensors is damaged"):
            into(tmp_path / "s", two, resume=True)
        assert path.read_bytes() == bad
    save_file({"0": torch.zeros(2)}, path, {"format_version": "0"})
    with pytest.raises(StatisticsError, match="no checkpoint of this version"):
        into(tmp_path / "s", two, resume=True)
    path.write_bytes(good)
    path.with_name("checkpoint-2-of-4.safetensors").write_bytes(good)
    with pytest.raises(StatisticsError, match="of a job of 4 processes, this one has 1"):
        into(tmp_path / "s", two, resume=True)
    into(tmp_path / "s", two, overwrite=True)
    into(tmp_path / "whole", two)
    assert same(tmp_path / "s", tmp_path / "whole")


def test_a_place_that_cannot_be_written_is_named(tmp_path, two):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StatisticsError, match=f"cannot write statistics to {place}"):
            into(place, two, resume=True)
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_is_named_and_keeps_the_last_checkpoint(tmp_path, two, monkeypatch):
    """The operating system's own refusal: no file may grow beyond a limit."""
    into(tmp_path / "whole", two)
    go = stopped_after(monkeypatch, 5)
    with pytest.raises(Stop):
        into(tmp_path / "s", two, checkpoint_every=0)
    go()
    kept = (tmp_path / "s" / "checkpoint-1-of-1.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(StatisticsError, match=r"cannot write .*checkpoint-1-of-1.safetensors: .*[Tt]oo large"):
            into(tmp_path / "s", two, resume=True, checkpoint_every=0)
        with pytest.raises(StatisticsError, match=r"cannot write .*down_proj.safetensors: .*[Tt]oo large"):
            into(tmp_path / "s", two, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in (tmp_path / "s").iterdir() if p.name != ".lock"] == ["checkpoint-1-of-1.safetensors"]
    assert (tmp_path / "s" / "checkpoint-1-of-1.safetensors").read_bytes() == kept
    into(tmp_path / "s", two, resume=True)
    assert same(tmp_path / "s", tmp_path / "whole")


@pytest.mark.parametrize(
    "room, passes, sums, disk", ((D2, 3, D2, 4 * D2), (2 * D2, 2, 2 * D2, 4 * D2), (9 * D2, 1, 3 * D2, 6 * D2))
)
def test_what_a_collection_takes_is_said_before_it_starts(tmp_path, two, room, passes, sums, disk):
    heard = []

    def heard_plan(needs):
        heard.append(needs)
        assert not [p for p in (tmp_path / "s").iterdir() if p.suffix == ".safetensors"]

    common = dict(masters="device", master_bytes=room, on_plan=heard_plan, texts=DOCUMENTS[:40])
    done = into(tmp_path / "s", two, (0, 1, 2), **common)
    (needs,) = heard
    assert needs.layers == (0, 1, 2) and needs.passes == passes == done.passes and not needs.on_cpu
    assert needs.sum_bytes == sums and needs.disk_bytes == disk
    written = sum(path.stat().st_size for path in done.files)
    assert needs.file_bytes == 3 * D2 and 0 < written - needs.file_bytes < 3 * 8192  # headers
    into(tmp_path / "s", two, (0, 1, 2), resume=True, **common)
    assert len(heard) == 1  # nothing is left to do
    into(tmp_path / "s", two, (0, 1, 2, 3), resume=True, **{**common, "on_plan": heard.append})
    assert heard[1].layers == (3,) and heard[1].file_bytes == D2


def test_a_disk_with_less_room_than_the_files_take_is_warned_of(tmp_path, two, monkeypatch, caplog):
    usage = resumable.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(resumable.shutil, "disk_usage", lambda _: usage._replace(free=3 * D2))
    into(tmp_path / "one", two, (0,), DOCUMENTS[:40])
    assert "free" not in caplog.text
    into(tmp_path / "two", two, (0, 1), DOCUMENTS[:40])
    assert (
        "two has 96.0 KiB free, and files with checkpoints take up to 128.0 KiB (the files alone 64.0 KiB)"
        in caplog.text
    )


@pytest.mark.parametrize("room, passes", ((D2, 3), (2 * D2, 2), (3 * D2, 1)))
def test_layers_in_groups_give_the_same(tmp_path, two, room, passes, monkeypatch):
    into(tmp_path / "whole", two, (0, 1, 2))
    go = stopped_after(monkeypatch, 6 * (passes - 1) + 5)
    with pytest.raises(Stop):
        into(tmp_path / "part", two, (0, 1, 2), masters="device", master_bytes=room, checkpoint_every=0)
    go()
    found = into(tmp_path / "part", two, (0, 1, 2), masters="device", master_bytes=room, resume=True)
    assert 1 <= found.passes <= passes and same(tmp_path / "whole", tmp_path / "part")
    assert into(tmp_path / "one", two, (0, 1, 2), masters="device", master_bytes=room).passes == passes


def test_groups_need_text_that_can_be_read_again_and_room_for_one(tmp_path, two):
    with pytest.raises(StatisticsError, match="2 passes over the text, but it can be read once only"):
        into(tmp_path / "s", two, texts=iter(DOCUMENTS), masters="device", master_bytes=D2)
    with pytest.raises(StatisticsError, match="the sum of one layer takes"):
        into(tmp_path / "s", two, master_bytes=D2 - 1)


def test_memory_is_measured_and_one_pass_on_the_host_is_preferred(two, monkeypatch):
    view = resumable.Job(*two, Corpus(DOCUMENTS), (0, 1, 2)).view
    free = {"meta": 2 * D2 / memory_plan.SHARE + 1, "cpu": 10 * D2}
    monkeypatch.setattr(memory_plan, "free_bytes", lambda device: free[device.type])
    monkeypatch.setattr(type(view), "row_device", lambda self, layer: torch.device("meta"))  # a device of its own
    plan = memory_plan.plan_groups
    assert plan(view, (0, 1, 2), 0, "device") == [memory_plan.Group((0, 1), False), memory_plan.Group((2,), False)]
    assert plan(view, (0, 1, 2), 0, "auto") == [memory_plan.Group((0, 1, 2), True)]
    assert plan(view, (0, 1), 0, "auto") == [memory_plan.Group((0, 1), False)]
    assert plan(view, (0, 1), 0, "cpu") == [memory_plan.Group((0, 1), True)]
    free["cpu"] = 1.5 * D2
    assert len(plan(view, (0, 1, 2), 0, "auto")) == 2


def test_masters_elsewhere_get_the_same_sums():
    rows, weights = torch.randn(300, 64), torch.rand(300, dtype=torch.float64)
    here, there = SecondMomentAccumulator("m", 64), SecondMomentAccumulator("m", 64)
    there._staged = True  # as where the rows are on another device
    for part in rows.split(100):
        here.update(part)
        there.update(part)
    assert torch.equal(here.result().moment, there.finish().moment)
    here, there = SecondMomentAccumulator("m", 64), SecondMomentAccumulator("m", 64)
    there._staged = True
    for accumulator in (here, there):
        accumulator.update(rows, rows[:, 0] > 0, weights)
    kept = rows[rows[:, 0] > 0].double()
    w = weights[rows[:, 0] > 0]
    expected = kept.T @ (w[:, None] * kept) / w.sum()
    assert relative_error(here.result().moment, expected) < 1e-6
    assert relative_error(there.result().moment, expected) < 1e-6 and there.count == here.count == len(kept)


def test_sums_are_finished_in_their_own_memory():
    """No second d x d matrix: what is returned lies where the sum was."""
    accumulator = SecondMomentAccumulator("m", 64)
    accumulator.update(torch.randn(100, 64))
    place, expected = accumulator.sum.data_ptr(), accumulator.result().moment
    found = accumulator.finish().moment
    assert found.data_ptr() == place and torch.equal(found, expected) and torch.equal(found, found.T)


def test_growing_counts_contain_each_other(two):
    counts = (50, 60, 500, 10**9)
    found = list(growing_statistics(*two, Corpus(DOCUMENTS), (0, 2), counts, 100))
    assert [s.moment(0).count for s in found[:3]] == [50, 60, 500]
    lost = len(counts) * 60  # documents that a count ends in are not taken up again
    whole = collect_statistics(*two, DOCUMENTS, (0, 2), progress=False)
    assert whole.moment(0).count - lost < found[-1].moment(0).count <= whole.moment(0).count
    for small, large in itertools.pairwise(found):
        rest = large.moment(2).moment * large.moment(2).count - small.moment(2).moment * small.moment(2).count
        assert float(torch.linalg.eigvalsh(rest)[0]) > -1e-6 * float(rest.diagonal().max())
    first = collect_statistics(*two, DOCUMENTS, (0, 2), max_tokens=50, batch_tokens=100, progress=False)
    assert torch.equal(first.moment(2).moment, found[0].moment(2).moment)
    assert len(list(growing_statistics(*two, Corpus(DOCUMENTS, max_tokens=60), (0,), counts, 100))) == 2


def test_an_interrupt_on_the_command_line_says_how_to_go_on(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    program = textwrap.dedent("""
        import sys
        from kedit_fast.cli import main as cli
        from kedit_fast.statistics import checkpoint
        before = checkpoint.save
        def save(*args):
            before(*args)
            raise KeyboardInterrupt
        checkpoint.save = save
        cli.app(sys.argv[1:], prog_name="kedit-fast")
    """)
    arguments = ("stats", "model", "--text", "text.txt", "--layers", "0", "--out", "out")
    done = subprocess.run(
        (sys.executable, "-c", program, *arguments, "--checkpoint-every", "0"), cwd=tmp_path, capture_output=True,
        text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 130 and "interrupted; --resume continues from the last checkpoint in out" in done.stderr
    assert "Traceback" not in done.stderr and "was not written" not in done.stderr
    assert (tmp_path / "out" / "checkpoint-1-of-1.safetensors").exists()


def flipped(path):
    """One bit of the last number in the file."""
    data = bytearray(path.read_bytes())
    data[-6] ^= 4
    path.write_bytes(data)


def test_flipped_bits_are_found(tmp_path, two, monkeypatch):
    go = stopped_after(monkeypatch, 4)
    with pytest.raises(Stop):
        into(tmp_path / "s", two, checkpoint_every=0)
    go()
    path = tmp_path / "s" / "checkpoint-1-of-1.safetensors"
    good = path.read_bytes()
    flipped(path)
    with pytest.raises(StatisticsError, match=r"checkpoint-1-of-1.safetensors is damaged .*not what was written"):
        into(tmp_path / "s", two, resume=True)
    path.write_bytes(good)
    file = into(tmp_path / "s", two, resume=True).files[0]
    flipped(file)
    with pytest.raises(StatisticsError, match=f"{file.name} is damaged: it is not what was written"):
        load_statistics(tmp_path / "s", *two)


def test_files_of_others_in_the_folder_are_let_alone(tmp_path, two):
    place = tmp_path / "model"
    two[0].save_pretrained(place)
    weights = (place / "model.safetensors").read_bytes()
    with pytest.raises(StatisticsError, match="exists"):
        into(place, two)
    into(place, two, resume=True)
    into(place, two, overwrite=True)
    assert (place / "model.safetensors").read_bytes() == weights
    assert sorted(load_statistics(place, *two).layers) == [0, 2]


def test_a_text_that_grew_is_not_finished(tmp_path, two):
    into(tmp_path / "s", two, (0,), DOCUMENTS[:50])
    for texts in (DOCUMENTS, iter(DOCUMENTS)):
        with pytest.raises(StatisticsError, match="text"):
            into(tmp_path / "s", two, (0, 1), texts, resume=True)
    with pytest.raises(StatisticsError, match="different text"):
        into(tmp_path / "s", two, (0,), iter(["Another.", *DOCUMENTS]), resume=True)
    assert into(tmp_path / "s", two, (0,), iter(DOCUMENTS[:50]), resume=True).passes == 0
    for numbers in ({"max_samples": 50}, {"max_tokens": 700}):  # an end that was asked for
        folder = tmp_path / next(iter(numbers))
        into(folder, two, (0,), DOCUMENTS[:70], numbers=numbers)
        assert into(folder, two, (0,), DOCUMENTS, numbers=numbers, resume=True).passes == 0


@pytest.mark.parametrize("room", (D2, 2 * D2))
def test_an_overwriting_job_goes_on_wherever_it_was_killed(tmp_path, two, monkeypatch, room):
    options = dict(texts=DOCUMENTS[:40], masters="device", master_bytes=room)
    into(tmp_path / "new", two, **options)
    into(tmp_path / "s", two, (0, 1, 2))
    go = stopped_after(monkeypatch, 0)  # before the first checkpoint
    with pytest.raises(Stop):
        into(tmp_path / "s", two, overwrite=True, **options)
    go()
    assert into(tmp_path / "s", two, resume=True, **options).passes == 2 * D2 // room
    assert same(tmp_path / "s", tmp_path / "new")  # layer 1 of the old text is gone
    assert not (tmp_path / "s" / checkpoint.OVERWRITING).exists()


def test_a_model_that_is_not_finite_stops_at_a_checkpoint_and_keeps_the_last_one(tmp_path, two):
    model, tokenizer = two
    (token,) = tokenizer("~")["input_ids"]  # in no other document
    texts = [*DOCUMENTS[:40], "~", *DOCUMENTS[40:]]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    with pytest.raises(StatisticsError, match=r"not finite after \d+ tokens"):
        into(tmp_path / "s", two, texts=texts, checkpoint_every=0)
    sums = load_file(tmp_path / "s" / "checkpoint-1-of-1.safetensors")
    assert all(bool(torch.isfinite(total).all()) for total in sums.values())


def test_a_finished_folder_may_be_read_only(tmp_path, two, monkeypatch):
    into(tmp_path / "s", two)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint.os, "open", refused)
    monkeypatch.setattr(resumable.tempfile, "mkdtemp", refused)
    assert into(tmp_path / "s", two, resume=True).passes == 0
    with pytest.raises(StatisticsError, match=r"cannot write statistics to .*Permission denied"):
        into(tmp_path / "s", two, overwrite=True)


def test_bad_numbers_leave_no_folder(tmp_path, two):
    with pytest.raises(InvalidArgumentError, match="masters must be"):
        into(tmp_path / "s", two, masters="moon")
    with pytest.raises(StatisticsError, match="give one of them"):
        into(tmp_path / "s", two, resume=True, overwrite=True)
    with pytest.raises(InvalidArgumentError, match="checkpoint_every"):
        into(tmp_path / "s", two, checkpoint_every=-1)
    with pytest.raises(StatisticsError, match="no text"):
        into(tmp_path / "s", two, texts=[])
    assert not (tmp_path / "s").exists()


def test_weights_are_told_apart(tmp_path, two, monkeypatch):
    go = stopped_after(monkeypatch, 4)
    with pytest.raises(Stop):
        into(tmp_path / "s", two, checkpoint_every=0, numbers={"token_weights": lambda ids: [1.0] * len(ids)})
    go()
    with pytest.raises(StatisticsError, match="was begun with token_weights"):
        into(tmp_path / "s", two, resume=True, numbers={"token_weights": lambda ids: [2.0] * len(ids)})
    into(tmp_path / "s", two, resume=True, numbers={"token_weights": lambda ids: [1.0] * len(ids)})
