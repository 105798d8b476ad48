"""Our transcription of published algorithms that locate facts: the baselines of `benchmarks/locating.py`.

Causal tracing is that of rome's experiments/causal_trace.py (commit 0874014), written from its description: for each
token and layer one pass of the whole model over a clean row and the rows with noise, the head at all tokens, and a
softmax of the last one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy
import torch


class Traced(NamedTuple):
    """What the published loop gives for one prompt."""

    scores: torch.Tensor
    """[T, L] float64, probability of the answer with one state, or a window of them, restored."""
    low: float
    """Probability with noise and nothing restored."""
    high: float
    """Probability without noise."""
    answer: int
    """The most probable token without noise."""


@contextlib.contextmanager
def _hooks(hooks: Sequence[tuple[torch.nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _states(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def published_trace(
    model: Any,
    modules: Sequence[torch.nn.Module],
    ids: Sequence[int],
    subject: tuple[int, int],
    kind: Literal["block", "mlp", "attention"],
    noise: float,
    window: int = 10,
    samples: int = 10,
    seed: int = 1,
    cells: Sequence[tuple[int, int]] | None = None,
) -> Traced:
    """Trace one prompt, a pass a cell.

    Args:
        model: the causal language model.
        modules: of each layer what is restored: its block, MLP or attention.
        ids: of the prompt.
        subject: its first token and the one after its last.
        kind: "block" restores one layer, others a window of `window`.
        noise: standard deviation.
        window: layers.
        samples: of noise; a pass has one row more, without noise.
        seed: of the noise, which is drawn anew and the same in each pass.
        cells: (token, layer) to trace, others stay NaN; None for all.
    """
    begin, end = subject
    rows = torch.tensor([list(ids)] * (samples + 1), device=model.get_input_embeddings().weight.device)
    layers = len(modules)

    def run(token: int | None = None, restored: Sequence[int] = ()) -> torch.Tensor:
        random = numpy.random.RandomState(seed)

        def disturb(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            drawn = torch.from_numpy(random.randn(samples, end - begin, output.shape[2]))
            output[1:, begin:end] += (noise * drawn).to(output.device)
            return output

        def restore(module: torch.nn.Module, args: tuple, output: Any) -> Any:
            states = _states(output)
            states[1:, token] = states[0, token]
            return output

        hooks = [(model.get_input_embeddings(), disturb), *((modules[layer], restore) for layer in restored)]
        with _hooks(hooks):
            logits = model(input_ids=rows, use_cache=False).logits
        return torch.softmax(logits[:, -1].float() if logits.dtype != torch.float64 else logits[:, -1], 1)

    shares = run()
    answer = int(shares[0].argmax())
    scores = torch.full((len(ids), layers), float("nan"), dtype=torch.float64)
    every = [(token, layer) for token in range(len(ids)) for layer in range(layers)]
    for token, layer in every if cells is None else cells:
        restored = [layer]
        if kind != "block":
            restored = list(range(max(0, layer - window // 2), min(layers, layer - (-window // 2))))
        scores[token, layer] = float(run(token, restored)[1:, answer].mean())
    return Traced(scores, float(shares[1:, answer].mean()), float(shares[0, answer]), answer)


# --- edge attribution patching ---


class _Graph(NamedTuple):
    """The size of a circuit's graph: sources and targets of all layers."""

    layers: int
    heads: int

    @property
    def sources(self) -> int:
        return 1 + self.layers * (self.heads + 1)

    @property
    def targets(self) -> int:
        return self.layers * (3 * self.heads + 1) + 1


class _HookedGPT2:
    """GPT-2 as TransformerLens runs it for EAP: each head's output and inputs in the size of the residual stream.

    With `use_split_qkv_input` the stream is repeated for the queries, keys and values of each head, [B, T, H, d] three
    times, and normalized in each copy; with `use_attn_result` each head's output is [B, T, H, d].
    """

    def __init__(self, model: Any):
        self.decoder, self.head = model.transformer, model.lm_head
        self.heads = model.config.num_attention_heads
        self.size = model.config.hidden_size // self.heads
        self.layers = len(self.decoder.h)

    def __call__(
        self,
        ids: torch.Tensor,
        output: Callable[[int, torch.Tensor], None] | None = None,
        reads: Callable[[int, torch.Tensor], None] | None = None,
        embedded: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, V]; `output` sees what sources put out, `reads` what targets read, with their first number."""
        heads, size, d = self.heads, self.size, self.heads * self.size
        embedded = self.decoder.wte(ids) if embedded is None else embedded
        assert embedded is not None
        if output:
            output(0, embedded[:, :, None])
        x = embedded + self.decoder.wpe(torch.arange(ids.shape[1]))
        source, target = 1, 0
        for block in self.decoder.h:
            attention, inputs = block.attn, []
            weight = attention.c_attn.weight.view(d, 3, heads, size)
            bias = attention.c_attn.bias.view(3, heads, size)
            for kind in range(3):
                copy = x[:, :, None].expand(-1, -1, heads, -1).clone()
                if reads:
                    reads(target + kind * heads, copy)
                normed = torch.nn.functional.layer_norm(copy, (d,), block.ln_1.weight, block.ln_1.bias, block.ln_1.eps)
                inputs.append(torch.einsum("bthd,dhe->bhte", normed, weight[:, kind]) + bias[kind][:, None])
            z = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
            result = torch.einsum("bhte,hed->bthd", z, attention.c_proj.weight.view(heads, size, d))
            if output:
                output(source, result)
            x = x + result.sum(2) + attention.c_proj.bias
            read = x.clone()
            if reads:
                reads(target + 3 * heads, read)
            out = block.mlp(block.ln_2(read))
            if output:
                output(source + heads, out[:, :, None])
            x = x + out
            source, target = source + heads + 1, target + 3 * heads + 1
        read = x.clone()
        if reads:
            reads(target, read)
        return self.head(self.decoder.ln_f(read))


def published_edge_scores(
    model: Any,
    clean: torch.Tensor,
    corrupted: torch.Tensor,
    answers: torch.Tensor,
    wrongs: torch.Tensor,
    steps: int,
    parameters: bool = True,
) -> torch.Tensor:
    """EAP-IG (inputs) as hannamw/EAP-IG computes it (commit 795f560): [F, V], edges that do not exist included as zero.

    One pass a step; the difference of all sources is [B, T, F, d], and every target's gradient, [B, T, H, d], is
    multiplied with it in every step. Left out, in the baseline's favor: hooks, and norms in several operations.

    Args:
        model: a GPT-2, in evaluation mode.
        clean: [B, T].
        corrupted: [B, T].
        answers: [B].
        wrongs: [B].
        steps: at 0, 1/m, .., (m - 1)/m.
        parameters: whether gradients of parameters are computed too, as the published code does, which does not switch
            them off.
    """
    hooked = _HookedGPT2(model)
    heads, graph = hooked.heads, _Graph(hooked.layers, hooked.heads)
    rows = torch.arange(len(clean))
    model.requires_grad_(parameters)
    difference = torch.zeros(*clean.shape, graph.sources, model.config.hidden_size)
    scores = torch.zeros(graph.sources, graph.targets)

    def add(sign: int) -> Callable[[int, torch.Tensor], None]:
        def output(first: int, states: torch.Tensor) -> None:
            difference[:, :, first : first + states.shape[2]] += sign * states

        return output

    def reads(first: int, states: torch.Tensor) -> None:
        layer, place = divmod(first, 3 * heads + 1)
        before = 1 + layer * (heads + 1) + (heads if place == 3 * heads else 0)
        count = states.shape[2] if states.ndim == 4 else 1

        def score(gradient: torch.Tensor) -> None:
            product = torch.einsum(
                "btfd,btvd->fv", difference[:, :, :before], gradient.view(*gradient.shape[:2], count, -1)
            )
            scores[:before, first : first + count] += product

        states.register_hook(score)

    with torch.no_grad():
        hooked(corrupted, add(1))
        hooked(clean, add(-1))
        ends = hooked.decoder.wte(corrupted), hooked.decoder.wte(clean)
    for step in range(steps):
        embedded = (ends[0] + step / steps * (ends[1] - ends[0])).requires_grad_()
        with torch.enable_grad():
            logits = hooked(clean, reads=reads, embedded=embedded)[:, -1]  # all are computed, as published
            loss = (logits[rows, wrongs] - logits[rows, answers]).mean()
            loss.backward()
        model.zero_grad()
    model.requires_grad_(False)
    return scores / steps
