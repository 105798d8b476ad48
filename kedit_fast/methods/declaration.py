"""What is declared of a hyper-parameter: the values it takes, which methods read it, and what it identifies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kedit_fast.methods.recipe import Recipe

Auto = Literal["auto"]
AUTO: Auto = "auto"
"""In place of a number: it is found from the model and the first batch of requests."""
Identity = Literal["value", "state"]


@dataclass(frozen=True)
class Range:
    """The values that a hyper-parameter takes."""

    description: str
    """In words, as in "it must be ..."."""
    contains: Callable[[Any], bool] = lambda value: True
    """Whether a value is one of them. By default every value is: what it must be is seen beside other hyper-parameters
    or beside the model, and checked there."""

    @classmethod
    def choices(cls, literal: Any) -> Range:
        """The values of a Literal."""
        accepted = get_args(literal)
        return cls(f"one of {', '.join(accepted)}", lambda value: value in accepted)


def or_auto(accepted: Range) -> Range:
    """The values of a range, and "auto"."""
    return Range(
        f'{accepted.description}, or "{AUTO}"',
        lambda value: value == AUTO if isinstance(value, str) else accepted.contains(value),
    )


POSITIVE = Range("above 0", lambda value: value > 0)
NOT_NEGATIVE = Range("0 or above", lambda value: value >= 0)
AT_LEAST_ONE = Range("at least 1", lambda value: value >= 1)
SHARE = Range("above 0 and at most 1", lambda value: 0 < value <= 1)
INNER_SHARE = Range("between 0 and 1", lambda value: 0 < value < 1)
LESS_THAN_ONE = Range("0 or above and below 1", lambda value: 0 <= value < 1)
POSITIVE_OR_AUTO, NOT_NEGATIVE_OR_AUTO = or_auto(POSITIVE), or_auto(NOT_NEGATIVE)
BOOLEAN = Range("true or false")
ANY = Range("any")


@dataclass(frozen=True)
class Declaration:
    """What is known of one hyper-parameter."""

    name: str
    default: Any
    """None where it has none: the preset or the caller gives it."""
    accepted: Range
    meaning: str
    read_by: Callable[[Recipe], bool]
    """Whether a method reads it."""
    identifies: tuple[Identity, ...]
    """What depends on it, so that a stored one of another value must not be used: a value, or a method's state."""
    only_with: tuple[str, ...] = ()
    """Hyper-parameters of which one must be "auto" for this one to have an effect; empty where it always has."""
    off: Any = None
    """The value at which it changes nothing; None where there is none. There it identifies nothing, so that files from
    before it existed stay valid."""
    part_of: str = ""
    """A hyper-parameter that must be switched on, so not 0, false or `off`, for this one to have an effect."""

    @property
    def is_required(self) -> bool:
        """Whether methods that read it need a value. Methods that do not read it take any."""
        return self.default is None or not self.accepted.contains(self.default)


def declare(
    accepted: Range,
    meaning: str,
    *,
    read_by: Callable[[Recipe], bool] = lambda recipe: True,
    identifies: tuple[Identity, ...] = (),
    only_with: tuple[str, ...] = (),
    off: Any = None,
    part_of: str = "",
) -> dict[str, Any]:
    """The metadata of a field of Hparams. A default outside of the accepted values stands for "not given"."""
    return {
        "accepted": accepted,
        "meaning": meaning,
        "read_by": read_by,
        "identifies": identifies,
        "only_with": only_with,
        "off": off,
        "part_of": part_of,
    }
