"""Passes over prompts again and again with deltas at one token each: over their tails where the model allows, or whole.

Running the tails alone takes for granted how a model lays out its cache, makes its masks, counts its positions and
calls its attention. Before it is trusted, a few tokens run both ways with a delta; where the results differ, or the
tails do not run, the whole prompts do. Both ways compute the same function.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from typing import Literal, NamedTuple

import torch

from kedit_fast.models import tail_attention
from kedit_fast.models.experts import is_mixture
from kedit_fast.models.fixed_deltas import FixedDeltas
from kedit_fast.models.forward import Site, TokenBatch, evaluating, last_states, name_of, pad
from kedit_fast.models.head import error_limit, refused_by_name, relative_error, sample_rows
from kedit_fast.models.schemes import scheme_of
from kedit_fast.models.shared_prefixes import SharedRows, split_rows
from kedit_fast.models.tail_runner import TailRunner, record_tails
from kedit_fast.models.view import ModelView
from kedit_fast.models.whole_runner import WholeRunner, record_whole
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
PassKind = Literal["packed tails", "padded tails", "whole prompts"]
"""How passes with deltas run: the tail tokens of all prompts as one row; the tails as padded rows; or whole prompts."""
PromptRunner = TailRunner | WholeRunner


class RecordedPrompts(NamedTuple):
    """What one full pass over R prompts gives."""

    runner: PromptRunner
    """Ready to run them with deltas."""
    site_outputs: torch.Tensor
    """[R, sites, h] the sites' outputs at the lookup tokens, without deltas."""
    reference: torch.Tensor
    """[references, h] last states of the reference rows at the lookup token, without deltas."""


def record_prompts(
    view: ModelView,
    rows: Sequence[Sequence[int]],
    lookups: Sequence[int],
    sites: Sequence[Site],
    references: Sequence[int] = (),
    fixed: FixedDeltas | None = None,
) -> RecordedPrompts:
    """Run R prompts once and record what deltas at their lookup tokens do not change, as far as `pass_kind` allows.

    Args:
        view: the model, in evaluation mode.
        rows: token ids of each prompt.
        lookups: index of the lookup token in each; the tail starts there.
        sites: of one layer, where deltas will be added at the lookup token: the output of the block, or of its MLP,
            or of its attention and its MLP.
        references: rows whose last state at the lookup token is returned.
        fixed: other deltas at the same sites, before the lookup tokens, that stay as they are in all passes.

    Raises:
        UnsupportedModelError: a site did not run.

    Cost: one forward pass, without the head, over the tokens that no other row begins with, where that saves enough
        (`split_rows`); for the first call of a view with these sites, a few passes of a few tokens more.
    """
    kind = pass_kind(view, tuple(sites))
    shared = shared_rows(view, rows, lookups) if kind == "packed tails" and fixed is None else None
    return _record(view, pad(rows, view.device), lookups, sites, references, kind, fixed, shared)


def _record(
    view: ModelView,
    batch: TokenBatch,
    lookups: Sequence[int],
    sites: Sequence[Site],
    references: Sequence[int],
    kind: PassKind,
    fixed: FixedDeltas | None = None,
    shared: SharedRows | None = None,
) -> RecordedPrompts:
    if kind == "whole prompts":
        return RecordedPrompts(*record_whole(view, batch, lookups, sites, references, fixed))
    packs_rows = kind == "packed tails"
    return RecordedPrompts(*record_tails(view, batch, lookups, sites, references, packs_rows, fixed, shared))


def shared_rows(view: ModelView, rows: Sequence[Sequence[int]], limits: Sequence[int]) -> SharedRows | None:
    """Rows that run with what they share once; None where that saves too little, or the model does not run so.

    Args:
        view: the model.
        rows: token ids of each row.
        limits: [R] tokens of each row, from its first on, that may be shared; below the row's length. What is read of a
            pass stands behind them.
    """
    split = split_rows(rows, limits)
    return SharedRows(rows, split, view.device) if split is not None and shares_prefixes(view) else None


def shares_prefixes(view: ModelView) -> bool:
    """Whether rows that begin alike can run with what they share once; tried once for a view, with a few tokens.

    Not in mixtures of experts and quantized models, whose states may depend on the rows beside them, nor where
    processes hold the model together.
    """
    return view.once(_tried_sharing)


@plain_torch()
@torch.no_grad()
def _tried_sharing(view: ModelView) -> bool:
    """Whether it gives what padded rows give; said at INFO where not. Cost: two passes of a few tokens."""
    obstacle = obstacle_of_tails(view) or _needs_whole_rows(view)
    if not obstacle:
        first, _, other = sample_rows(view.model.config, view.vocabulary)
        begin = first[: max(1, len(first) - 2)]
        rows = [row[: view.max_length] for row in (first, [*begin, *other], other, begin)]
        split = split_rows(rows, [len(row) - 1 for row in rows], least_tokens=1, least_share=0.0)
        if split is None:
            return False  # it takes rows of one token alone
        shared = SharedRows(rows, split, view.device)
        with evaluating(view):
            batch = pad(rows, view.device)
            whole = last_states(view, batch)
            places = [(r, t) for r, n in enumerate(split.lengths) for t in range(n, len(rows[r]))]
            row, position = torch.tensor(places, device=view.device).T
            expected = whole[row.to(whole.device), position.to(whole.device)]
            try:
                states = last_states(view, shared)[0]
                error = relative_error(states[shared.index(row, position).to(states.device)], expected)
                if not sees_windows(view, shared.layout.windows, 0):
                    obstacle = "its attention does not say its sliding window"
                elif error <= error_limit(expected.dtype, view.head.rounding):
                    return True
                else:
                    obstacle = f"their states differ by {error:.1g}"
            except Exception as error:  # it may be any code
                obstacle = first_line(error) or type(error).__name__
    _log.info("prompts of %s run whole, also where many begin alike: %s", view.spec.name, obstacle)
    return False


def _needs_whole_rows(view: ModelView) -> str:
    """Why rows of a model are not to be taken apart; "" if that is to be tried."""
    if not tail_attention.usable(view):
        return "it does not take its attention from transformers' registry"
    if view.is_sharded:
        return "processes hold it together"
    if getattr(view.model.config, "quantization_config", None) or any(map(scheme_of, view.base.modules())):
        return "it is quantized"
    if is_mixture(view.base):
        return "it is a mixture of experts"
    return ""


def pass_kind(view: ModelView, sites: tuple[Site, ...]) -> PassKind:
    """How passes with deltas at sites of one layer run in a model; tried once for a view, with a few tokens.

    Raises:
        UnsupportedModelError: a site's module does not run, or not on all tokens.
    """
    kinds = view.once(_tried_kinds)
    if sites not in kinds:
        kinds[sites] = _try(view, sites)
    return kinds[sites]


def _tried_kinds(view: ModelView) -> dict[tuple[Site, ...], PassKind]:
    """What has been tried: nothing when a view is new."""
    return {}


@plain_torch()
@torch.no_grad()
def _try(view: ModelView, sites: tuple[Site, ...]) -> PassKind:
    """How passes run; said at INFO where whole prompts do. Cost: a few passes of a few tokens."""
    rows = sample_rows(view.model.config, view.vocabulary)
    lookups = [min(place, len(row) - 1) for place, row in zip((1, 2, 0), rows, strict=True)]
    with evaluating(view):
        batch = pad(rows, view.device)
        with refused_by_name(view.model, f"hooks on {name_of(view, sites[0])}"):
            whole = _record(view, batch, lookups, sites, [0], "whole prompts")
        size = whole.site_outputs.float().square().mean().sqrt()
        generator = torch.Generator().manual_seed(0)
        delta = size * torch.randn(whole.site_outputs.shape, generator=generator).to(size.device)
        assert batch.attention_mask is not None
        lengths = batch.attention_mask.sum(1).tolist()
        tail = whole.runner.ids.shape[1]
        wanted = [r * tail + t for r in range(len(rows)) for t in range(lengths[r] - lookups[r])]
        at = torch.tensor(wanted, device=view.device)
        expected = whole.runner.run(delta, at)
        limit = error_limit(expected.dtype, view.head.rounding)
        obstacle = obstacle_of_tails(view)
        kinds: list[PassKind] = ["packed tails", "padded tails"] if tail_attention.usable(view) else ["padded tails"]
        for kind in kinds if not obstacle else ():
            try:
                tails = _record(view, batch, lookups, sites, [0], kind)
                error = relative_error(tails.runner.run(delta, at), expected)
                runner, sees = tails.runner, True
                if isinstance(runner, TailRunner) and runner.layout is not None:
                    sees = sees_windows(view, runner.layout.windows, runner.first_live)
                if not sees:
                    obstacle = "its attention does not say its sliding window"
                elif error <= limit:
                    return kind
                else:
                    obstacle = f"their states differ by {error:.1g}"
            except Exception as error:  # it may be any code
                obstacle = first_line(error) or type(error).__name__
    _log.info("values of %s: whole prompts run in each step, not their tails alone: %s", view.spec.name, obstacle)
    return "whole prompts"


def obstacle_of_tails(view: ModelView) -> str:
    """Why the tails of prompts cannot run in a model; "" if that is to be tried."""
    if view.head.matrix is None:
        return "the model runs whole"
    if missing := {"attention_mask", "position_ids", "past_key_values", "use_cache"} - view.base_takes:
        return f"its decoder takes no {min(missing)}"
    if "chunked_attention" in (getattr(view.config, "layer_types", None) or ()):
        return "its attention is in chunks, which begin anew in a tail"
    return ""


def sees_windows(view: ModelView, windows: Set[int | None], first_live: int) -> bool:
    """Whether attention from block `first_live` on was called with the sliding windows that the configuration names.

    A window longer than a few tokens changes nothing in a small pass, so its length is compared.

    Args:
        view: the model.
        windows: those that packed attention was called with; None for calls without one.
        first_live: the first block that ran.
    """
    window = getattr(view.config, "sliding_window", None)
    kinds = getattr(view.config, "layer_types", None)
    if not window or first_live >= view.num_layers:
        return True
    if kinds is not None:
        expected = {window if kind == "sliding_attention" else None for kind in kinds[first_live:]}
    else:
        expected = {window} if getattr(view.config, "use_sliding_window", True) else {None}
    return expected <= windows
