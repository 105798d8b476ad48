"""What methods that tune a matrix capture, in a file: used again for what it was made for, with the same bits."""

from __future__ import annotations

import os

import pytest
import torch
from tiny_models import make_model, make_tokenizer

from kedit_fast import Editor
from kedit_fast.editing.keys import StateBudget
from kedit_fast.editing.tuning import grace
from kedit_fast.editing.tuning.captured import CapturedRows
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import EditError, MethodError
from kedit_fast.models import row_runner

GENERAL = {"neighborhood_prompts": ["The instrument is"]}
REQUESTS = [
    {"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "violin", "target_true": "trumpet", **GENERAL},
    {"prompt": "{} speaks", "subject": "Marcel Maupoint", "target_new": "Swedish", "target_true": "English", **GENERAL},
    {"prompt": "{} plays the", "subject": "Thelonious Monk", "target_new": "tower", "target_true": "piano", **GENERAL},
]
NUMBERS = {
    "locft-bf": {"num_steps": 2, "lr": 1e-2},
    "ft-m": {"num_steps": 2, "lr": 1e-2},
    "dinm": {"num_steps": 2, "lr": 1e-2},
    "wise": {"num_steps": 2, "lr": 0.1, "units": "relative"},
    "memoir": {"num_steps": 2, "lr": 0.1, "top_k": 16},
    "grace": {"num_steps": 2, "lr": 0.05, "eps": 0.05, "units": "relative"},
}
WHERE = {"wise": (1,), "dinm": (1, 2)}


@pytest.fixture(scope="module")
def models():
    return {kind: make_model(kind) for kind in ("llama", "gpt2", "gemma2")}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def make(models, tokenizer):
    """An editor of one of the models; what was written is undone at the end."""
    made = []

    def maker(values=None, method="ft-m", kind="llama", layers=None, **more):
        layers = WHERE.get(method, (1,)) if layers is None else layers
        numbers = {**NUMBERS[method], **more.pop("hparams", {})}
        made.append(Editor(models[kind], tokenizer, method, layers=layers, hparams=numbers, values=values, **more))
        return made[-1]

    yield maker
    for editor in made:
        editor.restore()


@pytest.fixture
def ran(monkeypatch):
    """Rows of each pass that ran, without those of the trial of a way to run."""
    rows, run, tries = [], row_runner._recorded, row_runner._try

    def counting(view, batch, *args):
        rows.append(len(batch.input_ids))
        return run(view, batch, *args)

    def trial(*args):
        before = len(rows)
        way = tries(*args)
        del rows[before:]
        return way

    monkeypatch.setattr(row_runner, "_recorded", counting)
    monkeypatch.setattr(row_runner, "_try", trial)
    return rows


def result_of(editor, requests=REQUESTS):
    """Everything that an edit has made, to be compared to the bit; undone."""
    result = editor.edit(requests)
    assert result.batch
    if editor.recipe.makes_memory:
        made = editor.memory.digest
    else:
        made = {name: [update.dense() for update in updates] for name, updates in result.updates.items()}
    editor.restore()
    return made, result.losses, result.steps


def same(one, other):
    if isinstance(one[0], str):
        return one == other
    return one[1:] == other[1:] and all(
        torch.equal(a, b) for name in one[0] for a, b in zip(one[0][name], other[0][name], strict=True)
    )


@pytest.mark.parametrize(
    ("method", "kind", "more"),
    [
        ("locft-bf", "llama", {}), ("ft-m", "gpt2", {}), ("ft-m", "gemma2", {}), ("dinm", "llama", {}),
        ("wise", "llama", {}), ("memoir", "llama", {}), ("grace", "llama", {}),
        ("grace", "llama", {"replacement": "replace_all", "val_init": "warm"}),
    ],
)  # fmt: skip
def test_with_a_file_results_have_the_bits_that_they_have_without(method, kind, more, make, ran, tmp_path, monkeypatch):
    path, descents, engine = tmp_path / "rows", [], grace.find_shared_values
    monkeypatch.setattr(grace, "find_shared_values", lambda *args, **kw: descents.append(1) or engine(*args, **kw))
    expected = result_of(make(None, method, kind, hparams=more))
    ran.clear(), descents.clear()
    assert same(result_of(make(path, method, kind, hparams=more)), expected)
    assert ran or descents
    written = path.read_bytes()
    ran.clear(), descents.clear()
    assert same(result_of(make(path, method, kind, hparams=more)), expected)
    assert not ran and not descents and path.read_bytes() == written


def test_the_file_grows_and_serves_nothing_else(make, ran, tmp_path):
    path = tmp_path / "rows"
    for more, requests, passes in [
        ({}, REQUESTS[:2], [2]),
        ({}, REQUESTS[:2], []),
        ({"hparams": {"lr": 1e-3}}, REQUESTS[:2], []),  # says nothing of what is captured
        ({}, REQUESTS, [3]),  # rows that run together with others get other bits
        ({"layers": (2,)}, REQUESTS[:2], [2]),
        ({}, REQUESTS[:2], []),
    ]:
        expected = result_of(make(**more), requests)
        ran.clear()
        assert same(result_of(make(path, **more), requests), expected)
        assert ran == passes


def test_edited_matrices_below_are_another_model(make, ran, tmp_path, models):
    path = tmp_path / "rows"
    result_of(make(path, layers=(2,)))
    below, above = make(layers=(1,)), make(path, layers=(2,))
    below.edit(REQUESTS[:1])
    ran.clear()
    result_of(above)
    assert ran == [3]
    below.restore()
    make(layers=(3,)).edit(REQUESTS[:1])  # nothing of it comes to layer 2
    ran.clear()
    result_of(make(path, layers=(2,)))
    assert not ran


def test_calls_in_sequence_are_served_one_by_one(make, ran, tmp_path):
    path, results = tmp_path / "rows", []
    for _ in range(2):
        editor = make(path, "locft-bf")
        ran.clear()
        for request in REQUESTS:
            editor.edit([request])
        results.append(editor.view.weight(1).clone())
        editor.restore()
    assert not ran and torch.equal(*results)


def test_files_that_cannot_serve_are_refused_by_name(make, models, tokenizer, tmp_path):
    path, numbers = tmp_path / "rows", {"layers": [1], "hparams": NUMBERS["ft-m"]}
    result_of(make(path))
    with pytest.raises(EditError, match="rows holds rows of another model: different weights"):
        Editor(make_model("llama", seed=1), tokenizer, "ft-m", values=path, **numbers)
    with pytest.raises(EditError, match="rows holds rows of another model: different model_config"):
        Editor(models["gpt2"], tokenizer, "ft-m", values=path, **numbers)
    with pytest.raises(MethodError, match="npz files hold optimized values, and wise stores captured rows"):
        make(str(tmp_path / "layer_{}_clamp_{}_case_{}.npz"), "wise")
    with pytest.raises(MethodError, match="a store of values holds"):
        make(object(), "grace")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    editor = make(path)
    before = editor.view.weight(1).clone()
    with pytest.raises(EditError, match="rows is damaged: a block differs from its checksum"):
        editor.edit(REQUESTS)
    assert torch.equal(editor.view.weight(1), before) and not editor.ledger.count
    path.write_bytes(data[:-40])
    with pytest.raises(EditError, match="rows is damaged"):
        make(path)


@pytest.mark.parametrize("method", ("wise", "ft-m"))
def test_an_interrupt_and_a_full_disk_lose_nothing(method, make, ran, tmp_path, monkeypatch):
    path = tmp_path / "rows"
    expected = result_of(make(None, method))

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CapturedRows, "of_requests", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(path, method).edit(REQUESTS)
    stored = ValueFile(path)._blocks
    assert stored
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("kedit_fast.support.files.save_file", full)
        editor = make(path, method)
        with pytest.raises(EditError, match="No space left"):
            editor.edit(REQUESTS[:1])
        assert path.read_bytes() == before and not editor.ledger.count
    assert os.listdir(tmp_path) == [path.name]
    assert same(result_of(editor, REQUESTS), expected)  # what could not be written is there, too
    assert len(ValueFile(path)._blocks) > len(stored)


def test_values_and_rows_stand_in_one_file(make, models, tokenizer, tmp_path):
    path = tmp_path / "both"
    numbers = {"v_num_grad_steps": 2, "mom2_adjustment": False, "clamp_norm_factor": 0.75}

    def memit():
        return result_of(
            Editor(models["llama"], tokenizer, "memit", layers=[1], hparams=numbers, values=path, prefixes=())
        )

    first = memit()
    result_of(make(path))
    blocks, entries = ValueFile(path)._blocks, ValueFile(path).entries
    assert same(memit(), first) and len(entries) == 3 and len(blocks) == 1


@pytest.mark.parametrize("method", ("wise", "memoir", "ft-m", "dinm"))
def test_captured_rows_have_the_budget_of_the_editor(method, make, monkeypatch):
    budgets, original = [], CapturedRows.capture.__func__

    def capture(cls, view, rows, layer, weight=None, budget=None, store=None):
        budgets.append(budget)
        return original(cls, view, rows, layer, weight, budget, store)

    monkeypatch.setattr(CapturedRows, "capture", classmethod(capture))
    result_of(make(None, method, state_budget=StateBudget(device=12345)))
    assert budgets and set(budgets) == {12345}
