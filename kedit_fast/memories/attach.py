"""A memory in a model: attached, swapped and detached; nothing of the model's weights changes."""

from __future__ import annotations

import itertools
import logging
import os
from typing import Any

import torch

from kedit_fast.errors import InvalidArgumentError, SideMemoryError, UnsupportedModelError
from kedit_fast.memories.memory import ActivationMemory, SideMemory
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.editable import is_adapter, plain_model
from kedit_fast.models.fingerprint import tokenizer_hash
from kedit_fast.models.introspection import find_spec
from kedit_fast.models.offloaded import device_of
from kedit_fast.models.routes import Routes, attached_routes, follow
from kedit_fast.models.schemes import scheme_of
from kedit_fast.models.sharded import is_sharded
from kedit_fast.models.view import linear_weight
from kedit_fast.support.dtypes import dtype_name
from kedit_fast.support.matrix_bits import sha256
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
_EXAMPLE = "{} is"  # the prompt that a memory's `prompt_format` shows


class Attached:
    """A memory that is in a model; `attach` makes it. As a context manager it is detached at the end of the block."""

    def __init__(self, model: torch.nn.Module, routes: Routes):
        self._model, self._routes = model, routes

    @property
    def memory(self) -> SideMemory:
        """The memory that answers, with its tensors on the module's device."""
        memory = self._routes.memory
        assert isinstance(memory, SideMemory)
        return memory

    def detach(self) -> None:
        """Take the memory out of the model; a second call does nothing."""
        self._routes.remove()

    def swap(self, memory: SideMemory | str | os.PathLike) -> SideMemory:
        """Let another memory of the same module answer, and return the one that did.

        Sequences that have begun cannot go on: their caches have keys and values that the old memory made, and are
        refused. Where several threads run the model, swap inside `Gate.swapping()`, with a memory that was loaded and
        put on the module's device (`SideMemory.to`) before that: the swap itself takes no time.

        Raises:
            SideMemoryError: a memory of another matrix; the old one stays.
        """
        before, memory = self.memory, _loaded(memory)
        if (memory.module, memory.original) != (before.module, before.original):
            raise SideMemoryError(
                f"the memory is for {memory.module} with the matrix {memory.original[:12]}, the one in the model for "
                f"{before.module} with {before.original[:12]}: detach that one, and attach this one"
            )
        if memory.tokenizer and before.tokenizer and memory.tokenizer != before.tokenizer:
            raise SideMemoryError("the memory was made with another tokenizer than the one in the model")
        module = self._model.get_submodule(memory.module)
        _check_form(memory, module)
        self._routes.set_memory(memory.to(_device(module)))
        return before

    def reset(self, cache: Any) -> None:
        """Let the next pass with a cache decide anew, from the tokens of that pass alone.

        For a turn of a conversation that should be routed by itself, or for prompts behind a beginning that they share.
        The keys and values that are in the cache stay as the route of before made them.
        """
        self._routes.reset(cache)

    def follow(self, cache: Any) -> None:
        """Prepare a cache for `torch.compile(model, fullgraph=True)`, whose graph its first pass would break."""
        follow(cache)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *args: Any) -> None:
        self.detach()


@plain_torch()
def attach(
    model: torch.nn.Module,
    memory: SideMemory | str | os.PathLike,
    tokenizer: Any = None,
    *,
    spec: ArchSpec | None = None,
    force: bool = False,
) -> Attached:
    """Let a memory answer beside a model's weights, from now on and in every thread.

    Each sequence is routed once, from its prompt, row by row: see `kedit_fast.models.routes`. A row of a batch gets
    what it would get alone, to rounding; one that no edit is meant for, the bits of the model without the memory.
    Copies of the model (copy.deepcopy, torch.save) have no memory: attach it there, too.

    Args:
        model: a causal language model; also one that is quantized, or inside torch.compile.
        memory: a memory, or the path of its file.
        tokenizer: compared with the one that the edits were made with, where the memory says which. With it, a warning
            is logged once for a prompt that lacks the format of the edits' prompts (a chat template, for example); on a
            GPU, where that has to wait for the device, the first batch alone is compared.
        spec: an ArchSpec for an architecture that is not known.
        force: accept another matrix than the one that the memory was made beside, for example of a model that is
            quantized or cast since. Distances and values then are off by what the matrices differ by.

    Returns:
        an object whose `detach()` takes it out again, and whose `swap` lets another one answer.

    Raises:
        SideMemoryError: another memory is attached; a file that cannot be read; a memory of another model, layer, dtype
            or tokenizer. The model is as it was.
        UnsupportedModelError: the model is sharded over processes, or has adapters that are not merged.

    Cost: SHA-256 of the module's matrix, about two seconds per GiB; the memory's bytes on the module's device.

    Example:
        >>> path = "model.layers.3.mlp.down_proj"
        >>> doubled = 2 * model.get_submodule(path).weight.detach()
        >>> memory = kedit_fast.ActivationMemory(weights=doubled[None], thresholds=torch.tensor([0.0]), act_ratio=0.9,
        ...                                      **kedit_fast.matrix_identity(model, path))
        >>> ids = tokenizer("Miles Davis plays the", return_tensors="pt").input_ids
        >>> before = model(ids).logits
        >>> attached = kedit_fast.attach(model, memory)
        >>> torch.equal(model(ids).logits, before)
        False
        >>> attached.detach()
        >>> torch.equal(model(ids).logits, before)
        True
    """
    memory, model = _loaded(memory), plain_model(model)
    if attached_routes(model) is not None:
        raise SideMemoryError("the model has a memory already: detach that one first, or let it swap memories")
    if is_sharded(model):
        raise UnsupportedModelError("the model is split over processes: a memory needs a whole model")
    blocks = (spec or find_spec(model)).blocks
    base = model.get_submodule(blocks.rpartition(".")[0])
    module = _linear_module(model, memory.module)
    if not memory.module.startswith(f"{blocks}."):
        raise SideMemoryError(f"{memory.module} is not inside the blocks of the decoder, {blocks}")
    _check_form(memory, module)
    _check_tokenizer(memory, tokenizer)
    _check_matrix(memory, model, force)
    see = None if tokenizer is None else _FormatCheck.of(memory, tokenizer)
    routes = Routes(model, base, memory.module, memory.to(_device(module)), see)
    routes.install()
    return Attached(model, routes)


def attached(model: torch.nn.Module) -> Attached | None:
    """What `attach` returned for the memory that is in a model now; None without one.

    Example:
        >>> kedit_fast.attached(model) is None
        True
    """
    model = plain_model(model)
    routes = attached_routes(model)
    return None if routes is None else Attached(model, routes)


def detach(model: torch.nn.Module) -> SideMemory | None:
    """Take the memory out of a model, and return it; None, and nothing happens, where it has none.

    Example:
        >>> kedit_fast.detach(model) is None
        True
    """
    attachment = attached(model)
    if attachment is None:
        return None
    memory = attachment.memory
    attachment.detach()
    return memory


@plain_torch()
def matrix_identity(model: torch.nn.Module, path: str) -> dict[str, Any]:
    """The fields of a memory that say which matrix it belongs to: module, original, dtype and transposed.

    Args:
        model: a causal language model.
        path: of a linear module inside it; of a quantized one, the matrix that it stands for counts.

    Example:
        >>> about = kedit_fast.matrix_identity(model, "model.layers.3.mlp.down_proj")
        >>> about["dtype"], about["transposed"], len(about["original"])
        ('float32', False, 64)
    """
    model = plain_model(model)
    module = _linear_module(model, path)
    scheme = scheme_of(module)
    weight, transposed = linear_weight(model, path) if scheme is None else (scheme.matrix(module), False)
    return {
        "module": path,
        "original": sha256(weight),
        "dtype": dtype_name(weight.dtype),
        "transposed": transposed,
    }


def _loaded(memory: SideMemory | str | os.PathLike) -> SideMemory:
    if isinstance(memory, str | os.PathLike):
        return SideMemory.load(memory)
    if not isinstance(memory, SideMemory):
        raise InvalidArgumentError(f"a memory or the path of its file is needed; got a {type(memory).__name__}")
    return memory


def _linear_module(model: torch.nn.Module, path: str) -> Any:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise SideMemoryError(f"the model has no module {path!r}: the memory is for another model") from None
    if is_adapter(module):
        raise UnsupportedModelError(f"{path} is an adapter's {type(module).__name__}: merge it first")
    if module_shape(module) is None:
        raise SideMemoryError(f"{path} is a {type(module).__name__}, not a linear module")
    return module


def module_shape(module: Any) -> tuple[int, int] | None:
    """Rows and columns [out, in] of a linear module, plain or quantized; None of another module."""
    if type(module).__name__ == "Conv1D":  # of transformers
        return module.weight.shape[1], module.weight.shape[0]
    if hasattr(module, "out_features") and hasattr(module, "in_features"):
        return module.out_features, module.in_features
    return None


def _device(module: torch.nn.Module) -> torch.device:
    """The device that a module runs on."""
    if isinstance(getattr(module, "weight", None), torch.Tensor):
        return device_of(module)
    return next(itertools.chain(module.parameters(), module.buffers())).device


def _check_form(memory: SideMemory, module: Any) -> None:
    """Raise SideMemoryError where a memory has another shape or bias than the module."""
    if memory.shape != module_shape(module):
        raise SideMemoryError(
            f"{memory.module} is {list(module_shape(module) or ())}, the memory is for {list(memory.shape)}: "
            "it is of another model or layer"
        )
    if not isinstance(memory, ActivationMemory):
        return
    bias = getattr(module, "bias", None)
    if (bias is None) != (memory.bias is None):
        here, there = ("no bias" if b is None else "a bias" for b in (bias, memory.bias))
        raise SideMemoryError(f"{memory.module} has {here}, and the memory {there}: it is of another model or layer")
    if (
        bias is not None
        and memory.bias is not None
        and not torch.equal(bias.detach().cpu(), memory.bias.to(bias).cpu())
    ):
        raise SideMemoryError(f"{memory.module} has another bias than the memory was made with")


def _check_matrix(memory: SideMemory, model: torch.nn.Module, force: bool) -> None:
    """Raise SideMemoryError where the module's matrix is not the one that a memory was made beside."""
    module = model.get_submodule(memory.module)
    try:
        identity = matrix_identity(model, memory.module)
    except (InvalidArgumentError, UnsupportedModelError) as error:
        if force:
            return
        raise SideMemoryError(
            f"{memory.module} cannot be compared with the matrix that the memory was made beside ({error}); "
            "attach(..., force=True) does without"
        ) from None
    if scheme_of(module) is None and identity["transposed"] != memory.transposed:
        here, there = ("transposed" if flag else "as [out, in]" for flag in (identity["transposed"], memory.transposed))
        raise SideMemoryError(f"{memory.module} is stored {here}, and the memory was made beside one {there}")
    if force or identity["original"] == memory.original:
        return
    if identity["dtype"] != memory.dtype:
        raise SideMemoryError(
            f"{memory.module} is {identity['dtype']}, the memory was made beside {memory.dtype}: load the model in "
            "that, or force it (distances then differ by rounding)"
        )
    raise SideMemoryError(
        f"{memory.module} is not the matrix that the memory was made beside: another model, another layer, or one with "
        "edits in it. attach(..., force=True) attaches it: it may then answer for the wrong prompts"
    )


def _check_tokenizer(memory: SideMemory, tokenizer: Any) -> None:
    if tokenizer is not None and memory.tokenizer and tokenizer_hash(tokenizer) != memory.tokenizer:
        raise SideMemoryError("the memory was made with another tokenizer: its prompts were other tokens")


class _FormatCheck:
    """Warns once of a prompt that does not begin as the prompts of a memory's edits did."""

    def __init__(self, beginning: list[int], text: str):
        self._beginning, self._text, self._open = beginning, text, True

    @classmethod
    def of(cls, memory: SideMemory, tokenizer: Any) -> _FormatCheck | None:
        """The check of a memory; None where its format adds no tokens before a prompt."""
        before, _, after = memory.prompt_format.partition(_EXAMPLE)
        pairs = zip(*(tokenizer(f"{before}{text}{after}")["input_ids"] for text in ("A", "1")), strict=False)
        shared = [one for one, other in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        beginning = shared[:-1]  # the last one may end with what begins a prompt
        return cls(beginning, before) if before and beginning else None

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        if not self._open:
            return
        expected = torch.tensor(self._beginning, device=ids.device)
        first = torch.zeros(len(ids), dtype=torch.int64, device=ids.device) if mask is None else mask.long().argmax(1)
        places = first[:, None] + torch.arange(len(expected), device=ids.device)
        same = bool((ids.gather(1, places.clamp(max=ids.shape[1] - 1)) == expected).all())
        self._open = same and ids.device.type == "cpu"
        if not same:
            _log.warning(
                "a prompt does not begin with %r, as those of the memory's edits did, and may not be routed to them: "
                "give prompts the format that the edits were made with",
                self._text,
            )
