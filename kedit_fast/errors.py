"""Every error that this package raises on purpose: a message names the thing, what it is and what is accepted."""

from __future__ import annotations


class KeditError(Exception):
    """Base of all errors of kedit_fast."""


class InvalidArgumentError(KeditError, ValueError):
    """An argument has a shape, dtype, device, stride or value that is not accepted."""


class BackendUnavailableError(KeditError, RuntimeError):
    """An explicitly chosen backend cannot run here, or not on these arguments."""


class GradientError(KeditError, RuntimeError):
    """An op lacks the derivative that was requested: raised instead of returning a wrong gradient."""


class SolveError(KeditError, ArithmeticError):
    """A linear system is singular, not positive definite or not finite."""


class UnsupportedModelError(KeditError, NotImplementedError):
    """A model that closed-form editing does not cover; the message says what to supply."""


class RequestError(KeditError, ValueError):
    """An edit request is malformed; the message names it by number or id."""


class MethodError(KeditError, ValueError):
    """An unknown method, preset or hyper-parameter."""


class StatisticsError(KeditError, RuntimeError):
    """Statistics are missing, damaged, or belong to another model."""


class NullSpaceError(StatisticsError):
    """All directions of a layer's inputs are null space by the threshold, or none is."""


class PatchError(KeditError, RuntimeError):
    """A patch cannot be read, written or applied; the model or checkpoint is as it was before."""


class SideMemoryError(KeditError, RuntimeError):
    """A memory beside the weights cannot be read, written, attached or merged; the model is as it was before."""


class EvaluationError(KeditError, ArithmeticError):
    """A model cannot be measured: it gives no finite probabilities for a prompt, which is named."""


class EditError(KeditError, RuntimeError):
    """An edit could not be completed; the model is as it was before."""


class CheckpointError(EditError):
    """A run's checkpoint is of another run, in use or damaged, or cannot be written; no edit of this run was lost."""
