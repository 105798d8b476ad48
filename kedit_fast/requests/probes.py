"""What else is asked of a model after an edit, beside the request's own prompts: as the data set has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProbeKind = Literal[
    "paraphrase", "neighborhood", "locality", "portability", "generation", "tied", "multi_hop", "conflict", "reference"
]
"""paraphrase: the edited fact in other words; neighborhood, locality: facts that must stay; portability: what follows
from the edit; generation: prompts to continue freely; tied: facts that hang on the old answer; multi_hop: questions
over several facts; conflict: passages that say something else; reference: texts about the new answer, each the prompt
of a question, that what the model writes is compared with ("consistency"), or about the subject ("essence")."""


@dataclass(frozen=True)
class Question:
    """A prompt and its right answers."""

    prompt: str
    answers: tuple[tuple[str, ...], ...] = ()
    """Groups of alternatives: of each group any alternative must be said, and all groups must be met."""


@dataclass(frozen=True)
class Probe:
    """Questions that belong together, with how many of them must be answered."""

    kind: ProbeKind
    questions: tuple[Question, ...]
    name: str = ""
    """As the data set calls it, "Relation_Specificity" for example."""
    condition: Literal["all", "any"] = "all"
    """How many of the questions must be answered for the probe to pass."""
    before: tuple[Question, ...] = ()
    """Questions that the unedited model must answer, or the probe does not count."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of the questions."""
        return tuple(question.prompt for question in self.questions)
