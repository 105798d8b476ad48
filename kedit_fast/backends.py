"""Which implementation of an op runs, and why the others do not.

An op has one implementation for each backend it supports: `torch` (the reference, always available), `cpu` (C++),
`triton` and `cuda`. The first of these that is set decides: the call's `backend=` argument, `with use_backend(...)`,
the environment variable KEDIT_FAST_BACKEND; where none is set, the first implementation that accepts the arguments
and is not passed over as the slower one runs. An explicit choice never falls back: it raises with the reason.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

from kedit_fast.errors import BackendUnavailableError

BackendName = Literal["cuda", "triton", "cpu", "torch"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
"""In the order of automatic choice."""
GPU_BACKENDS = ("cuda", "triton")
AUTO = "auto"
_EXPLICIT_ONLY = "could run; only when asked for"

_log = logging.getLogger("kedit_fast")
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("kedit_fast_backend", default=None)
_probes: dict[str, tuple[Callable[[], Probe], Callable[[], str]]] = {}
_implementations: dict[str, dict[str, Implementation]] = {}
_declined: set[tuple[str, str, str]] = set()


@dataclass(frozen=True)
class Probe:
    """Whether a backend can run here."""

    reason: str = ""
    """Why it cannot; empty when it can."""
    misconfigured: bool = False
    """A setting of the user cannot be honored: automatic choice raises instead of passing over the backend."""
    explicit_only: bool = False
    """It runs when asked for, never by automatic choice."""


@dataclass(frozen=True)
class BackendStatus:
    """One row of `backends()`."""

    name: str
    """"cuda", "triton", "cpu" or "torch"."""
    available: bool
    """Whether it can run here."""
    detail: str
    """Instruction set, threads and versions; or why it is not available."""

    def __str__(self) -> str:
        return f"{self.name:7} {'yes' if self.available else 'no':4} {self.detail}"


@dataclass(frozen=True)
class Implementation:
    """One backend's implementation of an op."""

    op: str
    """Name of the op, for example "rank_k_update_"."""
    backend: str
    """Name of the backend."""
    run: Callable[..., Any]
    """Computes the op; called only with arguments that the op has checked."""
    declines: Callable[..., str] = field(default=lambda *args: "")
    """Given the tensors of a call, returns why this implementation does not take them, or ''."""
    passed_over: Callable[..., str] = field(default=lambda *args: "")
    """Given the tensors of a call that it takes, returns why another is faster, or ''. It runs when asked for."""


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`."""

    op: str
    """Name of the op."""
    runs: str
    """The backend that runs, with its details."""
    reasons: dict[str, str]
    """For each other backend, why it does not run."""

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.runs}"]
        lines += [f"  {name:7} {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def register_probe(backend: str, probe: Callable[[], Probe], detail: Callable[[], str]) -> None:
    """Register how to find out whether `backend` can run here, and how it describes itself when it can.

    `probe` is called at every call of an op, so it should remember its answer.
    """
    _probes[backend] = probe, detail


def register(implementation: Implementation) -> None:
    """Add an implementation of an op."""
    _implementations.setdefault(implementation.op, {})[implementation.backend] = implementation
    _automatic.cache_clear()


def check_name(backend: str) -> str:
    """Return `backend`; raise BackendUnavailableError when no backend has that name."""
    if backend not in (*BACKENDS, AUTO):
        raise BackendUnavailableError(f"unknown backend {backend!r}: choose from {', '.join((*BACKENDS, AUTO))}")
    return backend


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run ops on `backend` inside the with block: 'torch', 'cpu', 'triton', 'cuda' or 'auto'.

    Raises:
        BackendUnavailableError: the backend is unknown or cannot run here.

    Example:
        >>> with use_backend("torch"):
        ...     explain("rms_norm", torch.ones(2, 4), torch.ones(4)).runs.split()[0]
        'torch'
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
    """The backend requested by argument, context or environment; 'auto' where none is."""
    if backend is not None:
        return check_name(backend)
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return check_name(os.environ.get("KEDIT_FAST_BACKEND", AUTO) or AUTO)


def probe(backend: str) -> Probe:
    """Whether one backend can run here."""
    return _probes[backend][0]()


def detail(backend: str) -> str:
    """Instruction set, threads or versions of a backend that can run here; of any other, why it cannot."""
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
        reason = implementation.declines(*args) or implementation.passed_over(*args)
        if not reason:
            if implementation.backend == "torch":
                _warn_of_reference(op, *args)
            return implementation
        _note(op, implementation.backend, reason)
    raise BackendUnavailableError(f"{op} has no implementation for these arguments")


@cache
def _automatic(op: str) -> tuple[Implementation, ...]:
    """The implementations that automatic choice considers here, in order."""
    candidates = []
    for name in BACKENDS:
        if name in _implementations[op]:
            status = probe(name)
            if status.misconfigured:
                raise BackendUnavailableError(f"{op}: {status.reason}")
            if status.reason or status.explicit_only:
                _note(op, name, status.reason or _EXPLICIT_ONLY)
            else:
                candidates.append(_implementations[op][name])
    return tuple(candidates)


def _warn_of_reference(op: str, *args: Any) -> None:
    """Log, once per reason, that the reference computes an op on a GPU although the op has a kernel for GPUs."""
    device = next((arg.device for arg in args if hasattr(arg, "device")), None)
    if device is None or device.type in ("cpu", "meta"):
        return
    reasons = {
        name: _refusal(op, name, *args) or _EXPLICIT_ONLY
        for name in GPU_BACKENDS
        if name in _implementations[op] and not _implementations[op][name].passed_over(*args)
    }
    text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if text and (op, "torch", text) not in _declined:
        _declined.add((op, "torch", text))
        # No kernel takes float64, and torch's own product is the fast one there: the user can change nothing.
        level = logging.INFO if any("float64" in reason for reason in reasons.values()) else logging.WARNING
        _log.log(level, "%s runs on the torch reference, not on a GPU kernel, for tensors on %s (%s)", op, device, text)


def _note(op: str, backend: str, reason: str) -> None:
    if (op, backend, reason) not in _declined:
        _declined.add((op, backend, reason))
        _log.debug("%s: not on %s: %s", op, backend, reason)


def explain(op: str, *args: Any, backend: str | None = None) -> Explanation:
    """Which backend runs `op` on `args`, and why the others do not.

    Args:
        op: name of a public op, for example "rank_k_update_".
        args: its tensors, in the order of its signature.
        backend: as the op's argument of that name.

    Returns:
        Explanation; `print` shows it as a table.

    Raises:
        BackendUnavailableError: an unknown op, or a requested backend that cannot run.

    Example:
        >>> weight, left, right = torch.zeros(2, 3), torch.ones(2, 1), torch.ones(3, 1)
        >>> print(explain("rank_k_update_", weight, left, right, backend="torch"))
        rank_k_update_: torch (reference, torch ...)
          cuda    ...
          triton  ...
          cpu     ...
    """
    if op not in _implementations:
        raise BackendUnavailableError(f"unknown op {op!r}: choose from {', '.join(sorted(_implementations))}")
    runs = select(op, requested(backend), *args).backend
    reasons = {}
    for name in BACKENDS:
        if name != runs:
            reasons[name] = _refusal(op, name, *args) or _reason_not_chosen(op, name, *args)
    return Explanation(op, f"{runs} ({detail(runs)})", reasons)


def backends() -> list[BackendStatus]:
    """Every backend, whether it can run here, and its details or the reason why not.

    Example:
        >>> [row.name for row in backends()]
        ['cuda', 'triton', 'cpu', 'torch']
        >>> backends()[-1].available
        True
    """
    return [BackendStatus(name, not probe(name).reason, detail(name)) for name in BACKENDS]


def _reason_not_chosen(op: str, backend: str, *args: Any) -> str:
    """Why an implementation that could run does not."""
    if probe(backend).explicit_only:
        return _EXPLICIT_ONLY
    return _implementations[op][backend].passed_over(*args) or "could run; another comes first"


def _refusal(op: str, backend: str, *args: Any) -> str:
    implementation = _implementations[op].get(backend)
    if implementation is None:
        return f"{op} has no {backend} implementation"
    return probe(backend).reason or implementation.declines(*args)


_REFERENCE = Probe()
register_probe("torch", lambda: _REFERENCE, lambda: f"reference, torch {importlib.metadata.version('torch')}")
