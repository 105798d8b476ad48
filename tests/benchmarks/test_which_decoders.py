"""The survey of decoders: tiny models that depend on everything, and rows that say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no source tree")
NAMED = ("llama", "granite", "opt", "bamba", "qwen2_vl")


@pytest.fixture(scope="module")
def survey():
    from benchmarks import architectures

    return architectures


@pytest.mark.parametrize("kind", NAMED)
def test_a_tiny_decoder_depends_on_every_earlier_token_alone(kind):
    from benchmarks.tiny_decoders import decoder_types, tiny_decoder

    if kind not in decoder_types():
        pytest.skip(f"this transformers has no {kind}")
    model = tiny_decoder(kind)
    ids = torch.randint(3, 180, (1, 12))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        assert logits.shape == (1, 12, 400) and bool(logits.isfinite().all())
        for place in (0, 5):
            other = ids.clone()
            other[0, place] = 179
            changed = (model(input_ids=other, use_cache=False).logits - logits).norm(dim=-1)[0]
            assert float(changed[:place].sum()) < 1e-4 < float(changed[place:].min())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_decoder(kind).parameters(), strict=True))


def test_what_cannot_be_built_says_why(survey):
    row = survey.in_child("no_such_type", 60)
    assert row["verdict"] == "not built" and "'no_such_type' is no decoder" in row["reason"]


def test_a_row_has_the_errors_of_everything(survey, tmp_path):
    row = survey.examine("llama", {"type": "llama"})
    assert row["verdict"] == "tails" and row["spec"] == "known" and row["edited"] == "model.layers.*.mlp.down_proj"
    for name in ("values mlp", "values block", "keys", "statistics", "update"):
        assert 0 < row[f"{name}_error"] < 1e-4
    path = tmp_path / "rows.json"
    origin = {"machine": "m", "versions": {"torch": "2"}, "commit": "abc1234"}
    survey.merge(path, {"type": "opt", "verdict": "whole"}, origin)
    survey.merge(path, row, origin)
    survey.merge(path, {"type": "opt", "verdict": "wrong"}, origin)
    rows = json.loads(path.read_text())["rows"]
    assert [(each["type"], each["verdict"]) for each in rows] == [("llama", "tails"), ("opt", "wrong")]


@pytest.mark.parametrize(("name", "part"), (("find_values", "values"), ("KeyPass", "keys"), ("save_model", "saving")))
def test_what_fails_is_a_wrong_row(survey, monkeypatch, name, part):
    def fails(*arguments, **named):
        raise ZeroDivisionError("no such luck")

    monkeypatch.setattr(survey, name, fails)
    row = survey.examine("llama", {"type": "llama"})
    assert row["verdict"] == "wrong" and "ZeroDivisionError: no such luck" in row["reason"]


def test_an_error_in_the_numbers_is_a_wrong_row(survey, monkeypatch):
    right = survey.find_values

    def wrong(*arguments, **named):
        values = right(*arguments, **named)
        values.targets.mul_(1.01)
        return values

    monkeypatch.setattr(survey, "find_values", wrong)
    row = survey.examine("llama", {"type": "llama"})
    assert row["verdict"] == "wrong" and "values mlp: error" in row["reason"]


def test_a_child_that_does_not_end_is_ended(survey, monkeypatch):
    import time

    monkeypatch.setattr(survey, "examine", lambda kind, row: time.sleep(60))
    row = survey.in_child("llama", 0.5)
    assert row["verdict"] == "wrong" and "no end" in row["reason"] and row["seconds"] < 30


def test_a_child_that_dies_is_a_wrong_row(survey, monkeypatch):
    import os

    monkeypatch.setattr(survey, "examine", lambda kind, row: os._exit(9))
    assert survey.in_child("llama", 30)["reason"] == "the process ended with 9"


PROMISED = (
    "gpt2 gptj gpt_neox llama mistral qwen2 qwen3 phi3 gemma2 gemma3_text olmo2 gemma gemma4_text olmo olmo3 smollm3 "
    "phi starcoder2 falcon glm4 exaone4 nemotron stablelm granite cohere cohere2 ministral ministral3 seed_oss "
    "ernie4_5 hunyuan_v1_dense apertus opt bloom mpt qwen3_5_text qwen3_next lfm2 granitemoehybrid falcon_h1 bamba "
    "nemotron_h jamba gemma3 mistral3 qwen2_vl qwen2_5_vl qwen3_vl llava"
)


def test_the_decoders_that_the_package_promises_are_right_in_the_committed_rows():
    document = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text(encoding="utf-8"))
    rows = {row["type"]: row for row in document["rows"]}
    for kind in PROMISED.split():
        row = rows[kind]
        assert row["verdict"] in ("tails", "whole", "logits"), (kind, row)
        assert row["values mlp_error"] < 1e-4 and row["keys_error"] < 1e-4 and row["update_error"] < 1e-4, kind
        assert row["post_norm"] or row["values block_error"] < 1e-4, kind
    assert rows["granite"]["head"] == "scale 0.4" and rows["cohere"]["head"] == "scale 0.5"
    assert all(row["reason"] for row in rows.values() if row["verdict"] not in ("tails", "whole", "logits"))
