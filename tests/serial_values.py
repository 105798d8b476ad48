"""The oracle of values: the published loop, one request and one unpadded prompt at a time, whole forward passes.

Written from the description of memit's and rome's compute_z / compute_v; it shares nothing with the package but the
prepared token ids and the hyper-parameters.
"""

from __future__ import annotations

import contextlib

import torch


def _first(output):
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def _delta_at(module, position, delta):
    def hook(_, __, output):
        hidden = _first(output).clone()
        hidden[0, position] = hidden[0, position] + delta.to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _log_probs(model, ids):
    return torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float(), -1)


def serial_value(model, module, prepared, hparams):
    """Return (target [h], loss, steps) of one prepared request, the delta living at `module`'s output."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    kept = []
    handle = module.register_forward_hook(lambda _, __, output: kept.append(_first(output)[0].detach().clone()))
    bare = prepared.rewriting[0]
    with torch.no_grad():
        model(input_ids=torch.tensor([bare.ids]), use_cache=False)
        handle.remove()
        reference = _log_probs(model, prepared.kl.ids)[prepared.kl.lookup]
    h0 = kept[0][bare.lookup].float()
    delta = torch.zeros_like(h0, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=hparams.v_lr)
    steps = 0
    for iteration in range(hparams.v_num_grad_steps):
        optimizer.zero_grad()
        nll = 0.0
        for prompt in prepared.rewriting:
            ids = [*prompt.ids, *prepared.target[:-1]]
            with _delta_at(module, prompt.lookup, delta):
                log_probs = _log_probs(model, ids)
            start = len(prompt.ids) - 1
            scores = [log_probs[start + t, token] for t, token in enumerate(prepared.target)]
            nll = nll - torch.stack(scores).mean() / len(prepared.rewriting)
        with _delta_at(module, prepared.kl.lookup, delta):
            current = _log_probs(model, prepared.kl.ids)[prepared.kl.lookup]
        kl = torch.nn.functional.kl_div(reference, current, log_target=True, reduction="sum")
        decay = hparams.v_weight_decay * delta.norm() / h0.norm() ** 2
        loss = nll + hparams.kl_factor * kl + decay
        if loss < hparams.v_stop_loss or iteration == hparams.v_num_grad_steps - 1:
            break
        loss.backward()
        optimizer.step()
        steps += 1
        limit = hparams.clamp_norm_factor * h0.norm()
        if delta.norm() > limit:
            with torch.no_grad():
                delta.mul_(limit / delta.norm())
    return h0.double() + delta.detach().double(), float(loss.detach()), steps
