"""CounterFact's metrics, as memit has them: two answers against each other; and the prompts that requests have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from kedit_fast.evaluation.asks import Answer, Ask, Forced, ForcedAnswer
from kedit_fast.evaluation.metric import Case, Derived, Metric, Prompts, Scoring, request_of
from kedit_fast.requests.probes import Probe, ProbeKind
from kedit_fast.requests.request import EditRequest

Answers = Mapping[str, tuple[Answer, ...]]


def rewrite(request: EditRequest) -> tuple[Case, ...]:
    """The prompt that was edited."""
    return (Case(request.text, request.target_new, request.target_true, record=request),)


def paraphrases(request: EditRequest) -> tuple[Case, ...]:
    """The request's paraphrase prompts."""
    new, true = request.target_new, request.target_true
    return tuple(Case(prompt, new, true, record=request) for prompt in request.paraphrase_prompts)


def neighborhood(request: EditRequest) -> tuple[Case, ...]:
    """The request's neighborhood prompts, to be answered with the old target; none without one."""
    new, true = request.target_new, request.target_true
    if true is None:
        return ()
    return tuple(Case(prompt, new, true, record=request) for prompt in request.neighborhood_prompts)


def probes_of(request: EditRequest, *kinds: ProbeKind) -> tuple[Probe, ...]:
    """The probes of a request that are of one of some kinds."""
    return tuple(probe for probe in request.probes if probe.kind in kinds)


PROMPTS = {
    "rewrite": Prompts("requests", rewrite),
    "paraphrase": Prompts("requests", paraphrases),
    "neighborhood": Prompts("requests", neighborhood),
}


def forced(case: Case, target: str, prompt: str | None = None, special: bool = False) -> Forced:
    """A target after the prompt of a case, or after another one, joined as the case's request says."""
    separator = request_of(case).target_separator
    return Forced(case.prompt if prompt is None else prompt, target, separator, special=special)


def forced_answers(answers: Answers, state: str = "now") -> tuple[ForcedAnswer, ...]:
    """The answers of a state, all of which are of forced targets."""
    for answer in answers[state]:
        assert isinstance(answer, ForcedAnswer)
    return answers[state]  # pyright: ignore[reportReturnType] - checked above


def exponential(value: float) -> float:
    """exp(value); infinity where a float has no room for it."""
    return math.exp(value) if value < 709 else math.inf


def probability(answer: ForcedAnswer) -> float:
    """exp(-NLL): the geometric mean of the probabilities of a target's tokens."""
    return exponential(-answer.nll)


def both_targets(special: bool = False) -> Callable[[Case, object], tuple[Ask, ...]]:
    """Asks for the new target and for the true one; for none where the case lacks one."""

    def asks(case: Case, tokenizer: object) -> tuple[Ask, ...]:
        if case.new is None or case.true is None:
            return ()
        return forced(case, case.new, special=special), forced(case, case.true, special=special)

    return asks


def _of_both(score: Callable[[float, float], float]) -> Callable[[Case, Answers], float | None]:
    """The scoring that takes both targets' NLL, (new, true); None for a case without one of them."""

    def scored(case: Case, answers: Answers) -> float | None:
        both = forced_answers(answers)
        return score(both[0].nll, both[1].nll) if both else None

    return scored


def accuracy(answer: ForcedAnswer) -> float:
    """1 where every token of the target is the most probable one, else 0."""
    return float(all(answer.hits))


def _correct(attribute: str, special: bool = False) -> Scoring:
    """`accuracy` of the new or of the true target."""

    def asks(case: Case, tokenizer: object) -> tuple[Ask, ...]:
        target = getattr(case, attribute)
        return () if target is None else (forced(case, target, special=special),)

    def score(case: Case, answers: Answers) -> float | None:
        given = forced_answers(answers)
        return accuracy(given[0]) if given else None

    return Scoring(asks, score)


def _won(new: float, true: float) -> float:
    return float(true > new)


def _preserved(new: float, true: float) -> float:
    return float(true < new)


def _lead(new: float, true: float) -> float:
    return math.exp(-new) - math.exp(-true)


def _lead_preserved(new: float, true: float) -> float:
    return math.exp(-true) - math.exp(-new)


def _scorings(suffix: str, special: bool) -> dict[str, Scoring]:
    asks = both_targets(special)
    return {
        f"cf.success{suffix}": Scoring(asks, _of_both(_won)),
        f"cf.success{suffix}, preserved": Scoring(asks, _of_both(_preserved)),
        f"cf.magnitude{suffix}": Scoring(asks, _of_both(_lead)),
        f"cf.magnitude{suffix}, preserved": Scoring(asks, _of_both(_lead_preserved)),
        f"cf.accuracy{suffix}": _correct("new", special),
        f"cf.accuracy{suffix}, preserved": _correct("true", special),
    }


PUBLISHED = ".published"
SCORINGS = {**_scorings("", False), **_scorings(PUBLISHED, True)}

_PARTS = (
    (
        "cf.success",
        "success",
        ("experiments/summarize.py:54-61", "experiments/summarize.py:72-83"),
        "Share of prompts at which the new target has the lower NLL (mean over its tokens); a tie fails.",
        "Share of prompts at which the true target has a lower NLL than this edit's new one; a tie fails.",
    ),
    (
        "cf.magnitude",
        "diff",
        ("experiments/summarize.py:62-69", "experiments/summarize.py:84-91"),
        "exp(-NLL) of the new target minus that of the true one.",
        "exp(-NLL) of the true target minus that of this edit's new one.",
    ),
    (
        "cf.accuracy",
        "acc",
        ("experiments/py/eval_utils_counterfact.py:167-178",) * 2,
        "Share of prompts at which every token of the new target is the most probable one.",
        "Share of prompts at which every token of the true target is the most probable one.",
    ),
)
"""Name, published name, its lines, and what is counted: at prompts of the edit, and of the neighborhood."""


def _metrics(suffix: str = "") -> tuple[Metric | Derived, ...]:
    metrics: list[Metric | Derived] = []
    for name, published, lines, definition, beside in _PARTS:
        if suffix:
            definition = beside = f"As {name}; the BOS that tok(target) begins with counts as the target's first token."
        names = f"rewrite_{published} and paraphrase_{published}", f"neighborhood_{published}"
        for prompts in PROMPTS:
            preserved = prompts == "neighborhood"
            metrics.append(
                Metric(
                    id=f"{name}{suffix}/{prompts}",
                    prompts=prompts,
                    scoring=f"{name}{suffix}" + (", preserved" if preserved else ""),
                    definition=beside if preserved else definition,
                    source=f"memit {lines[preserved]}, {names[preserved]}",
                    scale=100.0,
                    share=name != "cf.magnitude",
                )
            )
    metrics.append(
        Derived(
            id=f"cf.score{suffix}",
            of=tuple(f"cf.success{suffix}/{prompts}" for prompts in PROMPTS),
            combine=harmonic_mean,
            definition=f"Harmonic mean of the three shares of cf.success{suffix}; 0 where one is 0.",
            source="memit experiments/summarize.py:125-150, score",
        )
    )
    return tuple(metrics)


def harmonic_mean(values: tuple[float, ...]) -> float:
    """n / sum(1 / value); 0 where one value is 0."""
    return len(values) / sum(1 / value for value in values) if all(value > 0 for value in values) else 0.0


METRICS = (*_metrics(), *_metrics(PUBLISHED))
