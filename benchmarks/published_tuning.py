"""The published loops of methods that tune a matrix, as plainly as they were published.

Each iteration runs the whole model on padded rows and the head on all their positions. Written from the description of
EasyEdit's FT, WISE, GRACE and DINM and of LocFT-BF; it shares nothing with the package but token ids. Their faults in
reading padding are not repeated, so that results can be compared; `side=None` runs every row alone, without padding.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div

from benchmarks.published import padded

Side = str | None


@dataclass(frozen=True)
class Text:
    """A row of tokens, of which the last `len(target)` are to be said."""

    prompt: tuple[int, ...]
    target: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.prompt, *self.target)


@dataclass
class Tuned:
    """What a loop ended with."""

    weight: torch.Tensor
    """[h, d]."""
    losses: list[float] = field(default_factory=list)
    """Of each forward pass, or the mean of each epoch."""
    thresholds: list[float] = field(default_factory=list)
    """WISE: the mean activation change of each request where its loop ended."""


def logits_of(model: Any, rows: Sequence[Sequence[int]], side: Side) -> list[torch.Tensor]:
    """The logits [T, V] of each row."""
    device = model.get_input_embeddings().weight.device
    if side is None:
        return [model(input_ids=torch.tensor([list(row)], device=device)).logits[0] for row in rows]
    batch = padded(rows, side, device)
    every = model(**batch).logits
    return [every[i][mask.bool()] for i, mask in enumerate(batch["attention_mask"])]


def likelihoods(model: Any, texts: Sequence[Text], side: Side, extra: int = 0) -> torch.Tensor:
    """[R] mean cross entropy of each target; `extra` is added to what its sum is divided by."""
    losses = []
    for text, logits in zip(texts, logits_of(model, [text.ids for text in texts], side), strict=True):
        labels = torch.tensor(text.target, device=logits.device)
        total = cross_entropy(logits[len(text.prompt) - 1 : -1].float(), labels, reduction="sum")
        losses.append(total / (len(text.target) + extra))
    return torch.stack(losses)


def last_likelihoods(model: Any, texts: Sequence[Text], side: Side) -> torch.Tensor:
    """[R] FT-L's loss: all target tokens from the distribution at the prompt's last token."""
    losses = []
    for text, logits in zip(texts, logits_of(model, [text.prompt for text in texts], side), strict=True):
        losses.append(-torch.log_softmax(logits[-1].float(), -1)[list(text.target)].mean())
    return torch.stack(losses)


@contextlib.contextmanager
def only_trained(model: torch.nn.Module, parameter: torch.nn.Parameter) -> Iterator[None]:
    """Inside the block one parameter has gradients; after it, it is what it was before."""
    before, required = parameter.detach().clone(), [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    parameter.requires_grad_(True)
    try:
        yield
    finally:
        parameter.requires_grad_(False)
        parameter.copy_(before)
        for other in required:
            other.requires_grad_(True)
        parameter.grad = None


def fine_tune(
    model: Any,
    parameter: torch.nn.Parameter,
    groups: Sequence[Sequence[Text]],
    *,
    epochs: int,
    lr: float,
    skip: float = 1e-2,
    bound: float = 0.0,
    at_last: bool = False,
    minibatch: int = 0,
    seed: int | None = None,
    side: Side = "left",
) -> Tuned:
    """FT-L, FT-M (one group at a time) or LocFT-BF: `minibatch` requests of all groups together, shuffled.

    Returns the parameter as it is stored.
    """
    loss_of: Callable[..., torch.Tensor] = last_likelihoods if at_last else likelihoods
    texts = [text for group in groups for text in group]
    loops = [[list(group)] for group in groups] if not minibatch else [None]
    order = random.Random(seed)
    places = list(range(len(texts)))
    losses: list[float] = []
    with only_trained(model, parameter):
        original = parameter.detach().clone()
        for loop in loops:
            optimizer = torch.optim.Adam([parameter], lr=lr)
            for _ in range(epochs):
                batches = loop
                if batches is None:
                    order.shuffle(places)
                    batches = [[texts[i] for i in places[b : b + minibatch]] for b in range(0, len(places), minibatch)]
                seen = []
                for batch in batches:
                    optimizer.zero_grad()
                    loss = loss_of(model, batch, side).mean()
                    seen.append((loss.item(), len(batch)))
                    if loss.item() >= skip:
                        loss.backward()
                        optimizer.step()
                    if bound:
                        with torch.no_grad():
                            parameter.clamp_(original - bound, original + bound)
                losses.append(sum(loss * count for loss, count in seen) / sum(count for _, count in seen))
                if losses[-1] < skip:
                    break
        return Tuned(parameter.detach().clone(), losses)


def wise(
    model: Any,
    module: Any,
    requests: Sequence[tuple[Sequence[Text], Text]],
    activation: Callable[[torch.Tensor], torch.Tensor],
    mask: torch.Tensor,
    *,
    num_steps: int,
    lr: float,
    decay: float,
    bound: float,
    margins: Sequence[float],
    stop_loss: float,
    stop_change: float,
    side: Side = "left",
) -> Tuned:
    """WISE's edits, one after another, in one shard: the target's likelihood and the margin to an unrelated text.

    Args:
        model: the model; it stays as it is.
        module: the layer whose weight [h, d] (Conv1D [d, h]) is copied.
        requests: rows of each request, and an unrelated text.
        activation: of the model.
        mask: [h, d] int64, entries that have gradients.
        num_steps, lr, decay, bound, margins, stop_loss, stop_change: as in its files; decay is that of torch's SGD.
        side: of the padding.
    """
    transposed = type(module).__name__ == "Conv1D"
    original = (module.weight.T if transposed else module.weight).detach()
    weight = torch.nn.Parameter(original.clone())
    bias = None if module.bias is None else module.bias.detach()
    both: list[tuple[torch.Tensor, torch.Tensor]] = []

    def adapter(_: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        both.append((tuned(args[0]), output))
        return both[-1][0]

    def tuned(x: torch.Tensor) -> torch.Tensor:
        """The outputs of the copy, by the product that the module itself runs."""
        if not transposed:
            return torch.nn.functional.linear(x, weight, bias)
        assert bias is not None
        return torch.addmm(bias, x.flatten(0, -2), weight.T).view(*x.shape[:-1], -1)

    def positive(values: torch.Tensor) -> torch.Tensor:
        chosen = values[values > 0]
        return chosen.mean() if len(chosen) else values.new_zeros(())

    def changes(rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """[R] mean activation change of the tokens of each row."""
        parts = []
        for new, old in both:
            parts += list(torch.linalg.vector_norm(activation(new) - activation(old), dim=-1))
        both.clear()
        cut = [part[-len(row) :] if side == "left" else part[: len(row)] for part, row in zip(parts, rows, strict=True)]
        return torch.stack([part.mean() for part in cut])

    result = Tuned(weight.detach())
    alpha, beta, gamma = margins
    model.requires_grad_(False)
    handle = module.register_forward_hook(adapter)
    try:
        for texts, unrelated in requests:
            optimizer = torch.optim.SGD([weight], lr=lr, weight_decay=decay)
            earlier, last = 0.0, 1e9
            rows = [*texts, unrelated]
            for step in range(num_steps):
                optimizer.zero_grad()
                target = likelihood_of_rows(model, rows, side)
                inside = changes([text.ids for text in rows])
                inside, outside = inside[:-1], inside[-1:]
                margin = positive(outside - inside + gamma) + positive(outside - alpha) + positive(beta - inside)
                loss = target + margin
                stop = abs(last - earlier) <= stop_change and last <= stop_loss
                if stop or step == num_steps - 1:
                    result.thresholds.append(inside.mean().item())
                if stop:
                    break
                loss.backward()
                assert weight.grad is not None
                weight.grad = (weight.grad.reshape(-1) * mask.reshape(-1)).view_as(weight)
                optimizer.step()
                if bound:
                    with torch.no_grad():
                        weight.copy_(torch.clamp(weight, min=original - bound, max=original + bound))
                earlier, last = last, loss.item()
                result.losses.append(last)
    finally:
        handle.remove()
    result.weight = weight.detach()
    return result


def likelihood_of_rows(model: Any, rows: Sequence[Text], side: Side) -> torch.Tensor:
    """[] the mean over the rows that have a target; all of them run."""
    logits = logits_of(model, [text.ids for text in rows], side)
    losses = [
        cross_entropy(part[len(text.prompt) - 1 : -1].float(), torch.tensor(text.target, device=part.device))
        for text, part in zip(rows, logits, strict=True)
        if text.target
    ]
    return torch.stack(losses).mean()


def dinm(
    model: Any,
    parameter: torch.nn.Parameter,
    requests: Sequence[tuple[Text, Text]],
    *,
    num_steps: int,
    lr: float,
    edit_factor: float,
    stop_loss: float = 1e-4,
    side: Side = "left",
) -> Tuned:
    """DINM's descent of each request in a layer that was located.

    The loss is that of a safe answer, and the KL divergence at a general prompt with its answer, from the prompt's last
    token on. The divergence has a gradient here; as released it has none.
    """
    losses = []
    with only_trained(model, parameter):
        for safe, general in requests:
            optimizer = torch.optim.Adam([parameter], lr=lr)
            count = len(general.target) + 1
            with torch.no_grad():
                before = logits_of(model, [general.ids], side)[0][-count:].float().log_softmax(-1)
            for _ in range(num_steps):
                optimizer.zero_grad()
                edit = likelihoods(model, [safe], side).mean()
                after = logits_of(model, [general.ids], side)[0][-count:].float().log_softmax(-1)
                divergence = kl_div(after, before, reduction="none", log_target=True).sum(-1).mean()
                loss = edit_factor * edit + divergence
                losses.append(loss.item())
                if loss.item() < stop_loss:
                    break
                loss.backward()
                optimizer.step()
        return Tuned(parameter.detach().clone(), losses)


@dataclass
class Codebook:
    """GRACE's."""

    keys: torch.Tensor
    """[K, d]."""
    values: torch.Tensor
    """[K, h]."""
    radii: torch.Tensor
    """[K]."""
    labels: list[tuple[int, ...]]
    """[K] target ids."""


def grace(
    model: Any,
    module: Any,
    texts: Sequence[Text],
    *,
    num_steps: int,
    lr: float,
    eps: float,
    warm: bool = True,
    seed: int = 0,
) -> Codebook:
    """GRACE's edits, one after another: a key, and a value that takes the layer's place at the prompt's last token.

    Labels are equal where target ids are. A query at a key itself replaces the entry's label and trains it again.
    """
    book: Codebook | None = None
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for text in texts:
        at = len(text.prompt) - 1
        ids = torch.tensor([text.ids], device=module.weight.device)
        labels = torch.tensor([[-100] * len(text.prompt) + list(text.target)], device=ids.device)
        optimizers: list[torch.optim.Optimizer] = []

        def enter(query: torch.Tensor, output: torch.Tensor, text: Text = text) -> None:
            """Update keys, radii and labels; leaves the entry that this edit trains."""
            nonlocal book
            value = output if warm else torch.rand(output.shape, generator=generator).to(output)
            new = Codebook(query[None], value[None].clone(), query.new_full((1,), eps), [text.target])
            if book is None:
                book = new
                return
            distances = torch.cdist(query[None], book.keys)[0]
            near = int(distances.argmin())
            gap = float(torch.linalg.vector_norm(book.keys[near] - query))
            if gap <= 1e-6 * float(query.norm()):
                book.labels[near] = text.target
                return
            same = book.labels[near] == text.target
            if gap > eps + float(book.radii[near]) or not same:
                keys, values, radii = (
                    torch.cat([getattr(book, n), getattr(new, n)]) for n in ("keys", "values", "radii")
                )
                if gap <= eps + float(book.radii[near]):
                    radii[near], radii[-1] = gap / 2 - 1e-5, gap / 2
                book = Codebook(keys, values, radii, [*book.labels, text.target])
            elif gap > float(book.radii[near]):
                book.radii[near] = gap

        for step in range(num_steps):

            def adapter(
                _: torch.nn.Module,
                args: tuple,
                output: torch.Tensor,
                step: int = step,
                at: int = at,
                enter: Callable[..., None] = enter,
                optimizers: list[torch.optim.Optimizer] = optimizers,
            ) -> torch.Tensor:
                query = args[0][0, at].detach()
                if step == 0:
                    enter(query, output[0, at].detach())
                    assert book is not None
                    book.values = book.values.detach().requires_grad_(True)
                    optimizers.append(torch.optim.Adam([book.values], lr=lr))
                assert book is not None
                distances = torch.cdist(query[None], book.keys)[0]
                near = int(distances.argmin())
                if float(distances[near]) > float(book.radii[near]):
                    return output
                changed = output.clone()
                changed[0, at] = book.values[near]
                return changed

            handle = module.register_forward_hook(adapter)
            try:
                loss = model(input_ids=ids, labels=labels).loss
            finally:
                handle.remove()
            (optimizer,) = optimizers
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
        assert book is not None
        book.values = book.values.detach()
    assert book is not None
    return book
