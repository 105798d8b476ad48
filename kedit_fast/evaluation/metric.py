"""A metric is a record: which prompts, how each is scored, how scores are averaged, in which states of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kedit_fast.evaluation.asks import Answer, Ask
from kedit_fast.evaluation.judge import Judge
from kedit_fast.requests.probes import Probe
from kedit_fast.requests.request import EditRequest

State = Literal["pre", "context", "first", "post", "final"]
"""The unedited model; the unedited model with the new fact of each request in front of its prompts; right after the
batch that wrote the first request of a group; right after the batch that wrote a request, or the last one of a group;
after all batches. Of a request by itself, "first" is "post"."""
Within = Literal["mean", "mean of names", "any", "all"]
"""How the scores of one record's cases become its score; "mean of names": the mean of each name's cases first; "any":
the largest; "all": the smallest."""
Better = Literal["higher", "lower", ""]
"""Which values are good; "" where it depends."""
Need = Literal["", "judge", "memory"]
"""What a metric needs beside records and a model: a judge, or a memory that is attached; "" for nothing."""
Unit = Literal["request", "group", "prompt"]
"""What is averaged over: requests, groups of requests (a case of MQuAKE), or single prompts."""


@dataclass(frozen=True)
class Case:
    """One thing to score."""

    prompt: str
    new: str | None = None
    """The answer that the edit should bring."""
    true: str | None = None
    """The answer before the edit, or, for prompts beside the edit, the one to preserve."""
    answers: tuple[tuple[str, ...], ...] = ()
    """Of questions with several right answers: each group must be met, by any of its alternatives."""
    name: str = ""
    """What kind of probe it is, as the data set calls it."""
    record: Any = None
    """The EditRequest, Choice or text that it belongs to."""
    probe: Probe | None = None
    """The probe that it is from, for scores that need its conditions."""


@dataclass(frozen=True)
class Prompts:
    """Where a metric's cases come from."""

    over: Literal["requests", "groups", "texts", "choices"]
    """The records: requests, tuples of the requests that share a group, in order (one without a group is no record
    here), texts, or multiple-choice items."""
    cases: Callable[[Any], Any]
    """From one record its cases; none where the record has nothing of the kind: it is absent, not zero. Where `beside`,
    from the sequence of all records the cases of each."""
    beside: bool = False
    """Whether cases are made of a record and of others beside it (other answers of the same relation)."""


@dataclass(frozen=True)
class Scoring:
    """How a case is scored."""

    asks: Callable[[Case, Any], tuple[Ask, ...]]
    """What the model is asked, from the case and the tokenizer."""
    score: Callable[[Case, Mapping[str, tuple[Answer, ...]]], float | None]
    """From the case and the answers by state: "now", and those of `states`. None: this case does not count."""
    states: tuple[State, ...] = ()
    """The states that a score compares "now" with; "context" is not among them."""
    weight: Callable[[Case, Mapping[str, tuple[Answer, ...]]], float] | None = None
    """How much a case counts beside others in every mean (a text by its tokens); None: all alike."""
    together: Callable[[Sequence[tuple[Case, Mapping[str, tuple[Answer, ...]]]]], None] | None = None
    """Called with all cases and answers that will be scored, before the first one is: for what is cheaper together."""


@dataclass(frozen=True)
class Fitting:
    """What the scorings of a run are fitted to."""

    tokenizer: Any
    """The tokenizer of the model that is measured."""
    texts: Sequence[str] = ()
    """Natural texts."""
    judge: Judge | None = None
    """A classifier of answers."""


FittedScoring = Callable[[Fitting], Scoring]
"""Makes the scoring of a run, where it cannot be had without the run's tokenizer, texts or judge."""


@dataclass(frozen=True)
class Metric:
    """One number, by one definition."""

    id: str
    """Definition and prompts, as "cf.success/paraphrase"."""
    prompts: str
    """A name of PROMPTS."""
    scoring: str
    """A name of SCORINGS."""
    definition: str
    """One sentence that says what is counted."""
    source: str
    """Where the definition is from, and what it is called there."""
    within: Within = "mean"
    unit: Unit = "request"
    scale: float = 1.0
    """Factor of the reported value: 100 for percent."""
    better: Better = "higher"
    share: bool = True
    """Whether scores lie between 0 and 1, so that the mean of zeros and ones has Wilson's interval."""
    needs: Need = ""
    """Without it the metric has no value, and asks nothing."""


@dataclass(frozen=True)
class Derived:
    """A number made of other metrics' values."""

    id: str
    of: tuple[str, ...]
    """Ids of the metrics."""
    combine: Callable[[tuple[float, ...]], float]
    """From their values in one state, as they are reported; not called where one is absent."""
    definition: str
    source: str
    scale: float = 1.0
    better: Better = "higher"


@dataclass(frozen=True)
class Measured:
    """A metric's value in one state of a model."""

    value: float | None
    """None where no record has what the metric needs."""
    records: int
    """Number of records (requests, groups, texts or items) that count."""
    prompts: int
    """Number of cases that count."""
    interval: tuple[float, float] | None
    """95 %: Wilson's for shares, by bootstrap over records for means; None of derived numbers, of no records, and where
    the bootstrap would have one record alone."""


def request_of(case: Case) -> EditRequest:
    """The request that a case belongs to."""
    assert isinstance(case.record, EditRequest)
    return case.record
