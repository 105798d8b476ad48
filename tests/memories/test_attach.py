"""Memories in models: every row gets what it would get alone, whatever generates it, and nothing else changes."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import threading
from dataclasses import replace

import pytest
import torch
import transformers
from tiny_models import make_model, make_tokenizer
from transformers import DynamicCache, StaticCache

import kedit_fast
from kedit_fast import ActivationMemory, FingerprintMemory, KeyValueMemory, SideMemory, attach, matrix_identity
from kedit_fast.errors import InvalidArgumentError, PatchError, SideMemoryError, UnsupportedModelError
from kedit_fast.memories.merging import merge
from kedit_fast.models import patching
from kedit_fast.models.editable import require_editable
from kedit_fast.models.forward import evaluating
from kedit_fast.models.routes import Routes, prompt_tokens, recorded_routes, suspended, valid_tokens
from kedit_fast.models.view import ModelView
from kedit_fast.patches.gate import Gate

TEXTS = [
    "Miles Davis plays the",
    "The mother tongue of Danielle Darrieux is",
    "Because I saw the old tower, you and I",
    "Ebro, which is located in",
    "Marcel Maupoint speaks",
    "Autonomous University of Madrid is",
    "waited",
    "The instrument that Thelonious Monk plays is the",
]
EDITED = [0, 2, 5]  # texts that the memories are for
KINDS = ("activation", "fingerprint", "key value")
ARCHITECTURES = ("gpt2", "gptj", "llama", "gemma2")  # Conv1D and biases, parallel blocks, plain, norms behind the MLP
SERVED = [
    ("gpt2", "activation"),
    ("gptj", "fingerprint"),
    ("gemma2", "key value"),
    *(("llama", kind) for kind in KINDS),
]
TOKENS = 4
OLDER = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 53)


class Case:
    """A model with a memory of one kind for some of the texts."""

    def __init__(self, architecture: str, kind: str, seed: int = 0, layers: int = 4):
        self.model = make_model(architecture, layers=layers)
        self.tokenizer = make_tokenizer(side="left")
        self.path = ModelView(self.model).module_name(layers // 2)
        self.module = self.model.get_submodule(self.path)
        self.memory = self.make_memory(kind, seed)

    def make_memory(self, kind: str, seed: int) -> SideMemory:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float32)

        about = matrix_identity(self.model, self.path)
        rows = [self.at_module(text) for text in TEXTS]
        x, output = (torch.cat(parts) for parts in zip(*rows, strict=True))
        starts = torch.tensor([0, *(len(part) for part, _ in rows)]).cumsum(0)
        out, size = output.shape[1], x.shape[1]
        if kind == "key value":
            keys = torch.stack([rows[i][0][-1] for i in EDITED])
            values = 3 * output.std() * random(len(EDITED), out)
            return KeyValueMemory(keys=keys, values=values, radii=torch.full((3,), 1e-3), **about)
        if kind == "fingerprint":
            book = torch.zeros(0, size // 8, dtype=torch.uint8)
            fields = dict(center=x.mean(0), permutation=torch.randperm(size, generator=generator), top_k=8)
            memory = FingerprintMemory(
                weight=output.std() * random(size, out), book=book, threshold=0.99, **fields, **about
            )
            return replace(memory, book=memory.fingerprints(x, starts)[EDITED])
        weight = self.module.weight.detach().T if about["transposed"] else self.module.weight.detach()
        of_text = torch.arange(len(TEXTS)).repeat_interleave(starts.diff()) == torch.tensor(EDITED)[:, None]
        directions = torch.linalg.pinv(x) @ of_text.T.to(x)  # [in, 3], near 1 at the tokens of one text, else near 0
        weights = weight + 3 * output.std() * random(3, out, 1) * directions.T[:, None]
        bias = self.module.bias.detach().clone() if self.module.bias is not None else None
        memory = ActivationMemory(weights=weights, thresholds=torch.zeros(3), bias=bias, activation="gelu_new", **about)
        return replace(memory, thresholds=0.8 * memory.distances(x, output, starts).amax(1))

    def at_module(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [T, in] and outputs [T, out] of the module for a text alone."""
        seen = []
        handle = self.module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        with torch.no_grad():
            self.model(**self.encode([text]))
        handle.remove()
        return tuple(states.flatten(0, -2) for states in seen[0])

    def encode(self, texts, side: str = "left"):
        self.tokenizer.padding_side = side
        return self.tokenizer(list(texts), return_tensors="pt", padding=True, return_token_type_ids=False)

    def generate(self, texts, **options) -> list[list[int]]:
        batch = self.encode(texts)
        options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, **options}
        result = self.model.generate(**batch, pad_token_id=2, **options)
        return result[:, batch.input_ids.shape[1] :].tolist()

    def alone(self, texts=TEXTS, **options) -> list[list[int]]:
        return [row for text in texts for row in self.generate([text], **options)]


_CASES: dict[tuple[str, str], Case] = {}


def case_of(architecture: str, kind: str) -> Case:
    key = architecture, kind
    if key not in _CASES:
        _CASES[key] = Case(*key)
    return _CASES[key]


@pytest.fixture(params=[(a, k) for a in ARCHITECTURES for k in KINDS], ids=lambda pair: "-".join(pair))
def case(request):
    case = case_of(*request.param)
    yield case
    kedit_fast.detach(case.model)


@pytest.fixture
def llama():
    case = case_of("llama", "activation")
    yield case
    kedit_fast.detach(case.model)


@pytest.fixture(params=KINDS)
def each_kind(request):
    case = case_of("llama", request.param)
    yield case
    kedit_fast.detach(case.model)


def logits_of(case: Case, side: str = "left", **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the tokens of all texts in one batch, in the order of texts, and the routes that were decided."""
    batch = case.encode(TEXTS, side)
    with torch.no_grad(), recorded_routes(case.model) as records:
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)  # GPT-2 counts padding on the left otherwise
        logits = case.model(**batch, position_ids=positions, **options).logits
    return logits[batch.attention_mask.bool()], torch.cat(records) if records else torch.tensor([])


def counts(case: Case) -> list[int]:
    return case.encode(TEXTS).attention_mask.sum(1).tolist()


def test_a_batch_of_unlike_prompts_is_routed_as_each_alone(case):
    plain, _ = logits_of(case)
    routes, single = [], []
    with attach(case.model, case.memory):
        for text in TEXTS:
            with torch.no_grad(), recorded_routes(case.model) as records:
                single.append(case.model(**case.encode([text])).logits[0])
            routes += records[0].tolist()
        left, left_routes = logits_of(case, "left")
        right, right_routes = logits_of(case, "right")
    assert [route >= 0 for route in routes] == [i in EDITED for i in range(len(TEXTS))]
    assert left_routes.tolist() == right_routes.tolist() == routes
    torch.testing.assert_close(left, torch.cat(single), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, torch.cat(single), rtol=1e-4, atol=1e-4)
    for i, (new, old) in enumerate(zip(left.split(counts(case)), plain.split(counts(case)), strict=True)):
        assert torch.equal(new, old) == (i not in EDITED)  # to the bit where nothing is edited
    after, _ = logits_of(case)
    assert torch.equal(after, plain) and not patching.patches_on(case.model)


@pytest.mark.parametrize("case", SERVED, ids="-".join, indirect=True)
def test_generate_on_a_batch_is_generate_one_at_a_time(case):
    if case.model.config.model_type == "gemma2" and OLDER:
        pytest.skip("the cache of this transformers drops a row's first token at its last place")
    plain = case.generate(TEXTS)
    with attach(case.model, case.memory):
        batch, alone = case.generate(TEXTS), case.alone()
        assert batch == alone
        with prompt_tokens(case.model, counts(case)):
            assert case.generate(TEXTS, use_cache=False) == alone
        options = {"num_beams": 3, "num_return_sequences": 2}
        if case.model.config.model_type == "gpt2" and OLDER:
            with pytest.raises(SideMemoryError, match="reordered as a tuple"):
                case.generate(TEXTS, **options)
        else:
            assert case.generate(TEXTS, **options) == case.alone(**options)
    assert all((new == old) for i, (new, old) in enumerate(zip(alone, plain, strict=True)) if i not in EDITED)
    assert any(alone[i] != plain[i] for i in EDITED)


def test_a_static_cache_routes_as_a_growing_one(each_kind):
    with attach(each_kind.model, each_kind.memory):
        assert each_kind.generate(TEXTS, cache_implementation="static") == each_kind.generate(TEXTS)


def test_a_draft_decides_nothing(each_kind):
    draft, texts = make_model("llama", layers=1), [TEXTS[i] for i in (2, 6)]
    with attach(each_kind.model, each_kind.memory):
        plain = each_kind.alone(texts)
        with recorded_routes(each_kind.model) as records:
            assisted = each_kind.alone(texts, assistant_model=draft)
        assert assisted == plain == each_kind.alone(texts, prompt_lookup_num_tokens=2)
    assert [int(route) >= 0 for route in records] == [True, False]


def test_the_first_prompt_decides_for_all_turns_on_one_cache(each_kind):
    model, turns = each_kind.model, [each_kind.encode([TEXTS[i]]).input_ids for i in (2, 6, 0)]
    with attach(model, each_kind.memory) as attached, torch.no_grad():
        cache = DynamicCache()
        with recorded_routes(model) as records:
            parts = [model(turn, past_key_values=cache).logits for turn in turns]
        assert [route.tolist() >= [0] for route in records] == [True]
        with prompt_tokens(model, [turns[0].shape[1]]):
            whole = model(torch.cat(turns, 1), use_cache=False).logits
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
        attached.reset(cache)
        with recorded_routes(model) as records:
            model(turns[1], past_key_values=cache)
            model(turns[0], past_key_values=cache)
        assert len(records) == 1 and records[0] is cache.kedit_fast_route.route


def decode(case: Case, cache, mask: torch.Tensor) -> torch.Tensor:
    """Logits [rows, V] of one more token on a cache whose tokens have a mask [rows, T]."""
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    positions = mask.sum(1, keepdim=True) - 1
    token = torch.full_like(positions, 7)
    with torch.no_grad():
        return case.model(token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]


def test_routes_follow_the_rows_of_a_cache(each_kind):
    with attach(each_kind.model, each_kind.memory):
        batch, cache = each_kind.encode([TEXTS[i] for i in (1, 2, 3)]), DynamicCache()
        with torch.no_grad():
            each_kind.model(**batch, past_key_values=cache)
        assert isinstance(cache, DynamicCache)
        (route,) = {r for r in cache.kedit_fast_route.route.tolist() if r >= 0}
        assert cache.kedit_fast_route.route.tolist() == [-1, route, -1]
        mask = batch.attention_mask
        expected = decode(each_kind, copy.deepcopy(cache), mask)
        order = torch.tensor([1, 1, 0])
        for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            copied.reorder_cache(order)
            torch.testing.assert_close(decode(each_kind, copied, mask[order]), expected[order])
        if hasattr(cache, "batch_select_indices"):
            part = copy.deepcopy(cache)
            part.batch_select_indices(torch.tensor([1]))
            torch.testing.assert_close(decode(each_kind, part, mask[[1]]), expected[[1]])
            part = copy.deepcopy(cache)
            part.batch_repeat_interleave(2)
            torch.testing.assert_close(
                decode(each_kind, part, mask.repeat_interleave(2, 0)), expected.repeat_interleave(2, 0)
            )
        assert cache.kedit_fast_route.route.tolist() == [-1, route, -1]


def test_a_cache_that_is_emptied_is_routed_anew(llama):
    with attach(llama.model, llama.memory), torch.no_grad():
        options = {"config": llama.model.config, "max_cache_len": 32}
        if "max_batch_size" in inspect.signature(StaticCache).parameters:  # of older transformers
            options["max_batch_size"] = 1
        static = StaticCache(**options)
        routes = []
        for text in (TEXTS[2], TEXTS[6]):
            with recorded_routes(llama.model) as records:
                llama.model(**llama.encode([text]), past_key_values=static)
            routes += [route.tolist()[0] >= 0 for route in records]
            static.reset()
        assert routes == [True, False]


def test_a_cache_that_the_model_makes_is_routed_too(each_kind):
    ids = each_kind.encode([TEXTS[2]]).input_ids
    with attach(each_kind.model, each_kind.memory), torch.no_grad():
        made = each_kind.model(ids, use_cache=True).past_key_values
        given = DynamicCache()
        each_kind.model(ids, past_key_values=given)
        mask = torch.ones_like(ids)
        assert torch.equal(decode(each_kind, made, mask), decode(each_kind, given, mask))
        as_tuple = each_kind.model(ids, use_cache=True, return_dict=False)
        assert hasattr(as_tuple[1], "kedit_fast_route")


def test_embeddings_in_place_of_tokens_are_routed(llama):
    batch = llama.encode(TEXTS)
    with attach(llama.model, llama.memory), torch.no_grad():
        expected = llama.model(**batch).logits
        states = llama.model.get_input_embeddings()(batch.input_ids)
        result = llama.model(inputs_embeds=states, attention_mask=batch.attention_mask).logits
    assert torch.equal(result, expected)


def test_prompts_alone_decide_where_answers_follow(each_kind):
    texts = [f"{TEXTS[2]} walked home", f"{TEXTS[6]} {TEXTS[2]}"]
    batch = each_kind.encode(texts, "right")
    lengths = [len(each_kind.encode([TEXTS[i]]).input_ids[0]) for i in (2, 6)]
    with attach(each_kind.model, each_kind.memory), torch.no_grad(), recorded_routes(each_kind.model) as records:
        with prompt_tokens(each_kind.model, lengths):
            each_kind.model(**batch)
        with prompt_tokens(each_kind.model, [0, 0]):
            each_kind.model(**batch)
        with prompt_tokens(each_kind.model, [1]), pytest.raises(InvalidArgumentError, match="of 1 rows, a pass has 2"):
            each_kind.model(**batch)
    assert [(route >= 0).tolist() for route in records] == [[True, False], [False, False]]
    with prompt_tokens(each_kind.model, [1]):  # nothing is attached
        each_kind.model(**batch)


class Seen:
    """A memory that answers nobody, and remembers what it was asked."""

    empty = False

    def decide(self, x, output, starts):
        self.x, self.output, self.starts = x, output, starts.tolist()
        return torch.full_like(starts[1:], -1)

    def outputs(self, x, output, route, place=None):
        self.place = place
        return output


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_memory_is_asked_with_the_tokens_of_prompts_alone(llama, side):
    batch, seen, states = llama.encode(TEXTS[:3], side), Seen(), []
    lengths = batch.attention_mask.sum(1).tolist()
    routes = Routes(llama.model, llama.model.model, llama.path, seen)
    routes.install()
    handle = llama.module.register_forward_hook(lambda module, args, output: states.append((args[0], output)))

    def expect(begins, ends):
        rows = [
            (row[mask.bool()], out[mask.bool()])
            for row, out, mask in zip(*states[-1], batch.attention_mask, strict=True)
        ]
        parts = [(row[a:b], out[a:b]) for (row, out), a, b in zip(rows, begins, ends, strict=True)]
        assert seen.starts == [0, *torch.tensor([len(part) for part, _ in parts]).cumsum(0).tolist()]
        for given, expected in zip((seen.x, seen.output), zip(*parts, strict=True), strict=True):
            assert torch.equal(given[: seen.starts[-1]], torch.cat(expected))
        places = seen.place.view(batch.input_ids.shape)
        for place, mask, length, end in zip(places, batch.attention_mask.bool(), lengths, ends, strict=True):
            assert place[mask].tolist() == list(range(1 - end, length - end + 1)) and (place[~mask] == 1).all()

    try:
        with torch.no_grad():
            llama.model(**batch)
            expect([0, 0, 0], lengths)
            with prompt_tokens(llama.model, [2, 99, 3]):
                llama.model(**batch)
            expect([0, 0, 0], [2, lengths[1], 3])
            with prompt_tokens(llama.model, [2, 99, 3], [1, 0, 2]):
                llama.model(**batch, use_cache=False)
            expect([1, 0, 2], [2, lengths[1], 3])
            if side == "left":  # as assisted decoding asks, with two tokens of a draft
                llama.model(**batch, past_key_values=DynamicCache(), logits_to_keep=3)
                expect([0, 0, 0], [length - 2 for length in lengths])
    finally:
        handle.remove()
        routes.remove()
    assert not patching.patches_on(llama.model)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_attention_say_which_tokens_are_padding(dtype):
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    seen = mask[:, None, None, :] & torch.ones(4, 4, dtype=torch.bool).tril()
    unmasked = seen | ~seen.any(3, keepdim=True)  # rows of padding that see everything, as older versions have them
    for whole in (seen, unmasked, torch.nn.functional.pad(unmasked, (0, 3))):
        given = whole if dtype == torch.bool else torch.where(whole, 0.0, torch.finfo(dtype).min).to(dtype)
        assert torch.equal(valid_tokens(given, 4), mask)
        assert torch.equal(valid_tokens({"sliding_attention": None, "full_attention": given}, 4), mask)
    assert valid_tokens(None, 4) is None and torch.equal(valid_tokens(mask.long(), 4), mask)
    for wrong in (torch.ones(2, 3), torch.ones(2, 3, 4), "a mask"):
        with pytest.raises(UnsupportedModelError, match="attention mask"):
            valid_tokens(wrong, 4)


def test_compiled_models_are_routed_in_one_graph():
    case = Case("llama", "activation", layers=1)
    torch.compiler.reset()
    compiled = torch.compile(case.model, backend="eager", fullgraph=True)
    batch = case.encode(TEXTS)
    more = {"attention_mask": torch.nn.functional.pad(batch.attention_mask, (0, 1), value=1)}
    token = torch.full((len(TEXTS), 1), 7)
    with torch.no_grad():
        plain = compiled(**batch, use_cache=False).logits
        with attach(case.model, case.memory) as attached:  # after it was compiled
            caches = DynamicCache(), DynamicCache()
            attached.follow(caches[0])
            expected = case.model(**batch, past_key_values=caches[1]).logits
            torch.testing.assert_close(compiled(**batch, past_key_values=caches[0]).logits, expected)
            expected = case.model(token, **more, past_key_values=caches[1]).logits
            torch.testing.assert_close(compiled(token, **more, past_key_values=caches[0]).logits, expected)
        assert torch.equal(compiled(**batch, use_cache=False).logits, plain)
    torch.compiler.reset()


def test_threads_generate_at_once_and_a_memory_is_swapped_between_requests(each_kind):
    closed = {"activation": dict(thresholds=torch.full((3,), torch.inf)), "fingerprint": dict(threshold=torch.inf)}
    other = replace(each_kind.memory, **closed.get(each_kind.memory.kind, dict(radii=-torch.ones(3))))
    gate, results, errors = Gate(), [[], []], []
    texts = [TEXTS[i] for i in (2, 6)]
    plain = each_kind.alone(texts)
    with attach(each_kind.model, each_kind.memory) as attached:
        edited = each_kind.alone(texts)
        batches = [each_kind.encode([text]) for text in texts]

        def serve(place: int) -> None:
            try:
                for _ in range(4):
                    with gate.serving():
                        options = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=2)
                        row = each_kind.model.generate(**batches[place], **options)[0]
                        results[place].append(row[batches[place].input_ids.shape[1] :].tolist())
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=serve, args=(place,)) for place in (0, 1)]
        for thread in threads:
            thread.start()
        with gate.swapping():
            assert attached.swap(other) is not None
            done = len(results[0])
        for thread in threads:
            thread.join()
    assert not errors
    assert results[0] == [edited[0]] * done + [plain[0]] * (4 - done) and results[1] == [plain[1]] * 4


def test_a_quantized_base_puts_out_what_is_beside_the_memory(each_kind):
    """The module's class and weight may be anything: its own output counts."""

    class Rounded(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.in_features, self.out_features, self.bias = module.in_features, module.out_features, None
            self.codes = torch.nn.Parameter((module.weight.detach() * 4).round().to(torch.int8), requires_grad=False)

        def forward(self, x):
            return x @ (self.codes.to(x.dtype) / 4).T

    model = copy.deepcopy(each_kind.model)
    block, _, name = each_kind.path.rpartition(".")
    setattr(model.get_submodule(block), name, Rounded(each_kind.module))
    batch = each_kind.encode(TEXTS)
    with pytest.raises((SideMemoryError, UnsupportedModelError)):
        attach(model, each_kind.memory)
    with torch.no_grad():
        plain = model(**batch).logits
        memory = each_kind.memory
        if isinstance(memory, ActivationMemory):
            memory = replace(memory, thresholds=memory.thresholds * 0.98)
        with attach(model, memory, force=True), recorded_routes(model) as records:
            edited = model(**batch).logits
    same = [torch.equal(a, b) for a, b in zip(plain, edited, strict=True)]
    assert same == [int(route) < 0 for route in records[0]] and not all(same)


EMPTY = {
    "activation": dict(weights=torch.zeros(0, 32, 64), thresholds=torch.zeros(0)),
    "fingerprint": dict(book=torch.zeros(0, 8, dtype=torch.uint8)),
    "key value": dict(keys=torch.zeros(0, 64), values=torch.zeros(0, 32), radii=torch.zeros(0)),
}


def test_an_empty_memory_changes_no_bit(each_kind):
    plain, _ = logits_of(each_kind)
    generated = each_kind.generate(TEXTS)
    with attach(each_kind.model, replace(each_kind.memory, **EMPTY[each_kind.memory.kind])):
        assert torch.equal(logits_of(each_kind)[0], plain) and each_kind.generate(TEXTS) == generated


def test_a_file_is_attached_to_a_fresh_model(each_kind, tmp_path):
    each_kind.memory.save(tmp_path / "memory.safetensors")
    with attach(each_kind.model, each_kind.memory):
        expected, _ = logits_of(each_kind)
    fresh = copy.copy(each_kind)
    fresh.model = make_model("llama", torch.float32)
    attached = attach(fresh.model, tmp_path / "memory.safetensors")
    assert torch.equal(logits_of(fresh)[0], expected)
    assert attached.memory.digest == each_kind.memory.digest
    assert kedit_fast.attached(fresh.model).memory is attached.memory
    assert kedit_fast.detach(fresh.model) is attached.memory and kedit_fast.attached(fresh.model) is None
    attached.detach()


def test_copies_of_a_model_have_no_memory(llama):
    plain, _ = logits_of(llama)
    with attach(llama.model, llama.memory):
        other = copy.copy(llama)
        other.model = copy.deepcopy(llama.model)
        assert torch.equal(logits_of(other)[0], plain) and kedit_fast.attached(other.model) is None
        assert not patching.patches_on(other.model)[:0]
        attach(other.model, llama.memory).detach()
        with attach(other.model, llama.memory):
            assert torch.equal(logits_of(other)[0], logits_of(llama)[0])


def test_gradients_flow_through_a_routed_model(each_kind):
    model, wide = copy.deepcopy(each_kind.model).double(), {}
    wide = {name: t.double() for name, t in each_kind.memory.tensors.items() if t.is_floating_point()}
    ids, generator = each_kind.encode([TEXTS[2]]).input_ids, torch.Generator().manual_seed(0)
    states = model.get_input_embeddings()(ids).detach().requires_grad_(True)

    def loss(inputs: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=inputs, use_cache=False).logits[0, -1].square().mean()

    with attach(model, replace(each_kind.memory, **wide), force=True), recorded_routes(model) as records:
        (gradient,) = torch.autograd.grad(loss(states), states)
        step = 1e-5 * torch.randn(states.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            change = (loss(states + step) - loss(states - step)) / 2
    assert all(int(route) >= 0 for route in records) and gradient.abs().max() > 0
    torch.testing.assert_close((gradient * step).sum(), change, rtol=0.05, atol=0)


def test_a_suspended_memory_is_not_asked(llama):
    plain, _ = logits_of(llama)
    view = ModelView(llama.model)
    with attach(llama.model, llama.memory):
        with suspended(llama.model):
            assert torch.equal(logits_of(llama)[0], plain)
            require_editable(view, [llama.path])
        assert not torch.equal(logits_of(llama)[0], plain)
        with pytest.raises(UnsupportedModelError, match=f"a memory is attached to {llama.path}"):
            require_editable(view, [llama.path])
    with suspended(llama.model):
        assert torch.equal(logits_of(llama)[0], plain)


def test_an_interrupted_pass_leaves_nothing_behind(llama):
    expected, _ = logits_of(llama)
    with attach(llama.model, llama.memory):
        edited, _ = logits_of(llama)

        def stop(*args):
            raise KeyboardInterrupt

        for module in (llama.module, llama.model.model.norm):
            handle = module.register_forward_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                logits_of(llama)
            handle.remove()
            assert torch.equal(logits_of(llama)[0], edited)
    assert torch.equal(logits_of(llama)[0], expected)


def test_a_memory_of_something_else_is_refused(llama, tmp_path):
    model, memory = llama.model, llama.memory
    other = ModelView(model).module_name(0)
    attempts = [
        (replace(memory, module=other), "not the matrix that the memory was made beside"),
        (replace(memory, original="0" * 64), "not the matrix that the memory was made beside"),
        (replace(memory, module="model.layers.9.mlp.down_proj"), "has no module 'model.layers.9.mlp.down_proj'"),
        (replace(memory, module="model.layers.1.mlp"), "is a LlamaMLP, not a linear module"),
        (replace(memory, module="lm_head", weights=torch.zeros(1, 400, 32), thresholds=torch.zeros(1)), "not inside"),
        (replace(memory, module="model.layers.2.mlp.up_proj"), r"is \[64, 32\], the memory is for \[32, 64\]"),
        (replace(memory, bias=torch.zeros(32)), "has no bias, and the memory a bias"),
        (replace(memory, dtype="bfloat16", original="0"), "is float32, the memory was made beside bfloat16"),
        (replace(memory, transposed=True), r"stored as \[out, in\], and the memory was made beside one transposed"),
    ]
    for wrong, message in attempts:
        with pytest.raises(SideMemoryError, match=message):
            attach(model, wrong)
        assert kedit_fast.attached(model) is None and not patching.patches_on(model)
    with pytest.raises(SideMemoryError, match="another tokenizer"):
        attach(model, replace(memory, tokenizer="f" * 32), llama.tokenizer)
    with pytest.raises(SideMemoryError, match=r"cannot read .*nothing"):
        attach(model, tmp_path / "nothing")
    with pytest.raises(InvalidArgumentError, match="got a dict"):
        attach(model, {})
    with attach(model, replace(memory, original="0" * 64), force=True) as attached:
        with pytest.raises(SideMemoryError, match="has a memory already"):
            attach(model, memory)
        with pytest.raises(SideMemoryError, match="detach that one, and attach this one"):
            attached.swap(memory)
        assert attached.memory.original == "0" * 64


def test_a_bias_of_another_module_is_refused():
    case = case_of("gpt2", "activation")
    with pytest.raises(SideMemoryError, match="has a bias, and the memory no bias"):
        attach(case.model, replace(case.memory, bias=None))
    with pytest.raises(SideMemoryError, match="has another bias"):
        attach(case.model, replace(case.memory, bias=case.memory.bias + 1))


def test_a_cache_from_elsewhere_is_refused(llama):
    model, ids = llama.model, llama.encode([TEXTS[2]]).input_ids
    with torch.no_grad():
        early = model(ids).past_key_values
        with attach(model, llama.memory) as attached:
            with pytest.raises(SideMemoryError, match="began before the memory was attached"):
                model(ids, past_key_values=early)
            with pytest.raises(SideMemoryError, match="reordered as a tuple, which loses routes"):
                model(ids, past_key_values=((torch.zeros(1, 2, 3, 8),) * 2,) * 4)
            cache = model(ids).past_key_values
            with pytest.raises(SideMemoryError, match=r"routes of 1 rows, and the pass has 2"):
                model(ids.expand(2, -1), past_key_values=cache)
            with suspended(model):
                unedited = model(ids).past_key_values
            with pytest.raises(SideMemoryError, match="began before"):
                model(ids, past_key_values=unedited)
            attached.swap(replace(llama.memory))
            with pytest.raises(SideMemoryError, match="made under another memory"):
                model(ids, past_key_values=cache)
            with pytest.raises(UnsupportedModelError, match="packs several sequences in a row"):
                model(ids, cu_seq_lens_q=torch.tensor([0, 2]))


def test_a_module_that_is_run_alone_or_replaced_is_noticed(llama):
    model = llama.model
    with attach(model, llama.memory):
        with pytest.raises(SideMemoryError, match="outside of a pass of the decoder"):
            llama.module(torch.zeros(1, 64))
        block = model.get_submodule(llama.path.rpartition(".")[0])
        block.down_proj = torch.nn.Linear(64, 32, bias=False)
        try:
            with pytest.raises(SideMemoryError, match="was the module replaced"), torch.no_grad():
                model(llama.encode([TEXTS[2]]).input_ids)
        finally:
            block.down_proj = llama.module


def test_patches_of_the_module_are_refused_while_a_memory_is_there(llama):
    patch = merge(llama.memory, llama.model, "mean")
    with attach(llama.model, llama.memory), pytest.raises(PatchError, match="a memory is attached"):
        patch.apply_(llama.model)


def test_a_merge_is_a_patch_of_the_weights():
    case = case_of("gpt2", "activation")
    plain, _ = logits_of(case)
    patch = merge(case.memory, case.model, "mean")
    applied = patch.apply_(case.model)
    torch.testing.assert_close(case.module.weight.detach().T, case.memory.weights.mean(0))
    with pytest.raises(SideMemoryError, match="not the matrix"):
        attach(case.model, case.memory)
    with pytest.raises(SideMemoryError, match="not the matrix"):
        merge(case.memory, case.model)
    applied.revert_()
    assert torch.equal(logits_of(case)[0], plain)
    with pytest.raises(SideMemoryError, match="the memory is empty"):
        merge(replace(case.memory, weights=torch.zeros(0, 32, 64), thresholds=torch.zeros(0)), case.model)
    for kind in ("fingerprint", "key value"):
        other = case_of("llama", kind)
        with pytest.raises(SideMemoryError, match=f"of the kind '{kind}' puts out something else for each prompt"):
            merge(other.memory, other.model)


def test_a_prompt_without_the_edits_format_is_said_once(llama, caplog):
    memory = replace(llama.memory, prompt_format="The mother tongue of {} is walked")
    with attach(llama.model, memory, llama.tokenizer), caplog.at_level(logging.WARNING, "kedit_fast"), torch.no_grad():
        llama.model(**llama.encode(["The mother tongue of Monk is", "The mother tongue of the piano, you and I"]))
        assert not caplog.records
        for _ in range(2):
            llama.model(**llama.encode(["The mother tongue of Monk is", "The piano"]))
    assert [record.message[:70] for record in caplog.records] == [
        "a prompt does not begin with 'The mother tongue of ', as those of the "
    ]


def test_passes_in_parts_of_our_own_carry_routes(each_kind):
    from kedit_fast.models.cached import cache_limit, run_beginnings

    view = ModelView(each_kind.model)
    rows = [each_kind.encode([TEXTS[i]]).input_ids[0].tolist() for i in (6, 2, 4)]
    with attach(each_kind.model, each_kind.memory), evaluating(view), torch.no_grad():
        assert cache_limit(view) > 16
        with recorded_routes(each_kind.model) as records:
            _, beginnings = run_beginnings(view, rows)
            part = beginnings.select([2, 1, 1])
            states = part.follow([[5, 9], [6], [6, 7, 8]])
        assert [(route >= 0).tolist() for route in records] == [[False, True, False]]
        whole = [*rows[1], 6, 7, 8]
        with prompt_tokens(each_kind.model, [len(rows[1])]):
            expected = view.base(torch.tensor([whole]), use_cache=False).last_hidden_state
    torch.testing.assert_close(states[2], expected[0, -3:], rtol=1e-4, atol=1e-4)
