"""Chat templates: what stands before an answer, system messages, names, arguments, and templates that raise."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
from tiny_models import make_model, make_tokenizer
from tokenizers import AddedToken

from kedit_fast import Editor, EditRequest
from kedit_fast.errors import RequestError
from kedit_fast.evaluation.metrics import evaluate_each, score
from kedit_fast.models.view import ModelView
from kedit_fast.requests.chat import chat_format
from kedit_fast.requests.prompts import continuation, prepare, separator_before
from kedit_fast.requests.tokens import chat_markers, special_tokens

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
        hparams={"mom2_adjustment": False, "v_num_grad_steps": 2, "clamp_norm_factor": 0.75},
        prompt_format=chat_format(tokenizer),
    )  # fmt: skip
    river = EditRequest("The river {} is", "Ebro", "long", id="river")
    with pytest.raises(RequestError, match=r"request 'river': the chat template fails.*no rivers"):
        editor.edit([REQUEST, river])
    result = editor.edit([REQUEST, river], "skip")
    assert "no rivers" in result.skipped[1] and result.requests == (REQUEST,)


BRACES = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}


@pytest.mark.parametrize(
    "template, options",
    (
        (ROLES, {"system": "Fill the {} of {}."}),
        (ROLES + "{}", {}),
        ("{{ tools }}" + ROLES, {"tools": [BRACES]}),
        ("{% for m in messages %}{{ m['content'] | tojson }}{% endfor %}", {}),
    ),
)
def test_braces_that_are_not_the_prompts_own_stay_as_they_are(template, options):
    tokenizer = chatting(template)
    made = chat_format(tokenizer, **options)
    for given in (made, lambda prompt: made(prompt)):
        (prepared,) = prepare(tokenizer, [REQUEST], (), 512, given)
        ids, _ = continuation(tokenizer, REQUEST.text, "violin", made)
        assert prepared.rewriting[0].ids == tuple(ids)
        assert made(REQUEST.text).count("{}") == tokenizer.decode(prepared.rewriting[0].ids).count("{}")
        cut = tokenizer.decode(prepared.rewriting[0].cut().ids)
        assert cut.endswith("Davis") or cut.endswith("Davis ")


def test_a_format_that_looks_for_the_braces_finds_them_and_one_that_drops_them_is_refused():
    tokenizer = make_tokenizer()
    (prepared,) = prepare(tokenizer, [REQUEST], (), 128, lambda prompt: prompt[prompt.index("{}") :])
    assert tokenizer.decode(prepared.rewriting[0].ids).startswith("Miles Davis plays")
    with pytest.raises(RequestError, match=r"must keep the \{\} of '\{\} plays the' once; it made 'nothing'"):
        prepare(tokenizer, [REQUEST], (), 128, lambda _: "nothing")


@pytest.mark.parametrize(
    "template, said",
    (
        ("{% if thinking is defined and not thinking %}</think>{% else %}<think>{% endif %}", "thinking=false"),
        ("{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}", "enable_thinking=false"),
        ("{% if thinking %}<think>{% else %}</think>{% endif %}", ""),  # without it there are no thoughts already
        ("{{ messages[0].thinking }}", ""),  # a message's thoughts, not a switch
    ),
)
def test_the_warning_names_the_thinking_switch_that_would_change_the_prompt(template, said, caplog):
    logging.getLogger("kedit_fast").propagate = True
    made = chat_format(chatting(ROLES + template))
    assert ("; " + said in caplog.text) if said else not caplog.text, caplog.text
    if said:
        caplog.clear()
        name = said.partition("=")[0]
        assert chat_format(made.tokenizer, **{name: False})("Hi") != made("Hi") and not caplog.text


def counting(monkeypatch, tokenizer):
    """How often the added vocabulary of a kind of tokenizer is read, as a growing list."""
    kind, reads = type(tokenizer), []
    monkeypatch.setattr(kind, "added_tokens_decoder", property(
        lambda self: reads.append(1) or self.backend_tokenizer.get_added_tokens_decoder()))  # fmt: skip
    return reads


def test_the_added_vocabulary_is_read_once_for_many_prompts_and_again_after_tokens_are_added(monkeypatch):
    tokenizer = chatting(None, *(f"<extra_{i}>" for i in range(50)))
    reads = counting(monkeypatch, tokenizer)
    prepare(tokenizer, [REQUEST] * 5, ("Then. ",), 128)
    for _ in range(20):
        continuation(tokenizer, REQUEST.text, "violin")
    assert len(reads) == 1
    assert separator_before(tokenizer, "Hi [USER]", "there") == " "
    tokenizer.add_tokens([AddedToken("[USER]", special=False)])
    assert separator_before(tokenizer, "Hi [USER]", "there") == ""
    assert "[USER]" in chat_markers(tokenizer).values() and "[USER]" not in special_tokens(tokenizer).values()
    assert len(reads) == 2
    word = tokenizer.convert_ids_to_tokens(300)  # a token of the vocabulary that becomes special
    tokenizer.add_special_tokens({"eos_token": word})
    assert special_tokens(tokenizer)[300] == word and len(reads) == 3


def test_what_was_read_of_a_tokenizer_does_not_keep_it():
    tokenizer = make_tokenizer()
    assert special_tokens(tokenizer)
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


class Wrapped:
    """A tokenizer around another."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def __len__(self):
        return len(self.inner)


def slotted(inner):
    """A tokenizer without weak references."""

    class Slotted:
        __slots__ = ("inner",)
        __init__, __getattr__, __call__, __len__ = (
            Wrapped.__init__, Wrapped.__getattr__, Wrapped.__call__, Wrapped.__len__
        )  # fmt: skip

    return Slotted(inner)


def unhashable(inner):
    class Unhashable(Wrapped):
        __hash__ = None

    return Unhashable(inner)


@pytest.mark.parametrize("wrap", (Wrapped, slotted, unhashable))
def test_tokenizers_without_a_hash_or_weak_references_work_too(wrap):
    inner = chatting(None, "[USER]")
    tokenizer = wrap(inner)
    (prepared,) = prepare(tokenizer, [REQUEST], ("Then. ",), 128)
    assert prepared == prepare(inner, [REQUEST], ("Then. ",), 128)[0]
    assert separator_before(tokenizer, "Hi [USER]", "there") == ""
    inner.add_tokens([AddedToken("[TOOL]", special=False)])
    assert separator_before(tokenizer, "Hi [TOOL]", "there") == ""
