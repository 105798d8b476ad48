"""What a user without tuned numbers gets, measured on two small models that no preset knows.

`python -m benchmarks.untuned train --out DIR --name llama` trains one of them (about 25 minutes on one core).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kedit_fast.demo import world
from kedit_fast.demo.train import fit, train_tokenizer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

SEEDS = {"llama": 417, "gpt2": 902}


def invented(name: str) -> world.World:
    """The world of a model: 480 subjects, 2,040 facts, other names and facts than the demo's."""
    return world.world(SEEDS[name], (240, 120, 120), 20)


def untrained(name: str, tokenizer) -> PreTrainedModel:
    """A model of random weights: a Llama of 5 layers of width 192, or a GPT-2 of 8 layers of width 144."""
    tokens = {kind: getattr(tokenizer, kind) for kind in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if name == "llama":
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=192, intermediate_size=576, num_hidden_layers=5,
            num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
            rms_norm_eps=1e-5, **tokens)
        return LlamaForCausalLM(config)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=144, n_layer=8, n_head=6, n_positions=256,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens)
    return GPT2LMHeadModel(config)


@app.callback()
def choose() -> None:
    """Train the two models, then compare."""


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="folder; the model goes to a folder of its name in it")],
    name: Annotated[str, typer.Option(help="llama or gpt2")],
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 2500,
    rows: Annotated[int, typer.Option(help="rows of 64 tokens a step")] = 16,
    rate: Annotated[float, typer.Option(help="peak learning rate")] = 2e-3,
) -> None:
    """Train a model without a preset and write it, its requests and its corpus."""
    torch.set_num_threads(1)
    torch.manual_seed(SEEDS[name])
    source = invented(name)
    tokenizer = train_tokenizer(SEEDS[name], source)
    model = untrained(name, tokenizer)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}) for text in world.corpus(of=source))
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    fit(model, tokenizer, folder, steps, rows, rate, SEEDS[name], 400, source, bfloat16=False)


if __name__ == "__main__":
    app()
