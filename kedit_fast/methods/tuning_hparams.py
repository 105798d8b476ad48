"""The hyper-parameters of methods that tune a matrix by gradient steps, a part of `Hparams`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

from kedit_fast.methods.declaration import (
    ANY,
    AT_LEAST_ONE,
    BOOLEAN,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Range,
    declare,
)
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.tuning_recipe import TuningRecipe

Reduction = Literal["request", "published"]
DecayEntries = Literal["masked", "weight"]
MergeRule = Literal["ties", "magnitude", "magnitude_norm", "sign", "mean"]
ThresholdTokens = Literal["prompt", "all"]
RouteOrder = Literal["farthest", "published"]
FirstValue = Literal["cold", "warm"]
Replacement = Literal["replace_last", "replace_all", "replace_prompt"]
Expansion = Literal["coverage", "moving_average"]
LabelRule = Literal["ids", "mean"]
LocatedTokens = Literal["valid", "padded"]
TunedUnits = Literal["published", "relative"]


def _tuned(holds: Callable[[TuningRecipe], bool]) -> Callable[[Recipe], bool]:
    return lambda recipe: recipe.tuning is not None and holds(recipe.tuning)


_any = _tuned(lambda tuning: True)
_breadth = _tuned(lambda tuning: tuning.order == "breadth")
_stopping = _tuned(lambda tuning: tuning.stop != "used up")
_plateau = _tuned(lambda tuning: tuning.stop == "plateau")
_unmasked = _tuned(lambda tuning: tuning.mask == "none" and tuning.steps_weight)
_masked = _tuned(lambda tuning: tuning.mask == "entries")
_boxed = _tuned(lambda tuning: tuning.trains == "weight")
_decaying = _tuned(lambda tuning: tuning.optimizer == "sgd")
_activation = _tuned(lambda tuning: tuning.router == "activation")
_margin = _tuned(lambda tuning: tuning.extra_term == "margin")
_fingerprint = _tuned(lambda tuning: tuning.router == "fingerprint")
_nearest = _tuned(lambda tuning: tuning.router == "nearest key")
_in_units = _tuned(lambda tuning: tuning.router in ("nearest key", "activation"))
_general = _tuned(lambda tuning: tuning.extra_term == "kl")
_ending = _tuned(lambda tuning: tuning.eos)
_located = _tuned(lambda tuning: tuning.locates_layers)
_per_target = _tuned(lambda tuning: tuning.likelihood == "target" and tuning.steps_weight)


@dataclass(frozen=True, kw_only=True)
class TuningHparams:
    """Names are those of EasyEdit's files where they have one."""

    num_steps: int = field(
        default=0,
        metadata=declare(
            AT_LEAST_ONE,
            "steps of a request at most; in breadth-first order, epochs at most",
            read_by=_any,
            identifies=("state",),
        ),
    )
    minibatch: int = field(
        default=100,
        metadata=declare(AT_LEAST_ONE, "requests of a mini-batch", read_by=_breadth, identifies=("state",)),
    )
    train_end: bool = field(
        default=True,
        metadata=declare(
            BOOLEAN,
            "whether the end-of-text token is trained behind each target, as published; without it a model runs on "
            "after its answer, with it ordinary text ends where an answer would",
            read_by=_ending,
            identifies=("state",),
        ),
    )
    stop_loss: float = field(
        default=1e-2,
        metadata=declare(ANY, "loss below which no further step is taken", read_by=_stopping, identifies=("state",)),
    )
    stop_change: float = field(
        default=1e-4,
        metadata=declare(
            NOT_NEGATIVE,
            "change of the loss from one step to the next up to which a loss below stop_loss ends a request",
            read_by=_plateau,
            identifies=("state",),
        ),
    )
    weight_decay: float = field(
        default=0.0,
        metadata=declare(
            NOT_NEGATIVE, "share of an entry that a step of size 1 takes away", read_by=_decaying, identifies=("state",)
        ),
    )
    decay_entries: DecayEntries = field(
        default="masked",
        metadata=declare(
            Range.choices(DecayEntries),
            "entries that decay: those that steps may change, or all of the weight, as in the released code",
            read_by=_decaying,
            identifies=("state",),
        ),
    )
    norm_constraint: float = field(
        default=0.0,
        metadata=declare(
            NOT_NEGATIVE,
            "how far an entry may go from the original one; 0 for any distance",
            read_by=_boxed,
            identifies=("state",),
        ),
    )
    reduction: Reduction = field(
        default="request",
        metadata=declare(
            Range.choices(Reduction),
            "what the loss of a target of T tokens is divided by: T, or T + 1 as in WISE's released code",
            read_by=_per_target,
            identifies=("state",),
        ),
    )
    curvature_energy: float = field(
        default=0.0,
        metadata=declare(
            Range("0, or between 0 and 1", lambda value: 0 <= value < 1),
            "share of the curvature's energy whose directions steps must not touch (CrispEdit); needs statistics of "
            "inputs and outputs; 0 for no constraint",
            read_by=_unmasked,
            identifies=("state",),
            off=0.0,
        ),
    )
    mask_ratio: float = field(
        default=0.2,
        metadata=declare(
            SHARE, "share of the entries that the edits of a shard may change", read_by=_masked, identifies=("state",)
        ),
    )
    save_freq: int = field(
        default=500,
        metadata=declare(
            AT_LEAST_ONE,
            "edits of a shard, after which a new matrix begins",
            read_by=_activation,
            identifies=("state",),
        ),
    )
    merge_freq: int = field(
        default=1000,
        metadata=declare(
            AT_LEAST_ONE, "edits after which the last shards are merged", read_by=_activation, identifies=("state",)
        ),
    )
    merge_alg: MergeRule = field(
        default="ties",
        metadata=declare(Range.choices(MergeRule), "how shards are merged", read_by=_activation, identifies=("state",)),
    )
    merge_density: float = field(
        default=0.53,
        metadata=declare(
            SHARE,
            "share of the entries that a shard takes into a merge, the largest changes; below mask_ratio, or it "
            "removes nothing",
            read_by=_activation,
            identifies=("state",),
        ),
    )
    retrieve: bool = field(
        default=True,
        metadata=declare(
            BOOLEAN,
            "whether merged matrices stay apart and a text is answered by one of them; with false they become one",
            read_by=_activation,
            identifies=("state",),
        ),
    )
    act_margin: tuple[float, ...] = field(
        default=(5.0, 20.0, 10.0),
        metadata=declare(
            Range("three numbers of 0 or above", lambda value: len(value) == 3 and min(value) >= 0),
            "alpha, beta and gamma: activation distance of irrelevant texts at most, of the edit at least, and between "
            "both at least",
            read_by=_margin,
            identifies=("state",),
        ),
    )
    act_ratio: float = field(
        default=0.88,
        metadata=declare(
            POSITIVE,
            "share of the smallest activation distance of edits from which on a text is answered by the memory",
            read_by=_activation,
            identifies=("state",),
        ),
    )
    threshold_tokens: ThresholdTokens = field(
        default="prompt",
        metadata=declare(
            Range.choices(ThresholdTokens),
            "tokens of the edits' rows whose activation distance makes the threshold: of the prompt, as the router "
            "sees it, or all, as in the released code",
            read_by=_activation,
            identifies=("state",),
        ),
    )
    route_order: RouteOrder = field(
        default="farthest",
        metadata=declare(
            Range.choices(RouteOrder),
            "which memory answers: the farthest of those over their threshold, or the released code's comparison",
            read_by=_activation,
            identifies=("state",),
        ),
    )
    top_k: int = field(
        default=0,
        metadata=declare(
            NOT_NEGATIVE,
            "features of a request: columns that it may change; 0 for a share, top_share",
            read_by=_fingerprint,
            identifies=("state",),
        ),
    )
    top_share: float = field(
        default=0.2857,
        metadata=declare(
            SHARE,
            "with top_k = 0, features of a request as a share of the layer's inputs; published are 4,096 of 14,336",
            read_by=_fingerprint,
            identifies=("state",),
        ),
    )
    irr_threshold: float = field(
        default=0.4,
        metadata=declare(
            SHARE,
            "share of the features of an edit that a text must have to be answered by the memory",
            read_by=_fingerprint,
            identifies=("state",),
        ),
    )
    grad_clip: float = field(
        default=1.0,
        metadata=declare(
            NOT_NEGATIVE, "largest norm of a gradient; 0 for any", read_by=_fingerprint, identifies=("state",)
        ),
    )
    eps: float = field(
        default=1.0,
        metadata=declare(POSITIVE, "radius of a new key", read_by=_nearest, identifies=("state",)),
    )
    val_init: FirstValue = field(
        default="cold",
        metadata=declare(
            Range.choices(FirstValue),
            "where a new value starts: at random between 0 and 1, or at the layer's output",
            read_by=_nearest,
            identifies=("state",),
        ),
    )
    replacement: Replacement = field(
        default="replace_last",
        metadata=declare(
            Range.choices(Replacement),
            "tokens whose output becomes the value: the last one of the prompt, all, or those of the prompt before it",
            read_by=_nearest,
            identifies=("state",),
        ),
    )
    eps_expand: Expansion = field(
        default="coverage",
        metadata=declare(
            Range.choices(Expansion),
            "what happens to a key that a request with the same target extends: its radius grows, or it moves, too",
            read_by=_nearest,
            identifies=("state",),
        ),
    )
    units: TunedUnits = field(
        default="published",
        metadata=declare(
            Range.choices(TunedUnits),
            "units of lr and of eps or act_margin: those of the model's states, as published; or relative ones, which "
            "have no scale: of GRACE a new key's distance from the mean input in unrelated texts and the root mean "
            "square of the layer's output, of WISE the mean norm of activated outputs and the squared ratio of outputs "
            "to inputs in unrelated texts",
            read_by=_in_units,
            identifies=("state",),
            off="published",
        ),
    )
    label_rule: LabelRule = field(
        default="ids",
        metadata=declare(
            Range.choices(LabelRule),
            "when two requests have the same target: the same tokens, or the same mean of ids, as in the released code",
            read_by=_nearest,
            identifies=("state",),
        ),
    )
    edit_factor: float = field(
        default=0.1,
        metadata=declare(
            POSITIVE, "weight of the likelihood beside the KL term", read_by=_general, identifies=("state",)
        ),
    )
    kl_gradient: bool = field(
        default=True,
        metadata=declare(
            BOOLEAN,
            "whether the KL term has a gradient; false as in DINM's released code, where it changes nothing",
            read_by=_general,
            identifies=("state",),
        ),
    )
    located_tokens: LocatedTokens = field(
        default="valid",
        metadata=declare(
            Range.choices(LocatedTokens),
            "tokens of both answers that locate the layer: theirs, or padding, too, as in the released code",
            read_by=_located,
            identifies=("state",),
        ),
    )
    suffix_system_prompt: str = field(
        default="",
        metadata=declare(
            ANY, "text that stands after every prompt while it is tuned", read_by=_general, identifies=("state",)
        ),
    )


TUNING_NAMES = frozenset(known.name for known in fields(TuningHparams))
"""The names of these hyper-parameters."""
