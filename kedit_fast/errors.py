"""Every error this package raises on purpose: each message names the thing, what was found and what is accepted."""

from __future__ import annotations


class KeditError(Exception):
    """Base of all errors of kedit_fast."""


class InvalidArgumentError(KeditError, ValueError):
    """An argument has a shape, dtype, device, stride or value that is not accepted."""


class BackendUnavailableError(KeditError, RuntimeError):
    """An explicitly chosen backend cannot run here or not on these arguments."""


class GradientError(KeditError, RuntimeError):
    """An operation without the derivative that was asked for: raised instead of returning a wrong gradient."""


class SolveError(KeditError, ArithmeticError):
    """A linear system is singular, not positive definite or not finite."""


class UnsupportedModelError(KeditError, NotImplementedError):
    """A model whose architecture has no ArchSpec, or one that closed-form editing does not cover."""


class RequestError(KeditError, ValueError):
    """An edit request is malformed; the message names it by number or id."""


class MethodError(KeditError, ValueError):
    """An unknown method, preset or hyper-parameter."""


class StatisticsError(KeditError, RuntimeError):
    """Statistics are missing, damaged, or belong to another model."""


class PatchError(KeditError, RuntimeError):
    """A patch cannot be read, written or applied; the model or checkpoint is as it was before."""


class EditError(KeditError, RuntimeError):
    """An edit could not be completed; the model is as it was before."""
