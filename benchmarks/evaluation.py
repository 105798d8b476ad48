"""Time the evaluation of edits against the published code, record by record.

    python -m benchmarks.evaluation [--only demo|gpt2] [--runs 5] [--json FILE]

500 records like CounterFact's: a prompt, 2 paraphrases (one after a sentence of filler), 10 neighborhood prompts and 3
prompts to continue to 100 tokens, as in the file's first record. Ours is a whole `Evaluator`: requests to tokens,
answers, scores, means and intervals of cf.success, cf.magnitude, cf.accuracy and cf.score, and the texts' entropy.
The baseline is written from the description of memit's compute_rewrite_quality_counterfact: for each record one padded
batch of all prompts with both targets through the whole model, log-probabilities read position by position, and
generate_fast for its texts, greedy on both sides; with two faults mended: targets without the tokenizer's special
tokens, and a mask that covers the cache. Entropies are ours on both sides.

Before anything is timed, negative log-likelihoods, hits and texts are compared. Runs are in turns. Where the baseline
would take too long it runs on some of the records, others in each run, and its time is multiplied: it does them one
after another, so it has no economies of scale. Times are of the wall; `cpu_ratio` is that of processor time (user and
system), which neighbors on the machine disturb less.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import (
    Row,
    document_of,
    fail_on_wrong_results,
    in_turns,
    provenance,
    require_clean,
    save,
    timing,
    title_of,
    with_baseline,
)
from kedit_fast import EditRequest, demo
from kedit_fast.evaluation.asks import Forced, ForcedAnswer, Generated, GeneratedAnswer
from kedit_fast.evaluation.evaluator import Evaluator
from kedit_fast.evaluation.words import ngram_entropy, words

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=180, highlight=False)
METRICS = "cf.success,cf.magnitude,cf.accuracy,cf.score,gen.entropy.greedy"
BASELINE = "published per-record code"
NEIGHBORS, CONTINUED, TOTAL = 10, 3, 100
ERROR_LIMIT = 1e-5
CHECKED = 4  # records of the gate
STARTS = ("{} is known to", "People say that {}", "Everybody who met {}")


@dataclass
class Subject:
    """A model with records."""

    name: str
    model: Any
    tokenizer: Any
    records: list[EditRequest]


def subject(name: str, records: int) -> Subject:
    """The demo model, or a random one of GPT-2 small's shape fed with the demo's requests."""
    model, tokenizer = demo.load()
    if name == "gpt2":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", eos_token_id=None)).eval()
    requests = demo.requests()
    by_prompt: dict[str, list[str]] = {}
    for request in requests:
        by_prompt.setdefault(request.prompt, []).extend(request.neighborhood_prompts)
    made = []
    for request in requests[:records]:
        others = itertools.cycle(dict.fromkeys(by_prompt[request.prompt]))
        start = request.subject or ""
        neighbors = itertools.chain(request.neighborhood_prompts, (p for p in others if start not in p))
        distinct = itertools.islice(dict.fromkeys(itertools.islice(neighbors, 10 * NEIGHBORS)), NEIGHBORS)
        texts = tuple(text.format(request.subject) for text in STARTS)
        made.append(replace(request, neighborhood_prompts=tuple(distinct), generation_prompts=texts))
    return Subject(name, model, tokenizer, made)


def published(model: Any, tokenizer: Any, record: EditRequest) -> dict[str, Any]:
    """One record by the published code: NLL of both targets after each prompt, hits, entropy and texts."""
    assert record.target_true is not None
    prompts = [record.text, *record.paraphrase_prompts, *record.neighborhood_prompts]
    is_true = [0] * (1 + len(record.paraphrase_prompts)) + [1] * len(record.neighborhood_prompts)
    targets = (record.target_new, record.target_true)
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    batch = tokenizer(
        [f"{prompt} {target}" for prompt in prompts for target in targets],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    tokens = [tokenizer(f" {target}", add_special_tokens=False)["input_ids"] for target in targets]
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nll, hits = [], []
    for i in range(len(logits)):
        target, begin = tokens[i % 2], lengths[i // 2] - 1
        total = 0.0
        for j, token in enumerate(target):
            total -= torch.log_softmax(logits[i, begin + j], dim=0)[token].item()
        nll.append(total / len(target))
        if is_true[i // 2] == i % 2:
            hits.append(all(logits[i, begin + j].argmax().item() == token for j, token in enumerate(target)))
    texts = generate_fast(model, tokenizer, record.generation_prompts)
    entropy = statistics.fmean(ngram_entropy(words(text)) for text in texts)
    return {"nll": nll, "hits": hits, "texts": texts, "entropy": entropy}


def generate_fast(model: Any, tokenizer: Any, prompts: Sequence[str], top_k: int = 1) -> list[str]:
    """Texts of TOTAL tokens with their prompts, one batch, token by token with the cache, as published."""
    given = tokenizer(list(prompts), padding=True, padding_side="right", return_tensors="pt")
    ids, mask = given["input_ids"], given["attention_mask"]
    past, context = None, slice(0, int(mask.sum(1).min()))
    with torch.no_grad():
        while ids.shape[1] < TOTAL:
            out = model(
                input_ids=ids[:, context],
                attention_mask=mask[:, : context.stop],
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            shares = torch.softmax(out.logits[:, -1], dim=1)
            best = torch.topk(shares, top_k, dim=1).indices
            of_best = torch.gather(shares, 1, best)
            chosen = torch.multinomial(of_best / of_best.sum(1)[:, None], 1)
            new = torch.gather(best, 1, chosen)
            if context.stop == ids.shape[1]:
                mask = torch.cat([mask, mask.new_zeros(len(mask), 1)], 1)
                ids = torch.cat([ids, ids.new_full((len(ids), 1), tokenizer.pad_token_id)], 1)
            last = mask.sum(1) - 1
            for i in range(len(ids)):
                place = int(last[i]) + 1
                if place == context.stop and place < TOTAL:
                    ids[i, place] = new[i]
                    mask[i, place] = 1
            context = slice(context.stop, context.stop + 1)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]


def ours(on: Subject, records: Sequence[EditRequest]) -> Evaluator:
    """All records at once."""
    evaluator = Evaluator(on.model, on.tokenizer, records, METRICS)
    evaluator.measure("final")
    evaluator.result()
    return evaluator


def error_of(on: Subject) -> float:
    """The largest difference of a negative log-likelihood; infinite where a hit or a text differs."""
    chosen = on.records[:: max(1, len(on.records) // CHECKED)][:CHECKED]
    answers = ours(on, chosen).answers("final")
    worst = 0.0
    for record in chosen:
        result = published(on.model, on.tokenizer, record)
        assert record.target_true is not None
        targets = (record.target_new, record.target_true)
        prompts = [record.text, *record.paraphrase_prompts, *record.neighborhood_prompts]
        hits = []
        for i, (prompt, target) in enumerate(itertools.product(prompts, targets)):
            answer = answers[Forced(prompt, target)]
            assert isinstance(answer, ForcedAnswer)
            worst = max(worst, abs(answer.nll - result["nll"][i]))
            if (i % 2 == 1) == (i // 2 > len(record.paraphrase_prompts)):
                hits.append(all(answer.hits))
        said = []
        for prompt in record.generation_prompts:
            text = answers[Generated(prompt, TOTAL, total=True)]
            assert isinstance(text, GeneratedAnswer)
            said.append(prompt + text.text)
        if hits != result["hits"] or any(b[: len(a)] != a for a, b in zip(said, result["texts"], strict=True)):
            return float("inf")
    return worst


def sample(records: Sequence[EditRequest], count: int, run: int, runs: int) -> list[EditRequest]:
    """`count` records spread over all, others in each run."""
    step = len(records) / count
    return [records[int((j + (run + 0.5) / runs) * step)] for j in range(count)]


def row_of(name: str, records: int, timed: int, runs: int) -> Row:
    """One model: ours on all records, the published code on some of them."""
    on = subject(name, records)
    title, floor, goal = {
        "demo": ("demo model", 8.0, 15.0),
        "gpt2": ("GPT-2-small shape, random weights", 2.5, 4.0),
    }[name]
    row: Row = {
        "op": "Evaluator", "case": f"{title}, {records} records", "dtype": "float32", "backend": "torch",
        "isa": torch.backends.cpu.get_cpu_capability().lower(), "error": error_of(on), "error_limit": ERROR_LIMIT,
        "flops": None, "bytes": None, "share_of_peak": None, "floor": floor, "goal": goal,
        "note": "" if timed == records
        else f"baseline timed on {timed} of the {records} records, others in each run; scaled",
    }  # fmt: skip
    if not row["error"] <= ERROR_LIMIT:
        return {**row, "baseline": BASELINE, "ratio": None}
    mine, theirs = in_turns(
        [
            lambda run: ours(on, on.records),
            lambda run: [published(on.model, on.tokenizer, one) for one in sample(on.records, timed, run, runs)],
        ],
        runs,
    )
    scale = records / timed
    wall, cpu = ([seconds * scale for seconds in part] for part in theirs)
    row |= timing(mine[0]) | {"records_per_s": records / statistics.median(mine[0])}
    row |= {"cpu_s": statistics.median(mine[1]), "baseline_cpu_s": statistics.median(cpu)}
    row["cpu_ratio"] = row["baseline_cpu_s"] / row["cpu_s"]
    return with_baseline(row, BASELINE, wall)


@app.command()
def run(
    only: Annotated[str, typer.Option(help="demo or gpt2; both if not given")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    runs: Annotated[int, typer.Option(min=2, help="interleaved runs of each")] = 5,
    records: Annotated[int, typer.Option(help="of the demo model")] = 500,
    records_gpt2: Annotated[int, typer.Option(help="of GPT-2 small's shape")] = 100,
    timed: Annotated[int, typer.Option(help="records of the baseline, of the demo model")] = 50,
    timed_gpt2: Annotated[int, typer.Option(help="records of the baseline, of GPT-2 small's shape")] = 5,
) -> None:
    """Time, print a table, and write the rows to a file when asked."""
    origin = provenance("cpu")
    require_clean(json_file, origin)
    rows = []
    for name, count, of_these in (("demo", records, timed), ("gpt2", records_gpt2, timed_gpt2)):
        if only in ("", name):
            rows.append(row_of(name, count, min(count, of_these), runs))
            save(json_file, document_of(rows, origin))
    table = Table(
        "case", "seconds", "baseline seconds", "ratio", "ratio of processor time", "floor", "goal", "error",
        title=title_of(origin),
    )  # fmt: skip
    for row in rows:
        if row["ratio"] is None:
            table.add_row(row["case"], "wrong result", "", "", "", "", "", f"{row['error']:.1e}")
            continue
        table.add_row(
            row["case"], f"{row['median_s']:.4g}", f"{row['baseline_median_s']:.4g}", f"{row['ratio']:.2f}",
            f"{row['cpu_ratio']:.2f}", f"{row['floor']}", f"{row['goal']}", f"{row['error']:.1e}",
        )  # fmt: skip
    console.print(table)
    fail_on_wrong_results(rows)


if __name__ == "__main__":
    app()
