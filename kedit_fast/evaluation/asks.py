"""What metrics ask of a model, and what it answers: each thing once, however many metrics need it.

An ask is a value: equal asks of several metrics are one. Prompts are texts; the engine makes tokens of them as editing
does (`kedit_fast.requests.prompts.continuation`), with the prompt format of the run unless an ask is `plain`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kedit_fast.models.head import Head
from kedit_fast.requests.spacing import AUTO


@dataclass(frozen=True)
class Forced:
    """How probable is a target after a prompt, when it is fed to the model token by token?"""

    prompt: str
    target: str
    separator: str = AUTO
    """What stands between prompt and target: "auto", " " or ""."""
    plain: bool = False
    """Whether the prompt is read as it stands, without the prompt format of the run."""
    special: bool = False
    """Whether the special tokens that the tokenizer puts before a text (BOS) are scored as the target's first ones, as
    published code does: the model reads the plain target, and the i-th of all these tokens is scored where the target's
    i-th one is, or would be."""


@dataclass(frozen=True)
class Generated:
    """How does the model continue a prompt by itself?"""

    prompt: str
    tokens: int
    """The largest number of tokens; generation also ends behind the end-of-text token, and where the model takes no
    more."""
    total: bool = False
    """Whether `tokens` counts those of the prompt, too."""
    top_k: int = 1
    """Tokens are drawn from the `top_k` most probable ones; 1 is greedy, with ties to the lowest id."""
    seed: int = 0
    """Of the draws; each prompt has its own generator, so that a text does not depend on what runs beside it."""
    stops: tuple[str, ...] = ()
    """Texts that end the generation; the text ends before the first of them."""
    plain: bool = False
    """Whether the prompt is read as it stands, without the prompt format of the run."""


@dataclass(frozen=True)
class Likelihood:
    """How probable is each token of a text after those before it?"""

    text: str
    max_tokens: int
    """The text is cut to so many tokens, those that the tokenizer adds in front included."""


@dataclass(frozen=True)
class Distributions:
    """What does the model expect at each position of a text? Answered by last states, to be compared between models."""

    text: str
    max_tokens: int
    """The text is cut to so many tokens, those that the tokenizer adds in front included."""
    last: bool = False
    """Whether the last position alone is asked for. The text is a prompt then: in the prompt format of the run, never
    cut, and without the special tokens that the tokenizer adds at its end."""
    answer: str = ""
    """What is fed behind the text, a prompt as above: the positions that predict it are asked for."""


@dataclass(frozen=True)
class RouteOf:
    """Which entry of the memory that is attached to the model answers for a prompt?"""

    text: str
    max_tokens: int = 0
    """The text, a natural one, is cut to so many tokens; 0: it is a prompt, in the prompt format of the run."""


Ask = Forced | Generated | Likelihood | Distributions | RouteOf


@dataclass(frozen=True)
class ForcedAnswer:
    """A target's tokens, their log probabilities, and what the model would have said instead."""

    tokens: tuple[int, ...]
    """Of the target."""
    log_probs: tuple[float, ...]
    """Natural logarithm of each token's probability."""
    top: tuple[int, ...]
    """The most probable token at each place; of equal ones the lowest id."""

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return -sum(self.log_probs) / len(self.log_probs)

    @property
    def hits(self) -> tuple[bool, ...]:
        """Whether each token of the target is the most probable one."""
        return tuple(a == b for a, b in zip(self.tokens, self.top, strict=True))


@dataclass(frozen=True)
class GeneratedAnswer:
    """What a model said."""

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    """The new ones, without an end-of-text token."""
    text: str
    """The new tokens as text without special tokens, up to a stop, as they continue the prompt: with the space before
    the first word, which tokenizers leave out that decode a text from its beginning."""
    ended: bool
    """Whether the model ended the text itself, or said one of the stops, before its tokens were used up."""


@dataclass(frozen=True)
class LikelihoodAnswer:
    """Of a text of n tokens, the tokens behind the first one and their log probabilities."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class DistributionsAnswer:
    """Last states of a model at the positions asked for, and the head that makes distributions of them."""

    states: torch.Tensor
    """[n, h], in the model's dtype, on the host."""
    head: Head


@dataclass(frozen=True)
class RouteAnswer:
    """What a memory decided."""

    route: int | None
    """The entry, -1 for none of them; None where no memory is attached."""


Answer = ForcedAnswer | GeneratedAnswer | LikelihoodAnswer | DistributionsAnswer | RouteAnswer
