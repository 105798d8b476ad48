"""RippleEdits (arXiv:2307.12976): what an edit entails and what it must not touch, by six criteria.

A record gives the edit as a whole sentence with identifiers of Wikidata: neither the subject nor the target is named.
Both are taken from the record's queries (`_labels`), or, failing that, read off the sentences:

- the target is what the edit's sentence has behind the words that it shares with the original fact's, which end in a
  verb ("is", "are"), or behind its only verb;
- the subject is the longest run of words that the prompt shares with all queries about the same subject, without the
  words of the templates around it ("The name of the mother of", "is").

What is not certain is an error that asks for labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kedit_fast.requests.datasets.dataset import NO_CHANGE, DataSet, Fault
from kedit_fast.requests.datasets.parts import Part, distinct, make_request
from kedit_fast.requests.probes import Probe, ProbeKind, Question
from kedit_fast.requests.records import Options
from kedit_fast.requests.request import EditRequest

CRITERIA: dict[str, ProbeKind] = {
    "Relation_Specificity": "locality",
    "Logical_Generalization": "portability",
    "Subject_Aliasing": "portability",
    "Compositionality_I": "portability",
    "Compositionality_II": "portability",
    "Forgetfulness": "locality",
}
"""The six criteria, and what kind of probe the tests of each are."""
_SPELLED = {"Relation_Specificity": "Relation_Specifity"}  # in the README of the data set
_VERBS = ("is", "are", "follows")  # the last words of a prompt, before its answer, unless it goes on:
_GO_ON = (
    "followed by ",
    "associated with ",
    "part of ",
    "a member of ",
    "the capital of ",
    "most likely ",
)  # no answer
_OPENING = ("The", "Is", "name", "names", "of", "the")  # words of templates at a prompt's beginning
_BEFORE = ("of", "in", "which", "award", "children", "siblings", "Is")  # ... right before a subject
_BEHIND = {"is", "are", "has", "won", "plays", "still", "follows", "was", *" ".join(_GO_ON).split()}  # ... behind one
_ASK = "give labels that map {} to its name (`kedit-fast requests convert --labels FILE`, or labels= of load_requests)"


def read_example(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    """The edit of an example, with each test as a probe that its criterion names.

    A test's condition says whether one or all of its queries must be answered; its condition queries are `before`: the
    unedited model must answer them. As in the released code, answers of a single character other than a digit do not
    count; a query without any answer left is no query, and a test that needs it is left out.
    """
    part = Part(record, where)
    edit = part["edit"]
    tests = [(name, test) for name in CRITERIA for test in _tests(part, name)]
    labels = _labels(query for _, test in tests for query in _queries(test))
    labels |= {identifier: (label,) for identifier, label in options.labels.items()}
    original = edit.get("original_fact")
    cloze, target = _split(edit, original, labels, tests)
    subject = _subject(edit, cloze, labels, tests)
    true = _original_target(original, cloze)
    relation = edit["relation"].text()
    return [
        make_request(
            where,
            options,
            prompt=cloze.replace(subject, "{}"),
            subject=subject,
            target_new=target,
            target_true=true,
            target_aliases=_others(labels, edit["target_id"].value, target),
            true_aliases=() if original is None or true is None else _others(labels, original["target_id"].value, true),
            relation=relation,
            probes=tuple(probe for name, test in tests if (probe := _probe(name, test)) is not None),
        )
    ]


def _tests(part: Part, name: str) -> list[Part]:
    """The tests of a criterion, by either of its spellings; none where the record lacks it."""
    criterion = part.get(name) or part.get(_SPELLED.get(name, name))
    return [] if criterion is None else criterion.items()


def _queries(test: Part) -> list[Part]:
    conditions = test.get("condition_queries")
    return [*test["test_queries"].items(), *([] if conditions is None else conditions.items())]


def _probe(name: str, test: Part) -> Probe | None:
    condition = test["test_condition"].text()
    if condition not in ("AND", "OR"):
        raise test["test_condition"].error(f"must be AND or OR; got {condition!r}")
    queries = test["test_queries"].items()
    questions = [_question(query) for query in queries]
    conditions = test.get("condition_queries")
    before = [] if conditions is None else [_question(query) for query in conditions.items()]
    asked = [question for question in questions if question is not None]
    if not asked or None in before or (condition == "AND" and len(asked) < len(questions)):
        return None
    known = tuple(question for question in before if question is not None)
    return Probe(CRITERIA[name], tuple(asked), name, "all" if condition == "AND" else "any", known)


def _question(query: Part) -> Question | None:
    """A query with its answers; None where one of them has no alternative that counts, or where there are none."""
    groups = tuple(_alternatives(answer) for answer in query["answers"].items())
    return Question(query["prompt"].text(), groups) if groups and all(groups) else None


def _alternatives(answer: Part) -> tuple[str, ...]:
    aliases = answer.get("aliases")
    names = [answer["value"], *([] if aliases is None else aliases.items())]
    for name in names:
        if not isinstance(name.value, str):
            raise name.error(f"must be a text; got {name.value!r}")
    return distinct(*(name.value for name in names if len(name.value.strip()) > 1 or name.value.isdigit()))


def _labels(queries: Iterable[Part]) -> dict[str, tuple[str, ...]]:
    """Identifier -> its name, and then its aliases, as the answers of queries give them."""
    labels: dict[str, tuple[str, ...]] = {}
    for query in queries:
        identifiers = query.get("second_hop_target_ids") or query.get("target_ids")
        if identifiers is None:
            continue
        values = identifiers.value if isinstance(identifiers.value, list | tuple) else [identifiers.value]
        for identifier, answer in zip(values, query["answers"].items(), strict=False):
            name = answer["value"].value
            if isinstance(identifier, str) and isinstance(name, str) and name.strip():
                labels.setdefault(identifier, distinct(name, *_alternatives(answer)))
    return labels


def _split(
    edit: Part, original: Part | None, labels: Mapping[str, Sequence[str]], tests: Sequence[tuple[str, Part]]
) -> tuple[str, str]:
    """The edit's sentence as a prompt and its target; raises RequestError where the two cannot be told apart."""
    sentence = _sentence(edit["prompt"])
    words = sentence.split(" ")
    ends = _ends(words)
    names = [*labels.get(edit["target_id"].value, ())[:1]]
    for name, test in tests:
        if name == "Forgetfulness":  # "..., which is not TARGET, is"
            for query in _queries(test):
                _, _, behind = query["prompt"].text().partition(", which is not ")
                names += [behind.rpartition(", ")[0]] if behind else []
    named = {end for end in ends if " ".join(words[end:]) in names}
    if original is not None and not named:
        shared = _shared_words(words, _sentence(original["prompt"]).split(" "))
        named = {max((end for end in ends if end <= shared), default=0)} - {0}
    begin = min(named or (ends if len(ends) == 1 else {0}))
    if not begin:
        raise edit["prompt"].error(
            f"{edit['prompt'].value!r} does not show where its target begins: {_ASK.format(edit['target_id'].value)}"
        )
    return " ".join(words[:begin]), " ".join(words[begin:])


def _ends(words: Sequence[str]) -> set[int]:
    """Where a sentence's prompt may end and its target begin: behind a verb, or a question mark."""
    ends = set()
    for index in range(1, len(words)):
        behind = " ".join(words[index:])
        verb = words[index - 1] in _VERBS and not behind.startswith(_GO_ON)
        if verb or words[index - 1].endswith("?") or words[max(index - 3, 0) : index] == ["is", "followed", "by"]:
            ends.add(index)
    return ends


def _sentence(prompt: Part) -> str:
    return prompt.text().strip().removesuffix(".")


def _shared_words(first: Sequence[str], second: Sequence[str]) -> int:
    """How many words two sentences have in common from their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def _original_target(original: Part | None, cloze: str) -> str | None:
    """The old answer, behind the same words; None where the original fact has others."""
    sentence = "" if original is None else _sentence(original["prompt"])
    return sentence.removeprefix(cloze).strip() or None if sentence.startswith(f"{cloze} ") else None


def _subject(edit: Part, cloze: str, labels: Mapping[str, Sequence[str]], tests: Sequence[tuple[str, Part]]) -> str:
    identifier = edit["subject_id"].value
    for name in labels.get(identifier, ())[:1]:
        if cloze.count(name) == 1:
            return name
    prompts = {
        query["prompt"].text()
        for _, test in tests
        for query in _queries(test)
        if query["subject_id"].value == identifier
        and query["relation"].value != edit["relation"].value
        and query["query_type"].value == "regular"
    }
    subject = _common_name(cloze, sorted(prompts))
    if subject is not None and cloze.count(subject) == 1:
        return subject
    raise edit["prompt"].error(
        f"{edit['prompt'].value!r} does not show which words are its subject {identifier}, and no query of the record "
        f"names it: {_ASK.format(identifier)}"
    )


def _common_name(cloze: str, prompts: Sequence[str]) -> str | None:
    """The longest run of words that all prompts share, without those of templates; None where there is no such one.

    A name has a capital, a digit, or a letter of a script without capitals: "place of" is none.
    """
    if not prompts:
        return None
    words = cloze.split(" ")
    candidates = set()
    for begin in range(len(words)):
        for end in range(len(words), begin, -1):
            run = " ".join(words[begin:end])
            if all(f" {run} " in f" {prompt} " for prompt in prompts):
                candidates.add(_without_template(words, begin, end))
                break
    names = sorted((name for name in candidates if name != name.lower() or any(map(_is_caseless, name))), key=len)
    return names[-1] if names and len(names[-1]) > max((len(name) for name in names[:-1]), default=0) else None


def _is_caseless(character: str) -> bool:
    return character.isdigit() or (character.isalpha() and character.lower() == character.upper())


def _without_template(words: Sequence[str], begin: int, end: int) -> str:
    if begin == 0 or all(word in _OPENING for word in words[:begin]):
        while begin < end and words[begin] in _OPENING:
            begin += 1
    while begin < end and words[begin] in _BEFORE:
        begin += 1
    while begin < end and words[end - 1] in _BEHIND:
        end -= 1
    return " ".join(words[begin:end])


def _others(labels: Mapping[str, Sequence[str]], identifier: Any, name: str) -> tuple[str, ...]:
    return tuple(other for other in labels.get(identifier, ()) if other != name)


def _drops_a_test(record: Mapping[str, Any], requests: Sequence[EditRequest]) -> bool:
    count = sum(len(record.get(name) or record.get(_SPELLED.get(name, name)) or ()) for name in CRITERIA)
    return count > sum(len(request.probes) for request in requests)


def _lacks_the_old(record: Mapping[str, Any], requests: Sequence[EditRequest]) -> bool:
    return "original_fact" in record["edit"] and requests[0].target_true is None


DATA_SETS = (
    DataSet(
        name="rippleedits",
        title="RippleEdits (arXiv:2307.12976): what an edit entails and what it must not touch",
        fields=frozenset({"edit.prompt", "edit.subject_id"}),
        read=read_example,
        optional=frozenset({*CRITERIA, *_SPELLED.values()}),
        unused=frozenset({"example_type"}),
        faults=(
            NO_CHANGE,
            Fault("tests without an answer that counts (single letters do not), which are left out", _drops_a_test),
            Fault(
                "no answer in the original fact, or other words than in the edit: the old answer is not read",
                _lacks_the_old,
            ),
        ),
    ),
)
