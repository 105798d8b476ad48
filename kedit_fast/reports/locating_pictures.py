"""Pictures of where a fact lives: heat maps of tracing; effects, logit lens, probes and circuits by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kedit_fast.locating.linear_probes import LinearProbes
from kedit_fast.locating.logit_lens import LogitLens
from kedit_fast.locating.tracing import GROUPS, AverageEffects, Trace
from kedit_fast.support import figures

LAST_SUBJECT, LAST = GROUPS[2], GROUPS[-1]
"""The groups of tokens whose effects are drawn by layer: ROME's two sites."""

COLORS = {"block": "#6a51a3", "mlp": "#1a7f37", "attention": "#c4540b"}
"""Kind of a restored state -> the color of its curve."""
MOST_ROWS = 60
"""Tokens that a heat map names; of a longer prompt it names the subject's and some of the others."""


def title_of(kind: str, window: int) -> str:
    """What was restored: `block`, or `MLP, 4 layers` for a window of them."""
    name = "MLP" if kind == "mlp" else kind
    return name if window <= 1 or kind == "block" else f"{name}, {window} layers"


def trace_figure(traces: Sequence[Trace]) -> Any:
    """Heat maps of one prompt, a panel for each kind of state: tokens down, layers across. Needs matplotlib.

    Tokens before the subject are left out but for one: a state there is the same with and without the noise.

    Args:
        traces: of one prompt. All panels have one scale of colors.
    """
    first = traces[0]
    begin, end = first.subject
    top = max(0, begin - 1)
    tokens = [figures.plain(token.strip() or token) for token in first.tokens[top:]]
    labels = [f"{token}*" if begin <= top + row < end else token for row, token in enumerate(tokens)]
    step = math.ceil(len(labels) / MOST_ROWS)
    named = [row for row in range(len(labels)) if row % step == 0 or (step > 1 and begin <= top + row < end)]
    figure, axes = figures.figure(len(traces), 2.7, 1.9 + 0.2 * min(len(labels), MOST_ROWS))
    values = torch.stack([trace.probabilities.double() for trace in traces])  # [kinds, T, L]
    low, high = min(float(values.min()), first.low), max(float(values.max()), first.high)
    image = None
    for panel, shown, trace in zip(axes, values[:, top:], traces, strict=True):
        image = panel.imshow(shown.tolist(), aspect="auto", cmap="viridis", vmin=low, vmax=high)
        _name_layers(panel, title_of(trace.kind, trace.window))
    axes[0].set_yticks(named, [labels[row] for row in named], fontsize=8 if step == 1 else 5)
    if top:
        axes[0].set_ylabel(f"{top:,} tokens before: no effect", fontsize=7, loc="top")
    _color_bar(figure, axes, image, f"probability of {figures.plain(repr(first.answer_text))}")
    about = f"clean {first.high:.3f}, corrupted {first.low:.3f};  * the subject, whose embeddings get noise"
    figure.suptitle(f"{figures.plain(''.join(first.tokens).strip()[-60:], 60)}\n{about}", fontsize=9)
    return figure


def averages_figure(averages: Sequence[AverageEffects]) -> Any:
    """Mean indirect effects, a panel for each kind of state: groups of tokens down, layers across. Needs matplotlib."""
    first = averages[0]
    figure, axes = figures.figure(len(averages), 3.4, 2.9)
    shown = [torch.as_tensor(one.mean).double() for one in averages]  # [G, L] each
    finite = torch.cat([mean[mean.isfinite()] for mean in shown])
    reach = max(float(finite.abs().max()) if len(finite) else 0.0, 1e-6)
    image = None
    for panel, one, mean in zip(axes, averages, shown, strict=True):
        image = panel.imshow(mean.tolist(), aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach)
        panel.set_facecolor("0.85")  # of groups that no prompt has
        _name_layers(panel, title_of(one.kind, one.window))
    axes[0].set_yticks(range(len(first.groups)), list(first.groups), fontsize=8)
    _color_bar(figure, axes, image, "mean indirect effect")
    figure.suptitle(
        f"{first.count} prompts: what restoring a state brings back of the answer's probability", fontsize=9
    )
    return figure


def effects_figure(averages: Sequence[AverageEffects], layers: Sequence[int] = ()) -> Any:
    """Indirect effects by layer at the last token of the subject and of the prompt, with their intervals.

    Args:
        averages: of each kind of state.
        layers: the layers that the trace speaks for, shaded.
    """
    first = averages[0]
    places = [name for name in (LAST_SUBJECT, LAST) if name in first.groups]
    figure, axes = figures.figure(len(places), 4.6, 3.6)
    reach = [0.0]
    for panel, place in zip(axes, places, strict=True):
        for start, end in _runs(layers) if place == LAST_SUBJECT else ():
            label = "likely layers" if start == min(layers) else None
            panel.axvspan(start - 0.5, end + 0.5, color="0.9", zorder=0, label=label)
        for one in averages:
            row = one.groups.index(place)
            mean, low, high = (torch.as_tensor(t)[row].double().tolist() for t in (one.mean, one.low, one.high))
            numbered = range(len(mean))
            panel.fill_between(numbered, low, high, color=COLORS[one.kind], alpha=0.2, linewidth=0)
            panel.plot(numbered, mean, "o-", markersize=3, color=COLORS[one.kind], label=title_of(one.kind, one.window))
            reach += [value for value in (*low, *high) if math.isfinite(value)]
        panel.set_title(f"at the {place}", fontsize=9)
        panel.set_xlabel("layer")
        panel.set_xlim(-0.5, len(mean) - 0.5)
        figures.whole_ticks(panel.xaxis)
        panel.grid(axis="y", alpha=0.3)
    margin = 0.05 * (max(reach) - min(reach) or 1.0)
    for panel in axes:
        panel.set_ylim(min(reach) - margin, max(reach) + margin)
    axes[0].set_ylabel("mean indirect effect, 95 %")
    figures.legend_beside(figure, axes[0])
    return figure


def place_of(lens: LogitLens) -> str:
    """Where a lens reads states, in words."""
    return "the subject's last token" if lens.position == "subject" else "the prompt's last token"


def lens_figure(lens: LogitLens) -> Any:
    """The logit lens: the answer's mean probability and median rank after each layer. Needs matplotlib."""
    ranks, probabilities = lens.rank, lens.probability
    figure, (left, right) = figures.figure(2, 4.2, 3.4)
    stages = range(ranks.shape[1])
    for panel, values, middle in (
        (left, probabilities.double(), probabilities.double().mean(0)),
        (right, ranks.double(), ranks.double().median(0).values),
    ):
        low, high = (torch.quantile(values, share, dim=0).tolist() for share in (0.25, 0.75))
        panel.fill_between(stages, low, high, color=COLORS["block"], alpha=0.2, linewidth=0)
        panel.plot(stages, middle.tolist(), "o-", markersize=3, color=COLORS["block"])
        panel.set_xticks(*_stage_ticks(len(stages)))
        panel.set_xlabel("after layer")
        panel.grid(axis="y", alpha=0.3)
    left.set_ylabel("mean probability")
    left.set_ylim(-0.03, 1.03)
    right.set_ylabel("median rank, 1 is best")
    right.set_yscale("log")
    right.set_ylim(float(ranks.max()) * 1.3, 0.8)
    figures.log_ticks(right.yaxis)
    figure.suptitle(
        f"Logit lens of the answer at {place_of(lens)}, {ranks.shape[0]} prompts; half of them in the band", fontsize=9
    )
    return figure


def probes_figure(probes: LinearProbes) -> Any:
    """Accuracy of linear probes by layer, beside that with shuffled labels. Needs matplotlib."""
    figure, (axes,) = figures.figure(1, 5.2, 3.6)
    layers = list(probes.layers)
    for name, values, low, high, color in (
        ("object", probes.accuracy, probes.low, probes.high, COLORS["block"]),
        ("control: shuffled objects", probes.control, probes.control_low, probes.control_high, "0.45"),
    ):
        axes.fill_between(layers, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(layers, values, "o-", markersize=3, color=color, label=name)
    axes.axhline(probes.majority, color="0.45", linestyle=":", linewidth=1, label="most frequent object")
    if probes.from_layer is not None:
        axes.axvline(probes.from_layer, color="0.2", linestyle="--", linewidth=1, label="above the control from here")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("layer")
    axes.set_ylabel("accuracy on held-out subjects, 95 %")
    figures.whole_ticks(axes.xaxis)
    axes.grid(axis="y", alpha=0.3)
    figures.legend_beside(figure, axes)
    return figure


def shares_figure(shares: Mapping[str, Mapping[str, float]], edited: Sequence[str] = ()) -> Any:
    """Shares of the scores that leave each layer's attention and MLP, bars for each model. Needs matplotlib.

    Args:
        shares: name of a model -> node ("input", "attn0", "mlp0", ...) -> share of all |score|.
        edited: nodes whose weights were edited, shaded.
    """
    layers = sum(node.startswith("mlp") for node in next(iter(shares.values())))
    figure, axes = figures.figure(2, min(6.5, 3.0 + 0.08 * layers * len(shares)), 3.4)
    thick = 0.8 / len(shares)
    top = max(share for one in shares.values() for share in one.values())
    marked = {kind: [layer for layer in range(layers) if f"{kind}{layer}" in edited] for kind in ("attn", "mlp")}
    for panel, kind in zip(axes, ("attn", "mlp"), strict=True):
        for start, end in _runs(marked[kind]):
            panel.axvspan(start - 0.5, end + 0.5, color="0.9", zorder=0)
        first = -1 if kind == "attn" else 0  # the embeddings stand before the first attention
        nodes = (["input"] if kind == "attn" else []) + [f"{kind}{layer}" for layer in range(layers)]
        for index, ((name, one), color) in enumerate(zip(shares.items(), figures.colors(len(shares)), strict=True)):
            offset = thick * (index - (len(shares) - 1) / 2)
            places = [place + offset for place in range(first, layers)]
            panel.bar(places, [one.get(node, 0.0) for node in nodes], thick, color=color, label=name)
        panel.set_title("MLP" if kind == "mlp" else "attention, and the embeddings", fontsize=9)
        step = max(1, math.ceil(layers / 12))
        ticks = list(range(0 if kind == "mlp" or step == 1 else step, layers, step))
        names = [str(layer) for layer in ticks]
        panel.set_xticks(*(([-1, *ticks], ["emb", *names]) if kind == "attn" else (ticks, names)))
        panel.set_xlabel("layer")
        panel.set_xlim(first - 0.6, layers - 0.4)
        panel.set_ylim(0, top * 1.05 or 1.0)
        panel.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("share of all |score| that leaves it")
    if any(marked.values()):
        axes[1].fill_between([], [], [], color="0.9", label="edited")
    if len(shares) > 1 or any(marked.values()):
        figures.legend_beside(figure, axes[1])
    return figure


def _name_layers(panel: Any, title: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xlabel("layer")
    figures.whole_ticks(panel.xaxis)
    panel.set_yticks([])


def _color_bar(figure: Any, axes: Sequence[Any], image: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _stage_ticks(count: int) -> tuple[list[int], list[str]]:
    """Places and names of the embedding and of layers, of `count` states."""
    step = max(1, math.ceil((count - 1) / 12))
    places = [0, *range(1 if step == 1 else step + 1, count, step)]
    return places, ["emb", *(str(place - 1) for place in places[1:])]


def _runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighboring layers."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs
