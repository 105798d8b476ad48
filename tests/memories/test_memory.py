"""Memories alone: routes and outputs against the golden tensors, files, and what is refused."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kedit_fast.errors import InvalidArgumentError, SideMemoryError
from kedit_fast.memories.memory import ActivationMemory, FingerprintMemory, KeyValueMemory, SideMemory
from kedit_fast.memories.selection import masked_product, set_bits

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "golden_memories.safetensors")
ABOUT = {"module": "model.layers.1.mlp.down_proj", "original": "0" * 64, "dtype": "float64"}


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def retrieve(order="farthest", **changes) -> ActivationMemory:
    weights = torch.cat([GOLDEN["route.new"][None], GOLDEN["route.memories"]])
    fields = dict(weights=weights, thresholds=GOLDEN["route.retrieve.thresholds"], order=order)
    return ActivationMemory(**{**fields, **ABOUT, **changes})


def fingerprints(**changes) -> FingerprintMemory:
    top, threshold = GOLDEN["memoir.numbers"].tolist()
    fields = dict(
        weight=GOLDEN["memoir.memory"].T.contiguous(),
        book=pack_bits(GOLDEN["memoir.masks"].bool()),
        center=GOLDEN["memoir.background"],
        permutation=GOLDEN["memoir.permutation"],
        top_k=int(top),
        threshold=threshold,
    )
    return FingerprintMemory(**{**fields, **ABOUT, **changes})


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def codebook(**changes) -> KeyValueMemory:
    names = {name: GOLDEN[f"grace.published.{name}"] for name in ("keys", "values", "radii")}
    return KeyValueMemory(**{**names, **ABOUT, **changes})


MEMORIES = {"activation": retrieve, "fingerprint": fingerprints, "key value": codebook}


def packed(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def inputs(memory: SideMemory, lengths=(3, 1, 4)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, size = memory.shape
    return torch.randn(sum(lengths), size).double(), torch.randn(sum(lengths), out).double(), packed(lengths)


@pytest.mark.parametrize(("order", "name"), [("farthest", "mended"), ("published", "published")])
def test_activation_routes_are_those_of_the_golden_tensors(order, name):
    x, starts = GOLDEN["route.x"], GOLDEN["route.starts"]
    base = x @ GOLDEN["toy.W0"].T
    memory = retrieve(order)
    distances = memory.distances(x, base, starts)
    close(distances, torch.cat([GOLDEN["route.distance.new"][None], GOLDEN["route.distance.memories"]]))
    route = memory.decide(x, base, starts)
    assert torch.equal(route, GOLDEN[f"route.retrieve.choice.{name}"])
    if order == "farthest":
        output = memory.outputs(x, base, route.repeat_interleave(starts.diff()))
        close(output, GOLDEN["route.retrieve.output.mended"])


def test_two_memories_with_one_threshold_route_as_wise_merge_does():
    x, starts = GOLDEN["route.x"], GOLDEN["route.starts"]
    bound = GOLDEN["route.merge.threshold"]
    weights = torch.stack([GOLDEN["route.layer"], GOLDEN["route.new"]])
    memory = ActivationMemory(weights=weights, thresholds=(bound / 0.88).expand(2), act_ratio=0.88, **ABOUT)
    assert torch.equal(memory.decide(x, x @ GOLDEN["toy.W0"].T, starts), GOLDEN["route.merge.choice"])


def test_fingerprints_and_outputs_are_those_of_the_golden_tensors():
    asked, starts = GOLDEN["memoir.asked"], packed([5, 6, 5, 3, 7])
    memory = fingerprints()
    edited = memory.fingerprints(GOLDEN["memoir.edited"], packed([4, 5, 6, 7]))
    assert torch.equal(set_bits(edited, 16), GOLDEN["memoir.masks"].bool())
    base = asked @ GOLDEN["toy.W0"].T
    route = memory.decide(asked, base, starts)
    assert torch.equal(route, GOLDEN["memoir.match"])
    close(memory.outputs(asked, base, route.repeat_interleave(starts.diff())), GOLDEN["memoir.output"])


def toy_inputs(ids: torch.Tensor) -> torch.Tensor:
    """The inputs [T, d] of the toy model's matrix at one row of tokens; `make_golden_memories.py` defines them."""
    embedded = GOLDEN["toy.E"][ids]
    means = embedded.cumsum(0) / torch.arange(1, len(ids) + 1, dtype=torch.float64)[:, None]
    return torch.nn.functional.silu((embedded + means) / 2 @ GOLDEN["toy.P"].T)


@pytest.mark.parametrize("where", ["last", "all", "prompt"])
def test_keys_answer_as_the_golden_probes_do(where):
    memory = codebook(replacement=f"replace_{where}")
    rows = [ids[ids >= 0] for ids in GOLDEN["grace.probe.ids"]]
    lengths = [len(row) for row in rows]
    x, starts = torch.cat([toy_inputs(row) for row in rows]), packed(lengths)
    base = x @ GOLDEN["toy.W0"].T
    route = memory.decide(x, base, starts)
    assert torch.equal(route, torch.where(GOLDEN["grace.probe.hit"].bool(), GOLDEN["grace.probe.nearest"], -1))
    place = torch.cat([torch.arange(1 - length, 1) for length in lengths])
    output = memory.outputs(x, base, route.repeat_interleave(starts.diff()), place)
    for part, expected, length in zip(output.split(lengths), GOLDEN[f"grace.probe.{where}"], lengths, strict=True):
        close(part, expected[:length])


def test_values_stay_for_generated_tokens_only_where_all_are_replaced():
    x, base, route = torch.zeros(1, 16).double(), torch.zeros(1, 10).double(), torch.zeros(1, dtype=torch.int64)
    for name in ("replace_last", "replace_prompt"):
        assert codebook(replacement=name).outputs(x, base, route) is base
    close(codebook(replacement="replace_all").outputs(x, base, route)[0], GOLDEN["grace.published.values"][0])


@pytest.mark.parametrize("kind", MEMORIES)
def test_tokens_behind_the_last_sequence_belong_to_nobody(kind):
    memory = MEMORIES[kind]()
    x, output, starts = inputs(memory)
    more = [torch.cat([t, torch.full((2, t.shape[1]), 1e3, dtype=t.dtype)]) for t in (x, output)]
    assert torch.equal(memory.decide(*more, starts), memory.decide(x, output, starts))


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_sequence_without_tokens_or_with_nan_is_routed_nowhere(kind):
    memory = MEMORIES[kind]()
    wide = {"activation": dict(thresholds=torch.zeros(4)), "key value": dict(radii=torch.full((8,), 1e9).double())}
    memory = replace(memory, **wide.get(kind, dict(threshold=1e-9)))
    x, output, _ = inputs(memory)
    x[4:] = torch.nan
    route = memory.decide(x, output, torch.tensor([0, 0, 4, 8]))
    assert route[0] == -1 and route[1] >= 0 and route[2] == -1


CLOSED = {
    "activation": dict(thresholds=torch.full((4,), torch.inf)),
    "fingerprint": dict(threshold=torch.inf),
    "key value": dict(radii=torch.full((8,), -torch.inf)),
}
EMPTY = {
    "activation": dict(weights=torch.zeros(0, 10, 16), thresholds=torch.zeros(0)),
    "fingerprint": dict(book=torch.zeros(0, 2, dtype=torch.uint8)),
    "key value": dict(keys=torch.zeros(0, 16), values=torch.zeros(0, 10), radii=torch.zeros(0)),
}


@pytest.mark.parametrize("changes", [EMPTY, CLOSED], ids=["empty", "closed"])
@pytest.mark.parametrize("kind", MEMORIES)
def test_an_empty_or_closed_memory_changes_no_bit(kind, changes):
    memory = replace(MEMORIES[kind](), **changes[kind])
    x, output, starts = inputs(memory)
    output[0, 0] = -0.0
    route = memory.decide(x, output, starts)
    assert route.tolist() == [-1, -1, -1] and memory.empty == (changes is EMPTY)
    result = memory.outputs(x, output, route.repeat_interleave(starts.diff()), torch.zeros(8, dtype=torch.int64))
    assert torch.equal(result.view(torch.int64), output.view(torch.int64))


def test_a_bias_is_part_of_distances_and_outputs():
    memory, bias = retrieve(), torch.linspace(-3, 3, 10).double()
    x, _, starts = inputs(memory)
    base = torch.nn.functional.linear(x, GOLDEN["toy.W0"], bias)
    biased = replace(memory, bias=bias, activation="gelu_new")
    gelu = torch.nn.functional.gelu(x @ memory.weights[2].T + bias, approximate="tanh")
    before = torch.nn.functional.gelu(base, approximate="tanh")
    expected = torch.stack([d.mean() for d in (gelu - before).norm(dim=1).split([3, 1, 4])])
    close(biased.distances(x, base, starts)[2], expected)
    close(biased.outputs(x, base, torch.full((8,), 2)), x @ memory.weights[2].T + bias)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_products_of_few_and_many_tokens_read_the_features_of_each(tokens):
    x, weight, mask = torch.randn(tokens, 20).double(), torch.randn(20, 6).double(), torch.zeros(tokens, 20)
    for row, count in zip(mask, (4, 3, 0, 4, 1), strict=False):
        row[torch.randperm(20)[:count]] = 1
    bits = pack_bits(mask.bool())
    torch.testing.assert_close(masked_product(x, weight, bits, 4), (x * mask) @ weight, rtol=1e-12, atol=1e-12)
    x[:, 5] = torch.nan  # a feature that is in no mask is not read
    mask[:, 5], bits = 0, pack_bits((mask * (torch.arange(20) != 5)).bool())
    assert not masked_product(x, weight, bits, 4).isnan().any()


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_memory_comes_back_from_its_file(kind, tmp_path):
    requests = ({"prompt": "{} plays", "subject": "Zoë", "target_new": "the violin"},)
    memory = MEMORIES[kind](
        method="a method", requests=requests, configuration={"lr": 1.0}, prompt_format="<user>{} is", tokenizer="ab"
    )
    memory = memory if kind != "activation" else replace(memory, thresholds=torch.tensor([1.0, torch.inf, 0, 1]))
    memory.save(tmp_path / "a.safetensors")
    other = SideMemory.load(tmp_path / "a.safetensors")
    assert type(other) is type(memory) and other.about() == memory.about() and other.digest == memory.digest
    for name, tensor in memory.tensors.items():
        assert torch.equal(other.tensors[name], tensor) and other.tensors[name].dtype == tensor.dtype
    other.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("kind", MEMORIES)
def test_the_digest_says_everything_that_counts(kind):
    memory = MEMORIES[kind]()
    name, tensor = next(iter(memory.tensors.items()))
    assert replace(memory, **{name: tensor + 1}).digest != memory.digest
    assert replace(memory, original="1" * 64).digest != memory.digest
    assert replace(memory, requests=({"prompt": "p"},), configuration={"lr": 2.0}).digest == memory.digest
    assert memory.nbytes == sum(t.numel() * t.element_size() for t in memory.tensors.values())


def test_what_is_no_memory_is_refused_by_name(tmp_path):
    path = tmp_path / "memory.safetensors"
    with pytest.raises(SideMemoryError, match=r"cannot read .*memory\.safetensors"):
        SideMemory.load(path)
    retrieve().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SideMemoryError, match=r"cannot read .*memory\.safetensors"):
        SideMemory.load(path)
    path.write_bytes(b"not one")
    with pytest.raises(SideMemoryError, match="cannot read"):
        SideMemory.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(SideMemoryError, match=r"memory\.safetensors is not a memory of kedit_fast$"):
        SideMemory.load(path)
    save_file({"a": torch.zeros(1)}, path, {"kind": "kedit_fast patch"})
    with pytest.raises(SideMemoryError, match="is not a memory of kedit_fast: it is a kedit_fast patch"):
        SideMemory.load(path)


def edited_file(path: Path, **changes) -> None:
    """The file of a memory with other metadata, or without a tensor."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    metadata = {**json.loads(data[8 : 8 + length])["__metadata__"], **changes}
    tensors = load_file(path)
    tensors.pop(metadata.pop("without", ""), None)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "9"}, "has memory format 9, this version reads 1"),
        ({"memory": "a dream"}, "is damaged: 'a dream'"),
        ({"fields": "{"}, "is damaged"),
        ({"fields": "[]"}, "is damaged"),
        ({"without": "thresholds"}, "is damaged: .*thresholds"),
    ],
)
def test_a_damaged_file_is_refused_by_name(changes, message, tmp_path):
    path = tmp_path / "memory.safetensors"
    retrieve().save(path)
    edited_file(path, **changes)
    with pytest.raises(SideMemoryError, match=message):
        SideMemory.load(path)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (retrieve, dict(weights=torch.zeros(2, 3)), "weights must be \\[M, out, in\\]"),
        (retrieve, dict(weights=torch.full((4, 10, 16), torch.nan)), "weights must be finite"),
        (retrieve, dict(thresholds=torch.zeros(3)), "thresholds must be float \\[4\\]"),
        (retrieve, dict(thresholds=torch.full((4,), torch.nan)), "must not be NaN"),
        (retrieve, dict(bias=torch.zeros(3)), "bias must be float \\[10\\]"),
        (retrieve, dict(order="nearest"), "order must be"),
        (retrieve, dict(act_ratio=0.0), "act_ratio must be positive"),
        (retrieve, dict(activation="sin"), "activation must be one of"),
        (retrieve, dict(long=-1), "long must be at least 0"),
        (fingerprints, dict(book=torch.zeros(3, 3, dtype=torch.uint8)), "book must be uint8 \\[K, 2\\]"),
        (fingerprints, dict(permutation=torch.zeros(16, dtype=torch.int64)), "each of 0 to 15 once"),
        (fingerprints, dict(top_k=4), "book has 5 features in a row, top_k is 4"),
        (fingerprints, dict(center=torch.zeros(3)), "center must be float"),
        (fingerprints, dict(top_k=17), "top_k must be 1 to 16"),
        (fingerprints, dict(threshold=float("nan")), "threshold must be positive"),
        (codebook, dict(values=torch.zeros(3, 10)), "there are 8 keys and 3 values"),
        (codebook, dict(radii=torch.zeros(3)), "radii must be float \\[8\\]"),
        (codebook, dict(replacement="replace_some"), "replacement must be"),
    ],
)
def test_a_memory_of_another_form_is_refused(make, changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        make(**changes)


@pytest.mark.parametrize("kind", MEMORIES)
def test_routing_and_outputs_are_one_graph_that_reads_no_number(kind):
    """torch.compile(fullgraph=True) refuses whatever has to wait for a tensor's value."""
    memory = MEMORIES[kind]()
    x, output, starts = inputs(memory)
    owner, place = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2]), torch.tensor([-2, -1, 0, 0, -3, -2, -1, 0])

    def serve(x, output, starts):
        route = memory.decide(x, output, starts)
        return route, memory.outputs(x, output, route[owner], place)

    torch.compiler.reset()
    with torch.no_grad():
        for one, other in zip(
            torch.compile(serve, backend="eager", fullgraph=True)(x, output, starts),
            serve(x, output, starts),
            strict=True,
        ):
            assert torch.equal(one, other)
    torch.compiler.reset()
