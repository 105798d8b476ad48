"""The logit lens: what the model would answer if its last block were an earlier one.

The states after each block go through everything that the model has behind its last block: its final norm, its head,
and what its own code does between and after these (a scale, a cap, a projection). Nothing of it is computed by other
code: the model runs, and its blocks hand on the states that they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch

from kedit_fast.errors import EvaluationError, InvalidArgumentError, RequestError, UnsupportedModelError
from kedit_fast.locating.prompt_pairs import PromptPair
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.forward import (
    Entering,
    Site,
    as_rows,
    did_not_run,
    evaluating,
    hidden_of,
    last_states,
    pad,
    stubs,
)
from kedit_fast.models.head import error_limit
from kedit_fast.models.patching import input_hooks, output_hooks, replaced_forwards
from kedit_fast.models.view import ModelView, view_without_memory
from kedit_fast.models.widened import computing_dtype
from kedit_fast.support.dtypes import accumulation_dtype
from kedit_fast.support.torch_state import plain_torch

Position = Literal["subject", "last"]
"""Where states are read: at the subject's last token, or at the prompt's."""
_BATCH_TOKENS = 2048
_LOGITS = 1 << 24  # entries of one matrix of logits


class SubjectPrompt(Protocol):
    """A prompt with the place of its subject, such as a `TracedPrompt`."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Its token ids."""
        ...

    @property
    def subject(self) -> tuple[int, int]:
        """The index of the subject's first token, and the one past its last."""
        ...

    @property
    def answer(self) -> int | None:
        """The token that is the answer; None for what the model says."""
        ...

    @property
    def label(self) -> str:
        """How messages call it."""
        ...


@dataclass(frozen=True, eq=False)
class LogitLens:
    """Rank and probability of each prompt's answer, read from the states after each block."""

    position: Position
    """Where the states were read."""
    rank: torch.Tensor
    """[n, L + 1] int64: 1 where no token is more probable than the answer. Entry 0 is the input of the first block,
    entry l the output of block l - 1; the last are the model's own answers."""
    probability: torch.Tensor
    """[n, L + 1] fp32 (fp64 of fp64 models), of the answer among all tokens."""
    places: tuple[int, ...]
    """Of each prompt the index of the token whose states were read."""
    answers: tuple[int, ...]
    """Of each prompt the token that is the answer."""
    labels: tuple[str, ...]
    """Of each prompt how it is called."""


@plain_torch()
@torch.no_grad()
def logit_lens(
    model: Any,
    prompts: Sequence[PromptPair | SubjectPrompt],
    position: Position = "last",
    *,
    spec: ArchSpec | None = None,
    progress: Callable[[int], Any] | None = None,
) -> LogitLens:
    """Rank and probability of the answer by layer: softmax(head(norm(states after block l))) at one token.

    Args:
        model: a causal language model of transformers, or a ModelView of it; nothing in it changes.
        prompts: pairs, of which the clean prompt is read, or traced prompts.
        position: "last" for the prompt's last token, "subject" for the subject's. At the subject's last token the
            answer is not the next token; its rank says whether the states there hold it already.
        spec: the model's module names; None to find them.
        progress: called with the number of prompts that were read since the last call.

    Returns:
        a LogitLens; tensors are on the CPU.

    Raises:
        InvalidArgumentError: another position.
        RequestError: no prompts; a token that the model has no embedding for; or more tokens than it takes; by label.
        EvaluationError: the model's output is not finite on a prompt, which is named.
        UnsupportedModelError: the states after the last block do not give the model's own logits, a block did not
            run, or a memory is attached to the model.

    Cost: one pass over the prompts, and the head on L + 1 states of each.

    Example:
        >>> from kedit_fast.locating.prompt_pairs import prompt_pairs
        >>> lens = logit_lens(model, prompt_pairs(model, tokenizer, requests, on_error="skip"))
        >>> lens.rank[:, -1].tolist() == [1] * len(lens.labels)  # the model says its own answers
        True
    """
    if position not in get_args(Position):
        raise InvalidArgumentError(f"position = {position!r}: choose {' or '.join(get_args(Position))}")
    view = view_without_memory(model, spec)
    read = [_read(view, prompt, position) for prompt in prompts]
    if not read:
        raise RequestError("no prompts given: there is nothing to read")
    ranks: dict[int, torch.Tensor] = {}
    probabilities: dict[int, torch.Tensor] = {}
    answers: dict[int, int] = {}
    order = sorted(range(len(read)), key=lambda i: len(read[i].ids), reverse=True)
    with evaluating(view):
        while order:
            count = max(1, _BATCH_TOKENS // len(read[order[0]].ids))
            chunk, order = order[:count], order[count:]
            part = [read[i] for i in chunk]
            given, rank, probability = _lens(view, part)
            answers |= dict(zip(chunk, given, strict=True))
            ranks |= dict(zip(chunk, rank, strict=True))
            probabilities |= dict(zip(chunk, probability, strict=True))
            if progress is not None:
                progress(len(chunk))
    every = range(len(read))
    return LogitLens(
        position,
        torch.stack([ranks[i] for i in every]),
        torch.stack([probabilities[i] for i in every]),
        tuple(one.place for one in read),
        tuple(answers[i] for i in every),
        tuple(one.label for one in read),
    )


@dataclass(frozen=True)
class _Read:
    """A prompt as it is read."""

    ids: tuple[int, ...]
    """Its token ids."""
    place: int
    """The index of the token whose states are read."""
    answer: int | None
    """The answer; None for what the model says."""
    label: str
    """How messages call it."""


def _read(view: ModelView, prompt: PromptPair | SubjectPrompt, position: Position) -> _Read:
    if isinstance(prompt, PromptPair):
        ids, end = prompt.clean, prompt.subject_end
    else:
        ids, end = prompt.ids, prompt.subject[1] - 1
    if not ids or not 0 <= end < len(ids):
        raise RequestError(f"{prompt.label}: the subject's last token {end} is none of its {len(ids)} tokens")
    if len(ids) > view.max_length:
        raise RequestError(f"{prompt.label}: its prompt has {len(ids)} tokens, the model takes {view.max_length}")
    largest = max(*ids, -1 if prompt.answer is None else prompt.answer)
    if largest >= view.vocabulary:
        raise RequestError(f"{prompt.label}: token {largest} is past the model's {view.vocabulary:,} tokens")
    return _Read(ids, end if position == "subject" else len(ids) - 1, prompt.answer, prompt.label)


def _lens(view: ModelView, part: Sequence[_Read]) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Answers, ranks [n, L + 1] and probabilities [n, L + 1] of some prompts."""
    states, as_tuple, last = _states(view, part)
    plain = _log_probs(view.head.logits(last.to(view.head.device)))  # [2 n, V]: at the places, then at the last tokens
    count, layers = len(part), view.num_layers + 1
    finite = torch.isfinite(plain.max(1).values).tolist()
    for one, at_place, at_end in zip(part, finite[:count], finite[count:], strict=True):
        if not (at_place and at_end):
            raise EvaluationError(f"{one.label}: the model's output is not finite on its prompt")
    said = plain[count:].argmax(1).tolist()
    answers = [token if one.answer is None else one.answer for one, token in zip(part, said, strict=True)]
    targets = torch.tensor(answers, device=view.head.device).repeat_interleave(layers)  # [n (L + 1)]
    rows = states.flatten(0, 1)  # [n (L + 1), h], one prompt after another
    size = max(1, _LOGITS // view.vocabulary)
    ranks, probabilities, ends = [], [], []
    for begin in range(0, len(rows), size):
        log_probs = _log_probs(_logits_after_blocks(view, rows[begin : begin + size], as_tuple))
        wanted = log_probs.gather(1, targets[begin : begin + size, None])
        ranks.append((log_probs > wanted).sum(1) + 1)
        probabilities.append(wanted[:, 0].exp())
        is_last = torch.arange(begin, begin + len(log_probs), device=log_probs.device) % layers == layers - 1
        ends.append(log_probs[is_last])
    _require_own(view, torch.cat(ends), plain[:count])
    rank, probability = torch.cat(ranks).view(count, layers), torch.cat(probabilities).view(count, layers)
    wrong = (~torch.isfinite(probability)).any(1).tolist()
    if any(wrong):
        raise EvaluationError(f"{part[wrong.index(True)].label}: the states after a block give no finite probabilities")
    return answers, rank.cpu(), probability.cpu()


def _states(view: ModelView, part: Sequence[_Read]) -> tuple[torch.Tensor, bool, torch.Tensor]:
    """States [n, L + 1, h] at the places; whether blocks return tuples; what the head takes [2 n, ...], at the places
    and at the last tokens."""
    batch = pad([one.ids for one in part], view.device)
    seen: dict[int, torch.Tensor] = {}
    tuples: list[bool] = []
    at = torch.arange(len(part), device=view.device)
    places = torch.tensor([one.place for one in part], device=view.device)
    ends = torch.tensor([len(one.ids) - 1 for one in part], device=view.device)

    def pick(level: int, states: Any) -> None:
        states = as_rows(states, batch.input_ids.shape) if isinstance(states, torch.Tensor) else states
        if not isinstance(states, torch.Tensor) or states.shape[:2] != batch.input_ids.shape:
            raise UnsupportedModelError(
                f"{view.spec.blocks}.{max(level - 1, 0)} was not seen with all tokens of a batch: its states cannot be "
                "read"
            )
        seen[level] = states[at.to(states.device), places.to(states.device)]

    def see_input(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        pick(0, next(iter((*args, *kwargs.values())), None))

    def see_output(level: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple, output: Any) -> None:
            tuples.append(isinstance(output, tuple | list))
            pick(level, hidden_of(output))

        return hook

    outputs = [(view.block(layer), see_output(layer + 1)) for layer in range(view.num_layers)]
    with input_hooks([(view.block(0), see_input)]), output_hooks(outputs):
        last = last_states(view, batch)
    if missing := [level for level in range(view.num_layers + 1) if level not in seen]:
        raise did_not_run(view, Site(max(missing[0] - 1, 0), "block"))
    device = seen[view.num_layers].device
    states = torch.stack([seen[level].to(device) for level in range(view.num_layers + 1)], 1)
    rows, columns = torch.cat([at, at]).to(last.device), torch.cat([places, ends]).to(last.device)
    return states, tuples[-1], last[rows, columns]


def _logits_after_blocks(view: ModelView, states: torch.Tensor, as_tuple: bool) -> torch.Tensor:
    """What the model makes of states [n, h] behind its last block: logits [n, V]."""
    batch = pad([(0,)] * len(states), view.device)
    entering = Entering(view.num_layers, states[:, None], as_tuple)
    with replaced_forwards(stubs(view, entering)):
        last = last_states(view, batch)
    return view.head.logits(last[:, 0].to(view.head.device))


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.to(accumulation_dtype(logits)), 1)


def _require_own(view: ModelView, result: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise UnsupportedModelError unless the states after the last block give the model's own log probabilities."""
    distance = float((result.exp() - expected.exp()).abs().sum(1).max()) / 2  # total variation
    limit = error_limit(view.once(_computing_dtype), view.head.rounding)
    if not distance <= limit:
        raise UnsupportedModelError(
            f"the states after the last block of {type(view.model).__name__} do not give its own probabilities (they "
            f"differ by {distance:.1g}): something beside the blocks adds to them, so a lens on earlier blocks would "
            "be wrong"
        )


def _computing_dtype(view: ModelView) -> torch.dtype:
    return computing_dtype(view.entry)
