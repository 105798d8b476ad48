"""Free answers: the model answers a prompt by itself, and the text is compared with the right answer; no judge.

All of `wild.*` look at one answer: greedy, up to 50 new tokens, a line's end, or the end of the first sentence. A full
stop that belongs to the answer ("St. Louis", "U.S.") does not end it, as it does in published code (`.published`).
Texts are compared in SQuAD's form (`words.normalized`); every alias of an answer counts as the answer. On neighborhood
prompts the target before the edit is the right one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from kedit_fast.evaluation.asks import Answer, Ask, Forced, ForcedAnswer, Generated, GeneratedAnswer
from kedit_fast.evaluation.catalog.generation import said
from kedit_fast.evaluation.metric import Case, Derived, FittedScoring, Fitting, Metric, Prompts, Scoring, request_of
from kedit_fast.evaluation.words import contains, f1, normalized, occurrences
from kedit_fast.requests.request import EditRequest

TOKENS = 50
Answers = Mapping[str, tuple[Answer, ...]]
_EASYEDIT = "EasyEdit evaluate/evaluate_utils.py"


def new_answers(request: EditRequest) -> tuple[str, ...]:
    """The new target and its aliases."""
    return tuple(dict.fromkeys((request.target_new, *request.target_aliases)))


def true_answers(request: EditRequest) -> tuple[str, ...]:
    """The target before the edit and its aliases; none where the request has none."""
    true = () if request.target_true is None else (request.target_true,)
    return tuple(dict.fromkeys((*true, *request.true_aliases)))


def _cases(request: EditRequest, prompts: Sequence[str], answers: tuple[str, ...]) -> tuple[Case, ...]:
    new, true = request.target_new, request.target_true
    return tuple(Case(prompt, new, true, (answers,), record=request) for prompt in prompts) if answers else ()


def _rewrite(request: EditRequest) -> tuple[Case, ...]:
    return _cases(request, (request.text,), new_answers(request))


def _paraphrases(request: EditRequest) -> tuple[Case, ...]:
    return _cases(request, request.paraphrase_prompts, new_answers(request))


def _neighborhood(request: EditRequest) -> tuple[Case, ...]:
    return _cases(request, request.neighborhood_prompts, true_answers(request))


def _others(case: Case) -> tuple[str, ...]:
    """What a right answer must not say: the answers of the other side of the edit."""
    request = request_of(case)
    return tuple(text for text in (*new_answers(request), *true_answers(request)) if text not in case.answers[0])


def inner_stops(answer: str) -> int:
    """The number of full stops in an answer, but for those at its end."""
    return answer.strip().rstrip(".").count(".")


def first_sentence(text: str, inner: int = 0) -> str:
    """A text up to its first full stop, or, where the first `inner` ones belong to the answer, up to the one after."""
    return ".".join(text.split(".")[: inner + 1])


def free(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    """The free answer to a case's prompt, which ends as soon as no right answer could need more."""
    stops = ("\n",) if any(map(inner_stops, case.answers[0])) else (".", "\n")
    return (Generated(case.prompt, TOKENS, stops=stops),)


def _free_published(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return (Generated(case.prompt, TOKENS, stops=(".", "\n")),)


def _text(case: Case, answers: Answers) -> str:
    return first_sentence(said(answers["now"][0]), max(map(inner_stops, case.answers[0])))


def exact_match(case: Case, answers: Answers) -> float:
    """Whether the answer is one of the right ones, and nothing else."""
    text = said(answers["now"][0])
    return float(any(normalized(first_sentence(text, inner_stops(a))) == normalized(a) for a in case.answers[0]))


def _exact_match_published(case: Case, answers: Answers) -> float:
    return float(normalized(first_sentence(said(answers["now"][0]))) == normalized(case.answers[0][0]))


def _contains(case: Case, answers: Answers) -> float:
    return float(contains(_text(case, answers), case.answers[0], _others(case)))


def _f1(case: Case, answers: Answers) -> float:
    text = said(answers["now"][0])
    return max(f1(first_sentence(text, inner_stops(answer)), answer) for answer in case.answers[0])


def _repeats(case: Case, answers: Answers) -> float:
    return float(occurrences(_text(case, answers), case.answers[0]) >= 3)


def _both_sides(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    request = request_of(case)
    if request.target_true is None:
        return ()
    targets = (*new_answers(request), *true_answers(request))
    return tuple(Forced(case.prompt, target, request.target_separator) for target in targets)


def _choice(case: Case, answers: Answers) -> float | None:
    request = request_of(case)
    if request.target_true is None:
        return None
    likely = []
    for answer in answers["now"]:
        assert isinstance(answer, ForcedAnswer)
        likely.append(answer.nll)
    count = len(new_answers(request))
    new, true = min(likely[:count]), min(likely[count:])
    return float(new < true if case.answers[0] == new_answers(request) else true < new)


def _vanilla(published: bool = False) -> FittedScoring:
    """Greedy tokens against those of the target as it stands, without a space before it."""

    def fit(run: Fitting) -> Scoring:
        def target(case: Case) -> list[int]:
            return list(run.tokenizer.encode(request_of(case).target_new, add_special_tokens=False))

        def asks(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
            return (Generated(case.prompt, len(target(case))),) if target(case) else ()

        def score(case: Case, answers: Answers) -> float | None:
            wanted = target(case)
            if not wanted:
                return None
            answer = answers["now"][0]
            assert isinstance(answer, GeneratedAnswer)
            got: list[int | None] = list(answer.tokens)
            if published:
                got = [*answer.prompt_tokens, *got, *([None] if answer.ended else [])][-len(wanted) :]
            return sum(a == b for a, b in zip(wanted, got, strict=False)) / len(wanted)

        return Scoring(asks, score)

    return fit


PROMPTS = {
    "wild.rewrite": Prompts("requests", _rewrite),
    "wild.paraphrase": Prompts("requests", _paraphrases),
    "wild.neighborhood": Prompts("requests", _neighborhood),
}
SCORINGS = {
    "wild.em": Scoring(free, exact_match),
    "wild.em.published": Scoring(_free_published, _exact_match_published),
    "wild.contains": Scoring(free, _contains),
    "wild.f1": Scoring(free, _f1),
    "wild.choice": Scoring(_both_sides, _choice),
    "wild.repeats": Scoring(free, _repeats),
    "vanilla": _vanilla(),
    "vanilla.published": _vanilla(published=True),
}
_FREE = "greedy answers, each up to its first full stop, line's end or 50 tokens, in SQuAD's normalized form,"
_PLACES = ("rewrite", "paraphrase", "neighborhood")


def _each(
    definition: str,
    text: str,
    source: str,
    places: Sequence[str] = _PLACES,
    better: Literal["higher", "lower"] = "higher",
) -> tuple[Metric, ...]:
    return tuple(
        Metric(f"{definition}/{place}", f"wild.{place}", definition, text, source, better=better) for place in places
    )


METRICS: tuple[Metric | Derived, ...] = (
    *_each(
        "wild.em",
        f"Share of {_FREE} that are the right answer or an alias; full stops inside of that are its part.",
        f"{_EASYEDIT}: exact_match_score without api_key; WILD: test_prediction_acc_real (50 new tokens, no template)",
    ),
    *_each(
        "wild.em.published",
        f"Share of {_FREE} that are the right answer, no alias; one with a full stop inside (U.S.) cannot be right.",
        f"{_EASYEDIT}: exact_match_score without api_key, there with a chat template and 512 tokens",
        ("rewrite", "paraphrase"),
    ),
    *_each(
        "wild.contains",
        f"Share of {_FREE} with the right answer or an alias in whole words, and none of the edit's other side.",
        "defined here, in place of a judge",
    ),
    *_each(
        "wild.f1",
        f"Of {_FREE} F1 of the words and those of the right answer, or of its best alias.",
        "SQuAD's F1 (arXiv:1606.05250)",
    ),
    *_each(
        "wild.choice",
        "Share of prompts where the right side's best alias has a strictly lower mean NLL of a token than the other's.",
        "defined here, in place of a judge; without aliases it is cf.success",
    ),
    *_each(
        "wild.repeats",
        f"Share of {_FREE} that say the right answer three times or more.",
        f"{_EASYEDIT}: the judge's rule on repeated answers",
        ("rewrite", "paraphrase"),
        "lower",
    ),
    Metric(
        "ee.vanilla",
        "wild.rewrite",
        "vanilla",
        "Share of the target's tokens, as it is tokenized alone without a space, that greedy generation has in place.",
        f"{_EASYEDIT}: test_prediction_acc(vanilla_generation=True); GRACE's rewrite_acc",
    ),
    Metric(
        "ee.vanilla.published",
        "wild.rewrite",
        "vanilla.published",
        "As ee.vanilla, but of the last tokens of prompt and answer: shifted where the answer ends early.",
        f"{_EASYEDIT}: test_prediction_acc(vanilla_generation=True)",
    ),
)
