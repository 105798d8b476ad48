"""Merges of memories and masks of entries, against tests/data/golden_memories.safetensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kedit_fast.errors import InvalidArgumentError, MethodError
from kedit_fast.ops import pack_bits, unpack_bits
from kedit_fast.solver.entry_bits import random_bits
from kedit_fast.solver.merging import RULES, merged, trimmed


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "data" / "golden_memories.safetensors")


@pytest.mark.parametrize(
    ("row", "memories", "rule", "coefficients"),
    [
        ("ties.dense", "dense", "ties", [1 / 3] * 3),
        ("ties.sparse", "sparse", "ties", [1 / 3] * 3),
        ("ties.drifted", "drifted", "ties", [1 / 3] * 3),
        ("ties.uneven", "dense", "ties", [0.2, 0.2, 0.6]),
        ("magnitude", "dense", "magnitude", [1 / 3] * 3),
        ("magnitude_norm", "dense", "magnitude_norm", [1 / 3] * 3),
        ("sign", "dense", "sign", [1 / 3] * 3),
    ],
)
def test_merges_meet_their_golden_rows(golden, row, memories, rule, coefficients):
    result = merged(golden["toy.W0"], list(golden[f"merge.{memories}"]), coefficients, 0.53, rule)
    torch.testing.assert_close(result, golden[f"merge.{row}"], rtol=0, atol=1e-12)


def test_the_mean_is_of_memories():
    base, memories = torch.randn(5, 7), torch.randn(2, 5, 7)
    torch.testing.assert_close(merged(base, list(memories), [0.5, 0.5], 0.1, "mean"), memories.mean(0))


def test_a_trim_keeps_exactly_its_share_and_the_lowest_index_of_a_tie():
    delta = torch.tensor([[1.0, -1.0, 1.0], [0.5, 0.0, 2.0]])
    assert trimmed(delta, 0.5).tolist() == [[1.0, -1.0, 0.0], [0.0, 0.0, 2.0]]


def test_16_bit_memories_are_merged_in_fp32():
    base = torch.randn(8, 8).bfloat16()
    memories = [base + torch.randn(8, 8).bfloat16() for _ in range(2)]
    wide = merged(base.float(), [memory.float() for memory in memories], [0.5, 0.5], 0.5, "ties")
    assert torch.equal(merged(base, memories, [0.5, 0.5], 0.5, "ties"), wide)


def test_unknown_rules_and_missing_memories_are_refused():
    with pytest.raises(MethodError, match=r"dare_ties.*choose from ties"):
        merged(torch.zeros(2, 2), [torch.zeros(2, 2)], [1.0], 0.5, "dare_ties")
    for rule in RULES:
        with pytest.raises(MethodError, match="0 memories"):
            merged(torch.zeros(2, 2), [], [], 0.5, rule)


def test_bits_are_those_of_the_golden_mask(golden):
    mask = golden["wise.keep"].bool()
    assert torch.equal(pack_bits(mask), golden["wise.keep_bits"])
    assert torch.equal(unpack_bits(golden["wise.keep_bits"], mask.numel()), mask.flatten())


def test_random_masks_are_a_function_of_seed_and_name():
    first = random_bits(100_001, 0.2, 1, "shard 0")
    assert torch.equal(first, random_bits(100_001, 0.2, 1, "shard 0")) and first.numel() == 12_501
    mask = unpack_bits(first, 100_001)
    assert abs(float(mask.double().mean()) - 0.2) < 0.005
    for other in (random_bits(100_001, 0.2, 2, "shard 0"), random_bits(100_001, 0.2, 1, "shard 1")):
        shared = (mask & unpack_bits(other, 100_001)).double().mean()
        assert abs(float(shared) - 0.04) < 0.005
    assert bool(unpack_bits(random_bits(13, 1.0, 0), 13).all())
    with pytest.raises(InvalidArgumentError, match="share"):
        random_bits(8, 0.0, 0)
