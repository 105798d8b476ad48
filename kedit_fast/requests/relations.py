"""Relations: which of them imply each other, and in which words a fact of one is said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedit_fast.errors import RequestError
from kedit_fast.support.textfiles import parse_json, parse_toml, read_text


@dataclass(frozen=True)
class RelationRules:
    """What follows from facts, by the ids of their relations; x r y is the fact that y is the r of x.

    Example:
        >>> PUBLISHED.extended(RelationRules.parse({"reverse": ["P26>P26"]})).reverse[-1]
        ('P26', 'P26')
    """

    reverse: tuple[tuple[str, str], ...] = ()
    """(r1, r2): x r1 y implies y r2 x."""
    composite: tuple[tuple[str, str, str], ...] = ()
    """(r1, r2, r3): x r1 y and y r2 z imply x r3 z."""

    @classmethod
    def parse(cls, table: Mapping[str, Any], where: str = "rules") -> RelationRules:
        """Rules from `{"reverse": ["P22>P40"], "composite": ["P40&P25>P26"]}`.

        Raises:
            RequestError: another name, or a rule that is not written so; it names `where`.
        """
        if unknown := sorted(set(table) - set(_FORMS)):
            raise RequestError(f"{where}: unknown name {unknown[0]!r}; rules are listed under {' and '.join(_FORMS)}")
        parsed: dict[str, Any] = {}
        for name, (form, example) in _FORMS.items():
            rules = table.get(name, [])
            if not isinstance(rules, list):
                raise RequestError(f'{where}: {name} must be a list of rules, such as ["{example}"]; got {rules!r}')
            matches = [form.fullmatch(rule) if isinstance(rule, str) else None for rule in rules]
            wrong = [rule for rule, match in zip(rules, matches, strict=True) if match is None]
            if wrong:
                raise RequestError(f'{where}: a rule under {name} is written "{example}"; got {wrong[0]!r}')
            parsed[name] = tuple(match.groups() for match in matches if match is not None)
        return cls(**parsed)

    @classmethod
    def load(cls, path: str | Path) -> RelationRules:
        """The rules of a TOML file; see `parse`.

        Raises:
            RequestError: the file cannot be read or holds something else.
        """
        return cls.parse(parse_toml(read_text(path, RequestError), str(path), RequestError), str(path))

    def extended(self, other: RelationRules) -> RelationRules:
        """These rules and those of `other`, each once."""
        return RelationRules(
            tuple(dict.fromkeys((*self.reverse, *other.reverse))),
            tuple(dict.fromkeys((*self.composite, *other.composite))),
        )


_ID = r"\s*([^\s&>]+)\s*"
_FORMS = {
    "reverse": (re.compile(f"{_ID}>{_ID}"), "P22>P40"),
    "composite": (re.compile(f"{_ID}&{_ID}>{_ID}"), "P40&P25>P26"),
}
PUBLISHED = RelationRules.parse(
    {
        "reverse": ["P22>P40", "P185>P184", "P25>P40", "P800>P170"],
        "composite": [
            "P40&P25>P26",
            "P25&P26>P22",
            "P39&P1001>P27",
            "P22&P40>P3373",
            "P40&P22>P26",
            "P22&P26>P25",
            "P800&P407>P1412",
        ],
    }
)
"""The rules of ConflictEdit (arXiv 2310.02129), by Wikidata's ids."""


def load_templates(paths: Iterable[str | Path]) -> dict[str, tuple[str, ...]]:
    """Relation -> its templates, each a phrase with one {} where the subject stands.

    Files are JSON of two kinds: an object that maps relations to lists of templates, as Pitfalls' conflict_prompts and
    round_prompts; or one relation with `name`, `prompt_templates` and `prompt_templates_zs`, as LRE's. Templates of one
    relation from several files are joined, each once. Text that is no template (without {}, or with several) is left
    out.

    Raises:
        RequestError: a file that cannot be read or holds something else, or a relation without any template.
    """
    gathered: dict[str, dict[str, None]] = {}
    for path in paths:
        value = parse_json(read_text(path, RequestError), str(path), RequestError)
        for name, templates in _relations_of(value, str(path)).items():
            usable = [" ".join(text.split()) for text in templates if text.count("{}") == 1 and text.strip() != "{}"]
            if not usable:
                raise RequestError(f"{path}: the relation {name!r} has no template with one {{}} for the subject")
            gathered.setdefault(name, {}).update(dict.fromkeys(usable))
    return {name: tuple(templates) for name, templates in gathered.items()}


def _relations_of(value: Any, path: str) -> dict[str, list[str]]:
    """Relation -> the templates that a file has for it."""
    relations: dict[Any, Any] = dict(value) if isinstance(value, Mapping) else {}
    if isinstance(name := relations.get("name"), str) and "prompt_templates" in relations:
        parts = [relations.get(field) or [] for field in ("prompt_templates", "prompt_templates_zs")]
        relations = {name: [text for part in parts for text in part] if all(map(_is_texts, parts)) else None}
    if not relations or not all(map(_is_texts, relations.values())):
        raise RequestError(
            f"{path} holds no templates: it must be an object that maps relations to lists of templates, or a relation "
            "with name and prompt_templates"
        )
    return relations


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
