"""How well a run of a model gives the answer of a prompt pair: what circuits are scored by."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.support.dtypes import accumulation_dtype

Metric = Literal["logit-difference", "probability-difference", "kl"]


def check_metric(metric: str) -> None:
    """Raise InvalidArgumentError, which names those that there are, for an unknown metric."""
    if metric not in get_args(Metric):
        raise InvalidArgumentError(f"metric must be one of {', '.join(get_args(Metric))}; got {metric!r}")


def metric_values(
    metric: Metric,
    logits: torch.Tensor,
    answers: torch.Tensor,
    wrongs: torch.Tensor,
    clean_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The metric of each row; differentiable in `logits`.

    - "logit-difference": logit of the answer minus logit of the wrong one.
    - "probability-difference": the same of probabilities.
    - "kl": KL(clean || run), summed over the vocabulary. It is 0 at the clean run, and smaller is better.

    Args:
        metric: which one.
        logits: [n, V] at the last tokens of n prompts, of any float dtype.
        answers: [n] token ids.
        wrongs: [n] token ids; not used by "kl".
        clean_logits: [n, V] of the clean prompts, for "kl".

    Returns:
        [n] float32, float64 of float64.
    """
    logits = logits.to(accumulation_dtype(logits))
    if metric == "kl":
        if clean_logits is None:
            raise InvalidArgumentError('the metric "kl" needs the logits of the clean run')
        log_p = torch.log_softmax(clean_logits.to(logits.dtype), -1)
        difference = log_p - torch.log_softmax(logits, -1)
        return (log_p.exp() * torch.where(log_p.isinf(), 0.0, difference)).sum(-1)  # tokens that are never said
    values = logits if metric == "logit-difference" else torch.softmax(logits, -1)
    pair = torch.stack([answers, wrongs], 1).to(values.device)
    answer, wrong = values.gather(1, pair).unbind(1)
    return answer - wrong


def losses(
    metric: Metric,
    logits: torch.Tensor,
    answers: torch.Tensor,
    wrongs: torch.Tensor,
    clean_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """What rises as a run gets worse: minus the difference, or the KL; see `metric_values`."""
    values = metric_values(metric, logits, answers, wrongs, clean_logits)
    return values if metric == "kl" else -values
