"""What a sequence of batches keeps: the score of each batch right after it was written, and on the final model.

With A[t, s] the score on batch s after batch t of T: the curve is A[T, s] against s, and
kept = sum_s A[T, s] / sum_s A[s, s]. forgetting = mean over s < T of max_{t < T} A[t, s] - A[T, s], where t runs over
the checkpoints that were measured: here t = s alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kedit_fast.evaluation.evaluator import Evaluator
from kedit_fast.evaluation.results import Evaluation

METRIC = "cf.accuracy/rewrite"
"""Of a retention curve."""


@dataclass(frozen=True)
class BatchScore:
    """The score of one batch's requests, not scaled."""

    batch: int
    """From 1, in the order of writing."""
    requests: int
    """How many of its requests were measured."""
    after_batch: float
    """A[s, s]: their mean right after it was written."""
    final: float
    """A[T, s]: on the final model."""


@dataclass(frozen=True)
class Retention:
    """A retention curve."""

    metric: str
    """Id of the metric."""
    curve: tuple[BatchScore, ...]
    """In the order of writing."""
    batches: int
    """How many batches were written: more than the curve has where some have no request that counts."""

    @property
    def retained(self) -> float | None:
        """Sum of the final scores over that of the scores right after each batch; None where the latter is 0."""
        first = sum(one.after_batch for one in self.curve)
        return sum(one.final for one in self.curve) / first if first else None

    @property
    def forgetting(self) -> float | None:
        """Mean over all batches but the last of the score right after it minus the final one; None of no such batch."""
        losses = [one.after_batch - one.final for one in self.curve if one.batch < self.batches]
        return sum(losses) / len(losses) if losses else None

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it; scores are not scaled."""
        return {
            "metric": self.metric,
            "checkpoints": "right after each batch, and at the end",
            "kept": self.retained,
            "forgetting": self.forgetting,
            "curve": [dict(vars(one)) for one in self.curve],
        }


class RetentionTracker:
    """Measures some requests of each batch right after it was written: one row for each, and nothing else.

    Args:
        evaluator: of the run; what is measured here are its requests, by their index in it.
        sample: most requests of a batch that are measured, from its first; None for all.
        options: as the evaluator's: prompt_format, target_separator, spec.
    """

    def __init__(self, evaluator: Evaluator, sample: int | None = None, **options: Any):
        self._sample = sample
        self._evaluator = Evaluator(
            evaluator.model, evaluator.tokenizer, evaluator.requests, METRIC, on_error="skip", **options
        )
        self._batches: list[list[int]] = []

    def measure(self, batch: Sequence[int]) -> None:
        """Measure a batch that has just been written, by the indices of its requests."""
        chosen = list(batch)[: self._sample]
        self._batches.append(chosen)
        if chosen:
            self._evaluator.measure("post", chosen)

    def recorded(self) -> list[Any]:
        """What the model has answered in the last call of `measure`, for `recall`."""
        chosen = self._batches[-1] if self._batches else []
        return self._evaluator.recorded("post", chosen) if chosen else []

    def recall(self, batch: Sequence[int], recorded: Sequence[Any]) -> None:
        """`measure` without the model, by what a tracker like this one has recorded."""
        chosen = list(batch)[: self._sample]
        self._batches.append(chosen)
        if chosen:
            self._evaluator.recall(recorded, "post", chosen)

    @property
    def last(self) -> float | None:
        """The mean score of the batch that was measured last; None of none."""
        scores = self._evaluator.scores(METRIC, "post", self._batches[-1]) if self._batches else {}
        return sum(scores.values()) / len(scores) if scores else None

    def result(self, final: Evaluation) -> Retention:
        """The curve, with the scores of the final model from an evaluation that has METRIC."""
        first = _scores(self._evaluator.result(), "post")
        last = _scores(final, "final")
        curve = []
        for number, batch in enumerate(self._batches, 1):
            there = [index for index in batch if index in first and index in last]
            if there:
                means = [sum(scores[index] for index in there) / len(there) for scores in (first, last)]
                curve.append(BatchScore(number, len(there), *means))
        return Retention(METRIC, tuple(curve), len(self._batches))


def _scores(evaluation: Evaluation, state: str) -> dict[int, float]:
    """Index of a request -> its score."""
    return {
        record.number - 1: score
        for record in evaluation.scores[METRIC]
        for name, score in record.scores.items()
        if name == state
    }
