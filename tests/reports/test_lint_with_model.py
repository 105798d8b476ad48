"""Rules that need a tokenizer or a model, on small tokenizers of both families and on the demo model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kedit_fast import EditRequest, demo, lint_requests
from kedit_fast.errors import StatisticsError
from kedit_fast.reports.lint import MODEL_RULES, TOKEN_RULES
from kedit_fast.requests.chat import chat_format
from kedit_fast.requests.lint import TEXT_RULES


def of_rule(report, name):
    return [finding for finding in report.findings if finding.rule == name]


def lint(request, tokenizer, **options):
    return lint_requests([request], None, tokenizer, **options)


def brief(report):
    return [(finding.rule, finding.severity) for finding in report.findings]


def sentencepiece_like():
    """A unigram model with `▁` before words, whose vocabulary has a token across a subject and a particle."""
    pieces = ["中国的", "中", "国", "的", "首都是", "北京", "▁Rome", "Rome", "▁is", "▁in", "▁Italy", "▁Paris", "▁"]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -2.0) for piece in pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def words_alone():
    """Words between white space, as BERT's tokenizers have them: spaces are no part of tokens."""
    vocabulary = {word: i for i, word in enumerate(("[UNK]", "Ebro", "is", "in", "Spain", "Sweden"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


EBRO = EditRequest("The {} is in", "Ebro", "Sweden", "Spain")


@pytest.mark.parametrize("make", (make_tokenizer, lambda: make_tokenizer(bos=True)))
def test_a_plain_request_has_no_findings(make):
    assert not brief(lint(replace(EBRO, target_true="France"), make()))


def test_a_token_across_the_subjects_end_is_an_error():
    split = EditRequest("{}的首都是", "中国", "北京")
    (finding,) = lint(split, sentencepiece_like()).findings
    assert (finding.rule, finding.severity, finding.unusable) == ("span-split", "error", (0,))
    assert "'中国' also covers '的'" in finding.message and "'中国的'" in finding.message
    assert not lint(EditRequest("{}的首都是", "中国的", "北京"), sentencepiece_like()).findings
    assert not of_rule(lint(split, make_tokenizer()), "span-split")  # bytes: no token across
    assert not of_rule(lint(split, sentencepiece_like(), method="ultraedit"), "span-split")  # has no lookup token


def test_a_subject_that_begins_the_prompt_has_another_token_after_a_context():
    """The published prefixes end in a space: byte-level tokenizers write ` the` then, and here that one alone."""
    (finding,) = lint(EditRequest("{} is in", "the", "Sweden"), make_tokenizer()).findings
    assert (finding.rule, finding.severity) == ("span-split", "note") and "' the'" in finding.message
    assert not lint(EditRequest("{} is in", "Rome", "Italy"), sentencepiece_like()).findings


def test_spaces_between_prompt_and_target_are_shown_as_tokens():
    tokenizer = make_tokenizer()
    (at_end,) = of_rule(lint(replace(EBRO, prompt="The {} is in "), tokenizer), "leading-space")
    assert at_end.severity == "warning"
    assert "' in' ' ']" in at_end.message and "' in' ' Swed' 'en']" in at_end.message
    (before,) = of_rule(lint(replace(EBRO, target_new=" Sweden"), tokenizer), "leading-space")
    assert before.severity == "note" and "read as the separator" in before.message
    assert brief(lint(EditRequest("{} is in ", "Ebro", "Sweden"), words_alone())) == [("leading-space", "note")]
    assert not of_rule(lint(replace(EBRO, prompt="The {} is in "), tokenizer), "merge")  # one cause, one finding


def test_a_token_across_prompt_and_target_is_an_error():
    (finding,) = of_rule(
        lint(EditRequest("{} saw th", "Ebro", "e old", target_separator=""), make_tokenizer()), "merge"
    )
    assert finding.severity == "error" and finding.unusable == (0,)
    assert "'the'" in finding.message.replace("' the'", "'the'") and "'e old'" in finding.message


def test_targets_that_begin_alike_are_named():
    request = replace(EBRO, target_new="xylophone", target_true="xenon")  # of letters alone in this vocabulary
    (finding,) = of_rule(lint(request, make_tokenizer()), "shared-first-token")
    assert finding.severity == "warning" and "begin with one token, ' '" in finding.message
    assert not of_rule(lint(replace(EBRO, target_true="France"), make_tokenizer()), "shared-first-token")


@pytest.mark.parametrize(
    "request_, named",
    (
        (replace(EBRO, prompt="<s>The {} is in"), "the prompt '<s>The Ebro is in' holds '<s>', the BOS token"),
        (replace(EBRO, target_new="Sweden</s>"), "the target 'Sweden</s>' holds '</s>', the EOS token"),
        (replace(EBRO, subject="<pad>"), "PAD"),
    ),
)
def test_special_tokens_in_texts_are_errors(request_, named):
    (finding,) = of_rule(lint(request_, make_tokenizer(bos=True)), "special-token")
    assert finding.severity == "error" and named in finding.message


def test_a_character_that_the_vocabulary_lacks_is_an_error():
    for request in (EditRequest("{} is in", "Rome ☃", "Italy"), EditRequest("{} is in", "Rome", "☃")):
        (finding,) = of_rule(lint(request, sentencepiece_like()), "special-token")
        assert "vocabulary lacks" in finding.message


def test_special_tokens_of_a_chat_are_none_of_the_request():
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    assert not of_rule(lint(EBRO, tokenizer, prompt_format=chat_format(tokenizer)), "special-token")


def test_a_long_target_is_a_warning():
    (finding,) = of_rule(lint(replace(EBRO, target_new="Sweden " * 17), make_tokenizer()), "long-target")
    assert finding.severity == "warning"


def test_rules_that_could_not_run_are_named():
    report = lint_requests([EBRO])
    assert set(report.not_run) == {rule.name for rule in (*TOKEN_RULES, *MODEL_RULES)}
    assert report.not_run["merge"] == "needs a tokenizer" and report.not_run["key-collision"] == "needs a model"
    assert set(lint(EBRO, make_tokenizer()).not_run) == {rule.name for rule in MODEL_RULES}
    names = [rule.name for rule in (*TEXT_RULES, *TOKEN_RULES, *MODEL_RULES)]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def linted(demo_model, demo_statistics):
    """What the demo model makes of a few requests, most of them bad."""
    first, second, third = demo.requests()[:3]
    place = first.subject
    requests = [
        first,
        replace(second, target_new=second.target_true, target_true=None, neighborhood_prompts=()),
        replace(third, target_true="granite", true_aliases=("sand",)),
        replace(third, subject="Zor", target_new="x " * 300, target_true=None, neighborhood_prompts=()),
        replace(third, subject="Zar", neighborhood_prompts=("word " * 300,)),
        EditRequest("The town of {} trades in", place, "oats"),
        EditRequest("The {} trades in", f"town of {place}", "hops", target_aliases=(first.target_true or "",)),
    ]
    options = {"statistics": demo_statistics, "hparams": {"context_template_length_params": [[3, 2]]}}
    return lint_requests(requests, *demo_model, **options), requests, options


def test_what_the_model_says_already_is_an_error(linted, demo_model):
    report, requests, options = linted
    (finding,) = [one for one in of_rule(report, "already-known") if one.severity == "error"]
    assert finding.records == (2,) and finding.unusable == (1,) and "(p = " in finding.message
    hparams = {**options["hparams"], "on_predicted": "allow"}
    allowed = lint_requests(requests[1:2], *demo_model, **{**options, "hparams": hparams})
    assert [one.severity for one in of_rule(allowed, "already-known")] == ["note"]


def test_another_name_that_the_model_says_is_a_warning(demo_model):
    first = demo.requests()[0]
    request = replace(first, target_aliases=(first.target_true,), target_true=None, neighborhood_prompts=())
    report = lint_requests([request], *demo_model, hparams={"context_template_length_params": [[3, 1]]})
    (finding,) = of_rule(report, "already-known")
    assert finding.severity == "warning" and "another name" in finding.message


def test_an_old_target_that_the_model_does_not_say_is_a_warning(linted):
    report, requests, _ = linted
    by_record = {one.records[0]: one for one in of_rule(report, "true-unknown")}
    count = len(requests[2].neighborhood_prompts)
    assert by_record[3].severity == "warning" and f"{count} of {count} neighborhood prompts" in by_record[3].message
    assert 1 not in by_record


def test_what_does_not_fit_is_an_error(linted):
    report, *_ = linted
    assert [one.records for one in of_rule(report, "too-long")] == [(4,), (5,)]
    assert "request" not in of_rule(report, "too-long")[0].message[:8]


def test_different_subjects_with_one_key_are_an_error(linted, demo_model, demo_statistics):
    """Both prompts are one text up to the subject's end, so that the keys are equal."""
    report, requests, options = linted
    (finding,) = [one for one in of_rule(report, "key-collision") if one.severity == "error"]
    assert finding.records == (7, 6) and finding.unusable == (6,)
    assert "whitened keys is 1.0000" in finding.message and "stays unwritten" in finding.message
    apart = lint_requests(requests[5:], *demo_model, batch_size=1, hparams=options["hparams"])
    (plain,) = of_rule(apart, "key-collision")
    assert plain.severity == "warning" and "plain keys (without statistics)" in plain.message


def test_a_method_without_keys_of_subjects_says_so(demo_model):
    report = lint_requests(demo.requests()[:2], *demo_model, method="ultraedit")
    assert report.not_run == {"key-collision": "ultraedit has no keys of subjects"}


def test_statistics_of_another_model_are_refused(demo_model, demo_statistics):
    other = replace(demo_statistics, model={**demo_statistics.model, "tokenizer": "another"})
    with pytest.raises(StatisticsError, match="another model"):
        lint_requests([EBRO], *demo_model, statistics=other)
