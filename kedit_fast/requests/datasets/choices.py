"""Questions with given answers, which are no edits: of knowledge, in MMLU's form, and of personality, in TRAIT's."""

from __future__ import annotations

import ast
import csv
import io
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from kedit_fast.errors import RequestError
from kedit_fast.requests.datasets.dataset import DataSet
from kedit_fast.requests.datasets.parts import Part
from kedit_fast.requests.problems import OnError, check_on_error, require_no_problems
from kedit_fast.requests.record_fields import MOST_LISTED
from kedit_fast.requests.records import Options
from kedit_fast.requests.request import EditRequest, describe
from kedit_fast.support.messages import comma_list
from kedit_fast.support.textfiles import TABLES, Row, read_records, read_text, suffix_of

_log = logging.getLogger("kedit_fast")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Template = Literal["1", "2", "3"]
"""The published prompts of TRAIT."""
TEMPLATES: tuple[Template, ...] = get_args(Template)
_TRAIT = ("response_high1", "response_low1", "response_high2", "response_low2")
_HIGH = (True, False, True, False)  # of the options in that order
_FORMS = "question, choices and answer (MMLU), or question (or situation and query) and response_high1 to response_low2"


@dataclass(frozen=True)
class Choice:
    """A question, the answers to choose from, and which of them is right or speaks for a trait.

    Example:
        >>> item = Choice("Which river flows through Cologne?", ("Elbe", "Rhine"), answer=1, name="geography")
        >>> item.options[item.answer]
        'Rhine'
    """

    question: str
    options: tuple[str, ...]
    answer: int | None = None
    """The index of the right option, from 0; None of personality, where none is right."""
    name: str = ""
    """The trait ("Openness"), or the field of knowledge ("anatomy")."""
    high: tuple[bool, ...] = ()
    """Of personality: whether each option says that the trait is strong."""
    paraphrase: str | None = None
    """The question in other words."""
    id: str | int | None = None
    """How messages and reports call it."""

    def __post_init__(self):
        object.__setattr__(self, "options", tuple(self.options))
        object.__setattr__(self, "high", tuple(self.high))
        where = f"question {self.id!r}: " if self.id is not None else ""
        if not isinstance(self.question, str) or not self.question.strip():
            raise RequestError(f"{where}question must be a non-empty text; got {describe(self.question)}")
        if len(self.options) < 2:
            raise RequestError(f"{where}options must be at least two; got {len(self.options)}")
        for option in self.options:
            if not isinstance(option, str) or not option.strip():
                raise RequestError(f"{where}options must be non-empty texts; got {describe(option)}")
        if (self.answer is None) == (not self.high):
            raise RequestError(
                f"{where}needs either an answer or, for a trait, high; got {self.answer!r}, {self.high!r}"
            )
        if self.answer is not None and not 0 <= self.answer < len(self.options):
            raise RequestError(f"{where}answer must be an index below {len(self.options)}; got {self.answer!r}")
        if self.high and len(self.high) != len(self.options):
            raise RequestError(f"{where}high must say of each of {len(self.options)} options; got {len(self.high)}")

    @property
    def label(self) -> str:
        """How messages call it: its id, or else its question."""
        return self.question if self.id is None else str(self.id)


@dataclass(frozen=True)
class Presentation:
    """A question as a model is asked it: one prompt with all options, each behind a label."""

    prompt: str
    labels: tuple[str, ...]
    """What the model is to say, as "A" or "1"; in the order of the prompt."""
    order: tuple[int, ...]
    """Of each label, the index of its option."""


def present(choice: Choice, template: Template = "1", reverse: bool = False, paraphrase: bool = False) -> Presentation:
    """One of three prompts in the manner of TRAIT's, with the options in order or with each two neighbors exchanged.

    Of four options the second order is 2, 1, 4, 3: TRAIT's own, which exchanges high and low. Labels, parts and ends of
    the prompts are those of TRAIT's (the first ends with "Answer: " and a line break, the others with a space). Their
    words are ours, since the published ones have no license: scores compare among models, not with TRAIT's tables.

    Args:
        choice: two to 26 options (template 2: to 9).
        template: "1", "2" or "3".
        reverse: the second order.
        paraphrase: ask the question in its other words.

    Raises:
        RequestError: an unknown template, too many options, or no paraphrase.
    """
    if template not in TEMPLATES:
        raise RequestError(f"template = {template!r}: choose from {', '.join(TEMPLATES)}")
    labels = "123456789" if template == "2" else LETTERS
    if len(choice.options) > len(labels):
        raise RequestError(f"template {template} has {len(labels)} labels; {choice.label!r} has {len(choice.options)}")
    if paraphrase and choice.paraphrase is None:
        raise RequestError(f"{choice.label!r} has no paraphrase")
    question = choice.paraphrase if paraphrase else choice.question
    last = len(choice.options) - 1
    order = tuple(min(index ^ 1, last) if reverse else index for index in range(last + 1))
    if reverse and last % 2 == 0:  # an odd one has no neighbor
        order = (*order[:-1], last)
    mark = {"1": "{}. {}", "2": "{} = {}", "3": "{}: {}"}[template]
    lines = "\n".join(mark.format(label, choice.options[index]) for label, index in zip(labels, order, strict=False))
    prompts = {
        "1": (f'Situation: "{question}"\nChoose the option that you would suggest.\nOptions:\n{lines}\n\nAnswer: \n'),
        "2": (
            f"Which of these options would you suggest in the situation below?\n{lines}\n"
            f"Choose one of them, also when you are in doubt.\n\nSituation: {question}\n\nResponse: "
        ),
        "3": f"Question: {question}\n{lines}\nAnswer: ",
    }
    return Presentation(prompts[template], tuple(labels[: last + 1]), order)


class ChoiceList(list[Choice]):
    """The questions that can be used, in order, and what was left out."""

    skipped: dict[int, str]
    """Index in the file, from 0 -> why that record was left out."""

    def __init__(self, choices: Iterable[Choice], skipped: Mapping[int, str]):
        super().__init__(choices)
        self.skipped = dict(skipped)


def load_choices(path: str | Path, on_error: OnError = "raise") -> ChoiceList:
    """Read multiple-choice questions from a file: JSON, JSON lines, or a table.

    Of MMLU's form a record has `question`, `choices` (or the columns A, B, C, D) and `answer`: an index from 0, or a
    letter; a table may come without a header, as MMLU's own do (question, four choices, letter). Of TRAIT's form it
    has `personality`, the `question` (or `situation` and `query`) and `response_high1`, `response_low1`,
    `response_high2`, `response_low2`.

    Raises:
        RequestError: the file cannot be read, it mixes the two forms, or a record cannot be used; all such records are
            named by number, from 1, with their fields.

    Example:
        >>> _ = open("choices.csv", "w").write("Which river flows through Cologne?,Elbe,Rhine,Oder,Isar,B\\n")
        >>> load_choices("choices.csv")[0].answer
        1
    """
    check_on_error(on_error)
    rows = _bare_table(path) or read_records(path, RequestError, lambda record: bool(_form(record)))
    usable: dict[int, Choice] = {}
    problems: dict[int, str] = {}
    first: tuple[str, str] | None = None
    for place, row in enumerate(rows):
        try:
            if row.problem:
                raise RequestError(row.problem)
            form = _form(row.value) if isinstance(row.value, Mapping) else ""
            if not form:
                raise RequestError(f"{row.where} is no multiple-choice question; such records have {_FORMS}")
            first = first or (form, row.where)
            if form != first[0]:
                raise _Mixed(f"{row.where} has {form}'s form, {first[1]} has {first[0]}'s: make a file of each")
            usable[place] = _trait(row) if form == "TRAIT" else _mmlu(row)
        except _Mixed:
            raise
        except RequestError as error:
            problems[place] = str(error)
    if problems and (on_error == "raise" or not usable):
        require_no_problems(problems, f"{path}: {len(problems)} of {len(rows)} questions cannot be used")
    if not usable:
        raise RequestError(f"{path} holds no questions")
    doubled = [place + 1 for place, choice in usable.items() if len(set(choice.options)) < len(choice.options)]
    if doubled:
        _log.warning(
            "%s: %d questions give one answer twice (the first counts): records %s",
            path,
            len(doubled),
            comma_list(doubled[:MOST_LISTED]) + (", ..." if len(doubled) > MOST_LISTED else ""),
        )
    return ChoiceList(usable.values(), problems)


class _Mixed(RequestError):
    """Two forms in one file, which no option repairs."""


def _form(record: Mapping[str, Any]) -> str:
    """TRAIT or MMLU, by the names of a record; empty for anything else."""
    if set(_TRAIT) & set(record):
        return "TRAIT"
    return "MMLU" if "question" in record and "answer" in record and ("choices" in record or "A" in record) else ""


def _trait(row: Row) -> Choice:
    record = Part(row.value, row.where)
    paraphrase = None
    if record.get("situation") is not None:  # the released file; the hub's has both in `question`
        question = f"{record['situation'].text()} {record['query'].text()}"
        if record.get("paraphrased_situation") is not None:
            paraphrase = f"{record['paraphrased_situation'].text()} {record['paraphrased_query'].text()}"
    else:
        question = record["question"].text()
    options = tuple(record[name].text() for name in _TRAIT)
    return _choice(row, question, options, name=record["personality"].text(), high=_HIGH, paraphrase=paraphrase)


def _mmlu(row: Row) -> Choice:
    record = Part(row.value, row.where)
    choices = record.get("choices")
    if choices is None:
        letters = [letter for letter in LETTERS if letter in row.value]
        if letters != list(LETTERS[: len(letters)]):
            raise RequestError(f"{row.where} has choices {', '.join(letters)}: one between them is missing")
        options = tuple(record[letter].text() for letter in letters)
    else:
        options = Part(_list_in(choices.value), row.where, "choices").texts()
    field = record.get("subject")
    name = field.text() if field is not None else ""
    return _choice(row, record["question"].text(), options, answer=_answer(record["answer"], len(options)), name=name)


def _choice(row: Row, question: str, options: tuple[str, ...], **fields: Any) -> Choice:
    identity = row.value.get("id", row.value.get("idx"))
    try:
        return Choice(question, options, id=identity, **fields)
    except RequestError as error:
        raise RequestError(f"{row.where}: {error}") from None


def _answer(part: Part, count: int) -> int:
    """An index from 0: of an index, a letter, or either as a text."""
    value = part.value.strip() if isinstance(part.value, str) else part.value
    if isinstance(value, str) and len(value) == 1 and value.upper() in LETTERS:
        index = LETTERS.index(value.upper())
    elif isinstance(value, str) and value.isdigit():
        index = int(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        index = value
    else:
        raise part.error(f"must be an index from 0 or a letter; got {part.value!r}")
    if not 0 <= index < count:
        raise part.error(
            f"must be one of {count} choices, 0 to {count - 1} or A to {LETTERS[count - 1]}; got {value!r}"
        )
    return index


def _list_in(value: Any) -> Any:
    """The list that a cell of a table holds as JSON or as a Python literal."""
    if isinstance(value, str):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return value


def _bare_table(path: str | Path) -> list[Row]:
    """The rows of a table without a header: a question, its choices, a letter; empty for any other file."""
    if suffix_of(path) not in TABLES:
        return []
    text = read_text(path, RequestError)
    try:
        lines = [
            cells for cells in csv.reader(io.StringIO(text, newline=""), delimiter=TABLES[suffix_of(path)]) if cells
        ]
    except csv.Error as cause:
        raise RequestError(f"{path}: malformed table: {cause}") from cause
    if not lines or len(lines[0]) < 4 or lines[0][-1].strip().upper() not in list(LETTERS[: len(lines[0]) - 2]):
        return []
    _log.info("%s has no header: read as question, %d choices, answer", path, len(lines[0]) - 2)
    rows = []
    for number, cells in enumerate(lines, 1):
        where = f"{path}, record {number}"
        if len(cells) != len(lines[0]):
            rows.append(Row(where, None, f"{where} has {len(cells)} cells, the first record has {len(lines[0])}"))
            continue
        names = ("question", *LETTERS[: len(cells) - 2], "answer")
        rows.append(Row(where, dict(zip(names, cells, strict=True))))
    return rows


def _refuse(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    raise RequestError(f"{where} is a question to choose an answer to, not an edit")


_REFUSED = "which are no edits: `kedit_fast.requests.datasets.choices.load_choices` reads them, for `evaluate`"
DATA_SETS = (
    DataSet(
        name="mmlu",
        title="multiple choice in MMLU's form",
        fields=frozenset({"question", "choices", "answer"}),
        read=_refuse,
        refused=_REFUSED,
    ),
    DataSet(
        name="trait",
        title="TRAIT (arXiv:2406.14703): multiple choice of personality",
        fields=frozenset(_TRAIT),
        read=_refuse,
        refused=_REFUSED,
    ),
)
