"""How much text is enough: how an update, the null space and the condition change as statistics see more text."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from tqdm import tqdm

from kedit_fast.editing.editor import Editor
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import MethodError, StatisticsError
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.presets import make_hparams
from kedit_fast.methods.registry import RECIPES, find_recipe
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.view import ModelView
from kedit_fast.reports.spectra import condition_of, null_dimension_of_expert
from kedit_fast.requests.problems import OnError, require_no_problems
from kedit_fast.requests.prompts import PromptFormat
from kedit_fast.requests.reading import rows_of
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO
from kedit_fast.solver.expert_update import ExpertUpdate
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.solver.preconditioner import NullSpaceRule, null_dimension
from kedit_fast.statistics.collect import growing_statistics
from kedit_fast.statistics.corpus import Corpus
from kedit_fast.support import figures
from kedit_fast.support.files import write_text
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch

FIRST_COUNT = 1000


@dataclass(frozen=True)
class Row:
    """One layer after one count of tokens. None: there is nothing to compare with, or no update (see `note`)."""

    tokens: int
    """Tokens that the statistics saw."""
    layer: int
    """The edited layer, zero-based."""
    update_norm: float | None
    """|Delta| of the requests' update."""
    change_to_last: float | None
    """|Delta - Delta of the last count| / |Delta of the last count|."""
    change_from_previous: float | None
    """|Delta - Delta of the count before| / |Delta|."""
    null_dimension: int
    """Dimensions of the null space by AlphaEdit's rule."""
    null_overlap: float | None
    """|N^T N'|^2 / max(dim N, dim N') with the count before: 1 for the same space."""
    condition: float | None
    """Condition number of C, the same for lambda C; None for a singular one. Of experts, see `reports.spectra`."""
    note: str = ""
    """Why there is no update."""


class Rows(list[Row]):
    """A row for each count and layer."""

    skipped: Mapping[int, str] = {}
    """Index of a request -> why its update is not followed."""


@plain_torch()
def convergence(
    model: torch.nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    method: str = "memit",
    *,
    counts: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    hparams: Mapping[str, Any] | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
    on_error: OnError = "raise",
    progress: bool = False,
    spec: ArchSpec | None = None,
) -> Rows:
    """Compute an update from statistics of more and more tokens of one text, and compare.

    The values of the requests do not depend on statistics and are optimized once. For every count the update is
    solved, written and undone.

    Args:
        model: its weights are the same afterwards, bit for bit.
        tokenizer: its tokenizer.
        corpus: the text, read again for every count.
        requests: the edits whose update is followed.
        method: a batch method that uses statistics and masks no updates.
        counts: growing chosen of tokens; None doubles from 1,000 to the size of the corpus.
        layers: edited layers; None for the preset's.
        hparams: values that override the preset's; `nullspace_threshold` and
            `nullspace_rule`, by default AlphaEdit's, decide about the null space.
        batch_tokens: tokens of a forward pass.
        seed: seed of the context prefixes.
        prompt_format, target_separator: as in `Editor`.
        on_error: "raise" at requests that cannot be written, or "skip" them, as in `Editor.edit`.
        progress: show a bar on stderr.
        spec: an ArchSpec for an architecture that is not known.

    Returns:
        a row for each count and layer.

    Raises:
        MethodError, RequestError, StatisticsError: see the messages.

    Cost: one pass over the text, one edit for each count, and a symmetric eigendecomposition (9 d^3 flops) for each
        count and layer.
    """
    recipe = find_recipe(method)
    overrides = {**(hparams or {}), **({} if layers is None else {"layers": tuple(layers)})}
    view = ModelView(model, spec)
    chosen, _ = make_hparams(method, view.config, overrides)
    if not chosen.uses_moments or recipe.masks_updates or not recipe.is_batched:
        raise MethodError(f"{recipe.name} has no update of low rank that depends on statistics")
    if view.spec.shared:
        raise MethodError(
            "convergence is of statistics that are one matrix, or one for each expert: leave out `shared` of the spec"
        )
    rule = _null_rule(view.config, overrides, chosen)
    if rule[1] == "absolute" and any(view.experts(layer) is not None for layer in chosen.layers):
        raise MethodError(
            "nullspace_rule = absolute compares eigenvalues that depend on how often an expert is chosen: for mixtures "
            "of experts set it to relative or energy"
        )
    if counts is not None and (not counts or sorted(set(counts)) != list(counts) or counts[0] < 1):
        raise StatisticsError(f"counts of tokens must grow; got {list(counts)}")
    store, prefixes = ValueFile(None), None
    requests = rows_of(requests)
    skipped: dict[int, str] = dict(getattr(requests, "skipped", {}))  # those that could not be read
    rows: list[Row] = []
    updates: list[dict[int, LowRankUpdate | None]] = []
    spaces: dict[int, list[torch.Tensor]] = {}
    growing = growing_statistics(model, tokenizer, corpus, chosen.layers, counts or _doubling(), batch_tokens, spec)
    for statistics in tqdm(growing, desc="counts", disable=not progress, leave=False):
        note, layer_updates = "", dict.fromkeys(chosen.layers)
        editor = Editor(
            model,
            tokenizer,
            method,
            statistics=statistics,
            hparams={**overrides, "layers": chosen.layers},
            seed=seed,
            prefixes=prefixes,
            values=store,
            prompt_format=prompt_format,
            target_separator=target_separator,
            spec=spec,
        )
        prefixes = editor.prefixes
        try:
            result = editor.edit(requests, on_error)
            skipped = result.skipped
            if not result.batch:
                require_no_problems(skipped, "every request was skipped:")
            layer_updates = {layer: _total(result.updates[editor.view.weight_name(layer)]) for layer in chosen.layers}
        except StatisticsError as error:
            note = first_line(error)
        finally:
            editor.restore()
        for layer in chosen.layers:
            moment = statistics.moment(layer)
            values, space = _decomposed(moment.moment, *rule)
            update, before = layer_updates[layer], updates[-1][layer] if updates else None
            norm, change = None if update is None else update.norm(), _change(before, update)
            overlap, dimension = _overlap(spaces.get(layer), space), sum(part.shape[1] for part in space)
            rows.append(Row(moment.count, layer, norm, None, change, dimension, overlap, condition_of(values), note))
            spaces[layer] = space
        updates.append(layer_updates)
    if not rows:
        raise StatisticsError("the corpus has no text")
    report = Rows(_against_last(rows, updates, chosen.layers))
    report.skipped = skipped
    return report


def _null_rule(config: Any, overrides: Mapping[str, Any], hparams: Hparams) -> tuple[float, NullSpaceRule]:
    """Threshold and rule of the null space: the caller's, or else AlphaEdit's for this model."""
    alphaedit = next(recipe for recipe in RECIPES.values() if recipe.uses_null_space)
    preset, _ = make_hparams(alphaedit.name, config, {"layers": hparams.layers})
    names = ("nullspace_threshold", "nullspace_rule")
    threshold, rule = (overrides.get(name, getattr(preset, name)) for name in names)
    return float(threshold), cast(NullSpaceRule, rule)


def _doubling() -> Iterator[int]:
    count = FIRST_COUNT
    while True:
        yield count
        count *= 2


def _total(updates: Sequence[Any]) -> LowRankUpdate:
    """The sum of updates of one weight, of experts as one matrix."""
    rights = [u.stacked_right() if isinstance(u, ExpertUpdate) else u.right for u in updates]
    return LowRankUpdate(
        torch.cat([u.left.double().cpu() for u in updates], 1), torch.cat([r.double().cpu() for r in rights], 1)
    )


def _change(before: LowRankUpdate | None, after: LowRankUpdate | None) -> float | None:
    """|after - before| / |after|, from the factors."""
    if before is None or after is None:
        return None
    if before is after:
        return 0.0  # from the factors it would come out as about sqrt(epsilon)
    gap = LowRankUpdate(torch.cat([after.left, -before.left], 1), torch.cat([after.right, before.right], 1))
    return gap.norm() / after.norm() if after.norm() else math.nan


def _decomposed(moment: torch.Tensor, threshold: float, rule: NullSpaceRule) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Eigenvalues of a moment, and bases of its null space: [d] and one [d, r], of experts [E, m] and one for each."""
    if moment.ndim == 2:
        values, vectors = torch.linalg.eigh(moment.double())
        return values, [vectors[:, : null_dimension(values, threshold, rule)]]
    parts = [torch.linalg.eigh(block.double()) for block in moment]
    spaces = [vectors[:, : null_dimension_of_expert(values, threshold, rule)] for values, vectors in parts]
    return torch.stack([values for values, _ in parts]), spaces


def _overlap(before: Sequence[torch.Tensor] | None, now: Sequence[torch.Tensor]) -> float | None:
    """|N^T N'|^2 / max(dim N, dim N') of spaces that are sums of those of blocks."""
    larger = max(sum(part.shape[1] for part in space) for space in (before or (), now))
    if before is None or not larger:
        return None
    return sum(float((one.T @ other).square().sum()) for one, other in zip(before, now, strict=True)) / larger


def _against_last(
    rows: list[Row], updates: Sequence[Mapping[int, LowRankUpdate | None]], layers: Sequence[int]
) -> list[Row]:
    last = updates[-1]
    changes = [_change(update[layer], last[layer]) for update in updates for layer in layers]
    return [Row(**{**asdict(row), "change_to_last": change}) for row, change in zip(rows, changes, strict=True)]


def write_csv(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Write the rows as a CSV file with a header; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in asdict(row).items()})
    write_text(path, text.getvalue(), StatisticsError)


def figure_of(rows: Sequence[Row]) -> Any:
    """Four panels against the number of tokens, with one curve per layer. Needs matplotlib."""
    figure, panels = figures.figure(4, 3.8, 3.4)
    quantities = (
        ("change_to_last", "change of the update to the last count", True),
        ("null_dimension", "null-space dimensions", False),
        ("null_overlap", "overlap of null spaces\nwith the count before", False),
        ("condition", "condition of lambda C", True),
    )
    counts, layers = sorted({row.tokens for row in rows}), sorted({row.layer for row in rows})
    for axes, (name, label, logarithmic) in zip(panels, quantities, strict=True):
        axes.set_xscale("log")
        for layer, color in zip(layers, figures.colors(len(layers)), strict=True):
            points = [(row.tokens, getattr(row, name)) for row in rows if row.layer == layer]
            # No point where nothing was computed, or on a log scale for a zero: the last count's change to itself.
            points = [(x, y) for x, y in points if y is not None and math.isfinite(y) and (y > 0 or not logarithmic)]
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=f"layer {layer}", color=color)
        axes.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
        figures.ticks_at(axes.xaxis, counts)
        if not any(len(line.get_xdata()) for line in axes.get_lines()):
            axes.text(
                0.5,
                0.5,
                "no two counts to compare" if len(counts) < 2 else "none could be computed",
                transform=axes.transAxes,
                ha="center",
                fontsize=8,
            )
            axes.set_yticks([])
        elif logarithmic:
            axes.set_yscale("log")
            figures.log_ticks(axes.yaxis)
    figures.legend_beside(figure, panels[0])
    return figure


def draw(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Save `figure_of`, in the format of the path's suffix."""
    figures.save(figure_of(rows), path)
