"""MQuAKE: questions that take several facts, at least one of them edited. A case is a group of requests.

An answer is right if the model's greedy text begins with it, spelled exactly so, and the sentence or line ends there.
The paper asks in the form of examples, which a base model needs (`.few_shot`, with four examples of this package's);
otherwise a question is asked as the run's prompts are, so that a chat model gets it in its template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_fast.evaluation.asks import Answer, Ask, Generated
from kedit_fast.evaluation.catalog.generation import said
from kedit_fast.evaluation.catalog.wild import new_answers
from kedit_fast.evaluation.metric import Case, Derived, Metric, Prompts, Scoring
from kedit_fast.evaluation.words import begins_with
from kedit_fast.requests.probes import Question
from kedit_fast.requests.request import EditRequest

TOKENS = 30
CHAIN = "new_single_hops"
"""Name of the probe with the hops of the new chain that no request of the case writes."""
EXAMPLES = """\
Q: What is the capital of the country where the Eiffel Tower stands? A: Paris
Q: Which continent is the country of citizenship of Nelson Mandela on? A: Africa
Q: Who is the founder of the company that created Windows? A: Bill Gates
Q: What language is spoken in the country where Machu Picchu lies? A: Spanish
"""
Answers = Mapping[str, tuple[Answer, ...]]
_NOTEBOOK = "MQuAKE (arXiv:2305.14795), run_mello.ipynb"


def _questions(request: EditRequest) -> tuple[Case, ...]:
    return tuple(
        Case(question.prompt, answers=question.answers, name=probe.name, record=request, probe=probe)
        for probe in request.probes
        if probe.kind == "multi_hop"
        for question in probe.questions
        if any(question.answers)
    )


def _edit(request: EditRequest) -> tuple[Case, ...]:
    answers = (new_answers(request),)
    return (Case(request.text, request.target_new, request.target_true, answers, record=request),)


def _chain(request: EditRequest) -> tuple[Case, ...]:
    beside = tuple(
        Case(question.prompt, answers=question.answers, name=probe.name, record=request, probe=probe)
        for probe in request.probes
        if probe.name == CHAIN
        for question in probe.questions
        if any(question.answers)
    )
    return (*_edit(request), *beside)


def _said(text: str, answers: tuple[tuple[str, ...], ...]) -> bool:
    """Whether a text is one of the answers, of any group: the paper's questions have one group."""
    return any(begins_with(text, answer) for group in answers for answer in group)


def _short(prompt: str) -> Generated:
    return Generated(prompt, TOKENS, stops=("\n",))


def _asks(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return (_short(case.prompt),)


def _few_shot(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return (Generated(f"{EXAMPLES}Q: {case.prompt} A:", TOKENS, stops=("\n",), plain=True),)


def _score(case: Case, answers: Answers) -> float:
    return float(_said(said(answers["now"][0]), case.answers))


def _before(case: Case) -> tuple[Question, ...]:
    return () if case.probe is None else case.probe.before


def _with_hops(case: Case, tokenizer: Any) -> tuple[Ask, ...]:
    return (_short(case.prompt), *(_short(question.prompt) for question in _before(case)))


def _score_known(case: Case, answers: Answers) -> float | None:
    """Where the unedited model knows every hop of the old chain; a case without hops does not count."""
    hops = _before(case)
    known = zip(hops, answers["pre"][1:], strict=True)
    if not hops or not all(_said(said(answer), question.answers) for question, answer in known):
        return None
    return _score(case, answers)


PROMPTS = {
    "mquake.questions": Prompts("requests", _questions),
    "mquake.edits": Prompts("requests", _edit),
    "mquake.chain": Prompts("requests", _chain),
}
SCORINGS = {
    "mquake.said": Scoring(_asks, _score),
    "mquake.said.few_shot": Scoring(_few_shot, _score),
    "mquake.said.known": Scoring(_with_hops, _score_known, ("pre",)),
}
_SAID = "the greedy answer is the new answer or an alias, spelled exactly so"
METRICS: tuple[Metric | Derived, ...] = (
    Metric(
        "mquake.multi_hop",
        "mquake.questions",
        "mquake.said",
        f"Share of cases with a question, of its phrasings, to which {_SAID}.",
        f"{_NOTEBOOK}: Multi-hop acc",
        within="any",
        unit="group",
    ),
    Metric(
        "mquake.multi_hop.few_shot",
        "mquake.questions",
        "mquake.said.few_shot",
        "As mquake.multi_hop, with four questions and answers in front of each question, in no prompt format.",
        f"{_NOTEBOOK}: Multi-hop acc; the examples are this package's, not those of prompts/multihop-prompts.txt",
        within="any",
        unit="group",
    ),
    Metric(
        "mquake.multi_hop.known",
        "mquake.questions",
        "mquake.said.known",
        "As mquake.multi_hop, of the cases whose old hops the unedited model answers rightly, all of them.",
        "MQuAKE (arXiv:2305.14795): single_hops test whether a model has all facts of a chain",
        within="any",
        unit="group",
    ),
    Metric(
        "mquake.multi_hop_mean",
        "mquake.questions",
        "mquake.said",
        f"Share of the phrasings of a case's question to which {_SAID}; mean over cases.",
        f"{_NOTEBOOK}, without its stop at the first right one",
        unit="group",
    ),
    Metric(
        "mquake.edit_wise",
        "mquake.edits",
        "mquake.said",
        f"Share of edits where, after the edited prompt, {_SAID}.",
        "MQuAKE (arXiv:2305.14795): edit-wise success rate",
    ),
    Metric(
        "mquake.instance_wise",
        "mquake.edits",
        "mquake.said",
        f"Share of cases where, after every edited prompt of the case, {_SAID}.",
        "MQuAKE (arXiv:2305.14795): instance-wise accuracy, of the edited hops",
        within="all",
        unit="group",
    ),
    Metric(
        "mquake.instance_wise.chain",
        "mquake.chain",
        "mquake.said",
        f"Share of cases where, after every hop of the new chain, edited or not, {_SAID}.",
        "MQuAKE (arXiv:2305.14795): instance-wise accuracy, of all hops of the new chain",
        within="all",
        unit="group",
    ),
)
