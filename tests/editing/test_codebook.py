"""The codebook of GRACE against the golden sequence, and what was mended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kedit_fast.editing.tuning.codebook import Codebook, Entering, Label, enter
from kedit_fast.solver.value_descent import clamped_step

EPS = 0.33
GOLDEN = load_file(Path(__file__).parents[1] / "data" / "golden_memories.safetensors")


def golden(name):
    return GOLDEN[name]


class Toy:
    """The toy language model of the golden file: one row, the value in place of the output at its last prompt token."""

    def __init__(self):
        self.E, self.P, self.A, self.U, self.W0 = (golden(f"toy.{name}") for name in ["E", "P", "A", "U", "W0"])

    def inputs(self, ids):
        states = self.E[torch.tensor(ids)]
        mean = states.cumsum(0) / torch.arange(1, len(ids) + 1)[:, None]
        beside = (states + mean) / 2
        return beside, torch.nn.functional.silu(beside @ self.P.T)

    def loss(self, prompt, target, value):
        beside, x = self.inputs([*prompt, *target])
        out = x @ self.W0.T
        place = len(prompt) - 1
        out = torch.cat([out[:place], value[None], out[place + 1 :]])
        states = beside + out
        mean = states.cumsum(0) / torch.arange(1, len(states) + 1)[:, None]
        logits = (states + torch.tanh(mean @ self.A.T)) @ self.U.T
        return torch.nn.functional.cross_entropy(logits[place:-1], torch.tensor(target))


def edits():
    prompts = [[int(i) for i in row if i >= 0] for row in golden("grace.prompts")]
    return list(zip(prompts, golden("grace.targets").tolist(), strict=True))


def labels(requests):
    return [Label(tuple(target), len(prompt)) for prompt, target in requests]


@pytest.fixture(scope="module")
def toy():
    return Toy()


def queries(toy, requests):
    return torch.stack([toy.inputs(prompt)[1][-1] for prompt, _ in requests])


@pytest.mark.parametrize("together", (12, 5, 1))
@pytest.mark.parametrize("rule, name", (("ids", "mended"), ("mean", "published")))
def test_the_golden_sequence(toy, rule, name, together):
    requests, book, entered = edits(), Codebook(), []
    for begin in range(0, len(requests), together):
        part = requests[begin : begin + together]
        book, some = enter(book, queries(toy, part), labels(part), lambda query: EPS, rule=rule)
        entered += some
    assert [one.how for one in entered] == golden(f"grace.{name}.what").tolist()
    assert [one.entry for one in entered] == golden(f"grace.{name}.entry").tolist()
    assert [one.inside for one in entered] == golden(f"grace.{name}.hit").bool().tolist()
    assert torch.allclose(book.keys, golden(f"grace.{name}.keys"), atol=1e-12, rtol=0)
    assert torch.allclose(book.radii, golden(f"grace.{name}.radii"), atol=1e-10, rtol=0)
    assert book.edits == 12


def test_the_golden_values_by_the_step_of_the_value_engine(toy):
    requests = edits()
    _, lr, steps = golden("grace.numbers").tolist()
    _, entered = enter(Codebook(), queries(toy, requests), labels(requests), lambda query: EPS)
    values: dict[int, torch.Tensor] = {}
    for (prompt, target), one, losses in zip(requests, entered, golden("grace.mended.losses"), strict=True):
        output = toy.inputs(prompt)[1][-1] @ toy.W0.T
        value = output if one.begins else values[one.entry]
        delta, mean, square = value - output, torch.zeros(10), torch.zeros(10)
        mean, square = mean.double(), square.double()
        for step in range(int(steps)):
            point = delta.clone().requires_grad_(True)
            loss = toy.loss(prompt, target, output + point)
            assert abs(float(loss.detach()) - float(losses[step])) < 1e-10
            (gradient,) = torch.autograd.grad(loss, point)
            count, active = torch.tensor([step + 1]), torch.tensor([True])
            delta, mean, square = clamped_step(
                delta, gradient, mean, square, count, active, lr, torch.tensor([torch.inf], dtype=torch.float64)
            )
        values[one.entry] = output + delta
    found = torch.stack([values[place] for place in range(len(values))])
    assert torch.allclose(found, golden("grace.mended.values"), atol=1e-10, rtol=0)


def test_the_prompt_of_an_edit_can_be_edited_again(toy):
    again = [([5, 6, 7, 8], [3, 9]), ([5, 6, 7, 8], [7, 1])]
    for together in (1, 2):
        book = Codebook()
        for begin in range(0, 2, together):
            part = again[begin : begin + together]
            book, entered = enter(book, queries(toy, part), labels(part), lambda query: EPS)
        assert entered[-1].how == Entering.TAKEN_OVER and entered[-1].inside and entered[-1].begins
        assert len(book.entries) == 1 and book.radii.tolist() == [EPS] and book.entries[0].label.target == (7, 1)
    assert golden("grace.again.radii").tolist()[0] < 0  # as released, neither of two entries answers


def test_no_radius_is_negative_and_rounding_of_the_model_is_no_distance():
    query = torch.randn(40)
    near = torch.stack([query, query * (1 + 1e-5)])
    different = [Label((1,), 3), Label((2,), 3)]
    book, entered = enter(Codebook(), near, different, lambda query: 1.0)
    assert entered[1].how == Entering.SPLIT and float(book.radii.min()) > 0 and entered[1].inside
    book, entered = enter(Codebook(), near, different, lambda query: 1.0, rounding=2**-8)
    assert entered[1].how == Entering.TAKEN_OVER and len(book.entries) == 1


def test_a_radius_that_grows_holds_the_query_in_single_precision():
    """Distances are summed in another order where prompts are served; the one that a radius has grown to must pass."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(60, 700, generator=generator)
    for key, query in zip(keys[::2], keys[1::2], strict=True):
        pair = torch.stack([key, query])
        book, entered = enter(Codebook(), pair, [Label((1,), 3)] * 2, lambda query: 30.0)
        assert entered[1].how == Entering.EXPANDED
        squares = (key - query).square()
        for distance in ((key - query).norm(), squares.cumsum(0)[-1].sqrt(), squares.flip(0).cumsum(0)[-1].sqrt()):
            assert float(distance) <= float(book.radii[0])


def test_the_moving_average_moves_the_key_halfway():
    pair = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    book, entered = enter(Codebook(), pair, [Label((1,), 3)] * 2, lambda query: 0.8, expand="moving_average")
    assert [one.how for one in entered] == [Entering.FIRST, Entering.EXPANDED]
    assert book.keys.tolist() == [[0.5, 0.0]] and float(book.radii[0]) == pytest.approx(1.0, rel=1e-5)


def test_blocks_of_queries_give_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 3, generator=generator)
    names = [Label((int(i) % 3,), 2) for i in torch.randperm(50, generator=generator)]
    whole, entered = enter(Codebook(), rows, names, lambda query: 0.4, expand="moving_average")
    monkeypatch.setattr("kedit_fast.editing.tuning.codebook.BLOCK", 7)
    parts, others = enter(Codebook(), rows, names, lambda query: 0.4, expand="moving_average")
    assert entered == others and torch.equal(whole.keys, parts.keys) and torch.equal(whole.radii, parts.radii)
    assert {one.how for one in entered} >= {Entering.ADDED, Entering.SPLIT, Entering.EXPANDED}
