"""What edits did to everything else: likelihood of natural text, and divergence from the unedited model."""

from __future__ import annotations

from typing import Any

import torch

from kedit_fast.evaluation.asks import Ask, Distributions, DistributionsAnswer, Likelihood, LikelihoodAnswer
from kedit_fast.evaluation.catalog.counterfact import Answers, exponential, probes_of
from kedit_fast.evaluation.metric import Case, Derived, Metric, Prompts, Scoring
from kedit_fast.requests.request import EditRequest

TEXT_TOKENS = 256
"""Texts are cut to so many tokens."""
_CHUNK = 64  # rows of logits at a time


def texts(text: str) -> tuple[Case, ...]:
    """A natural text."""
    return (Case(text, record=text),)


def neighbors(request: EditRequest) -> tuple[Case, ...]:
    """The neighborhood prompts and the prompts of locality and neighborhood probes, whatever their answers."""
    probes = probes_of(request, "locality", "neighborhood")
    prompts = (*request.neighborhood_prompts, *(prompt for probe in probes for prompt in probe.prompts))
    return tuple(Case(prompt, record=request) for prompt in prompts)


PROMPTS = {"text": Prompts("texts", texts), "neighbors": Prompts("requests", neighbors)}


def divergence(reference: DistributionsAnswer, edited: DistributionsAnswer) -> torch.Tensor:
    """KL(reference || edited) in nats, over the whole vocabulary, at each position [n]."""
    heads = reference.head, edited.head
    device = heads[1].device
    before, now = reference.states.to(device), edited.states.to(device)
    if heads[0].matrix is heads[1].matrix and heads[0].softcap == heads[1].softcap:
        return heads[1].distribution_kl(before, now)
    parts = []
    for rows in range(0, len(before), _CHUNK):
        log_p, log_q = (
            torch.log_softmax(head.logits(states[rows : rows + _CHUNK].to(head.device)).to(device).double(), -1)
            for head, states in zip(heads, (before, now), strict=True)
        )
        difference = torch.where(log_p.isinf(), 0.0, log_p - log_q)  # tokens that are never said
        parts.append((log_p.exp() * difference).sum(-1))
    return torch.cat(parts)


def _all_positions(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return (Distributions(case.prompt, TEXT_TOKENS),)


def _last_position(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return (Distributions(case.prompt, TEXT_TOKENS, last=True),)


def _mean_divergence(case: Case, answers: Answers) -> float:
    (now,), (before,) = answers["now"], answers["pre"]
    assert isinstance(now, DistributionsAnswer) and isinstance(before, DistributionsAnswer)
    return float(divergence(before, now).double().mean())


def _positions(case: Case, answers: Answers) -> float:
    (now,) = answers["now"]
    assert isinstance(now, DistributionsAnswer)
    return float(len(now.states))


def _text(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return (Likelihood(case.prompt, TEXT_TOKENS),)


def _likelihood(answers: Answers) -> LikelihoodAnswer:
    (answer,) = answers["now"]
    assert isinstance(answer, LikelihoodAnswer)
    return answer


def _nll(case: Case, answers: Answers) -> float:
    log_probs = _likelihood(answers).log_probs
    return -sum(log_probs) / len(log_probs)


def _scored_tokens(case: Case, answers: Answers) -> float:
    return float(len(_likelihood(answers).log_probs))


def _perplexity_over_all_tokens(case: Case, answers: Answers) -> float:
    log_probs = _likelihood(answers).log_probs
    return exponential(-sum(log_probs) / (len(log_probs) + 1))


SCORINGS = {
    "loc.kl, all positions": Scoring(_all_positions, _mean_divergence, states=("pre",), weight=_positions),
    "loc.kl, last position": Scoring(_last_position, _mean_divergence, states=("pre",)),
    "text.nll": Scoring(_text, _nll, weight=_scored_tokens),
    "text.ppl.memit": Scoring(_text, _perplexity_over_all_tokens),
}

_KL = "KL(unedited || edited) in nats over the whole vocabulary, "
METRICS = (
    Metric(
        id="loc.kl/text",
        prompts="text",
        scoring="loc.kl, all positions",
        definition=f"{_KL}mean over all positions of natural texts, of at most {TEXT_TOKENS} tokens each.",
        source="defined here; EasyEdit easyeditor/evaluate/evaluate_utils.py:636-659 (kl_loc_loss) has this direction",
        unit="prompt",
        better="lower",
        share=False,
    ),
    Metric(
        id="loc.kl/neighborhood",
        prompts="neighbors",
        scoring="loc.kl, last position",
        definition=f"{_KL}at the last token of neighborhood prompts and locality probes.",
        source="defined here; EasyEdit easyeditor/evaluate/evaluate_utils.py:636-659 (kl_loc_loss) has this direction",
        better="lower",
        share=False,
    ),
    Metric(
        id="text.nll",
        prompts="text",
        scoring="text.nll",
        definition="Mean NLL of a token of natural text, in nats; the first token of a text is not scored, texts are "
        f"cut to {TEXT_TOKENS} tokens and count by their tokens.",
        source="defined here; lm-evaluation-harness normalizes its word_perplexity by words",
        unit="prompt",
        better="lower",
        share=False,
    ),
    Derived(
        id="text.ppl",
        of=("text.nll",),
        combine=lambda values: exponential(values[0]),
        definition="exp of text.nll.",
        source="defined here",
        better="lower",
    ),
    Metric(
        id="text.ppl.memit",
        prompts="text",
        scoring="text.ppl.memit",
        definition="exp of the summed NLL of N - 1 tokens divided by N, mean over texts.",
        source="memit util/perplexity.py:24, perplexity",
        unit="prompt",
        better="lower",
        share=False,
    ),
)
