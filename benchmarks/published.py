"""The published algorithms as plainly as they were published: the baseline of the benchmarks and the tests' oracle.

Written from the description of memit's compute_z, compute_ks and execute_memit, of rome's compute_v and layer_stats,
of PMET's compute_zs, of UltraEdit's cache and AnyEdit's chunks; it shares nothing with the package but token ids and
hyper-parameters. One request at a time; for each iteration the whole model runs on the request's prompts, and the head
on all their positions, twice where the published code does so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

ADAM = dict(betas=(0.9, 0.999), eps=1e-8)


@dataclass
class Value:
    """What one request's loop ended with."""

    targets: list[torch.Tensor]
    """The value of each site [h], fp64."""
    deltas: list[torch.Tensor]
    """What the loop added at each site [h]."""
    loss: float
    steps: int
    losses: list[float] = field(default_factory=list)
    """The loss of every iteration."""


def first(output: Any) -> torch.Tensor:
    """The hidden states in what a module returns [rows, T, size]; those of a module that sees all tokens of one row as
    rows of their own (OPT's MLP) get a dimension, on the same memory."""
    states = output[0] if isinstance(output, tuple) else output
    return states[None] if states.ndim == 2 else states


def padded(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Input ids, attention mask and positions of rows padded on `side`."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, where] = torch.tensor(list(row))
        mask[i, where] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {name: t.to(device) for name, t in
            (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions))}  # fmt: skip


@contextlib.contextmanager
def deltas_at(modules: Sequence[torch.nn.Module], deltas: Sequence[torch.Tensor], at: torch.Tensor) -> Iterator[None]:
    """Add deltas[m] to the output of modules[m] at token at[r] of every row r."""

    def hook_for(delta: torch.Tensor):
        def hook(module, args, output):
            states = (output[0] if isinstance(output, tuple) else output).clone()
            hidden = first(states)
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            hidden[rows, at] = hidden[rows, at] + delta.to(hidden.dtype)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    with contextlib.ExitStack() as stack:
        for module, delta in zip(modules, deltas, strict=True):
            stack.callback(module.register_forward_hook(hook_for(delta)).remove)
        yield


def _log_softmax(states: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(states if states.dtype == torch.float64 else states.float(), -1)


def _batches(rows: list[list[int]], side: str | None, device: torch.device) -> list[tuple[slice, dict, torch.Tensor]]:
    """(which rows, inputs, first token of each row) of one padded batch, or of every row by itself for side None."""
    if side is not None:
        inputs = padded(rows, side, device)
        offsets = inputs["input_ids"].shape[1] - inputs["attention_mask"].sum(1) if side == "left" else None
        return [(slice(0, len(rows)), inputs, torch.zeros(len(rows), dtype=torch.int64, device=device)
                 if offsets is None else offsets)]  # fmt: skip
    alone = []
    for i, row in enumerate(rows):
        inputs = {"input_ids": torch.tensor([row], device=device)}
        alone.append((slice(i, i + 1), inputs, torch.zeros(1, dtype=torch.int64, device=device)))
    return alone


def serial_value(
    model: torch.nn.Module,
    modules: Sequence[torch.nn.Module],
    prepared: Any,
    hparams: Any,
    *,
    side: str | None = "right",
    pmet: bool = False,
    most_probable_steps: int = 0,
) -> Value:
    """The published loop for one request, deltas living at the outputs of `modules`.

    Args:
        model: the whole causal language model.
        modules: a block (memit), an MLP (rome), or attention and MLP (pmet).
        prepared: a kedit_fast PreparedRequest: token ids and lookup positions.
        hparams: v_lr, v_num_grad_steps, v_weight_decay, clamp_norm_factor, kl_factor, v_stop_loss; and, which no
            published code has, kl_temperature and kl_direction.
        side: pad the request's prompts into one batch on this side, as the published code does; None runs each
            unpadded prompt alone, which no padding can make wrong.
        pmet: PMET's rule: the likelihood weighs a tenth after every target token was the argmax, and the loop ends
            when the KL term is at most 0.01 then.
        most_probable_steps: ENCORE's rule with prob_cutoff = -(this + 1): end at the iteration that follows so many in
            which every target token was the argmax in the contexts with a prefix; 0 for never.
    """
    device = model.get_input_embeddings().weight.device
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    target = list(prepared.target)
    rewriting = [([*p.ids, *target[:-1]], p.lookup, len(p.ids) - 1) for p in prepared.rewriting]
    rows = [row for row, _, _ in rewriting] + [list(prepared.kl.ids)]
    lookups = torch.tensor([lookup for _, lookup, _ in rewriting] + [prepared.kl.lookup], device=device)
    starts = torch.tensor([start for _, _, start in rewriting], device=device)
    contexts = len(rewriting)
    batches = _batches(rows, side, device)
    target_ids = torch.tensor(target, device=device)

    outputs: list[torch.Tensor] = [torch.empty(0)] * len(modules)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        which, inputs, offset = batches[0]
        for m, module in enumerate(modules):

            def record(_, __, output, m=m):
                outputs[m] = first(output)[0, lookups[0] + offset[0]].detach().clone()

            stack.callback(module.register_forward_hook(record).remove)
        model(**inputs, use_cache=False)
    wide = torch.float64 if outputs[0].dtype == torch.float64 else torch.float32
    initial = [state.to(wide) for state in outputs]
    deltas = [torch.zeros_like(state, requires_grad=True) for state in initial]
    optimizer = torch.optim.Adam(deltas, lr=hparams.v_lr, **ADAM)
    head = model.get_output_embeddings()
    reference, factor, right, history, steps = None, 1.0, 0, [], 0
    for iteration in range(hparams.v_num_grad_steps):
        optimizer.zero_grad()
        scores, tops, current = [], [], None
        for which, inputs, offset in batches:
            at = lookups[which] + offset
            last: list[torch.Tensor] = []
            handle = head.register_forward_pre_hook(lambda _, args, last=last: last.append(args[0]))
            with deltas_at(modules, deltas, at):
                logits = model(**inputs, use_cache=False).logits  # [rows, T, V]
            handle.remove()
            here = range(*which.indices(len(rows)))
            if here[-1] == contexts:
                current = _log_softmax(logits[-1, at[-1]] / hparams.kl_temperature)
            scored = [r for r in here if r < contexts]
            if not scored:
                continue
            if side is not None:  # published: the head once more, on all positions of the scored rows
                logits = head(last[0][: len(scored)])
                if cap := getattr(model.config, "final_logit_softcapping", None):
                    logits = cap * torch.tanh(logits / cap)
            log_probs = _log_softmax(logits)
            for i, r in enumerate(scored):
                begin = int(starts[r] + offset[i])
                answer = log_probs[i, begin : begin + len(target)]
                scores.append(answer.gather(1, target_ids[:, None])[:, 0])
                tops.append(bool((answer.argmax(1) == target_ids).all()))
        reference = current.detach().clone() if reference is None else reference
        nll = -torch.stack(scores).mean(1).mean()
        pair = (current, reference) if hparams.kl_direction == "original" else (reference, current)  # KL(second, first)
        kl = torch.nn.functional.kl_div(*pair, log_target=True, reduction="sum")
        kl = hparams.kl_factor * hparams.kl_temperature**2 * kl
        decay = sum(d.norm() / h.norm() ** 2 for d, h in zip(deltas, initial, strict=True))
        loss = factor * nll + kl + hparams.v_weight_decay * decay
        history.append(float(loss.detach()))
        if loss < hparams.v_stop_loss:
            break
        if pmet:
            factor = 0.1 if all(tops) else 1.0
            if all(tops) and kl <= 0.01:
                break
        if most_probable_steps:
            right += all(tops[1:] or tops)
            if right > most_probable_steps:
                break
        if iteration == hparams.v_num_grad_steps - 1:
            break
        loss.backward()
        optimizer.step()
        steps += 1
        _clamp_(deltas, initial, hparams.clamp_norm_factor)
    return _value(deltas, initial, steps, history)


@torch.no_grad()
def _clamp_(deltas: Sequence[torch.Tensor], initial: Sequence[torch.Tensor], factor: float) -> None:
    """Keep each |delta| at most `factor` times that of the state that it is added to."""
    for delta, state in zip(deltas, initial, strict=True):
        limit = factor * state.norm()
        if delta.norm() > limit:
            delta.mul_(limit / delta.norm())


def _value(deltas: Sequence[torch.Tensor], initial: Sequence[torch.Tensor], steps: int, history: list[float]) -> Value:
    """The value of a loop that has ended."""
    done = [delta.detach() for delta in deltas]
    targets = [state.double() + delta.double() for state, delta in zip(initial, done, strict=True)]
    return Value(targets, done, history[-1], steps, history)


def serial_chunks(
    model: torch.nn.Module,
    modules: Sequence[torch.nn.Module],
    prepared: Any,
    hparams: Any,
) -> list[Value]:
    """AnyEdit's loop for one request: its target in chunks, each with a delta at the token before it, one by one.

    The deltas of earlier chunks are added where they were found. There is no KL term. Every context runs alone,
    without padding.

    Args:
        model, modules, prepared: as `serial_value` takes them.
        hparams: chunk_tokens, chunk_overlap, v_lr, v_num_grad_steps, v_weight_decay, clamp_norm_factor, v_stop_loss.

    Returns:
        the value of each chunk.
    """
    device = model.get_input_embeddings().weight.device
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    target, begin = list(prepared.target), 0
    done: list[tuple[int, Value]] = []  # first token of the chunk in the target, and its value
    while begin < len(target):
        end = min(begin + hparams.chunk_tokens, len(target))
        answer = torch.tensor(target[begin:end], device=device)
        rows = [[*prompt.ids, *target[: end - 1]] for prompt in prepared.rewriting]
        starts = [len(prompt.ids) - 1 for prompt in prepared.rewriting]

        def run(row: list[int], start: int, deltas: Sequence[torch.Tensor], begin: int = begin) -> torch.Tensor:
            """Logits of one context, with the deltas of earlier chunks and of this one."""
            with contextlib.ExitStack() as stack:
                for other, value in done:
                    stack.enter_context(deltas_at(modules, value.deltas, torch.tensor([start + other])))
                stack.enter_context(deltas_at(modules, deltas, torch.tensor([start + begin])))
                return model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0]

        seen: list[torch.Tensor] = [torch.empty(0)] * len(modules)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for m, module in enumerate(modules):

                def record(_, __, output, m=m, at=starts[0] + begin, seen=seen):
                    seen[m] = first(output)[0, at].detach().clone()

                stack.callback(module.register_forward_hook(record).remove)
            model(input_ids=torch.tensor([rows[0]], device=device), use_cache=False)
        wide = torch.float64 if seen[0].dtype == torch.float64 else torch.float32
        initial = [state.to(wide) for state in seen]
        deltas = [torch.zeros_like(state, requires_grad=True) for state in initial]
        optimizer = torch.optim.Adam(deltas, lr=hparams.v_lr, **ADAM)
        history, steps = [], 0
        for iteration in range(hparams.v_num_grad_steps):
            optimizer.zero_grad()
            scores = []
            for row, start in zip(rows, starts, strict=True):
                log_probs = _log_softmax(run(row, start, deltas))[start + begin : start + end]
                scores.append(log_probs.gather(1, answer[:, None]).mean())
            decay = sum(d.norm() / h.norm() ** 2 for d, h in zip(deltas, initial, strict=True))
            loss = -torch.stack(scores).mean() + hparams.v_weight_decay * decay
            history.append(float(loss.detach()))
            if loss < hparams.v_stop_loss or iteration == hparams.v_num_grad_steps - 1:
                break
            loss.backward()
            optimizer.step()
            steps += 1
            _clamp_(deltas, initial, hparams.clamp_norm_factor)
        done.append((begin, _value(deltas, initial, steps, history)))
        begin += hparams.chunk_tokens - hparams.chunk_overlap
    return [value for _, value in done]


def see_inputs(module: torch.nn.Module, captured: list[torch.Tensor]) -> Any:
    """A hook that adds the input of a module in each pass; of experts the stacked keys [1, T, E m]."""
    if getattr(module, "down_proj", torch.empty(())).ndim == 3:
        return module.register_forward_pre_hook(
            lambda each, args, kwargs: captured.append(stacked_keys(each, (*args, *kwargs.values()))[None]),
            with_kwargs=True,
        )
    return module.register_forward_pre_hook(lambda _, args: captured.append(first(args).clone()))


def stacked_keys(module: Any, arguments: Sequence[torch.Tensor]) -> torch.Tensor:
    """The keys [T, E m] of the stacked matrix of experts, from autograd alone.

    A token's output is W k + b, so the gradient of its first number by the first row of W is k.
    """
    weight = module.down_proj
    wanted = weight.requires_grad
    weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            out = type(module).forward(module, *(each.detach() for each in arguments))
            rows = out.flatten(0, -2)[:, 0]
            slopes = [torch.autograd.grad(row, weight, retain_graph=True)[0] for row in rows]
    finally:
        weight.requires_grad_(wanted)
    return torch.stack([(slope[:, :, 0] if module.is_transposed else slope[:, 0]).flatten() for slope in slopes])


@torch.no_grad()
def keys_at(
    model: torch.nn.Module, module: torch.nn.Module, prompts: Sequence[Any], output: bool, side: str | None = "right"
) -> torch.Tensor:
    """Input (or output) of `module` at the lookup token of every prompt [n, size]: full passes of 128 prompts, head
    and all, as repr_tools does; for side None every prompt alone, without padding. Inputs of experts are
    `stacked_keys`, for side None alone."""
    device = model.get_input_embeddings().weight.device
    states = []
    together = 1 if side is None else 128
    for begin in range(0, len(prompts), together):
        chunk = prompts[begin : begin + together]
        captured: list[torch.Tensor] = []
        if output:
            handle = module.register_forward_hook(lambda _, __, out, at=captured: at.append(first(out).clone()))
        else:
            handle = see_inputs(module, captured)
        rows = [list(prompt.ids) for prompt in chunk]
        inputs = {"input_ids": torch.tensor(rows, device=device)} if side is None else padded(rows, side, device)
        model(**inputs, use_cache=False)
        handle.remove()
        every = torch.arange(len(chunk), device=device)
        states.append(captured[0][every, torch.tensor([p.lookup for p in chunk], device=device)])
    return torch.cat(states)


def memit(
    model: torch.nn.Module,
    blocks: Sequence[torch.nn.Module],
    edited: Mapping[int, torch.nn.Module],
    weights: Mapping[int, torch.Tensor],
    moments: Mapping[int, torch.Tensor],
    prepared: Sequence[Any],
    hparams: Any,
    *,
    targets: torch.Tensor | None = None,
    side: str | None = "right",
) -> dict[int, torch.Tensor]:
    """The published MEMIT pipeline: serial values, a full pass a layer for keys and for outputs, dense fp64 solves.

    Args:
        model, blocks: the model and its decoder blocks.
        edited: layer -> the linear module whose inputs are keys, or an experts module.
        weights: layer -> its weight [out, d], or [E, h, m]; written.
        moments: layer -> C [d, d] fp64.
        prepared: u requests.
        hparams: as in kedit_fast.
        targets: values [h, u] to use instead of optimizing them.
        side: of the padding, as `serial_value` and `keys_at` take it.

    Returns:
        layer -> Delta [out, d] that was added, fp64.
    """
    last = hparams.layers[-1]
    if targets is None:
        values = [serial_value(model, [blocks[last]], request, hparams, side=side) for request in prepared]
        targets = torch.stack([value.targets[0] for value in values], 1)
    written = {}
    contexts = len(prepared[0].rewriting)
    for i, layer in enumerate(hparams.layers):
        every = [prompt for request in prepared for prompt in request.rewriting]
        keys = (
            keys_at(model, edited[layer], every, output=False, side=side)
            .double()
            .unflatten(0, (len(prepared), contexts))
        )
        mean = keys[:, 0] if contexts == 1 else (keys[:, 0] + keys[:, 1:].mean(1)) / 2
        keys = mean.T  # [d, u]
        bare = [request.rewriting[0] for request in prepared]
        current = keys_at(model, blocks[last], bare, output=True, side=side).double().T
        residual = (targets.to(current) - current) / (len(hparams.layers) - i)
        adjusted = torch.linalg.solve(hparams.mom2_update_weight * moments[layer] + keys @ keys.T, keys)
        written[layer] = residual @ adjusted.T
        with torch.no_grad():
            weights[layer].add_(as_stored(written[layer], weights[layer]))
    return written


def as_stored(update: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """An update [out, d] in a weight's dtype, and by expert [E, h, m] where the weight is."""
    if weight.ndim == 3:
        update = update.unflatten(1, (weight.shape[0], weight.shape[2])).transpose(0, 1)
    return update.to(weight.dtype)


@torch.no_grad()
def anyedit(
    model: torch.nn.Module,
    blocks: Sequence[torch.nn.Module],
    edited: Mapping[int, torch.nn.Module],
    weights: Mapping[int, torch.Tensor],
    prepared: Sequence[Any],
    hparams: Any,
    *,
    moments: Mapping[int, torch.Tensor] | None = None,
    projectors: Mapping[int, torch.Tensor] | None = None,
) -> dict[int, torch.Tensor]:
    """The published AnyEdit pipeline: serial values, a full pass a layer for keys and outputs, dense fp64 solves.

    Args:
        model, blocks, edited, weights, prepared, hparams: as `memit` takes them; the bare prompt alone counts.
        moments: layer -> C [d, d] fp64, for the form with MEMIT's system.
        projectors: layer -> P [d, d] fp64 instead, for the form with AlphaEdit's.

    Returns:
        layer -> Delta [out, d] that was added, fp64.
    """
    last = hparams.layers[-1]
    with torch.enable_grad():
        values = [serial_chunks(model, [blocks[last]], request, hparams) for request in prepared]
    targets = torch.stack([value.targets[0] for one in values for value in one], 1)
    step = hparams.chunk_tokens - hparams.chunk_overlap
    written = {}
    for i, layer in enumerate(hparams.layers):
        columns, current, others = [], [], []
        for request in prepared:
            prompt = request.rewriting[0]
            ids = torch.tensor([[*prompt.ids, *request.target]])
            places = [len(prompt.ids) - 1 + begin for begin in range(0, len(request.target), step)]
            keys: list[torch.Tensor] = []
            outputs: list[torch.Tensor] = []
            hooks = [
                edited[layer].register_forward_pre_hook(lambda _, args, at=keys: at.append(first(args)[0].double())),
                blocks[last].register_forward_hook(lambda _, __, out, at=outputs: at.append(first(out)[0].double())),
            ]
            model(input_ids=ids, use_cache=False)
            for hook in hooks:
                hook.remove()
            columns.append(keys[0][places])
            current.append(outputs[0][places])
            others.append(keys[0][[place for place in range(ids.shape[1]) if place not in places]])
        k, k_p = torch.cat(columns).T, torch.cat(others).T
        residual = (targets - torch.cat(current).T) / (len(hparams.layers) - i)
        outer = k @ k.T + (k_p @ k_p.T if hparams.keep_other_tokens else 0)
        if projectors is not None:
            system = projectors[layer] @ outer + hparams.L2 * torch.eye(len(outer), dtype=torch.float64)
            written[layer] = torch.linalg.solve(system, projectors[layer] @ k @ residual.T).T
        else:
            assert moments is not None
            written[layer] = residual @ torch.linalg.solve(hparams.mom2_update_weight * moments[layer] + outer, k).T
        weights[layer].add_(written[layer].to(weights[layer].dtype))
    return written


def serial_gradients(
    model: torch.nn.Module, modules: Sequence[torch.nn.Module], prepared: Any, *, every_token: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """UltraEdit's keys and value gradients of one request: cross entropy of the bare prompt's target, one backward.

    Returns:
        for each module its inputs [T, d] and the gradient of its outputs [T, out] at the tokens that predict the
        answer, or at every token.
    """
    device = model.get_input_embeddings().weight.device
    prompt, target = prepared.rewriting[0], list(prepared.target)
    inputs = torch.tensor([[*prompt.ids, *target[:-1]]], device=device)
    start = len(prompt.ids) - 1
    where = slice(0, inputs.shape[1]) if every_token else slice(start, start + len(target))
    keys: list[torch.Tensor] = [torch.empty(0)] * len(modules)
    outputs: list[torch.Tensor] = [torch.empty(0)] * len(modules)
    with torch.enable_grad(), contextlib.ExitStack() as stack:
        for m, module in enumerate(modules):

            def hook(_, args, output, m=m):
                keys[m] = args[0][0, where].detach()
                outputs[m] = output if output.requires_grad else output.requires_grad_(True)
                return outputs[m]

            stack.callback(module.register_forward_hook(hook).remove)
        logits = model(input_ids=inputs, use_cache=False).logits[0, start : start + len(target)]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = torch.nn.functional.cross_entropy(wide, torch.tensor(target, device=device))
        gradients = torch.autograd.grad(loss, outputs)
    return keys, [gradient[0, where] for gradient in gradients]


GROUP = 100  # documents that layer_stats sorts and batches together


def length_batches(sequences: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[Sequence[int]]]:
    """layer_stats' length collation: every hundred documents, longest first, in batches of padded tokens.

    As there, a batch is closed once it is over the budget, so it may be over it by one sequence.
    """
    for begin in range(0, len(sequences), GROUP):
        batch: list[Sequence[int]] = []
        for sequence in sorted(sequences[begin : begin + GROUP], key=len, reverse=True):
            if batch and len(batch[0]) * (len(batch) + 1) > batch_tokens:
                yield batch
                batch = []
            batch.append(sequence)
        yield batch


class _Stop(Exception):
    pass


@torch.no_grad()
def layer_moment(
    model: torch.nn.Module, module: torch.nn.Module, sequences: Sequence[Sequence[int]], batch_tokens: int
) -> tuple[torch.Tensor, int]:
    """layer_stats of one layer: a pass of the model up to `module`, the rows of real tokens gathered, in fp32
    `mom2 += a.t().mm(a)`; returns the sum [d, d] and the tokens."""
    device = model.get_input_embeddings().weight.device
    total, count = None, 0

    def stop(_, args):
        captured.append(args[0])
        raise _Stop

    for rows in length_batches(sequences, batch_tokens):
        captured: list[torch.Tensor] = []
        batch = padded(rows, "right", device)
        handle = module.register_forward_pre_hook(stop)
        with contextlib.suppress(_Stop):
            model(**batch, use_cache=False)
        handle.remove()
        flat = captured[0].view(-1, captured[0].size(-1))
        features = flat[batch["attention_mask"].view(-1).nonzero()[:, 0]].to(torch.float32)
        if total is None:
            total = features.new_zeros(features.shape[1], features.shape[1])
        count += len(features)
        total += features.t().mm(features)
    assert total is not None
    return total, count
