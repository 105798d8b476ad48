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
