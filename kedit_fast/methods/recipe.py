"""Recipe: what makes a method, as a record of the strategies that the editor combines.

A field names a strategy; the room that runs strategies of this kind looks the name up in a registry of its own. Other
readers ask the capabilities of a recipe (`is_batched`, `keeps_state`, ...) and compare no names.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kedit_fast.errors import MethodError
from kedit_fast.methods.tuning_recipe import TuningRecipe

ValueSites = Literal["block", "mlp", "attention and mlp", "gradients", "none"]
KeyWeights = Literal["bare_half", "mean"]
Schedule = Literal["mass", "single", "gradients", "tuning"]
PreconditionerKind = Literal["covariance", "null_space", "identity"]
Constraint = Literal["ridge", "soft_equality", "equality"]
ValueKey = Literal["bare", "mean"]
Anchor = Literal["subject", "target"]
Spread = Literal["linear", "sqrt", "none"]
Shaping = Literal["none", "rect", "prune"]
StopRule = Literal["below_loss", "pmet"]
NormalizerKind = Literal["standard", "whitened"]

_OPTIMIZED = ("block", "mlp", "attention and mlp")
_VALUES_OF: dict[str, tuple[str, ...]] = {"gradients": ("gradients",), "tuning": ("none",)}
# How the field `rho` of `kedit-fast methods --json` names a constraint.
_RHO = {"ridge": "one", "soft_equality": "emmet_lambda", "equality": "equality"}


@dataclass(frozen=True)
class Recipe:
    """An editing method: the strategies of its closed form, or how it tunes a matrix.

    Raises:
        MethodError: a field names no strategy, or two fields contradict each other.
    """

    name: str
    """How users call the method."""
    title: str
    """The method in half a sentence."""
    source: str
    """The paper, with its arXiv number."""
    preset: str
    """Name of the preset file. Methods that differ in the solve alone share one."""
    values: ValueSites = "block"
    """Outputs whose values are optimized: of the block, of its MLP, or of attention and MLP together. With "gradients"
    nothing is optimized: gradients of the loss stand in for values. "none" of methods that tune a matrix."""
    key_weights: KeyWeights = "bare_half"
    """How a key is averaged over contexts: half the bare prompt and half the mean of the others, or the plain mean."""
    schedule: Schedule = "mass"
    """Order of a batch: "mass", all requests at once and layer after layer; "single", one request at a time in one
    layer; "gradients", all requests at once and all modules from one backward pass; "tuning", by gradient steps."""
    preconditioner: PreconditionerKind = "covariance"
    """S of the equation: lambda C + lambda_n I; P / L2 as S^-1, with P the projector on the null space of C; or I."""
    constraint: Constraint = "ridge"
    """How closely outputs match values: "ridge", rho = 1; "soft_equality", rho = emmet_lambda; "equality", exactly."""
    memory: bool = False
    """Whether the keys of earlier batches stay in the system."""
    value_key: ValueKey = "bare"
    """Of rank-one methods, the key at which the layer puts out the value: the bare prompt's, or the mean key."""
    spread: Spread = "linear"
    """Share of the residual that a layer takes when n layers are left: 1 / n, 1 / sqrt(n), or all of it."""
    merge: bool = False
    """Whether requests on one subject share one value and one key."""
    shaping: Shaping = "none"
    """What an update goes through: "rect" writes its largest relative changes alone; "prune" restrains the singular
    values of the total update after the last batch."""
    stop_rule: StopRule = "below_loss"
    """When a value is done before its last iteration: once its loss is below v_stop_loss; or by PMET's rule, which
    eases the likelihood after every target was right and ends at a small KL divergence."""
    anchor: Anchor = "subject"
    """Where keys and values are taken: at the subject's last token, or at the token before each chunk of the target."""
    normalizer: NormalizerKind = "standard"
    """Of gradient methods, what the running normalizer does to gradients: "standard" divides each feature by its
    deviation; "whitened" multiplies them by the inverse square root of their covariance."""
    contexts: tuple[tuple[int, int], ...] = ((10, 5),)
    """(tokens, count) of the generated context prefixes, as published."""
    keeps: str = "nothing"
    """What is kept between batches beside the ledger, in words."""
    tuning: TuningRecipe | None = None
    """How a matrix is tuned, of methods without a closed form."""

    def __post_init__(self):
        for field, accepted in _choices().items():
            if getattr(self, field) not in accepted:
                raise MethodError(
                    f"recipe {self.name!r}: {field} = {getattr(self, field)!r}: choose from "
                    + ", ".join(map(repr, accepted))
                )
        agreements = {
            "schedule and values": self.values in _VALUES_OF.get(self.schedule, _OPTIMIZED),
            "schedule and tuning": (self.schedule == "tuning") == (self.tuning is not None),
            "schedule and constraint": (self.schedule == "single") == (self.constraint == "equality"),
            "schedule and spread": self.schedule == "mass" or self.spread == "none",
            "schedule and memory": self.schedule == "mass" or not self.memory,
            "schedule and anchor": self.schedule == "mass" or self.anchor == "subject",
            "merge and anchor": not self.merge or self.anchor == "subject",
            "schedule and normalizer": self.schedule == "gradients" or self.normalizer == "standard",
        }
        for fields, agree in agreements.items():
            if not agree:
                first, _, second = fields.split()
                raise MethodError(
                    f"recipe {self.name!r}: {first} = {getattr(self, first)!r} does not go with "
                    f"{second} = {getattr(self, second)!r}"
                )

    @property
    def is_batched(self) -> bool:
        """Whether all requests of a batch are written at once, instead of one after another."""
        return self.schedule != "single"

    @property
    def edits_one_layer(self) -> bool:
        """Whether the method writes a single layer."""
        return self.schedule == "single" or (self.tuning is not None and not self.tuning.locates_layers)

    @property
    def optimizes_values(self) -> bool:
        """Whether values are found by gradient descent; others gather gradients, or tune a matrix."""
        return self.values in _OPTIMIZED

    @property
    def gathers_gradients(self) -> bool:
        """Whether gradients of the loss stand in for values."""
        return self.schedule == "gradients"

    @property
    def makes_memory(self) -> bool:
        """Whether edits stay beside the weights, which do not change."""
        return self.tuning is not None and self.tuning.makes_memory

    @property
    def fits_memit_values(self) -> bool:
        """Whether its values are of the kind that memit's npz files hold: one a request of a batch, at the block."""
        return self.is_batched and self.values == "block" and self.anchor == "subject"

    @property
    def needs_subject(self) -> bool:
        """Whether a request must say where its subject stands. Gradients are of whole prompts."""
        return self.optimizes_values and self.anchor == "subject"

    @property
    def guards_subjects(self) -> bool:
        """Whether the value loop has a term that keeps what the model says of the subject."""
        return self.optimizes_values and self.anchor == "subject"

    @property
    def needs_chunks(self) -> bool:
        """Whether values stand before chunks of the target, so that the length of a chunk must be given."""
        return self.anchor == "target"

    @property
    def chunk_obstacle(self) -> str:
        """Why a request cannot have a value for each chunk of its target; "" where it can."""
        if not self.optimizes_values:
            return (
                "it takes a gradient at every token of a target" if self.tuning is None else "it tunes on whole targets"
            )
        if self.schedule == "single":
            return "it writes one key and one value of each request"
        return "requests on one subject share one value" if self.merge else ""

    @property
    def weighs_requests(self) -> bool:
        """Whether a batch is a least-squares problem over its requests, in which each can have a weight."""
        return self.schedule == "mass"

    @property
    def runs_model_after_write(self) -> bool:
        """Whether the model runs once more after the last write of a batch, to measure the residual."""
        return self.schedule == "mass"

    @property
    def keeps_state(self) -> bool:
        """Whether something beside the ledger is kept between batches: keys, or a running normalizer."""
        return self.memory or self.schedule == "gradients"

    @property
    def whitens_gradients(self) -> bool:
        """Whether gradients are multiplied by the inverse square root of their covariance."""
        return self.normalizer == "whitened"

    @property
    def uses_statistics(self) -> bool:
        """Whether the preconditioner is made from second moments."""
        return self.preconditioner != "identity"

    @property
    def uses_covariance(self) -> bool:
        """Whether S is the weighted second moment."""
        return self.preconditioner == "covariance"

    @property
    def weighs_outputs(self) -> bool:
        """Whether its solve can weigh what a change does to a layer's outputs: S is the weighted second moment, all
        requests of a batch are solved at once, and what is solved is written as it is."""
        return self.uses_covariance and self.schedule == "mass" and self.shaping == "none"

    @property
    def uses_null_space(self) -> bool:
        """Whether updates stay in the null space of the second moment."""
        return self.preconditioner == "null_space"

    @property
    def softens_equality(self) -> bool:
        """Whether a hyper-parameter says how closely outputs match values."""
        return self.constraint == "soft_equality"

    @property
    def masks_updates(self) -> bool:
        """Whether a part of an update's entries is written alone, so that its rank is not that of the solve."""
        return self.shaping == "rect"

    @property
    def restrains_total(self) -> bool:
        """Whether a last step changes the total of all updates, so that these must be there one by one."""
        return self.shaping == "prune"

    def values_on(self, post_norm: bool) -> ValueSites:
        """Where values are optimized on a model with or without a norm between the MLP and the residual sum.

        No write can produce a value that lies behind a norm. The output of the MLP, in front of the norm, can be
        produced.
        """
        return "mlp" if self.values == "block" and post_norm else self.values

    def as_dict(self) -> dict[str, Any]:
        """Every field, as `kedit-fast methods --json` prints it.

        `schedule` tells there whether a batch is written at once, and `rho` is the older name of the constraint.
        """
        schedule = "tuning" if self.tuning is not None else "mass" if self.is_batched else "single"
        return {**asdict(self), "schedule": schedule, "rho": _RHO[self.constraint]}


@functools.cache
def _choices() -> dict[str, tuple[str, ...]]:
    """Field -> the values that its type accepts."""
    hints = get_type_hints(Recipe)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
