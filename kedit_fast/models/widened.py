"""16-bit models on processors without 16-bit matrix units: passes over them compute in fp32.

Where a processor has no instructions for products of bfloat16 or float16, torch takes from 5 to 130 times as long for
them as for fp32. A pass then computes what the same model in fp32 would, `model.float()`, to the bit: while a module
runs, fp32 copies stand in for its 16-bit parameters and buffers. Outside its forward function a module always shows its
own tensors, so what is edited, hashed and saved keeps its dtype.
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
from kedit_fast.support.free_memory import free_bytes

_log = logging.getLogger("kedit_fast")
HALVES = (torch.bfloat16, torch.float16)
SWITCH = "KEDIT_FAST_16BIT"
KEPT_SHARE = 0.3  # of the memory that is free, for copies that are kept from pass to pass
# Flags of the processor, and names of oneDNN's ISA limits, that stand for products in a dtype.
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
    """Whether this processor multiplies matrices of a 16-bit dtype by instructions made for it, and torch uses them."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    asked = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    if asked is None or not asked():
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

    A module of which a part is elsewhere (on a GPU, or offloaded) computes in its own dtype. `meta_is_cpu` asks it of a
    module without memory that will be loaded on the CPU.

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
    if choice == "native" or not halves or places != {"cpu"}:
        return False
    missing = sorted(str(dtype).removeprefix("torch.") for dtype in halves if not has_units(dtype))
    if choice == "auto" and missing:
        _say(missing[0])
    return choice == "float32" or bool(missing)


def computing_dtype(module: torch.nn.Module, meta_is_cpu: bool = False) -> torch.dtype:
    """The dtype that passes over a module compute in; see `is_widened`."""
    return torch.float32 if is_widened(module, meta_is_cpu) else next(module.parameters()).dtype


def copy_bytes(module: torch.nn.Module) -> int:
    """Bytes that the fp32 copies of a module's 16-bit tensors take at most, while passes run over it on the CPU."""
    if not is_widened(module, meta_is_cpu=True):
        return 0
    return min(sum(2 * t.nbytes for t in _halves(module)), _budget())


def _budget() -> int:
    """Bytes for copies that are kept: a share of what is free, divided among the processes of a job on this host."""
    share = KEPT_SHARE / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(share * free_bytes(torch.device("cpu")))


def _halves(module: torch.nn.Module, recurse: bool = True) -> list[torch.Tensor]:
    return [t for t in (*module.parameters(recurse), *module.buffers(recurse)) if t.dtype in HALVES]


@cache  # once
def _say(name: str) -> None:
    _log.warning(
        "this processor has no matrix units for %s: models in it are computed in float32, and stay %s "
        "(%s=native computes in %s, many times slower)", name, name, SWITCH, name,
    )  # fmt: skip


class Streamed(NamedTuple):
    """A view on a copy that autograd asked to keep: it is made again when it is needed."""

    source: torch.Tensor  # 16-bit
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Widening:
    """fp32 copies in place of a decoder's 16-bit tensors, module by module.

    Copies are kept for later passes while they fit into `budget` bytes: all of them, or else those of passes with
    gradients, which are run again and again. The others are made anew for every call of their module, and once more
    for the backward pass (`pack` and `unpack`), so that no pass holds more than one module's.

    Copies stand in for passes of the thread that installed them. As with everything else that a pass puts into a
    model, no other thread may run the model meanwhile; one that does may fail, and nothing is lost.
    """

    def __init__(self, base: torch.nn.Module, budget: int):
        self.modules = [module for module in base.modules() if _halves(module, recurse=False)]
        self.all_fit = sum(2 * t.nbytes for t in _halves(base)) <= budget
        self.left = budget
        self._copies: dict[int, torch.Tensor] = {}  # id of a 16-bit tensor -> its copy
        self._streamed: dict[int, torch.Tensor] = {}  # address of a copy that is not kept -> the 16-bit tensor
        self._temporary: dict[int, list[int]] = {}  # id of a module that runs -> addresses of its copies in `_streamed`
        self._slots = {id(module): tensor_slots(module, HALVES) for module in self.modules}
        self._padding = {
            id(module): attribute_slot(module, "padding_idx")
            for module in self.modules
            if isinstance(module, torch.nn.Embedding)
        }
        self._thread = threading.get_ident()

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in a copy that is kept."""
        return tensor.untyped_storage().data_ptr() in {c.untyped_storage().data_ptr() for c in self._copies.values()}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Streamed:
        """What autograd keeps of a tensor; never the tensor itself, which would keep its own graph alive."""
        source = self._streamed.get(tensor.untyped_storage().data_ptr())
        if source is None:
            return tensor.detach()
        return Streamed(source, tensor.shape, tensor.stride(), tensor.storage_offset())

    @staticmethod
    def unpack(kept: torch.Tensor | Streamed) -> torch.Tensor:
        """The tensor that autograd kept."""
        if isinstance(kept, Streamed):
            return kept.source.float().as_strided(kept.size, kept.stride, kept.offset)
        return kept

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
    """Whether a module looks its first argument up in its weight: an embedding, or Gemma 3's, which scales the rows."""
    kind = type(module)
    return isinstance(module, torch.nn.Embedding) and (
        kind.forward is torch.nn.Embedding.forward or kind.__name__.endswith("ScaledWordEmbedding")
    )


@contextlib.contextmanager
def computing(base: torch.nn.Module) -> Iterator[Widening | None]:
    """Passes over a decoder compute in its `computing_dtype` as long as the block lasts; None where nothing changes."""
    if not is_widened(base):
        yield None
        return
    with Widening(base, _budget()).installed() as widening:
        yield widening
