"""TuningRecipe: what makes a method without a closed form, as a record of what the tuning loop combines.

Such a method tunes one matrix by gradient steps. Its result replaces the weight, or it stays beside the weights as a
memory.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kedit_fast.errors import MethodError

TunedPlace = Literal["edited", "located"]
Trained = Literal["weight", "residual", "value"]
ExtraRows = Literal["none", "irrelevant", "general"]
Likelihood = Literal["target", "last"]
ExtraTerm = Literal["none", "margin", "kl"]
Optimizer = Literal["sgd", "adam"]
Mask = Literal["none", "entries", "features"]
Order = Literal["depth", "breadth", "codebook"]
TuningStop = Literal["plateau", "below and skip", "below", "used up"]
Placement = Literal["in place", "replaces", "adds", "token"]
Decoding = Literal["sampled", "greedy"]
Router = Literal["none", "activation", "fingerprint", "nearest key"]
_ROUTERS: dict[str, str] = {
    "in place": "none",
    "replaces": "activation",
    "adds": "fingerprint",
    "token": "nearest key",
}


@dataclass(frozen=True)
class TuningRecipe:
    """How a matrix is tuned, and where the result is put.

    Raises:
        MethodError: a field names no strategy, or two fields contradict each other.
    """

    where: TunedPlace = "edited"
    """Which matrix is tuned: the edited one of the layer that hyper-parameters name, or that of the layer in which two
    answers of a request differ most (DINM)."""
    trains: Trained = "weight"
    """What the steps change: the weight, from the model's; a matrix beside it, from 0 (MEMOIR); or the output of the
    layer at one token (GRACE)."""
    extra_rows: ExtraRows = "none"
    """Rows beside those of the request: "irrelevant" texts, or "general" prompts with the model's answers."""
    eos: bool = False
    """Whether the end-of-text token is trained as the last token of each target, unless `train_end` is false."""
    likelihood: Likelihood = "target"
    """The likelihood of targets: of each token after those before it, or of all tokens from the last prompt token's
    distribution (FT-L)."""
    extra_term: ExtraTerm = "none"
    """A term beside the likelihood: WISE's activation margin, or the KL divergence at general prompts."""
    optimizer: Optimizer = "adam"
    """What takes a step. Each new request has a new one, in breadth-first order each call."""
    mask: Mask = "none"
    """What steps may change: everything, a random part of the entries, or the columns of a request's features."""
    order: Order = "depth"
    """A request after another, each to its stop; epochs of mini-batches of all requests; or entries of a codebook."""
    stop: TuningStop = "below"
    """When steps end before the last: "plateau", a small loss that no longer changes; "below" a loss; "below and skip",
    the same of an epoch's mean, and mini-batches below it take no step; or when they are "used up"."""
    placement: Placement = "in place"
    """Where the result is put: into the weight; or beside the weights, where it "replaces" the matrix, "adds" to its
    output, or stands at a "token"."""
    router: Router = "none"
    """What decides whether a text is answered with what stands beside the weights."""
    decoding: Decoding = "sampled"
    """How the model writes context prefixes: memit's sampled ones that end in ". ", or WISE's greedy ones."""

    def __post_init__(self):
        for field, accepted in _choices().items():
            if getattr(self, field) not in accepted:
                raise MethodError(
                    f"tuning recipe: {field} = {getattr(self, field)!r}: choose from {', '.join(map(repr, accepted))}"
                )
        agreements = {
            "placement and router": _ROUTERS[self.placement] == self.router,
            "extra_rows and extra_term": self.extra_term == {"irrelevant": "margin", "general": "kl"}.get(
                self.extra_rows, "none"
            ) or (self.extra_rows == "irrelevant" and self.extra_term == "none"),
            "order and trains": (self.order == "codebook") == (self.trains == "value"),
            "trains and placement": (self.trains == "weight") == (self.placement in ("in place", "replaces")),
            "trains and mask": (self.trains == "residual") == (self.mask == "features"),
        }  # fmt: skip
        for names, agree in agreements.items():
            if not agree:
                first, _, second = names.split()
                raise MethodError(
                    f"tuning recipe: {first} = {getattr(self, first)!r} does not go with "
                    f"{second} = {getattr(self, second)!r}"
                )

    @property
    def makes_memory(self) -> bool:
        """Whether the result stays beside the weights, which do not change."""
        return self.placement != "in place"

    @property
    def locates_layers(self) -> bool:
        """Whether each request is written in the layer that it points to, among those that hyper-parameters name."""
        return self.where == "located"

    @property
    def steps_weight(self) -> bool:
        """Whether steps change a matrix, instead of the output at one token."""
        return self.trains != "value"

    @property
    def uses_irrelevant_texts(self) -> bool:
        """Whether texts that have nothing to do with the edits take part."""
        return self.extra_rows == "irrelevant" or self.router == "fingerprint"

    def as_dict(self) -> dict[str, Any]:
        """Every field, as `kedit-fast methods --json` prints it."""
        return asdict(self)


@functools.cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """Field -> the values that its type accepts."""
    hints = get_type_hints(TuningRecipe)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
