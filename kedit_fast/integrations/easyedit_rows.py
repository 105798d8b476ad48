"""The tokens, labels and batches of EasyEdit's own UltraEdit, to reproduce its results: `ultraedit_rows="easyedit"`.

How it differs from ours (from its `ultraedit_main.py`, `cross_entropy` and `Tracer`):

- Prompt and answer are tokenized together, and the answer once more by itself; both are padded and have special tokens.
  The labels are that second tensor as it is, so a BOS, and the padding of shorter answers, are labels too: the token
  before the answer is taught to predict BOS.
- The loss is the mean over all labels of `batch_size_once` requests, aligned with the last positions of the padded
  prompts (with `shift`, for the model names it knows; for others with the first positions, unshifted).
- `token: mask` takes a row for every token that is not padding, also for the answer's last one, which has no gradient.
  `token: ans` takes the first positions of every sequence, as many as the labels are wide: a mask of the labels,
  applied to the longer input.
- Batches are sorted by length, and update the normalizer one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kedit_fast.editing.gradients import AnswerGradients, ModuleGradients
from kedit_fast.errors import EditError, MethodError
from kedit_fast.models.forward import evaluating
from kedit_fast.models.patching import output_hooks
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest

FAMILIES = ("gpt", "llama", "internlm", "chatglm", "qwen", "mistral")
"""Models with one of these in their name have their labels shifted."""


def gatherer(tokenizer: Any, raw: Mapping[str, Any]) -> Callable[..., AnswerGradients]:
    """A function that replaces `answer_gradients` in an editor.

    Args:
        tokenizer: pads on the side it is set to, with its own padding token.
        raw: EasyEdit's hyper-parameters, of which `batch_size_once`, `token` and `model_name` count.

    Raises:
        MethodError: a `batch_size_once` that is no number of requests.
    """
    batch_size = raw.get("batch_size_once", 1)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise MethodError(f"batch_size_once = {batch_size!r} is not a number of requests")
    name, answer_rows = raw.get("model_name"), raw.get("token", "mask") == "ans"
    shift = not isinstance(name, str) or any(family in name.lower() for family in FAMILIES)

    def gather(
        view: ModelView, prepared: Sequence[PreparedRequest], modules: Sequence[str], rows: str, on_problem: str
    ) -> AnswerGradients:
        return easyedit_gradients(view, tokenizer, prepared, modules, answer_rows, batch_size, shift)

    return gather


def easyedit_gradients(
    view: ModelView,
    tokenizer: Any,
    prepared: Sequence[PreparedRequest],
    modules: Sequence[str],
    answer_rows: bool,
    batch_size: int,
    shift: bool = True,
) -> AnswerGradients:
    """Keys and value gradients of requests as EasyEdit's UltraEdit takes them (see the module's docstring).

    Args:
        view: the model; nothing in it changes.
        tokenizer: with a padding token.
        prepared: u requests; only their texts are used.
        modules: paths of linear modules.
        answer_rows: `token: ans`; False is `token: mask`.
        batch_size: requests per batch.
        shift: whether a label is compared with the logits of the position before it.

    Raises:
        EditError: the tokenizer cannot pad.

    Cost: a forward and a backward pass of the whole model per batch, with logits at every position.
    """
    if tokenizer.pad_token_id is None:
        raise EditError("EasyEdit's rows need padding: set tokenizer.pad_token, as its BaseEditor does")
    batches = []
    for begin in range(0, len(prepared), batch_size):
        requests = list(range(begin, min(begin + batch_size, len(prepared))))
        targets = [_spaced(prepared[i].request.target_new) for i in requests]
        texts = [prepared[i].request.text + target for i, target in zip(requests, targets, strict=True)]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        labels = tokenizer(targets, padding=True, return_tensors="pt")["input_ids"]
        batches.append((requests, tokens["input_ids"], tokens["attention_mask"], labels))
    batches.sort(key=lambda batch: int(batch[2].sum()), reverse=True)
    keys: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    owners, losses = [], torch.zeros(len(prepared))
    with evaluating(view):
        for requests, ids, mask, labels in batches:
            positions = torch.nonzero(torch.ones_like(labels) if answer_rows else mask).T  # [2, n] sequence, token
            loss, rows = _one_batch(view, modules, ids, mask, labels, positions, shift)
            losses[requests] = loss
            owners.append(torch.tensor(requests)[positions[0]])
            for name, (key, gradient) in rows.items():
                keys[name].append(key)
                gradients[name].append(gradient)
    gathered = {name: ModuleGradients(torch.cat(keys[name]), torch.cat(gradients[name])) for name in modules}
    return AnswerGradients(gathered, torch.cat(owners), losses, tuple(len(part) for part in owners))


def _one_batch(
    view: ModelView,
    modules: Sequence[str],
    ids: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor,
    positions: torch.Tensor,
    shift: bool,
) -> tuple[float, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The batch's mean loss, and by module keys [n, d] and gradients [n, out] at `positions`."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def hook_for(name: str) -> Callable[..., torch.Tensor]:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            inputs[name] = args[0].detach()
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_(True)
            return outputs[name]

        return hook

    hooks = [(view.linear(name)[0], hook_for(name)) for name in modules]
    with output_hooks(hooks), torch.enable_grad():
        states = view.entry(input_ids=ids.to(view.device), attention_mask=mask.to(view.device), use_cache=False)[0]
        logits = view.head.logits(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        if shift:
            logits = logits[:, :-1]
            width = min(logits.shape[1], labels.shape[1])
            logits, labels = logits[:, -width:], labels[:, -width:]
        else:
            logits = logits[:, : labels.shape[1]]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten().to(logits.device))
        gradients = torch.autograd.grad(loss, [outputs[name] for name in modules])
    rows = {}
    for name, gradient in zip(modules, gradients, strict=True):
        sequence, token = positions.to(gradient.device)
        rows[name] = (inputs[name][sequence, token].float(), gradient[sequence, token].float())
    return float(loss.detach()), rows


def _spaced(target: str) -> str:
    return target if target.startswith(" ") else " " + target
