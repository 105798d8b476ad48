"""The mass and sequential drivers: one pipeline of values, keys, solve and write for every recipe."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kedit_fast.editing.gradients import NOT_FINITE, answer_gradients
from kedit_fast.editing.keys import KeyPass, StateBudget
from kedit_fast.editing.ledger import Ledger
from kedit_fast.editing.solver_state import SolverState
from kedit_fast.editing.values.loop import SITES
from kedit_fast.editing.values.protocol import ValueStore
from kedit_fast.editing.values.result import PROBLEMS, Values
from kedit_fast.editing.values.shared import find_shared_values, flush_store
from kedit_fast.editing.values.store import open_values
from kedit_fast.errors import EditError, MethodError, StatisticsError
from kedit_fast.methods.hparams import make_hparams, worth_a_warning
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.editable import require_editable
from kedit_fast.models.fingerprint import difference, fingerprint
from kedit_fast.models.forward import Site, require_passes
from kedit_fast.models.view import ModelView, linear_weight
from kedit_fast.patches.patch import Patch, Target
from kedit_fast.requests.prefixes import generate_prefixes
from kedit_fast.requests.problems import require_no_problems
from kedit_fast.requests.prompts import PreparedRequest, PromptFormat, prepare_each
from kedit_fast.requests.reading import RequestList, as_requests, rows_of
from kedit_fast.requests.record_fields import Notes
from kedit_fast.requests.request import FIELDS, EditRequest
from kedit_fast.requests.spacing import AUTO, check_separator
from kedit_fast.solver.key_memory import KeyMemory
from kedit_fast.solver.least_squares import collisions
from kedit_fast.solver.low_rank import LowRankUpdate, Update
from kedit_fast.solver.preconditioner import NullSpace, Preconditioner
from kedit_fast.solver.shaping import prune, rect, spectral_norm
from kedit_fast.solver.value_descent import Status
from kedit_fast.statistics.collect import Statistics
from kedit_fast.support.dtypes import accumulation_dtype
from kedit_fast.support.matrix_bits import edit_fingerprint, sha256
from kedit_fast.support.process_group import world
from kedit_fast.support.timing import synchronized_clock
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
NORM_WARNING = 2.0  # |Delta| / |W| above which an edit is more likely to harm than to teach


@dataclass(frozen=True)
class EditResult:
    """What one call of `Editor.edit` did."""

    batch: int  # its number in the ledger, from 1; 0 when every request was skipped
    requests: tuple[EditRequest, ...]  # those that were written
    separators: tuple[str, ...]  # of each, what was put between its prompt and its target
    targets: tuple[tuple[int, ...], ...]  # of each, the tokens of its target
    updates: dict[str, tuple[Update, ...]]  # weight name -> what was added to it, in order; on the host
    losses: tuple[
        float, ...
    ]  # of the values, at their last forward pass; of the targets where gradients are the values
    steps: tuple[int, ...]  # optimiser steps of the values
    relative_norms: dict[str, float]  # weight name -> |Delta| / |W| (W before the batch)
    residual: (
        float  # |z - h| after the write / before it, over all requests: what the write left undone; 0 for UltraEdit
    )
    collisions: tuple[tuple[int, int], ...]  # pairs of requests with nearly one key at the last layer
    skipped: dict[int, str]  # index in the call -> why it was left out (on_error or on_bad_pivot = "skip")
    prefixes: tuple[str, ...]  # the context prefixes that were used
    seconds: dict[str, float]  # values, keys, solve, write


class Editor:
    """Edits a causal language model in place; every call of `edit` is one batch that can be taken back.

    Example:
        >>> editor = Editor(model, tokenizer, "memit", statistics=statistics)
        >>> editor.edit([{"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "violin"}])
        >>> editor.rollback()

    Args:
        model: a causal language model of a known architecture; its edited matrices are written in place. What cannot be
            edited (adapters, compiled or offloaded parts, shared weights: models.editable) is refused here, by name.
        tokenizer: its tokenizer.
        method: its name, one of kedit_fast.methods.registry.RECIPES (`kedit-fast methods` lists them).
        statistics: second moments for the edited layers, from collect_statistics or load_statistics; needed unless
            the method uses none (UltraEdit) or runs with `mom2_adjustment=False`.
        null_spaces: by layer, for AlphaEdit, instead of statistics: see
            kedit_fast.solver.alphaedit_projector.load_projector.
        layers: edited layers, zero-based; None for the preset's.
        hparams: values that override the preset's, by name (see kedit_fast.methods.hparams.Hparams).
        seed: of the context prefixes.
        prefixes: context prefixes to use instead of generated ones, each ending in ". ".
        spec: an ArchSpec for an architecture that is not known.
        values: where optimised values are kept and looked up: a file of ours, a template of memit's npz files with
            three {}, or an object like a ValueStore.
        prompt_format: from a prompt, which may hold {} for the subject, to the text that the model reads, for example
            kedit_fast.requests.chat.chat_format(tokenizer).
        target_separator: what stands between prompt and target of requests that say nothing: "auto" decides from the
            text (kedit_fast.requests.spacing), " " or "".
        state_budget: bytes for the states that are carried from layer to layer while keys are computed.
        progress: show bars on stderr.

    Where torch.distributed is initialised (`kedit_fast.support.process_group.start()` under torchrun) every process
    makes the same calls; each optimises its share of the values and all write the same.

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
        target_separator: str = AUTO,
        state_budget: StateBudget | None = None,
        progress: bool = False,
    ):
        self.view = ModelView(model, spec)
        self.tokenizer = tokenizer
        self.recipe: Recipe = find_recipe(method)
        overrides = dict(hparams or {})
        if layers is not None:
            overrides["layers"] = tuple(layers)
        self.hparams, self.origin = make_hparams(method, model.config, overrides)
        if idle := worth_a_warning(self.recipe, overrides):
            _log.warning("%s does not use %s", self.recipe.name, ", ".join(idle))
        if self.hparams.layers:
            self.view.check_layers(self.hparams.layers)
        if self.hparams.v_loss_layer not in (-1, self.view.num_layers - 1):
            raise MethodError(
                f"v_loss_layer = {self.hparams.v_loss_layer} is not implemented: the loss is taken after the last "
                f"layer, {self.view.num_layers - 1}"
            )
        self.modules = self._edited_modules()
        require_editable(self.view, self.modules)
        self.value_sites = self.recipe.values_on(self.view.spec.post_norm)
        self.site = SITES.get(self.value_sites, ("mlp",))[-1]  # of the value that the last layer is to put out
        self.ledger = Ledger()
        self._finished: set[int] = set()  # numbers of batches that are a method's final step
        self._written: dict[int, tuple[EditRequest, ...]] = {}  # by batch
        self._notes = Notes(FIELDS)  # of records' fields, so that each is named once
        self.seed = seed
        self.progress = progress
        self.gradients = answer_gradients  # what gathers UltraEdit's keys and gradients
        self.on_keys: Callable[[int, torch.Tensor], None] | None = None  # told each layer's keys [d, u] in a batch
        self.prompt_format = prompt_format
        self.target_separator = check_separator(target_separator)
        self.state_budget = state_budget
        self.values = open_values(values) if isinstance(values, str | os.PathLike) else values
        self._statistics = statistics
        self._prefixes = self._given_prefixes = None if prefixes is None else tuple(prefixes)
        if null_spaces is not None and not self.recipe.uses_null_space:
            raise MethodError(f"{self.recipe.name} has no null space: null_spaces are for AlphaEdit")
        given = set(null_spaces or ()) >= set(self.hparams.layers)
        if self.hparams.uses_statistics and not given:
            if statistics is None:
                raise StatisticsError(
                    f"{self.recipe.name} needs statistics for layers {', '.join(map(str, self.hparams.layers))}: "
                    "collect_statistics(model, tokenizer, texts, layers), or `kedit-fast stats`"
                )
            for layer in self.hparams.layers:
                statistics.moment(layer)
            if what := difference(statistics.model, fingerprint(self.view, tokenizer)):
                raise StatisticsError(f"the statistics are of another model: different {what}")
        require_passes(self.view, self._sites())
        self.solver_state = SolverState(self.view, self.recipe, self.hparams, statistics, null_spaces)

    def _edited_modules(self) -> dict[str, torch.Tensor]:
        """Module path -> its weight [out, in], a view on the model's memory, of all that is edited."""
        if self.hparams.inner_params:
            paths = [name.removesuffix(".weight") for name in self.hparams.inner_params]
            return {path: self.view.linear(path)[1] for path in paths}
        return {self.view.module_name(layer): self.view.weight(layer) for layer in self.hparams.layers}

    def _sites(self) -> list[Site]:
        """What an edit looks at; the modules of `inner_params` are seen by the pass that takes their gradients."""
        layers = () if self.hparams.inner_params else self.hparams.layers
        outputs = [Site(layers[-1], what) for what in SITES.get(self.value_sites, ())] if layers else []
        return [Site(layer, "key") for layer in layers] + outputs

    def in_place(self) -> bool:
        """Whether the matrices to be edited are still the model's: moving or casting a model gives it others."""
        return all(
            now.data_ptr() == self.modules[name].data_ptr() and now.dtype == self.modules[name].dtype
            for name, now in self._edited_modules().items()
        )

    def require_untouched(self) -> None:
        """Raise EditError when something else has changed what was written, as a hook that computes a weight again."""
        for name in self.ledger.names():
            self.ledger.require_untouched(name)

    @property
    @plain_torch()
    def prefixes(self) -> tuple[str, ...]:
        """The context prefixes, generated from the unedited model on first use."""
        if self._prefixes is None:
            lengths = self.hparams.context_template_length_params
            self._prefixes = generate_prefixes(self.view, self.tokenizer, lengths, self.seed)
        return self._prefixes

    @plain_torch(leave_inference_mode=False)
    def edit(
        self, requests: Iterable[EditRequest | Mapping[str, Any] | PreparedRequest], on_error: str = "raise"
    ) -> EditResult:
        """Write one batch of requests; calling it again is sequential editing.

        A method with a batch form writes all requests at once, a rank-one method one after another inside the batch.

        Args:
            requests: records, mappings, or what `check` returned; a list, a generator or a table of them, read once.
                Without a subject only for a method that looks at whole prompts (UltraEdit).
            on_error: "raise" at requests that cannot be written, before anything is; or "skip" them, go on with the
                rest and name them in the result; where nothing is left, nothing is written, which is no batch of
                the ledger. Such are: a subject or target without tokens, a prompt longer than
                the model takes, a token that it has no embedding for, a target that it says already (unless the
                hyper-parameter `on_predicted` is "allow"), and a loss or gradient that is not finite.

        Raises:
            RequestError: requests that cannot be written, by id, or by position or subject.
            UnsupportedModelError: the model has become one that cannot be edited; nothing was computed.
            EditError, SolveError, StatisticsError: the edit failed; the model, the ledger and what the method keeps
                between batches are as they were before, to the bit.
        """
        if torch.is_inference_mode_enabled():
            raise EditError("values need gradients: call edit() outside torch.inference_mode()")
        if not self.in_place():
            raise EditError("the model was moved or cast since this Editor was made: make a new one")
        require_editable(self.view, self.modules)  # also what was compiled or got an adapter since
        prepared, problems = self.check(requests, on_error)
        numbers = [i for i in range(len(prepared) + len(problems)) if i not in problems]
        exact = not self.recipe.weighs_requests
        if exact and _weights(prepared) is not None:
            raise MethodError(
                f"{self.recipe.name} gives requests no weights: its batches have no least squares over them"
            )
        batch = _Batch(self, prepared, on_error)
        with self._together(), torch.no_grad():
            try:
                batch.run()
            except BaseException:
                with contextlib.suppress(EditError):  # what stopped the run comes first
                    flush_store(self.values)
                raise
            flush_store(self.values)
            problems |= {numbers[i]: reason for i, reason in batch.skipped.items()}
            written = [p for i, p in enumerate(prepared) if i not in batch.skipped]
            number = len(self.ledger.batches) + 1 if written else 0
            result = batch.result(number, written, dict(sorted(problems.items())))
            if exact and written:  # no pass has followed the last write: a hook may still put a weight back
                require_passes(self.view, self._sites())
            for name in batch.updates:
                self.ledger.require_untouched(name)
            if written:
                self.solver_state.commit()
                self._written[number] = result.requests
        return result

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """A transaction of the ledger; however it ends, the engine holds as many batches as the ledger."""
        try:
            with self.ledger.transaction():
                yield
        finally:
            self.solver_state.settle(len(self.ledger.batches))

    @plain_torch()
    def finish(self) -> dict[str, int]:
        """What the method does once, after its last batch: PRUNE restrains the spectrum of the total update.

        It is a batch of the ledger and can be taken back; methods without such a step do nothing. After further edits
        it starts from the total of all edits again, not from what was restrained before.

        Returns:
            weight name -> singular values that were restrained; nothing where the last batch is this step already.
        """
        done = self._finished
        if self.recipe.shaping != "prune" or not self.ledger.batches or len(self.ledger.batches) in done:
            return {}
        restrained: dict[str, int] = {}
        wrote = False
        with torch.no_grad(), self._together():
            for name in self.ledger.names():
                original, weight = self.ledger.original(name)
                edits, earlier = self.ledger.total(name, without=done), self.ledger.total(name, only=done)
                change = prune(edits, spectral_norm(original))
                restrained[name] = change.rank
                if change.rank or earlier.rank:
                    wrote = True
                    left = torch.cat([change.left.to(earlier.left), -earlier.left], 1)
                    right = torch.cat([change.right.to(earlier.right), earlier.right], 1)
                    self.ledger.write(name, weight, LowRankUpdate(left, right))
            if wrote:
                self.solver_state.commit()  # an empty batch, so that both count alike
                self._finished = {*done, len(self.ledger.batches) + 1}
                self._written[len(self.ledger.batches) + 1] = ()
        return restrained

    @plain_torch()
    def check(
        self, requests: Iterable[EditRequest | Mapping[str, Any] | PreparedRequest], on_error: str = "raise"
    ) -> tuple[list[PreparedRequest], dict[int, str]]:
        """Tokenise requests as `edit` does: those that can be used, and index -> what is wrong; nothing is written.

        Raises:
            RequestError: with on_error "raise", naming every request that cannot be used.
        """
        if on_error not in ("raise", "skip"):
            raise MethodError(f"on_error = {on_error!r}: choose raise or skip")
        rows = rows_of(requests)
        if not rows:
            raise EditError("no requests")
        if all(isinstance(row, PreparedRequest) for row in rows):
            return rows, {}
        known = set(rows.skipped) if isinstance(rows, RequestList) and rows.intact() else set()  # when it was read
        read = as_requests(rows, "skip", self.recipe.needs_subject, self._notes)
        parsed = dict(zip(read.places, read, strict=True))
        prepared, unusable = prepare_each(
            self.tokenizer, parsed, self.prefixes, self.view.max_length, self.prompt_format,
            vocabulary=self.view.vocabulary, target_separator=self.target_separator,
        )  # fmt: skip
        problems = read.skipped | unusable
        if on_error == "raise":
            require_no_problems({place: reason for place, reason in problems.items() if place not in known})
        return prepared, dict(sorted(problems.items()))

    @plain_torch()
    def rollback(self, batches: int = 1, restored: bool = False) -> None:
        """Take back the last `batches` calls of `edit`, to the bit.

        Args:
            batches: how many.
            restored: the matrices have been put back by somebody else already, for example from copies: they are
                compared, and the editor forgets the batches.

        Raises:
            EditError: something else has changed a matrix since; nothing is taken back.
        """
        try:
            with torch.no_grad():
                self.ledger.rollback(batches, restored)
        finally:
            self.solver_state.settle(len(self.ledger.batches))
            self._finished = {number for number in self._finished if number <= len(self.ledger.batches)}

    def restore(self) -> None:
        """Take back everything this editor wrote: the model is what it was, to the bit."""
        self.rollback(len(self.ledger.batches))

    def overwrite(self) -> None:
        """`restore` where something else has changed what was written: the originals go over it."""
        with torch.no_grad():
            for name in self.ledger.names():
                original, weight = self.ledger.original(name)
                weight.copy_(original)
        self.rollback(len(self.ledger.batches), restored=True)

    @plain_torch()
    def patch(self) -> Patch:
        """All that this editor has written and not taken back, as a patch for other copies of the model.

        Batches' factors stand side by side; `Patch.compacted` makes them fewer.

        Raises:
            EditError: nothing was written, or something else has changed a matrix since.
        """
        if not self.ledger.batches:
            raise EditError("there is nothing to make a patch of: no batch was written")
        updates, targets = {}, {}
        for name in self.ledger.names():
            module = name.removesuffix(".weight")
            self.ledger.require_untouched(name)
            original, weight = self.ledger.original(name)
            own = any(module == self.view.module_name(layer) for layer in self.hparams.layers)
            transposed = self.view.spec.transposed if own else linear_weight(self.view.model, module)[1]
            dtype = str(weight.dtype).removeprefix("torch.")
            updates[module] = self.ledger.total(name).compacted().cpu()
            targets[module] = Target(sha256(original), sha256(weight), dtype, transposed)
        requests = [r for number in range(1, len(self.ledger.batches) + 1) for r in self._written[number]]
        return Patch(
            updates, targets, self.recipe.name, asdict(self.hparams),
            tuple({"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new} for r in requests),
        )  # fmt: skip

    @property
    def keeps_state(self) -> bool:
        """Whether the method keeps something between batches."""
        return self.recipe.keeps_state

    @plain_torch()
    def save_state(self, path: str | os.PathLike) -> None:
        """Write what the method keeps between batches (keys of earlier edits, a normalizer) to a safetensors file,
        and the context prefixes: an edited model would write other ones.

        Together with the edited model it lets another process go on: `load_state` in an Editor made the same way. The
        ledger is not in it, so batches from before cannot be taken back there. In a process group the first process
        writes.

        Raises:
            StatisticsError: the file cannot be written; an older one stays.
        """
        if world()[0] == 0:
            self.solver_state.save(path, {**self._belongs(), "prefixes": list(self.prefixes)})

    @plain_torch()
    def load_state(self, path: str | os.PathLike) -> None:
        """Take up what `save_state` wrote, before the first edit; the next updates are those of the run that wrote it.

        Raises:
            StatisticsError: a file that cannot be read or is damaged; or of another method, configuration, prompt
                format, model, statistics, or of a model with other edits in it.
            EditError: this editor has edited already.
        """
        self._prefixes = tuple(self.solver_state.load(path, self._belongs())["prefixes"])

    def _belongs(self) -> dict[str, Any]:
        shown = "{} is" if self.prompt_format is None else self.prompt_format("{} is")
        belongs = {"model": fingerprint(self.view, self.tokenizer), "prompt format": shown}
        if self._given_prefixes is not None:
            belongs["prefixes"] = list(self._given_prefixes)
        return {**belongs, "edited matrices": edit_fingerprint(list(self.modules.values()))}

    def set_key_memories(self, memories: Mapping[int, KeyMemory]) -> None:
        """Replace what a method with a memory knows of earlier edits, where somebody else has made these.

        Args:
            memories: layer -> the keys of earlier edits, over this editor's `preconditioner` of that layer.
        """
        self.solver_state.set_key_memories(memories)

    @plain_torch()
    def preconditioner(self, layer: int) -> Preconditioner:
        """S^-1 of a layer, factored on first use and kept."""
        return self.solver_state.preconditioner(layer)


class _Batch:
    """The state of one call of `Editor.edit`."""

    def __init__(self, editor: Editor, prepared: list[PreparedRequest], on_error: str):
        self.editor, self.prepared, self.on_error = editor, prepared, on_error
        self.view, self.hparams, self.recipe = editor.view, editor.hparams, editor.recipe
        self.updates: dict[str, list[Update]] = {}  # on the host, once they are written for good
        self.norms: dict[str, list[float]] = {}  # of each
        self.weight_norms: dict[str, float] = {}
        self.seconds = dict.fromkeys(("values", "keys", "solve", "write"), 0.0)
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.skipped: dict[int, str] = {}  # index in `prepared`
        self.collisions: list[tuple[int, int]] = []
        self.before = self.after = 0.0  # squared norms of the residuals

    def run(self) -> None:
        if not self.prepared:
            return
        if self.recipe.schedule == "gradients":
            self.run_gradients()
        elif self.recipe.schedule == "mass":
            self.run_mass()
        else:
            for index in range(len(self.prepared)):
                self.run_single(index)

    def run_mass(self) -> None:
        """All requests at once: the residual at the last layer, spread over the layers from below."""
        layers = self.hparams.layers
        site = Site(layers[-1], self.editor.site)
        with self.timed("solve"):
            for layer in layers:  # bad statistics stop the batch before its values are optimised
                self.editor.preconditioner(layer)
        prepared, values = self.optimise(range(len(self.prepared)), layers[-1])
        if not prepared:
            return
        weights, groups = _weights(prepared), self.groups(prepared)
        with self.timed("keys"):
            passes = KeyPass(self.view, prepared, site, self.recipe.key_weights, self.editor.state_budget)
        for i, layer in enumerate(layers):
            with self.timed("keys"):
                seen = passes.at(layer)
            if self.editor.on_keys is not None:
                self.editor.on_keys(layer, seen.keys)
            residual = values.targets.to(seen.outputs) - seen.outputs  # [h, u]
            if i == 0:
                self.before = float(residual.square().sum())
            left = len(layers) - i
            share = 1 / left if self.recipe.spread == "linear" else left**-0.5
            with self.timed("solve"):
                update = self.editor.solver_state.mass(layer, seen.keys, residual * share, weights, groups)
            self.write(self.view.module_name(layer), update)
            if layer == layers[-1]:
                self.collisions = collisions(seen.keys)
                if self.collisions and groups is None:
                    _log.warning(
                        "%d pairs of requests have nearly the same key, as those on one subject have: each gets a mean "
                        "of their values (the method memit-merge gives them one value)", len(self.collisions),
                    )  # fmt: skip
        if self.recipe.shaping == "rect":
            self.mask()
            passes.restart()
        with self.timed("keys"):
            outputs = passes.outputs()
        self.after = float((values.targets.to(outputs) - outputs).square().sum())

    def run_single(self, index: int) -> None:
        """One request: the output at the value's key becomes the value exactly."""
        (layer,) = self.hparams.layers
        site = Site(layer, self.editor.site)
        prepared, values = self.optimise([index], layer)
        if not prepared:
            return
        with self.timed("keys"):
            seen = KeyPass(self.view, prepared, site, self.recipe.key_weights, self.editor.state_budget).at(layer)
        residual = (values.targets.to(seen.outputs) - seen.outputs)[:, 0]
        key = seen.bare_keys[:, 0]
        if self.recipe.value_key == "mean":  # what the layer puts out at the mean key, which no prompt shows
            weight = self.view.weight(layer)
            wide = accumulation_dtype(weight)
            moved = weight.to(wide) @ (seen.keys[:, 0] - key).to(weight.device, wide)
            residual, key = residual - moved.to(residual), seen.keys[:, 0]
        with self.timed("solve"):
            update, pivot = self.editor.solver_state.single(layer, seen.keys[:, 0], key, residual)
        self.before += float(residual.square().sum())
        if update is None:
            self.skipped[index] = f"{prepared[0].name}: a bad pivot, cosine {pivot:.1e}"
            self.after += float(residual.square().sum())
            self.losses.pop()
            self.steps.pop()
            return
        written = self.write(self.view.module_name(layer), update)
        # With one layer the output moves by Delta k_v, so no second pass is needed.
        left_over = residual.to(written.left) - written.left @ (written.right.T @ key.to(written.right))
        self.after += float(left_over.square().sum())

    def run_gradients(self) -> None:
        """All requests at once: the gradients at their tokens are the values, of all modules from one backward pass."""
        rows = {"ans": "answer", "mask": "all"}[self.hparams.token]
        modules = self.editor.modules
        with self.timed("values"):
            found = self.editor.gradients(self.view, self.prepared, list(modules), rows, on_problem="keep")
        bad = {i: f"{self.prepared[i].name}: {NOT_FINITE}" for i in found.not_finite()}
        if self.on_error == "raise":
            require_no_problems(bad)
        self.skipped |= bad
        if len(bad) == len(self.prepared):
            return
        found = found.without(list(bad))
        self.losses += [loss for i, loss in enumerate(found.losses.tolist()) if i not in bad]
        self.steps += [0] * len(self.losses)
        with self.timed("solve"):
            updates = self.editor.solver_state.gradients(found.modules, found.turns)
        for name, update in updates.items():
            self.write(name, update)

    def mask(self) -> None:
        """RECT: all layers were solved with whole updates written; of each, only the largest changes stay."""
        with self.timed("write"):
            self.editor.ledger.withdraw()
        for name, updates in list(self.updates.items()):
            weight = self.editor.modules[name.removesuffix(".weight")]
            with self.timed("solve"):
                self.updates[name] = [rect(update, weight, self.hparams.rect_keep) for update in updates]
            with self.timed("write"):
                for update in self.updates.pop(name):
                    self.editor.ledger.write(name, weight, update)
                    self.keep(name, update)

    def groups(self, prepared: Sequence[PreparedRequest]) -> list[str] | None:
        """Subjects, where the method lets requests on one subject share a value."""
        return [p.request.subject.strip() for p in prepared] if self.recipe.merge else None

    def optimise(self, which: Sequence[int], layer: int) -> tuple[list[PreparedRequest], Values]:
        """Values of some requests, and which of them can be written; the others are skipped or raised."""
        prepared = [self.prepared[i] for i in which]
        with self.timed("values"), torch.enable_grad():
            values = find_shared_values(
                self.view, self.editor.tokenizer, prepared, layer, self.editor.value_sites, self.hparams,
                stop_rule=self.recipe.stop_rule,
                groups=self.groups(prepared), store=self.editor.values, progress=self.editor.progress,
            )  # fmt: skip
        problems = {}
        for place, code in enumerate(values.status.tolist()):
            if code in PROBLEMS and not (code == Status.PREDICTED and self.hparams.on_predicted == "allow"):
                problems[place] = f"{prepared[place].name}: {PROBLEMS[code]}"
        if self.on_error == "raise":
            require_no_problems(problems)
        self.skipped |= {which[place]: reason for place, reason in problems.items()}
        usable = [place for place in range(len(prepared)) if place not in problems]
        values = values.select(usable)
        self.losses += values.losses.tolist()
        self.steps += values.steps.tolist()
        return [prepared[place] for place in usable], values

    def write(self, module: str, update: LowRankUpdate) -> Update:
        """Add an update to a module's weight, within its limits; returns what was written."""
        name, weight = f"{module}.weight", self.editor.modules[module]
        self.weight_norms.setdefault(name, _norm(weight))
        with self.timed("solve"):
            shaped = self.editor.solver_state.limited(update, weight)
        with self.timed("write"):
            self.editor.ledger.write(name, weight, shaped)
        if self.recipe.shaping == "rect":  # to be masked yet
            self.updates.setdefault(name, []).append(shaped)
        else:
            self.keep(name, shaped)
        return shaped

    def keep(self, name: str, update: Update) -> None:
        """Remember an update on the host: beside the ledger's factors its own, in fp64, would fill a GPU."""
        self.norms.setdefault(name, []).append(update.norm())
        self.updates.setdefault(name, []).append(update.cpu())

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        begin = synchronized_clock(self.view.device)
        try:
            yield
        finally:
            self.seconds[phase] += synchronized_clock(self.view.device) - begin

    def result(self, number: int, written: Sequence[PreparedRequest], skipped: dict[int, str]) -> EditResult:
        norms = {
            name: (self.norms[name][0] if len(updates) == 1 else _total_norm(updates))
            / max(self.weight_norms[name], 1e-30)
            for name, updates in self.updates.items()
        }
        for name, norm in norms.items():
            if norm > NORM_WARNING:
                _log.warning("%s: the update is %.1f times the weight's norm", name, norm)
        return EditResult(
            batch=number,
            requests=tuple(p.request for p in written),
            separators=tuple(p.separator for p in written),
            targets=tuple(p.target for p in written),
            updates={name: tuple(updates) for name, updates in self.updates.items()},
            losses=tuple(self.losses),
            steps=tuple(self.steps),
            relative_norms=norms,
            residual=(self.after / self.before) ** 0.5 if self.before else 0.0,
            collisions=tuple(self.collisions),
            skipped=skipped,
            prefixes=self.editor.prefixes,
            seconds=self.seconds,
        )


def _norm(weight: torch.Tensor) -> float:
    wide = accumulation_dtype(weight)
    return float(torch.linalg.vector_norm(weight, dtype=wide))


def _weights(prepared: Sequence[PreparedRequest]) -> torch.Tensor | None:
    """Weights of the requests, or None where all are 1."""
    weights = [p.request.weight for p in prepared]
    return None if all(w == 1 for w in weights) else torch.tensor(weights, dtype=torch.float64)


def _total_norm(updates: Sequence[Update]) -> float:
    joined = LowRankUpdate(torch.cat([u.left for u in updates], 1), torch.cat([u.right for u in updates], 1))
    return joined.norm()
