"""When a request stops before its last iteration, besides a loss below `v_stop_loss`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kedit_fast.editing.values.active_set import ActiveSet
from kedit_fast.editing.values.objective import Terms
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.recipe import StopRule

EASED_WEIGHT = 0.1
"""PMET: weight of the likelihood after an iteration in which every target token was right."""
EASED_KL = 0.01
"""PMET: such a request stops when kl_factor KL is at most this."""


@dataclass(frozen=True)
class Stopping:
    """What a stopping rule does."""

    apply: Callable[[ActiveSet, Terms, Hparams], torch.Tensor | None]
    """Takes the active set, the terms of this iteration's losses and the hyper-parameters; returns [v] bool, true for
    requests that stop before this iteration's step, or None for none. It may set fields of the active set, for the
    next iteration, and must not wait for the device."""
    needs_top1: bool = False
    """Whether `apply` reads which target tokens are the most probable ones."""


def _most_probable(active: ActiveSet, terms: Terms, hparams: Hparams) -> torch.Tensor:
    """[v] bool: `most_probable_steps` iterations have passed since all targets were right in the prefixed contexts.

    It counts iterations that are right, the first of them not included.
    """
    assert terms.prefixed_top1 is not None
    active.iterations_correct = active.iterations_correct + active.all_in_group(terms.prefixed_top1)
    return active.iterations_correct > hparams.most_probable_steps


def _below_loss(active: ActiveSet, terms: Terms, hparams: Hparams) -> None:
    """The rule of MEMIT and ROME: a loss below `v_stop_loss`, which all rules share, and nothing else."""


def _pmet(active: ActiveSet, terms: Terms, hparams: Hparams) -> torch.Tensor:
    """PMET's rule: once every target token is right, the likelihood counts less, and a small KL stops the request.

    Source: PMET (arXiv 2308.08742), its released `compute_zs.py`.
    """
    assert terms.all_top1 is not None
    right = active.all_in_group(terms.all_top1)
    active.likelihood_weight = torch.where(right, EASED_WEIGHT, torch.ones_like(active.likelihood_weight))
    return right & (hparams.kl_factor * active.group_mean(terms.kl.detach()) <= EASED_KL)


STOP_RULES: dict[StopRule, Stopping] = {"below_loss": Stopping(_below_loss), "pmet": Stopping(_pmet, needs_top1=True)}
"""Stopping rules by the names that recipes give them."""

MOST_PROBABLE = Stopping(_most_probable, needs_top1=True)
"""ENCORE's rule, an option of every method beside its own rule: `most_probable_steps`."""
