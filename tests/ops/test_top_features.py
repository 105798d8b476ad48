from __future__ import annotations

import pytest
import torch

from kedit_fast import top_features
from kedit_fast.errors import InvalidArgumentError
from kedit_fast.ops import pack_bits, unpack_bits


def unpacked(bits, d):
    """[R, b] uint8 as [R, d] bool."""
    return torch.stack([unpack_bits(row, d) for row in bits]) if len(bits) else bits.new_empty(0, d).bool()


def plain(x, starts, center, k, permutation):
    rows = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        score = (x[begin:end].float().mean(0) - center).abs()
        flags = torch.zeros(x.shape[1], dtype=torch.bool)
        flags[permutation[score.sort(descending=True, stable=True).indices[:k]]] = True
        rows.append(pack_bits(flags))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_the_features_that_stand_out(dtype):
    for d in (1, 8, 61, 200):
        x, center, permutation = torch.randn(30, d).to(dtype), torch.randn(d), torch.randperm(d)
        starts = torch.tensor([2, 5, 6, 20, 30])
        bits = top_features(x, starts, center, 1 + d // 3, permutation)
        assert torch.equal(bits, plain(x, starts, center, 1 + d // 3, permutation))
        assert bits.shape == (4, -(-d // 8)) and bool((unpacked(bits, d).sum(1) == 1 + d // 3).all())


def test_ties_go_to_the_lowest_feature():
    bits = top_features(torch.ones(2, 20), torch.tensor([0, 2]), torch.zeros(20), 3, torch.arange(20).flip(0))
    assert unpacked(bits, 20).nonzero()[:, 1].tolist() == [17, 18, 19]


def test_a_sequence_has_the_same_bits_in_a_batch_as_alone():
    x, center, permutation = torch.randn(300, 129).bfloat16(), torch.zeros(129), torch.randperm(129)
    starts = torch.tensor([0, 37, 140, 141, 300])
    bits = top_features(x, starts, center, 64, permutation)
    for row, begin, end in zip(bits, starts[:-1], starts[1:], strict=True):
        alone = top_features(x[begin:end], torch.tensor([0, int(end - begin)]), center, 64, permutation)
        assert torch.equal(alone[0], row)


def test_a_sequence_of_nothing_or_of_what_is_not_finite_has_no_features():
    x = torch.randn(6, 16)
    x[0, 3], x[5, 1] = torch.nan, torch.inf
    bits = top_features(x, torch.tensor([0, 2, 2, 4, 6]), torch.zeros(16), 4, torch.arange(16))
    assert unpacked(bits, 16).sum(1).tolist() == [0, 0, 4, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3)}, r"x must be \[N, d\]"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, "x must be float32"),
        ({"starts": torch.tensor([0, 4])}, "from 0 to 3"),
        ({"starts": torch.tensor([0, 2, 1])}, "must not decrease"),
        ({"starts": torch.tensor([-1, 2])}, "from 0 to 3"),
        ({"starts": torch.ones(2)}, "starts must be int64"),
        ({"starts": torch.empty(0, dtype=torch.int64)}, r"starts must be \[R \+ 1\]"),
        ({"center": torch.ones(3)}, r"center must be \[4\]"),
        ({"k": 0}, r"k must be in \[1, 4\]; got 0"),
        ({"k": 5}, r"k must be in \[1, 4\]; got 5"),
        ({"permutation": torch.arange(5)}, r"permutation must be \[4\]"),
        ({"permutation": torch.arange(4, device="meta")}, "permutation on meta"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change, message):
    good = {"x": torch.ones(3, 4), "starts": torch.tensor([0, 3]), "center": torch.zeros(4), "k": 2}
    with pytest.raises(InvalidArgumentError, match=message):
        top_features(**{**good, "permutation": torch.arange(4), **change})
