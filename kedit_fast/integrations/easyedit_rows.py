"""The tokens, labels and batches of EasyEdit's own UltraEdit, for those who want its numbers: `ultraedit_rows`.

Where it differs from ours (read from its `ultraedit_main.py`, `cross_entropy` and `Tracer`):

- Prompt and answer are tokenised together, the answer once more by itself, both padded, special tokens included. The
  labels are that second tensor as it is, so a BOS and padding of shorter answers are labels too: the token before the
  answer is taught to say BOS.
- The loss is the mean over all labels of `batch_size_once` requests, aligned with the last positions of the padded
  prompts (with `shift`, for the model names it knows; for others with the first positions, unshifted).
- `token: mask` takes the rows of every real token, the last one of the answer included, which has no gradient.
  `token: ans` takes the first positions of every row, as many as the labels are wide: the labels' own mask, applied to
  the longer input.
- Batches are sorted by length and go into the normaliser one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from kedit_fast.editing.gradients import AnswerGradients, ModuleGradients
from kedit_fast.errors import EditError, MethodError
from kedit_fast.models.forward import evaluating
from kedit_fast.models.view import ModelView
from kedit_fast.requests.prompts import PreparedRequest

FAMILIES = ("gpt", "llama", "internlm", "chatglm", "qwen", "mistral")  # model names whose labels it shifts


def gatherer(tokenizer: Any, raw: Mapping[str, Any]) -> Callable[..., AnswerGradients]:
    """What stands in for `answer_gradients`.

    Args:
        tokenizer: pads on its own side, with its own padding token.
        raw: `batch_size_once`, `token` and `model_name` of EasyEdit's file.

    Raises:
        MethodError: a `batch_size_once` that is no number of requests.
    """
    once = raw.get("batch_size_once", 1)
    if not isinstance(once, int) or isinstance(once, bool) or once < 1:
        raise MethodError(f"batch_size_once = {once!r} is not a number of requests")
    name, by_name = raw.get("model_name"), raw.get("token", "mask")
    shift = not isinstance(name, str) or any(family in name.lower() for family in FAMILIES)

    def gather(
        view: ModelView, prepared: Sequence[PreparedRequest], modules: Sequence[str], rows: str, on_problem: str
    ) -> AnswerGradients:
        return easyedit_gradients(view, tokenizer, prepared, modules, by_name == "ans", once, shift)

    return gather


def easyedit_gradients(
    view: ModelView,
    tokenizer: Any,
    prepared: Sequence[PreparedRequest],
    modules: Sequence[str],
    answer: bool,
    once: int,
    shift: bool = True,
) -> AnswerGradients:
    """Keys and value gradients of requests as EasyEdit's UltraEdit takes them; see the module.

    Args:
        view: the model; nothing in it changes.
        tokenizer: with a padding token.
        prepared: u requests, of which the texts count.
        modules: paths of linear modules.
        answer: `token: ans`; False is `token: mask`.
        once: requests of a batch.
        shift: whether labels are compared with the position before.

    Raises:
        EditError: the tokenizer cannot pad.

    Cost: a forward and backward pass of the whole model a batch, the head at every position.
    """
    if tokenizer.pad_token_id is None:
        raise EditError("EasyEdit's rows need padding: set tokenizer.pad_token, as its BaseEditor does")
    batches = []
    for begin in range(0, len(prepared), once):
        which = list(range(begin, min(begin + once, len(prepared))))
        targets = [_spaced(prepared[i].request.target_new) for i in which]
        texts = [prepared[i].request.text + target for i, target in zip(which, targets, strict=True)]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        labels = tokenizer(targets, padding=True, return_tensors="pt")["input_ids"]
        batches.append((which, tokens["input_ids"], tokens["attention_mask"], labels))
    batches.sort(key=lambda batch: int(batch[2].sum()), reverse=True)
    keys: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    owners, losses = [], torch.zeros(len(prepared))
    with evaluating(view):
        for which, ids, mask, labels in batches:
            taken = torch.ones_like(labels) if answer else mask
            places = torch.nonzero(taken).T  # [2, n] row and token
            loss, seen = _one_batch(view, modules, ids, mask, labels, places, shift)
            losses[which] = loss
            owners.append(torch.tensor(which)[places[0]])
            for name, (key, gradient) in seen.items():
                keys[name].append(key)
                gradients[name].append(gradient)
    whole = {name: ModuleGradients(torch.cat(keys[name]), torch.cat(gradients[name])) for name in modules}
    return AnswerGradients(whole, torch.cat(owners), losses, tuple(len(part) for part in owners))


def _one_batch(
    view: ModelView,
    modules: Sequence[str],
    ids: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor,
    places: torch.Tensor,
    shift: bool,
) -> tuple[float, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The batch's mean loss, and by module keys [n, d] and gradients [n, out] at `places`."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def hook_for(name: str):
        def hook(module, args, output):
            inputs[name] = args[0].detach()
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_(True)
            return outputs[name]

        return hook

    with ExitStack() as stack, torch.enable_grad():
        for name in modules:
            stack.callback(view.linear(name)[0].register_forward_hook(hook_for(name)).remove)
        hidden = view.base(input_ids=ids.to(view.device), attention_mask=mask.to(view.device), use_cache=False)[0]
        logits = view.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        if view.softcap:
            logits = view.softcap * torch.tanh(logits / view.softcap)
        if shift:
            logits = logits[:, :-1]
            width = min(logits.shape[1], labels.shape[1])
            logits, labels = logits[:, -width:], labels[:, -width:]
        else:
            logits = logits[:, : labels.shape[1]]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten().to(logits.device))
        found = torch.autograd.grad(loss, [outputs[name] for name in modules])
    seen = {}
    for name, gradient in zip(modules, found, strict=True):
        row, token = places.to(gradient.device)
        seen[name] = (inputs[name][row, token].float(), gradient[row, token].float())
    return float(loss.detach()), seen


def _spaced(target: str) -> str:
    return target if target.startswith(" ") else " " + target
