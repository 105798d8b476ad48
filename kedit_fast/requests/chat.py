"""Prompts as messages in a tokenizer's chat template."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kedit_fast.errors import RequestError

_log = logging.getLogger("kedit_fast")
_THINKING = ("enable_thinking", "thinking")  # names that chat templates have for their thinking switch
_PROBE, _ANSWER = "Where is it?", "Here."  # a question and an answer that show what a chat template does


@dataclass(frozen=True)
class ChatFormat:
    """A prompt as a user's message in a tokenizer's chat template, up to where the answer begins; see `chat_format`."""

    tokenizer: Any = field(repr=False)
    system: str | None = None
    """A system message that goes first, or none."""
    template: str | None = None
    """The template's name, where the tokenizer has several."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the template reads beside the messages."""
    separator: str | None = None
    """White space that the template puts before an answer; None where that cannot be determined."""
    suffix: str = ""
    """A text that ends every message of the user, after a space."""

    def __call__(self, prompt: str) -> str:
        """The text that the model reads; raises RequestError where the template does."""
        return self.rendered(prompt)

    def rendered(self, prompt: str, answer: str | None = None) -> str:
        """A prompt, open for its answer, or a prompt with its answer."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": f"{prompt} {self.suffix}" if self.suffix else prompt})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=answer is None,
                **self.arguments,
            )
        except Exception as error:  # templates raise exceptions of any type
            roles = " and ".join(message["role"] for message in messages)
            text = str(error) or type(error).__name__
            advice = ""
            if "system" in text.lower():
                advice = ": " + ("give a system message" if self.system is None else "leave the system message out")
            raise RequestError(f"the chat template fails on messages of {roles}: {text}{advice}") from error


@dataclass(frozen=True)
class SuffixFormat:
    """A prompt with a text after it; see `with_suffix`."""

    suffix: str
    """The text."""
    inner: Callable[[str], str] | None = None
    """What makes prompt and suffix into the text that the model reads; None for nothing."""

    def __call__(self, prompt: str) -> str:
        """The text that the model reads."""
        text = f"{prompt} {self.suffix}"
        return text if self.inner is None else self.inner(text)


def with_suffix(prompt_format: Callable[[str], str] | None, suffix: str) -> Callable[[str], str] | None:
    """A prompt format that puts a text after every prompt, in a chat into the user's message; itself for no text.

    DINM's `suffix_system_prompt` is such a text: the model is tuned, and measured, with it.
    """
    if not suffix:
        return prompt_format
    if isinstance(prompt_format, ChatFormat):
        return replace(prompt_format, suffix=suffix)
    return SuffixFormat(suffix, prompt_format)


def is_plain(prompt_format: Callable[[str], str] | None) -> bool:
    """Whether the model reads a prompt, and perhaps a suffix, without anything else around it."""
    return prompt_format is None or (isinstance(prompt_format, SuffixFormat) and prompt_format.inner is None)


def chat_format(tokenizer: Any, system: str | None = None, template: str | None = None, **arguments: Any) -> ChatFormat:
    """The prompt as a user's message in the tokenizer's chat template, up to where the answer begins.

    What the template itself puts before an answer (Llama 2: a space) stands before targets, if it can be determined.

    Args:
        tokenizer: with a chat template.
        system: a system message that goes first.
        template: the template's name, where the tokenizer has several and the one called "default" is not meant, or
            there is none.
        **arguments: what the template reads beside messages, for example enable_thinking=False.

    Raises:
        RequestError: no template, none of that name, one that reads no such argument, leaves the system message out, or
            raises (its own message is given).
    """
    source = _template_source(tokenizer, template)
    taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages"}
    for name in arguments:
        if name in taken - {"tools", "documents", "kwargs"}:
            raise RequestError(f"{name!r} cannot be given to a chat template: it is set here")
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise RequestError(f"the chat template reads no {name!r}, so giving it would change nothing")
    several = isinstance(tokenizer.chat_template, Mapping)
    plain = ChatFormat(tokenizer, system, template if several else None, arguments)
    prompt = plain.rendered(_PROBE)
    if system is not None and system.strip() not in prompt:
        raise RequestError("the chat template leaves the system message out: put its text into the prompts")
    for name in _THINKING:
        if name not in arguments and re.search(rf"\b{name}\b", source) and _changes(plain, prompt, name):
            _log.warning(
                "the chat template has a thinking switch: as it stands, targets are written where thoughts may begin; "
                "%s=false (--template-arg) puts them after",
                name,
            )
    try:
        answered = plain.rendered(_PROBE, _ANSWER)
    except RequestError:
        return plain
    between = answered[len(prompt) :].partition(_ANSWER)[0]
    is_separator = answered.startswith(prompt) and _ANSWER in answered[len(prompt) :] and not between.strip()
    return replace(plain, separator=between) if is_separator else plain


def _changes(plain: ChatFormat, prompt: str, name: str) -> bool:
    """Whether a format renders the probe as something else than `prompt` when the argument `name` is false."""
    try:
        return replace(plain, arguments={**plain.arguments, name: False}).rendered(_PROBE) != prompt
    except RequestError:
        return False


def _template_source(tokenizer: Any, name: str | None) -> str:
    """The text of the chat template that is meant."""
    templates = getattr(tokenizer, "chat_template", None)
    if type(tokenizer).__name__.startswith("MistralCommon"):
        raise RequestError(
            f"{type(tokenizer).__name__} makes token ids of a chat but no text that it would read again as the same "
            "ids: use a folder with tokenizer.json and a chat template, or prompts without a chat"
        )
    if not templates:
        raise RequestError("the tokenizer has no chat template, so prompts cannot be formatted as a chat")
    if not isinstance(templates, Mapping):
        if name not in (None, "default"):
            raise RequestError(f"the tokenizer has one chat template without a name, and none called {name!r}")
        return str(templates)
    names = ", ".join(map(repr, sorted(templates)))
    if name is None and "default" not in templates:
        raise RequestError(f"the tokenizer has several chat templates and no default: choose one of {names}")
    if (name or "default") not in templates:
        raise RequestError(f"the tokenizer has no chat template {name!r}: choose one of {names}")
    return str(templates[name or "default"])
