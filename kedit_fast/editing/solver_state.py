"""The linear systems of one editor: a preconditioner a layer, and what a method keeps between batches.

A batch solves layer after layer; `commit` keeps what it found once everything is written, `settle` forgets it and goes
back to an earlier number of batches, to the bit. What is kept can be saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kedit_fast._version import __version__
from kedit_fast.editing.gradients import ModuleGradients
from kedit_fast.errors import EditError, StatisticsError
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.recipe import Recipe
from kedit_fast.models.view import ModelView
from kedit_fast.solver.key_memory import Appended, KeyMemory
from kedit_fast.solver.least_squares import merge_columns, rank_one_equality, solve_update
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.solver.normalizer import Normalizer, gradient_update
from kedit_fast.solver.preconditioner import Covariance, Identity, NullSpace, Preconditioner
from kedit_fast.solver.shaping import limit_norm, limit_spectrum, spectral_norm
from kedit_fast.statistics.collect import Statistics
from kedit_fast.support.files import read_file, write_file

FORMAT_VERSION = "1"
# Numbers that a saved state depends on.
_STATE_NUMBERS = (
    "mom2_adjustment", "mom2_update_weight", "mom2_ridge", "update_norm_lambda", "L2", "nullspace_threshold",
    "nullspace_rule", "factor_dtype", "token", "context_template_length_params",
)  # fmt: skip


@dataclass
class _Found:
    """What the open batch adds to the state."""

    appended: dict[int, Appended] = field(default_factory=dict)  # by layer
    normalizers: dict[str, Normalizer] = field(default_factory=dict)  # by shape of module


@dataclass(frozen=True)
class _Before:
    """What the state was before a batch."""

    batches: dict[int, int]  # of the key memories, by layer
    normalizers: dict[str, Normalizer]


class SolverState:
    """Solves of one method on one model.

    Args:
        view: the model.
        recipe: the method.
        hparams: its numbers.
        statistics: second moments; None where the method uses none.
        null_spaces: of layers, to take instead of those of the statistics.
    """

    def __init__(
        self,
        view: ModelView,
        recipe: Recipe,
        hparams: Hparams,
        statistics: Statistics | None,
        null_spaces: Mapping[int, NullSpace] | None = None,
    ):
        self.view, self.recipe, self.hparams, self.statistics = view, recipe, hparams, statistics
        self._given = dict(null_spaces or {})
        self.memories: dict[int, KeyMemory] = {}
        self.normalizers: dict[str, Normalizer] = {}
        self._preconditioners: dict[int, Preconditioner] = {}
        self._history: list[_Before] = []  # one for each batch that was committed
        self._open = _Found()

    def preconditioner(self, layer: int) -> Preconditioner:
        """S^-1 of a layer, factored on first use and kept.

        Raises:
            StatisticsError: statistics that are missing, of the wrong shape, not finite, not positive definite, rank
                deficient, or without a null space; naming the layer.
        """
        if layer not in self._preconditioners:
            try:
                self._preconditioners[layer] = self._made(layer)
            except StatisticsError as error:
                raise StatisticsError(f"layer {layer}: {error}") from None
        return self._preconditioners[layer]

    def _made(self, layer: int) -> Preconditioner:
        weight, numbers = self.view.weight(layer), self.hparams
        size, device = weight.shape[1], weight.device
        scale = numbers.mom2_update_weight if self.recipe.is_batched else 1.0
        if self.recipe.preconditioner == "identity":
            return Identity(size, device)
        if not numbers.mom2_adjustment:
            return Identity(size, device, scale + numbers.update_norm_lambda)
        if layer in self._given:
            given = self._given[layer]
            if given.size != size:
                raise StatisticsError(f"its null space is of {given.size} dimensions, the weight takes {size} inputs")
            return replace(given, basis=given.basis.to(device), l2=float(numbers.L2))
        assert self.statistics is not None
        moment = self.statistics.moment(layer).moment
        if tuple(moment.shape) != (size, size):
            raise StatisticsError(
                f"statistics are {list(moment.shape)}, {self.view.weight_name(layer)} takes {size} inputs"
            )
        moment = moment.to(device)
        if self.recipe.uses_null_space:
            return NullSpace.from_covariance(moment, numbers.nullspace_threshold, numbers.nullspace_rule, numbers.L2)
        return Covariance.from_moment(
            moment, numbers.mom2_ridge, weight=scale, norm_lambda=numbers.update_norm_lambda,
            dtype=getattr(torch, numbers.factor_dtype),
        )  # fmt: skip

    def mass(
        self,
        layer: int,
        keys: torch.Tensor,
        residuals: torch.Tensor,
        weights: torch.Tensor | None = None,
        groups: Sequence[str] | None = None,
    ) -> LowRankUpdate:
        """The update of one layer for keys [d, u] and residuals [out, u].

        Args:
            layer: the layer.
            keys, residuals: K and R, the residual already spread.
            weights: of the edits [u], or None.
            groups: requests with the same name share one column, or None.
        """
        device = self.view.weight(layer).device
        keys, residuals = keys.to(device), residuals.to(device)
        if groups is not None:
            if weights is not None:
                weights = merge_columns(keys, weights[None].to(keys), groups)[1][0]
            keys, residuals = merge_columns(keys, residuals, groups)
        preconditioner = self.preconditioner(layer)
        if not self.recipe.memory:
            rho = self.hparams.emmet_lambda if self.recipe.softens_equality else 1.0
            return solve_update(
                keys, residuals, preconditioner, rho, weights=None if weights is None else weights.to(device)
            )
        if layer not in self.memories:
            self.memories[layer] = KeyMemory(preconditioner, self.hparams.memory_form)
        update, self._open.appended[layer] = self.memories[layer].solve(keys, residuals, weights)
        return update

    def single(
        self, layer: int, key_update: torch.Tensor, key_value: torch.Tensor, residual: torch.Tensor
    ) -> tuple[LowRankUpdate | None, float]:
        """The rank-one update of one request, and its pivot; see `rank_one_equality`."""
        device = self.view.weight(layer).device
        return rank_one_equality(
            self.preconditioner(layer), key_update.to(device), key_value.to(device), residual.to(device),
            on_bad_pivot=self.hparams.on_bad_pivot,
        )  # fmt: skip

    def gradients(self, modules: dict[str, ModuleGradients], turns: Sequence[int] = ()) -> dict[str, LowRankUpdate]:
        """UltraEdit's updates [out, d] of all modules: those of one shape share a normalizer, which sees all of them
        before the first update is made; rows by `turns` if they are given."""
        shapes: dict[str, str] = {}
        for name, found in modules.items():
            rows = torch.cat([found.keys.double(), found.gradients.double()], 1)
            shape = shapes[name] = f"{found.keys.shape[1]}x{found.gradients.shape[1]}"
            known = self._open.normalizers.get(shape, self.normalizers.get(shape))
            if known is None:
                known = Normalizer.empty(rows.shape[1], rows.device)
            moved = Normalizer(known.count, known.mean.to(rows), known.squares.to(rows))
            for part in rows.split(list(turns)) if turns else (rows,):
                moved = moved.updated(part)
            self._open.normalizers[shape] = moved
        return {
            name: gradient_update(found.keys, found.gradients, self._on(shapes[name], found), self.hparams.lr)
            for name, found in modules.items()
        }

    def _on(self, shape: str, like: ModuleGradients) -> Normalizer:
        whole, device = self._open.normalizers[shape], like.keys.device
        return Normalizer(whole.count, whole.mean.to(device), whole.squares.to(device))

    def limited(self, update: LowRankUpdate, weight: torch.Tensor) -> LowRankUpdate:
        """The update within `spectral_limit` and `frobenius_limit` of `weight` [out, in]."""
        numbers = self.hparams
        if numbers.spectral_limit:
            update = limit_spectrum(update, numbers.spectral_limit * spectral_norm(weight))
        if numbers.frobenius_limit:
            norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
            update = limit_norm(update, numbers.frobenius_limit * norm)
        return update

    @property
    def batches(self) -> int:
        """Batches that were committed and not taken back."""
        return len(self._history)

    def set_key_memories(self, memories: Mapping[int, KeyMemory]) -> None:
        """Replace the keys of earlier batches, by layer: those of edits that somebody else has made."""
        self.memories = dict(memories)

    def commit(self) -> None:
        """Keep what the open batch found. It must be written by now."""
        found, self._open = self._open, _Found()
        before = _Before({layer: len(memory.sizes) for layer, memory in self.memories.items()}, self.normalizers)
        self._history.append(before)
        for layer, appended in found.appended.items():
            self.memories[layer].commit(appended)
        self.normalizers = {**self.normalizers, **found.normalizers}

    def settle(self, batches: int) -> None:
        """Forget the open batch, and take back what was committed beyond `batches`, also in part."""
        self._open = _Found()
        if batches >= len(self._history):
            return
        before = self._history[batches]
        try:
            self._restore(before)
        except BaseException:  # an interrupt: it is asked to be back, so it is
            self._restore(before)
            raise
        finally:
            del self._history[batches:]

    def _restore(self, before: _Before) -> None:
        self.normalizers = before.normalizers
        for layer, memory in self.memories.items():
            memory.rollback(max(0, len(memory.sizes) - before.batches.get(layer, 0)))

    @property
    def null_spaces(self) -> dict[int, int]:
        """Layer -> dimension of its null space, where the method has one and the layer was edited."""
        made = self._preconditioners.items()
        return {layer: space.dimension for layer, space in made if isinstance(space, NullSpace)}

    @property
    def nbytes(self) -> int:
        """Bytes kept between batches: preconditioners, key memories, normalizers."""
        kept = [p.nbytes for p in self._preconditioners.values()] + [m.nbytes for m in self.memories.values()]
        return sum(kept) + sum(n.mean.nbytes + n.squares.nbytes for n in self.normalizers.values())

    def save(self, path: str | os.PathLike, belongs: dict[str, Any]) -> None:
        """Write what is kept between batches to one safetensors file, at once or not at all.

        Args:
            path: the file.
            belongs: what the state belongs to beside this engine's own numbers.

        Raises:
            StatisticsError: the file cannot be written.
        """
        tensors: dict[str, torch.Tensor] = {}
        for layer, memory in self.memories.items():
            tensors |= {f"memory.{layer}.{name}": tensor for name, tensor in memory.tensors().items()}
        for shape, normalizer in self.normalizers.items():
            tensors |= {f"normaliser.{shape}.{name}": tensor for name, tensor in normalizer.tensors().items()}
        memories = {str(layer): memory.about() for layer, memory in self.memories.items()}
        metadata = {
            "format_version": FORMAT_VERSION, "kedit_fast": __version__, "belongs": json.dumps(self._about(belongs)),
            "memories": json.dumps(memories),
        }  # fmt: skip
        write_file(path, tensors, metadata, StatisticsError)

    def load(self, path: str | os.PathLike, belongs: dict[str, Any]) -> dict[str, Any]:
        """Take up what `save` wrote; the next updates are those of the run that wrote it.

        Args:
            path: the file.
            belongs: what must be the same as it was for `save`; it may say less.

        Returns:
            all that the state belongs to.

        Raises:
            StatisticsError: the file cannot be read, is damaged or foreign, or is of another method, configuration,
                model, edit history or statistics: the message says which.
            EditError: this engine has batches already.
        """
        if self._history or self.normalizers or any(memory.count for memory in self.memories.values()):
            raise EditError("a state is loaded before the first edit; this editor has made some")
        tensors, metadata = read_file(path, StatisticsError)
        fields = ("belongs", "memories")
        if metadata.get("format_version") != FORMAT_VERSION or any(name not in metadata for name in fields):
            raise StatisticsError(f"{path} is not a state of an editor (format {FORMAT_VERSION})")
        there, here = json.loads(metadata["belongs"]), self._about(belongs)
        for name, value in here.items():
            if there.get(name) != value:
                shown = f": {there.get(name)} there, {value} here" if len(str(value)) < 80 else ""
                raise StatisticsError(f"{path} is the state of another run: different {name}{shown}")
        memories, normalizers = {}, {}
        for layer, about in json.loads(metadata["memories"]).items():
            prefix = f"memory.{layer}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            memories[int(layer)] = KeyMemory.from_tensors(
                self.preconditioner(int(layer)), own, about, f"{path}, layer {layer},", self.hparams.memory_form
            )
        for shape in {name.split(".")[1] for name in tensors if name.startswith("normaliser.")}:
            prefix = f"normaliser.{shape}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            features = sum(map(int, shape.split("x")))
            normalizers[shape] = Normalizer.from_tensors(own, features, f"{path}, modules of {shape},")
        self.memories, self.normalizers = memories, normalizers
        return there

    def _about(self, belongs: dict[str, Any]) -> dict[str, Any]:
        numbers = {name: getattr(self.hparams, name) for name in _STATE_NUMBERS}
        about = {"method": self.recipe.name, "layers": list(self.hparams.layers),
                 "inner_params": list(self.hparams.inner_params), **numbers, **belongs}  # fmt: skip
        return json.loads(json.dumps(about))
