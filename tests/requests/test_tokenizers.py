"""Tokenizers as users have them: chat markers, normalisation without offsets, mistral-common's, tokens past a model."""

from __future__ import annotations

import json
import unicodedata

import pytest
import torch
from tiny_models import TEXT, make_model, make_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizer

from kedit_fast import Editor, EditRequest, collect_statistics
from kedit_fast.errors import EditError, RequestError, StatisticsError
from kedit_fast.evaluation.metrics import evaluate_each, mean_nll, score, shares
from kedit_fast.models.view import ModelView
from kedit_fast.requests.chat import chat_format
from kedit_fast.requests.encoded import encode_requests
from kedit_fast.requests.prefixes import generate_prefixes
from kedit_fast.requests.prompts import continuation, prepare, prepare_each, separator_before, target_tokens
from kedit_fast.requests.tokens import special_tokens
from kedit_fast.workflow import complete, run_edits

TUNED = {"inner_params": ["model.layers.1.mlp.down_proj"], "context_template_length_params": [[2, 1]]}
GOOD = EditRequest("{} plays the", "Miles Davis", "violin", id="good")


# One rule, in values, gradients and metrics


@pytest.mark.parametrize(
    "prompt, subject, target, between",
    (
        ("{}的首都是", "中国", "北京", ""),
        ("{}", "os", ".path", ""),
        ("f = {}", "max", "(y)", ""),
        ("{} plays the", "Miles Davis", "violin", " "),
        ("{} plays the", "Miles Davis", " violin", ""),
    ),
)
def test_values_gradients_and_metrics_use_the_same_target_tokens(prompt, subject, target, between):
    tokenizer, model = make_tokenizer(bos=True), make_model("llama")
    request = EditRequest(prompt, subject, target)
    (prepared,) = prepare(tokenizer, [request], ("The old tower. ",), 64)
    ids, tokens = continuation(tokenizer, request.text, target)
    assert prepared.separator == between
    assert prepared.target == tokens and prepared.rewriting[0].ids == tuple(ids)
    assert tokenizer.decode(tokens) == between + target
    with torch.no_grad():
        logits = model(torch.tensor([ids + list(tokens)])).logits[0].log_softmax(-1)
    expected = sum(float(logits[len(ids) - 1 + t, token]) for t, token in enumerate(tokens)) / len(tokens)
    (seen,) = evaluate_each(model, tokenizer, [request])
    assert seen.new.log_prob == pytest.approx(expected, abs=1e-4)


def test_every_prompt_of_a_request_is_separated_by_its_own_ending():
    tokenizer, view = make_tokenizer(), ModelView(make_model("llama"))
    prompts = ("Ebro is in", "Ebro是在", 'Ebro is in "', "Ebro is in ")
    request = EditRequest("{} is in", "Ebro", "Sweden", "Spain", prompts, prompts)
    (seen,) = evaluate_each(view.model, tokenizer, [request])
    for target, found in (("Sweden", seen.paraphrases), ("Spain", seen.neighborhood)):
        pairs = [(prompt, target) for prompt in prompts]
        right, wrong = (score(view, tokenizer, pairs, separators=s) for s in ((" ", "", "", ""), ("", " ", " ", "")))
        for own, expected, other in zip(found, right, wrong, strict=True):
            assert own.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
            assert expected is right[-1] or own.log_prob != pytest.approx(other.log_prob, abs=1e-3)


def test_a_request_decides_before_the_run_and_both_before_the_text():
    tokenizer, model = make_tokenizer(), make_model("llama")
    own = EditRequest("{} plays the", "Miles Davis", "violin", target_separator="")
    editor = Editor(model, tokenizer, "ultraedit", prefixes=(), hparams=TUNED, target_separator=" ")
    chinese = EditRequest("{}的首都是", "中国", "北京")
    prepared, _ = editor.check([own, GOOD, chinese])
    assert [p.separator for p in prepared] == ["", " ", " "]
    assert [tokenizer.decode(p.target) for p in prepared] == ["violin", " violin", " 北京"]
    joined, apart, whole = evaluate_each(model, tokenizer, [own, GOOD, chinese], target_separator=" ")
    assert joined.new != apart.new
    assert whole.new == score(ModelView(model), tokenizer, [(chinese.text, " 北京")])[0]
    with pytest.raises(RequestError, match="target_separator must be"):
        Editor(model, tokenizer, "rome", hparams={"mom2_adjustment": False}, target_separator="-")


def test_a_report_says_what_was_put_before_each_target():
    tokenizer, model = make_tokenizer(), make_model("llama")
    requests = [GOOD, EditRequest("{}的首都是", "中国", "北京"), EditRequest("{}", "os", ".path")]
    report = run_edits(
        model, tokenizer, [requests[0], EditRequest("{} is", "Ebro", "x" * 500), *requests[1:]], "ultraedit",
        statistics=None, hparams=TUNED, on_error="skip",
    )  # fmt: skip
    (result,) = report.results
    assert result.separators == (" ", "", "") and len(result.targets) == 3
    shown = json.loads(json.dumps(report.as_dict()))["requests"]
    assert [row["index"] for row in shown] == [0, 2, 3] and shown[0]["id"] == "good"
    assert [row["target_separator"] for row in shown] == [" ", "", ""]
    assert [row["target_text"] for row in shown] == [" violin", "北京", ".path"]
    assert [tuple(row["target_tokens"]) for row in shown] == list(result.targets)


def test_a_target_that_joins_the_prompts_last_token_is_still_a_continuation():
    """`th` + `e`: the whole text has a token that ends in the target, so the target's tokens stand alone."""
    tokenizer = make_tokenizer()
    ids = target_tokens(tokenizer, "th", "e old", between="")
    assert tokenizer.decode(ids) == "e old"


# Markers


MARKERS = ("<｜Assistant｜>", "<|assistant|>", "[/INST]", "]~b]", "### Response:", "<think>")  # noqa: RUF001


@pytest.mark.parametrize("flagged", (True, False))
@pytest.mark.parametrize("marker", MARKERS)
def test_no_space_follows_a_chats_marker_flagged_or_not(marker, flagged):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(marker, special=flagged, normalized=False)])
    assert separator_before(tokenizer, f"Ebro is{marker}", "in") == ""
    assert tokenizer.decode(target_tokens(tokenizer, f"Ebro is{marker}", "in")) == "in"


def test_an_added_word_is_no_marker():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["Ebro", "C++"])
    assert separator_before(tokenizer, "We saw the Ebro", "river") == " " == separator_before(tokenizer, "C++", "is")


def test_markers_that_are_not_flagged_are_in_no_prefix():
    """Of the two tokens the model prefers, one is a marker."""
    tokenizer, model = make_tokenizer(), make_model("llama")
    model.resize_token_embeddings(401)
    tokenizer.add_tokens([AddedToken("<｜User｜>", special=False)])  # noqa: RUF001
    with torch.no_grad():
        model.lm_head.weight[400] = model.lm_head.weight.abs().max() * 50
        model.lm_head.weight[400] *= torch.sign(torch.randn(32))
    prefixes = generate_prefixes(ModelView(model), tokenizer, ((6, 10),), seed=0)
    assert not any("User" in prefix for prefix in prefixes)


# Tokenizers without offsets


class SlowTokenizer(PreTrainedTokenizer):
    """Words and their characters after NFKC and case folding, `▁` before each word, no offsets: as sentencepiece's."""

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, words=("▁plays", "▁the", "▁playing"), **options):
        letters = "abcdefghijklmnopqrstuvwxyz.0123456789▁éü"
        self.vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *letters, *words])}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options)

    @property
    def vocab_size(self):
        return len(self.vocab)

    def get_vocab(self):
        return dict(self.vocab, **self.added_tokens_encoder)

    def _tokenize(self, text, **_):
        text = unicodedata.normalize("NFKC", text.replace("\u200b", "")).casefold()
        pieces = []
        for word in text.split():
            whole = "▁" + word
            pieces += [whole] if whole in self.vocab else list(whole)
        return pieces

    def _convert_token_to_id(self, token):
        return self.vocab.get(token, self.vocab["<unk>"])

    def _convert_id_to_token(self, index):
        return {i: token for token, i in self.vocab.items()}[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).replace("▁", " ").strip()

    def build_inputs_with_special_tokens(self, ids, _=None):
        return [0, *ids, 1]


@pytest.mark.parametrize(
    "template, subject, last",
    (
        ("{} plays the", "Miles Davis", "s"),
        ("The {} plays", "ＭＡＤＲＩＤ", "d"),  # noqa: RUF001
        ("{} plays", "ﬁne ﬂow", "w"),
        ("The {} plays", "Ebro™", "m"),
        ("The {} plays", "Straße", "e"),
        ("The {} plays", "Ebro\u200b", "o"),
        ("The ({}) plays", "x²", "2"),
        ("{}ing the", "Play", "▁playing"),  # a token that goes on past the subject
        ("The {} plays", "cafe\u0301", "é"),
        ("The {}\u0301 plays", "cafe", "é"),  # composed with what follows
        ("The {} plays", "日本", "<unk>"),
        ("The 中 {} plays", "ebro", "o"),
    ),
)
@pytest.mark.parametrize("prefix", ("", "The old tower. "))
def test_the_lookup_token_of_a_tokenizer_that_normalises_is_the_subjects_last(template, subject, last, prefix):
    tokenizer = SlowTokenizer()
    (prepared,) = prepare(tokenizer, [EditRequest(template, subject, "in")], (prefix,) if prefix else (), 64)
    prompt = prepared.rewriting[-1]
    assert tokenizer.convert_ids_to_tokens(prompt.ids[prompt.lookup]) == last
    upto = tokenizer.decode(prompt.ids[: prompt.lookup + 1]).removeprefix("<s>")
    words = (prefix + template.split("{}")[0] + subject).split()
    assert len(upto.split()) == len(words), "all words before the subject, and its own"
    assert 1 not in prompt.ids, "the end-of-text token is not where something follows"
    assert tokenizer.convert_ids_to_tokens(list(prepared.target)) == ["▁", "i", "n"]


def test_subjects_without_tokens_and_unknown_targets_are_named_by_slow_tokenizers():
    requests = [EditRequest("The {} plays", "\u200b", "in"), EditRequest("The {} plays", "ebro", "日本"), GOOD]
    prepared, problems = prepare_each(SlowTokenizer(), dict(enumerate(requests)), (), 64)
    assert [p.name for p in prepared] == ["request 'good'"]
    assert "has no tokens" in problems[0] and "no tokens for a part of the target" in problems[1]


@pytest.mark.parametrize(
    "template, subject, beyond",
    (("{} plays the", "Miles", ""), ("{}ing the", "Play", "ing"), ("The {}\u0301 plays", "cafe", "\u0301")),
)
def test_what_a_token_covers_beyond_the_subject_is_seen_without_offsets(template, subject, beyond):
    (encoded,) = encode_requests(SlowTokenizer(), [EditRequest(template, subject, "in")])
    assert not isinstance(encoded, str)
    assert [lookup.beyond for lookup in encoded.lookups] == [beyond, beyond]
    assert not encoded.merges and len(encoded.target_ids(encoded.full)) == 3


class MistralCommonBackend:
    """What transformers makes of a folder with tekken.json: no offsets, no added tokens, no chat text, strict calls."""

    bos_token, eos_token, bos_token_id, eos_token_id = "<s>", "</s>", 0, 1
    all_special_ids, all_special_tokens, chat_template = [0, 1], ["<s>", "</s>"], None

    def __init__(self):
        self.inner = SlowTokenizer([f"▁word{i}" for i in range(400)])

    def __call__(self, text, add_special_tokens=True, truncation=None, max_length=None, **kwargs):
        if kwargs or not isinstance(text, str | list):
            raise ValueError(f"Kwargs {list(kwargs)} are not supported by `MistralCommonBackend.__call__`.")
        rows = self.inner([text] if isinstance(text, str) else text, add_special_tokens=False)["input_ids"]
        rows = [([0] * add_special_tokens + row)[:max_length] for row in rows]
        return {"input_ids": rows[0] if isinstance(text, str) else rows}

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs):
        if kwargs:
            raise ValueError(f"Kwargs {list(kwargs)} are not supported by `MistralCommonBackend.decode`.")
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)

    def get_vocab(self):
        return self.inner.get_vocab()

    def added_tokens_decoder(self):
        raise NotImplementedError("`MistralCommonBackend` does not implement `added_tokens_decoder`.")

    def get_chat_template(self, *_):
        raise NotImplementedError("`MistralCommonBackend` does not implement `get_chat_template`.")

    def apply_chat_template(self, conversation, tokenize=True, add_generation_prompt=False, **kwargs):
        raise AssertionError("its text would not be read as it is meant")


class MistralCommonTokenizer(MistralCommonBackend):
    """The same before transformers 5: it does not list its special tokens."""

    unk_token = pad_token = "<unk>"
    unk_token_id = pad_token_id = 2

    def __getattribute__(self, name):
        if name in ("all_special_ids", "all_special_tokens", "chat_template", "added_tokens_decoder"):
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_special_tokens_that_are_not_listed_are_those_with_names():
    tokenizer = MistralCommonTokenizer()
    assert special_tokens(tokenizer) == {0: "<s>", 1: "</s>", 2: "<unk>"}
    (prepared,) = prepare(tokenizer, [GOOD], (), 64)
    assert tokenizer.decode(prepared.target).strip() == "violin"
    with pytest.raises(RequestError, match="MistralCommonTokenizer makes token ids of a chat"):
        chat_format(tokenizer)


def test_a_tokenizer_of_mistral_common_edits_measures_and_refuses_a_chat():
    tokenizer, model = MistralCommonBackend(), make_model("llama", layers=2)
    assert special_tokens(tokenizer) == {0: "<s>", 1: "</s>"}
    statistics = collect_statistics(model, tokenizer, TEXT * 3, (1,), progress=False)
    numbers = {
        "layers": [1],
        "mom2_ridge": 1e-2,
        "v_num_grad_steps": 2,
        "clamp_norm_factor": 0.75,
        "context_template_length_params": [[3, 1]],
    }
    report = run_edits(model, tokenizer, [GOOD], "memit", statistics=statistics, hparams=numbers)
    assert report.edits == 1 and report.requests[0]["target_text"].strip() == "violin"
    assert isinstance(complete(model, tokenizer, "the", 2), str) and mean_nll(model, tokenizer, TEXT) > 0
    with pytest.raises(RequestError, match="MistralCommonBackend makes token ids of a chat"):
        chat_format(tokenizer)


# Token ids past the embedding


@pytest.fixture
def larger():
    """A tokenizer with an added token, and a model that was not resized."""
    tokenizer, model = make_tokenizer(), make_model("llama", layers=2)
    tokenizer.add_tokens(["zorkmid"])
    assert tokenizer("zorkmid")["input_ids"] == [400]
    return model, tokenizer


PAST = r"token 400 \('zorkmid'\) is past the model's 400 embeddings.*resize_token_embeddings"
BAD = (
    EditRequest("{} plays the", "zorkmid", "violin", id="bad"),
    EditRequest("{} plays zorkmid", "Miles Davis", "violin", id="bad"),
    EditRequest("{} plays the", "Miles Davis", "zorkmid", id="bad"),
)
MEASURED = (
    EditRequest("{} plays the", "Miles Davis", "violin", paraphrase_prompts=("the zorkmid",), id="bad"),
    EditRequest("{} plays the", "Miles Davis", "violin", "piano", neighborhood_prompts=("the zorkmid",), id="bad"),
    EditRequest("{} plays the", "Miles Davis", "violin", "zorkmid", id="bad"),
)


@pytest.mark.parametrize("method, bad", (*(("ultraedit", bad) for bad in (*BAD, *MEASURED)), ("memit", BAD[0])))
def test_tokens_past_the_embedding_are_refused_by_name_or_skipped(larger, method, bad):
    model, tokenizer = larger
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    few = {
        "layers": [1],
        "mom2_adjustment": False,
        "v_num_grad_steps": 2,
        "clamp_norm_factor": 0.75,
        "context_template_length_params": [[2, 1]],
    }
    common = dict(statistics=None, hparams=TUNED if method == "ultraedit" else few)
    with pytest.raises(RequestError, match=f"request 'bad'.*{PAST}"):
        run_edits(model, tokenizer, [GOOD, bad], method, **common)
    with pytest.raises(RequestError, match=f"request 'bad'.*{PAST}"):
        shares(model, tokenizer, [GOOD, bad])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = run_edits(model, tokenizer, [bad, GOOD], method, on_error="skip", **common)
    assert list(report.skipped) == [0] and "past the model's" in report.skipped[0] and report.edits == 1


def test_texts_prefixes_and_completions_with_tokens_past_the_embedding_are_refused(larger):
    model, tokenizer = larger
    with pytest.raises(StatisticsError, match=f"document 2: {PAST}"):
        collect_statistics(model, tokenizer, [*TEXT[:2], "a zorkmid"], (1,), progress=False)
    with pytest.raises(StatisticsError, match=f"document 2: {PAST}"):
        collect_statistics(model, tokenizer, [*TEXT[:2], "a zorkmid"], (1,), max_tokens=10**6, progress=False)
    with pytest.raises(RequestError, match=f"text 2: .*{PAST}"):
        mean_nll(model, tokenizer, [TEXT[0], "a zorkmid"])
    with pytest.raises(RequestError, match=f"the prompt 'a zorkmid': {PAST}"):
        complete(model, tokenizer, "a zorkmid")
    editor = Editor(model, tokenizer, "memit", layers=[1], hparams={"mom2_adjustment": False},
                    prefixes=("A zorkmid. ",))  # fmt: skip
    with pytest.raises(RequestError, match=f"request 'good'.*{PAST}"):
        editor.edit([GOOD])
    model.resize_token_embeddings(len(tokenizer))  # the cure that the message names
    assert ModelView(model).vocabulary == 401
    assert shares(model, tokenizer, [BAD[0]]).efficacy is not None
    model.resize_token_embeddings(10)
    with pytest.raises(EditError, match=r"context prefixes cannot be generated: token \d+ .* past the model's 10"):
        generate_prefixes(ModelView(model), tokenizer, ((3, 1),), seed=0)
