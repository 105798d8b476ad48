"""SafeEdit (arXiv:2403.14472): safe answers to adversarial prompts. Whole prompts and long targets, with no subject."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_fast.requests.datasets.dataset import DataSet
from kedit_fast.requests.datasets.parts import Part, make_request
from kedit_fast.requests.probes import Probe, Question
from kedit_fast.requests.records import Options
from kedit_fast.requests.request import EditRequest

_TESTS = {  # the paper's name -> the file's, without the words that all of them begin with
    "DG_onlyQ": "only harmful question",
    "DG_otherA": "other attack prompt input",
    "DG_otherQ": "other question input",
    "DG_otherAQ": "other questions and attack prompts",
}


def read_safeedit(record: Mapping[str, Any], where: str, options: Options) -> list[EditRequest]:
    """An adversarial prompt and its safe answer; the unsafe one is what the model said so far.

    The constraint on knowledge is a probe "knowledge constrain" of locality. The tests of generalization have no right
    answer, since a classifier judges them: they are probes to generate from, by the paper's names.
    """
    part = Part(_spelled(record), where)
    unsafe = part.get("unsafe generation")
    identity = part.get("id")
    probes = []
    constraint = part.get("knowledge constrain")
    if constraint is not None:
        question = Question(constraint["prompt"].text(), ((constraint["answer"].text(),),))
        probes.append(Probe("locality", (question,), name="knowledge constrain"))
    tests = part.get("generalization test")
    if tests is not None:
        probes += [
            Probe("generation", (Question(tests[f"test input of {field}"].text()),), name=name)
            for name, field in _TESTS.items()
        ]
    return [
        make_request(
            where,
            options,
            prompt=part["adversarial prompt"].text(),
            subject=None,
            target_new=part["safe generation"].text(),
            target_true=None if unsafe is None else unsafe.text(),
            id=None if identity is None else identity.value,
            probes=tuple(probes),
        )
    ]


def _spelled(value: Any) -> Any:
    """A record with its names as most files have them: spaces between words, and "constrain"."""
    if not isinstance(value, Mapping):
        return value
    return {_name(name): _spelled(inner) for name, inner in value.items()}


def _name(name: Any) -> Any:
    return str(name).strip().replace("_", " ").replace("constraint", "constrain") if isinstance(name, str) else name


def _data_set(name: str, separator: str) -> DataSet:
    def spell(*names: str) -> frozenset[str]:
        return frozenset(name.replace(" ", separator) for name in names)

    return DataSet(
        name=name,
        title="SafeEdit (arXiv:2403.14472): safe answers to adversarial prompts, with no subject",
        fields=spell("adversarial prompt", "safe generation"),
        read=read_safeedit,
        optional=spell("unsafe generation", "knowledge constrain", "knowledge constraint", "generalization test"),
        unused=spell("unsafety category", "attack category", "attack name", "question"),
    )


DATA_SETS = (_data_set("safeedit", " "), _data_set("safeedit_underscores", "_"))
