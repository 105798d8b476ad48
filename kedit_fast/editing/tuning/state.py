"""What an editor tunes, and what it keeps from batch to batch."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kedit_fast.editing.tuning.captured import CapturedRows, TuningRow
from kedit_fast.editing.tuning.dinm import LocatedTuning
from kedit_fast.editing.tuning.grace import CodebookTuning
from kedit_fast.editing.tuning.in_place import EditedTuning
from kedit_fast.editing.tuning.low_curvature import LowCurvature
from kedit_fast.editing.tuning.memoir import FingerprintTuning
from kedit_fast.editing.tuning.stored_rows import StoredRows
from kedit_fast.editing.tuning.wise import ActivationTuning
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import EditError, MethodError
from kedit_fast.memories.attach import attach, attached, matrix_identity
from kedit_fast.memories.memory import SideMemory
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.tuning_recipe import Router, TunedPlace
from kedit_fast.models.fingerprint import tokenizer_hash
from kedit_fast.models.routes import suspended
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PromptFormat
from kedit_fast.requests.request import EditRequest
from kedit_fast.statistics.collect import Statistics
from kedit_fast.support.matrix_bits import quick_sum

if TYPE_CHECKING:
    from kedit_fast.editing.batch_run import BatchRun

_log = logging.getLogger("kedit_fast")


class InPlaceTuning(Protocol):
    """The tuning of an editor whose edits go into the weights. It holds nothing that a batch changes."""

    def write(self, batch: BatchRun) -> None:
        """Tune on the requests of a batch, and write the result, where a request is left.

        Requests that cannot be used go to `batch.fail`; losses and steps of the others to `batch`, in their order.
        """
        ...


class BesideTuning(Protocol):
    """The tuning of an editor whose edits stay beside the weights."""

    def write(self, batch: BatchRun) -> None:
        """Tune on the requests of a batch, and hold the result for `commit`."""
        ...

    def commit(self) -> None:
        """Make the open batch the state; nothing where there is none."""
        ...

    def settle(self, batches: int) -> bool:
        """Drop an open batch and return to the state after so many batches; returns whether that is another one."""
        ...

    def memory(self, about: Mapping[str, object]) -> SideMemory | None:
        """What answers in the model, or None before the first edit; `about` are fields that every memory has."""
        ...


BESIDE: dict[Router, Callable[[TuningState], BesideTuning]] = {
    "activation": ActivationTuning,
    "fingerprint": FingerprintTuning,
    "nearest key": CodebookTuning,
}
"""Router of a method -> what tunes its edits."""
IN_PLACE: dict[TunedPlace, Callable[[TuningState], InPlaceTuning]] = {"edited": EditedTuning, "located": LocatedTuning}
"""Which matrix a method without a router tunes -> what tunes it."""


class TuningState:
    """The tuning of one editor.

    Args:
        view: the model.
        tokenizer: its tokenizer.
        recipe: the method; it has a `tuning`.
        hparams: its hyper-parameters.
        statistics: second moments of inputs and outputs, where steps are constrained by them.
        seed: of masks, orders and first values.
        irrelevant: texts that have nothing to do with the edits; None for built-in ones.
        prompt_format: what makes prompts into the text that the model reads, or None.
        budget: bytes of captured rows on the model's device; None for a share of what is free.
        file: where what is captured is stored and looked up; None for nowhere.

    Raises:
        MethodError: the model or tokenizer lacks what the method needs.
    """

    def __init__(
        self,
        view: ModelView,
        tokenizer: Any,
        recipe: Recipe,
        hparams: Hparams,
        statistics: Statistics | None,
        seed: int,
        irrelevant: Sequence[str] | None = None,
        prompt_format: PromptFormat | None = None,
        budget: int | None = None,
        file: ValueFile | None = None,
    ):
        assert recipe.tuning is not None
        self.view, self.tokenizer, self.recipe, self.hparams = view, tokenizer, recipe, hparams
        self.tuning, self.statistics, self.seed, self.irrelevant = recipe.tuning, statistics, seed, irrelevant
        self.prompt_format, self.budget, self.file = prompt_format, budget, file
        self.memory: SideMemory | None = None
        """What stands beside the weights, as after the last committed batch; None without any."""
        self._curvatures: dict[int, LowCurvature] = {}
        self._bits: int | None = None  # sum of the matrix's bits at the first edit beside it
        self._answering: SideMemory | None = None  # the same on the device of its module
        self._written: list[tuple[EditRequest, ...]] = []  # requests of each batch
        self._pending: tuple[EditRequest, ...] | None = None
        if hparams.constrains_curvature and hparams.norm_constraint:
            raise MethodError("norm_constraint does not go with curvature_energy: the steps are in another basis")
        make = BESIDE.get(self.tuning.router)
        self.beside = None if make is None else make(self)
        self.in_place = None
        if make is None:
            if self.tuning.makes_memory or self.tuning.where not in IN_PLACE:
                raise MethodError(f"{recipe.name} is not there yet")
            self.in_place = IN_PLACE[self.tuning.where](self)
        if view.is_sharded:
            raise MethodError(f"{recipe.name} tunes a whole matrix: a model that processes hold together is refused")

    def capture(self, rows: Sequence[TuningRow], layer: int, weight: torch.Tensor | None = None) -> CapturedRows:
        """`CapturedRows.capture` within the editor's budget, with what its file has."""
        store = None if self.file is None else StoredRows(self.file, self.view, self.tokenizer, layer)
        return CapturedRows.capture(self.view, rows, layer, weight, self.budget, store)

    def curvature(self, layer: int) -> LowCurvature:
        """The changes of a layer's matrix along which the loss on ordinary text is flat, made on first use."""
        if layer not in self._curvatures:
            assert self.statistics is not None
            moments = self.statistics.moment(layer).moment, self.statistics.output_metric(layer)
            self._curvatures[layer] = LowCurvature.of(*moments, self.hparams.curvature_energy)
        return self._curvatures[layer]

    def write(self, batch: BatchRun) -> None:
        """Tune on the requests of a batch; write the result into the weight, or hold it for `commit`."""
        tuning = self.in_place if self.beside is None else self.beside
        assert tuning is not None
        if self.beside is not None:
            self._require_same_matrix()
        tuning.write(batch)
        if self.tuning.steps_weight:  # entries of a codebook are compared by what tunes them
            report_conflicts(batch, "the later one wins" if self.tuning.order == "depth" else "no step serves both")
        self._pending = tuple(p.request for i, p in enumerate(batch.prepared) if i not in batch.skipped)

    def commit(self) -> None:
        """Count the open batch: what it has made belongs to the state, and a memory answers in the model."""
        if self._pending is None:
            return
        written, self._pending = self._pending, None
        if self.beside is not None:
            self.beside.commit()
            self._written.append(written)
            self._serve()

    def settle(self, batches: int) -> None:
        """Drop an open batch, and return to the state after so many batches, bit for bit."""
        self._pending = None
        if self.beside is not None and self.beside.settle(batches):
            del self._written[batches:]
            self._serve()

    @contextlib.contextmanager
    def suspended_memory(self) -> Iterator[None]:
        """Inside the block the model runs without this editor's memory; nobody else's is suspended."""
        present = attached(self.view.model)
        mine = present is not None and self._is_mine(present.memory)
        with suspended(self.view.model) if mine else contextlib.nullcontext():
            yield

    def _is_mine(self, memory: SideMemory) -> bool:
        """Whether a memory in the model is this editor's, perhaps attached by somebody else."""
        mine = self._answering
        return memory is mine or (mine is not None and memory.digest == mine.digest)

    def _serve(self) -> None:
        """Let the memory of the state, as it is, answer in the model; or none, where nothing is edited."""
        assert self.beside is not None
        self.memory = self.beside.memory(self._about())
        model, present = self.view.model, attached(self.view.model)
        if present is not None and not self._is_mine(present.memory):
            _log.warning(
                "the model has a memory that is not this editor's: it stays, and this editor's does not answer"
            )
            return
        if self.memory is None:
            self._answering = None
            if present is not None:
                present.detach()
            return
        if present is None:
            present = attach(model, self.memory, spec=self.view.spec)
        else:
            present.swap(self.memory)
        self._answering = present.memory

    def _about(self) -> dict[str, Any]:
        """The fields that every memory of this editor has."""
        requests = [r for written in self._written for r in written]
        return {
            **self._matrix_identity,
            "method": self.recipe.name,
            "configuration": asdict(self.hparams),
            "requests": tuple({"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new} for r in requests),
            "prompt_format": "{} is" if self.prompt_format is None else self.prompt_format("{} is"),
            "tokenizer": tokenizer_hash(self.tokenizer),
        }

    def _require_same_matrix(self) -> None:
        """Raise EditError when the matrix has changed since the first edit beside it."""
        bits = quick_sum(self.view.weight(self.hparams.layers[0]))
        if self._bits is None or not self._written:
            self._bits = bits
            vars(self).pop("_matrix_identity", None)
        elif bits != self._bits:
            raise EditError(
                f"{self.view.weight_name(self.hparams.layers[0])} was changed by something else since the first edit "
                "beside it: take that back, or start a new Editor"
            )

    @functools.cached_property
    def _matrix_identity(self) -> dict[str, Any]:
        """What matrix the memory is for."""
        return matrix_identity(self.view.model, self.view.module_name(self.hparams.layers[0]))


def report_conflicts(batch: BatchRun, outcome: str) -> None:
    """Say which requests of a batch have one prompt and different targets, and what comes of it."""
    earlier: dict[tuple[int, ...], int] = {}
    for place, request in enumerate(batch.prepared):
        if place in batch.skipped:
            continue
        prompt = request.rewriting[0].ids
        before = earlier.get(prompt)
        if before is not None and batch.prepared[before].target != request.target:
            batch.collisions.append((before, place))
            _log.warning(
                "%s and %s have the same prompt and different targets: %s",
                batch.prepared[before].name,
                request.name,
                outcome,
            )
        earlier[prompt] = place
