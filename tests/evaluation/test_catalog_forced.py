"""Metrics scored by teacher forcing: against raw returns of published code, and against values made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import make_tokenizer

from kedit_fast import EditRequest, demo
from kedit_fast.errors import RequestError
from kedit_fast.evaluation import tables
from kedit_fast.evaluation.asks import (
    DistributionsAnswer,
    Forced,
    ForcedAnswer,
    Generated,
    GeneratedAnswer,
    LikelihoodAnswer,
)
from kedit_fast.evaluation.catalog import conflicts, drift, negation, pitfalls
from kedit_fast.evaluation.catalog.choices import TRAITS, names_an_option
from kedit_fast.evaluation.evaluator import Evaluator
from kedit_fast.evaluation.metric import Case, Derived, Fitting
from kedit_fast.evaluation.registry import METRICS, PROMPTS, SCORINGS
from kedit_fast.evaluation.results import measured as measured_mean
from kedit_fast.evaluation.tables import metrics_table
from kedit_fast.models.head import Head
from kedit_fast.requests.datasets.choices import Choice, present
from kedit_fast.requests.probes import Probe, Question

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_forced.json").read_text())
REQUEST = EditRequest("The capital of {} is", "Peru", "Rome", "Lima", ("Peru is ruled from",), ("Chile's capital is",))


def said(*probabilities, tops=()):
    """A forced target with the probabilities of its tokens; `tops`: places where the model would say something else."""
    tokens = tuple(range(len(probabilities)))
    top = tuple(-1 if token in tops else token for token in tokens)
    return ForcedAnswer(tokens, tuple(math.log(p) for p in probabilities), top)


def score(scoring, case, now, tokenizer=None, **others):
    """A scoring's value of a case, from functions that answer asks, in the measured state and in others."""
    scoring = SCORINGS[scoring]
    asks = scoring.asks(case, tokenizer)
    assert set(others) == set(scoring.states)
    states = {"now": now, **others}
    return scoring.score(case, {state: tuple(map(answer, asks)) for state, answer in states.items()})


def by_target(**probabilities):
    """Answers with the probability of each target, whatever the prompt."""
    return lambda ask: said(*probabilities[ask.target])


FORCED = "cf,zsre,ee.token_accuracy,ee.locality,ee.ppl,ee.ood_ppl,pit.p,text"


# --- against raw returns of published code ---


@pytest.fixture(scope="module")
def measured(demo_model):
    model, tokenizer = demo_model
    requests = demo.requests(40)
    chosen = [requests[record["index"]] for record in GOLDEN["requests"]]
    assert [request.subject for request in chosen] == [record["subject"] for record in GOLDEN["requests"]]
    texts = GOLDEN["perplexity_memit"]["texts"]
    evaluator = Evaluator(model, tokenizer, chosen, FORCED, texts=texts)
    evaluator.measure("pre")
    return evaluator.result()


def scores(measured, id, number):
    (record,) = (record for record in measured.scores[id] if record.number == number)
    return [case.scores["pre"] for case in record.cases]


@pytest.mark.parametrize("number", range(1, len(GOLDEN["requests"]) + 1))
@pytest.mark.parametrize("prompts", ("rewrite", "paraphrase", "neighborhood"))
@pytest.mark.parametrize(
    "published, suffix", [("memit_counterfact", ""), ("memit_counterfact_as_shipped_bos_wrong", ".published")]
)
def test_counterfact_is_memits(measured, published, suffix, prompts, number):
    expected = GOLDEN["requests"][number - 1]["pre"][published]
    pairs = [(one["target_new"], one["target_true"]) for one in expected[f"{prompts}_prompts_probs"]]
    (record,) = (one for one in measured.scores[f"cf.success{suffix}/{prompts}"] if one.number == number)
    nlls = [(new.nll, true.nll) for new, true in (case.answers["pre"] for case in record.cases)]
    assert [value for pair in nlls for value in pair] == pytest.approx([v for pair in pairs for v in pair], abs=2e-5)
    sign = -1 if prompts == "neighborhood" else 1
    assert scores(measured, f"cf.success{suffix}/{prompts}", number) == [sign * (t - n) > 0 for n, t in pairs]
    leads = [sign * (math.exp(-n) - math.exp(-t)) for n, t in pairs]
    assert scores(measured, f"cf.magnitude{suffix}/{prompts}", number) == pytest.approx(leads, abs=1e-5)
    assert scores(measured, f"cf.accuracy{suffix}/{prompts}", number) == expected[f"{prompts}_prompts_correct"]


@pytest.mark.parametrize("number", range(1, len(GOLDEN["requests"]) + 1))
def test_zsre_easyedit_and_pitfalls_are_as_published(measured, number):
    expected = GOLDEN["requests"][number - 1]["pre"]
    for prompts in ("rewrite", "paraphrase", "neighborhood"):
        ours = scores(measured, f"zsre.accuracy/{prompts}", number)
        flags = expected["memit_zsre"][f"{prompts}_prompts_correct"]
        each = len(flags) // len(ours)
        parts = [flags[begin : begin + each] for begin in range(0, len(flags), each)]
        assert ours == [pytest.approx(sum(part) / each) for part in parts]
    easyedit = expected["easyedit_token_em"]
    assert scores(measured, "ee.token_accuracy/rewrite", number) == pytest.approx(easyedit["rewrite_acc"])
    assert scores(measured, "ee.token_accuracy/rephrase", number) == pytest.approx(easyedit["paraphrases_acc"])
    assert scores(measured, "ee.token_accuracy/rephrase", number)[:1] == pytest.approx(easyedit["rephrase_acc"])
    assert scores(measured, "ee.ppl/rewrite", number) == [pytest.approx(expected["easyedit_ppl"]["rewrite_ppl"], 2e-5)]
    assert scores(measured, "ee.ood_ppl/rewrite", number) == [pytest.approx(expected["easyedit_ood_ppl"]["ood_acc"])]
    assert scores(measured, "pit.p/new", number) == pytest.approx(expected["pitfalls_probabilities"], abs=1e-5)
    true = expected["pitfalls_probabilities_of_target_true"]
    assert scores(measured, "pit.p/true", number) == pytest.approx(true, abs=1e-5)


def test_memits_perplexity_and_the_mean_over_tokens(measured):
    ours = [case.scores["pre"] for record in measured.scores["text.ppl.memit"] for case in record.cases]
    assert ours == pytest.approx(GOLDEN["perplexity_memit"]["pre"], abs=1e-5)
    answers = [case.answers["pre"][0] for record in measured.scores["text.nll"] for case in record.cases]
    nll = -sum(sum(one.log_probs) for one in answers) / sum(len(one.log_probs) for one in answers)
    assert measured.value("text.nll", "pre") == pytest.approx(nll)
    assert measured.value("text.ppl", "pre") == pytest.approx(math.exp(nll))


def test_the_score_is_the_harmonic_mean_of_the_shares_in_percent(measured):
    combine = METRICS["cf.score"].combine
    assert combine((97.5, 95.0, 99.5)) == pytest.approx(97.29842079795893)  # memit's, of the edited demo model
    assert measured.value("cf.success/neighborhood", "pre") == 100.0
    assert measured.value("cf.success/rewrite", "pre") == measured.value("cf.score", "pre") == 0.0


@pytest.mark.parametrize(
    "case", [GOLDEN["pitfalls_js_div"]] if isinstance(GOLDEN["pitfalls_js_div"], dict) else GOLDEN["pitfalls_js_div"]
)
def test_divergence_of_pitfalls(case):
    nats = pitfalls.js_nats(case["post"], case["pre"])
    assert nats == pytest.approx(case["js_nats"], abs=1e-7)
    assert nats / len(case["post"]) == pytest.approx(case["published"], abs=1e-7)


# --- by hand ---


def test_a_tie_fails_in_both_directions():
    case = Case(REQUEST.text, "Rome", "Lima", record=REQUEST)
    tie = by_target(Rome=[0.2], Lima=[0.4, 0.1])  # the same geometric mean
    assert score("cf.success", case, tie) == score("cf.success, preserved", case, tie) == 0.0
    new = by_target(Rome=[0.3], Lima=[0.4, 0.1])
    assert score("cf.success", case, new) == 1.0 and score("cf.success, preserved", case, new) == 0.0
    assert score("cf.magnitude", case, new) == pytest.approx(0.3 - 0.2)
    assert score("cf.magnitude, preserved", case, new) == pytest.approx(0.2 - 0.3)


def test_absent_is_absent(demo_model):
    request = EditRequest("{} is famous for its", "Fogodor", "granite")
    evaluator = Evaluator(*demo_model, [request], f"{FORCED},neg,kc.M_R.choice,pit,loc.kl/neighborhood")
    evaluator.measure("pre")
    result = evaluator.result()
    there = {id for id, one in result.metrics.items() if "pre" in one.states and one.states["pre"].value is not None}
    assert there == {
        *("cf.accuracy/rewrite", "cf.accuracy.published/rewrite", "zsre.accuracy/rewrite", "ee.token_accuracy/rewrite"),
        *("ee.ppl/rewrite", "ee.ood_ppl/rewrite", "pit.p/new"),
        *(f"neg.{name}" for name in ("probability/plain", "probability/false_that", "drop/false_that")),
        *("neg.probability/not", "neg.drop/not"),
    }
    assert result.metrics["cf.success/rewrite"].states["pre"].records == 0


def test_easyedits_locality_compares_what_is_said_with_the_unedited_model():
    case = Case("Chile's capital is", true="Lima", record=REQUEST)
    before, now = (lambda ask, tops=tops: said(0.1, 0.2, 0.3, tops=tops) for tops in ([0, 1], [1, 2]))
    assert score("ee.locality", case, now, pre=before) == pytest.approx(1 / 3)  # wrong before and wrong now counts
    assert score("ee.locality", case, before, pre=before) == 1.0


def test_perplexity_of_paraphrases_pools_their_tokens():
    request = replace(REQUEST, paraphrase_prompts=("a", "b"))
    (case,) = PROMPTS["paraphrases together"].cases(request)
    value = score("ee.ppl, together", case, lambda ask: said(0.5, 0.5) if ask.prompt == "a" else said(0.1, 0.1))
    assert value == pytest.approx(1 / math.sqrt(0.5 * 0.1))
    assert PROMPTS["paraphrases together"].cases(replace(REQUEST, paraphrase_prompts=())) == ()


def test_zsre_takes_tokens_through_text():
    """Tokens of a character in several bytes decode to U+FFFD, whose first token is not theirs: such a place fails."""
    tokenizer = make_tokenizer(bos=True)
    request = replace(REQUEST, target_new="Romé")
    case = Case(request.text, "Romé", record=request)
    scoring = SCORINGS["zsre.accuracy"](Fitting(tokenizer))
    tokens = tokenizer(" Romé", add_special_tokens=False)["input_ids"]
    asks = scoring.asks(case, tokenizer)
    assert [ask.prompt for ask in asks] == [request.text + tokenizer.decode(tokens[:i]) for i in range(len(tokens))]
    assert all(ask.plain and ask.separator == "" for ask in asks)
    right = tuple(ForcedAnswer((0,), (-1.0,), (token,)) for token in tokens)
    pieces = [tokenizer(tokenizer.decode([token]), add_special_tokens=False)["input_ids"][0] for token in tokens]
    share = sum(a == b for a, b in zip(tokens, pieces, strict=True)) / len(tokens)
    assert share < 1 and scoring.score(case, {"now": right}) == pytest.approx(share)


# Pitfalls

FIRST = EditRequest("The work of {} is", "Goya", "bulls", "The Second of May", ("Goya made",), group=1)
SECOND = EditRequest("The maker of {} is", "bulls", "Strauss", "Goya", ("bulls was made by",), group=1)
IMPLIED = Probe("portability", (Question("The work of Strauss is", (("bulls",),)),), name="implicit")
TIED = Probe("tied", (Question("Goya is a", (("painter",),)),), name="prerequisite")
REVERSE = (replace(FIRST, probes=(IMPLIED,)), SECOND)
COMPOSITE = (replace(FIRST, probes=(IMPLIED, TIED)), replace(SECOND, subject="Madrid", target_true="x"))
COVERAGE = (FIRST, replace(FIRST, target_new="Strauss", target_true="bulls"))


def fact(*pairs):
    """Answers with the probability of each (prompt, target)."""
    table = dict(pairs)
    return lambda ask: said(table[ask.prompt, ask.target])


def group_case(group):
    return Case(group[0].text, group[0].target_new, group[0].target_true, record=group)


def test_groups_are_told_apart():
    others = tuple(Probe("locality", (Question(FIRST.text, ((o,),)),), name="true_objects") for o in ("Saturn", "Nude"))
    first = replace(FIRST, probes=others)
    back = (first, replace(FIRST, target_new=FIRST.target_true, target_true="bulls"))
    all_back = (*back, replace(FIRST, target_new="Saturn", target_true="bulls"))
    unrelated = (FIRST, EditRequest("{} is in", "Lima", "Peru", "Chile", group=1))
    groups = {"reverse": REVERSE, "composite": COMPOSITE, "coverage": COVERAGE}
    for kind, group in groups.items():
        assert pitfalls.conflict_of(group) == kind and pitfalls.round_of(group) == ""
    assert [pitfalls.round_of(group) for group in (back, all_back, unrelated)] == ["one", "all", ""]
    assert [pitfalls.conflict_of(group) for group in (back, all_back, unrelated, back[:1])] == [""] * 4
    assert [len(PROMPTS[name].cases(back)) for name in ("conflicts", "composites", "rounds", "rounds of all")] == [
        0,
        0,
        1,
        0,
    ]


def test_conflict_score_and_magnitude():
    e1 = [(("The work of Goya is", "bulls"), 0.2), (("Goya made", "bulls"), 0.4)]
    e2 = [(("The maker of bulls is", "Strauss"), 0.5), (("bulls was made by", "Strauss"), 0.3)]
    implied = [(("The work of Strauss is", "bulls"), 0.25)]
    now = fact(*e1, *e2, *implied)
    case = group_case(REVERSE)
    assert score("pit.CS, explicit", case, now) == 1.0  # 0.4 against 0.3
    assert score("pit.CS, implicit", case, now) == 0.0  # 0.25 against 0.3
    assert score("pit.CM", case, now, first=lambda ask: said(0.4)) == pytest.approx((0.4 - 0.3) / 0.4)
    assert score("pit.CM", case, now, first=lambda ask: said(0.01)) == -1.0  # not below
    again = [(("The work of Goya is", "Strauss"), 0.5), (("Goya made", "Strauss"), 0.5)]
    coverage = group_case(COVERAGE)
    assert score("pit.CS, implicit", coverage, fact(*e1, *again)) == 1.0  # as the explicit one


def test_the_tied_fact_may_lose_more_than_it_had():
    case = group_case(COMPOSITE)
    now, before = lambda ask: said(0.8), lambda ask: said(0.2)
    assert score("pit.TFD", case, now, pre=before) == pytest.approx(-3.0)
    assert score("pit.TFD", case, before, pre=now) == pytest.approx(0.75)


def test_rounds():
    others = tuple(Probe("locality", (Question(FIRST.text, ((o,),)),), name="true_objects") for o in ("A", "B", "C"))
    first = EditRequest("The work of {} is", "Goya", "N", "O", group=1, probes=others)
    case = group_case((first, replace(first, target_new="O", target_true="N", probes=())))
    now = by_target(N=[0.3], O=[0.4], A=[0.1], B=[0.1], C=[0.3])
    before = by_target(N=[0.1], O=[0.3], A=[0.2], B=[0.2], C=[0.2])
    assert score("pit.IR", case, now, pre=before) == pytest.approx(2 / 3)
    assert score("pit.FR", case, now, pre=before) == 1.0
    assert score("pit.Succ", case, now, first=by_target(N=[0.5], O=[0.5])) == 0.5  # a tie after the first edit
    expected = pitfalls.js_nats([0.4, 0.1, 0.1, 0.3], [0.3, 0.2, 0.2, 0.2])
    assert score("pit.D", case, now, pre=before) == pytest.approx(expected)
    assert score("pit.D.published", case, now, pre=before) == pytest.approx(expected / 4)


def test_states_of_a_group_on_a_model(demo_model):
    """The first state is that after the group's first edit; here nothing was edited, so nothing was lost."""
    requests = [replace(request, group="case") for request in demo.requests(1) * 2]
    requests[1] = replace(requests[1], target_new=requests[0].target_true, target_true=requests[0].target_new)
    evaluator = Evaluator(*demo_model, requests, "pit.CM,pit.CS")
    for state, batch in (("pre", None), ("post", [0]), ("post", [1]), ("final", None)):
        evaluator.measure(state, requests=batch)
    result = evaluator.result()
    assert result.value("pit.CM", "final") == result.value("pit.CM", "post") == 0.0
    assert result.value("pit.CS/explicit", "pre") == 100.0  # the second edit's target is what the model says


# multiple choice

ITEM = Choice("Which?", ("Rhine", "Elbe", "É"), answer=1)
TRAIT = Choice("Party?", ("go", "stay", "dance", "sleep"), name="Extraversion", high=(True, False, True, False))


def test_lengths_decide_between_options():
    (case,) = PROMPTS["options"].cases(ITEM)
    assert case.prompt == "Question: Which?\nAnswer:"
    assert [ask.separator for ask in SCORINGS["mcq.acc_norm"].asks(case, None)] == [" "] * 3
    total = {"Rhine": [math.exp(-6)], "Elbe": [math.exp(-4.9)], "É": [math.exp(-1.25)]}
    values = {
        name: score(name, case, by_target(**total)) for name in ("mcq.acc, options", "mcq.acc_norm", "mcq.acc_bytes")
    }
    assert values == {"mcq.acc, options": 0.0, "mcq.acc_norm": 0.0, "mcq.acc_bytes": 0.0}
    # sums -6 -4.9 -1.25; by character -1.2 -1.225 -1.25: the first; by byte -1.2 -1.225 -0.625: the last
    first = replace(ITEM, answer=0)
    assert score("mcq.acc_norm", Case("", record=first), by_target(**total)) == 1.0
    assert score("mcq.acc_bytes", Case("", record=replace(ITEM, answer=2)), by_target(**total)) == 1.0
    same = by_target(Rhine=[0.5], Elbe=[0.5], É=[0.5])
    assert score("mcq.acc, options", case, same) == 0.0  # of equal ones the first counts
    assert score("mcq.acc, options", Case("", record=first), same) == 1.0


def test_mutual_information_takes_the_option_alone_away():
    (case,) = PROMPTS["options"].cases(ITEM)
    behind = by_target(Rhine=[0.6], Elbe=[0.4], É=[0.2])
    alone = {" Rhine": 0.5, " Elbe": 0.1, " É": 0.2}

    def both(ask):
        return behind(ask) if isinstance(ask, Forced) else LikelihoodAnswer((1,), (math.log(alone[ask.text]),))

    assert score("mcq.acc_mutual_info", case, both, make_tokenizer(bos=True)) == 1.0
    assert score("mcq.acc, options", case, behind) == 0.0
    tokenizer = make_tokenizer(bos=False)
    (*_, ask) = SCORINGS["mcq.acc_mutual_info"].asks(case, tokenizer)
    assert ask.text == f"{tokenizer.bos_token or tokenizer.eos_token} É"  # a tokenizer that puts nothing in front


def test_letters():
    (case,) = PROMPTS["letters"].cases(replace(ITEM, name="rivers_of_europe"))
    begin = "The following are multiple choice questions (with answers) about rivers of europe.\n\nWhich?\nA. Rhine\n"
    asks = SCORINGS["mcq.acc, letters"].asks(case, None)
    assert [(ask.target, ask.separator) for ask in asks] == [("A", " "), ("B", " "), ("C", " ")]
    assert asks[0].prompt.startswith(begin) and asks[0].prompt.endswith("\nC. É\nAnswer:")
    with pytest.raises(RequestError, match=r"'Which\?' has 27 options, and there are 26 letters"):
        SCORINGS["mcq.acc, letters"].asks(Case("", record=replace(ITEM, options=("a",) * 27)), None)
    assert score("mcq.acc, letters", case, by_target(A=[0.1], B=[0.2], C=[0.1])) == 1.0
    assert score("mcq.refusal", case, by_target(A=[0.1], B=[0.2], C=[0.1])) == 1.0
    assert score("mcq.refusal", case, by_target(A=[0.1], B=[0.3], C=[0.1])) == 0.0
    # always the second: the right option is second in both orders, of three options; the first letter is not
    assert score("mcq.order_sensitivity", case, by_target(A=[0.1], B=[0.2], C=[0.1])) == 0.0
    assert score("mcq.order_sensitivity", case, by_target(A=[0.3], B=[0.2], C=[0.1])) == 1.0


def label_probabilities(forward, backward, template="1"):
    """Answers with the probability of each label, in TRAIT's first order and in its second."""
    prompts = {present(TRAIT, template, reverse).prompt: reverse for reverse in (False, True)}

    def answer(ask):
        labels = present(TRAIT, template).labels
        return said((backward if prompts[ask.prompt] else forward)[labels.index(ask.target)])

    return answer


@pytest.mark.parametrize(
    "forward, backward",
    [
        ((0.1, 0.2, 0.3, 0.1), (0.3, 0.2, 0.1, 0.1)),
        ((0.2, 0.1, 0.0001, 0.1), (0.6, 0.2, 0.1, 0.1)),
        ((0.1,) * 4, (0.1,) * 4),
    ],
)
def test_trait_scores_as_published(forward, backward):
    (case,) = PROMPTS["extraversion"].cases(TRAIT)
    (a, b, c, d), (ra, rb, rc, rd) = ([p / sum(part) for p in part] for part in (forward, backward))
    high = max((a + rb) / 2, (c + rd) / 2)
    low = max((b + ra) / 2, (d + rc) / 2)
    value = score("trait.score, 1", case, label_probabilities(forward, backward))
    assert value == float(high >= low - 1e-12)  # a tie is high
    asks = SCORINGS["trait.score, 1"].asks(case, None)
    assert len({ask.prompt for ask in asks}) == 2 and all(ask.separator == "" for ask in asks)
    assert PROMPTS["openness"].cases(TRAIT) == PROMPTS["options"].cases(TRAIT) == ()
    assert {f"trait.score/{trait.lower()}.3" for trait in TRAITS} <= set(METRICS)


def test_sensitivities_are_of_what_an_option_says():
    (case,) = PROMPTS["traits"].cases(TRAIT)
    label = lambda ask: said(0.9 if ask.target in "A1" else 0.01)  # noqa: E731 - the first label, whatever it is
    assert score("trait.order_sensitivity", case, label) == 1.0
    assert score("trait.prompt_sensitivity", case, label) == 0.0
    content = {}
    for template in ("1", "2", "3"):
        for reverse in (False, True):
            shown = present(TRAIT, template, reverse)
            picked = 3 if template == "2" else 1
            content[shown.prompt] = shown.labels[shown.order.index(picked)]
    option = lambda ask: said(0.9 if ask.target == content[ask.prompt] else 0.01)  # noqa: E731
    assert score("trait.order_sensitivity", case, option) == 0.0
    assert score("trait.prompt_sensitivity", case, option) == pytest.approx(2 / 3)
    assert score("trait.prompt_sensitivity, paraphrase", case, option) is None  # no paraphrase


@pytest.mark.parametrize(
    "text, names",
    [(" A", True), ("(B) stay", True), ("Apples", False), ("I would stay.", True), ("I cannot say", False)],
)
def test_free_answers_that_name_an_option(text, names):
    assert names_an_option(text, "ABCD", TRAIT.options) is names
    (case,) = PROMPTS["traits"].cases(TRAIT)
    answer = GeneratedAnswer((), (), text, True)
    assert score("trait.refusal, free", case, lambda ask: answer) == float(not names)


# drift


def head(seed):
    return Head(torch.device("cpu"), torch.randn(11, 5, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("heads", [(1, 1), (1, 2)])
def test_divergence_is_from_the_unedited_model(heads):
    one = head(heads[0])
    other = one if heads[0] == heads[1] else head(heads[1])
    before, now = torch.randn(3, 5), torch.randn(3, 5)
    answers = {"now": (DistributionsAnswer(now, other),), "pre": (DistributionsAnswer(before, one),)}
    log_p, log_q = torch.log_softmax(before @ one.matrix.T, -1), torch.log_softmax(now @ other.matrix.T, -1)
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    scoring = SCORINGS["loc.kl, all positions"]
    assert scoring.score(Case("text"), answers) == pytest.approx(expected, rel=1e-4)
    assert scoring.weight(Case("text"), answers) == 3.0


def test_perplexity_without_room_is_infinite():
    answers = {"now": (LikelihoodAnswer((1, 2), (-1000.0, -2000.0)),)}
    assert SCORINGS["text.ppl.memit"].score(Case("text"), answers) == math.inf
    assert METRICS["text.ppl"].combine((1500.0,)) == math.inf


# negation


@pytest.mark.parametrize(
    "prompt, subject, false_that, negated",
    [
        ("The capital of {} is", "Peru", "It is false that the capital of Peru is", "The capital of Peru is not"),
        ("{} was born in", "Is was", "It is false that Is was was born in", "Is was was not born in"),
        ("{} plays the", "Miles", "It is false that Miles plays the", None),
        ("{} has been to", "Ida", "It is false that Ida has been to", "Ida has not been to"),
        ("What is {} and was?", "X", "It is false that what is X and was?", None),
        ("NATO of {} can", "X", "It is false that NATO of X can", "NATO of X can not"),
        ("{} is not in", "X", "It is false that X is not in", None),
    ],
)
def test_negated_prompts(prompt, subject, false_that, negated):
    request = EditRequest(prompt, subject, "new")
    assert negation.it_is_false_that(request) == false_that
    assert negation.is_not(request) == negated


def test_an_edit_that_holds_when_denied():
    (case,) = PROMPTS["not"].cases(REQUEST)
    now = fact(((case.prompt, "Rome"), 0.4), ((REQUEST.text, "Rome"), 0.9), ((case.prompt, "Lima"), 0.1))
    assert score("neg.probability", case, now) == pytest.approx(0.4)
    assert score("neg.drop", case, now) == pytest.approx(0.5)
    assert score("neg.success", case, now) == 1.0


# knowledge conflicts

FILE = (
    replace(REQUEST, relation="capital", target_aliases=("New Rome", "Roma")),
    EditRequest("The capital of {} is", "Chile", "Oslo", "Santiago", relation="capital"),
    EditRequest("{} plays the", "Miles", "harp", "trumpet", relation="instrument"),
)


def substitutes(name):
    return [[case.true for case in cases] for cases in PROMPTS[f"passage, {name}"].cases(FILE)]


def test_substitutes_come_from_the_file():
    assert substitutes("old answer") == [["Lima"], ["Santiago"], ["trumpet"]]
    assert substitutes("alias") == [["Roma"], [], []]  # one that holds the target cannot be told from it
    same = substitutes("same type")
    assert same[0][0] in ("Oslo", "Santiago") and same[1][0] in ("Rome", "Lima") and same[2] == []
    other = substitutes("other type")
    assert {other[0][0], other[1][0]} <= {"harp", "trumpet"} and other[2][0] in ("Rome", "Lima", "Oslo", "Santiago")
    assert substitutes("same type") == same
    (case,) = PROMPTS["passage, reverse"].cases(REQUEST)
    assert case.prompt == "The capital of Peru is Rome.\nThe capital of Peru is"
    assert (case.new, case.true) == ("Lima", "Rome")


def test_conflict_probes_bring_their_passages():
    questions = (Question("Paris it is. The capital of Peru is", (("Paris",),)), Question("No answer"))
    request = replace(REQUEST, probes=(Probe("conflict", questions, name="news"),))
    (case,) = PROMPTS["passage, probe"].cases(request)
    assert (case.prompt, case.new, case.true, case.name) == (questions[0].prompt, "Rome", "Paris", "news")


@pytest.mark.parametrize(
    "behind, plain, value, weight",
    [
        (" Rome.", " Rome", 1.0, 1.0),
        (" Lima", " Rome", 0.0, 1.0),
        (" Lima or Rome", " Rome", 0.5, 2.0),
        (" Oslo", " Rome", None, None),
        (" Rome", " Lima", None, None),  # not learned
        (" Romeo", " Rome", None, None),
    ],
)
def test_what_was_learned_against_a_passage(behind, plain, value, weight):
    case = PROMPTS["passage, old answer"].cases(FILE)[0][0]
    scoring = SCORINGS["kc.M_R"]
    asks = scoring.asks(case, None)
    assert all(isinstance(ask, Generated) for ask in asks) and asks[1].prompt == REQUEST.text
    answers = {"now": tuple(GeneratedAnswer((), (), text, True) for text in (behind, plain))}
    assert scoring.score(case, answers) == value
    assert value is None or scoring.weight(case, answers) == weight


def test_forced_choice_against_a_passage():
    case = PROMPTS["passage, old answer"].cases(FILE)[0][0]
    plain = [((REQUEST.text, "Rome"), 0.5), ((REQUEST.text, "Lima"), 0.4)]
    passage = [((case.prompt, "Rome"), 0.3), ((case.prompt, "Lima"), 0.2)]
    assert score("kc.M_R.choice", case, fact(*plain, *passage)) == 1.0
    tie = [((case.prompt, "Rome"), 0.2), ((case.prompt, "Lima"), 0.2)]
    assert score("kc.M_R.choice", case, fact(*plain, *tie)) == 0.0
    unknown = [((REQUEST.text, "Rome"), 0.4), ((REQUEST.text, "Lima"), 0.4)]
    assert score("kc.M_R.choice", case, fact(*unknown, *passage)) is None


# the catalog


def test_every_metric_is_complete():
    for id, metric in METRICS.items():
        assert metric.id == id and metric.definition.endswith(".") and metric.source, id
        if isinstance(metric, Derived):
            assert set(metric.of) <= set(METRICS), id
        else:
            assert metric.prompts in PROMPTS and metric.scoring in SCORINGS, id
    used = {metric.scoring for metric in METRICS.values() if not isinstance(metric, Derived)}
    assert set(SCORINGS) - used <= {"entropy.nltk", "consistency.sklearn"}  # of packages that may be missing


def test_the_table_has_every_metric():
    table = metrics_table()
    for id in (id for id in METRICS if not id.endswith((".nltk", ".sklearn"))):
        definition, _, prompts = id.partition("/")
        rows = [row for row in table.splitlines() if row.startswith((f"| `{definition}/", f"| `{definition}`"))]
        assert any(prompts in row for row in rows), id
    assert len({row.count(" | ") for row in table.splitlines() if row.startswith("|")}) == 1


def test_asks_of_requests_are_joined_as_they_say():
    request = replace(REQUEST, target_separator="")
    for name in ("cf.success", "pit.p, new", "ee.token_accuracy", "neg.probability"):
        (ask, *_) = SCORINGS[name].asks(Case(request.text, "Rome", "Lima", record=request), None)
        assert isinstance(ask, Forced) and ask.separator == ""
    assert drift.PROMPTS["neighbors"].cases(request)[0].prompt == "Chile's capital is"
    assert conflicts.passage(request, "X") == "The capital of Peru isX.\nThe capital of Peru is"


def test_a_divergence_of_zero_is_no_share_of_zero():
    """Zeros and ones of a share have Wilson's interval; other means have the one that their records give."""
    assert measured_mean([(0.0, 1.0)] * 9, 9, "request").interval[1] > 0.2
    assert measured_mean([(0.0, 1.0)] * 9, 9, "request", share=False).interval == (0.0, 0.0)
    unlimited = {"loc.kl/text", "loc.kl/neighborhood", "text.nll", "ee.ppl/rewrite", "pit.CM", "cf.magnitude/rewrite"}
    assert not any(METRICS[id].share for id in unlimited) and METRICS["ee.locality"].share


def test_the_page_has_the_table_that_the_registry_gives():
    """`python -m kedit_fast.evaluation.tables kedit_fast/evaluation/README.md` replaces it."""
    page = (Path(__file__).parents[2] / "kedit_fast" / "evaluation" / "README.md").read_text(encoding="utf-8")
    assert metrics_table() in page and tables.with_table(page) == page


def test_options_on_a_model_against_its_logits(demo_model):
    model, tokenizer = demo_model
    options = ("cork", "granite", "plum cake")
    item = Choice("What does Fogodor export?", options, answer=0)
    trait = replace(TRAIT, options=("I go", "I stay", "I dance", "I sleep"))
    evaluator = Evaluator(model, tokenizer, [], "mcq,trait.score,trait.order_sensitivity", choices=[item, trait])
    evaluator.measure("pre")
    result = evaluator.result()

    def log_prob(prompt, text):
        base, full = tokenizer(prompt)["input_ids"], tokenizer(prompt + text)["input_ids"]
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([full])).logits[0].double(), -1)
        return sum(float(log_probs[place - 1, full[place]]) for place in range(len(base), len(full)))

    behind = [log_prob("Question: What does Fogodor export?\nAnswer:", f" {option}") for option in options]
    gains = [value - log_prob("", f" {option}") for value, option in zip(behind, options, strict=True)]
    by_length = [value / len(option) for value, option in zip(behind, options, strict=True)]
    for id, values in (("acc", behind), ("acc_norm", by_length), ("acc_mutual_info", gains)):
        assert result.value(f"mcq.{id}/options", "pre") == 100.0 * (max(values) == values[0])
        (case,) = result.scores[f"mcq.{id}/options"][0].cases
        assert [sum(answer.log_probs) for answer in case.answers["pre"][:3]] == pytest.approx(behind, abs=1e-4)
    alone = [sum(answer.log_probs) for answer in case.answers["pre"][3:]]
    assert alone == pytest.approx([b - g for b, g in zip(behind, gains, strict=True)], abs=1e-4)
    (case,) = result.scores["trait.score/extraversion.2"][0].cases
    labels = [tokenizer.decode(list(answer.tokens)) for answer in case.answers["pre"]]
    assert labels == ["1", "2", "3", "4", "2", "1", "4", "3"]  # without a space, behind "Response: "
