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
from kedit_fast.models.fixed_deltas import FixedDeltas
from kedit_fast.models.forward import Site, TokenBatch, evaluating, name_of, pad
from kedit_fast.models.head import error_limit, refused_by_name, relative_error, sample_rows
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

    Cost: one forward pass, without the head; for the first call of a view with these sites, a few passes of a few
        tokens more.
    """
    return _record(view, pad(rows, view.device), lookups, sites, references, pass_kind(view, tuple(sites)), fixed)


def _record(
    view: ModelView,
    batch: TokenBatch,
    lookups: Sequence[int],
    sites: Sequence[Site],
    references: Sequence[int],
    kind: PassKind,
    fixed: FixedDeltas | None = None,
) -> RecordedPrompts:
    if kind == "whole prompts":
        return RecordedPrompts(*record_whole(view, batch, lookups, sites, references, fixed))
    return RecordedPrompts(*record_tails(view, batch, lookups, sites, references, kind == "packed tails", fixed))


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
