"""Metrics of generated text: what counts, by hand-made answers; and published numbers, by the demo model's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from kedit_fast import EditRequest, demo
from kedit_fast.errors import InvalidArgumentError
from kedit_fast.evaluation import evaluator as evaluator_module
from kedit_fast.evaluation.asks import Forced, ForcedAnswer, Generated, GeneratedAnswer, Likelihood, LikelihoodAnswer
from kedit_fast.evaluation.catalog.mquake import EXAMPLES
from kedit_fast.evaluation.contexts import sentence, triple
from kedit_fast.evaluation.evaluator import Evaluator
from kedit_fast.evaluation.generation import Text
from kedit_fast.evaluation.registry import METRICS, select
from kedit_fast.evaluation.rows import Row
from kedit_fast.requests.probes import Probe, Question

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_texts.json").read_text(encoding="utf-8"))["requests"]


@pytest.fixture
def measured(demo_model, monkeypatch):
    """From metrics, requests and what is said in each state to an Evaluation; no model runs.

    What is said: state -> prompt -> a text, which the model "generates", or, by target, tokens that are hits.
    """
    model, tokenizer = demo_model

    def run(metrics, requests, said, seen=None, **options):
        def answered(view, tokenizer, rows, *rest, **more):
            if seen is not None:
                seen.update(rows)
            return {ask: answer(ask, rows[ask], said[state]) for ask in rows}

        monkeypatch.setattr(evaluator_module, "answer_rows", answered)
        evaluator = Evaluator(model, tokenizer, requests, metrics, **options)
        for state in said:
            evaluator.measure(state)
        return evaluator.result()

    return run


def answer(ask, row, table):
    if isinstance(ask, Generated):
        text = table.get(ask.prompt, "")
        return GeneratedAnswer(row.prompt, (), text, True)
    if isinstance(ask, Forced):
        hits = table.get((ask.prompt, ask.target), "0")
        tokens = tuple(range(len(hits)))
        return ForcedAnswer(
            tokens, (-1.0,) * len(hits), tuple(t if h == "1" else -1 for t, h in zip(tokens, hits, strict=True))
        )
    assert isinstance(ask, Likelihood)
    return LikelihoodAnswer((1, 2, 3), (-1.0, -2.0, -3.0))


def values(evaluation, state="final"):
    return {id: evaluation.value(id, state) for id in evaluation.metrics}


def test_free_answers_are_compared_as_they_say(measured):
    plain = EditRequest("{} eats", "Ann", "figs", "plums", ("Ann likes",), ("Bob eats",), target_aliases=("a fig",))
    dotted = EditRequest("{} lives in", "Ann", "St. Louis", "the U.S.", neighborhood_prompts=("Bob lives in",))
    said = {
        "Ann eats": " Figs. And plums",
        "Ann likes": " a fig, the figs and figs",
        "Bob eats": " plums and figs",
        "Ann lives in": " St. Louis. She",
        "Bob lives in": " the U.S. He",
    }
    found = values(measured("wild", [plain, dotted], {"final": said}))
    assert found["wild.em/rewrite"] == 1.0
    assert found["wild.em.published/rewrite"] == 0.5  # "St"
    assert found["wild.em/paraphrase"] == 0.0 and found["wild.em/neighborhood"] == 0.5
    assert found["wild.contains/rewrite"] == 1.0 and found["wild.contains/paraphrase"] == 1.0
    assert found["wild.contains/neighborhood"] == 0.5  # figs are the other side's
    assert found["wild.f1/neighborhood"] == pytest.approx((2 / 4 + 1) / 2)
    assert found["wild.repeats/paraphrase"] == 1.0 and found["wild.repeats/rewrite"] == 0.0


def test_a_choice_is_between_the_best_aliases(measured):
    request = EditRequest(
        "{} eats", "Ann", "figs", "plums", neighborhood_prompts=("Bob eats",), true_aliases=("prunes",)
    )
    evaluation = measured("wild.choice", [request, EditRequest("{} eats", "Cy", "figs")], {"final": {}})
    assert evaluation.metrics["wild.choice/rewrite"].states["final"].records == 1  # the other has no old target
    assert values(evaluation)["wild.choice/rewrite"] == 0.0  # a tie is not a choice
    assert values(evaluation)["wild.choice/neighborhood"] == 0.0
    asked = {case.answers["final"] for case in evaluation.scores["wild.choice/rewrite"][0].cases}
    assert len(next(iter(asked))) == 3


def group(of=7):
    """A case of two edits whose question takes both, with a hop beside that no edit writes."""
    questions = tuple(Question(text, (("Oslo", "Kristiania"),)) for text in ("Which city?", "What city?", "City?"))
    hops = (Question("Ann works for", (("Acme", "ACME"),)), Question("Acme is in", (("Rome",),)))
    beside = Question("Oslo lies by the", (("sea",),))
    probes = (
        Probe("multi_hop", questions, "questions", "any", before=hops),
        Probe("locality", (beside,), "new_single_hops"),
    )
    first = EditRequest("{} works for", "Ann", "Bolt", "Acme", group=of, probes=probes)
    return [first, EditRequest("{} is in", "Bolt", "Oslo", "Rome", group=of)]


def test_a_case_of_mquake_is_a_group_of_edits(measured):
    before = {"Ann works for": " ACME.", "Acme is in": " Rome"}
    after = {
        "Ann works for": " Bolt. She",
        "Bolt is in": " Oslo",
        "What city?": " Kristiania\nQ:",
        "City?": " oslo",
        "Oslo lies by the": " lake.",
        f"{EXAMPLES}Q: City? A:": " Oslo",
    }
    other = [EditRequest("{} works for", "Cy", "Bolt", group=8)]
    evaluation = measured("mquake", group() + other, {"pre": before, "final": after})
    found = values(evaluation)
    assert found["mquake.multi_hop"] == 1.0 and found["mquake.multi_hop.few_shot"] == 1.0
    assert found["mquake.multi_hop_mean"] == pytest.approx(1 / 3)  # "oslo" is not spelled so
    assert found["mquake.multi_hop.known"] == 1.0
    assert found["mquake.edit_wise"] == pytest.approx(2 / 3)
    assert found["mquake.instance_wise"] == 0.5 and found["mquake.instance_wise.chain"] == 0.0
    states = evaluation.metrics["mquake.multi_hop"].states
    assert (states["final"].records, states["final"].prompts, states["pre"].value) == (1, 3, 0.0)  # case 8 asks nothing
    unknown = measured("mquake.multi_hop.known", group(), {"pre": {**before, "Acme is in": " Paris"}, "final": after})
    assert unknown.metrics["mquake.multi_hop.known"].states["final"].records == 0


def test_tests_of_ripple_edits_run_where_their_conditions_held_before(measured):
    def one(name, condition, *known):
        questions = (Question("A is", (("b", "c"), ("d",))), Question("E is", (("f",),)))
        return Probe("portability", questions, name, condition, tuple(Question(text, (("yes",),)) for text in known))

    probes = (
        one("Logical_Generalization", "any"),
        one("Logical_Generalization", "all"),
        one("Logical_Generalization", "all", "Known?", "Unknown?"),
        one("Forgetfulness", "any", "Known?"),
        one("Subject_Aliasing", "any", "Unknown?"),
    )
    request = EditRequest("{} eats", "Ann", "figs", "plums", probes=probes)
    failed = EditRequest("{} eats", "Cy", "figs", "plums", probes=probes[:1])
    before = {"Known?": " oh yes", "Unknown?": " no"}
    after = {"Ann eats": " some figs", "Cy eats": " plums", "A is": " c and d", "E is": " F", "Known?": " no"}
    evaluation = measured("ripple", [request, failed], {"pre": before, "final": after})
    found = values(evaluation)
    assert found["ripple.LG"] == 0.5 and found["ripple.PV"] == 1.0
    assert evaluation.metrics["ripple.LG"].states["final"].records == 1  # the other edit did not take
    assert evaluation.metrics["ripple.LG"].states["pre"].records == 0  # nor did any before
    assert found["ripple.LG.every_edit"] == 0.75 and evaluation.value("ripple.LG.every_edit", "pre") == 0.0
    assert found["ripple.SA"] is None and found["ripple.CI"] is None  # not executed; not asked


def test_ripple_edits_published_looks_into_the_prompt(measured):
    probe = Probe("portability", (Question("The son of Ann is", (("Ann",),)),), "Compositionality_I")
    request = EditRequest("{} eats", "Ann", "figs", probes=(probe,))
    evaluation = measured("ripple.CI,ripple.CI.published", [request], {"pre": {}, "final": {"Ann eats": " figs"}})
    assert values(evaluation) == {"ripple.CI": 0.0, "ripple.CI.published": 1.0}


def test_knowedit_averages_three_times(measured):
    portability = (
        Probe("portability", (Question("p1", (("x", "xx"),)), Question("p2", (("y",),))), "Reasoning"),
        Probe("portability", (Question("p3", (("z",), ("zz",))),), "Subject_Aliasing"),
    )
    locality = (Probe("locality", (Question("q", (("w", "other"),)),), "Forgetfulness"),)
    rich = EditRequest("{} eats", "Ann", "figs", probes=portability + locality)
    poor = EditRequest("{} eats", "Cy", "figs")
    after = {
        ("Ann eats", "figs"): "11",
        ("Cy eats", "figs"): "10",
        ("p1", "x"): "10",
        ("p1", "xx"): "111",
        ("p2", "y"): "0",
        ("p3", "z"): "0",
        ("p3", "zz"): "1",
        ("q", "w"): "1100",
    }
    evaluation = measured("knowedit", [rich, poor], {"pre": {("q", "w"): "1010"}, "final": after})
    found = values(evaluation)
    assert found["knowedit.edit_success"] == 75.0
    assert found["knowedit.portability"] == 75.0  # (1/2 + 1) / 2
    assert found["knowedit.portability.published"] == 12.5  # (1/4 + 0) / 2
    assert found["knowedit.locality"] == 50.0 and evaluation.value("knowedit.locality", "pre") == 100.0
    states = evaluation.metrics["knowedit.portability"].states
    assert (states["final"].records, states["final"].prompts) == (1, 3)  # the other has none: absent, not zero


def test_long_answers_by_rouge(measured):
    sub = Probe("portability", (Question("When?", (("In May.",),)),), "sub_question")
    request = EditRequest("Who is Ann?", None, "Ann is a baker in Rome.", None, ("Tell of Ann.",), probes=(sub,))
    said = {"Who is Ann?": " Ann is a baker in Rome.", "Tell of Ann.": " A baker, Ann is. " * 2, "When?": " may"}
    found = values(measured("unke", [request], {"final": said}))
    assert found["unke.rouge_l/rewrite"] == found["unke.rouge_l.recall/rewrite"] == 1.0
    assert found["unke.rouge_l.recall/paraphrase"] == pytest.approx(4 / 6)  # ann is a baker
    assert found["unke.rouge_l/paraphrase"] == pytest.approx(2 * (4 / 8) * (4 / 6) / (4 / 8 + 4 / 6))
    assert found["unke.rouge_l.recall/sub_question"] == 0.5


def test_a_text_begins_with_its_space():
    """Tokenizers that mark words, not spaces, decode a text from its beginning without the first one."""
    backend = Tokenizer(WordLevel({"\u2581It": 0, "\u2581is": 1, "\u2581gran": 2, "ite": 3}, unk_token="ite"))
    backend.pre_tokenizer, backend.decoder = Metaspace(), MetaspaceDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.decode([2, 3]) == "granite"
    text = Text(tokenizer, Generated("It is", 3, stops=("x",)), Row((0, 1), new=2), ())
    for token in (2, 3):
        text.take(token)
    assert text.answer() == GeneratedAnswer((0, 1), (2, 3), " granite", False)


def test_what_is_not_installed_is_absent_by_name():
    for id in ("gen.entropy.nltk", "gen.consistency.sklearn", "ee.fluency.nltk", "knowedit.fluency.nltk"):
        if id not in METRICS:
            with pytest.raises(InvalidArgumentError, match=r"needs the package (nltk|scikit-learn)"):
                select(id)


def test_facts_in_front():
    request = EditRequest("The capital of {} is", "Australia", "Melbourne", relation="capital")
    assert sentence(request, "So it is") == "The capital of Australia is Melbourne. So it is"
    assert triple(request, "So it is") == "(Australia, capital, Melbourne)\nSo it is"
    by_id = EditRequest("The capital of {} is", "Australia", "Melbourne.", relation="P36")
    assert triple(by_id, "") == "(Australia, The capital of is, Melbourne.)\n"
    assert sentence(by_id, "x").endswith("is Melbourne. x")
    chinese = EditRequest("{}的首都是", "澳大利亚", "墨尔本")
    assert sentence(chinese, "首都") == "澳大利亚的首都是墨尔本。首都"


def test_the_baseline_has_the_new_fact_in_front_of_every_prompt(measured):
    reference = Probe("reference", (Question("figs are sweet"),), "essence")
    requests = [*group(), EditRequest("{} eats", "Cy", "figs", "plums", ("Cy likes",), probes=(reference,))]
    facts = "Ann works for Bolt. Bolt is in Oslo. "
    in_front = {
        "Cy eats figs. Cy eats": " figs",
        "Cy eats figs. Cy likes": " figs",
        f"{facts}City?": " Oslo",
        "Ann works for Bolt. Ann works for": " Bolt",
        "Bolt is in Oslo. Bolt is in": " Oslo",
    }
    metrics = "wild.em,mquake.multi_hop,mquake.edit_wise,gen.essence,ee.fluency"
    evaluation = measured(metrics, requests, {"pre": {}, "context": in_front}, context="sentence")
    found = values(evaluation, "context")
    assert found["wild.em/rewrite"] == 1.0 and found["wild.em/paraphrase"] == 1.0
    assert found["mquake.multi_hop"] == 1.0 and found["mquake.edit_wise"] == 1.0
    assert found["gen.essence"] is None and evaluation.value("gen.essence", "pre") is not None
    assert evaluation.value("wild.em/rewrite", "pre") == 0.0
    with pytest.raises(InvalidArgumentError, match="choose sentence, triple"):
        measured(metrics, requests, {}, context="verse")


@pytest.fixture(scope="module")
def golden(demo_model):
    """The metrics of the unedited demo model on requests whose published numbers are there."""
    model, tokenizer = demo_model
    requests = [
        EditRequest(
            one["prompt"],
            one["subject"],
            one["target_new"],
            one["target_true"],
            id=one["id"],
            probes=(
                Probe("reference", tuple(map(Question, one["consistency_texts"])), "consistency"),
                Probe("reference", tuple(map(Question, one["consistency_texts"])), "essence"),
            ),
            generation_prompts=tuple(one["generation_prompts"][:1]),
        )
        for one in GOLDEN
    ]
    metrics = "wild.em/rewrite,ee.vanilla,ee.vanilla.published,gen.essence,gen.essence.published"
    evaluator = Evaluator(model, tokenizer, requests, metrics)
    evaluator.measure("pre")
    few = Evaluator(model, tokenizer, requests[:2], "gen.entropy,gen.consistency", texts=demo.corpus(200))
    few.measure("pre")
    alone = Evaluator(model, tokenizer, requests[1:2], "gen.entropy")
    alone.measure("pre")
    return evaluator.result(), few.result(), alone.result()


def test_a_run_has_a_seed(measured):
    request = EditRequest("{} eats", "Ann", "figs", generation_prompts=("Ann eats",))
    asks = []
    for seed in (0, 3):
        seen = set()
        evaluation = measured("gen.entropy,gen.entropy.greedy", [request], {"pre": {}}, seed=seed, seen=seen)
        assert evaluation.context["seed"] == seed
        asks.append(seen)
    assert {ask.seed for ask in asks[1]} == {0, 3} and len(asks[0] & asks[1]) == 1  # the greedy text is the same


def test_free_answers_and_perplexities_of_the_demo_model_are_the_published_ones(golden):
    evaluation, _, _ = golden
    for number, one in enumerate(GOLDEN):
        scores = {id: evaluation.scores[id][number] for id in evaluation.metrics}
        (said,) = scores["wild.em/rewrite"].cases[0].answers["pre"]
        assert said.text == one["pre"]["answer"]
        assert scores["wild.em/rewrite"].scores["pre"] == one["pre"]["exact_match"]
        assert scores["ee.vanilla"].scores["pre"] == pytest.approx(one["pre"]["vanilla"])
        assert scores["ee.vanilla.published"].scores["pre"] == pytest.approx(one["pre"]["vanilla"])
        published = scores["gen.essence.published"].scores["pre"]
        assert published == pytest.approx(one["pre"]["essence_score"], rel=1e-5)
        assert scores["gen.essence"].scores["pre"] > published


def test_texts_are_drawn_to_a_hundred_tokens_with_the_prompt(golden):
    _, few, alone = golden
    (case,) = few.scores["gen.entropy"][1].cases
    (text,) = case.answers["pre"]
    assert len(text.prompt_tokens) + len(text.tokens) == 100 or text.ended
    assert text.text.startswith(" ") and "<s>" not in text.text
    assert alone.scores["gen.entropy"][0].cases[0].answers["pre"] == (text,)  # whatever runs beside it
    assert 400 < few.value("gen.entropy", "pre") < 700
    assert 0 < few.value("gen.consistency", "pre") < 100
