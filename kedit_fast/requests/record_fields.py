"""The fields of other repositories' records, and the fields of `EditRequest` that they mean.

Sources: CounterFact and zsRE of memit, EasyEdit's own records, KnowEdit, MQuAKE, QAEdit, UnKE. A name is mapped only
where it means the same as our field. The log names fields that are not used, so that nobody believes them measured.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.support.textfiles import Repeated

_log = logging.getLogger("kedit_fast")
MOST_LISTED = 20  # names or problems in one message
NESTED = "requested_rewrite"  # CounterFact and MQuAKE
_FOREIGN = {
    "case_id": "id",
    "src": "prompt",  # zsRE
    "alt": "target_new",  # zsRE as EasyEdit reads it; memit writes the first of `answers`, which is true already
    "target": "target_new",  # QAEdit
    "ground_truth": "target_true",  # the first of several
    "rephrase_prompt": "paraphrase_prompts",
    "rephrase_prompts": "paraphrase_prompts",
    "rephrase": "paraphrase_prompts",
}
# (names, mapping): a mapping that holds only for records which have all of these names.
_TOGETHER = (
    ({"src", "alt"}, {"answers": "target_true"}),  # zsRE
    ({"text", "labels", "concept"}, {"text": "prompt", "labels": "target_new", "concept": "subject"}),  # WikiBio
    (
        {"question", "para_question", "answer"},  # UnKE
        {"question": "prompt", "para_question": "paraphrase_prompts", "answer": "target_new"},
    ),
)
# (a prompt whose answer must not change, that answer): a neighborhood prompt where the answer is target_true.
_BESIDE = (("locality_prompt", "locality_ground_truth"), ("loc", "loc_ans"))
_UNMEASURED = {name for pair in _BESIDE for name in pair} | {"locality", "portability", "loc_prompt"}
_UNUSED = {
    "relation", "relation_id", "pararel_idx", "pred", "cond", "source", "category", "target_neg", "attribute_prompts",
    "generation_prompts", "question", "questions", "answer", "answer_alias", "answer_extended", "new_answer",
    "new_answer_alias", "single_hops", "new_single_hops", "orig", "fact_new", "fact_new_uns", "prompt_full",
    "verify_unsfact_GPT", "unsfact_triplets_GPT", "sub_question", "sub_answer",
}  # fmt: skip
_PLACEHOLDERS = ("<|endoftext|>", "</s>")  # EasyEdit's `ground_truth` of requests that have none
_NEEDED = ("prompt", "subject", "target_new")  # messages show their empty values
LISTS = ("paraphrase_prompts", "neighborhood_prompts", "rephrase_prompts", "answers", "ground_truth")


class Notes:
    """What the log has to say about the fields of all records of a file, or of an editor's calls: each thing once."""

    def __init__(self, known: Sequence[str]):
        self.known = tuple(known)
        """Names of our own fields."""
        self.mapped: dict[str, str] = {}
        """Another repository's name -> ours."""
        self.unmeasured: dict[str, int] = {}
        """Name of what would be measured elsewhere -> number of records that have it."""
        self.unused: set[str] = set()
        """Names that are known and not needed here."""
        self.unknown: dict[str, int] = {}
        """Name -> number of records that have it."""
        self.mixed: list[str] = []
        """Records whose texts are in several Unicode normal forms, with these."""
        self._logged: set[tuple[str, str]] = set()

    def log(self, where: str) -> None:
        """Log what was gathered and not logged before; what may have an unexpected effect is a warning."""
        if mapped := self._new("mapped", self.mapped):
            _log.info("%s: read %s", where, ", ".join(f"{theirs} as {self.mapped[theirs]}" for theirs in mapped))
        if "alt" in mapped:
            _log.warning("%s: `alt` is what is written, as in EasyEdit; memit writes the first of `answers`", where)
        if unused := self._new("unused", sorted(self.unused)):
            _log.info("%s: not used: %s", where, ", ".join(unused))
        if unmeasured := self._new("unmeasured", [name for name, count in self.unmeasured.items() if count]):
            _log.warning(
                "%s: not measured (the answer of neighborhood_prompts must be target_true): %s in %d records",
                where,
                ", ".join(unmeasured),
                max(self.unmeasured[name] for name in unmeasured),
            )
        if unknown := self._new("unknown", self.unknown):
            names = [f"{name!r} in {self.unknown[name]} records{self.hint(name)}" for name in unknown]
            more = f", and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
            _log.warning("%s: unknown fields are not used: %s%s", where, ", ".join(names[:MOST_LISTED]), more)
        if self.mixed and self._new("mixed", [""]):
            _log.warning(
                "%s: texts of one record are in different Unicode normal forms, so that the same word is different "
                "tokens: %d records, the first %s; they are taken as they are: write all in one form (NFC)",
                where,
                len(self.mixed),
                self.mixed[0],
            )
        for gathered in (self.mapped, self.unmeasured, self.unused, self.unknown, self.mixed):
            gathered.clear()

    def _new(self, kind: str, names: Iterable[str]) -> list[str]:
        """The names that were not logged before; from now on they count as logged."""
        new = [name for name in names if (kind, name) not in self._logged]
        self._logged.update((kind, name) for name in new)
        return new

    def hint(self, name: Any) -> str:
        """` (did you mean ...?)` for an unknown name that is similar to a known one, else ""."""
        if name in (*self.known, *_FOREIGN, *_UNUSED, *_UNMEASURED, NESTED):
            return ""
        near = difflib.get_close_matches(str(name).lower().strip(), [*self.known, *_FOREIGN], 1, 0.8)
        return f" (did you mean {near[0]!r}?)" if near else ""


def is_record(record: Mapping[str, Any], known: Sequence[str]) -> bool:
    """Whether an object looks like one record rather than a container of records."""
    return any(name in record for name in (*known, *_names(record), NESTED))


def _names(record: Mapping[str, Any]) -> dict[str, str]:
    """Another repository's name -> ours, as it holds for this record."""
    mapping = dict(_FOREIGN)
    for needed, names in _TOGETHER:
        if needed <= set(record):
            mapping |= names
    return mapping


def values_by_field(record: Mapping[str, Any], where: str, notes: Notes) -> tuple[dict[str, Any], dict[str, str]]:
    """A record's values by the names of our fields, and the record's own name of each.

    None counts as no value, and so does another repository's field that is empty or holds EasyEdit's placeholder.

    Raises:
        RequestError: a field that is given twice with different values, or several rewrites in one record.
    """
    outer, inner = dict(record), record.get(NESTED)
    if isinstance(inner, list | tuple) and len(inner) == 1:
        inner = inner[0]
    elif isinstance(inner, list | tuple):
        raise RequestError(f"{where}: {NESTED} holds {len(inner)} rewrites: make a record of each")
    if inner is not None and not isinstance(inner, Mapping):
        raise RequestError(f"{where}: {NESTED} must be an object; got {inner!r}")
    outer.pop(NESTED, None)
    foreign = _names(outer)
    for part in (record, inner):
        doubled = part.names if isinstance(part, Repeated) else ()
        if read := [name for name in doubled if name in notes.known or name in foreign]:
            raise RequestError(f"{where} gives {read[0]!r} twice: keep one")
    choices: dict[str, tuple[str, list[Any]]] = {}  # our field -> the record's name, its value or alternatives
    empty: dict[str, tuple[str, Any]] = {}
    for fields in (inner or {}, outer):
        for name, value in fields.items():
            field = name if name in notes.known else foreign.get(name)
            if field is None:
                _note(name, value, notes)
                continue
            candidates = [value] if field == name else _foreign_values(value, field)
            if not candidates or value is None:
                empty.setdefault(field, (name, value if field in _NEEDED else None))
                continue
            if field != name:
                notes.mapped[name] = field
            if field not in choices:
                choices[field] = (name, candidates)
                continue
            earlier, before = choices[field]
            same = [one for one in before if any(_comparable(one) == _comparable(other) for other in candidates)]
            if not same:
                first = before[0] if len(before) == 1 else before
                raise RequestError(
                    f"{where}: {field} is given twice, {earlier} = {first!r} and {name} = {value!r}: keep one"
                )
            choices[field] = (earlier, same)
    values = {field: value for field, (_, value) in empty.items()}
    values |= {field: candidates[0] for field, (_, candidates) in choices.items()}
    _take_neighborhood(outer, values, notes)
    return values, {field: name for field, (name, _) in (empty | choices).items()}


def _foreign_values(value: Any, field: str) -> list[Any]:
    """The value of another repository's field: none where it is empty, for `target_true` all alternatives."""
    if hasattr(value, "tolist"):  # of numpy
        value = value.tolist()
    if field == "target_true":
        return _alternatives(value)
    if isinstance(value, list | tuple):
        value = [item for item in value if not _is_empty(item)]
    return [] if _is_empty(value) else [value]


def _is_empty(value: Any) -> bool:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return all(map(_is_empty, value))
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, dict) and not value)


def _note(name: Any, value: Any, notes: Notes) -> None:
    """Gather a field that is not used."""
    if name in _UNMEASURED:
        if _is_empty(value):
            return
        notes.unmeasured[name] = notes.unmeasured.get(name, 0) + 1
    elif name in _UNUSED:
        notes.unused.add(name)
    else:
        notes.unknown[str(name)] = notes.unknown.get(str(name), 0) + 1


def _take_neighborhood(record: Mapping[str, Any], values: dict[str, Any], notes: Notes) -> None:
    """Use a prompt whose answer must not change as a neighborhood prompt, if that answer is target_true."""
    true = _comparable(values.get("target_true"))
    if values.get("neighborhood_prompts") is not None:
        return
    for prompt, answer in _BESIDE:
        text, answered = record.get(prompt), _first(record.get(answer))
        if isinstance(text, str) and text.strip() and isinstance(answered, str) and _comparable(answered) == true:
            values["neighborhood_prompts"] = [text]
            notes.mapped[prompt] = "neighborhood_prompts"
            for name in (prompt, answer):
                notes.unmeasured[name] -= 1
            return


def _first(value: Any) -> Any:
    """The first of alternatives; None where there are none."""
    return next(iter(_alternatives(value)), None)


def _alternatives(value: Any) -> list[Any]:
    """All alternatives, however deep they are nested, in order, without those that are empty or placeholders."""
    if isinstance(value, list | tuple):
        return [one for item in value for one in _alternatives(item)]
    text = value.get("str") if isinstance(value, Mapping) else value
    return [] if _is_empty(text) or (isinstance(text, str) and text.strip() in _PLACEHOLDERS) else [value]


def _comparable(value: Any) -> Any:
    """A form in which spellings of one value are equal: a text, CounterFact's object of it, a list with it alone."""
    if isinstance(value, Mapping):
        value = value.get("str", value)
    if isinstance(value, list | tuple):
        return _comparable(value[0]) if len(value) == 1 else [_comparable(item) for item in value]
    return value.strip() if isinstance(value, str) else value
