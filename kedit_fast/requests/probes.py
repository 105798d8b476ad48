"""What else is asked of a model after an edit, beside the request's own prompts: as the data set has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kedit_fast.errors import RequestError

ProbeKind = Literal[
    "paraphrase", "neighborhood", "locality", "portability", "generation", "tied", "multi_hop", "conflict", "reference"
]
"""paraphrase: the edited fact in other words; neighborhood, locality: facts that must stay; portability: what follows
from the edit; generation: prompts to continue freely; tied: facts that hang on the old answer; multi_hop: questions
over several facts; conflict: passages that say something else; reference: texts about the new answer, each the prompt
of a question, that what the model writes is compared with ("consistency"), or about the subject ("essence")."""
Condition = Literal["all", "any"]


@dataclass(frozen=True)
class Question:
    """A prompt and its right answers; raises RequestError for an empty prompt, group or alternative."""

    prompt: str
    answers: tuple[tuple[str, ...], ...] = ()
    """Groups of alternatives: of each group any alternative must be said, and all groups must be met."""

    def __post_init__(self):
        prompt = _text(self.prompt, "the prompt of a question")
        if isinstance(self.answers, str) or any(isinstance(group, str) for group in self.answers):
            raise RequestError(
                f"the answers of {prompt!r} must be a list of lists of alternatives; got {self.answers!r}"
            )
        groups = tuple(
            tuple(_text(answer, f"an answer of {prompt!r}") for answer in _items(group, f"an answer of {prompt!r}"))
            for group in _items(self.answers, f"the answers of {prompt!r}")
        )
        if not all(groups):
            raise RequestError(f"the answers of {prompt!r} hold a group without alternatives")
        object.__setattr__(self, "prompt", prompt)
        object.__setattr__(self, "answers", groups)

    def as_record(self) -> dict[str, Any]:
        """The question as JSON."""
        answers = [list(group) for group in self.answers]
        return {"prompt": self.prompt, "answers": answers} if answers else {"prompt": self.prompt}


@dataclass(frozen=True)
class Probe:
    """Questions that belong together, with how many of them must be answered.

    Raises RequestError for an unknown kind or condition, and without questions. Questions may be given as mappings.
    """

    kind: ProbeKind
    questions: tuple[Question, ...]
    name: str = ""
    """As the data set calls it, "Relation_Specificity" for example."""
    condition: Condition = "all"
    """How many of the questions must be answered for the probe to pass."""
    before: tuple[Question, ...] = ()
    """Questions that the unedited model must answer, or the probe does not count."""

    def __post_init__(self):
        for field, accepted in (("kind", get_args(ProbeKind)), ("condition", get_args(Condition))):
            if getattr(self, field) not in accepted:
                raise RequestError(f"a probe's {field} is one of {', '.join(accepted)}; got {getattr(self, field)!r}")
        if not isinstance(self.name, str):
            raise RequestError(f"a probe's name must be a text; got {self.name!r}")
        for field in ("questions", "before"):
            questions = (_question(value) for value in _items(getattr(self, field), f"a probe's {field}"))
            object.__setattr__(self, field, tuple(questions))
        if not self.questions:
            raise RequestError(f"a probe of kind {self.kind!r} has no questions")

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of the questions."""
        return tuple(question.prompt for question in self.questions)

    def texts(self) -> tuple[str, ...]:
        """Every prompt and answer."""
        asked = (*self.questions, *self.before)
        return tuple(text for one in asked for text in (one.prompt, *(a for group in one.answers for a in group)))

    def as_record(self) -> dict[str, Any]:
        """The probe as JSON, which `as_probe` reads; what has its default is left out."""
        record: dict[str, Any] = {"kind": self.kind, "questions": [one.as_record() for one in self.questions]}
        if self.name:
            record["name"] = self.name
        if self.condition != "all":
            record["condition"] = self.condition
        if self.before:
            record["before"] = [one.as_record() for one in self.before]
        return record


def as_probe(value: Any) -> Probe:
    """A probe, from one or from a mapping with its fields; raises RequestError for anything else."""
    if isinstance(value, Probe):
        return value
    fields = _fields(value, "a probe", ("kind", "questions"), ("name", "condition", "before"))
    return Probe(**fields)


def _question(value: Any) -> Question:
    if isinstance(value, Question):
        return value
    return Question(**_fields(value, "a question", ("prompt",), ("answers",)))


def _fields(value: Any, meaning: str, needed: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a mapping, without those that are None."""
    if not isinstance(value, Mapping):
        raise RequestError(f"{meaning} must be an object with {', '.join((*needed, *optional))}; got {value!r}")
    if unknown := [name for name in value if name not in (*needed, *optional)]:
        raise RequestError(f"{meaning} has no field {unknown[0]!r}: it has {', '.join((*needed, *optional))}")
    fields = {name: given for name, given in value.items() if given is not None}
    if missing := [name for name in needed if name not in fields]:
        raise RequestError(f"{meaning} has no {missing[0]!r}; it has {', '.join(map(str, value)) or 'nothing in it'}")
    return fields


def _items(value: Any, meaning: str) -> tuple[Any, ...]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise RequestError(f"{meaning} must be a list; got {value!r}")
    return tuple(value)


def _text(value: Any, meaning: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{meaning} must be a non-empty text; got {value!r}")
    return str(value)
