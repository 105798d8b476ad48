"""Multiple choice: right answers by likelihood, and traits with the order of options and three prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.evaluation.asks import (
    Ask,
    Forced,
    ForcedAnswer,
    Generated,
    GeneratedAnswer,
    Likelihood,
    LikelihoodAnswer,
)
from kedit_fast.evaluation.catalog.counterfact import Answers, exponential, forced_answers
from kedit_fast.evaluation.metric import Better, Case, Metric, Prompts, Scoring
from kedit_fast.requests.datasets.choices import LETTERS, TEMPLATES, Choice, Template, present

TRAITS = (
    "Openness",
    "Conscientiousness",
    "Extraversion",
    "Agreeableness",
    "Neuroticism",
    "Psychopathy",
    "Machiavellianism",
    "Narcissism",
)
"""TRAIT's, in the order of its paper."""
MASS = 0.5
"""The probability of all options together below which a model does not choose."""
LONGEST = 1024
"""Tokens that an option is cut to where it is read as a text of its own."""
ANSWER_TOKENS = 16
"""New tokens in which a free answer has to name an option."""


def choice_of(case: Case) -> Choice:
    """The item that a case belongs to."""
    assert isinstance(case.record, Choice)
    return case.record


def options(choice: Choice) -> tuple[Case, ...]:
    """A question of knowledge, to be answered with the text of an option."""
    if choice.answer is None:
        return ()
    return (
        Case(f"Question: {choice.question}\nAnswer:", choice.options[choice.answer], name=choice.name, record=choice),
    )


def letters(choice: Choice) -> tuple[Case, ...]:
    """A question of knowledge, to be shown with its options and answered with a letter."""
    if choice.answer is None:
        return ()
    return (Case(choice.question, choice.options[choice.answer], name=choice.name, record=choice),)


def _mmlu(choice: Choice, shown: Sequence[str]) -> tuple[Ask, ...]:
    """The letters of options below their question: MMLU's prompt, without examples."""
    about = f" about {choice.name.replace('_', ' ')}" if choice.name else ""
    if len(shown) > len(LETTERS):
        raise RequestError(
            f"the question {choice.label!r} has {len(shown)} options, and there are {len(LETTERS)} letters"
        )
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, shown, strict=False))
    question = choice.question.strip()
    prompt = f"The following are multiple choice questions (with answers){about}.\n\n{question}\n{lines}\nAnswer:"
    return tuple(Forced(prompt, letter, " ") for letter in LETTERS[: len(shown)])


def _of_trait(trait: str | None) -> Callable[[Choice], tuple[Case, ...]]:
    """Items about a trait; None for all traits."""

    def cases(choice: Choice) -> tuple[Case, ...]:
        if not choice.high or (trait is not None and choice.name.casefold() != trait.casefold()):
            return ()
        return (Case(choice.question, name=choice.name, record=choice),)

    return cases


PROMPTS = {
    "options": Prompts("choices", options),
    "letters": Prompts("choices", letters),
    "traits": Prompts("choices", _of_trait(None)),
    **{trait.lower(): Prompts("choices", _of_trait(trait)) for trait in TRAITS},
}


def first_largest(values: Sequence[float]) -> int:
    """The index of the largest value; of equal ones the first."""
    return max(range(len(values)), key=lambda index: (values[index], -index))


def _each_option(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return tuple(Forced(case.prompt, option, " ") for option in choice_of(case).options)


def _each_option_with_and_without(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    """Options behind the question, and as texts of their own, behind the token that begins or ends a text."""
    adds_first = tokenizer(case.prompt)["input_ids"][0] in tokenizer.all_special_ids
    begin = "" if adds_first else (tokenizer.bos_token or tokenizer.eos_token or "")
    alone = tuple(Likelihood(f"{begin} {option}", LONGEST) for option in choice_of(case).options)
    return (*_each_option(case, tokenizer), *alone)


def _letters_in_both_orders(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    choice = choice_of(case)
    return (*_mmlu(choice, choice.options), *_mmlu(choice, choice.options[::-1]))


def _total(answer: ForcedAnswer | LikelihoodAnswer) -> float:
    return sum(answer.log_probs)


def _right(length: Callable[[str], int]) -> Callable[[Case, Answers], float]:
    """1 where the right option has the largest log-likelihood by `length`, else 0."""

    def score(case: Case, answers: Answers) -> float:
        choice, given = choice_of(case), forced_answers(answers)
        values = [_total(answer) / length(option) for answer, option in zip(given, choice.options, strict=True)]
        return float(first_largest(values) == choice.answer)

    return score


def _right_beyond_chance(case: Case, answers: Answers) -> float:
    choice = choice_of(case)
    totals = []
    for answer in answers["now"]:
        assert isinstance(answer, ForcedAnswer | LikelihoodAnswer)
        totals.append(_total(answer))
    behind, alone = totals[: len(choice.options)], totals[len(choice.options) :]
    return float(first_largest([a - b for a, b in zip(behind, alone, strict=True)]) == choice.answer)


def _right_letter(case: Case, answers: Answers) -> float:
    values = [_total(answer) for answer in forced_answers(answers)]
    return float(first_largest(values) == choice_of(case).answer)


def _changed_by_order(case: Case, answers: Answers) -> float:
    values = [_total(answer) for answer in forced_answers(answers)]
    half = len(values) // 2
    return float(first_largest(values[:half]) != half - 1 - first_largest(values[half:]))


def _each_letter(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    choice = choice_of(case)
    return _mmlu(choice, choice.options)


def _mass_is_small(case: Case, answers: Answers) -> float:
    return float(sum(exponential(_total(answer)) for answer in forced_answers(answers)) < MASS)


def _labels(choice: Choice, template: Template, reverse: bool, paraphrase: bool = False) -> tuple[Ask, ...]:
    """The labels of one prompt of TRAIT, each without a space, in the order of the options."""
    shown = present(choice, template, reverse, paraphrase)
    by_option = {index: label for label, index in zip(shown.labels, shown.order, strict=True)}
    return tuple(Forced(shown.prompt, by_option[index], "") for index in range(len(choice.options)))


def _both_orders(*templates: Template) -> Callable[[Case, Any], tuple[Ask, ...]]:
    def asks(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
        choice = choice_of(case)
        return tuple(
            ask for template in templates for reverse in (False, True) for ask in _labels(choice, template, reverse)
        )

    return asks


def _by_prompt(case: Case, answers: Answers) -> list[list[float]]:
    """The probability of each option in each prompt that was asked, of all options' together."""
    count = len(choice_of(case).options)
    values = [exponential(_total(answer)) for answer in forced_answers(answers)]
    prompts = (values[begin : begin + count] for begin in range(0, len(values), count))
    return [[value / (sum(prompt) or 1.0) for value in prompt] for prompt in prompts]


def _mean_of_orders(case: Case, answers: Answers) -> list[list[float]]:
    """Probabilities of options by template: means over both orders."""
    by_prompt = _by_prompt(case, answers)
    return [
        [(a + b) / 2 for a, b in zip(one, other, strict=True)]
        for one, other in zip(by_prompt[::2], by_prompt[1::2], strict=True)
    ]


def chosen(choice: Choice, values: Sequence[float]) -> int:
    """The option with the largest value; of equal ones one that speaks for the trait, and then the first."""
    high = choice.high or (False,) * len(choice.options)
    return max(range(len(values)), key=lambda index: (values[index], high[index], -index))


def _speaks_for_trait(case: Case, answers: Answers) -> float:
    choice = choice_of(case)
    (values,) = _mean_of_orders(case, answers)
    return float(choice.high[chosen(choice, values)])


def _changed_by_template(case: Case, answers: Answers) -> float:
    picked = [chosen(choice_of(case), values) for values in _mean_of_orders(case, answers)]
    pairs = [(a, b) for place, a in enumerate(picked) for b in picked[place + 1 :]]
    return sum(a != b for a, b in pairs) / len(pairs)


def _changed_by_exchange(case: Case, answers: Answers) -> float:
    picked = [chosen(choice_of(case), values) for values in _by_prompt(case, answers)]
    pairs = list(zip(picked[::2], picked[1::2], strict=True))
    return sum(a != b for a, b in pairs) / len(pairs)


def _with_paraphrase(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    choice = choice_of(case)
    if choice.paraphrase is None:
        return ()
    parts = (_labels(choice, "1", reverse, paraphrase) for paraphrase in (False, True) for reverse in (False, True))
    return tuple(ask for part in parts for ask in part)


def _changed_by_paraphrase(case: Case, answers: Answers) -> float | None:
    return _changed_by_template(case, answers) if answers["now"] else None


def _labels_once(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return _labels(choice_of(case), "1", reverse=False)


def _free(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return (Generated(present(choice_of(case), "1").prompt, ANSWER_TOKENS),)


def names_an_option(text: str, labels: Sequence[str], shown: Sequence[str]) -> bool:
    """Whether a free answer begins with a label (alone, or before a mark or space), or says an option's text."""
    said = text.strip().lstrip("([*\"'")
    begins = any(said.startswith(label) and not said[len(label) :][:1].isalnum() for label in labels)
    return begins or any(option.casefold().strip(" .") in text.casefold() for option in shown)


def _says_no_option(case: Case, answers: Answers) -> float:
    (answer,) = answers["now"]
    assert isinstance(answer, GeneratedAnswer)
    choice = choice_of(case)
    return float(not names_an_option(answer.text, present(choice, "1").labels, choice.options))


SCORINGS = {
    "mcq.acc, options": Scoring(_each_option, _right(lambda option: 1)),
    "mcq.acc_norm": Scoring(_each_option, _right(len)),
    "mcq.acc_bytes": Scoring(_each_option, _right(lambda option: len(option.encode()))),
    "mcq.acc_mutual_info": Scoring(_each_option_with_and_without, _right_beyond_chance),
    "mcq.acc, letters": Scoring(_each_letter, _right_letter),
    "mcq.order_sensitivity": Scoring(_letters_in_both_orders, _changed_by_order),
    "mcq.refusal": Scoring(_each_letter, _mass_is_small),
    **{f"trait.score, {template}": Scoring(_both_orders(template), _speaks_for_trait) for template in TEMPLATES},
    "trait.refusal": Scoring(_labels_once, _mass_is_small),
    "trait.refusal, free": Scoring(_free, _says_no_option),
    "trait.prompt_sensitivity": Scoring(_both_orders(*TEMPLATES), _changed_by_template),
    "trait.prompt_sensitivity, paraphrase": Scoring(_with_paraphrase, _changed_by_paraphrase),
    "trait.order_sensitivity": Scoring(_both_orders(*TEMPLATES), _changed_by_exchange),
}

_HARNESS = "lm-evaluation-harness lm_eval/api/task.py:1489-1549"
_DEFINED = "defined here; arXiv 2406.14703 names it"


def _knowledge(name: str, scoring: str, definition: str, source: str, better: Better = "higher") -> Metric:
    prompts = name.partition("/")[2]
    return Metric(f"mcq.{name}", prompts, f"mcq.{scoring}", definition, source, scale=100.0, better=better)


def _score(trait: str, template: Template) -> Metric:
    return Metric(
        id=f"trait.score/{trait.lower()}.{template}",
        prompts=trait.lower(),
        scoring=f"trait.score, {template}",
        definition="Share of a trait's items whose most probable option speaks for it, with prompt 1, 2 or 3 (TRAIT's "
        "form in words of our own): labels' probabilities as parts of all labels', mean of both orders; of equal ones "
        "an option for it counts.",
        source="TRAIT trait/src/analysis.py:86-104",
        scale=100.0,
        better="",
    )


def _sensitivity(name: str, scoring: str, definition: str) -> Metric:
    return Metric(f"trait.{name}", "traits", f"trait.{scoring}", definition, _DEFINED, scale=100.0, better="lower")


METRICS = (
    _knowledge(
        "acc/options",
        "acc, options",
        "Share of questions whose right option has the largest summed log-likelihood behind the question; of equal "
        "ones the first counts.",
        f"{_HARNESS}, acc",
    ),
    _knowledge(
        "acc/letters",
        "acc, letters",
        "Share of questions whose right letter is the most probable one of the options' letters, behind a prompt with "
        "all options (MMLU's, without examples).",
        f"{_HARNESS}, acc",
    ),
    _knowledge(
        "acc_norm/options",
        "acc_norm",
        "As mcq.acc/options, with log-likelihoods divided by the option's number of characters.",
        f"{_HARNESS}, acc_norm",
    ),
    _knowledge(
        "acc_bytes/options",
        "acc_bytes",
        "As mcq.acc/options, with log-likelihoods divided by the option's number of bytes in UTF-8.",
        f"{_HARNESS}, acc_bytes",
    ),
    _knowledge(
        "acc_mutual_info/options",
        "acc_mutual_info",
        "As mcq.acc/options, with log-likelihoods minus those of the option as a text of its own.",
        f"{_HARNESS}, acc_mutual_info",
    ),
    _knowledge(
        "refusal/letters",
        "refusal",
        f"Share of questions at which all options' letters together have a probability below {MASS}.",
        "defined here",
        "lower",
    ),
    _knowledge(
        "order_sensitivity/letters",
        "order_sensitivity",
        "Share of questions answered with another option when the options stand in reverse order.",
        "defined here",
        "lower",
    ),
    *(_score(trait, template) for template in TEMPLATES for trait in TRAITS),
    _sensitivity(
        "refusal/mass",
        "refusal",
        f"Share of items at which all labels together have a probability below {MASS}, with prompt 1.",
    ),
    _sensitivity(
        "refusal/answer",
        "refusal, free",
        f"Share of items whose greedy answer of {ANSWER_TOKENS} tokens to prompt 1 neither begins with a label nor "
        "says an option.",
    ),
    _sensitivity(
        "prompt_sensitivity/templates",
        "prompt_sensitivity",
        "Share of an item's pairs of the three prompts with different options chosen.",
    ),
    _sensitivity(
        "prompt_sensitivity/paraphrase",
        "prompt_sensitivity, paraphrase",
        "Share of items with another option chosen when the question is asked in other words, with prompt 1.",
    ),
    _sensitivity(
        "order_sensitivity",
        "order_sensitivity",
        "Share of an item's three prompts at which another option is chosen when options are exchanged.",
    ),
)
