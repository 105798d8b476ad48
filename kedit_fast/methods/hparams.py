"""Hyper-parameters. Each is declared once: its default, the values it takes, what it means, who reads it and what it
identifies. Validation, warnings of unused ones, the keys of stored values and states, `kedit-fast methods --json` and
the table of this room's page follow from the declarations.

To add one, add a field to `Hparams`, or to `TuningHparams` for methods that tune a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from kedit_fast.errors import MethodError
from kedit_fast.methods.declaration import (
    ANY,
    AT_LEAST_ONE,
    AUTO,
    BOOLEAN,
    INNER_SHARE,
    LESS_THAN_ONE,
    NOT_NEGATIVE,
    NOT_NEGATIVE_OR_AUTO,
    POSITIVE,
    POSITIVE_OR_AUTO,
    SHARE,
    Auto,
    Declaration,
    Identity,
    Range,
    declare,
)
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.registry import find_recipe
from kedit_fast.methods.tuning_hparams import TUNING_NAMES, TuningHparams

NullSpaceRule = Literal["absolute", "relative", "energy"]
FactorDtype = Literal["float64", "float32"]
MemoryForm = Literal["auto", "dual", "primal"]
GradientRows = Literal["mask", "ans"]
OnBadPivot = Literal["raise", "skip", "allow"]
OnPredicted = Literal["error", "allow"]
KlDirection = Literal["edited", "original"]
ValuesDtype = Literal["model", "bfloat16"]


def _optimizing(recipe: Recipe) -> bool:
    return recipe.optimizes_values


def _gradient(recipe: Recipe) -> bool:
    return recipe.gathers_gradients


def _stepping(recipe: Recipe) -> bool:
    return recipe.gathers_gradients or recipe.tuning is not None


def _closed_form(recipe: Recipe) -> bool:
    return recipe.tuning is None


def _batched(recipe: Recipe) -> bool:
    return recipe.is_batched and recipe.tuning is None


def _whitening(recipe: Recipe) -> bool:
    return recipe.whitens_gradients


def _rank_one(recipe: Recipe) -> bool:
    return not recipe.is_batched


def _weighing_covariance(recipe: Recipe) -> bool:
    return recipe.uses_covariance and recipe.is_batched


def _scaling(recipe: Recipe) -> bool:
    return _weighing_covariance(recipe) or _null_space(recipe)


def _covariance(recipe: Recipe) -> bool:
    return recipe.uses_covariance


def _statistics(recipe: Recipe) -> bool:
    return recipe.uses_statistics


def _null_space(recipe: Recipe) -> bool:
    return recipe.uses_null_space


def _memory(recipe: Recipe) -> bool:
    return recipe.memory


def _undoing(recipe: Recipe) -> bool:
    return not recipe.restrains_total


def _soft_equality(recipe: Recipe) -> bool:
    return recipe.softens_equality


def _guarding(recipe: Recipe) -> bool:
    return recipe.guards_subjects


def _chunking(recipe: Recipe) -> bool:
    return not recipe.chunk_obstacle


def _weighing(recipe: Recipe) -> bool:
    return recipe.weighs_requests


def _weighing_outputs(recipe: Recipe) -> bool:
    return recipe.weighs_outputs


def _masking(recipe: Recipe) -> bool:
    return recipe.masks_updates


def _repeating(recipe: Recipe) -> bool:
    return recipe.weighs_requests and not recipe.masks_updates


@dataclass(frozen=True)
class Hparams(TuningHparams):
    """The hyper-parameters of a method. Names are those of the memit repository's files.

    Raises:
        MethodError: a value that the method does not accept, naming the hyper-parameter.
    """

    method: str
    layers: tuple[int, ...] = field(
        metadata=declare(
            Range("at least one layer, or inner_params"),
            "edited layers, zero-based; the value is optimized at the last one",
            identifies=("state",),
        )
    )
    v_num_grad_steps: int = field(
        default=0,
        metadata=declare(
            AT_LEAST_ONE,
            "iterations of the value loop; the last one measures the loss and takes no step",
            read_by=_optimizing,
            identifies=("value",),
        ),
    )
    v_lr: float | Auto = field(
        default=0.0,
        metadata=declare(
            POSITIVE_OR_AUTO,
            'learning rate of Adam in the value loop; "auto" is v_lr_scale times the root mean square of h0',
            read_by=_optimizing,
            identifies=("value",),
        ),
    )
    v_lr_scale: float = field(
        default=0.5,
        metadata=declare(
            POSITIVE,
            'with v_lr = "auto", the learning rate as a multiple of the root mean square of h0 at the value\'s site',
            read_by=_optimizing,
            identifies=("value",),
            only_with=("v_lr",),
        ),
    )
    v_weight_decay: float | Auto = field(
        default=0.0,
        metadata=declare(
            NOT_NEGATIVE_OR_AUTO,
            'weight of the loss term |delta| / |h0|^2; "auto" is 0.005 |h0|, so that the term has no scale',
            read_by=_optimizing,
            identifies=("value",),
        ),
    )
    clamp_norm_factor: float | Auto = field(
        default=0.0,
        metadata=declare(
            POSITIVE_OR_AUTO,
            'largest |delta|, as a multiple of |h0|; "auto" is the first of 0.75, 1, 2 and 4 with which the median '
            "loss of the first batch's values ends at 0.5 or below",
            read_by=_optimizing,
            identifies=("value",),
        ),
    )
    kl_factor: float = field(
        default=0.0,
        metadata=declare(
            NOT_NEGATIVE,
            'weight of the KL divergence at "{subject} is a"',
            read_by=_guarding,
            identifies=("value",),
        ),
    )
    kl_temperature: float = field(
        default=1.0,
        metadata=declare(
            POSITIVE,
            "temperature T of both distributions of the KL term, which is then multiplied by T^2; 1 as published",
            read_by=_guarding,
            identifies=("value",),
            off=1.0,
        ),
    )
    kl_direction: KlDirection = field(
        default="edited",
        metadata=declare(
            Range.choices(KlDirection),
            "whose distribution the KL term is averaged over: the edited model's, KL(p_delta, p_0), as published; or "
            "the original one's, KL(p_0, p_delta), as in distillation",
            read_by=_guarding,
            identifies=("value",),
            off="edited",
        ),
    )
    mom2_adjustment: bool = field(
        default=True,
        metadata=declare(
            BOOLEAN,
            "whether S is made from the second moment C; with false S = I and no statistics are needed",
            read_by=_statistics,
            identifies=("state",),
        ),
    )
    mom2_update_weight: float | Auto = field(
        default=0.0,
        metadata=declare(
            POSITIVE_OR_AUTO,
            'lambda, the weight of C in S; "auto" gives each layer the lambda of residual_share',
            read_by=_weighing_covariance,
            identifies=("state",),
        ),
    )
    residual_share: float = field(
        default=0.2,
        metadata=declare(
            INNER_SHARE,
            'with mom2_update_weight or L2 = "auto", the share of its residual that an edit alone leaves undone, in '
            "the median over the first batch",
            read_by=_scaling,
            identifies=("state",),
            only_with=("mom2_update_weight", "L2"),
        ),
    )
    mom2_ridge: float = field(
        default=0.0,
        metadata=declare(
            NOT_NEGATIVE,
            "ridge added to C, as a multiple of its mean diagonal",
            read_by=_covariance,
            identifies=("state",),
        ),
    )
    update_norm_lambda: float | Auto = field(
        default=0.0,
        metadata=declare(
            NOT_NEGATIVE_OR_AUTO,
            'ENCORE\'s lambda_n in S = lambda C + lambda_n I; "auto" is 0.1 lambda times the geometric mean of the '
            "eigenvalues of C",
            read_by=_covariance,
            identifies=("state",),
        ),
    )
    output_metric: bool = field(
        default=False,
        metadata=declare(
            BOOLEAN,
            "whether a change of a layer's outputs costs what the model notices of it; needs statistics of outputs",
            read_by=_weighing_outputs,
            identifies=("state",),
            off=False,
        ),
    )
    metric_mix: float = field(
        default=0.1,
        metadata=declare(
            SHARE,
            "share of the identity in the output metric; with 1 there is none",
            read_by=_weighing_outputs,
            identifies=("state",),
            part_of="output_metric",
        ),
    )
    emmet_lambda: float = field(
        default=0.1,
        metadata=declare(
            NOT_NEGATIVE, "EMMET's softness of the equality constraints; 0 makes them exact", read_by=_soft_equality
        ),
    )
    L2: float | Auto = field(
        default=10.0,
        metadata=declare(
            POSITIVE_OR_AUTO,
            'ridge of AlphaEdit\'s solve; "auto" gives each layer the ridge of residual_share',
            read_by=_null_space,
            identifies=("state",),
        ),
    )
    nullspace_threshold: float = field(
        default=2e-2,
        metadata=declare(
            POSITIVE,
            "bound of the eigenvalues of C below which their directions are null space",
            read_by=_null_space,
            identifies=("state",),
        ),
    )
    nullspace_rule: NullSpaceRule = field(
        default="absolute",
        metadata=declare(
            Range.choices(NullSpaceRule),
            "meaning of the threshold: an eigenvalue, a share of the largest one, or a share of the energy",
            read_by=_null_space,
            identifies=("state",),
        ),
    )
    factor_dtype: FactorDtype = field(
        default="float64",
        metadata=declare(
            Range.choices(FactorDtype),
            "dtype of the factor of S; float32 takes half the memory and has a bounded error",
            read_by=_covariance,
            identifies=("state",),
        ),
    )
    memory_form: MemoryForm = field(
        default="auto",
        metadata=declare(
            Range.choices(MemoryForm),
            "system of earlier keys: dual (n x n) or primal (d x d); the update is the same",
            read_by=_memory,
        ),
    )
    memory_window: int = field(
        default=0,
        metadata=declare(
            NOT_NEGATIVE,
            "how many batches can be undone, 0 for all; of older ones sums alone are held, so that no number of "
            "batches fills the memory. The updates are the same",
            read_by=_undoing,
            identifies=("state",),
            off=0,
        ),
    )
    rect_keep: float = field(
        default=0.4, metadata=declare(SHARE, "share of the entries that RECT writes", read_by=_masking)
    )
    frobenius_limit: float = field(
        default=0.0,
        metadata=declare(
            NOT_NEGATIVE,
            "largest |Delta| / |W| of a write, reached by scaling; 0 for no limit",
            read_by=_closed_form,
        ),
    )
    spectral_limit: float = field(
        default=0.0,
        metadata=declare(
            NOT_NEGATIVE,
            "largest ratio of the largest singular values of Delta and W, reached by clipping; 0 for no limit",
            read_by=_closed_form,
        ),
    )
    sphere_strength: float = field(
        default=0.0,
        metadata=declare(
            Range("0 to 1", lambda value: 0 <= value <= 1),
            "SPHERE's alpha: share of an update that is taken away along the main directions of the weight's rows; 0 "
            "for none",
            read_by=_batched,
        ),
    )
    sphere_energy: float = field(
        default=0.5,
        metadata=declare(
            INNER_SHARE,
            "SPHERE's eta: share of the rows' energy that makes directions main ones",
            read_by=_batched,
            part_of="sphere_strength",
        ),
    )
    inner_params: tuple[str, ...] = field(
        default=(),
        metadata=declare(
            Range("paths of modules"),
            "modules that UltraEdit edits; empty for the edited module of each layer",
            read_by=_gradient,
            identifies=("state",),
        ),
    )
    lr: float = field(
        default=0.0,
        metadata=declare(
            POSITIVE, "factor of UltraEdit's gradients; learning rate of methods that tune", read_by=_stepping
        ),
    )
    ridge: float = field(
        default=1.0,
        metadata=declare(
            POSITIVE, "ridge of the solve over the tokens of a batch, (H^T H + ridge I)^-1", read_by=_gradient
        ),
    )
    whitening_floor: float = field(
        default=1e-6,
        metadata=declare(
            POSITIVE,
            "least eigenvalue of the covariance of StableEdit's gradients; the published 1e-6 is for gradients of the "
            "mean loss of ten requests, which are a tenth of those here",
            read_by=_whitening,
        ),
    )
    token: GradientRows = field(
        default="mask",
        metadata=declare(
            Range.choices(GradientRows),
            "tokens whose gradients UltraEdit takes: of prompt and answer (mask), or of the answer alone (ans)",
            read_by=_gradient,
            identifies=("state",),
        ),
    )
    v_stop_loss: float = field(
        default=0.05,
        metadata=declare(
            ANY, "loss below which a value takes no further step", read_by=_optimizing, identifies=("value",)
        ),
    )
    context_template_length_params: tuple[tuple[int, int], ...] = field(
        default=(),
        metadata=declare(
            Range("pairs of numbers"),
            "(tokens, count) of the generated context prefixes",
            identifies=("state",),
        ),
    )
    norm_anchor: float | Auto = field(
        default=0.0,
        metadata=declare(
            NOT_NEGATIVE_OR_AUTO,
            "norm that the MLP's part of every value is scaled to at its site; an edit of more than twice the norm is "
            'dropped; "auto" is measured on the unedited model; 0 for no anchor',
            read_by=_optimizing,
            identifies=("state",),
            off=0.0,
        ),
    )
    rounds: int = field(
        default=1,
        metadata=declare(
            AT_LEAST_ONE,
            "how often a batch is written at most: keys and solves are repeated for requests that are not reached",
            read_by=_repeating,
            off=1,
        ),
    )
    round_share: float = field(
        default=0.1,
        metadata=declare(
            LESS_THAN_ONE,
            "a request is reached once its residual |z - h| is at most this share of its first one",
            read_by=_repeating,
            part_of="rounds",
        ),
    )
    round_least: float = field(
        default=0.0,
        metadata=declare(
            NOT_NEGATIVE,
            "residual |z - h| up to which a request counts as reached, in the first round, too (NSE's alpha)",
            read_by=_repeating,
        ),
    )
    round_most: float = field(
        default=0.0,
        metadata=declare(
            NOT_NEGATIVE,
            "residual |z - h| from which a request is not written in a round (NSE's upper_bound); 0 for no bound",
            read_by=_repeating,
        ),
    )
    neighbor_columns: int = field(
        default=0,
        metadata=declare(
            NOT_NEGATIVE,
            "neighborhood prompts of each request whose keys stand in the system with a residual of 0, so that their "
            "outputs stay; the first ones count",
            read_by=_weighing,
        ),
    )
    on_bad_pivot: OnBadPivot = field(
        default="raise",
        metadata=declare(
            Range.choices(OnBadPivot),
            "what rank-one methods do with a request whose pivot is bad",
            read_by=_rank_one,
        ),
    )
    on_predicted: OnPredicted = field(
        default="error",
        metadata=declare(
            Range.choices(OnPredicted),
            "what happens to a target that the model says already: an error, or a value without a delta, as published",
            read_by=_optimizing,
        ),
    )
    values_batch: int = field(
        default=0,
        metadata=declare(
            NOT_NEGATIVE,
            "requests optimized together, 0 for what memory allows (on a CPU at most 64); the result is the same",
            read_by=_optimizing,
        ),
    )
    check_every: int = field(
        default=0,
        metadata=declare(
            NOT_NEGATIVE,
            "iterations between checks of which values are done; 0 for 1 on a CPU, 4 on a GPU; the result is the same",
            read_by=_optimizing,
        ),
    )
    values_graph: bool = field(
        default=False,
        metadata=declare(
            BOOLEAN,
            "whether iterations are replayed as a CUDA graph (tested on a GPU, not timed); the result is the same",
            read_by=_optimizing,
        ),
    )
    values_dtype: ValuesDtype = field(
        default="model",
        metadata=declare(
            Range.choices(ValuesDtype),
            "dtype of blocks' matrices in iterations of the value loop: the model's, or bfloat16 copies on GPUs and "
            "processors with AMX, an approximation; what is stored and written stays in the model's",
            read_by=_optimizing,
            identifies=("value",),
            off="model",
        ),
    )
    most_probable_steps: int = field(
        default=0,
        metadata=declare(
            NOT_NEGATIVE,
            "ENCORE's stop this many steps after all target tokens are the most probable ones; 0 for no such stop",
            read_by=_optimizing,
            identifies=("value",),
        ),
    )
    chunk_tokens: int = field(
        default=0,
        metadata=declare(
            NOT_NEGATIVE,
            "target tokens of a chunk: each chunk has a key and a value at the token before it, found in order while "
            "those of earlier chunks stay; 0 for one value of the whole target, at the subject",
            read_by=_chunking,
            identifies=("value",),
            off=0,
        ),
    )
    chunk_overlap: int = field(
        default=0,
        metadata=declare(
            NOT_NEGATIVE,
            "tokens that a chunk shares with the one before it, fewer than chunk_tokens",
            read_by=_chunking,
            identifies=("value",),
            off=0,
        ),
    )
    keep_other_tokens: bool = field(
        default=False,
        metadata=declare(
            BOOLEAN,
            "whether a batch's update must leave the layer's outputs at all other tokens of prompt and target as they "
            "are: columns without a residual in the batch's system alone",
            read_by=_weighing,
        ),
    )
    v_loss_layer: int = field(
        default=-1,
        metadata=declare(
            Range("-1 or the last layer"),
            "layer after which the loss is taken, as in the published files; only the last one is implemented",
        ),
    )

    def __post_init__(self):
        recipe = find_recipe(self.method)
        if not self.layers and not self.inner_params:
            raise self._out_of_range("layers", DECLARATIONS["layers"].accepted.description)
        if self.inner_params and not reads(recipe, "inner_params"):
            raise self._out_of_range("inner_params", "empty: the method edits one module per layer")
        if recipe.uses_null_space and not self.mom2_adjustment:
            raise self._out_of_range("mom2_adjustment", "true: a null space is that of a second moment")
        if self.undo_window and recipe.memory and self.memory_form == "dual":
            raise self._out_of_range("memory_form", "auto or primal with memory_window: a window folds older keys")
        if self.mom2_update_weight == AUTO and self.update_norm_lambda not in (0, AUTO):
            raise self._out_of_range("update_norm_lambda", f'0 or "{AUTO}" where mom2_update_weight is "{AUTO}"')
        for name, declaration in DECLARATIONS.items():
            optional = declaration.is_required and not declaration.read_by(recipe)
            value = getattr(self, name)
            if not optional and not declaration.accepted.contains(value):
                raise self._out_of_range(name, declaration.accepted.description)
            if isinstance(value, float) and math.isinf(value):
                raise self._out_of_range(name, "finite")
        if self.round_most and self.round_least >= self.round_most and reads(recipe, "round_least"):
            raise self._out_of_range("round_least", f"below round_most, {self.round_most:g}, or no request is written")
        if recipe.edits_one_layer and len(self.layers) != 1:
            raise MethodError(f"{self.method} edits one layer; got layers {', '.join(map(str, self.layers))}")
        self._check_chunks(recipe)

    def _check_chunks(self, recipe: Recipe) -> None:
        """Raise MethodError where targets cannot be taken in chunks, or not in these."""
        if recipe.needs_chunks and not self.chunk_tokens:
            raise self._out_of_range("chunk_tokens", "at least 1; more than the longest target for one chunk")
        if self.chunk_tokens and (obstacle := recipe.chunk_obstacle):
            raise MethodError(f"{self.method} cannot write a target in chunks (chunk_tokens): {obstacle}")
        if self.keep_other_tokens and not reads(recipe, "keep_other_tokens"):
            raise MethodError(
                f"{self.method} cannot keep the outputs at other tokens (keep_other_tokens): it has no system of a "
                "batch's requests"
            )
        if self.chunk_overlap and self.chunk_overlap >= self.chunk_tokens:
            raise self._out_of_range("chunk_overlap", f"below chunk_tokens, {self.chunk_tokens}")
        if self.chunk_tokens and self.kl_factor and reads(recipe, "kl_factor"):
            raise self._out_of_range(
                "kl_factor", "0 with chunk_tokens: the value of a chunk stands before it, not at the subject"
            )

    def _out_of_range(self, name: str, accepted: str) -> MethodError:
        return MethodError(
            f"hyper-parameter {name} = {getattr(self, name)!r} is out of range for {self.method}: it must be {accepted}"
        )

    @property
    def uses_statistics(self) -> bool:
        """Whether statistics of the edited layers are needed: second moments, or those of outputs."""
        return self.uses_moments or self.weighs_outputs or self.constrains_curvature

    @property
    def uses_moments(self) -> bool:
        """Whether second moments of the edited layers' inputs are needed."""
        return self.mom2_adjustment and find_recipe(self.method).uses_statistics

    @property
    def constrains_curvature(self) -> bool:
        """Whether steps stay where the loss of ordinary text is flat: statistics of inputs and outputs are needed."""
        return self.curvature_energy > 0 and reads(find_recipe(self.method), "curvature_energy")

    @property
    def undo_window(self) -> int:
        """`memory_window` of a method that reads it; 0, no window, of others."""
        return self.memory_window if reads(find_recipe(self.method), "memory_window") else 0

    @property
    def weighs_outputs(self) -> bool:
        """Whether statistics of the edited layers' outputs are needed, for the output metric."""
        return self.output_metric and reads(find_recipe(self.method), "output_metric")

    @property
    def scale_name(self) -> str | None:
        """The hyper-parameter that scales S of each layer, where it is "auto": a batch's keys decide it; else None."""
        recipe = find_recipe(self.method)
        name = "L2" if recipe.uses_null_space else "mom2_update_weight"
        return name if reads(recipe, name) and getattr(self, name) == AUTO else None

    def has_effect(self, name: str) -> bool:
        """Whether a hyper-parameter has an effect beside the others: some need another one that is on, or "auto"."""
        return not self.lacks(name)

    def lacks(self, name: str) -> str:
        """What a hyper-parameter lacks to have an effect beside the others, in words; empty where it has one."""
        known, recipe = DECLARATIONS.get(name), find_recipe(self.method)
        if known is None:
            return ""
        if known.part_of:
            value = getattr(self, known.part_of)
            if not reads(recipe, known.part_of) or not value or value == DECLARATIONS[known.part_of].off:
                return known.part_of
        if known.only_with and not any(reads(recipe, o) and getattr(self, o) == AUTO for o in known.only_with):
            return f'{" or ".join(known.only_with)} = "{AUTO}"'
        return ""

    def identity(self, part: Identity) -> dict[str, Any]:
        """Name -> value of the hyper-parameters that identify a stored value, or a stored state.

        Those that are off are not among them.
        """
        recipe = find_recipe(self.method)
        return {
            name: getattr(self, name)
            for name, known in DECLARATIONS.items()
            if part in known.identifies and self.has_effect(name) and getattr(self, name) != known.off
            if name not in TUNING_NAMES or reads(recipe, name)  # older files hold those of all closed forms
        }


DECLARATIONS: Mapping[str, Declaration] = {
    known.name: Declaration(
        name=known.name, default=None if known.default is MISSING else known.default, **known.metadata
    )
    for known in sorted(fields(Hparams), key=lambda known: known.name in TUNING_NAMES)
    if known.name != "method"
}
"""Name -> declaration of every hyper-parameter, in the order of the fields; those of `TuningHparams` last."""


def reads(recipe: Recipe, name: str) -> bool:
    """Whether a method reads a hyper-parameter. Unknown names count as read: whoever parses them refuses them."""
    return name not in DECLARATIONS or DECLARATIONS[name].read_by(recipe)


def unused(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """The hyper-parameters among `names` that a method does not read."""
    return sorted(name for name in names if not reads(recipe, name))


PUBLISHED_UNUSED = ("mom2_update_weight", "kl_factor")
"""Names that files of other frameworks contain for methods that do not read them, too."""


def worth_a_warning(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """The hyper-parameters among `names` that neither the method reads nor its own published files contain.

    Of the methods that do not read one of `PUBLISHED_UNUSED`, AlphaEdit and AnyEdit have published files that do.
    """
    published = PUBLISHED_UNUSED if recipe.uses_null_space or recipe.needs_chunks else ()
    return [name for name in unused(recipe, names) if name not in published]


def describe(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Name -> default, range and meaning of every hyper-parameter that a method reads.

    The default is None where a preset or the caller must give a value.
    """
    return {
        name: {
            "default": None if known.is_required else known.default,
            "range": known.accepted.description,
            "meaning": known.meaning,
        }
        for name, known in DECLARATIONS.items()
        if known.read_by(recipe)
    }
