"""A model with all edges corrupted that a circuit does not have: against published values and a plain loop."""

from __future__ import annotations

import pytest
import torch
from golden_circuits import GOLDEN_KINDS, golden, golden_model, golden_rows
from tiny_models import make_model
from torch_states import STATES
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kedit_fast.errors import EvaluationError, InvalidArgumentError, RequestError, UnsupportedModelError
from kedit_fast.locating import faithfulness as module
from kedit_fast.locating.circuit import Circuit
from kedit_fast.locating.circuits import EdgeScores
from kedit_fast.locating.faithfulness import exact_scores, faithfulness, run_circuit
from kedit_fast.locating.graph import Graph, graph_of
from kedit_fast.locating.prompt_pairs import PromptPair
from kedit_fast.locating.pruning import greedy_edges
from kedit_fast.models.patching import patches_on
from kedit_fast.models.view import ModelView

BATCHES = [[PromptPair(**row) for row in batch] for batch in golden_rows()]
PAIRS = [pair for batch in BATCHES for pair in batch]
KINDS = ("gptj", "gpt_neox", "mistral", "qwen3", "phi3", "gemma2")


def circuit_of(graph, edges):
    return Circuit(graph, edges & graph.mask, torch.zeros(graph.mask.shape))


def random_circuit(graph, share, seed=0):
    return circuit_of(graph, torch.rand(graph.mask.shape, generator=torch.Generator().manual_seed(seed)) < share)


def tiny_pairs(count=2):
    """Prompts of two lengths for models of `tiny_models`."""
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for place in range(count):
        clean = torch.randint(3, 400, (6 if place % 2 else 5,), generator=generator).tolist()
        corrupted = [*clean[:1], *torch.randint(3, 400, (2,), generator=generator).tolist(), *clean[3:]]
        pairs.append(PromptPair(tuple(clean), tuple(corrupted), 10 + place, 20 + place, f"pair {place}"))
    return pairs


# --- a plain loop: every node's input summed up edge by edge ---


def plain_run(model, graph, ids, edges=None, corrupted=None):
    """(outputs of nodes by name, logits [V] at the end); with edges and outputs of a corrupted run, of a circuit."""
    is_llama = hasattr(model, "model")
    body = model.model if is_llama else model.transformer
    tokens = torch.tensor([ids])
    outputs = {"input": (body.embed_tokens if is_llama else body.wte)(tokens)[0]}
    stream = outputs["input"] if is_llama else outputs["input"] + body.wpe.weight[: len(ids)]
    causal = torch.full((len(ids), len(ids)), float("-inf"), dtype=stream.dtype).triu(1)

    def read(target):
        states = stream
        for u, source in enumerate(graph.sources):
            place = graph.targets.index(target)
            if edges is not None and graph.mask[u, place] and not edges[u, place]:
                states = states + corrupted[source] - outputs[source]
        return states

    for layer, block in enumerate(body.layers if is_llama else body.h):
        size, added = stream.shape[1] // graph.heads, torch.zeros_like(stream)
        for head in range(graph.heads):
            part = slice(head * size, (head + 1) * size)
            if is_llama:
                attention = block.self_attn
                group = head * attention.k_proj.out_features // attention.q_proj.out_features
                shared = slice(group * size, (group + 1) * size)
                places = {"q": part, "k": shared, "v": shared}
                q, k, v = (
                    block.input_layernorm(read(f"a{layer}.h{head}<{kind}>"))
                    @ getattr(attention, f"{kind}_proj").weight[places[kind]].T
                    for kind in "qkv"
                )
                cos, sin = body.rotary_emb(stream[None], torch.arange(len(ids))[None])
                q, k = (x[0, 0] for x in apply_rotary_pos_emb(q[None, None], k[None, None], cos, sin))
                matrix = attention.o_proj.weight[:, part]
            else:
                weight, bias, d = block.attn.c_attn.weight, block.attn.c_attn.bias, stream.shape[1]
                q, k, v = (
                    block.ln_1(read(f"a{layer}.h{head}<{kind}>")) @ weight[:, i * d :][:, part] + bias[i * d :][part]
                    for i, kind in enumerate("qkv")
                )
                matrix = block.attn.c_proj.weight[part].T
            z = torch.softmax(q @ k.T / size**0.5 + causal, -1) @ v
            outputs[f"a{layer}.h{head}"] = z @ matrix.T
            added = added + outputs[f"a{layer}.h{head}"]
        stream = stream + added if is_llama else stream + added + block.attn.c_proj.bias
        norm = block.post_attention_layernorm if is_llama else block.ln_2
        outputs[f"m{layer}"] = block.mlp(norm(read(f"m{layer}"))[None])[0]
        stream = stream + outputs[f"m{layer}"]
    return outputs, model.lm_head((body.norm if is_llama else body.ln_f)(read("logits"))[-1])


@torch.no_grad()
def plain_circuit(model, circuit, pair):
    corrupted, _ = plain_run(model, circuit.graph, pair.corrupted)
    return plain_run(model, circuit.graph, pair.clean, circuit.edges, corrupted)[1]


@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_circuits_of_all_sizes_run_as_in_a_plain_loop(kind, monkeypatch):
    model = golden_model(kind, torch.float64)
    graph = graph_of(ModelView(model))
    for seed, share in enumerate((0.02, 0.3, 0.7, 0.99)):
        circuit = random_circuit(graph, share, seed)
        logits = torch.stack([plain_circuit(model, circuit, pair) for pair in PAIRS])
        expected = torch.stack([row[pair.answer] - row[pair.wrong] for row, pair in zip(logits, PAIRS, strict=True)])
        result = run_circuit(model, circuit, PAIRS)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
        monkeypatch.setattr(module, "_ENTRIES", 1)  # one group and one head at a time
        torch.testing.assert_close(run_circuit(model, circuit, PAIRS, batch_size=1), expected, rtol=0, atol=1e-10)
        monkeypatch.undo()


def test_other_metrics_are_those_of_the_plain_loop():
    model = golden_model("gpt2", torch.float64)
    circuit = random_circuit(graph_of(ModelView(model)), 0.7)
    runs = torch.stack([plain_circuit(model, circuit, pair) for pair in PAIRS])
    with torch.no_grad():
        clean = torch.stack([model(torch.tensor([pair.clean])).logits[0, -1] for pair in PAIRS])
    p, q = clean.softmax(1), runs.softmax(1)
    kl = (p * (p.log() - q.log())).sum(1)
    torch.testing.assert_close(run_circuit(model, circuit, PAIRS, "kl"), kl, rtol=0, atol=1e-10)
    difference = torch.stack([row[pair.answer] - row[pair.wrong] for row, pair in zip(q, PAIRS, strict=True)])
    torch.testing.assert_close(run_circuit(model, circuit, PAIRS, "probability-difference"), difference)
    score = faithfulness(model, circuit, PAIRS, "kl")
    assert score.clean == pytest.approx(0, abs=1e-12) and score.value == pytest.approx(
        1 - score.circuit / score.corrupted
    )


# --- published values ---


@pytest.mark.parametrize("name", ["topn_20", "topn_60", "topn_signed_20", "topn_signed_60"])
@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_circuits_have_the_published_metric(kind, name):
    tensors, about = golden()
    model = golden_model(kind)
    circuit = circuit_of(graph_of(ModelView(model)), tensors[f"{kind}.circuit.{name}"])
    expected = torch.tensor(about[f"{kind}.circuit.{name}"]["metric"])
    torch.testing.assert_close(run_circuit(model, circuit, PAIRS), expected, rtol=0, atol=1e-5)  # measured: 3e-6


@pytest.mark.parametrize("count", [20, 60])
@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_greedy_circuits_have_the_published_metric(kind, count):
    tensors, about = golden()
    model = golden_model(kind)
    graph = graph_of(ModelView(model))
    scores = EdgeScores(graph, tensors[f"{kind}.scores.eap_ig_inputs_5"], "eap-ig", 5, "logit-difference", 4, 0.0, 0.0)
    expected = torch.tensor(about[f"{kind}.circuit.greedy_{count}"]["metric"])
    result = run_circuit(model, greedy_edges(scores, count), PAIRS)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_baselines_are_the_published_ones(kind):
    about, model = golden()[1], golden_model(kind)
    graph = graph_of(ModelView(model))
    expected = torch.tensor(about[f"{kind}.baseline"])
    torch.testing.assert_close(run_circuit(model, circuit_of(graph, graph.mask), PAIRS), expected, rtol=0, atol=1e-5)
    for place, pair in enumerate(PAIRS):
        score = faithfulness(model, random_circuit(graph, 0.5), [pair])
        assert score.clean == pytest.approx(about[f"{kind}.baseline"][place], abs=1e-5)
        assert score.corrupted == pytest.approx(about[f"{kind}.corrupted"][place], abs=1e-5)


@pytest.mark.parametrize("kind", GOLDEN_KINDS)
def test_exact_scores_are_the_published_ones(kind):
    """Published are means over batches of their means: of the batch of three and of the batch of one."""
    model = golden_model(kind)
    parts = [exact_scores(model, batch) for batch in BATCHES]
    result = sum(part.scores for part in parts) / len(parts)
    torch.testing.assert_close(result, golden()[0][f"{kind}.scores.exact"], rtol=0, atol=1e-5)
    assert parts[0].scoring == "exact" and parts[0].pairs == 3


def test_exact_scores_are_the_mean_over_pairs():
    model = golden_model("gpt2", torch.float64)
    pairs = PAIRS[1:3]  # of two lengths
    together, apart = exact_scores(model, pairs), [exact_scores(model, [pair]).scores for pair in pairs]
    assert together.scores.dtype == torch.float64
    torch.testing.assert_close(together.scores, torch.stack(apart).mean(0), rtol=0, atol=1e-12)
    assert together.clean == pytest.approx(sum(golden()[1]["gpt2.baseline"][1:3]) / 2, abs=1e-5)
    assert together.corrupted == pytest.approx(sum(golden()[1]["gpt2.corrupted"][1:3]) / 2, abs=1e-5)


# --- all architectures ---


@pytest.mark.parametrize("kind", KINDS)
def test_one_absent_edge_is_what_its_exact_score_says(kind):
    """Two ways through the code: all other edges present, or one input changed."""
    model, pairs = make_model(kind, torch.float64, layers=2), tiny_pairs()
    view = ModelView(model)
    graph = graph_of(view)
    clean = run_circuit(view, circuit_of(graph, graph.mask), pairs)
    with torch.no_grad():
        ends = [model(torch.tensor([pair.clean])).logits[0, -1] for pair in pairs]
    plain = torch.stack([row[pair.answer] - row[pair.wrong] for row, pair in zip(ends, pairs, strict=True)]).double()
    torch.testing.assert_close(clean, plain, rtol=0, atol=1e-5)  # gemma's norms compute in fp32
    exact = exact_scores(view, pairs).scores
    tested = torch.nonzero(graph.mask)[torch.randperm(graph.edge_count, generator=torch.Generator().manual_seed(1))[:4]]
    for u, v in [*tested.tolist(), (0, len(graph.targets) - 1)]:
        edges = graph.mask.clone()
        edges[u, v] = False
        rise = clean.mean() - run_circuit(view, circuit_of(graph, edges), pairs).mean()
        assert float(rise) == pytest.approx(float(exact[u, v]), abs=2e-5), (graph.sources[u], graph.targets[v])
    assert float(exact.abs().max()) > 1e-3
    assert not patches_on(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_circuit_whose_edges_lead_nowhere_runs_as_the_corrupted_prompts(kind):
    model, pairs = make_model(kind, torch.float64, layers=2), tiny_pairs()
    graph = graph_of(ModelView(model))
    edges = torch.zeros_like(graph.mask)
    edges[0, graph.targets.index("m0")] = True  # what the MLP then puts out is replaced everywhere
    score = faithfulness(model, circuit_of(graph, edges), pairs)
    assert score.circuit == pytest.approx(score.corrupted, abs=1e-5) and score.value == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_run_near_their_fp32_values(dtype):
    model, pairs = make_model("llama", layers=2), tiny_pairs()
    graph = graph_of(ModelView(model))
    circuit = random_circuit(graph, 0.6)
    expected = run_circuit(model.to(dtype).float(), circuit, pairs)
    result = run_circuit(model.to(dtype), circuit, pairs)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("state", ["float64 by default", "meta by default", "autocast bfloat16", "inference mode"])
def test_global_settings_change_nothing(state):
    model = golden_model("llama")
    circuit = random_circuit(graph_of(ModelView(model)), 0.6)
    expected = run_circuit(model, circuit, PAIRS)
    with STATES[state]():
        result = run_circuit(model, circuit, PAIRS)
    assert torch.equal(result, expected)


# --- what cannot be run ---


def test_a_circuit_of_another_model_is_refused():
    model = golden_model("gpt2")
    graph = Graph(layers=3, heads=4)
    with pytest.raises(InvalidArgumentError, match=r"the circuit belongs to another model: .*heads = 4.*heads = 3"):
        run_circuit(model, circuit_of(graph, graph.mask), PAIRS)


def test_an_empty_circuit_is_refused():
    graph = Graph(layers=3, heads=3)
    with pytest.raises(InvalidArgumentError, match="the circuit is empty"):
        run_circuit(golden_model("gpt2"), circuit_of(graph, torch.zeros_like(graph.mask)), PAIRS)


def test_a_difference_near_zero_gives_no_value_but_a_reason():
    model, graph = golden_model("gpt2"), Graph(layers=3, heads=3)
    pair = PAIRS[0]
    both = [pair, PromptPair(pair.corrupted, pair.clean, pair.answer, pair.wrong, "the other way round")]
    score = faithfulness(model, circuit_of(graph, graph.mask), both)
    assert score.value is None and "there is nothing that a circuit could explain" in score.reason
    assert score.pairs == 2
    whole = faithfulness(model, circuit_of(graph, graph.mask), PAIRS)
    assert whole.value == pytest.approx(1) and whole.reason == ""


@pytest.mark.parametrize("run", [run_circuit, lambda model, circuit, *rest: exact_scores(model, *rest)])
def test_wrong_arguments_are_named(run):
    model, graph = golden_model("gpt2"), Graph(layers=3, heads=3)
    circuit = circuit_of(graph, graph.mask)
    with pytest.raises(RequestError, match="no prompt pairs given"):
        run(model, circuit, [])
    with pytest.raises(InvalidArgumentError, match="probability-difference, kl; got 'accuracy'"):
        run(model, circuit, PAIRS, "accuracy")
    with pytest.raises(RequestError, match="pair 'Ada': token 61 is not one of the model's 61"):
        run(model, circuit, [PromptPair((1, 2), (1, 3), 61, 5, "Ada")])
    with pytest.raises(RequestError, match="pair 'Ada': its prompts have 17 tokens, and the model takes 16"):
        run(model, circuit, [PromptPair((1,) * 17, (2,) * 17, 4, 5, "Ada")])


def test_a_batch_size_that_is_none_is_named():
    graph = Graph(layers=3, heads=3)
    with pytest.raises(InvalidArgumentError, match="batch_size = 0"):
        run_circuit(golden_model("gpt2"), circuit_of(graph, graph.mask), PAIRS, batch_size=0)


def test_too_many_exact_passes_are_refused_with_their_number():
    with pytest.raises(InvalidArgumentError, match=r"172 edges and 4 pairs: 688 passes, more than limit = 687"):
        exact_scores(golden_model("gpt2"), PAIRS, limit=687)


def test_output_that_is_not_finite_is_named():
    model, graph = golden_model("gpt2"), Graph(layers=3, heads=3)
    view = ModelView(model)
    graph_of(view)
    with torch.no_grad():
        model.transformer.wpe.weight[7] = float("nan")  # the third pair is shorter
    for run in (lambda: run_circuit(view, circuit_of(graph, graph.mask), PAIRS), lambda: exact_scores(view, PAIRS)):
        with pytest.raises(EvaluationError, match=r"pair 0\.0: the model's output is not finite"):
            run()
    assert run_circuit(view, circuit_of(graph, graph.mask), PAIRS[2:3]).isfinite().all()


def test_a_model_that_cannot_be_opened_is_named():
    model, graph = golden_model("llama"), Graph(layers=3, heads=4)
    model.model.layers[1].self_attn.q_proj = torch.nn.Sequential(model.model.layers[1].self_attn.q_proj)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn"):
        run_circuit(model, circuit_of(graph, graph.mask), PAIRS)


@pytest.mark.parametrize(("metric", "passes"), [("logit-difference", 2), ("probability-difference", 2), ("kl", 3)])
def test_a_run_has_no_more_passes_than_its_metric_needs(metric, passes):
    model, graph = golden_model("gpt2"), Graph(layers=3, heads=3)
    view = ModelView(model)
    graph_of(view)
    _ = view.head  # opened and checked before passes are counted
    seen: list[int] = []
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    circuit = circuit_of(graph, graph.mask)
    run_circuit(view, circuit, PAIRS[:2], metric)
    assert len(seen) == passes
    faithfulness(view, circuit, PAIRS[:2], metric)
    assert len(seen) == passes + 3
    handle.remove()


def test_progress_counts_pairs_and_edges():
    model, graph = golden_model("gpt2"), Graph(layers=3, heads=3)
    seen: list[int] = []
    run_circuit(model, circuit_of(graph, graph.mask), PAIRS, batch_size=3, progress=seen.append)
    assert seen == [3, 1]
    seen.clear()
    exact_scores(model, PAIRS[:1], progress=seen.append)
    assert sum(seen) == graph.edge_count
