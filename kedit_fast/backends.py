"""Which implementation of an op runs, and why the others do not.

An op has one implementation for each backend it supports: `torch` (the reference, always there), `cpu` (C++),
`triton` and `cuda`. The choice, first match wins: the call's `backend=` argument, `with use_backend(...)`, the
environment variable KEDIT_FAST_BACKEND, then the first implementation that accepts the arguments. An explicit choice
never falls back: it raises with the reason.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from kedit_fast.errors import BackendUnavailableError

BACKENDS = ("cuda", "triton", "cpu", "torch")  # the order of automatic choice
GPU_BACKENDS = ("cuda", "triton")
AUTO = "auto"
_NOT_ASKED = "could run; only when asked for"

_log = logging.getLogger("kedit_fast")
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("kedit_fast_backend", default=None)
_probes: dict[str, tuple[Callable[[], Probe], Callable[[], str]]] = {}
_implementations: dict[str, dict[str, Implementation]] = {}
_declined: set[tuple[str, str, str]] = set()


@dataclass(frozen=True)
class Probe:
    """Whether a backend can run here: `reason` is empty when it can."""

    reason: str = ""
    misconfigured: bool = False  # an explicit setting cannot be honoured: automatic choice raises too
    explicit_only: bool = False  # runs when asked for, never by automatic choice


@dataclass(frozen=True)
class BackendStatus:
    """One row of `backends()`."""

    name: str
    available: bool
    detail: str  # instruction set, threads, versions; or why it is not available

    def __str__(self) -> str:
        return f"{self.name:7} {'yes' if self.available else 'no':4} {self.detail}"


@dataclass(frozen=True)
class Implementation:
    """One backend's implementation of an op. `declines(*args)` returns why it does not take these arguments, or ''."""

    op: str
    backend: str
    run: Callable[..., Any]
    declines: Callable[..., str] = field(default=lambda *args: "")


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend that runs, and for each other one the reason why not."""

    op: str
    runs: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.runs}"]
        lines += [f"  {name:7} {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def register_probe(backend: str, probe: Callable[[], Probe], detail: Callable[[], str]) -> None:
    """Tell how to find out whether `backend` can run here, and how it describes itself when it can.

    `probe` is asked at every call of an op, so it should remember its answer.
    """
    _probes[backend] = probe, detail


def register(implementation: Implementation) -> None:
    """Add an implementation of an op."""
    _implementations.setdefault(implementation.op, {})[implementation.backend] = implementation
    _automatic.cache_clear()


def check_name(backend: str) -> str:
    """Return `backend`, or raise BackendUnavailableError when there is none of that name."""
    if backend not in (*BACKENDS, AUTO):
        raise BackendUnavailableError(f"unknown backend {backend!r}: choose from {', '.join((*BACKENDS, AUTO))}")
    return backend


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run ops on `backend` inside the with block: 'torch', 'cpu', 'triton', 'cuda' or 'auto'.

    Raises:
        BackendUnavailableError: the backend is unknown or cannot run here.
    """
    check_name(backend)
    if backend != AUTO and (reason := probe(backend).reason):
        raise BackendUnavailableError(f"backend {backend!r} cannot run here: {reason}")
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


def requested(backend: str | None) -> str:
    """The backend asked for by argument, context or environment; 'auto' when nothing was asked."""
    if backend is not None:
        return check_name(backend)
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return check_name(os.environ.get("KEDIT_FAST_BACKEND", AUTO) or AUTO)


def probe(backend: str) -> Probe:
    """Ask one backend whether it can run here."""
    return _probes[backend][0]()


def detail(backend: str) -> str:
    """Instruction set, threads or versions of a backend that can run here; otherwise why it cannot."""
    return probe(backend).reason or _probes[backend][1]()


def select(op: str, backend: str, *args: Any) -> Implementation:
    """The implementation of `op` that runs for `args` when `backend` was requested.

    Raises:
        BackendUnavailableError: an explicit backend that cannot run, with the reason.
    """
    if backend != AUTO:
        reason = _refusal(op, backend, *args)
        if reason:
            raise BackendUnavailableError(f"{op} cannot run on backend {backend!r}: {reason}")
        return _implementations[op][backend]
    for implementation in _automatic(op):
        reason = implementation.declines(*args)
        if not reason:
            if implementation.backend == "torch":
                _say_slow(op, *args)
            return implementation
        _note(op, implementation.backend, reason)
    raise BackendUnavailableError(f"{op} has no implementation for these arguments")


@cache
def _automatic(op: str) -> tuple[Implementation, ...]:
    """The implementations that can run here without being asked for, in order."""
    found = []
    for name in BACKENDS:
        if name in _implementations[op]:
            asked = probe(name)
            if asked.misconfigured:
                raise BackendUnavailableError(f"{op}: {asked.reason}")
            if asked.reason or asked.explicit_only:
                _note(op, name, asked.reason or _NOT_ASKED)
            else:
                found.append(_implementations[op][name])
    return tuple(found)


def _say_slow(op: str, *args: Any) -> None:
    """Log once for each reason that tensors on a GPU are left to the reference by an op that has a kernel for GPUs."""
    device = next((arg.device for arg in args if hasattr(arg, "device")), None)
    if device is None or device.type in ("cpu", "meta"):
        return
    reasons = {name: _refusal(op, name, *args) or _NOT_ASKED for name in GPU_BACKENDS if name in _implementations[op]}
    text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if text and (op, "torch", text) not in _declined:
        _declined.add((op, "torch", text))
        # No kernel takes float64, and torch's own product is the fast one there: nothing that a user could change.
        level = logging.INFO if any("float64" in reason for reason in reasons.values()) else logging.WARNING
        _log.log(level, "%s runs on the torch reference, not on a GPU kernel, for tensors on %s (%s)", op, device, text)


def _note(op: str, backend: str, reason: str) -> None:
    if (op, backend, reason) not in _declined:
        _declined.add((op, backend, reason))
        _log.debug("%s: not on %s: %s", op, backend, reason)


def explain(op: str, *args: Any, backend: str | None = None) -> Explanation:
    """Say which backend runs `op` on `args`, and why the others do not.

    `op` is the name of a public op, for example "rank_k_update_"; `args` are its tensors in order.
    """
    if op not in _implementations:
        raise BackendUnavailableError(f"unknown op {op!r}: choose from {', '.join(sorted(_implementations))}")
    runs = select(op, requested(backend), *args).backend
    reasons = {}
    for name in BACKENDS:
        if name != runs:
            other = _NOT_ASKED if probe(name).explicit_only else "could run; another comes first"
            reasons[name] = _refusal(op, name, *args) or other
    return Explanation(op, f"{runs} ({detail(runs)})", reasons)


def backends() -> list[BackendStatus]:
    """Every backend, whether it can run here, and its details or the reason why not."""
    return [BackendStatus(name, not probe(name).reason, detail(name)) for name in BACKENDS]


def _refusal(op: str, backend: str, *args: Any) -> str:
    implementation = _implementations[op].get(backend)
    if implementation is None:
        return f"{op} has no {backend} implementation"
    return probe(backend).reason or implementation.declines(*args)
