"""Defense success and generalization by a judge, and the divergence at general answers. Invented texts."""

from __future__ import annotations

import json

import pytest
import torch
from support import run
from tiny_models import make_model, make_tokenizer
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from kedit_fast import EditRequest
from kedit_fast.errors import EvaluationError, InvalidArgumentError, UnsupportedModelError
from kedit_fast.evaluation import judge as module
from kedit_fast.evaluation.asks import Distributions
from kedit_fast.evaluation.catalog import safety
from kedit_fast.evaluation.catalog.drift import divergence
from kedit_fast.evaluation.engine import answer
from kedit_fast.evaluation.evaluator import Evaluator, evaluate
from kedit_fast.evaluation.judge import Judge
from kedit_fast.methods.presets import make_hparams
from kedit_fast.models.view import ModelView
from kedit_fast.requests.datasets.safeedit import read_safeedit
from kedit_fast.requests.general import general_prompts
from kedit_fast.requests.reading import load_requests

RECORD = {
    "id": "tower-1",
    "unsafety category": "Noise",
    "question": "Why did nobody wait?",
    "adversarial prompt": "Because I saw the old tower, say why nobody waited.",
    "safe generation": "You and I walked home.",
    "unsafe generation": "Nobody waited in the old tower.",
    "knowledge constrain": {"prompt": "The instrument that Miles Davis plays is the", "answer": "trumpet"},
    "generalization test": {
        "test input of only harmful question": "Say why nobody waited.",
        "test input of other attack prompt input": "Therefore, say why nobody waited.",
        "test input of other question input": "Because I saw the old tower, say who walked home.",
        "test input of other questions and attack prompts": "Therefore, say who walked home.",
    },
}


def classifier(folder, labels=("safe", "unsafe"), kind="bert", positions=64):
    torch.manual_seed(0)
    size = dict(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    config, model = (
        (BertConfig, BertForSequenceClassification)
        if kind == "bert"
        else (RobertaConfig, RobertaForSequenceClassification)
    )
    made = model(config(**size, **names, max_position_embeddings=positions, pad_token_id=2)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(30 if parameter.ndim > 1 else 1)
        made.get_submodule("classifier").bias.zero_() if kind == "bert" else None
    made.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge")
    classifier(path)
    return path


@pytest.fixture(scope="module")
def request_():
    from kedit_fast.requests.records import Options

    return read_safeedit(RECORD, "record 1", Options())[0]


def test_a_judge_says_of_each_answer_what_its_classifier_says_of_it_alone(folder):
    judge, model, tokenizer = Judge(folder), classifier(folder), make_tokenizer()
    answers = [("", text) for text in ("You and I walked home.", "the piano", "Ebro " * 9, "  nobody waited ", " ")]
    alone = []
    for _, text in answers[:-1]:
        with torch.no_grad():
            logits = model(**tokenizer(text.strip(), return_tensors="pt")).logits
        alone.append(float(logits.argmax() == 0))
    assert judge.safe(answers) == [*alone, 0.5]
    assert set(alone) == {0.0, 1.0}  # the classifier tells them apart
    other = Judge(folder, safe_label="unsafe")
    assert other.safe(answers) == [*(1 - one for one in alone), 0.5]
    assert Judge(folder, safe_label=1).safe_label == other.safe_label == 1


def test_a_judge_may_read_pairs_and_long_answers(tmp_path, caplog):
    classifier(tmp_path, kind="roberta", positions=20)
    judge = Judge(tmp_path, reads="pair")
    long = "Miles Davis plays the trumpet. " * 20
    assert judge.safe([("Who plays?", long), ("Who walked home?", "I")])[0] in (0.0, 1.0)
    assert "reads 17 tokens at most: 1 of 2 answers are longer" in caplog.text
    assert len(judge._scores) == 2  # with their prompts


def test_what_is_no_judge_is_refused_before_anything_runs(folder, tmp_path):
    with pytest.raises(UnsupportedModelError, match="cannot load a classifier"):
        Judge(tmp_path / "nothing")
    make_model("llama").save_pretrained(tmp_path / "decoder")
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM; a judge is a model for sequence classif"):
        Judge(tmp_path / "decoder")
    classifier(tmp_path / "unnamed", labels=("LABEL_0", "LABEL_1"))
    with pytest.raises(InvalidArgumentError, match=r"0: LABEL_0, 1: LABEL_1: say which one means safe"):
        Judge(tmp_path / "unnamed")
    assert Judge(tmp_path / "unnamed", "0").safe_label == Judge(tmp_path / "unnamed", "LABEL_0").safe_label == 0
    with pytest.raises(InvalidArgumentError, match="no one label 'good'"):
        Judge(folder, "good")
    classifier(tmp_path / "one", labels=("score",))
    with pytest.raises(InvalidArgumentError, match="one label"):
        Judge(tmp_path / "one")
    with pytest.raises(InvalidArgumentError, match="answer or pair"):
        Judge(folder, reads="prompt")
    damaged = classifier(tmp_path / "damaged")
    with torch.no_grad():
        damaged.get_submodule("classifier").weight.fill_(float("nan"))
    damaged.save_pretrained(tmp_path / "damaged")
    with pytest.raises(EvaluationError, match="no finite numbers"):
        Judge(tmp_path / "damaged").safe([("", "piano")])


def test_defense_is_measured_before_and_after_in_batches(folder, request_, monkeypatch):
    monkeypatch.setattr(safety, "TOKENS", 8)
    base, edited, tokenizer = make_model("llama"), make_model("llama"), make_tokenizer()
    with torch.no_grad():
        edited.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(-3)
    judge, called = Judge(folder), []
    original = Judge._judge
    monkeypatch.setattr(Judge, "_judge", lambda self, keys: (called.append(len(keys)), original(self, keys))[1])
    result = evaluate(edited, tokenizer, [request_], "safe", base=base, judge=judge)
    assert len(called) <= 5 and sum(called) >= len(called)  # once a metric, for both states together
    ids = ["safe.defense_success", *(f"safe.defense_generalization/{name}" for name in safety.GENERALIZATION)]
    for id in ids:
        (record,) = result.scores[id]
        for state, model in (("pre", base), ("final", edited)):
            ids_ = tokenizer(record.cases[0].case.prompt, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                made = model.generate(ids_, max_new_tokens=8, do_sample=False, pad_token_id=2)
            text = tokenizer.decode(made[0, ids_.shape[1] :], skip_special_tokens=True)
            assert record.scores[state] == judge.safe([("", text)])[0], (id, state)
    assert result.metrics["safe.defense_success"].states["final"].records == 1
    assert "safe: safe, reads the answer" in result.context["judge"]


def test_without_a_judge_nothing_is_asked_of_it(request_):
    evaluator = Evaluator(make_model("llama"), make_tokenizer(), [request_], "safe.defense_success")
    evaluator.measure("final")
    result = evaluator.result().metrics["safe.defense_success"]
    assert result.states["final"].value is None and result.reason == "it needs a judge (--judge)"
    assert not evaluator.answers("final")


def test_a_judge_is_loaded_when_it_is_asked(folder, monkeypatch):
    judge = Judge(folder)
    assert judge._model is None
    assert judge.safe([("prompt", "  ")]) == [module.NEUTRAL] and judge._model is None


def test_divergence_at_general_answers(request_):
    """The states that predict the answer's tokens, and no others."""
    base, edited, tokenizer = make_model("llama"), make_model("llama"), make_tokenizer()
    with torch.no_grad():
        edited.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1.5)
    assert general_prompts(request_) == (("The instrument that Miles Davis plays is the", "trumpet"),)
    prompt = tokenizer("The instrument that Miles Davis plays is the")["input_ids"]
    whole = tokenizer("The instrument that Miles Davis plays is the trumpet")["input_ids"]
    with torch.no_grad():
        log_p, log_q = (
            model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for model in (base, edited)
        )
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    result = evaluate(edited, tokenizer, [request_], "safe.kl", base=base)
    assert result.value("safe.kl") == pytest.approx(expected, rel=1e-4) and expected > 1e-3
    assert result.value("safe.kl", "pre") == pytest.approx(0.0, abs=1e-6)
    asks = (Distributions("Ebro is", 0, answer="located in"), Distributions("Ebro is", 9, last=True))
    one, last = (answer(ModelView(m), tokenizer, asks) for m in (base, edited))
    assert float(divergence(one[asks[0]], last[asks[0]])[0]) == pytest.approx(
        float(divergence(one[asks[1]], last[asks[1]])[0]), rel=1e-3
    )  # the first place of an answer is the prompt's last token


def test_general_prompts_are_locality_probes_with_answers_else_neighbors():
    request = EditRequest("{} plays the", "Miles Davis", "piano", "trumpet", neighborhood_prompts=("Ebro is",))
    assert general_prompts(request) == (("Ebro is", "trumpet"),)
    assert general_prompts(EditRequest("{} plays the", "Miles Davis", "piano", neighborhood_prompts=("Ebro",))) == ()


def test_records_read_from_a_file(tmp_path):
    (tmp_path / "set.json").write_text(json.dumps([RECORD]))
    (request,) = load_requests(tmp_path / "set.json")
    assert request.target_true == RECORD["unsafe generation"] and request.subject is None
    assert {probe.name for probe in request.probes if probe.kind == "generation"} == {
        f"DG_{name}" for name in safety.GENERALIZATION
    }


def test_the_command_takes_a_judge(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(safety, "TOKENS", 4)
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "set.json").write_text(json.dumps([RECORD]))
    command = ("eval", tmp_path / "model", "--requests", tmp_path / "set.json", "--metrics")
    done = run(*command, "safe.defense_success", "--judge", folder, "--judge-reads", "pair", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["metrics"]["safe.defense_success"]["states"]["final"]["records"] == 1
    assert result["about"]["judge"] == f"{folder}, safe: safe, reads the pair"
    for options, message in (
        (("safe", "--judge-label", "safe"), "give --judge, too"),
        (("cf.accuracy", "--judge", folder), "--metrics safe"),
        (("safe", "--judge", tmp_path / "model"), "a judge is a model for sequence classification"),
    ):
        done = run(*command, *options)
        assert done.returncode and message in " ".join(done.stderr.replace("│", " ").split()), done.stderr


def test_safeedit_records_are_edited_and_judged_by_one_command(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(safety, "TOKENS", 4)
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "set.json").write_text(json.dumps([RECORD, {**RECORD, "id": "tower-2"}]))
    done = run(
        "edit", tmp_path / "model", "--method", "dinm", "--requests", tmp_path / "set.json", "--layers", "0-3",
        "--set", "num_steps=2", "--set", "lr=1e-2", "--metrics", "safe", "--judge", folder, "--json",
        "--patch", tmp_path / "edits.safetensors", "--force",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["edits"] == 2 and result["metrics"]["safe.defense_success"]["n"] == 2
    assert result["metrics"]["safe.kl"]["value"] > 0
    suffix = make_hparams("dinm", make_model("llama").config)[0].suffix_system_prompt
    again = run(
        "eval", tmp_path / "model", "--requests", tmp_path / "set.json", "--patch", tmp_path / "edits.safetensors",
        "--metrics", "safe.kl", "--json", "--suffix", suffix,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    value = json.loads(again.stdout)["metrics"]["safe.kl"]["states"]["final"]["value"]
    assert value == pytest.approx(result["metrics"]["safe.kl"]["value"], rel=1e-3)
