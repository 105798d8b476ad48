"""Routes: which sequence a memory beside the weights answers for, decided once and kept with the sequence's cache.

A pass of the decoder over an empty cache, or without one, is a prefill: the memory decides from the inputs of its
module at the prompt's tokens, row by row, padding left out. The route then stays with the cache object: it follows when
rows of the cache are reordered, repeated or selected, and goes when the cache is reset. In between, every pass with
that cache, be it one token, a further turn of a conversation or the tokens of a draft, takes the route that is there.
So a route is never in the model, and any number of threads may run one model.

Nothing here waits for a device: whether a pass is a prefill is known from the cache object, and routes are tensors.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import inspect
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from kedit_fast.errors import InvalidArgumentError, SideMemoryError, UnsupportedModelError
from kedit_fast.models import patching
from kedit_fast.models.patching import Forward, SurroundedForward

_NAME = "_kedit_fast_routes"  # of the attribute of a model
_ON_CACHE = "kedit_fast_route"  # of the attribute of a cache
_CACHES = ("past_key_values", "cache_params")  # names of a decoder's argument that is a cache
_PACKED = ("cu_seq_lens_q", "cu_seqlens_q", "block_table")  # names of arguments of rows that hold several sequences


class Routed(Protocol):
    """What answers for sequences: see `kedit_fast.memories.memory.SideMemory`."""

    @property
    def empty(self) -> bool:
        """Whether no sequence can be routed to it."""
        ...

    @property
    def digest(self) -> str:
        """A hash of everything that decides what it does."""
        ...

    def decide(self, x: torch.Tensor, output: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The route [R] of packed sequences."""
        ...

    def outputs(
        self, x: torch.Tensor, output: torch.Tensor, route: torch.Tensor, place: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The module's output with the memory."""
        ...


class CacheRoute:
    """What a cache carries: the routes of its rows, and of which memory they are."""

    def __init__(self, version: str, route: torch.Tensor | None):
        self.version, self.route = version, route

    def __deepcopy__(self, memo: dict) -> CacheRoute:
        return CacheRoute(self.version, None if self.route is None else self.route.clone())


class _Thread(threading.local):
    """What one thread does with one model."""

    def __init__(self):
        self.current: _Pass | None = None
        self.drafts = 0  # last tokens of a row that are no prompt
        self.prompts: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.suspended = 0
        self.records: list[torch.Tensor] | None = None


class _Pass:
    """One pass of the decoder over [R, T] tokens."""

    def __init__(self, shape: Sequence[int], mask: torch.Tensor | None, route: torch.Tensor | None, drafts: int = 0):
        self.rows, self.tokens = shape
        self.drafts = drafts
        """Last tokens of each row that decide nothing."""
        self.mask = mask
        """[R, T] bool, True at tokens that are no padding; None where there is none, or the route is known."""
        self.route = route
        """[R] int64; None until it is decided."""
        self.place: torch.Tensor | None = None
        """[R, T] int64, tokens behind the last one of the prompt; None where all are behind it."""


class Routes:
    """A memory in a model: around the forward functions of the model, its decoder and one module inside.

    Args:
        model: the whole model.
        base: its decoder, which gets the cache and the attention mask.
        path: of the module inside the decoder that the memory is for.
        memory: what answers.
        see_prompts: called with the token ids [R, T] and the mask [R, T] of passes that decide.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        base: torch.nn.Module,
        path: str,
        memory: Routed,
        see_prompts: Callable[[torch.Tensor, torch.Tensor | None], None] | None = None,
    ):
        self.path, self._see_prompts = path, see_prompts
        self._model, self._base, self._module = model, base, model.get_submodule(path)
        self._names = tuple(inspect.signature(type(base).forward).parameters)[1:]
        self._thread = _Thread()
        self._surrounded: list[SurroundedForward] = []
        self.set_memory(memory)

    def set_memory(self, memory: Routed) -> None:
        """Let another memory answer from now on; caches of before are refused."""
        self.memory, self.version = memory, secrets.token_hex(8)

    def install(self) -> None:
        """Put it into the model; raises SideMemoryError where a memory is in it already."""
        if attached_routes(self._model) is not None:
            raise SideMemoryError("the model has a memory already: detach that one first, or let it swap memories")
        patching.attach(self._model, _NAME, self)
        if self._model is not self._base:
            self._surrounded.append(SurroundedForward(self._model, self._around_model))
        self._surrounded.append(SurroundedForward(self._base, self._around_base))
        self._surrounded.append(SurroundedForward(self._module, self._around_module))

    def remove(self) -> None:
        """Take it out of the model again; a second call does nothing."""
        for surrounded in reversed(self._surrounded):
            surrounded.remove()
        if self._surrounded and attached_routes(self._model) is self:
            patching.detach(self._model, _NAME)
        self._surrounded = []

    def reset(self, cache: Any) -> None:
        """Let the next pass with a cache decide anew, from that pass's own tokens."""
        follow(cache)
        setattr(cache, _ON_CACHE, CacheRoute(self.version, None))

    def _around_model(self, forward: Forward, args: tuple, kwargs: dict) -> Any:
        # Assisted decoding runs prompt and draft in one pass, and asks for the logits from the prompt's last token on.
        wanted = kwargs.get("logits_to_keep", 0)
        before = self._thread.drafts
        self._thread.drafts = wanted - 1 if isinstance(wanted, int) and wanted > 1 else 0
        try:
            return forward(*args, **kwargs)
        finally:
            self._thread.drafts = before

    def _around_base(self, forward: Forward, args: tuple, kwargs: dict) -> Any:
        thread = self._thread
        if thread.suspended:
            return forward(*args, **kwargs)
        given = {**dict(zip(self._names[: len(args)], args, strict=True)), **kwargs}
        cache = None
        for name in _CACHES:  # a loop, which older versions of torch.compile can read
            cache = given.get(name) if cache is None else cache
        before, thread.current = thread.current, self._begin(given, cache)
        try:
            output = forward(*args, **kwargs)
            run = thread.current
        finally:
            thread.current = before
        if run.route is None:
            raise SideMemoryError(
                f"{self.path} did not run in a pass of the model, so its memory was not asked: was the module replaced "
                "since the memory was attached? Detach the memory, and attach it again"
            )
        made = _cache_of(output)
        if isinstance(made, tuple):  # of a few models in older transformers; made anew in each pass
            carrying = _Tuple(made)
            setattr(carrying, _ON_CACHE, CacheRoute(self.version, run.route))
            output.past_key_values = carrying
        else:
            self._bind(cache if made is None else made, run.route)
        return output

    def _bind(self, cache: Any, route: torch.Tensor) -> None:
        """Let a cache carry a route, if there is a cache and it has none."""
        record = getattr(cache, _ON_CACHE, None)
        if cache is not None and (record is None or record.route is None):
            follow(cache)
            setattr(cache, _ON_CACHE, CacheRoute(self.version, route))

    def _begin(self, given: dict[str, Any], cache: Any) -> _Pass:
        """The pass that a call of the decoder makes; raises where it cannot be routed."""
        states = given.get("input_ids")
        if states is None:
            states = given.get("inputs_embeds")
        if states is None:
            raise UnsupportedModelError("a pass has neither input_ids nor inputs_embeds, so its rows are not known")
        shape = states.shape[:2]
        for name in _PACKED:
            if given.get(name) is not None:
                raise UnsupportedModelError(
                    f"a pass packs several sequences in a row ({name}: continuous batching, or rows without padding), "
                    "and a memory answers for rows: detach it, or run each sequence in a row of its own"
                )
        record = getattr(cache, _ON_CACHE, None)
        if record is not None and record.version != self.version:
            raise SideMemoryError(
                "a cache has keys and values that were made under another memory: start with an empty cache"
            )
        if record is not None and record.route is not None:
            if record.route.shape[0] != shape[0]:
                raise SideMemoryError(
                    f"a cache has the routes of {record.route.shape[0]} rows, and the pass has {shape[0]}: rows were "
                    "added or taken away by other means than the cache's own methods"
                )
            return _Pass(shape, None, record.route)
        if record is None and cache is not None and _has_begun(cache):
            raise SideMemoryError(
                "a cache began before the memory was attached, or was reordered as a tuple, which loses routes: "
                "start the sequence with an empty cache object (transformers.DynamicCache())"
            )
        mask = valid_tokens(given.get("attention_mask"), shape[1])
        if self._see_prompts is not None and given.get("input_ids") is not None and not torch.compiler.is_compiling():
            self._see_prompts(states, mask)
        drafts = 0 if cache is None else min(self._thread.drafts, shape[1] - 1)
        return _Pass(shape, mask, None, drafts)

    def _around_module(self, forward: Forward, args: tuple, kwargs: dict) -> Any:
        output = forward(*args, **kwargs)
        thread = self._thread
        if thread.suspended:
            return output
        run = thread.current
        if run is None:
            raise SideMemoryError(
                f"{self.path} runs outside of a pass of the decoder, where no sequence is known to its memory: detach "
                "the memory first"
            )
        x = args[0] if args else next(iter(kwargs.values()))
        if x.shape[:-1].numel() != run.rows * run.tokens:
            raise UnsupportedModelError(
                f"{self.path} is called with {list(x.shape)}, and the pass has {run.rows} rows of {run.tokens} tokens: "
                "a memory needs a module that runs on all tokens"
            )
        flat, out = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
        flat = flat.to(out.device)
        if run.route is None:
            with torch.no_grad():
                self._decide(run, flat, out)
        if self.memory.empty:
            return output
        assert run.route is not None
        route = run.route.to(out.device)[:, None].expand(-1, run.tokens).reshape(-1)
        place = None if run.place is None else run.place.reshape(-1)
        return self.memory.outputs(flat, out, route, place).view(output.shape)

    def _decide(self, run: _Pass, x: torch.Tensor, output: torch.Tensor) -> None:
        """Set the routes of a pass, and the places of its tokens."""
        rows, tokens, device = run.rows, run.tokens, x.device
        if self.memory.empty:
            run.route = torch.full((rows,), -1, dtype=torch.int64, device=device)
            return
        thread, at = self._thread, torch.arange(tokens, device=device)
        if run.mask is None and thread.prompts is None and not run.drafts:
            starts = torch.arange(rows + 1, device=device) * tokens
            run.place = (at - (tokens - 1)).expand(rows, -1)
        else:
            valid = torch.ones(rows, tokens, dtype=torch.bool, device=device)
            valid = valid if run.mask is None else run.mask.to(device)
            rank = valid.cumsum(1) - 1  # [R, T], of tokens in their rows
            prompt = valid & (at < tokens - run.drafts)
            if thread.prompts is not None:
                lengths, begins = thread.prompts
                if len(lengths) != rows:
                    raise InvalidArgumentError(f"prompt_tokens has lengths of {len(lengths)} rows, a pass has {rows}")
                prompt = prompt & (rank < lengths.to(device)[:, None])
                if begins is not None:
                    prompt = prompt & (rank >= begins.to(device)[:, None])
            last = torch.where(prompt, rank, -1).amax(1, keepdim=True)
            run.place = torch.where(valid, rank - last, 1)
            starts = torch.nn.functional.pad(prompt.sum(1).cumsum(0), (1, 0))
            order = (~prompt).reshape(-1).to(torch.uint8).argsort(stable=True)  # tokens of prompts first
            x, output = x[order], output[order]
        run.route = self.memory.decide(x, output, starts)
        if thread.records is not None:
            thread.records.append(run.route)

    @contextlib.contextmanager
    def prompt_tokens(self, lengths: torch.Tensor, begins: torch.Tensor | None) -> Iterator[None]:
        """See the function of that name."""
        before, self._thread.prompts = self._thread.prompts, (lengths, begins)
        try:
            yield
        finally:
            self._thread.prompts = before

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """See the function of that name."""
        self._thread.suspended += 1
        try:
            yield
        finally:
            self._thread.suspended -= 1

    @property
    def is_suspended(self) -> bool:
        """Whether this thread runs the model without the memory."""
        return self._thread.suspended > 0

    @contextlib.contextmanager
    def recorded(self, records: list[torch.Tensor]) -> Iterator[None]:
        """See `recorded_routes`."""
        before, self._thread.records = self._thread.records, records
        try:
            yield
        finally:
            self._thread.records = before


def attached_routes(model: torch.nn.Module) -> Routes | None:
    """The routes of the memory that is attached to a model; None without one."""
    return patching.attached(getattr(model, "_orig_mod", model), _NAME)


@contextlib.contextmanager
def prompt_tokens(
    model: torch.nn.Module, lengths: Sequence[int] | torch.Tensor, begins: Sequence[int] | torch.Tensor | None = None
) -> Iterator[None]:
    """Inside the block, this thread's passes decide routes from the first tokens of each row alone.

    So what follows a prompt in the same pass, such as an answer that is to be scored, decides nothing, and neither do
    the tokens that `generate` adds to rows without a cache. Passes that continue a routed cache are as they are.

    Args:
        model: any model; without a memory nothing changes.
        lengths: [R] tokens of each row's prompt, of as many rows as the passes have; padding does not count.
        begins: [R] the first tokens of each row that do not count either, for example of a system prompt; None for 0.
    """
    routes = attached_routes(model)
    with contextlib.ExitStack() as stack:
        if routes is not None:
            lengths = torch.as_tensor(lengths, dtype=torch.int64)
            if begins is not None:
                begins = torch.as_tensor(begins, dtype=torch.int64)
            stack.enter_context(routes.prompt_tokens(lengths, begins))
        yield


@contextlib.contextmanager
def suspended(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, this thread runs the model without its memory; nothing changes where it has none."""
    routes = attached_routes(model)
    with contextlib.nullcontext() if routes is None else routes.suspended():
        yield


@contextlib.contextmanager
def recorded_routes(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that gets the routes [R] of every pass of this thread that decides, as device tensors; -1: unedited."""
    routes, records = attached_routes(model), []
    with contextlib.nullcontext() if routes is None else routes.recorded(records):
        yield records


def require_no_memory(model: torch.nn.Module) -> None:
    """Raise UnsupportedModelError where a memory is attached to a model, and not suspended in this thread."""
    routes = attached_routes(model)
    if routes is not None and not routes.is_suspended:
        raise UnsupportedModelError(
            f"a memory is attached to {routes.path}, so the model does not compute what its weights say: detach it "
            "first (kedit_fast.detach(model))"
        )


def valid_tokens(mask: Any, tokens: int) -> torch.Tensor | None:
    """Which tokens of rows are no padding [R, tokens] bool, from the attention mask of their first pass; None for all.

    Args:
        mask: what a decoder takes as attention_mask: [R, tokens], or a mask [R, 1, T, keys] of attention, bool or added
            to scores, or several of them by name, or None.
        tokens: of each row.
    """
    if isinstance(mask, dict):
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        kind = f"[{mask.ndim} dimensions]" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UnsupportedModelError(f"the attention mask is a {kind}: a memory reads masks [R, T] and [R, 1, T, T]")
    if mask.ndim == 2 and mask.shape[1] < tokens:
        raise UnsupportedModelError(f"the attention mask has {mask.shape[1]} tokens, and the pass {tokens}")
    if mask.ndim == 2:
        return mask[:, :tokens].bool()
    seen = mask[:, 0, :tokens, :tokens]
    seen = seen if seen.dtype == torch.bool else seen >= 0
    at = torch.arange(seen.shape[1], device=seen.device)
    later = at > at[:, None]  # [query, key]
    causal = ~(seen & later).any(2, keepdim=True)  # rows of padding may see everything instead of nothing
    return (seen & causal & ~later).any(1)


class _Tuple(tuple):
    """A cache that is a tuple, with the routes of its rows, which it loses when they are reordered."""


class _FollowsRows:
    """Methods of a cache that change its rows, with the routes of these rows."""

    def reorder_cache(self, beam_idx: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().reorder_cache(beam_idx, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        _select(self, beam_idx)
        return result

    def batch_select_indices(self, indices: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().batch_select_indices(indices, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        _select(self, indices)
        return result

    def batch_repeat_interleave(self, repeats: int, *args: Any, **kwargs: Any) -> Any:
        result = super().batch_repeat_interleave(repeats, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        record = getattr(self, _ON_CACHE, None)
        if record is not None and record.route is not None:
            record.route = record.route.repeat_interleave(repeats)
        return result

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        result = super().reset(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        vars(self).pop(_ON_CACHE, None)
        return result

    def crop(self, *args: Any, **kwargs: Any) -> Any:
        result = super().crop(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if not _has_begun(self):
            vars(self).pop(_ON_CACHE, None)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        made, (_, *arguments), *state = super().__reduce_ex__(protocol)
        assert made is copyreg.__newobj__  # pyright: ignore[reportAttributeAccessIssue]
        return _new_cache, (type(self).__mro__[2], *arguments), *state


@functools.cache
def _following(kind: type) -> type:
    return type(f"Routed{kind.__name__}", (_FollowsRows, kind), {"__module__": kind.__module__})


def _new_cache(kind: type, *arguments: Any) -> Any:
    following = _following(kind)
    return following.__new__(following, *arguments)


def _select(cache: Any, rows: torch.Tensor) -> None:
    record = getattr(cache, _ON_CACHE, None)
    if record is not None and record.route is not None:
        record.route = record.route[rows.to(record.route.device)]


def follow(cache: Any) -> None:
    """Make a cache object carry the routes of its rows with them; its class becomes one that is derived from its own.

    Done for every cache in its first pass. In code of torch.compile that breaks the graph, once for each cache object:
    for `fullgraph=True`, call it before.
    """
    if not isinstance(cache, _FollowsRows):
        _change_class(cache)


@torch.compiler.disable
def _change_class(cache: Any) -> None:
    try:
        cache.__class__ = _following(type(cache))
    except TypeError as error:
        raise UnsupportedModelError(f"a {type(cache).__name__} cannot carry the routes of its rows: {error}") from None


def carry_rows(source: Any, target: Any, rows: torch.Tensor) -> None:
    """Give a cache the routes that some rows [n] of another one have."""
    record = getattr(source, _ON_CACHE, None)
    if record is not None:
        route = None if record.route is None else record.route[rows.to(record.route.device)]
        setattr(target, _ON_CACHE, CacheRoute(record.version, route))


def _has_begun(cache: Any) -> bool:
    """Whether a cache has tokens. A static one may have to wait for the device; compiled code takes it to be empty."""
    if isinstance(cache, tuple):
        return True
    try:
        length = cache.get_seq_length()
    except (AttributeError, ValueError):  # it has no attention layers, or is of another kind
        return False
    if isinstance(length, torch.Tensor) and torch.compiler.is_compiling():
        return False
    return bool(length > 0)


def _cache_of(output: Any) -> Any:
    """The cache in a decoder's output; None without one, and for one that is a tuple in a tuple."""
    for name in _CACHES:
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    parts = output if isinstance(output, tuple) else ()
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)
