"""Means, intervals, states and choices of metrics."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model, make_tokenizer

from kedit_fast import EditRequest
from kedit_fast.errors import InvalidArgumentError, RequestError
from kedit_fast.evaluation.evaluator import Evaluator, evaluate
from kedit_fast.evaluation.registry import METRICS, select
from kedit_fast.evaluation.results import measured, record_score
from kedit_fast.evaluation.sequences import METRIC, RetentionTracker
from kedit_fast.support.intervals import bootstrap, wilson

FIRST = EditRequest("{} plays the", "Miles Davis", "piano", "trumpet", ("Miles Davis plays", "Ebro"), ("Ebro is",))
SECOND = EditRequest("{} is located in", "Ebro", "Spain", None, ("Ebro, in",))


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def test_intervals():
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap(values.tolist())
    half = 1.96 * float(values.std()) / 20  # of a normal mean
    assert (low, high) == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=0.2 * half)
    assert bootstrap(values.tolist()) == (low, high) != bootstrap(values.tolist(), seed=1)
    assert bootstrap([1.0, 3.0], [1.0, 0.0]) == (1.0, 1.0)


@pytest.mark.parametrize(("within", "expected"), [("mean", 0.75), ("mean of names", 2 / 3), ("any", 1.0), ("all", 0.0)])
def test_a_records_score(within, expected):
    cases = [("a", 1.0, 1.0), ("a", 1.0, 1.0), ("a", 1.0, 1.0), ("b", 0.0, 1.0)]
    if within == "mean of names":
        cases = [("a", 1.0, 1.0), ("a", 1.0, 1.0), ("b", 0.0, 1.0), ("c", 1.0, 1.0)]
    assert record_score(within, cases) == (pytest.approx(expected), 4.0)


def test_means_over_records_and_over_prompts():
    records = [(1.0, 1.0), (0.5, 4.0), (0.0, 1.0)]
    by_record, by_prompt = measured(records, 6, "request", 100.0), measured(records, 6, "prompt", 100.0)
    assert (by_record.value, by_prompt.value) == (pytest.approx(50.0), pytest.approx(50.0))
    assert measured([(1.0, 1.0), (0.5, 4.0)], 5, "request").value == pytest.approx(0.75)
    assert measured([(1.0, 1.0), (0.5, 4.0)], 5, "prompt").value == pytest.approx(0.6)
    assert measured([(0.5, 4.0)], 4, "request").interval is None  # a bootstrap of one record has no width
    assert measured([(1.0, 4.0)], 4, "request").interval == pytest.approx((0.2065, 1.0), abs=1e-4)
    nothing = measured([], 0, "request")
    assert (nothing.value, nothing.records, nothing.prompts, nothing.interval) == (None, 0, 0, None)


def test_metrics_are_chosen_by_id_definition_and_family():
    ids = [metric.id for metric in select("cf.success, text.nll")]
    assert ids == [id for id in METRICS if id.startswith("cf.success/") or id == "text.nll"]
    assert {metric.id for metric in select("cf.score")} >= {"cf.score", "cf.success/rewrite"}
    assert {metric.id for metric in select("cf")} >= set(ids) - {"text.nll"}
    assert [metric.id for metric in select("all")] == list(METRICS)
    assert select("default") == select()
    with pytest.raises(InvalidArgumentError, match=r"did you mean cf\.succes"):
        select("cf.sucess")
    with pytest.raises(InvalidArgumentError, match="no metrics chosen"):
        select(",")


def test_absent_is_counted_out_and_states_are_told_apart(model):
    evaluator = Evaluator(model, make_tokenizer(), [FIRST, SECOND], "cf.success,cf.accuracy,ee.locality")
    evaluator.measure("final")
    result = evaluator.result()
    counts = {id: (one.states["final"].records, one.states["final"].prompts) for id, one in result.metrics.items()
              if one.states}  # fmt: skip
    assert counts["cf.success/rewrite"] == (1, 1)  # the second has no true target
    assert counts["cf.accuracy/paraphrase"] == (2, 3)
    assert counts["cf.accuracy/neighborhood"] == (1, 1)
    locality = next(one for id, one in result.metrics.items() if id.startswith("ee.locality"))
    assert not locality.states and "'pre', which was not measured" in locality.reason
    evaluator.measure("pre")
    locality = evaluator.result().metrics[locality.metric.id]
    assert locality.states["final"].value == 1.0 * locality.metric.scale
    rows = list(evaluator.result().rows())
    assert {row["record"] for row in rows if row["metric"] == "cf.accuracy/rewrite"} == {1, 2}
    by_prompt = Evaluator(model, make_tokenizer(), [FIRST, SECOND], "cf.magnitude", average="prompt")
    by_prompt.measure("final")
    assert by_prompt.result().metrics["cf.magnitude/paraphrase"].unit == "prompt"


def test_post_is_by_batch(model):
    evaluator = Evaluator(model, make_tokenizer(), [FIRST, SECOND], "cf.accuracy/rewrite")
    evaluator.measure("post", [1])
    assert evaluator.result().metrics["cf.accuracy/rewrite"].states["post"].records == 1
    evaluator.measure("post", [0])
    assert evaluator.result().metrics["cf.accuracy/rewrite"].states["post"].records == 2


def test_bad_input_is_named(model):
    tokenizer = make_tokenizer()
    with pytest.raises(RequestError, match=r"request 1: .*the model takes 128\nrequest 'x'"):
        Evaluator(
            model,
            tokenizer,
            [EditRequest("{} is", "a " * 200, "b"), FIRST, EditRequest("{} is", "a " * 200, "b", id="x")],
            "cf.accuracy",
        )
    with pytest.raises(InvalidArgumentError, match="average"):
        Evaluator(model, tokenizer, [FIRST], average="both")
    evaluator = Evaluator(model, tokenizer, [FIRST], "cf.accuracy")
    for state, arguments in (("first", {}), ("context", {}), ("final", {"requests": [1]})):
        with pytest.raises(InvalidArgumentError):
            evaluator.measure(state, **arguments)
    with pytest.raises(InvalidArgumentError, match="not both"):
        evaluate(model, tokenizer, [FIRST], base=model, patches=["x"])


def test_what_a_sequence_keeps(monkeypatch):
    """The model forgets the first batch when the second is written; rows are those of a batch and of the end."""
    model, tokenizer = make_model("llama"), make_tokenizer()
    requests = [FIRST, SECOND, EditRequest("{} is", "Ebro", "Spain")]
    evaluator = Evaluator(model, tokenizer, requests, METRIC)
    tracker = RetentionTracker(evaluator, sample=1)
    scored = []
    said = {0: 1.0, 1: 1.0}
    from kedit_fast.evaluation import evaluator as module

    def answers(view, tokenizer, rows, *others):
        scored.append(len(rows))
        made = original(view, tokenizer, rows, *others)
        hit = {ask: said[0 if "Davis" in ask.prompt else 1] for ask in made}
        return {ask: type(one)(one.tokens, one.log_probs, one.tokens if hit[ask] else tuple(t + 1 for t in one.tokens))
                for ask, one in made.items()}  # fmt: skip

    original = module.answer_rows
    monkeypatch.setattr(module, "answer_rows", answers)
    tracker.measure([0])
    tracker.measure([1, 2])
    said[0] = 0.0
    evaluator.measure("final")
    result = tracker.result(evaluator.result())
    assert (result.retained, result.forgetting) == (0.5, 1.0)
    assert [one.requests for one in result.curve] == [1, 1]
    assert scored == [1, 1, 3]
