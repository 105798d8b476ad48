"""Chat templates: what stands before an answer, system messages, names, arguments, and templates that raise."""

from __future__ import annotations

import logging

import pytest
from tiny_models import make_model, make_tokenizer
from tokenizers import AddedToken

from kedit_fast import Editor, EditRequest
from kedit_fast.editing.prompts import chat_format, continuation, prepare
from kedit_fast.errors import RequestError
from kedit_fast.evaluation.metrics import evaluate_each, score
from kedit_fast.models.architectures import ModelView

REQUEST = EditRequest("{} plays the", "Miles Davis", "violin", id="one")
ROLES = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'].strip() }} [/INST]"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"  # noqa: RUF001
    "{% else %}<｜Assistant｜>{{ m['content'] }}{% endif %}{% endfor %}"  # noqa: RUF001
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"  # noqa: RUF001
)
LABELS = (
    "{% for m in messages %}{{ {'user': 'User: ', 'assistant': 'Assistant: '}[m['role']] + m['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
TIGHT = "{% for m in messages %}({{ m['content'] }}){% endfor %}{% if add_generation_prompt %}({% endif %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
STRICT = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('A system message is needed here') }}{% endif %}"
    + ROLES
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + ROLES
)
LEAVES_OUT = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}:"


def chatting(template, *added):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template, added, between",
    (
        (LLAMA2, (), " "),  # the template itself puts a space there
        (LLAMA2, ("[INST]", "[/INST]"), " "),  # also where its marker is a token
        (DEEPSEEK, ("<｜User｜>", "<｜Assistant｜>"), ""),  # noqa: RUF001 - added, not flagged special
        (DEEPSEEK, (), ""),  # the template tells, whatever the tokens
        (LABELS, (), " "),
        (TIGHT, (), ""),
        (CHATML, (), ""),  # white space is there
    ),
)
def test_before_an_answer_stands_what_the_template_puts_there(template, added, between):
    tokenizer, view = chatting(template, *added), ModelView(make_model("llama", seed=1))
    view.model.resize_token_embeddings(400 + len(added))
    view = ModelView(view.model)
    made = chat_format(tokenizer)
    (prepared,) = prepare(tokenizer, [REQUEST], (), 128, made)
    assert prepared.separator == between
    assert tokenizer.decode(prepared.target) == between + "violin"
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": REQUEST.text}, {"role": "assistant", "content": "violin"}], tokenize=False
    )
    assert shown.startswith(tokenizer.decode(prepared.rewriting[0].ids) + between + "violin")
    ids, tokens = continuation(tokenizer, REQUEST.text, "violin", made)
    assert (tuple(ids), tokens) == (prepared.rewriting[0].ids, prepared.target)
    (seen,) = evaluate_each(view.model, tokenizer, [REQUEST], prompt_format=made)
    assert seen.new == score(view, tokenizer, [(REQUEST.text, "violin")], made, [between])[0]


def test_a_request_that_asks_for_a_space_gets_one_after_a_template_too():
    tokenizer = chatting(TIGHT)
    asked = EditRequest("{} plays the", "Miles Davis", "violin", target_separator=" ")
    (prepared,) = prepare(tokenizer, [asked], (), 128, chat_format(tokenizer))
    assert prepared.separator == " "


def test_a_system_message_and_arguments_go_into_the_text(caplog):
    tokenizer = chatting(CHATML)
    with caplog.at_level(logging.WARNING, "kedit_fast"):
        logging.getLogger("kedit_fast").propagate = True
        assert chat_format(tokenizer)("Hi").endswith("<|im_start|>assistant\n")
    assert "thinking switch" in caplog.text
    caplog.clear()
    text = chat_format(tokenizer, system="Be brief.", enable_thinking=False)("Hi")
    assert not caplog.text
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")
    assert text.endswith("<think>\n\n</think>\n\n")
    (prepared,) = prepare(tokenizer, [REQUEST], (), 128, chat_format(tokenizer, system="Be brief."))
    assert "Be brief." in tokenizer.decode(prepared.rewriting[0].ids)


def test_a_template_is_chosen_by_name():
    tokenizer = chatting({"default": ROLES, "short": "{{ messages[-1]['content'] }}>"})
    assert chat_format(tokenizer)("Hi") == "<user>Hi" and chat_format(tokenizer, template="short")("Hi") == "Hi>"
    with pytest.raises(RequestError, match=r"no chat template 'long': choose one of 'default', 'short'"):
        chat_format(tokenizer, template="long")
    tokenizer.chat_template = {"a": ROLES, "b": ROLES}
    with pytest.raises(RequestError, match=r"several chat templates and no default: choose one of 'a', 'b'"):
        chat_format(tokenizer)
    tokenizer.chat_template = ROLES
    with pytest.raises(RequestError, match=r"one chat template without a name, and none called 'a'"):
        chat_format(tokenizer, template="a")


@pytest.mark.parametrize(
    "template, options, message",
    (
        (STRICT, {}, "fails on messages of user: A system message is needed here: give a system message"),
        (NO_SYSTEM, {"system": "x"}, "of system and user: System role not supported: leave the system message out"),
        (LEAVES_OUT, {"system": "x"}, "leaves the system message out"),
        (ROLES, {"enable_thinking": False}, "reads no 'enable_thinking'"),
        (ROLES, {"tokenize": True}, "'tokenize' cannot be given"),
        (ROLES, {"messages": []}, "'messages' cannot be given"),
        ("{{ messages[3]['content'].x.y }}", {}, "the chat template fails on messages of user"),
        ("{% if %}", {}, "the chat template fails on messages of user"),
        (None, {}, "no chat template"),
    ),
)
def test_templates_that_cannot_be_used_are_refused_with_their_own_message(template, options, message):
    with pytest.raises(RequestError, match=message):
        chat_format(chatting(template), **options)
    if template == STRICT:
        assert chat_format(chatting(template), system="x")("Hi") == "<system>x<user>Hi"


def test_a_template_that_fails_on_one_request_names_it():
    picky = "{% if 'river' in messages[-1]['content'] %}{{ raise_exception('no rivers') }}{% endif %}" + ROLES
    tokenizer = chatting(picky)
    editor = Editor(
        make_model("llama", layers=2), tokenizer, "memit", layers=[1], prefixes=(),
        hparams={"mom2_adjustment": False, "v_num_grad_steps": 2}, prompt_format=chat_format(tokenizer),
    )  # fmt: skip
    river = EditRequest("The river {} is", "Ebro", "long", id="river")
    with pytest.raises(RequestError, match=r"request 'river': the chat template fails.*no rivers"):
        editor.edit([REQUEST, river])
    result = editor.edit([REQUEST, river], "skip")
    assert "no rivers" in result.skipped[1] and result.requests == (REQUEST,)
