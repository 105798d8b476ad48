"""MQuAKE: multi-hop questions over edited facts (arXiv:2305.14795). A case is a group of edits, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kedit_fast.requests.datasets.dataset import DataSet, Fault
from kedit_fast.requests.datasets.parts import Part, distinct, make_request, optional_texts, with_subject
from kedit_fast.requests.probes import Probe, Question
from kedit_fast.requests.records import Options
from kedit_fast.requests.request import EditRequest

_HOPS = ("single_hops", "new_single_hops")


def read_case(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    """One request for each rewrite of a case, in its order; the case's number is their group.

    The question of a rewrite is a paraphrase of its prompt. Aliases are those of the single hop with the same prompt or
    question. The case's first request has the probes of the case: its multi-hop questions (of which one is enough, as
    in the paper; `before`: all hops of the old chain, which the paper counts apart), and the hops of the new chain that
    no request writes. Prompts of several rewrites are never joined into one.
    """
    case = Part(record, where)
    number = case["case_id"].value
    old_hops, new_hops = (_hops(case.get(name)) for name in _HOPS)
    rewrites = case["requested_rewrite"].items()
    if not rewrites:
        raise case["requested_rewrite"].error("is empty: the case has no edit")
    requests, written = [], set()
    for place, rewrite in enumerate(rewrites, 1):
        subject = rewrite["subject"].text()
        cloze = with_subject(rewrite["prompt"], subject)
        question = optional_texts(rewrite, "question")
        new, true = (rewrite[name]["str"].text() for name in ("target_new", "target_true"))
        written |= {cloze, *question}
        relation = rewrite.get("relation_id")
        requests.append(
            {
                "prompt": rewrite["prompt"].text(),
                "subject": subject,
                "target_new": new,
                "target_true": true,
                "target_aliases": _aliases(new_hops, {cloze, *question}, new),
                "true_aliases": _aliases(old_hops, {cloze, *question}, true),
                "paraphrase_prompts": question,
                "relation": None if relation is None else relation.text(),
                "id": f"{number}-{place}",
                "group": number,
            }
        )
    requests[0]["probes"] = _probes(case, old_hops, new_hops, written)
    return [make_request(where, options, **fields) for fields in requests]


def _probes(
    case: Part, old_hops: Sequence[tuple[str, Question]], new_hops: Sequence[tuple[str, Question]], written: set[str]
) -> tuple[Probe, ...]:
    asked = case.get("questions")
    texts = () if asked is None else asked.texts()
    answers = (distinct(case["new_answer"].text(), *optional_texts(case, "new_answer_alias")),) if texts else ()
    questions = tuple(Question(text, answers) for text in texts)
    before = tuple(hop for _, hop in old_hops)
    probes = [Probe("multi_hop", questions, name="questions", condition="any", before=before)] if questions else []
    beside = tuple(hop for question, hop in new_hops if not {question, hop.prompt} & written)
    return (*probes, Probe("locality", beside, name="new_single_hops")) if beside else tuple(probes)


def _hops(part: Part | None) -> list[tuple[str, Question]]:
    """Of each single hop its question, and its statement to complete with all right answers; none where they lack."""
    return (
        []
        if part is None
        else [
            (
                hop["question"].text(),
                Question(hop["cloze"].text(), (distinct(hop["answer"].text(), *optional_texts(hop, "answer_alias")),)),
            )
            for hop in part.items()
        ]
    )


def _aliases(hops: Sequence[tuple[str, Question]], asked: set[str], target: str) -> tuple[str, ...]:
    """Other names of a target, from the hop that asks for it with one of these prompts."""
    for question, hop in hops:
        if {question, hop.prompt} & asked and target in hop.answers[0]:
            return tuple(name for name in hop.answers[0] if name != target)
    return ()


def _conflicting(cases: Sequence[Sequence[EditRequest]]) -> set[int]:
    """Indices of cases that write another target to a subject and prompt than an earlier case does, and of those."""
    first: dict[tuple[str | None, str], dict[str, int]] = {}
    places: set[int] = set()
    for place, requests in enumerate(cases):
        for request in requests:
            targets = first.setdefault((request.subject, request.prompt), {})
            targets.setdefault(request.target_new, place)
            if len(targets) > 1:
                places |= {place, *targets.values()}
    return places


DATA_SETS = (
    DataSet(
        name="mquake",
        title="MQuAKE-CF, -CF-3k, -CF-3k-v2 and -T (arXiv:2305.14795): multi-hop questions over edited facts",
        fields=frozenset({"requested_rewrite", "questions"}),
        read=read_case,
        optional=frozenset({"case_id", "new_answer", "new_answer_alias", *_HOPS}),
        unused=frozenset({"answer", "answer_alias", "answer_extended", "orig"}),
        faults=(
            Fault("a new answer without aliases", lambda record, _: not record.get("new_answer_alias")),
            Fault("no single hops, old or new", lambda record, _: not all(record.get(name) for name in _HOPS)),
            Fault(
                "edits that contradict another case's, so that not all can hold at once (of MQuAKE-CF-3k, v2 has none)",
                among=_conflicting,
            ),
        ),
    ),
)
