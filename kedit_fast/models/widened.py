"""16-bit models on processors without 16-bit matrix units: passes over them compute in fp32.

Where a processor has no instructions for products of bfloat16 or float16, torch takes from 5 to 130 times as long for
them as for fp32. A pass then computes, bit for bit, what the same model in fp32 (`model.float()`) would. While a module
runs, fp32 copies stand in for its 16-bit parameters and buffers. Outside of its forward function a module always has
its own tensors, so what is edited, hashed and saved has its own dtype.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.models.patching import attribute_slot, surrounded_calls, tensor_slots
from kedit_fast.models.sharded import is_sharded
from kedit_fast.support.dtypes import dtype_name
from kedit_fast.support.free_memory import free_bytes

_log = logging.getLogger("kedit_fast")
HALVES = (torch.bfloat16, torch.float16)
SWITCH = "KEDIT_FAST_16BIT"
COPIES_SHARE = 0.3  # of the free memory, for copies that stay from pass to pass
# The processor's flags for products in a dtype, and the names of oneDNN's ISA limits that include them.
_FLAGS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "avx10_2"},
    torch.float16: {"avx512_fp16", "amx_fp16", "avx10_2"},
}
_LIMITS = {
    torch.bfloat16: ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT"),
    torch.float16: ("FP16", "AMX", "AVX10", "ALL", "DEFAULT"),
}


@cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of a 16-bit dtype, and torch uses them."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    if is_supported is None or not is_supported():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return any(part in limit.upper() for part in _LIMITS[dtype]) and not _FLAGS[dtype].isdisjoint(flags)


def is_widened(module: torch.nn.Module, meta_is_cpu: bool = False) -> bool:
    """Whether passes over a module compute in fp32 in place of a 16-bit dtype.

    A module with parts elsewhere (on a GPU, offloaded, or in another process) computes in its own dtype. `meta_is_cpu`
    treats a module without memory as if it were loaded on the CPU.

    The environment variable KEDIT_FAST_16BIT decides: "auto" (modules on the CPU in a dtype that the processor has no
    matrix units for), "float32" (all 16-bit modules on the CPU) or "native" (none).

    Raises:
        InvalidArgumentError: another word in KEDIT_FAST_16BIT.
    """
    choice = os.environ.get(SWITCH) or "auto"
    if choice not in ("auto", "float32", "native"):
        raise InvalidArgumentError(f"{SWITCH} must be auto, float32 or native; got {choice!r}")
    tensors = [*module.parameters(), *module.buffers()]
    halves = {t.dtype for t in tensors if t.dtype in HALVES}
    places = {"cpu" if meta_is_cpu and t.device.type == "meta" else t.device.type for t in tensors}
    if choice == "native" or not halves or places != {"cpu"} or is_sharded(module):
        return False
    missing = sorted(dtype_name(dtype) for dtype in halves if not has_units(dtype))
    if choice == "auto" and missing:
        _warn_once(missing[0])
    return choice == "float32" or bool(missing)


def computing_dtype(module: torch.nn.Module, meta_is_cpu: bool = False) -> torch.dtype:
    """The dtype that passes over a module compute in; see `is_widened`."""
    return torch.float32 if is_widened(module, meta_is_cpu) else next(module.parameters()).dtype


def copy_bytes(module: torch.nn.Module) -> int:
    """The most bytes that fp32 copies of a module's 16-bit tensors take while passes over it run on the CPU."""
    if not is_widened(module, meta_is_cpu=True):
        return 0
    return min(sum(2 * t.nbytes for t in _halves(module)), _budget())


def _budget() -> int:
    """Bytes for copies that stay: a share of what is free, divided among the processes of a job on this host."""
    share = COPIES_SHARE / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(share * free_bytes(torch.device("cpu")))


def _halves(module: torch.nn.Module, recurse: bool = True) -> list[torch.Tensor]:
    return [t for t in (*module.parameters(recurse), *module.buffers(recurse)) if t.dtype in HALVES]


@cache
def _warn_once(name: str) -> None:
    _log.warning(
        "this processor has no matrix units for %s: models in it are computed in float32, and stay %s "
        "(%s=native computes in %s, many times slower)",
        name,
        name,
        SWITCH,
        name,
    )


class Streamed(NamedTuple):
    """A view on an fp32 copy that autograd saves for the backward pass, where it is computed again from the source."""

    source: torch.Tensor
    """The 16-bit tensor."""
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Widening:
    """fp32 copies in place of a decoder's 16-bit tensors, module by module.

    Copies stay for later passes while they fit into `budget` bytes: all of them, or else those of passes with
    gradients, which are run again and again. The others are made for every call of their module, and once more for
    the backward pass (`pack` and `unpack`), so that no pass holds more than one module's at a time.

    Copies stand in for passes of the thread that installed them. As with everything else that a pass puts into a
    model, no other thread may run the model meanwhile. One that does may fail; nothing is lost.
    """

    def __init__(self, base: torch.nn.Module, budget: int):
        self.modules = [module for module in base.modules() if _halves(module, recurse=False)]
        self.all_fit = sum(2 * t.nbytes for t in _halves(base)) <= budget
        self.left = budget
        self._copies: dict[int, torch.Tensor] = {}  # id of a 16-bit tensor -> its copy
        self._streamed: dict[int, torch.Tensor] = {}  # address of a copy that does not stay -> the 16-bit tensor
        self._temporary: dict[int, list[int]] = {}  # id of a running module -> its addresses in `_streamed`
        self._slots = {id(module): tensor_slots(module, HALVES) for module in self.modules}
        self._padding = {
            id(module): attribute_slot(module, "padding_idx")
            for module in self.modules
            if isinstance(module, torch.nn.Embedding)
        }
        self._thread = threading.get_ident()

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in a copy that stays."""
        return tensor.untyped_storage().data_ptr() in {c.untyped_storage().data_ptr() for c in self._copies.values()}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Streamed:
        """What autograd saves of a tensor; never the tensor itself, which would keep its own graph alive."""
        source = self._streamed.get(tensor.untyped_storage().data_ptr())
        if source is None:
            return tensor.detach()
        return Streamed(source, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    @staticmethod
    def unpack(saved: torch.Tensor | Streamed) -> torch.Tensor:
        """The tensor that autograd saved."""
        if isinstance(saved, Streamed):
            return saved.source.float().as_strided(saved.size, saved.stride, saved.offset)
        return saved

    @contextlib.contextmanager
    def installed(self) -> Iterator[Widening]:
        """Inside the block the copies stand in while their modules run."""
        saved = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        streaming = contextlib.nullcontext() if self.all_fit else saved
        try:
            with surrounded_calls(self.modules, self._put_copies, self._restore), streaming:
                yield self
        finally:
            self._copies.clear()

    def _put_copies(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if threading.get_ident() != self._thread:
            return None
        changed = None
        for slot in self._slots[id(module)]:
            if not slot.is_original:
                continue  # a pass around this one has put a copy there
            if slot.name == "weight" and args and _is_lookup(module):
                ids, index = torch.unique(args[0], return_inverse=True)  # a vocabulary is large, a batch is not
                copy, changed = slot.original.detach()[ids].float(), ((index, *args[1:]), kwargs)
                self._padding[id(module)].put(None)  # of other ids, and it matters to gradients alone
            else:
                copy = self._copy(module, slot.original)
            slot.put(copy)
        return changed

    def _copy(self, module: torch.nn.Module, original: torch.Tensor) -> torch.Tensor:
        copy = self._copies.get(id(original))
        if copy is None:
            copy = original.detach().float()
            if self.all_fit or (torch.is_grad_enabled() and copy.nbytes <= self.left):
                self._copies[id(original)] = copy
                self.left -= copy.nbytes
            else:
                address = copy.untyped_storage().data_ptr()
                self._streamed[address] = original.detach()
                self._temporary.setdefault(id(module), []).append(address)
        return copy

    def _restore(self, module: torch.nn.Module) -> None:
        if threading.get_ident() != self._thread:
            return
        for slot in self._slots[id(module)]:
            slot.restore()
        if padding := self._padding.get(id(module)):
            padding.restore()
        for address in self._temporary.pop(id(module), ()):
            self._streamed.pop(address, None)


def _is_lookup(module: torch.nn.Module) -> bool:
    """Whether a module picks rows of its weight by its first argument: an embedding, or Gemma 3's that scales them."""
    kind = type(module)
    return isinstance(module, torch.nn.Embedding) and (
        kind.forward is torch.nn.Embedding.forward or kind.__name__.endswith("ScaledWordEmbedding")
    )


@contextlib.contextmanager
def computing(base: torch.nn.Module) -> Iterator[Widening | None]:
    """Inside the block, passes over a decoder compute in its `computing_dtype`; yields None if that is its own."""
    if not is_widened(base):
        yield None
        return
    with Widening(base, _budget()).installed() as widening:
        yield widening
