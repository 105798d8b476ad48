"""A small mixture of experts, edited beside the dense demo model with no hyper-parameters given.

    python -m benchmarks.mixture train --out DIR [--steps 400]     about ten minutes on one core
    python -m benchmarks.mixture compare --model DIR [--json FILE] [--models mixture,dense] [--methods ...] [--missing]

The mixture is a Qwen3-MoE with the demo model's width, depth, tokenizer and world: 6 layers of 8 experts of which 2 are
chosen, 256 units each. It begins as a part of the dense model (sparse upcycling, arXiv 2212.05055): embeddings and
attention are the dense model's, each expert is a random third of the dense MLP, routers are random. The training that
follows is the demo model's (`kedit_fast.demo.train`) with a loss that balances the experts, in float32 weights.

Both models get what a user gets who gives no numbers: layers, residual share and clamp from short trials on the first
100 requests (`reports.choice`), the rest scaled to the model. The other 500 are written and measured: 100 in one batch,
and 500 in batches of 50. The dense model's preset is not used. Columns are those of `benchmarks.quality`; beside them,
`neighborhood_before` and `nll_before` of the unedited model, and `routing`: the share of pairs of a held-out token and
a layer above the lowest edited one that are sent to other experts than before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from benchmarks.harness import Row, console, document_of, provenance, read, require_clean, save
from benchmarks.quality import SCENARIOS, TITLES, VALIDATION, Subject, number, shares, subject, together
from kedit_fast import Editor, demo
from kedit_fast.demo.train import Forward, fit
from kedit_fast.evaluation.routing import routing_probe
from kedit_fast.methods.hparams import reads
from kedit_fast.methods.presets import guessed_numbers, make_hparams
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models.loading import load_model
from kedit_fast.reports.choice import choose
from kedit_fast.reports.trials import in_memory

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
EXPERTS, CHOSEN, UNITS = 8, 2, 256
BALANCE = 0.01
"""Weight of the loss that balances the experts."""
MODELS = ("mixture", "dense")
METHODS = ("memit", "alphaedit", "memit-sequential")
EDITED = ("100", "sequence")
"""Scenarios of `benchmarks.quality`."""


@torch.no_grad()
def upcycled(dense: PreTrainedModel, text: torch.Tensor) -> PreTrainedModel:
    """A Qwen3-MoE in float32 that begins as a part of a dense Llama.

    Each expert has `UNITS` random units of the MLP, and its output is scaled up for the others. Qwen3 brings the
    queries and keys of each head to a fixed norm; that is the dense model's mean norm.

    Args:
        dense: the Llama, in float32.
        text: token ids [rows, T] for that norm.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    old: Any = dense
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "rope_parameters", "head_dim",
              "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    config = Qwen3MoeConfig(
        **{name: getattr(old.config, name) for name in shared}, **{"experts_implementation": "eager"},
        num_experts=EXPERTS, num_experts_per_tok=CHOSEN, moe_intermediate_size=UNITS, norm_topk_prob=True,
    )  # fmt: skip
    new: Any = Qwen3MoeForCausalLM(config)
    new.model.embed_tokens.load_state_dict(old.model.embed_tokens.state_dict())
    new.model.norm.load_state_dict(old.model.norm.state_dict())
    states = old(input_ids=text, output_hidden_states=True, use_cache=False).hidden_states
    for entering, ours, theirs in zip(states, new.model.layers, old.model.layers):  # noqa: B905 (one state more)
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(ours.self_attn, name).load_state_dict(getattr(theirs.self_attn, name).state_dict())
        for name in ("q", "k"):
            heads = getattr(theirs.self_attn, f"{name}_proj")(theirs.input_layernorm(entering))
            norms = heads.unflatten(-1, (-1, old.config.head_dim)).square().mean(-1).sqrt()
            getattr(ours.self_attn, f"{name}_norm").weight.fill_(float(norms.mean()))
        units = theirs.mlp.down_proj.in_features
        for expert in range(EXPERTS):
            some = torch.randperm(units)[:UNITS]
            both = torch.cat([theirs.mlp.gate_proj.weight[some], theirs.mlp.up_proj.weight[some]])
            ours.mlp.experts.gate_up_proj[expert] = both
            ours.mlp.experts.down_proj[expert] = theirs.mlp.down_proj.weight[:, some] * (units / UNITS)
    return new


def balanced(model: PreTrainedModel) -> Forward:
    """A step's `forward` for `fit`: the loss that balances the experts is added."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    whole: Any = model

    def forward(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = whole.model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True)
        balance = load_balancing_loss_func(out.router_logits, EXPERTS, CHOSEN)
        assert isinstance(balance, torch.Tensor)
        return whole.lm_head(out.last_hidden_state), BALANCE * balance

    return forward


@app.callback()
def about() -> None:
    """A small mixture of experts, edited beside the dense demo model with no hyper-parameters given."""


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="folder for weights, tokenizer and requests")],
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 400,
    rows: Annotated[int, typer.Option(help="rows of 64 tokens a step")] = 32,
    rate: Annotated[float, typer.Option(help="peak learning rate")] = 1e-3,
    seed: Annotated[int, typer.Option(help="seed of routers and data")] = 5,
    checkpoint_every: Annotated[int, typer.Option(help="steps between saves")] = 100,
) -> None:
    """Train the mixture, and write it with its tokenizer and its requests."""
    torch.manual_seed(seed)
    dense, tokenizer = demo.load()
    text = tokenizer(demo.corpus(64), return_tensors="pt", padding=True, truncation=True, max_length=32)["input_ids"]
    model = upcycled(dense, text)
    fit(model, tokenizer, out, steps, rows, rate, seed, checkpoint_every, bfloat16=False, forward=balanced(model))


def chosen(on: Subject, method: str) -> dict[str, Any]:
    """The hyper-parameters of an edit without numbers on a model without a preset."""
    recipe, config = find_recipe(method), on.model.config
    preset, _ = make_hparams(method, config)
    guess = {name: value for name, value in guessed_numbers(recipe, config).items() if reads(recipe, name)}
    given = {name: value for name, value in guess.items() if getattr(preset, name) != value}
    requests = demo.requests()[:VALIDATION]
    stored = in_memory(on.moments)
    return {**given, **choose(on.model, on.tokenizer, requests, method, statistics=stored, hparams=given)[0].hparams}


def measured(on: Subject, method: str, scenario: str, hparams: dict[str, Any]) -> Row:
    """The requests of a scenario, written, measured and undone."""
    count, size = SCENARIOS[scenario]
    requests = on.requests[:count]
    before = shares(on, requests)
    contexts = find_recipe(method).contexts
    editor = Editor(
        on.model, on.tokenizer, method, statistics=on.moments, hparams={"on_predicted": "allow", **hparams},
        prefixes=on.prefixes.get(contexts), values=on.store if size is None else None,
    )  # fmt: skip
    on.prefixes[contexts] = editor.prefixes
    probe = routing_probe(editor.view, on.tokenizer, on.text, min(editor.hparams.layers))
    try:
        row = together(on, editor, requests, size or count)
        shift = None if probe is None else probe.shift().share
    finally:
        editor.restore()
    more = {"neighborhood_before": before["neighborhood"], "nll_before": on.before, "routing": shift}
    return {**row, **more, "layers": list(editor.hparams.layers), "hparams": hparams}


def line(row: Row) -> str:
    """A row in words."""
    names = ("efficacy", "paraphrase", "neighborhood", "neighborhood_before", "drift", "nll_before", "retention",
             "norm", "routing")  # fmt: skip
    cells = ", ".join(f"{name} {number(row[name])}" for name in names if row[name] is not None)
    title = f"{row['model']}, {row['method']}, {TITLES[row['scenario']]}, layers {row['layers']}"
    return f"{title}: {cells}; {row['seconds']:.0f} s"


@app.command()
def compare(
    model: Annotated[Path, typer.Option(help="the folder that `train` wrote")],
    models: Annotated[str, typer.Option(help="mixture, dense, comma-separated")] = ",".join(MODELS),
    methods: Annotated[str, typer.Option(help="names, comma-separated")] = ",".join(METHODS),
    scenarios: Annotated[str, typer.Option(help="names, comma-separated")] = ",".join(EDITED),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the rows here, in place of those of the same name")
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="with --json: pass over rows that the file has")] = False,
) -> None:
    """Edit both models without giving numbers, and print a line for each."""
    origin = provenance("cpu")
    require_clean(json_file, origin)
    rows: list[Row] = read(json_file)["rows"] if json_file is not None and json_file.exists() else []
    for name in models.split(","):
        on = None
        for method in methods.split(","):
            hparams = None
            for scenario in scenarios.split(","):
                place = (name, method, scenario)
                if missing and any(place_of(row) == place for row in rows):
                    continue
                on = on or subject(loaded=load_model(model, dtype=torch.float32) if name == "mixture" else None)
                hparams = chosen(on, method) if hparams is None else hparams
                row = {"model": name, "method": method, "scenario": scenario, **measured(on, method, scenario, hparams)}
                console.print(line(row))
                others = [old for old in rows if place_of(old) != place]
                rows = sorted([*others, {**row, **origin}], key=place_of)
                save(json_file, {**document_of([], origin), "rows": rows})


def place_of(row: Row) -> tuple[str, str, str]:
    """What tells rows from each other."""
    return row["model"], row["method"], row["scenario"]


if __name__ == "__main__":
    app()
