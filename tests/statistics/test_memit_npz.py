"""Statistics and projectors of memit, AlphaEdit and EasyEdit: their files are read, and ours are what they read."""

from __future__ import annotations

import pickle

import numpy
import pytest
import torch
from tiny_models import TEXT, make_model, make_tokenizer

from kedit_fast import Editor, collect_statistics, demo, load_statistics
from kedit_fast.errors import MethodError, StatisticsError
from kedit_fast.solver.alphaedit_projector import load_projector, save_projector
from kedit_fast.solver.preconditioner import NullSpace
from kedit_fast.statistics import memit_npz
from kedit_fast.statistics.store import metadata_of, modules_in, read_layer, save_statistics

MODULE = "model.layers.{}.mlp.down_proj"


@pytest.fixture
def two():
    return make_model("llama"), make_tokenizer()


@pytest.fixture
def statistics(two):
    return collect_statistics(*two, TEXT * 5, (0, 2), progress=False)


def published_cache(file):
    """What `load_cached_state` and `SecondMoment.load_state_dict` of memit's runningstats make of a file."""
    data = dict(numpy.load(file))
    null = data["sample_size"].dtype == numpy.float64 and numpy.isnan(data["sample_size"])
    state = {name.removeprefix("mom2."): value for name, value in data.items() if name.startswith("mom2.")}
    count, mom2 = int(state["count"]), torch.from_numpy(state["mom2"])
    return None if null else int(data["sample_size"]), str(state["constructor"]), mom2 / count


def foreign(folder, module, rows, samples=100000):
    """A file as memit writes it: numpy.savez of the state with the sum in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{module}_float32_mom2_{samples}.npz"
    state = {"mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": len(rows),
             "mom2.mom2": (rows.T @ rows).numpy(), "sample_size": samples}  # fmt: skip
    numpy.savez(path, **state)
    return path


def test_our_file_is_what_memit_reads(tmp_path, statistics):
    for samples in (100000, None):
        for layer, second in statistics.layers.items():
            path = memit_npz.path_of(tmp_path, "gpt-j-6B", "wikipedia", second.module, samples)
            memit_npz.write(path, second, metadata_of(statistics, layer), samples)
            size, constructor, moment = published_cache(path)
            assert size == samples and constructor == "util.runningstats.SecondMoment()"
            assert moment.dtype == torch.float32
            assert torch.allclose(moment.double(), second.moment, rtol=1e-6, atol=1e-6 * float(second.moment.max()))
    name = f"gpt-j-6B/wikipedia_stats/{MODULE.format(2)}_float32_mom2"
    assert (tmp_path / f"{name}_100000.npz").exists() and (tmp_path / f"{name}.npz").exists()


def test_our_npz_is_checked_like_our_own_files(tmp_path, two, statistics):
    for layer, second in statistics.layers.items():
        path = memit_npz.path_of(tmp_path, "m", "text", second.module, 10, "float64")
        memit_npz.write(path, second, metadata_of(statistics, layer), 10, "float64")
    loaded = load_statistics(tmp_path / "m" / "text_stats", *two)  # the fingerprint is in it: no trust needed
    for layer in (0, 2):
        assert torch.allclose(loaded.moment(layer).moment, statistics.moment(layer).moment, rtol=1e-15)
        assert loaded.moment(layer).count == statistics.moment(layer).count
    with pytest.raises(StatisticsError, match="another model: different weights"):
        load_statistics(tmp_path / "m" / "text_stats", make_model("llama", seed=1), two[1], trust=True)


def test_a_foreign_file_needs_trust_and_fits_by_size(tmp_path, two):
    rows = torch.randn(500, 64)
    path = foreign(tmp_path, MODULE.format(1), rows)
    with pytest.raises(StatisticsError, match=rf"{path.name} does not say which model .* --trust"):
        load_statistics(tmp_path, *two)
    loaded = load_statistics(tmp_path, *two, trust=True)
    assert list(loaded.layers) == [1] and loaded.moment(1).count == 500
    assert torch.allclose(loaded.moment(1).moment, (rows.T @ rows).double() / 500, rtol=1e-6)
    foreign(tmp_path, MODULE.format(2), torch.randn(50, 32))
    with pytest.raises(StatisticsError, match=r"second_moment is \[32, 32\], the layer takes \[64, 64\]"):
        load_statistics(tmp_path, *two, trust=True)
    foreign(tmp_path, MODULE.format(1), rows, 5)
    with pytest.raises(StatisticsError, match="several statistics files"):
        load_statistics(tmp_path, *two, (1,), trust=True)


class Evil:
    def __reduce__(self):
        return (open, ("evil-was-run", "w"))


def test_bad_npz_files_are_named_and_nothing_in_them_is_run(tmp_path, two, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = torch.randn(500, 64)
    path = foreign(tmp_path, MODULE.format(0), rows)
    good = path.read_bytes()
    total = (rows.T @ rows).numpy()
    bent, hole = total.copy(), total.copy()
    bent[0, 1] += 10
    hole[3, 3] = numpy.nan
    cases = [
        (lambda: path.write_bytes(good[: len(good) // 2]), "is damaged or holds pickled objects"),
        (lambda: path.write_bytes(b""), "is damaged or holds pickled objects"),
        (lambda: numpy.savez(path, other=total), "has no mom2.mom2"),
        (lambda: numpy.savez(path, **{"mom2.mom2": bent, "mom2.count": 5}), "not symmetric"),
        (lambda: numpy.savez(path, **{"mom2.mom2": hole, "mom2.count": 5}), "not finite"),
        (lambda: numpy.savez(path, **{"mom2.mom2": total[:5], "mom2.count": 5}), r"mom2 is \[5, 64\]"),
        (lambda: numpy.savez(path, **{"mom2.mom2": total, "mom2.count": 0}), "of 0 tokens"),
        (
            lambda: numpy.savez(path, **{"mom2.mom2": numpy.array(Evil(), dtype=object), "mom2.count": 5}),
            "damaged or holds pickled",
        ),
    ]
    for make, message in cases:
        make()
        with pytest.raises(StatisticsError, match=message) as seen:
            load_statistics(tmp_path, *two, trust=True)
        assert path.name in str(seen.value)
    assert not (tmp_path / "evil-was-run").exists()


def test_a_failed_export_leaves_nothing(tmp_path, statistics):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StatisticsError, match="cannot write"):
        memit_npz.write(tmp_path / "file" / "a.npz", statistics.moment(0), {}, None)
    large = type(statistics.moment(0))("m", statistics.moment(0).moment * 1e38, 10**6)
    with pytest.raises(StatisticsError, match="beyond float32"):
        memit_npz.write(tmp_path / "a.npz", large, {}, None)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_modules_are_listed_in_the_order_of_layers(tmp_path):
    rows = torch.randn(50, 8)
    for layer in (10, 9, 2):
        foreign(tmp_path, MODULE.format(layer), rows)
    assert modules_in(tmp_path) == [MODULE.format(layer) for layer in (2, 9, 10)]
    with pytest.raises(StatisticsError, match="holds no statistics"):
        modules_in(tmp_path.parent)
    with pytest.raises(StatisticsError, match="no statistics file"):
        read_layer(tmp_path, MODULE.format(3))


def published_project(moment, threshold):
    """`get_project` of AlphaEdit."""
    u, s, _ = torch.linalg.svd(moment.float(), full_matrices=False)
    small = u[:, s < threshold]
    return small @ small.T


def test_projector_files_are_those_of_alphaedit(tmp_path):
    torch.manual_seed(0)
    spaces, expected = {}, []
    for layer in (2, 3):
        vectors, _ = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64))
        values = torch.cat([torch.full((10 * layer,), 1e-3), torch.linspace(1, 9, 48 - 10 * layer)]).double()
        moment = (vectors * values) @ vectors.T
        spaces[layer] = NullSpace.from_covariance(moment, 2e-2)
        expected.append(published_project(moment, 2e-2))
    save_projector(tmp_path / "null_space_project.pt", spaces)
    stack = torch.load(tmp_path / "null_space_project.pt", weights_only=True)
    assert stack.dtype == torch.float32 and torch.allclose(stack, torch.stack(expected), atol=1e-5)
    torch.save(torch.stack(expected), tmp_path / "theirs.pt")
    loaded = load_projector(tmp_path / "theirs.pt", (2, 3), 10.0, trust=True)
    keys = torch.randn(48, 5, dtype=torch.float64)
    for layer, space in loaded.items():
        assert space.dimension == spaces[layer].dimension == 10 * layer and space.l2 == 10
        assert torch.allclose(space.apply(keys), spaces[layer].apply(keys), atol=1e-5)


def test_bad_projector_files_are_named_and_nothing_in_them_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, eye = tmp_path / "p.pt", torch.eye(6)
    good = torch.stack([torch.diag(torch.tensor([1.0, 1, 0, 0, 0, 0]))] * 2)
    nan = good.clone()
    nan[1, 0, 0] = float("nan")
    cases = [
        (lambda: path.write_bytes(b"nonsense"), "damaged or holds more than tensors"),
        (lambda: path.write_bytes(pickle.dumps(Evil())), "damaged or holds more than tensors"),
        (lambda: torch.save(Evil(), path), "damaged or holds more than tensors"),
        (lambda: torch.save({"P": good}, path), "must hold one float32 tensor"),
        (lambda: torch.save(good[0], path), r"holds \[6, 6\]"),
        (lambda: torch.save(good[:1], path), "has 1 layers, the edit has 2"),
        (lambda: torch.save(good[:, :3], path), r"must be \[d, d\]"),
        (lambda: torch.save(good[:, :0, :0], path), r"must be \[d, d\]"),
        (lambda: torch.save(good.bfloat16(), path), r"it holds \[2, 6, 6\] torch.bfloat16"),
        (lambda: torch.save(good * 0.5, path), "neither 0 nor 1"),
        (lambda: torch.save(nan, path), r"layer 5: the projection is not finite"),
        (lambda: torch.save(good + torch.triu(torch.ones(6, 6), 1), path), "not symmetric"),
        (lambda: torch.save(torch.stack([eye, eye]), path), "on all 6 dimensions"),
        (lambda: torch.save(torch.zeros(2, 6, 6), path), "on nothing"),
    ]
    with pytest.raises(StatisticsError, match="no projector file"):
        load_projector(path, (4, 5), trust=True)
    for make, message in cases:
        make()
        with pytest.raises(StatisticsError, match=message) as seen:
            load_projector(path, (4, 5), trust=True)
        assert "p.pt" in str(seen.value)
    with pytest.raises(StatisticsError, match="does not say which model"):
        load_projector(path, (4, 5))
    assert not (tmp_path / "evil-was-run").exists()


def test_alphaedit_from_a_projector_is_alphaedit_from_statistics(tmp_path, demo_model, demo_statistics):
    numbers = {
        "v_num_grad_steps": 3,
        "clamp_norm_factor": 0.75,
        "nullspace_rule": "energy",
        "nullspace_threshold": 0.1,
        "L2": 7,
    }
    own = Editor(*demo_model, "alphaedit", statistics=demo_statistics, hparams=numbers, prefixes=())
    expected = own.edit(demo.requests(4)).updates
    save_projector(tmp_path / "p.pt", {layer: own.solver_state.preconditioner(layer) for layer in own.hparams.layers})
    own.restore()
    spaces = load_projector(tmp_path / "p.pt", own.hparams.layers, trust=True)
    editor = Editor(*demo_model, "alphaedit", null_spaces=spaces, hparams=numbers, prefixes=())
    found = editor.edit(demo.requests(4)).updates
    editor.restore()
    for name, (update,) in found.items():
        gap = (update.dense() - expected[name][0].dense()).norm() / expected[name][0].dense().norm()
        assert float(gap) < 1e-5  # the projector is float32
    with pytest.raises(MethodError, match="has no null space"):
        Editor(*demo_model, "memit", statistics=demo_statistics, null_spaces=spaces)


def test_statistics_saved_by_older_versions_are_read(tmp_path, two, statistics):
    """Files without the fields that came later: they say less, and are as good."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    (path, _) = save_statistics(statistics, tmp_path)
    with safe_open(path, "pt") as file:
        metadata, moment = file.metadata(), file.get_tensor("second_moment").clone()
    for field in ("documents", "max_tokens", "max_samples", "seed", "token_weights"):
        del metadata[field]
    save_file({"second_moment": moment}, path, metadata)
    loaded = load_statistics(tmp_path, *two, (0,))
    assert loaded.documents == 0 and torch.equal(loaded.moment(0).moment, statistics.moment(0).moment)
