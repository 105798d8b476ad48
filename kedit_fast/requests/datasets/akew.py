"""AKEW (EMNLP 2024): CounterFact, MQuAKE-CF and WikiUpdate, each fact also as a passage and as triplets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kedit_fast.requests.datasets.dataset import DataSet
from kedit_fast.requests.datasets.mquake import read_case
from kedit_fast.requests.datasets.parts import Part, distinct, make_request, optional_texts, with_subject
from kedit_fast.requests.probes import Probe, Question
from kedit_fast.requests.records import Options
from kedit_fast.requests.request import EditRequest

_TRIPLETS = "unsfact_triplets_GPT"


def read_akew(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    """The requests of a record in one of three readings.

    structured: the facts themselves; MQuAKE-CF's as `kedit_fast.requests.datasets.mquake` reads them.
    unstructured: the question of each fact, with the passage as its target; the triplets are a probe of it. The subject
    is the fact's where the question has it once, else there is none.
    triplets: one request for each triplet of the passage; the record is their group.
    """
    part = Part(record, where)
    rewrites = part["requested_rewrite"]
    several = isinstance(rewrites.value, list | tuple)
    case = read_case(record, where, options) if several else []
    if options.reading == "structured" and several:
        return _with_probes(case, _locality(part))
    number = part["case_id"].value
    requests: list[EditRequest] = []
    for place, rewrite in enumerate(rewrites.items() if several else [rewrites], 1):
        group = number if several or options.reading == "triplets" else None
        name = f"{number}-{place}" if several else number
        if options.reading == "triplets":
            requests += _triplets(rewrite, where, options, name, group)
        elif options.reading == "unstructured":
            requests.append(_passage(part, rewrite, where, options, name, group))
        else:
            requests.append(_fact(part, rewrite, where, options, name))
    if not requests:
        raise rewrites.error("holds nothing to edit")
    of_case = case[0].probes if case else ()  # they ask for the facts however these were written
    return _with_probes(requests, (*of_case, *_locality(part)))


def _with_probes(requests: list[EditRequest], probes: tuple[Probe, ...]) -> list[EditRequest]:
    """The requests, the first of them with further probes."""
    first, *others = requests
    return [replace(first, probes=(*first.probes, *probes)), *others]


def _target(rewrite: Part, name: str) -> tuple[str, tuple[str, ...]]:
    """The new or true answer and its aliases: `target_new` and `target_true`, or WikiUpdate's `answer_new` ..."""
    target = rewrite.get(f"target_{name}")
    if target is not None:
        return (target["str"] if isinstance(target.value, Mapping) else target).text(), ()
    answer = rewrite[f"answer_{name}"].text()
    given = optional_texts(rewrite, f"answer_{name}_alias") + optional_texts(rewrite, f"answer_{name}_aliases")
    return answer, tuple(alias for alias in distinct(*given) if alias != answer)


def _subject_and_relation(rewrite: Part) -> dict[str, Any]:
    relation = rewrite.get("relation_id")
    return {"subject": rewrite["subject"].text(), "relation": None if relation is None else relation.text()}


def _fact(record: Part, rewrite: Part, where: str, options: Options, name: Any) -> EditRequest:
    (new, new_aliases), (true, true_aliases) = _target(rewrite, "new"), _target(rewrite, "true")
    question = rewrite.get("question")
    paraphrases = optional_texts(record, "paraphrase_prompts") or (() if question is None else (question.text(),))
    return make_request(
        where,
        options,
        prompt=rewrite["prompt"].text(),
        target_new=new,
        target_true=true,
        target_aliases=new_aliases,
        true_aliases=true_aliases,
        paraphrase_prompts=paraphrases,
        neighborhood_prompts=optional_texts(record, "neighborhood_prompts"),
        generation_prompts=optional_texts(record, "generation_prompts"),
        id=name,
        **_subject_and_relation(rewrite),
    )


def _locality(record: Part) -> tuple[Probe, ...]:
    """Questions beside the fact and their answers, which EasyEdit's copies of the files have; none where they lack."""
    asked = record.get("loc")
    if asked is None:
        return ()
    answers = record["loc_ans"]
    if not isinstance(asked.value, list | tuple):
        return (Probe("locality", (Question(asked.text(), (_alternatives(answers),)),), name="loc"),)
    pairs = list(zip(asked.items(), answers.items(), strict=False))
    if len(pairs) < max(len(asked.value), len(answers.value)):
        raise answers.error(f"has {len(answers.value)} answers to {len(asked.value)} questions of loc")
    questions = tuple(Question(prompt.text(), (_alternatives(answer),)) for prompt, answer in pairs)
    return (Probe("locality", questions, name="loc"),) if questions else ()


def _alternatives(part: Part) -> tuple[str, ...]:
    """The right answers of a question, one or several; raises RequestError where there is none."""
    answers = part.texts() if isinstance(part.value, list | tuple) else (part.text(),)
    if not answers:
        raise part.error("is empty: a question beside the fact needs an answer")
    return distinct(*answers)


def _passage(record: Part, rewrite: Part, where: str, options: Options, name: Any, group: Any) -> EditRequest:
    subject = rewrite["subject"].text()
    question = rewrite["question"].text()
    statement = rewrite.get("prompt_full")
    paraphrases = optional_texts(record, "paraphrase_prompts") or (
        with_subject(rewrite["prompt"], subject) if statement is None else statement.text(),
    )
    asked = question.count(subject) == 1 and "{}" not in question
    facts = tuple(
        Question(with_subject(fact["prompt"], fact["subject"].text()), ((fact["target"].text(),),))
        for fact in rewrite[_TRIPLETS].items()
    )
    return make_request(
        where,
        options,
        prompt=question.replace(subject, "{}") if asked else question,
        subject=subject if asked else None,
        target_new=rewrite["fact_new_uns"].text(),
        paraphrase_prompts=paraphrases,
        probes=(Probe("portability", facts, name="triplets"),) if facts else (),
        id=name,
        group=group,
    )


def _triplets(rewrite: Part, where: str, options: Options, name: Any, group: Any) -> list[EditRequest]:
    question = Question(rewrite["question"].text(), (distinct(*_flat(_target(rewrite, "new"))),))
    probes = (Probe("portability", (question,), name="question"),)
    return [
        make_request(
            where,
            options,
            prompt=fact["prompt"].text(),
            subject=fact["subject"].text(),
            target_new=fact["target"].text(),
            id=f"{name}-{place}",
            group=group,
            probes=probes if place == 1 else (),
        )
        for place, fact in enumerate(rewrite[_TRIPLETS].items(), 1)
    ]


def _flat(target: tuple[str, tuple[str, ...]]) -> tuple[str, ...]:
    return (target[0], *target[1])


DATA_SETS = (
    DataSet(
        name="akew",
        title="AKEW (EMNLP 2024): facts, passages about them, and triplets of the passages",
        fields=frozenset({"requested_rewrite.fact_new_uns"}),
        read=read_akew,
        optional=frozenset(
            {
                "case_id", "paraphrase_prompts", "neighborhood_prompts", "generation_prompts", "questions",
                "new_answer", "new_answer_alias", "single_hops", "new_single_hops", "loc", "loc_ans",
            }
        ),
        unused=frozenset({"answer", "answer_alias", "orig", "pararel_idx", "attribute_prompts"}),
        choices={
            "structured": "the facts",
            "unstructured": "each fact's question, with the passage as target",
            "triplets": "the facts of the passage, one request each",
        },
    ),
)  # fmt: skip
