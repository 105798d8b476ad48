"""The search for hyper-parameters, on trials that a formula stands in for."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.registry import find_recipe
from kedit_fast.methods.windows import windows
from kedit_fast.reports.search import SEARCHES, Numbers, Search, Windows, span
from kedit_fast.reports.trials import Trial, harmonic_mean, projected_share

CLAMPS = Numbers("clamp_norm_factor", (1.0, 2.0, 4.0), ratio=2.0, low=0.5, high=16.0)
SHARES = Numbers("residual_share", (0.1, 0.2, 0.4), ratio=2.0, high=0.9)


class Formula:
    """Trials whose score is a function of the configuration; an error it raises is the failure."""

    def __init__(self, score, count=8):
        self.score, self.done, self.view = score, [], SimpleNamespace(num_layers=count)

    def run(self, stage, value, changes, requests):
        try:
            score, margin, more = 0.0, 0.0, {}
            outcome = self.score(**changes)
            score, margin = outcome if isinstance(outcome, tuple) else (outcome, 0.0)
        except ArithmeticError as error:
            layers = error.args[1] if len(error.args) > 1 else ()
            more = {"failure": str(error.args[0]), "no_null_space": layers}
        self.done.append(Trial(changes["layers"], stage, value, changes, 3, score=score, margin=margin, **more))
        return self.done[-1]


def search_of(score, method="memit", fixed=(), available=range(8), count=8, moves=True, **hparams):
    recipe = find_recipe(method)
    common = {
        "v_num_grad_steps": 2,
        "v_lr": "auto",
        "clamp_norm_factor": 2.0,
        "mom2_update_weight": "auto",
        "L2": "auto",
    }
    base = Hparams(recipe.name, layers=(2,) if recipe.edits_one_layer else (1, 2), **{**common, **hparams})
    coarse = [window for window in windows(recipe, count) if set(available) >= set(window)]
    return Search(
        Formula(score, count), (), recipe, base, frozenset(fixed), coarse, coarse[0], frozenset(available), moves
    )


def values_of(search, stage):
    return [trial.value for trial in search.trials.done if trial.stage == stage]


def test_every_stage_begins_with_the_best_so_far():
    def score(layers, clamp_norm_factor=2.0, residual_share=0.2):
        return 1 - 0.1 * abs(layers[-1] - 3) - 0.01 * abs(clamp_norm_factor - 4) - abs(residual_share - 0.4)

    search = search_of(score)
    search.run((Windows("coarse"), CLAMPS, SHARES))
    assert search.best.hparams == {"layers": (2, 3), "clamp_norm_factor": 4.0, "residual_share": 0.4}
    assert values_of(search, "residual_share") == [0.1, 0.4, 0.8]  # not 0.2, which was tried; and past the edge
    assert all(trial.hparams["clamp_norm_factor"] == 4.0 for trial in search.trials.done if trial.stage == SHARES.name)
    assert not search.edges


@pytest.mark.parametrize(("peak", "tried"), [(8.0, [1, 4, 8, 16]), (0.5, [1, 4, 0.5]), (100.0, [1, 4, 8, 16])])
def test_a_best_value_at_an_edge_is_followed_and_what_stays_there_is_said(peak, tried):
    search = search_of(lambda layers, clamp_norm_factor=2.0: 1 / (1 + abs(math.log(clamp_norm_factor / peak))))
    search.run((Windows("coarse"), CLAMPS))
    assert values_of(search, "clamp_norm_factor") == tried
    assert search.value("clamp_norm_factor") == {100.0: 16.0}.get(peak, peak)
    at_bound = {0.5: "0.5, lies at the edge of what was tried, 0.5 to 4", 100.0: "16, lies at the edge"}.get(peak)
    assert at_bound in search.edges["clamp_norm_factor"] if at_bound else not search.edges


def test_equal_numbers_change_nothing_and_equal_windows_are_told_apart_by_their_margin():
    search = search_of(lambda layers, clamp_norm_factor=2.0: (0.9, layers[-1] / 10 + clamp_norm_factor))
    search.run((Windows("coarse"), CLAMPS))
    assert search.best.layers[-1] == max(window[-1] for window in search.windows)
    assert search.value("clamp_norm_factor") == 2.0
    search = search_of(lambda layers: 0.9)
    search.run((Windows("coarse"),))
    assert search.best is search.trials.done[0]  # the first of equals


def test_while_nothing_comes_through_the_likelier_value_is_the_better_one():
    search = search_of(lambda layers, clamp_norm_factor=2.0: (0.0, clamp_norm_factor))
    search.run((Windows("coarse"), CLAMPS))
    assert search.value("clamp_norm_factor") == 16.0


def test_a_failure_is_a_row_and_only_a_search_without_a_window_ends():
    def fails(layers, clamp_norm_factor=2.0):
        if layers[-1] < 3 or clamp_norm_factor == 4.0:
            raise ArithmeticError("not finite")
        return 0.5

    search = search_of(fails)
    search.run((Windows("coarse"), CLAMPS))
    assert [t.failure for t in search.trials.done].count("not finite") == sum(w[-1] < 3 for w in search.windows) + 1
    assert search.best.layers[-1] == 3 and search.value("clamp_norm_factor") == 2.0

    def always(**changes):
        raise ArithmeticError("not finite")

    search = search_of(always)
    search.run(SEARCHES["full", "values"])
    assert search.best is None and len(search.trials.done) == len(search.windows)


def test_layers_without_a_null_space_leave_their_windows():
    def needs(layers):
        if lacking := tuple(layer for layer in layers if layer in (0, 2)):
            raise ArithmeticError(f"layer {lacking[0]}: no null space", lacking)
        return 1 - abs(layers[-1] - 1) / 10

    search = search_of(needs, "alphaedit")
    search.run((Windows("coarse"),))
    assert (1,) in [trial.layers for trial in search.trials.done if not trial.failure]
    assert search.best.layers == (1,) and "layer 0: no null space" in {t.failure for t in search.trials.done}


def test_what_is_given_or_has_no_effect_is_not_varied():
    search = search_of(lambda layers, **changes: 0.5, fixed={"clamp_norm_factor"}, v_lr=0.5)
    search.run(SEARCHES["full", "values"])
    assert {trial.stage for trial in search.trials.done} == {"layers", "residual_share"}
    search = search_of(lambda layers, **changes: 0.5, "rome", v_lr=0.5)
    search.run(SEARCHES["full", "values"])
    assert {trial.stage for trial in search.trials.done} == {"layers", "clamp_norm_factor"}
    assert all(len(trial.layers) == 1 for trial in search.trials.done)


def test_windows_move_and_change_their_size_only_over_layers_that_can_be_edited():
    deepest = max(window[-1] for window in windows(find_recipe("memit"), 8))
    search = search_of(lambda layers: layers[-1] / 10 + len(layers) / 100)
    search.run((Windows("coarse"), Windows("ends"), Windows("sizes")))
    assert search.best.layers == (4, 5, 6, 7) and search.best.layers[-1] > deepest and not search.edges
    short = search_of(lambda layers: layers[-1] / 10, available=range(1, deepest + 1))
    short.run((Windows("coarse"), Windows("ends"), Windows("sizes")))
    assert all(set(trial.layers) <= set(range(1, deepest + 1)) for trial in short.trials.done)
    assert f"layer {deepest + 1} has no statistics" in short.edges["layers"]
    fixed = search_of(lambda layers: layers[-1], moves=False)
    fixed.run((Windows("coarse"), Windows("ends"), Windows("sizes")))
    assert [trial.layers for trial in fixed.trials.done] == list(fixed.windows)


def test_no_configuration_is_tried_twice():
    search = search_of(lambda **changes: zlib.crc32(repr(sorted(changes.items())).encode()) / 2**32)
    search.run(SEARCHES["full", "values"])
    seen = [repr(sorted(trial.hparams.items())) for trial in search.trials.done]
    assert len(seen) == len(set(seen))


def test_the_harmonic_mean_leaves_out_what_was_not_measured():
    assert harmonic_mean([0.5, None, 1.0]) == pytest.approx(2 / 3) and harmonic_mean([0.0, 1.0]) == 0.0


def test_layers_are_written_as_the_option_takes_them():
    assert [span(layers) for layers in ((4, 5, 6), (3, 5), (2,), [0, 1])] == ["4-6", "3,5", "2", "0-1"]


def test_the_best_windows_are_tried_with_another_share():
    """One layer alone is best with a small share, though two are with the usual one."""

    def score(layers, residual_share=0.2):
        alone = 0.9 - 4 * abs(residual_share - 0.1) if layers == (0,) else 0.7
        return alone if layers[-1] < 3 else 0.0

    search = search_of(score)
    search.run((Windows("coarse"), Windows("best", residual_share=0.1)))
    assert search.best.hparams == {"layers": (0,), "residual_share": 0.1}
    again = [trial.layers for trial in search.trials.done if trial.stage == "residual_share"]
    assert len(again) == 3 and (0,) in again
    given = search_of(lambda layers: 0.5, fixed=("residual_share",))
    given.run((Windows("coarse"), Windows("best", residual_share=0.1)))
    assert not values_of(given, "residual_share")


def test_a_stage_is_passed_over_where_efficacy_is_high_enough(monkeypatch):
    stage = Numbers("clamp_norm_factor", factors=(2.0, 4.0), efficacy_below=0.9)
    for efficacy, chosen in ((0.95, 2.0), (0.85, 8.0), (None, 8.0)):
        search = search_of(lambda layers, clamp_norm_factor=2.0: 0.1 * clamp_norm_factor)
        plain = search.trials.run
        search.trials.run = lambda *a, plain=plain, efficacy=efficacy: replace(plain(*a), efficacy=efficacy)
        search.run((Windows("coarse"), stage))
        assert search.value("clamp_norm_factor") == chosen


def test_another_value_must_be_worth_it():
    stage = Numbers("residual_share", factors=(0.5, 2.0), least_gain=0.02)
    for gain, chosen in ((0.015, 0.2), (0.03, 0.1)):
        search = search_of(lambda layers, residual_share=0.2, gain=gain: 0.5 - gain * math.log2(residual_share / 0.2))
        search.run((Windows("coarse"), stage))
        assert search.value("residual_share") == chosen


def test_the_loss_of_neighborhood_is_projected_to_the_number_of_edits():
    assert projected_share(0.9, 1.0, 1.0) == 0.9 and projected_share(None, None, 5.0) is None
    assert projected_share(0.9, 1.0, 3.0) == pytest.approx(0.7) and projected_share(0.5, 0.9, 9.0) == 0.0
    assert projected_share(0.95, 0.9, 9.0) == 0.95  # no loss
