"""Windows: they cover the depth of a method's family, on deep and on shallow models."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest

from kedit_fast.methods.presets import make_hparams
from kedit_fast.methods.registry import RECIPES
from kedit_fast.methods.windows import statistics_layers, tried_layers, windows

DEPTHS = [1, 2, 3, 4, 6, 12, 13, 16, 24, 32, 40, 80, 126]


@pytest.mark.parametrize("num_layers", DEPTHS)
@pytest.mark.parametrize("method", ["memit", "rome", "alphaedit", "ultraedit"])
def test_windows_are_neighboring_layers_of_the_model_in_order(method, num_layers):
    tried = windows(RECIPES[method], num_layers)
    assert tried == sorted(set(tried), key=lambda window: window[-1])
    assert all(window == tuple(range(window[0], window[-1] + 1)) for window in tried)
    assert tried[0][0] == 0
    assert tried[-1][-1] < num_layers
    assert 1 <= len(tried) <= 12


@pytest.mark.parametrize("num_layers", DEPTHS[2:])
def test_windows_go_down_to_the_family_s_deepest_layer_without_large_steps(num_layers):
    for method, deepest in (("memit", 0.65), ("rome", 0.65), ("ultraedit", 0.97)):
        ends = [window[-1] for window in windows(RECIPES[method], num_layers)]
        assert abs(ends[-1] - deepest * (num_layers - 1)) <= 0.5
        steps = [second - first for first, second in pairwise(ends)]
        assert max(steps) <= 0.13 * num_layers + 0.7 and max(steps) - min(steps) <= 1


def test_every_end_is_tried_on_a_model_of_up_to_twelve_layers():
    assert [window[-1] for window in windows(RECIPES["memit"], 12)] == list(range(8))
    assert [window[-1] for window in windows(RECIPES["ultraedit"], 12)] == list(range(12))
    assert len(windows(RECIPES["ultraedit"], 13)) == 9


@pytest.mark.parametrize("num_layers, size", [(2, 2), (6, 2), (12, 2), (16, 3), (24, 4), (32, 5), (126, 5)])
def test_windows_grow_with_the_depth_from_two_layers_to_five(num_layers, size):
    assert max(map(len, windows(RECIPES["memit"], num_layers))) == size
    assert set(map(len, windows(RECIPES["rome"], num_layers))) == {1}


def test_a_shallow_model_has_windows_too():
    assert windows(RECIPES["memit"], 1) == windows(RECIPES["rome"], 1) == windows(RECIPES["ultraedit"], 1) == [(0,)]
    assert windows(RECIPES["memit"], 2) == [(0,), (0, 1)] and windows(RECIPES["rome"], 2) == [(0,), (1,)]
    assert windows(RECIPES["ultraedit"], 3) == [(0,), (0, 1), (1, 2)]


@pytest.mark.parametrize("num_layers", DEPTHS)
def test_tried_layers_are_those_of_all_methods_with_statistics(num_layers):
    tried = tried_layers(num_layers)
    for recipe in RECIPES.values():
        if recipe.uses_statistics:
            assert set(tried) >= {layer for window in windows(recipe, num_layers) for layer in window}
    assert tried == tuple(sorted(set(tried))) and tried[0] == 0
    assert tried[-1] <= max(1, 0.65 * (num_layers - 1) + 0.5) and tried[-1] < num_layers


@pytest.mark.parametrize("kind", ["llama", "gpt2", "unheard-of"])
@pytest.mark.parametrize("num_layers", DEPTHS)
def test_with_statistics_of_these_layers_every_method_runs_with_its_guess(kind, num_layers):
    config = SimpleNamespace(model_type=kind, num_hidden_layers=num_layers)
    layers = set(statistics_layers(config))
    assert layers >= set(tried_layers(num_layers))
    for name, recipe in RECIPES.items():
        if recipe.uses_statistics:
            assert set(make_hparams(name, config)[0].layers) <= layers


def test_a_known_model_s_published_layers_are_among_them():
    known = SimpleNamespace(model_type="gpt2", n_layer=48, n_embd=1600, num_hidden_layers=48, hidden_size=1600)
    assert set(statistics_layers(known)) >= {13, 14, 15, 16, 17}
