"""What is wrong with a list of requests, as far as their texts say: rules as records, findings by record number.

Rules that need a tokenizer or a model are in `reports/lint.py`, which runs both kinds.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

from kedit_fast.requests.reading import RequestList
from kedit_fast.requests.relations import PUBLISHED, RelationRules
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import is_unspaced
from kedit_fast.support.messages import comma_list

Severity = Literal["error", "warning", "note"]
"""error: the edit cannot do what the records ask for; warning: it does less than it seems to; note: worth knowing."""
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
_SHOWN = 6  # record numbers that a message names


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    rule: str
    severity: Severity
    records: tuple[int, ...]
    """Numbers of the records, from 1; the first is where it is reported."""
    message: str
    """What is wrong, with the texts."""
    advice: str = ""
    """What to do about it."""
    place: str = ""
    """Where it is reported: the record's number, with that of the edit where a record makes several ("3.2")."""
    unusable: tuple[int, ...] = ()
    """Of an error: indices of the requests, from 0, without which it is none."""

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` lists."""
        return {
            "rule": self.rule,
            "severity": self.severity,
            "records": list(self.records),
            "place": self.place,
            "message": self.message,
            "advice": self.advice,
        }


@dataclass(frozen=True)
class Checked:
    """The requests that rules look at, and how they will be written."""

    requests: Sequence[EditRequest]
    records: tuple[int, ...]
    """Number of each request's record, from 1; a record may make several requests."""
    unreadable: Mapping[int, str]
    """Number of a record that is no request -> why."""
    batch_size: int | None = None
    """Requests of a batch; None for one batch of all."""
    shares_values: bool = False
    """Whether requests on one subject share a value (`memit-merge`)."""
    relations: RelationRules = PUBLISHED
    """Which relations imply each other."""

    @classmethod
    def of(cls, requests: RequestList, **options: Any) -> Checked:
        """From what `load_requests` returned."""
        unreadable = {_record_of(reason, place): reason for place, reason in requests.skipped.items()}
        return cls(tuple(requests), tuple(record + 1 for record in requests.records), unreadable, **options)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """How messages call each request: the number of its record, and ".2" for the second of a record's edits."""
        edits = Counter(self.records)
        seen: Counter[int] = Counter()
        names = []
        for record in self.records:
            seen[record] += 1
            names.append(str(record) if edits[record] == 1 else f"{record}.{seen[record]}")
        return tuple(names)

    def finding(
        self,
        rule: str,
        severity: Severity,
        indices: Iterable[int],
        message: str,
        advice: str = "",
        unusable: Iterable[int] = (),
    ) -> Finding:
        """A finding about requests, by index; reported at the first."""
        indices = list(indices)
        records = tuple(dict.fromkeys(self.records[i] for i in indices))
        return Finding(rule, severity, records, message, advice, self.names[indices[0]], tuple(unusable))

    def list_of(self, indices: Iterable[int]) -> str:
        """Requests in words, see `numbered`."""
        return numbered([self.names[i] for i in indices])

    def batch_of(self, index: int) -> int:
        """The batch, from 0, in which a request is written."""
        return index // self.batch_size if self.batch_size else 0

    @functools.cached_property
    def facts(self) -> list[list[int]]:
        """Requests by fact, in order: those of one subject that agree in the prompt or in the relation."""
        by_subject: dict[str, list[int]] = {}
        for i, request in enumerate(self.requests):
            by_subject.setdefault(subject_of(request), []).append(i)
        facts = []
        for indices in by_subject.values():
            facts += [indices] if len(indices) == 1 else _joined(indices, [_asks(self.requests[i]) for i in indices])
        return sorted(facts)

    @functools.cached_property
    def facts_by_subject(self) -> dict[str, list[list[int]]]:
        """Subject -> its facts."""
        grouped: dict[str, list[list[int]]] = {}
        for fact in self.facts:
            if self.requests[fact[0]].subject is not None:
                grouped.setdefault(subject_of(self.requests[fact[0]]), []).append(fact)
        return grouped

    @functools.cached_property
    def cases(self) -> dict[str | int, list[int]]:
        """Case -> the requests that belong to it, where requests say so."""
        grouped: dict[str | int, list[int]] = {}
        for i, request in enumerate(self.requests):
            if request.group is not None:
                grouped.setdefault(request.group, []).append(i)
        return grouped

    @functools.cached_property
    def by_relation(self) -> dict[str, dict[str, list[int]]]:
        """Relation -> casefolded subject -> requests."""
        grouped: dict[str, dict[str, list[int]]] = {}
        for i, request in enumerate(self.requests):
            if request.relation is not None and request.subject is not None:
                grouped.setdefault(request.relation, {}).setdefault(folded(request.subject), []).append(i)
        return grouped


Looked = TypeVar("Looked")


@dataclass(frozen=True)
class Rule(Generic[Looked]):
    """One thing that requests are checked for: in their texts (`Checked`), or in more than that (`reports/lint.py`)."""

    name: str
    severity: Severity
    """The gravest of its findings."""
    title: str
    """What it finds, in one line."""
    check: Callable[[Looked], Iterator[Finding]]


def lint_texts(checked: Checked) -> list[Finding]:
    """The findings of all rules that need texts alone, by record.

    Cost: linear in the texts; 10,000 requests with ten neighborhood prompts each take about a second.
    """
    return in_order(finding for rule in TEXT_RULES for finding in rule.check(checked))


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Findings by record, of one record the gravest first."""
    return sorted(findings, key=lambda finding: (finding.records[:1], SEVERITIES.index(finding.severity)))


# Texts as rules compare them


def composed(text: str) -> str:
    """A text in Unicode's composed form, with single spaces and none at its ends."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def folded(text: str) -> str:
    """`composed`, without a difference of upper and lower case."""
    return composed(text).casefold()


def subject_of(request: EditRequest) -> str:
    """The subject as rules compare it; "" for a request without."""
    return "" if request.subject is None else composed(request.subject)


def numbered(names: Sequence[object]) -> str:
    """Records in words: "record 3", "records 3 and 7.2", and of many the first."""
    if len(names) == 1:
        return f"record {names[0]}"
    if len(names) > _SHOWN:
        return f"records {comma_list(names[: _SHOWN - 1])} and {len(names) - _SHOWN + 1} more"
    return f"records {comma_list(names[:-1])} and {names[-1]}"


def _asks(request: EditRequest) -> set[tuple[str, str]]:
    """What a request says about its subject: by its template, and by its relation."""
    asked = {("template", folded(request.prompt))}
    return asked if request.relation is None else asked | {("relation", request.relation)}


def _joined(indices: Sequence[int], labels: Sequence[set[tuple[str, str]]]) -> list[list[int]]:
    """Indices that are connected by a label in common, by first members."""
    parent = {i: i for i in indices}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, names in zip(indices, labels, strict=True):
        for name in names:
            one, other = root(first.setdefault(name, i)), root(i)
            parent[max(one, other)] = min(one, other)
    groups: dict[int, list[int]] = {}
    for i in indices:
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def _shown(fact: EditRequest) -> str:
    """Subject and template, as messages name a fact."""
    return repr(fact.prompt) if fact.subject is None else f"({fact.subject!r}, {fact.prompt!r})"


def _triple(subject: str | None, relation: str | None, target: str) -> str:
    return f"({subject}, {relation}: {target})"


# Rules


def _unreadable(rule: str, checked: Checked) -> Iterator[Finding]:
    for record, reason in checked.unreadable.items():
        if rule == next((name for name, pattern in _KINDS.items() if re.search(pattern, reason)), "unreadable"):
            yield Finding(
                rule, "error", (record,), unplaced(reason), _UNREADABLE_ADVICE.get(rule, ""), place=str(record)
            )


def unplaced(reason: str) -> str:
    """A reason without the file, record or request that it begins with; a finding has the record's number."""
    return _PLACE.sub(lambda match: "" if match[3] else "the record ", reason, count=1)


def _record_of(reason: str, place: int) -> int:
    """The number of the record that a reason names; else that of a place in the list."""
    match = _PLACE.match(reason)
    number = match and (match[1] or match[2])
    return int(number) if number else place + 1


_PLACE = re.compile(
    r"\A(?:.*?, (?:line \d+ \()?(?:record|line) (\d+)\)?(?: \(line \d+\))?|request (?:(\d+)|'.*?'))"
    r"(?: \('.*?'\))?(:)? ",
    re.DOTALL,
)
_KINDS = {
    "subject-case": r"stands 0 times in .*other upper and lower case",
    "subject-missing": r"stands 0 times in |has no .*'subject'",
    "subject-twice": r"stands \d+ times in ",
    "surrogate": r"not valid Unicode",
}  # rule -> a part of the reason that the reader gives
_UNREADABLE_ADVICE = {
    "subject-case": "write the subject as the prompt does",
    "subject-missing": "put {} where the subject stands",
    "subject-twice": "put {} where the subject is meant",
}


def _duplicates(checked: Checked) -> Iterator[Finding]:
    for fact in checked.facts:
        first: dict[str, int] = {}
        for i in fact:
            request = checked.requests[i]
            j = first.setdefault(composed(request.target_new), i)
            if j == i:
                continue
            together = checked.batch_of(i) == checked.batch_of(j)
            same = folded(request.prompt) == folded(checked.requests[j].prompt)
            other = "" if same else f" in other words, {checked.requests[j].prompt!r}"
            yield checked.finding(
                "duplicate-request",
                "warning" if together else "note",
                (i, j),
                f"record {checked.names[i]} repeats record {checked.names[j]}, {_shown(request)} -> "
                f"{request.target_new!r}{other}: "
                + ("it will weigh twice in the least squares" if together else "a later batch writes it again"),
                "take one of them out",
            )


def _round_trips(checked: Checked) -> Iterator[Finding]:
    for fact in checked.facts:
        for i, j in _returns(checked.requests, fact):
            together = checked.batch_of(i) == checked.batch_of(j)
            first = checked.requests[i]
            yield checked.finding(
                "round-trip",
                "error" if together else "note",
                (j, i),
                f"record {checked.names[i]} changes {_shown(first)} from {first.target_true!r} to "
                f"{first.target_new!r}, and record {checked.names[j]} changes it back"
                + (" in the same batch: one key cannot have both values" if together else " in a later batch"),
                "write them in batches of their own (--batch-size 1)" if together else "",
                (j,) if together else (),
            )


def _returns(requests: Sequence[EditRequest], fact: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of requests of one fact of which the later takes the change of the earlier back."""
    pairs = []
    if len(fact) > 1:
        waiting: dict[tuple[str, str], list[int]] = {}
        for i in fact:
            new, true = requests[i].target_new, requests[i].target_true
            if true is None or folded(true) == folded(new):
                continue
            if earlier := waiting.get((folded(new), folded(true))):
                pairs.append((earlier.pop(0), i))
            else:
                waiting.setdefault((folded(true), folded(new)), []).append(i)
    return pairs


def _two_targets(checked: Checked) -> Iterator[Finding]:
    for fact in checked.facts:
        targets = list(dict.fromkeys(composed(checked.requests[i].target_new) for i in fact))
        if len(targets) == 1 or {i for pair in _returns(checked.requests, fact) for i in pair} == set(fact):
            continue
        first: dict[int, str] = {}  # batch -> its first target
        extra = [
            i
            for i in fact
            if first.setdefault(checked.batch_of(i), target := composed(checked.requests[i].target_new)) != target
        ]
        answers = f"{targets[0]} and {targets[1]}" if len(targets) == 2 else comma_list(targets[:_SHOWN])
        count = "two" if len(targets) == 2 else str(len(targets))
        text = f"{checked.list_of(fact)} give {_shown(checked.requests[fact[0]])} {count} answers, {answers}"
        if extra:
            yield checked.finding(
                "two-targets",
                "error",
                fact,
                f"{text}: one Gram row cannot hold {'both' if count == 'two' else 'them all'}",
                "decide for one, or write them in batches of their own",
                extra,
            )
        else:
            yield checked.finding("two-targets", "note", fact, f"{text}, in different batches: the last wins")


def _same_subject(checked: Checked) -> Iterator[Finding]:
    for subject, facts in checked.facts_by_subject.items():
        if len(facts) == 1 or checked.shares_values:
            continue
        by_batch: dict[int, list[int]] = {}
        for fact in facts:
            for batch, i in {checked.batch_of(i): i for i in reversed(fact)}.items():
                by_batch.setdefault(batch, []).append(i)
        for members in by_batch.values():
            if len(members) == 1:
                continue
            prompts = [repr(checked.requests[i].prompt) for i in members]
            more = f" and {len(prompts) - 3} more" if len(prompts) > 3 else ""
            yield checked.finding(
                "same-subject",
                "warning",
                sorted(members),
                f"{checked.list_of(sorted(members))} are on one subject, {subject!r}, in one batch "
                f"({comma_list(prompts[:3])}{more}): their keys are nearly equal, and each gets a mean of their values",
                "the method memit-merge gives them one value; or write them in different batches",
            )


def _duplicate_ids(checked: Checked) -> Iterator[Finding]:
    places: dict[Any, dict[int, int]] = {}  # id -> {record: its first request}
    for i, request in enumerate(checked.requests):
        if request.id is not None:
            places.setdefault(request.id, {}).setdefault(checked.records[i], i)
    for name, first in places.items():
        if len(first) > 1:
            records = numbered(list(first))
            yield checked.finding(
                "duplicate-id",
                "warning",
                first.values(),
                f"the id {name!r} stands in {records}",
                "ids name requests in messages and in files of values: give each its own",
            )


def _no_change(checked: Checked) -> Iterator[Finding]:
    for i, request in enumerate(checked.requests):
        true = request.target_true
        if true is None:
            continue
        new, old = folded(request.target_new), folded(true)
        if new == old:
            text = f"the new target {request.target_new!r} is the old one"
        elif new in map(folded, request.true_aliases):
            text = f"the new target {request.target_new!r} is another name of the old one, {true!r}"
        elif old in map(folded, request.target_aliases):
            text = f"the old target {true!r} is another name of the new one, {request.target_new!r}"
        else:
            continue
        yield checked.finding("no-change", "error", (i,), text, "take the record out", (i,))


def _reverse_conflicts(checked: Checked) -> Iterator[Finding]:
    for forward, backward in checked.relations.reverse:
        for indices in checked.by_relation.get(forward, {}).values():
            for i in indices:
                first = checked.requests[i]
                for j in checked.by_relation.get(backward, {}).get(folded(first.target_new), ()):
                    second = checked.requests[j]
                    if i == j or folded(second.target_new) == folded(first.subject or ""):
                        continue
                    here, there = checked.names[j], checked.names[i]
                    yield checked.finding(
                        "reverse-conflict",
                        "warning",
                        (j, i),
                        f"record {here} {_triple(second.subject, backward, second.target_new)} undoes what record "
                        f"{there} {_triple(first.subject, forward, first.target_new)} implies: "
                        f"{_triple(second.subject, backward, first.subject or '')}",
                        "decide for one",
                    )


def _composite_conflicts(checked: Checked) -> Iterator[Finding]:
    for first, second, third in checked.relations.composite:
        results = checked.by_relation.get(third, {})
        links = _links(checked, first) if results else {}
        for middle, indices in checked.by_relation.get(second, {}).items() if results else ():
            for i in indices:
                part = checked.requests[i]
                for subject, source in {**links.get(middle, {}), **_tied_links(checked, i, middle, third)}.items():
                    for j in results.get(subject, ()):
                        whole = checked.requests[j]
                        if i == j or folded(part.target_new) == folded(whole.target_new):
                            continue
                        here, there = checked.names[j], checked.names[i]
                        yield checked.finding(
                            "composite-conflict",
                            "warning",
                            (j, i),
                            f"record {here} {_triple(whole.subject, third, whole.target_new)} denies what record "
                            f"{there} {_triple(part.subject, second, part.target_new)} implies together with "
                            f"{_triple(whole.subject, first, part.subject or '')} {source}",
                            "decide for one",
                        )


def _links(checked: Checked, relation: str) -> dict[str, dict[str, str]]:
    """y -> {x: where that is said}, of all facts x r y of a relation that the requests name."""
    links: dict[str, dict[str, str]] = {}
    for subject, indices in checked.by_relation.get(relation, {}).items():
        for i in indices:
            request, record = checked.requests[i], checked.names[i]
            if request.target_true is not None:
                links.setdefault(folded(request.target_true), {}).setdefault(subject, f"before record {record}")
            links.setdefault(folded(request.target_new), {})[subject] = f"of record {record}"
    return links


def _tied_links(checked: Checked, i: int, middle: str, third: str) -> dict[str, str]:
    """{x: where that is said} of facts x r1 y, y the subject of request i, from questions of its case about x.

    A question says no relation. It is taken for r1 where the case edits what follows, x's relation `third`.
    """
    links: dict[str, str] = {}
    case = checked.requests[i].group
    members = checked.cases.get(case, []) if case is not None else []
    subjects = {folded(r.subject or "") for r in (checked.requests[k] for k in members) if r.relation == third}
    for probe in (probe for k in members if subjects for probe in checked.requests[k].probes if probe.kind == "tied"):
        for question in probe.questions:
            if middle in {folded(answer) for group in question.answers for answer in group}:
                text = folded(question.prompt)
                links |= {x: f"of its case ({question.prompt!r})" for x in subjects if x and x in text}
    return links


def _inside_words(checked: Checked) -> Iterator[Finding]:
    for i, request in enumerate(checked.requests):
        subject = subject_of(request)
        if not subject:
            continue
        before, _, after = request.prompt.partition("{}")
        begin = _LAST_WORD.search(before) if _is_spaced_letter(subject[0]) else None
        end = _FIRST_WORD.match(after) if _is_spaced_letter(subject[-1]) else None
        head = begin[0] if begin and _is_spaced_letter(begin[0][-1]) else ""
        tail = end[0] if end and _is_spaced_letter(end[0][0]) else ""
        if head or tail:
            yield checked.finding(
                "subject-in-word",
                "error",
                (i,),
                f"{subject!r} is part of {head + subject + tail!r} in {request.text!r}",
                "put {} where the subject stands as a word, or make the whole word the subject",
                (i,),
            )


_LAST_WORD, _FIRST_WORD = re.compile(r"\w+\Z"), re.compile(r"\w+")


def _is_spaced_letter(character: str) -> bool:
    """Whether a character is of a word in a script that separates words; Korean's particles follow without a space."""
    if not (character.isalnum() or character == "_"):
        return False
    return not is_unspaced(character) and not unicodedata.name(character, "").startswith("HANGUL")


def _paraphrases_without_subject(checked: Checked) -> Iterator[Finding]:
    for i, request in enumerate(checked.requests):
        if request.subject is None:
            continue
        subject = folded(request.subject)
        lacking = [text for text in request.paraphrase_prompts if subject not in folded(text)]
        if lacking:
            yield checked.finding(
                "paraphrase-without-subject",
                "note",
                (i,),
                f"{len(lacking)} of {len(request.paraphrase_prompts)} paraphrases are without {request.subject!r}: "
                f"{lacking[0]!r}",
            )


def _paraphrases_equal(checked: Checked) -> Iterator[Finding]:
    for i, request in enumerate(checked.requests):
        text = folded(request.text) if request.paraphrase_prompts else ""
        same = [other for other in request.paraphrase_prompts if folded(other) == text]
        if same:
            yield checked.finding(
                "paraphrase-equals-prompt",
                "warning",
                (i,),
                f"{len(same)} of {len(request.paraphrase_prompts)} paraphrases are the prompt itself, {same[0]!r}: "
                "they measure no generalization",
                "take them out, or `kedit-fast requests paraphrase` makes others",
            )


def _leaking_neighbors(checked: Checked) -> Iterator[Finding]:
    edited: dict[str, int] = {}
    for i, request in enumerate(checked.requests):
        edited.setdefault(folded(request.text), i)
    subjects = _Subjects(checked.requests)
    for i, request in enumerate(checked.requests):
        prompts = [
            *request.neighborhood_prompts,
            *(text for probe in request.probes if probe.kind == "neighborhood" for text in probe.prompts),
        ]
        leaks: dict[str, list[str]] = {}
        others: list[int] = []
        for text in prompts:
            same = edited.get(folded(text))
            subject = None if same is not None else subjects.in_text(text)
            if same is not None:
                leaks.setdefault(f"is the edited prompt of record {checked.names[same]}", []).append(text)
                others.append(same)
            elif subject is not None and subject == subject_of(request):
                leaks.setdefault(f"contains the subject {subject!r}", []).append(text)
            elif subject is not None:
                other = subjects.first[subject]
                how = f"contains {subject!r}, the subject of record {checked.names[other]}"
                leaks.setdefault(how, []).append(text)
                others.append(other)
        if leaks:
            how, first = next(iter(leaks.items()))
            yield checked.finding(
                "neighbor-equals-edited",
                "warning",
                (i, *others),
                f"{sum(map(len, leaks.values()))} of {len(prompts)} neighborhood prompts are about what is edited: "
                f"{first[0]!r} {how}",
                "their answers may rightly change: take them out",
            )


class _Subjects:
    """Finds edited subjects in texts, as whole words; in scripts without spaces, as they stand."""

    def __init__(self, requests: Sequence[EditRequest]):
        self.first: dict[str, int] = {}
        """Subject -> index of the first request on it."""
        self._spaced: dict[tuple[str, ...], str] = {}
        self._lengths: dict[str, set[int]] = {}  # first word -> numbers of words
        self._unspaced: dict[str, list[str]] = {}  # first character -> subjects
        for i, request in enumerate(requests):
            subject = subject_of(request)
            if not subject or subject in self.first:
                continue
            self.first[subject] = i
            words = tuple(_FIRST_WORD.findall(subject))
            if any(map(is_unspaced, subject)):
                self._unspaced.setdefault(subject[0], []).append(subject)
            elif words:
                self._spaced.setdefault(words, subject)
                self._lengths.setdefault(words[0], set()).add(len(words))

    def in_text(self, text: str) -> str | None:
        """The longest of the first subjects that stand in a text; None where there is none."""
        text = text if text.isascii() else unicodedata.normalize("NFC", text)
        words = _FIRST_WORD.findall(text)
        for i, word in enumerate(words):
            for length in sorted(self._lengths.get(word, ()), reverse=True):
                if subject := self._spaced.get(tuple(words[i : i + length])):
                    return subject
        for i, character in enumerate(text) if self._unspaced and not text.isascii() else ():
            for subject in self._unspaced.get(character, ()):
                if text.startswith(subject, i):
                    return subject
        return None


def _questions(checked: Checked) -> Iterator[Finding]:
    asking = [i for i, request in enumerate(checked.requests) if request.prompt.rstrip()[-1:] in _MARKS]
    if asking:
        mixed = ", the others are sentences to complete" if len(asking) < len(checked.requests) else ""
        yield checked.finding(
            "question-prompt",
            "note",
            asking,
            f"{len(asking)} of {len(checked.requests)} prompts end in a question mark{mixed}: the target is trained "
            "as what follows the question",
            "measure with questions, too; a chat model takes them with --chat",
        )


_MARKS = ("?", "？", "؟", "⁇")  # noqa: RUF001

TEXT_RULES: tuple[Rule[Checked], ...] = (
    Rule("unreadable", "error", "a record that is no request", functools.partial(_unreadable, "unreadable")),
    Rule(
        "subject-missing",
        "error",
        "a subject that is not in its prompt",
        functools.partial(_unreadable, "subject-missing"),
    ),
    Rule(
        "subject-twice",
        "error",
        "a subject that is in its prompt several times",
        functools.partial(_unreadable, "subject-twice"),
    ),
    Rule(
        "subject-case",
        "error",
        "a subject that its prompt writes in other case",
        functools.partial(_unreadable, "subject-case"),
    ),
    Rule("surrogate", "error", "a character that is not valid Unicode", functools.partial(_unreadable, "surrogate")),
    Rule("duplicate-request", "warning", "the same subject, prompt or relation, and target twice", _duplicates),
    Rule("two-targets", "error", "one fact with two targets", _two_targets),
    Rule("round-trip", "error", "one fact changed and changed back", _round_trips),
    Rule("same-subject", "warning", "several facts of one subject in one batch", _same_subject),
    Rule("duplicate-id", "warning", "one id in several records", _duplicate_ids),
    Rule("no-change", "error", "a new target that is the old one or another name of it", _no_change),
    Rule("reverse-conflict", "warning", "a fact that denies the reverse of another", _reverse_conflicts),
    Rule("composite-conflict", "warning", "a fact that denies what two others imply", _composite_conflicts),
    Rule("subject-in-word", "error", "a subject that is part of a word", _inside_words),
    Rule(
        "paraphrase-without-subject",
        "note",
        "a paraphrase that does not name the subject",
        _paraphrases_without_subject,
    ),
    Rule("paraphrase-equals-prompt", "warning", "a paraphrase that is the prompt", _paraphrases_equal),
    Rule("neighbor-equals-edited", "warning", "a neighborhood prompt about what is edited", _leaking_neighbors),
    Rule("question-prompt", "note", "prompts that are questions", _questions),
)
"""The rules that need texts alone."""


def counts_by_severity(findings: Iterable[Finding]) -> dict[Severity, int]:
    """Severity -> number of findings."""
    counts = Counter(finding.severity for finding in findings)
    return {severity: counts[severity] for severity in SEVERITIES}
