"""The Editor: writes batches of edits into a model, one after another, and undoes them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, get_args

import torch

from kedit_fast.editing.batch_record import BatchRecord
from kedit_fast.editing.batch_run import BatchRun, EditContext, request_weights
from kedit_fast.editing.erasure import Erasure, ErasureCost, ErasurePlan, TextTokens, tokenized_texts
from kedit_fast.editing.gradients import answer_gradients
from kedit_fast.editing.keys import StateBudget
from kedit_fast.editing.ledger import Ledger
from kedit_fast.editing.result import EditResult
from kedit_fast.editing.schedules import SCHEDULES
from kedit_fast.editing.schedules.gradients import warm_up
from kedit_fast.editing.shaping import SHAPINGS
from kedit_fast.editing.solver_state import SolverState
from kedit_fast.editing.tuning.state import TuningState
from kedit_fast.editing.values.batch_size import fitting_batch
from kedit_fast.editing.values.loop import SITES
from kedit_fast.editing.values.memit_values import MemitCache
from kedit_fast.editing.values.protocol import ValueStore
from kedit_fast.editing.values.shared import flush_store
from kedit_fast.editing.values.store import ValueFile, open_values
from kedit_fast.editing.values.values_dtype import copied_bytes
from kedit_fast.errors import EditError, InvalidArgumentError, MethodError, NullSpaceError, StatisticsError
from kedit_fast.memories.memory import SideMemory
from kedit_fast.methods.declaration import AUTO
from kedit_fast.methods.hparams import worth_a_warning
from kedit_fast.methods.presets import is_guess, make_hparams
from kedit_fast.methods.recipe import Recipe, ValueSites
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.editable import require_editable
from kedit_fast.models.fingerprint import difference, fingerprint
from kedit_fast.models.forward import Site, require_passes
from kedit_fast.models.routes import attached_routes
from kedit_fast.models.sharded import local, whole
from kedit_fast.models.view import ModelView
from kedit_fast.models.weight_names import is_experts_path, module_path_of, weight_name_of
from kedit_fast.patches.patch import Patch, Target
from kedit_fast.patches.swap import edited_weight_of
from kedit_fast.requests.chat import with_suffix
from kedit_fast.requests.prefixes import generate_prefixes
from kedit_fast.requests.problems import OnError, require_no_problems
from kedit_fast.requests.prompts import PreparedRequest, PromptFormat, prepare_each
from kedit_fast.requests.reading import RequestList, as_requests, rows_of
from kedit_fast.requests.record_fields import Notes
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO as AUTO_SEPARATOR
from kedit_fast.requests.spacing import check_separator
from kedit_fast.solver.expert_update import ExpertUpdate, joined_update, split_update, stacked_matrix
from kedit_fast.solver.key_memory import KeyMemory
from kedit_fast.solver.low_rank import LowRankUpdate, total_of
from kedit_fast.solver.preconditioner import NullSpace, Preconditioner
from kedit_fast.statistics.collect import Statistics
from kedit_fast.statistics.expert_moments import require_shared
from kedit_fast.support.dtypes import dtype_name
from kedit_fast.support.matrix_bits import edit_fingerprint, sha256
from kedit_fast.support.messages import comma_list
from kedit_fast.support.process_group import world
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")


class Editor:
    """Edits a causal language model in place. Every call of `edit` is one batch, which can be undone.

    Example:
        >>> editor = Editor(model, tokenizer, "memit", statistics=statistics, hparams={"v_num_grad_steps": 2})
        >>> result = editor.edit([{"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "violin"}])
        >>> result.batch, len(result.updates)
        (1, 2)
        >>> editor.rollback()  # the original weights, bit for bit

    Args:
        model: a causal language model. Its edited matrices are written in place. A model that cannot be edited
            (adapters, compiled or offloaded parts, shared weights: `models.editable`) is refused with the reason.
        tokenizer: its tokenizer.
        method: a name of `kedit_fast.methods.registry.RECIPES` (`kedit-fast methods` lists them).
        statistics: second moments of the edited layers, from `collect_statistics` or `load_statistics`. Needed unless
            the method uses none (UltraEdit) or runs with `mom2_adjustment=False`. With `output_metric=True` those of
            outputs are needed, too.
        null_spaces: layer -> null space, for AlphaEdit, instead of statistics; see
            `kedit_fast.solver.alphaedit_projector.load_projector`.
        layers: the layers to edit, zero-based; None for those of the preset. Without a preset they are a guess, which
            layers leave with a warning where the method needs a null space and they have none.
        hparams: name -> value, overrides of the preset; see `kedit_fast.methods.hparams.Hparams`.
        seed: seed of the context prefixes.
        prefixes: context prefixes to use instead of generated ones, each ending in ". ".
        spec: an ArchSpec for an architecture that is not known.
        values: where optimized values are stored and looked up: the path of a file of ours, a template of memit's npz
            files with three {}, or an object with the methods of `ValueStore`. Methods that tune a matrix store what
            they capture, in a file of ours alone.
        prompt_format: maps a prompt, which may hold {} for the subject, to the text that the model reads, for example
            `kedit_fast.requests.chat.chat_format(tokenizer)`.
        target_separator: the text between prompt and target of requests that do not name one: "auto" decides from the
            text (`kedit_fast.requests.spacing`), " " or "".
        state_budget: bytes for the hidden states that are carried from layer to layer while keys are computed; of
            methods that tune a matrix, for captured rows on the device.
        irrelevant: texts that have nothing to do with the edits, for methods that train or compare with such (WISE,
            MEMOIR); None for built-in ones.
        progress: show progress bars on stderr.

    Where torch.distributed is initialized (`kedit_fast.support.process_group.start()` under torchrun), every process
    makes the same calls. Each process optimizes its share of the values, and all write the same updates. Processes that
    hold a tensor-parallel model together (`kedit_fast.models.sharded`) do everything together instead, and each writes
    its own columns.

    Raises:
        UnsupportedModelError, MethodError, RequestError, StatisticsError: see the messages.
    """

    @plain_torch()
    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        method: str = "memit",
        *,
        statistics: Statistics | None = None,
        null_spaces: Mapping[int, NullSpace] | None = None,
        layers: Sequence[int] | None = None,
        hparams: Mapping[str, Any] | None = None,
        seed: int = 0,
        prefixes: Sequence[str] | None = None,
        spec: ArchSpec | None = None,
        values: str | os.PathLike | ValueStore | None = None,
        prompt_format: PromptFormat | None = None,
        target_separator: str = AUTO_SEPARATOR,
        state_budget: StateBudget | None = None,
        irrelevant: Sequence[str] | None = None,
        progress: bool = False,
    ):
        self.view = ModelView(model, spec)
        self.tokenizer = tokenizer
        self.recipe: Recipe = find_recipe(method)
        overrides = dict(hparams or {})
        if layers is not None:
            overrides["layers"] = tuple(layers)
        self.hparams, self.origin = make_hparams(method, self.view.config, overrides)
        if is_guess(self.origin) and "layers" not in overrides:
            self.hparams = replace(self.hparams, layers=self.view.nearest_editable(self.hparams.layers))
        if idle := worth_a_warning(self.recipe, overrides):
            _log.warning("%s does not use %s", self.recipe.name, ", ".join(idle))
        for name in overrides:
            if (lacking := self.hparams.lacks(name)) and name not in idle:
                _log.warning("%s has no effect: it needs %s", name, lacking)
        if self.hparams.layers:
            self.view.check_layers(self.hparams.layers)
        if self.hparams.v_loss_layer not in (-1, self.view.num_layers - 1):
            raise MethodError(
                f"v_loss_layer = {self.hparams.v_loss_layer} is not implemented: the loss is taken after the last "
                f"layer, {self.view.num_layers - 1}"
            )
        self.modules = self._edited_modules()
        require_editable(self.view, self.modules)
        self.value_sites: ValueSites = self.recipe.values_on(self.view.spec.post_norm)
        if "attention" in SITES[self.value_sites] and not self.view.spec.attention:
            raise MethodError(
                f"{self.recipe.name} optimizes values at the outputs of attention, and not every block of "
                f"{self.view.spec.name} has an attention of the same name: use another method"
            )
        self._chosen: dict[str, float] = {}  # what is "auto" for the whole model -> the number
        self._measured: set[str] = set()  # of these, what no batch has decided
        self._continues = False  # whether a state was loaded, whose first batch has decided what is "auto"
        self.ledger = Ledger(self.hparams.undo_window)
        self._final_steps: set[int] = set()  # numbers of the batches that `finish` has written
        self._written: dict[int, tuple[EditRequest, ...]] = {}  # number of a batch -> its requests
        self._notes = Notes()  # names each field of the records once
        self.seed = seed
        self.progress = progress
        self.gradients: Callable[..., Any] = answer_gradients
        """What gathers UltraEdit's keys and gradients."""
        self.on_keys: Callable[[int, torch.Tensor], None] | None = None
        """Called with each layer and its keys [d, u] while a batch is computed."""
        self.values_most: int | None = None
        """Requests whose values are optimized together, at most, whatever memory is free; None for as many as fit."""
        self.prompt_format = with_suffix(prompt_format, self.hparams.suffix_system_prompt)
        self.target_separator = check_separator(target_separator)
        self.state_budget = state_budget
        self.values = open_values(values) if isinstance(values, str | os.PathLike) else values
        rows = self._file_of_rows() if self.recipe.tuning is not None else None
        if isinstance(self.values, MemitCache) and self.hparams.chunk_tokens:
            raise MethodError(
                "memit's npz files hold one value a request; with chunk_tokens it has several: give the path of a file "
                "of values instead"
            )
        self.statistics = statistics
        self._prefixes = self._requested_prefixes = None if prefixes is None else tuple(prefixes)
        if null_spaces is not None and not self.recipe.uses_null_space:
            raise MethodError(f"{self.recipe.name} has no null space: null_spaces are for AlphaEdit")
        if self.hparams.uses_statistics and not set(null_spaces or ()) >= set(self.hparams.layers):
            self._check_statistics()
        elif statistics is not None:  # the predicted harm is of them
            self._check_model(statistics)
        require_passes(self.view, self._sites())
        self.solver_state = SolverState(self.view, self.recipe, self.hparams, statistics, null_spaces)
        self.tuning: TuningState | None = None
        """Of methods without a closed form, what they keep from batch to batch."""
        if self.recipe.tuning is not None:
            self.tuning = TuningState(
                self.view, tokenizer, self.recipe, self.hparams, statistics, seed, irrelevant, prompt_format,
                None if state_budget is None else state_budget.device, rows,
            )  # fmt: skip
        if is_guess(self.origin) and "layers" not in overrides:
            self._shrink_window()

    def _file_of_rows(self) -> ValueFile | None:
        """Where a method that tunes a matrix stores what it captures."""
        if self.values is None:
            return None
        if not isinstance(self.values, ValueFile):
            kind = "memit's npz files hold" if isinstance(self.values, MemitCache) else "a store of values holds"
            raise MethodError(
                f"{kind} optimized values, and {self.recipe.name} stores captured rows: give the path of a file"
            )
        self.values.require_model(self.view, self.tokenizer)
        return self.values

    def _shrink_window(self) -> None:
        """Let layers without a null space leave a guessed window; raise the error of the first where none is left."""
        reasons = self.solver_state.without_null_space(self.hparams.layers)
        layers = tuple(layer for layer in self.hparams.layers if layer not in reasons)
        if reasons and not layers:
            raise NullSpaceError(next(iter(reasons.values())))
        if reasons:
            for reason in reasons.values():
                _log.warning("a layer leaves the guessed window, %s: %s", comma_list(self.hparams.layers), reason)
            self.origin += f", without {comma_list(reasons)} for want of a null space"
            self.hparams = self.solver_state.hparams = replace(self.hparams, layers=layers)
            self.modules = self._edited_modules()

    def _check_statistics(self) -> None:
        if self.statistics is None:
            raise StatisticsError(
                f"{self.recipe.name} needs statistics for layers {comma_list(self.hparams.layers)}: "
                + (
                    "collect_statistics(model, tokenizer, texts, layers, output_metric=True), or "
                    "`kedit-fast stats --output-metric`"
                    if self.hparams.weighs_outputs or self.hparams.constrains_curvature
                    else "collect_statistics(model, tokenizer, texts, layers), or `kedit-fast stats`"
                )
            )
        for layer in self.hparams.layers:
            if self.hparams.uses_moments:
                require_shared(self.view, layer, self.statistics.moment(layer))
            if self.hparams.constrains_curvature:
                self.statistics.moment(layer)
            if self.hparams.weighs_outputs or self.hparams.constrains_curvature:
                self.statistics.output_metric(layer)
        self._check_model(self.statistics)

    def _check_model(self, statistics: Statistics) -> None:
        if different := difference(statistics.model, fingerprint(self.view, self.tokenizer)):
            raise StatisticsError(f"the statistics are of another model: different {different}")

    def _edited_modules(self) -> dict[str, torch.Tensor]:
        """Path of each edited module -> its weight [out, in], a view on the model's memory; a DTensor where split.

        Of a layer with experts, their weights [E, out, in]; and that of shared experts in the stack.
        """
        if self.hparams.inner_params:
            paths = list(map(module_path_of, self.hparams.inner_params))
            return {path: self.view.linear(path)[1] for path in paths}
        layers = self.hparams.layers
        return {path: weight for layer in layers for path, weight in self.view.edited_weights(layer).items()}

    def _sites(self) -> list[Site]:
        """Where an edit reads the model. The pass that takes gradients checks the modules of `inner_params` itself."""
        layers = () if self.hparams.inner_params else self.hparams.layers
        outputs = [Site(layers[-1], kind) for kind in SITES[self.value_sites]] if layers else []
        if layers and self.hparams.norm_anchor and self.value_sites == "block":
            outputs.append(Site(layers[-1], "mlp"))
        return [Site(layer, "key") for layer in layers] + outputs

    def in_place(self) -> bool:
        """Whether the edited matrices are still those of the model. Moving or casting a model replaces them."""
        return all(
            local(weight).data_ptr() == local(self.modules[name]).data_ptr()
            and weight.dtype == self.modules[name].dtype
            for name, weight in self._edited_modules().items()
        )

    def require_untouched(self) -> None:
        """Raise EditError when something else has changed an edited matrix, such as a hook that recomputes a weight."""
        for name in self.ledger.names():
            self.ledger.require_untouched(name)

    @property
    @plain_torch()
    def prefixes(self) -> tuple[str, ...]:
        """The context prefixes, generated from the unedited model on first use."""
        if self._prefixes is None:
            lengths = self.hparams.context_template_length_params
            style = "sampled" if self.recipe.tuning is None else self.recipe.tuning.decoding
            self._prefixes = generate_prefixes(self.view, self.tokenizer, lengths, self.seed, None, style)
        return self._prefixes

    @plain_torch(leave_inference_mode=False)
    def edit(
        self, requests: Iterable[EditRequest | Mapping[str, Any] | PreparedRequest], on_error: OnError = "raise"
    ) -> EditResult:
        """Write one batch of requests. Calling it again is sequential editing.

        Most methods write all requests of a batch at once; a rank-one method writes one after another.

        Args:
            requests: records, mappings, or what `check` returned: a list, a generator or a table of them, which is read
                once. Only a method that works on whole prompts (UltraEdit) takes requests without a subject.
            on_error: what to do with requests that cannot be written: "raise" an error before anything is written, or
                "skip" them, write the others and name them in the result. Where nothing is left, nothing is written,
                and the ledger gets no batch. Such a request has a subject or target without tokens, a prompt longer
                than the model takes, a token without an embedding, a target that the model says already (unless the
                hyper-parameter `on_predicted` is "allow"), or a loss or gradient that is not finite.

        Raises:
            RequestError: requests that cannot be written, by id, position or subject.
            UnsupportedModelError: the model can no longer be edited; nothing was computed.
            EditError, SolveError, StatisticsError: the edit failed. The model, the ledger and the state between batches
                are as they were before, bit for bit.
        """
        with contextlib.nullcontext() if self.tuning is None else self.tuning.suspended_memory():
            return self._edit(requests, on_error)

    def _edit(
        self, requests: Iterable[EditRequest | Mapping[str, Any] | PreparedRequest], on_error: OnError
    ) -> EditResult:
        self._require_ready("edit")
        self.solver_state.require_state()
        prepared, problems = self.check(requests, on_error)
        places = [i for i in range(len(prepared) + len(problems)) if i not in problems]  # in the call
        if not self.recipe.weighs_requests and request_weights(prepared) is not None:
            raise MethodError(
                f"{self.recipe.name} gives requests no weights: its batches have no least squares over them"
            )
        batch = BatchRun(self._context(), prepared, on_error)
        with self._together(), torch.no_grad():
            try:
                if prepared:
                    self._chosen = self._settled(batch)
                    SCHEDULES[self.recipe.schedule](batch)
            except BaseException:
                with contextlib.suppress(EditError):  # the error that stopped the batch matters more
                    flush_store(self.values)
                raise
            flush_store(self.values)
            problems |= {places[i]: reason for i, reason in batch.skipped.items()}
            written = [p for i, p in enumerate(prepared) if i not in batch.skipped]
            number = self.ledger.count + 1 if written else 0
            result = batch.result(number, written, dict(sorted(problems.items())), self.prefixes)
            if written and not self.recipe.runs_model_after_write:  # a hook may still undo the last write
                require_passes(self.view, self._sites())
            for name in batch.changed_weights():
                self.ledger.require_untouched(name)
            if written:
                self.solver_state.commit()
                if self.recipe.makes_memory:
                    self.ledger.count_batch()
                self._written[number] = result.requests
                result = replace(result, resolved=self.resolved)
            if self.tuning is not None and written:
                self.tuning.commit()
        return result

    def _settled(self, batch: BatchRun) -> dict[str, float]:
        """Let a batch work with numbers in place of "auto"; returns them, the values' clamp before the norm anchor."""
        chosen, hparams = dict(self._chosen), self.hparams
        if self.recipe.optimizes_values and hparams.clamp_norm_factor == AUTO:
            chosen["clamp_norm_factor"] = batch.settle_clamp(chosen.get("clamp_norm_factor"))
        if self.recipe.optimizes_values and hparams.norm_anchor == AUTO:
            if self.ledger.count and "norm_anchor" not in chosen:
                raise EditError('norm_anchor = "auto" is measured on the unedited model, and batches were written')
            anchor = batch.settle_anchor(chosen.get("norm_anchor"))
            chosen |= {} if anchor is None else {"norm_anchor": anchor}
        return chosen

    @plain_torch(leave_inference_mode=False)
    def measure_norm_anchor(
        self, requests: Iterable[EditRequest | Mapping[str, Any] | PreparedRequest], on_error: OnError = "raise"
    ) -> float:
        """Measure the norm anchor that is "auto" on these requests instead of those of the first batch.

        It is the mean norm of what their values ask of the MLP at the value's site, on the unedited model and without
        the largest 5 %; of at most 1000 requests, evenly spread. A clamp_norm_factor that is "auto" is decided by them,
        too. Both hold for all batches, also after a rollback of everything.

        Args:
            requests: 200 or more, of the kind that will be edited. Nothing is written.
            on_error: what to do with requests that cannot be written: "raise" an error, or "skip" them.

        Raises:
            MethodError: `norm_anchor` is not "auto".
            EditError: a batch was written, so the model is not the unedited one.
            RequestError: requests that cannot be written.

        Cost: the values of the requests; the value store takes them.
        """
        if not self.recipe.optimizes_values or self.hparams.norm_anchor != AUTO:
            raise MethodError(f'norm_anchor = {self.hparams.norm_anchor!r} needs no measuring: only "{AUTO}" does')
        if self.ledger.count or self._continues:
            raise EditError("a norm anchor is measured on the unedited model: before the first batch, without a state")
        self._require_ready("measure_norm_anchor")
        prepared, _ = self.check(requests, on_error)
        self._chosen, self._measured = {}, set()
        with torch.no_grad():
            chosen = self._settled(BatchRun(self._context(), prepared, on_error)) if prepared else {}
        flush_store(self.values)
        if "norm_anchor" not in chosen:
            raise EditError("no request has a value that a norm anchor could be measured on")
        self._chosen, self._measured = chosen, set(chosen)
        return chosen["norm_anchor"]

    @plain_torch(leave_inference_mode=False)
    def warm_up(
        self, requests: Iterable[EditRequest | Mapping[str, Any] | PreparedRequest], on_error: OnError = "raise"
    ) -> dict[int, str]:
        """Show requests to the running normalizer of a gradient method, before the first edit. Nothing is written.

        The normalizer's statistics are then those of more tokens than the first batch has: StableEdit whitens by a
        covariance that needs more of them than the edited matrix has outputs. They are part of the state: `save_state`
        stores them, and `restore` returns to them. The published warm-up of StableEdit also writes its requests into
        the model; this one does not.

        Args:
            requests: as for `edit`; other facts than those to be written.
            on_error: "raise" at requests that cannot be used, or "skip" them.

        Returns:
            index in `requests` -> why a request was left out.

        Raises:
            MethodError: the method has no such normalizer.
            EditError: there are edits already.
            RequestError: requests that cannot be used. The state is as it was.

        Cost: the forward and backward pass of `edit`.
        """
        if not self.recipe.gathers_gradients:
            raise MethodError(f"{self.recipe.name} has no running normalizer to warm up: ultraedit and stableedit have")
        if self.ledger.count:
            raise EditError("a normalizer is warmed up before the first edit; this editor has made some")
        self._require_ready("warm_up")
        prepared, problems = self.check(requests, on_error)
        places = [i for i in range(len(prepared) + len(problems)) if i not in problems]
        try:
            with torch.no_grad():
                left_out = warm_up(self._context(), prepared, on_error)
            self.solver_state.commit_warm_up()
        finally:
            self.solver_state.settle(0)
        return dict(sorted((problems | {places[i]: reason for i, reason in left_out.items()}).items()))

    def _require_ready(self, name: str) -> None:
        """Raise when the model can no longer be edited, or gradients cannot be taken in the method `name`."""
        if torch.is_inference_mode_enabled():
            raise EditError(f"gradients are needed: call {name}() outside torch.inference_mode()")
        if not self.in_place():
            raise EditError("the model was moved or cast since this Editor was made: make a new one")
        require_editable(self.view, self.modules)  # it may have been compiled or got an adapter in between

    @property
    def resolved(self) -> dict[str, Any]:
        """Hyper-parameters that are "auto" -> what the first batch has made of them; {} before it.

        `clamp_norm_factor` and `norm_anchor` are numbers; the scale of S, `mom2_update_weight` or `L2`, is a mapping
        from layers. A `v_lr` that is "auto" is another number for every request and is not among them.
        """
        resolved: dict[str, Any] = dict(self._chosen)
        if self.hparams.scale_name is not None and self.solver_state.scales:
            resolved[self.hparams.scale_name] = dict(sorted(self.solver_state.scales.items()))
        return resolved

    def _context(self) -> EditContext:
        return EditContext(
            view=self.view,
            tokenizer=self.tokenizer,
            recipe=self.recipe,
            hparams=self.hparams,
            modules=self.modules,
            value_sites=self.value_sites,
            ledger=self.ledger,
            solver_state=self.solver_state,
            value_store=self.values,
            state_budget=self.state_budget,
            gather_gradients=self.gradients,
            on_keys=self.on_keys,
            progress=self.progress,
            values_most=self.values_most,
            tuning=self.tuning,
            seed=self.seed,
        )

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """A transaction of the ledger. However it ends, the solver state holds as many batches as the ledger."""
        try:
            with self.ledger.transaction():
                yield
        finally:
            self._settle()

    def _settle(self) -> None:
        """Give the states as many batches as the ledger has; without any, nothing stays decided."""
        self.solver_state.settle(self.ledger.count)
        if self.tuning is not None:
            self.tuning.settle(self.ledger.count)
        if not self.ledger.count and not self._continues:
            self._chosen = {name: number for name, number in self._chosen.items() if name in self._measured}

    @plain_torch()
    def finish(self) -> dict[str, int]:
        """Take the method's final step after the last batch: PRUNE restrains the spectrum of the total update.

        The step is a batch of the ledger and can be undone. Methods without such a step do nothing. When more edits
        follow, the next call starts from the total of all edits, not from the restrained one.

        Returns:
            name of a weight -> number of singular values that were restrained; empty when the last batch is already
            this step.
        """
        restrain, earlier_steps = SHAPINGS[self.recipe.shaping].of_total, self._final_steps
        if restrain is None or not self.ledger.count or self.ledger.count in earlier_steps:
            return {}
        restrained: dict[str, int] = {}
        wrote = False
        with torch.no_grad(), self._together():
            for names in self._written_matrices():
                original, *shared = (whole(self.ledger.original(name)[0]) for name in names)
                edits, *of_shared = (self.ledger.total(name, without=earlier_steps) for name in names)
                if shared:
                    edits, stacked = joined_update(edits, *of_shared), torch.cat([stacked_matrix(original), *shared], 1)
                    change = restrain(edits, stacked)
                    assert isinstance(change, LowRankUpdate)
                    parts = split_update(change, len(original), original.shape[-1])
                else:
                    parts = [change := restrain(edits, original)]
                for name, part in zip(names, parts, strict=True):
                    earlier = self.ledger.total(name, only=earlier_steps)
                    assert isinstance(earlier, (LowRankUpdate, ExpertUpdate))  # the sum of such steps
                    restrained[name] = change.rank
                    if change.rank or earlier.rank:
                        wrote = True
                        undo = replace(earlier, left=-earlier.left)
                        weight = self.ledger.original(name)[1]
                        self.ledger.write(name, weight, total_of([part.to(earlier.left.dtype), undo]))
            if wrote:
                self.solver_state.commit()  # an empty batch: the ledger and the solver state count the same batches
                self._final_steps = {*earlier_steps, self.ledger.count + 1}
                self._written[self.ledger.count + 1] = ()
        return restrained

    def _written_matrices(self) -> list[list[str]]:
        """The names of written weights, those of one stacked matrix together: of the experts, then of shared ones."""
        names = self.ledger.names()
        if not self.view.spec.shared or self.hparams.inner_params:
            return [[name] for name in names]
        of_layers = [list(map(weight_name_of, self.view.edited_weights(layer))) for layer in self.hparams.layers]
        return [together for together in of_layers if together[0] in names]

    @plain_torch(leave_inference_mode=False)
    def erase(
        self,
        texts: Sequence[str],
        labels: Sequence[Any],
        *,
        layers: Sequence[int] | None = None,
        tokens: TextTokens = "last",
        cost: ErasureCost = "texts",
        pairs: int = 0,
        keep_mean: bool = True,
    ) -> Erasure:
        """Erase from the outputs of edited layers what tells labeled texts apart. A batch of the ledger, like an edit.

        Layer after layer, from the lowest one up: W becomes W + Delta with (W + Delta) K = 0, where K spans what the
        layer's inputs have to do with the labels, and Delta has the least cost. With the covariance of inputs and
        labels as K (LEACE), no linear classifier tells the labels of these texts from the layer's output at these
        tokens. The residual stream beside the layer is not changed, so the model may still know them: an erased layer
        is no proof of ignorance.

        Args:
            texts: the texts.
            labels: a label for each text.
            layers: some of the editor's layers; None for all.
            tokens: the "last" token of each text, or "all" with the text's label.
            cost: what Delta should change least: "texts", the covariance of the inputs at these texts, centered and
                shrunk (LEACE); "statistics", the second moment of ordinary text that the editor has; "none", I (ProFS).
            pairs: with two labels whose texts are pairs, in the same order: the number of directions, the top singular
                vectors of the pairs' differences (ProFS). 0 for the covariance with the labels. With "all" tokens,
                pairs must have the same number of tokens.
            keep_mean: whether the mean input gets the output that it had, in place of LEACE's bias; one direction more.

        Returns:
            the batch. `rollback` undoes it, `patch` contains it, and the keys of earlier edits stay as they are.

        Raises:
            MethodError: the editor has no such layers, or edits modules by path; or a layer has experts.
            RequestError: a text that cannot be used.
            InvalidArgumentError, SolveError, StatisticsError: labels or texts that do not give directions. The model
                and the ledger are as they were, bit for bit.

        Cost: a forward pass of the texts for each layer, and d^3 / 3 flops for S.

        Source: LEACE (arXiv 2306.03819); ProFS (arXiv 2405.13967).
        """
        if self.hparams.inner_params:
            raise MethodError("erase() is for editors of layers, not of modules by path (inner_params)")
        if self.recipe.makes_memory:
            raise MethodError(f"{self.recipe.name} changes no weight: erase() is for editors of methods that do")
        chosen = sorted(self.hparams.layers if layers is None else layers)
        if not chosen or not set(chosen) <= set(self.hparams.layers):
            raise MethodError(
                f"layers {comma_list(chosen)}: choose from the editor's, {comma_list(self.hparams.layers)}"
            )
        if len(texts) != len(labels) or isinstance(texts, str):
            raise InvalidArgumentError(f"each text has a label: got {len(texts)} texts and {len(labels)} labels")
        if cost not in get_args(ErasureCost):
            raise InvalidArgumentError(f"cost must be {', '.join(get_args(ErasureCost))}; got {cost!r}")
        if cost == "statistics":
            self._check_statistics()
        if not self.in_place():
            raise EditError("the model was moved or cast since this Editor was made: make a new one")
        require_editable(self.view, self.modules)
        rows = tokenized_texts(self.view, self.tokenizer, texts, self.prompt_format)
        names = list(dict.fromkeys(labels))
        of_text = torch.tensor([names.index(label) for label in labels], dtype=torch.int64)
        plan = ErasurePlan(rows, of_text, tokens, cost, pairs, keep_mean)
        updates, norms = {}, {}
        with self._together(), torch.no_grad():
            for layer in chosen:
                name, weight = self.view.weight_name(layer), self.modules[self.view.module_name(layer)]
                moment = self.solver_state.moment(layer) if cost == "statistics" else None
                before = whole(weight)
                update = plan.update(self.view, layer, before, moment, self.hparams.mom2_ridge)
                norms[name] = update.norm() / float(torch.linalg.vector_norm(before, dtype=torch.float64))
                updates[name] = update.cpu()
                self.ledger.write(name, weight, update)
            self.solver_state.commit()  # an empty batch: the ledger and the solver state count the same batches
            number = self.ledger.count + 1
            self._written[number] = ()
        return Erasure(number, updates, norms)

    @plain_torch()
    def check(
        self, requests: Iterable[EditRequest | Mapping[str, Any] | PreparedRequest], on_error: OnError = "raise"
    ) -> tuple[list[PreparedRequest], dict[int, str]]:
        """Tokenize requests as `edit` does: those that can be written, and index -> what is wrong. Nothing is written.

        Raises:
            RequestError: with `on_error="raise"`, naming every request that cannot be written.
        """
        if on_error not in ("raise", "skip"):
            raise MethodError(f"on_error = {on_error!r}: choose raise or skip")
        rows = rows_of(requests)
        if not rows:
            raise EditError("no requests")
        if all(isinstance(row, PreparedRequest) for row in rows):
            return rows, {}
        reported = set(rows.skipped) if isinstance(rows, RequestList) and rows.intact() else set()  # when it was read
        read = as_requests(rows, "skip", self.recipe.needs_subject, self._notes)
        parsed = dict(zip(read.places, read, strict=True))
        tuning = self.recipe.tuning
        prepared, unusable = prepare_each(
            self.tokenizer,
            parsed,
            self.prefixes,
            self.view.max_length,
            self.prompt_format,
            vocabulary=self.view.vocabulary,
            target_separator=self.target_separator,
            neighbors=self.hparams.neighbor_columns if self.recipe.weighs_requests else 0,
            general=tuning is not None and tuning.extra_rows == "general",
            contrasted=tuning is not None and tuning.locates_layers and len(self.hparams.layers) > 1,
        )
        problems = read.skipped | unusable
        if on_error == "raise":
            require_no_problems({place: reason for place, reason in problems.items() if place not in reported})
        return prepared, dict(sorted(problems.items()))

    @plain_torch()
    def rollback(self, batches: int = 1, restored: bool = False) -> None:
        """Undo the last `batches` calls of `edit`, bit for bit; with `memory_window` = m, at most m.

        Args:
            batches: how many.
            restored: the caller has already restored the matrices, for example from copies: they are only compared,
                and the editor forgets the batches.

        Raises:
            InvalidArgumentError: there are fewer batches, or they are older than the window; nothing is undone.
            EditError: something else has changed a matrix since the last write, or a memory stands beside it; nothing
                is undone.
        """
        self._require_no_memory_beside()
        try:
            with torch.no_grad():
                self.ledger.rollback(batches, restored)
        finally:
            self._settle()
            self._final_steps = {number for number in self._final_steps if number <= self.ledger.count}

    def restore(self) -> None:
        """Undo everything this editor wrote, also what is older than the window: the original weights, bit for bit."""
        self._restore()

    def overwrite(self) -> None:
        """`restore` where something else has changed the edited matrices: the originals are copied over them."""
        with torch.no_grad():
            for name in self.ledger.names():
                original, weight = self.ledger.original(name)
                local(weight).copy_(local(original))
        self._restore(restored=True)

    def _require_no_memory_beside(self) -> None:
        """Raise EditError where a memory that is attached was made beside a matrix that this editor has written."""
        routes = attached_routes(self.view.model)
        if routes is not None and weight_name_of(routes.path) in self.ledger.names():
            raise EditError(
                f"a memory is attached beside {routes.path} as this editor has left it: detach it first "
                "(kedit_fast.detach(model))"
            )

    def _restore(self, restored: bool = False) -> None:
        self._require_no_memory_beside()
        try:
            with torch.no_grad():
                self.ledger.restore(restored)
        finally:
            self._settle()
            if not self.ledger.count:
                self._final_steps = set()

    @plain_torch()
    def patch(self) -> Patch:
        """Everything that this editor has written and not undone, as a patch for other copies of the model.

        The factors of all batches stand side by side; `Patch.compacted` reduces their number. Once batches are older
        than the window (`memory_window`), the sum of all is a matrix as large as the weight.

        Raises:
            EditError: nothing was written, or something else has changed a matrix since.
        """
        if self.recipe.makes_memory:
            raise EditError(
                f"{self.recipe.name} changes no weight: its edits are in Editor.memory, which can be saved and attached"
            )
        if not self.ledger.count:
            raise EditError("there is nothing to make a patch of: no batch was written")
        updates, targets = {}, {}
        for name in self.ledger.names():
            module = module_path_of(name)
            self.ledger.require_untouched(name)
            original, weight = map(whole, self.ledger.original(name))
            of_layer = any(module == self.view.module_name(layer) for layer in self.hparams.layers)
            plain_layer = of_layer and not is_experts_path(module)
            transposed = self.view.spec.transposed if plain_layer else edited_weight_of(self.view.model, module)[1]
            dtype = dtype_name(weight.dtype)
            updates[module] = self.ledger.total(name).compacted().cpu()
            targets[module] = Target(sha256(original), sha256(weight), dtype, transposed)
        requests = [r for number in range(1, self.ledger.count + 1) for r in self._written[number]]
        records = tuple({"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new} for r in requests)
        return Patch(updates, targets, self.recipe.name, {**asdict(self.hparams), **self.resolved}, records)

    @property
    def memory(self) -> SideMemory:
        """What stands beside the weights, of methods that change none: to be saved, and attached to other copies.

        Raises:
            EditError: the method writes into the weights (`patch`), or nothing was edited.
        """
        if self.tuning is None or not self.recipe.makes_memory:
            raise EditError(f"{self.recipe.name} keeps no memory beside the weights: its edits are in Editor.patch()")
        if self.tuning.memory is None:
            raise EditError("there is no memory: no batch was edited")
        return self.tuning.memory

    @plain_torch()
    def values_together(self, prepared: Sequence[PreparedRequest]) -> int | None:
        """How many of these requests fit in memory while their values are optimized; None where that is not asked."""
        if not self.recipe.optimizes_values or self.hparams.values_batch or not prepared:
            return None
        sites = [Site(self.hparams.layers[-1], kind) for kind in SITES[self.value_sites]]
        reserved = copied_bytes(self.view, sites, self.hparams)
        return fitting_batch(self.view, prepared, sites, reserved=reserved).requests

    def take_over(self, prefixes: Sequence[str], values_most: int | None) -> None:
        """Take over what an editor like this one had decided before its first batch: see `prefixes`, `values_most`."""
        self._prefixes, self.values_most = tuple(prefixes), values_most

    @plain_torch()
    def identity(self) -> dict[str, Any]:
        """What this editor works on, for files that belong to it: the model, its matrices as they are, the prompts."""
        return self._state_identity()

    def recorded(self, result: EditResult) -> BatchRecord:
        """What the last call of `edit`, which returned `result`, has added to this editor, for `repeat`."""
        self._require_no_memory("be recorded")
        if not result.batch or result.batch != self.ledger.count:
            raise EditError(f"batch {result.batch} is not the last of {self.ledger.count} batches")
        bits = {} if self.view.is_sharded else {name: self.ledger.bits(name) for name in result.updates}
        return BatchRecord(self.ledger.batches[-1], self.solver_state.committed, bits, dict(self._chosen))

    @plain_torch()
    def repeat(self, record: BatchRecord, requests: Sequence[EditRequest]) -> None:
        """Write a batch again that an editor like this one has recorded: weights, ledger and state get the same bits.

        Args:
            record: what `recorded` returned there.
            requests: those that the batch has written.

        Raises:
            EditError: the matrices get other bits: another model, or a machine that computes differently. Nothing is
                written.
        """
        number = self.ledger.count + 1
        with self._together(), torch.no_grad():
            weights = {weight_name_of(path): weight for path, weight in self.modules.items()}
            entries = [entry.on(weights[entry.name].device) for entry in record.entries]
            self.ledger.repeat(entries, weights)
            for name, bits in record.bits.items():
                if self.ledger.bits(name) != bits:
                    raise EditError(
                        f"{name} gets other bits than when batch {number} was written: another model, "
                        "or a machine that computes differently"
                    )
            self.solver_state.repeat(record.committed)
            self._chosen = dict(record.chosen)
            self._written[number] = tuple(requests)

    @property
    def keeps_state(self) -> bool:
        """Whether the method keeps something between batches beside the ledger, which `save_state` writes."""
        return self.recipe.keeps_state

    @plain_torch()
    def save_state(self, path: str | os.PathLike) -> None:
        """Write what the method keeps between batches (keys of earlier edits, a normalizer) to a safetensors file.

        The file also holds the context prefixes, because an edited model would generate other ones. With it and the
        edited model, another process can continue: `load_state` in an Editor with the same arguments. The ledger is
        not in the file, so earlier batches cannot be undone there. In a process group the first process writes.

        Raises:
            StatisticsError: the file cannot be written; an older one stays.
        """
        self.state_writer()(path)

    @plain_torch()
    def state_writer(self) -> Callable[[str | os.PathLike], None]:
        """A function that does what `save_state` does, and needs no other process.

        Of a tensor-parallel model the parts are gathered here: all processes call this, and the first one what it
        returns.
        """
        self._require_no_memory("be continued from a saved state")
        identity = {**self._state_identity(), "prefixes": list(self.prefixes)}

        def write(path: str | os.PathLike) -> None:
            if world()[0] == 0:
                self.solver_state.save(path, identity, self._chosen)

        return write

    @plain_torch()
    def load_state(self, path: str | os.PathLike) -> None:
        """Read what `save_state` wrote, before the first edit. The next updates are those of the run that wrote it.

        Raises:
            StatisticsError: a file that cannot be read or is damaged; or one of another method, configuration, prompt
                format, model or statistics, or of a model with other edits in it.
            EditError: this editor has edited already.
        """
        self._require_no_memory("be continued from a saved state")
        identity, self._chosen = self.solver_state.load(path, self._state_identity())
        self._prefixes, self._continues = tuple(identity["prefixes"]), True

    def _require_no_memory(self, wish: str) -> None:
        """Raise EditError for methods whose batches are in a memory beside the weights."""
        if self.recipe.makes_memory:
            raise EditError(
                f"the batches of {self.recipe.name} cannot {wish}: they are in Editor.memory, whose `save` writes what "
                "answers in the model"
            )

    def _state_identity(self) -> dict[str, Any]:
        """What a saved state belongs to, beside the hyper-parameters."""
        example = "{} is" if self.prompt_format is None else self.prompt_format("{} is")
        identity: dict[str, Any] = {"model": fingerprint(self.view, self.tokenizer), "prompt format": example}
        if self._requested_prefixes is not None:
            identity["prefixes"] = list(self._requested_prefixes)
        return {**identity, "edited matrices": edit_fingerprint(map(whole, self.modules.values()))}

    def set_key_memories(self, memories: Mapping[int, KeyMemory]) -> None:
        """Replace the keys that a method with a memory has of earlier edits, for edits made outside this editor.

        Args:
            memories: layer -> the keys of earlier edits, over this editor's `preconditioner` of that layer.
        """
        self.solver_state.set_key_memories(memories)

    @plain_torch()
    def preconditioner(self, layer: int) -> Preconditioner:
        """S^-1 of a layer, factored on first use and cached."""
        return self.solver_state.preconditioner(layer)
