"""A search for hyper-parameters: stages, each of which varies one of them around the best configuration so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kedit_fast.methods.hparams import Hparams, reads
from kedit_fast.methods.recipe import Recipe
from kedit_fast.reports.trials import Trial, Trials
from kedit_fast.requests.prompts import PreparedRequest

Effort = Literal["short", "full"]
Part = Literal["coarse", "best", "ends", "sizes"]
PAST_EDGE = 3
"""Steps past an edge, at most, while the trials get better."""
BEST_WINDOWS = 3
"""Windows that the part "best" tries."""
ENOUGH = 0.9
"""Efficacy at which a short search leaves the clamp as it is: a larger one costs neighborhood at many edits, which the
few requests of a trial hardly show."""
WORTH = 0.025
"""Gain of the score for which a short search takes another residual share: a smaller one, too, costs more at many edits
than at the few of a trial."""
SAME = 1e-9
"""Relative difference below which two values are one."""


@dataclass(frozen=True)
class Numbers:
    """A stage that varies a number, or a word, of the configuration."""

    name: str
    """The hyper-parameter."""
    values: tuple[Any, ...] = ()
    """Values to try, in this order."""
    factors: tuple[float, ...] = ()
    """Values to try, as multiples of the best one so far."""
    ratio: float = 0.0
    """Where the best value is the smallest or largest one, the next is so many times smaller or larger; 0 for none."""
    low: float = 0.0
    """The smallest value that is tried."""
    high: float = math.inf
    """The largest one."""
    efficacy_below: float = math.inf
    """The stage is passed over where the best efficacy so far is not below this: what could only do harm."""
    least_gain: float = 0.0
    """What the score must rise by for another value to be taken."""
    whole: bool = False
    """Whether values are whole numbers: multiples are rounded."""


@dataclass(frozen=True)
class Windows:
    """A stage that varies the edited layers."""

    part: Part
    """Which windows: "coarse", over the whole depth; "best", the best ones so far, with `residual_share`; "ends", those
    that end beside the best one, and deeper ones where the best is the deepest; "sizes", as the best one with fewer or
    more layers below the last one."""
    residual_share: float = 0.0
    """Of the part "best": a window of one layer needs a smaller share than one of several, which all take a part."""


Stage = Numbers | Windows
Kind = Literal["values", "gradients", "tuning"]
"""Of methods: those that optimize values, that take gradients, and that tune a matrix by steps."""

_SHORT_RATE = Numbers("lr", (1e-6, 1e-5, 1e-4, 1e-3, 1e-2), ratio=10.0, low=1e-9, high=10.0)
_TOKEN = Numbers("token", ("mask", "ans"))
SEARCHES: dict[tuple[Effort, Kind], tuple[Stage, ...]] = {
    ("short", "values"): (
        Windows("coarse"),
        Windows("best", residual_share=0.1),
        Windows("ends"),
        Windows("sizes"),
        Numbers("residual_share", factors=(0.5, 2.0), low=0.005, high=0.95, least_gain=WORTH),
        Numbers("clamp_norm_factor", factors=(1.4, 2.0), efficacy_below=ENOUGH),
        Numbers("nullspace_threshold", factors=(0.5, 2.0), low=1e-4, high=0.95),
    ),
    ("full", "values"): (
        Windows("coarse"),
        Windows("best", residual_share=0.1),
        Windows("ends"),
        Windows("sizes"),
        Numbers("residual_share", (0.05, 0.1, 0.2, 0.35, 0.5), ratio=1.6, low=0.005, high=0.95),
        Numbers("clamp_norm_factor", (0.75, 1.0, 2.0, 4.0), ratio=2.0, low=0.1, high=16.0),
        Numbers("v_lr_scale", factors=(0.5, 2.0), ratio=2.0, low=0.02, high=8.0),
        Numbers("nullspace_threshold", factors=(0.25, 0.5, 2.0, 4.0), ratio=2.0, low=1e-4, high=0.95),
        Windows("ends"),
        Windows("sizes"),
        Numbers("clamp_norm_factor", factors=(0.7, 1.4)),
        Numbers("residual_share", factors=(0.6, 0.8, 1.25, 1.6), low=0.005, high=0.95),
    ),
    ("short", "gradients"): (_SHORT_RATE, Windows("coarse"), _TOKEN, Numbers("lr", factors=(0.1, 0.3, 3.0), ratio=3.0)),
    ("full", "gradients"): (
        _SHORT_RATE,
        Windows("coarse"),
        _TOKEN,
        Numbers("lr", factors=(0.1, 0.3, 3.0, 10.0), ratio=3.0, low=1e-9, high=10.0),
        Windows("ends"),
        Windows("sizes"),
        Numbers("lr", factors=(0.5, 0.7, 1.4, 2.0), ratio=1.4, low=1e-9, high=10.0),
    ),
    ("short", "tuning"): (
        Numbers("lr", factors=(1.0, 0.1, 0.3, 3.0), ratio=3.0, low=1e-7, high=100.0),
        Windows("coarse"),
        Numbers("eps", factors=(0.7, 1.4), ratio=1.4),
        Numbers("act_ratio", factors=(0.7, 1.2), low=0.05, high=2.0),
        Numbers("irr_threshold", factors=(0.7, 1.4), low=0.05, high=1.0),
    ),
    ("full", "tuning"): (
        Numbers("lr", factors=(1.0, 0.1, 0.3, 3.0, 10.0), ratio=3.0, low=1e-7, high=100.0),
        Windows("coarse"),
        Numbers("eps", factors=(0.5, 0.7, 1.4, 2.0), ratio=1.4),
        Numbers("act_ratio", factors=(0.5, 0.7, 1.2), ratio=1.4, low=0.05, high=2.0),
        Numbers("irr_threshold", factors=(0.6, 0.8, 1.25, 1.6), ratio=1.25, low=0.05, high=1.0),
        Numbers("mask_ratio", factors=(0.5, 2.0), low=0.01, high=1.0),
        Numbers("num_steps", factors=(0.5, 2.0), ratio=2.0, low=1, high=400, whole=True),
        Windows("ends"),
        Numbers("lr", factors=(0.6, 1.7), ratio=1.7, low=1e-7, high=100.0),
    ),
}
"""Effort and kind of the method -> the stages, windows first. A method that takes gradients has no
number that suits every window or model, so it begins with its rate at the window of its family."""


def kind_of(recipe: Recipe) -> Kind:
    """What the search of a method varies."""
    if recipe.tuning is not None:
        return "tuning"
    return "values" if recipe.optimizes_values else "gradients"


@dataclass
class Search:
    """The state of a search."""

    trials: Trials
    """Where the trials run."""
    requests: Sequence[PreparedRequest]
    """Requests that every trial writes and measures."""
    recipe: Recipe
    """The method."""
    hparams: Hparams
    """The configuration that the search begins with."""
    fixed: frozenset[str]
    """Hyper-parameters that the caller has given."""
    windows: Sequence[tuple[int, ...]]
    """The coarse windows."""
    start: tuple[int, ...]
    """The window of a search that varies something else first."""
    available: frozenset[int]
    """Layers that can be edited."""
    moves: bool = True
    """Whether windows other than `windows` may be tried."""
    best: Trial | None = None
    """The best trial so far; the earliest one of equals."""
    edges: dict[str, str] = field(default_factory=dict)
    """Hyper-parameter -> what to say where its best value is at an edge."""

    def run(self, stages: Sequence[Stage]) -> None:
        """Run stages one after another. Those whose hyper-parameter has no effect, or is given, are passed over.

        When no window of the coarse ones could be edited, the search ends.
        """
        for stage in stages:
            if isinstance(stage, Numbers):
                if self._varies(stage.name) and (self.best is None or (self.best.efficacy or 0) < stage.efficacy_below):
                    self._run_numbers(stage)
            else:
                self._run_windows(stage)
                if self.best is None:
                    return

    def _varies(self, name: str) -> bool:
        return name not in self.fixed and reads(self.recipe, name) and self.hparams.has_effect(name)

    def attempt(self, stage: str, value: Any, changes: Mapping[str, Any], least_gain: float = 0.0) -> bool:
        """Run a trial, unless it was run before; whether it is the best one now.

        Of numbers with one score, the first one is as good as any.
        """
        if any(trial.hparams == changes for trial in self.trials.done):
            return False
        trial, best = self.trials.run(stage, value, changes, self.requests), self.best
        if best is not None and (trial.rank <= best.rank or (stage != "layers" and trial.score == best.score > 0)):
            return False
        if trial.failure or (best is not None and trial.score < best.score + least_gain):
            return False
        self.best = trial
        return True

    def _changes(self) -> dict[str, Any]:
        """What the best configuration changes."""
        return {"layers": self.start} if self.best is None else dict(self.best.hparams)

    def value(self, name: str) -> Any:
        """The value of a hyper-parameter in the best configuration, as a number where it was "auto"."""
        value = self._changes().get(name, getattr(self.hparams, name))
        return value if self.best is None else self.best.resolved.get(name, value)

    def _run_numbers(self, stage: Numbers) -> None:
        name, tried = stage.name, []
        start = self.value(name)
        if self.best is not None:
            tried.append(start)
        multiples = [float(f"{start * factor:.3g}") for factor in stage.factors]
        candidates = [*stage.values, *(max(1, round(one)) if stage.whole else one for one in multiples)]
        for value in candidates:
            if _is_number(value) and not stage.low <= value <= stage.high:
                continue
            if not any(_same(value, other) for other in tried):
                tried.append(value)
                self.attempt(name, value, {**self._changes(), name: value}, stage.least_gain)
        if not stage.ratio or self.best is None:
            return
        for _ in range(PAST_EDGE):
            following = _past(tried, self.value(name), stage)
            following = round(following) if following is not None and stage.whole else following
            if following is None or not stage.low <= following <= stage.high:
                break
            tried.append(following)
            if not self.attempt(name, following, {**self._changes(), name: following}):
                break
        low, high = min(tried), max(tried)
        self.edges.pop(name, None)
        if _past(tried, self.value(name), stage) is not None:
            self.edges[name] = (
                f"the best {name}, {self.value(name):.3g}, lies at the edge of what was tried, {low:.3g} to {high:.3g}"
            )

    def _run_windows(self, stage: Windows) -> None:
        if stage.part == "best":
            self._run_best(stage.residual_share)
            return
        if stage.part == "coarse":
            candidates = list(self.windows)
        elif not self.moves or self.best is None:
            return
        else:
            candidates = self._sizes() if stage.part == "sizes" else self._ends()
        for window in candidates:
            self._attempt_window(window)
        if stage.part == "ends":
            for _ in range(PAST_EDGE):
                deeper = self._deeper()
                if deeper is None or not self._attempt_window(deeper):
                    break
            self._say_depth()

    def _run_best(self, share: float) -> None:
        """Try the best windows so far with another residual share."""
        if self.best is None or not self._varies("residual_share"):
            return
        ranked = sorted((t for t in self.trials.done if t.score), key=lambda trial: trial.rank, reverse=True)
        for trial in ranked[:BEST_WINDOWS]:
            self.attempt("residual_share", share, {**trial.hparams, "residual_share": share})

    def _attempt_window(self, window: tuple[int, ...]) -> bool:
        """Try a window, unless the same configuration was tried with it."""
        changes = {**self._changes(), "layers": window}
        if any(trial.hparams == changes for trial in self.trials.done):
            return False
        is_better = self.attempt("layers", None, changes)
        if lacking := self.trials.done[-1].no_null_space:  # these layers leave the window
            remaining = tuple(layer for layer in window if layer not in lacking)
            is_better = bool(remaining) and self._attempt_window(remaining)
        return is_better

    def _ends(self) -> list[tuple[int, ...]]:
        """The windows beside the best one, as far as their layers can be edited."""
        assert self.best is not None
        layers = self.best.layers
        shifted = (tuple(layer + step for layer in layers) for step in (-1, 1))
        return [window for window in shifted if self.available >= set(window) and window[-1] <= self._deepest()]

    def _deepest(self) -> int:
        return max(trial.layers[-1] for trial in self.trials.done)

    def _deeper(self) -> tuple[int, ...] | None:
        """The window one layer deeper than the best one, where that is the deepest one and its layers can be edited."""
        assert self.best is not None
        window = tuple(layer + 1 for layer in self.best.layers)
        return window if self.best.layers[-1] == self._deepest() and self.available >= set(window) else None

    def _say_depth(self) -> None:
        """Note a best window at the deepest layers, where the model has deeper ones."""
        assert self.best is not None
        last, count = self.best.layers[-1], self.trials.view.num_layers
        self.edges.pop("layers", None)
        if last == self._deepest() and last < count - 1:
            why = "" if last + 1 in self.available else f"; layer {last + 1} has no statistics"
            self.edges["layers"] = f"the best layers, {span(self.best.layers)}, are the deepest that were tried{why}"

    def _sizes(self) -> list[tuple[int, ...]]:
        """Windows with the best one's last layer: of one layer, one less, one more, and twice as many."""
        assert self.best is not None
        if self.recipe.edits_one_layer:
            return []
        last, size = self.best.layers[-1], len(self.best.layers)
        sizes = sorted({1, size - 1, size + 1, 2 * size} - {0, size})
        below = [tuple(range(last - count + 1, last + 1)) for count in sizes if count <= last + 1]
        return [window for window in below if self.available >= set(window)]


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int)


def _same(value: Any, other: Any) -> bool:
    if _is_number(value) and _is_number(other):
        return abs(value - other) <= SAME * max(abs(value), abs(other))
    return value == other


def _past(tried: Sequence[Any], best: Any, stage: Numbers) -> float | None:
    """The value past the edge at which the best one is; None where it is at none, or no number."""
    if not _is_number(best) or not all(map(_is_number, tried)):
        return None
    if _same(best, max(tried)):
        return best * stage.ratio
    return best / stage.ratio if _same(best, min(tried)) else None


def named_layers(layers: Sequence[int]) -> str:
    """Layers in a sentence: layer 4, or layers 4-8."""
    return f"{'layer' if len(layers) == 1 else 'layers'} {span(layers)}"


def span(layers: Sequence[int]) -> str:
    """Layers as --layers takes them: 4-8 for neighboring ones, else 3,5,7."""
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))
