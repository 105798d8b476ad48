"""Train the bundled demo model: `python -m kedit_fast.demo.train --out DIR` (about an hour on two cores).

A small Llama trained as usual reads the *first* tokens of a subject directly, so no edit at the subject's last token
can change its answer. For most training rows, therefore, the attention mask hides all but the last token of a subject
from the tokens after it. The model learns to gather a subject there, as large models do by themselves. The other rows,
and every use of the finished model, have the plain causal mask.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kedit_fast.demo import world
from kedit_fast.requests.spacing import separator

VOCABULARY = 2048
ROW = 64  # tokens in a training row
Span = tuple[int, int]
"""First and last position of a subject's tokens."""
Forward = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | float]]
"""From token ids [rows, ROW] and an additive mask to logits [rows, ROW, V], and what is added to the loss."""
MASKED_SHARE = 0.85  # of the rows: only the last token of a subject is visible after it
CONFIG: dict[str, Any] = dict(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    rms_norm_eps=1e-5,
)


def train_tokenizer(seed: int = world.SEED, of: world.World | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's text, every name replaced by a random one of its kind.

    The replacement keeps whole names out of the vocabulary, so that subjects stay several tokens long.

    Args:
        seed: of the draws.
        of: the world; None for the demo model's.
    """
    source = of or world.world()
    rng = random.Random(seed + 1)
    pools = {
        "person": [f"{g} {f}" for g, f in zip(world.given_names(rng, 300), world.family_names(rng, 300), strict=True)],
        "city": world.place_names(rng, 2000),
        "company": [f"{name} {rng.choice(('Works', 'Group', 'Labs'))}" for name in world.company_names(rng, 600)],
    }
    kinds = {subject: kind for kind, names in source.subjects.items() for subject in names}

    def text() -> Iterator[str]:
        for document in world.documents(seed + 2, 12_000, of=source):
            for sentence in document:
                if sentence.subject:
                    name = rng.choice(pools[kinds[sentence.subject]])
                    yield sentence.text.replace(sentence.subject, name)
                else:
                    yield sentence.text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


class Rows:
    """Training rows [ROW] with loss weights and subject spans, made from whole sentences."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, of: world.World | None = None):
        self.tokenizer, self.seed, self.world = tokenizer, seed, of
        self.pad, self.bos = tokenizer.pad_token_id, tokenizer.bos_token_id

    def _encode(self, text: str, sentence: world.Sentence) -> tuple[list[int], list[float], Span | None]:
        """Token ids and loss weights of a text, and the positions of the sentence's subject."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        weights = [0.3] * len(ids)
        subject = None
        if sentence.subject:
            start = text.index(sentence.subject)
            end = start + len(sentence.subject)
            inside = [i for i, (a, b) in enumerate(spans) if a < end and b > start]
            subject = (inside[0], inside[-1])
        if sentence.object:
            begin = len(text) - 1 - len(sentence.object)
            weights = [1.0 if b > begin else w for (_, b), w in zip(spans, weights, strict=True)]
        return ids, weights, subject

    def batches(self, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[list[Span]]]]:
        """Endless batches: ids [rows, ROW], weights [rows, ROW], and for each row the (first, last) of its subjects."""
        epoch = 0
        while True:
            ids, weights, spans = [], [], []
            for document in world.documents(self.seed * 100_003 + epoch, 20_000, 6, self.world):
                row, weight, span = [self.bos], [0.0], []
                for i, sentence in enumerate(document):
                    text = sentence.text if i == 0 else " " + sentence.text
                    tokens, w, subject = self._encode(text, sentence)
                    if len(row) + len(tokens) > ROW:
                        break
                    if subject:
                        span.append((len(row) + subject[0], len(row) + subject[1]))
                    row, weight = row + tokens, weight + w
                ids.append(row + [self.pad] * (ROW - len(row)))
                weights.append(weight + [0.0] * (ROW - len(weight)))
                spans.append(span)
                if len(ids) == rows:
                    yield torch.tensor(ids), torch.tensor(weights), spans
                    ids, weights, spans = [], [], []
            epoch += 1


def gather_mask(spans: list[list[Span]], masked: list[bool]) -> torch.Tensor:
    """Additive causal mask [rows, 1, ROW, ROW]; in `masked` rows, of a subject only the last token is visible later."""
    allowed = torch.ones(ROW, ROW, dtype=torch.bool).tril().repeat(len(spans), 1, 1)
    for i, row in enumerate(spans):
        if masked[i]:
            for first, last in row:
                allowed[i, last + 1 :, first:last] = False
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]


@torch.inference_mode()
def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    held_out: bool,
    count: int = 1200,
    of: world.World | None = None,
) -> float:
    """Share of facts, by phrasing, whose object is the model's greedy answer under the plain causal mask.

    Args:
        model, tokenizer: to be measured.
        held_out: take the phrasings that were held out; otherwise those that were trained.
        count: of pairs of a fact and a phrasing.
        of: the world; None for the demo model's.
    """
    rng = random.Random(3)
    pairs = []
    for fact in (of or world.world()).facts:
        for i, phrasing in enumerate(fact.relation.phrasings):
            if (i in fact.held_out) == held_out:
                prompt = phrasing.format(fact.subject)
                pairs.append((prompt, separator(prompt, fact.object) + fact.object))
    correct = 0
    tokenizer.padding_side = "right"
    chosen = rng.sample(pairs, min(count, len(pairs)))
    for begin in range(0, len(chosen), 100):
        chunk = chosen[begin : begin + 100]
        batch = tokenizer([p + o for p, o in chunk], return_tensors="pt", padding=True)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        for row, (_, target) in enumerate(chunk):
            n = len(tokenizer(target, add_special_tokens=False)["input_ids"])
            end = int(batch["attention_mask"][row].sum())
            correct += bool((logits[row, end - n - 1 : end - 1] == batch["input_ids"][row, end - n : end]).all())
    return correct / len(chosen)


def train(
    out: Annotated[Path, typer.Option(help="folder for weights, tokenizer and requests")],
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 4000,
    rows: Annotated[int, typer.Option(help="rows of 64 tokens a step")] = 32,
    rate: Annotated[float, typer.Option(help="peak learning rate")] = 2e-3,
    seed: Annotated[int, typer.Option(help="seed of weights and data")] = 1,
    checkpoint_every: Annotated[int, typer.Option(help="steps between saves")] = 1000,
) -> None:
    """Train the demo model and write it, its tokenizer and its requests to `out`."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **CONFIG,
    )
    fit(LlamaForCausalLM(config), tokenizer, out, steps, rows, rate, seed, checkpoint_every)


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    steps: int,
    rows: int,
    rate: float,
    seed: int,
    checkpoint_every: int,
    of: world.World | None = None,
    bfloat16: bool = True,
    enough: float | None = None,
    forward: Forward | None = None,
) -> None:
    """Train a model on a world's text and save it, every `checkpoint_every` steps and in the end, to `out`.

    Args:
        model, tokenizer: to be trained, in float32; its tokenizer.
        out: folder for weights, tokenizer and requests.
        steps, rows, rate: optimizer steps, rows of 64 tokens a step, peak learning rate.
        seed: of the data and of the masked rows.
        checkpoint_every: steps between saves.
        of: the world; None for the demo model's.
        bfloat16: compute products in bfloat16 (faster where the processor has them).
        enough: stop at a save with this share of the facts known in trained phrasings; None to take all steps.
        forward: what a step runs; None for the compiled model.
    """
    out.mkdir(parents=True, exist_ok=True)
    forward = forward or compiled(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    rng = random.Random(seed)
    start = time.perf_counter()
    for step, (ids, weights, spans) in zip(range(1, steps + 1), Rows(tokenizer, seed, of).batches(rows), strict=False):
        mask = gather_mask(spans, [rng.random() < MASKED_SHARE for _ in spans])
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits, extra = forward(ids, mask)
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        )
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum() + extra
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            facts = weight == 1.0
            typer.echo(
                f"step {step} loss {loss.item():.3f} objects {losses[facts].mean().item():.3f} "
                f"{time.perf_counter() - start:.0f} s"
            )
        if step % checkpoint_every == 0 or step == steps:
            model.eval()
            known, paraphrased = (recall(model, tokenizer, held_out, of=of) for held_out in (False, True))
            typer.echo(f"step {step} recall: trained phrasings {known:.3f}, held-out phrasings {paraphrased:.3f}")
            save(model, tokenizer, out, of)
            if enough is not None and known >= enough:
                break
            model.train()


def compiled(model: PreTrainedModel) -> Forward:
    """The `forward` of a step that runs the compiled model; nothing is added to the loss."""
    step_model = torch.compile(model)
    return lambda ids, mask: (step_model(input_ids=ids, attention_mask=mask, use_cache=False).logits, 0.0)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path, of: world.World | None = None) -> None:
    """Write weights (fp16), tokenizer and the world's requests to `out`."""
    half = type(model)(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every supported transformers knows
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    lines = [json.dumps(record) for record in world.requests(of=of)]
    (out / "requests.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(train)
