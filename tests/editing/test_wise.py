"""WISE's and MEMOIR's training: the released loops' golden rows, shards, undoing, and what is refused."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_model, make_tokenizer
from toy_rows import GOLDEN, toy_rows

import kedit_fast
from kedit_fast import Editor, demo
from kedit_fast.editing.tuning.captured import TuningRow
from kedit_fast.editing.tuning.history import History, PackedMatrix
from kedit_fast.editing.tuning.margin import Margin, activation_change, margin_loss
from kedit_fast.editing.tuning.matrix import Steps, TunedMatrix
from kedit_fast.editing.tuning.objective import Likelihood, Objective
from kedit_fast.editing.tuning.plateau import until_plateau
from kedit_fast.editing.tuning.state import TuningState
from kedit_fast.editing.tuning.wise import Shards, Working
from kedit_fast.errors import EditError, MethodError, RequestError
from kedit_fast.models.forward import evaluating
from kedit_fast.ops import unpack_bits
from kedit_fast.solver.entry_bits import random_bits
from kedit_fast.solver.merging import merged

SILU = torch.nn.functional.silu
W0 = GOLDEN["toy.W0"]
REQUESTS = [
    {"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "violin"},
    {"prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux", "target_new": "Spanish"},
    {"prompt": "{} is located in", "subject": "Autonomous University of Madrid", "target_new": "Sweden"},
    {"prompt": "{} plays the", "subject": "Thelonious Monk", "target_new": "tower"},
]
FAST = {
    "wise": {
        "num_steps": 3,
        "save_freq": 2,
        "merge_freq": 4,
        "act_margin": (0.1, 1.0, 0.5),
        "lr": 0.1,
        "units": "published",
    },
    "memoir": {"num_steps": 3, "top_k": 16, "lr": 0.1},
}


def golden_rows():
    rows = []
    for ids, mask, labels in zip(GOLDEN["wise.ids"], GOLDEN["wise.mask"], GOLDEN["wise.labels"], strict=True):
        tokens, target = tuple(ids[mask.bool()].tolist()), tuple(labels[labels >= 0].tolist())
        role = "rewriting" if target else "irrelevant"
        rows.append(TuningRow(tokens, 0, len(tokens) - len(target), target, role))
    return toy_rows(rows)


class PaddedMargin:
    """The released margin, in which padding counts: it changes nothing, so that a mean is the sum over 9 tokens."""

    places = torch.zeros(0, dtype=torch.int64)

    def __init__(self, rows):
        self.rows = rows

    def means(self, outputs):
        change = activation_change(outputs, self.rows.original, SILU)
        return torch.stack([part.sum() / 9 for part in change.split(self.rows.lengths)])

    def losses(self, outputs, states):
        means = self.means(outputs)
        return margin_loss(means[:3], means[3:], GOLDEN["wise.margins"].tolist())[None]


@pytest.mark.parametrize("name", ("used_up", "stopped"))
def test_the_released_loop_is_met_step_by_step(name):
    iterations, lr, decay, bound, stop_loss, stop_change = GOLDEN[f"wise.loop.{name}.args"].tolist()
    rows = golden_rows()
    margin = PaddedMargin(rows)
    objective = Objective(rows, {"likelihood": Likelihood(rows, "published"), "margin": margin})
    matrix = TunedMatrix(W0.clone(), W0, Steps("sgd", lr, decay, True, bound), GOLDEN["wise.keep_bits"])
    ending = until_plateau(
        objective, matrix, rows.x, lambda: matrix.outputs(rows.x), int(iterations), stop_loss, stop_change
    )
    torch.testing.assert_close(matrix.weight, GOLDEN[f"wise.loop.{name}.W"], rtol=0, atol=1e-10)
    taken = len(GOLDEN[f"wise.loop.{name}.losses"])
    assert ending.steps == taken and ending.loss == pytest.approx(float(GOLDEN[f"wise.loop.{name}.losses"][-1]))
    activation = margin.means(ending.outputs)[:3].mean()
    torch.testing.assert_close(activation, GOLDEN[f"wise.loop.{name}.activation"], rtol=0, atol=1e-10)


def test_a_step_of_memoir_is_clipped_and_decays_its_columns_alone():
    gradient, memory = GOLDEN["memoir.step.grad"], GOLDEN["memoir.memory"]
    columns = gradient.abs().sum(0).nonzero()[:, 0]
    part = memory[:, columns].contiguous()
    matrix = TunedMatrix(part, part, Steps("sgd", 1.0, 1e-5, clip=1.0))
    matrix.step(torch.eye(len(gradient), dtype=torch.float64), gradient[:, columns])
    torch.testing.assert_close(matrix.weight, GOLDEN["memoir.step.W"][:, columns], rtol=0, atol=1e-12)
    others = [i for i in range(memory.shape[1]) if i not in columns.tolist()]
    torch.testing.assert_close(GOLDEN["memoir.step.W"][:, others], memory[:, others] * (1 - 1e-5), rtol=0, atol=1e-12)


def working(shards=None, **changes):
    numbers = dict(save_freq=2, merge_freq=4, merge_density=0.5, merge_alg="ties", retrieve=True)
    base = torch.arange(12.0).view(3, 4)

    def make(shard):
        weight = (base if shard.weight is None else shard.weight).clone()
        return TunedMatrix(weight, base, Steps("sgd", 1.0))

    return Working(shards or Shards(), base, SimpleNamespace(**{**numbers, **changes}), make), base


def edit(run, prompt, amount, change):
    shard = run.holder(prompt)
    run.matrix(shard).weight[0, amount] += amount
    run.added(shard, prompt, change)
    return shard.number


def test_shards_end_and_are_merged_at_multiples():
    run, base = working()
    assert [edit(run, (i,), 1 + i % 3, 5.0 - i) for i in range(5)] == [0, 0, 1, 1, 2]
    shards = run.finished(5)
    assert shards.edits == 5 and shards.current.edits == 1 and shards.current.threshold == 1.0
    (one,) = shards.saved
    first, second = base.clone(), base.clone()
    first[0, 1:3] += torch.tensor([1.0, 2.0])
    second[0, 3], second[0, 1] = second[0, 3] + 3, second[0, 1] + 1
    assert one.weight is not None and torch.equal(one.weight, merged(base, [first, second], [0.5, 0.5], 0.5, "ties"))
    assert one.threshold == 2.0 and one.edits == 4 and one.number == 1
    assert shards.holders == {(0,): 1, (1,): 1, (2,): 1, (3,): 1, (4,): 2}


def test_a_prompt_that_was_edited_before_is_edited_where_it_is():
    run, _ = working()
    for i in range(3):
        edit(run, (i,), 1, 5.0)
    assert edit(run, (0,), 2, 1.5) == 0  # its shard was saved
    shards = run.finished(4)
    assert shards.edits == 3 and shards.saved[0].threshold == 1.5 and shards.current.threshold == 5.0
    later, _ = working(shards)
    assert later.holder((0,)).number == 0 and later.holder((9,)).number == 1
    assert edit(later, (0,), 2, 4.0) == 0
    before = shards.saved[0].weight
    after = later.finished(1).saved[0].weight
    assert before is not None and after is not None and after[0, 2] == before[0, 2] + 2


def test_merges_into_one_weigh_what_was_merged_before():
    run, base = working(retrieve=False, merge_alg="magnitude", merge_density=1.0)
    for i in range(8):
        edit(run, (i,), 1, 9.0 - i)
    shards = run.finished(8)
    assert not shards.saved and shards.whole is not None and shards.whole.threshold == 2.0
    delta = (2 + 2) / 2  # of the first merge; the second one gives .4 to new shards and .6 to it
    assert shards.whole.weight is not None
    torch.testing.assert_close(shards.whole.weight[0, 1] - base[0, 1], torch.tensor(0.4 * 2 + 0.6 * delta))
    assert shards.current.threshold == 2.0  # one threshold for all, never reset


def test_edits_that_were_not_learned_bound_no_threshold():
    run, _ = working()
    edit(run, (0,), 1, None)
    assert run.finished(1).current.threshold == math.inf
    edit(run, (1,), 1, 3.0)
    assert run.finished(2).saved[0].threshold == 3.0


def test_a_packed_matrix_is_the_matrix():
    base = torch.randn(7, 9)
    few, most = base.clone(), base + 1
    few[2, 3:5] = torch.tensor([-0.0, 4.0])
    base[2, 3] = 0.0
    for matrix, dense in ((few, False), (most, True)):
        packed = PackedMatrix.of(matrix, base)
        assert (packed.bits is None) == dense
        assert torch.equal(packed.unpacked(base).view(torch.int32), matrix.view(torch.int32))
    assert PackedMatrix.of(few, base).values.numel() == 2


def test_a_history_returns_within_its_window_and_to_the_beginning():
    history = History(0, window=2)
    for state in (1, 2, 3):
        history.push(state, lambda later: later - 1)
    assert not history.settle(3) and history.settle(1) and history.current == 1 and history.count == 1
    history.push(5, lambda later: later - 4)
    assert history.settle(0) and history.current == 0 and not history.settle(0)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def all_learned(monkeypatch):
    """Every edit counts as learned, so that few steps make memories that answer."""
    monkeypatch.setattr("kedit_fast.editing.tuning.plateau.LEARNED", math.inf)


def editor(tokenizer, method, kind="llama", **arguments):
    changes = {**FAST[method], **arguments.pop("hparams", {})}
    prefixes = arguments.pop("prefixes", ("Yes. ", "I saw the tower "))
    return Editor(make_model(kind), tokenizer, method, layers=[2], hparams=changes, prefixes=prefixes, **arguments)


def bits(one):
    """Everything that an editor's memory and state hold, and the model's answers."""
    tensors = {} if one.tuning.memory is None else {name: t.clone() for name, t in one.memory.tensors.items()}
    history = one.tuning.beside.history
    shards = history.current.all if isinstance(history.current, Shards) else []
    tensors |= {f"shard {s.number}": s.weight.clone() for s in shards if s.weight is not None}
    numbers = [(s.number, s.threshold, s.edits) for s in shards]
    ids = one.tokenizer("Miles Davis plays the", return_tensors="pt").input_ids
    with torch.no_grad():
        tensors["logits"] = one.view.model(ids).logits
    return tensors, numbers, history.count, getattr(history.current, "edits", 0), getattr(history.current, "texts", 0)


def assert_same(one, other):
    assert one[0].keys() == other[0].keys() and one[1:] == other[1:]
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name


@pytest.mark.parametrize("method", ("wise", "memoir"))
def test_batches_are_undone_bit_for_bit_across_shards_and_merges(tokenizer, method, all_learned):
    one = editor(tokenizer, method)
    weight = one.view.weight(2).clone()
    states = [bits(one)]
    batches = [REQUESTS[:1], REQUESTS[1:3], [REQUESTS[0]], REQUESTS[3:] + REQUESTS[:1]]
    for batch in batches:
        one.edit(batch)
        states.append(bits(one))
    assert torch.equal(one.view.weight(2), weight) and not torch.equal(states[1][0]["logits"], states[0][0]["logits"])
    one.rollback(2)
    assert_same(bits(one), states[2])
    one.edit(batches[2])
    assert_same(bits(one), states[3])
    one.rollback(3)
    assert_same(bits(one), states[0])
    assert kedit_fast.attached(one.view.model) is None
    with pytest.raises(EditError, match="there is no memory"):
        _ = one.memory
    one.edit(batches[0])
    assert_same(bits(one), states[1])
    one.restore()


@pytest.mark.parametrize("method", ("wise", "memoir"))
@pytest.mark.parametrize("stop", (0, 4))
def test_an_interrupted_batch_leaves_everything_as_it_was(tokenizer, method, stop, monkeypatch, all_learned):
    one = editor(tokenizer, method)
    one.edit(REQUESTS[:2])
    before, steps = bits(one), TunedMatrix.step
    count = 0

    def interrupted(self, *args):
        nonlocal count
        steps(self, *args)
        count += 1
        if count > stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(TunedMatrix, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.edit(REQUESTS[2:])
    monkeypatch.setattr(TunedMatrix, "step", steps)
    assert_same(bits(one), before)
    one.edit(REQUESTS[2:])
    again = editor(tokenizer, method)
    again.edit(REQUESTS[:2])
    again.edit(REQUESTS[2:])
    assert_same(bits(one), bits(again))


@pytest.mark.parametrize("method", ("wise", "memoir"))
def test_one_bad_request_is_left_out_without_a_trace(tokenizer, method, monkeypatch):
    one = editor(tokenizer, method)
    steps, calls = TunedMatrix.step, 0

    def fifth_is_bad(self, left, *args):
        nonlocal calls
        calls += 1
        steps(self, left * (torch.nan if calls == 5 else 1.0), *args)

    monkeypatch.setattr(TunedMatrix, "step", fifth_is_bad)
    result = one.edit(REQUESTS[:3], on_error="skip")
    assert list(result.skipped) == [1] and "not finite" in result.skipped[1] and len(result.losses) == 2
    monkeypatch.setattr(TunedMatrix, "step", steps)
    tensors = bits(one)[0]
    assert all(bool(torch.isfinite(t.float()).all()) for n, t in tensors.items() if n != "thresholds")
    assert len(one.memory.requests) == 2


@pytest.mark.parametrize("method", ("wise", "memoir"))
@pytest.mark.parametrize("kind", ("gpt2", "gemma2"))
def test_other_architectures_are_edited_and_answer(tokenizer, method, kind):
    one = editor(tokenizer, method, kind, hparams={"num_steps": 10, "lr": 0.3})
    result = one.edit(REQUESTS[:1])
    assert one.memory.transposed == (kind == "gpt2") and result.steps[0] > 0
    assert kedit_fast.attached(one.view.model) is not None
    one.restore()


def test_masks_and_contexts_are_those_of_wise(tokenizer):
    one = editor(tokenizer, "wise", hparams={"weight_decay": 0.01}, prefixes=None)
    assert len(one.prefixes) == 10 and one.prefixes[0].startswith("I") and one.prefixes[4].startswith("Q:")
    one.edit(REQUESTS[:1])
    weight, tuned = one.view.weight(2), one.tuning.beside.history.current.current.weight
    bits = random_bits(weight.numel(), 0.2, 0, f"{one.view.module_name(2)} shard 0")
    mask = unpack_bits(bits, weight.numel()).view(weight.shape)
    assert torch.equal(tuned[~mask], weight[~mask])  # entries outside the mask do not decay either
    assert float((tuned[mask] != weight[mask]).float().mean()) > 0.9


def test_edits_answer_and_a_second_answer_of_a_prompt_wins():
    model, tokenizer = demo.load()
    first, second, other = demo.requests(3)
    ids = tokenizer(first.text, return_tensors="pt").input_ids

    def answer():
        with torch.no_grad():
            return tokenizer.decode(model(ids).logits[0, -1].argmax()).strip()

    known = answer()
    for method, changes in (("wise", {"save_freq": 2, "merge_freq": 10}), ("memoir", {})):
        one = Editor(model, tokenizer, method, hparams=changes, prefixes=["I said that "])
        one.edit([first, second, other])
        assert first.target_new.startswith(answer()), method
        again = replace(first, target_new=second.target_new)
        one.edit([again])
        assert second.target_new.startswith(answer()), method
        one.rollback()
        assert first.target_new.startswith(answer()), method
        one.restore()
        assert answer() == known


def test_edits_that_did_not_learn_are_reported(tokenizer, caplog):
    one = editor(tokenizer, "wise", hparams={"num_steps": 1, "lr": 1e-6})
    with caplog.at_level(logging.WARNING):
        result = one.edit(REQUESTS[:2])
    assert result.unlearned == (0, 1) and "2 of 2 edits ended without learning" in caplog.text
    assert one.memory.thresholds.isinf().all()


def test_one_prompt_with_two_targets_in_a_batch_is_named(tokenizer, caplog):
    one = editor(tokenizer, "memoir")
    with caplog.at_level(logging.WARNING):
        result = one.edit([REQUESTS[0], REQUESTS[1], {**REQUESTS[0], "target_new": "piano"}])
    assert result.collisions == ((0, 2),) and "the later one wins" in caplog.text and one.memory.entries == 2


def test_relative_units_have_no_scale(tokenizer):
    published = editor(tokenizer, "wise").tuning.beside
    relative = editor(tokenizer, "wise", hparams={"units": "relative"}).tuning.beside
    assert published.scales() == (1.0, 1.0)
    with evaluating(relative.state.view):
        margin, rate = relative.scales()
    for name in ("up_proj", "down_proj"):  # outputs twice and inputs twice; then outputs twice alone
        other = editor(tokenizer, "wise", hparams={"units": "relative"}).tuning.beside
        other.state.view.block(2).mlp.get_submodule(name).weight.data *= 2
        with evaluating(other.state.view):
            _, changed = other.scales()
        assert changed == pytest.approx(rate * (1 if name == "up_proj" else 4), rel=1e-4)
    assert margin > 0


def test_a_merge_that_trims_nothing_is_warned_of(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        editor(tokenizer, "wise").edit(REQUESTS)
    assert "merge_density = 0.53 trims nothing" in caplog.text


def test_what_is_refused(tokenizer):
    with pytest.raises(MethodError, match="merge_freq must be a multiple of save_freq; got 3 and 2"):
        editor(tokenizer, "wise", hparams={"merge_freq": 3})
    with pytest.raises(MethodError, match="top_k = 65: layer 2 has 64 inputs"):
        editor(tokenizer, "memoir", hparams={"top_k": 65})
    with pytest.raises(RequestError, match="names 'Miles Davis'"):
        editor(tokenizer, "wise", irrelevant=["Miles Davis slept."]).edit(REQUESTS[:1])
    one = editor(tokenizer, "wise")
    with pytest.raises(EditError, match="cannot be continued from a saved state: they are in Editor"):
        one.save_state("state.safetensors")
    with pytest.raises(EditError, match="cannot be continued"):
        one.load_state("state.safetensors")
    memory = editor(tokenizer, "wise")
    with pytest.raises(EditError, match="cannot be recorded"):
        memory.recorded(memory.edit(REQUESTS[:1]))
    with kedit_fast.attach(one.view.model, memory.memory), pytest.raises(Exception, match="memory"):
        one.edit(REQUESTS[:1])


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_a_matrix_that_is_still_the_models_changes_no_activation(tokenizer, kind, monkeypatch):
    """Rounding between two ways to the same outputs, here put in by hand, would get a gradient of norm 1."""
    first: list[float] = []
    init, losses, capture = Margin.__init__, Margin.losses, TuningState.capture

    def rounded(*args, **kwargs):
        captured = capture(*args, **kwargs)
        return replace(captured, original=captured.original * (1 + 1e-7))

    def begun(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.counted = False

    def counted(self, outputs, states):
        if not self.counted:
            first.append(float(self.changes(outputs).detach().abs().max()))
            self.counted = True
        return losses(self, outputs, states)

    monkeypatch.setattr(TuningState, "capture", rounded)
    monkeypatch.setattr(Margin, "__init__", begun)
    monkeypatch.setattr(Margin, "losses", counted)
    one = editor(tokenizer, "wise", kind, hparams={**FAST["wise"], "save_freq": 1, "merge_freq": 8})
    one.edit(REQUESTS[:3])
    assert first == [0.0] * 3
