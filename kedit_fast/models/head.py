"""From a decoder's last states to the probabilities of tokens: checked against the model's own logits.

Most models compute logits = scale * (states W^T + b), and some cap them. What a model's configuration says of scale and
cap is believed only after a few short rows gave the model's own logits. Where they do not (an adapter on the head, a
function that is no matrix product, a decoder that gets more than tokens and masks), the model runs whole, and its own
logits are taken.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kedit_fast.errors import KeditError, UnsupportedModelError
from kedit_fast.models.architectures import text_config
from kedit_fast.models.offloaded import device_of, fetched
from kedit_fast.models.patching import evaluation_mode
from kedit_fast.models.sharded import whole
from kedit_fast.models.widened import HALVES, computing, computing_dtype
from kedit_fast.ops import distribution_kl, target_log_probs
from kedit_fast.ops.target_log_probs import TargetLogProbs
from kedit_fast.support.dtypes import accumulation_dtype
from kedit_fast.support.messages import first_line
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_ROWS = (7, 4, 5)  # lengths; the second row is the beginning of the first
_LEAST_CHANGE = 1e-4
_LONGEST = 64  # of a row that is longer than the model's sliding window
NARROW_ERROR, WIDE_ERROR = 0.05, 1e-3
"""Relative differences that are rounding, of 16-bit models and of others, where the same products are rounded."""
NARROW_CHANGE = 0.5
"""The largest relative difference that other shapes of the same products may make, of 16-bit models."""


@dataclass(frozen=True)
class Head:
    """From last states to logits: cap(scale * (states matrix^T + bias)), or the states are the logits."""

    device: torch.device
    """Where logits are computed."""
    matrix: torch.Tensor | None
    """[V, h]; None where the states that passes return are the model's own logits."""
    bias: torch.Tensor | None = None
    """[V] or None."""
    scale: float = 1.0
    """Logits are multiplied by it."""
    softcap: float = 0.0
    """Logits z are replaced by softcap * tanh(z / softcap); 0 for none."""
    rounding: float = 0.0
    """Relative difference of logits between rows alone and rows padded together, which is rounding."""

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The model's logits [n, V] for last states [n, h], in the states' dtype."""
        states = states.to(self.device)
        if self.matrix is None:
            return states
        if states.dtype == self.matrix.dtype:
            logits = states @ self.matrix.T
        else:  # a 16-bit head of a model that is computed in fp32
            logits = torch.cat([states @ part.to(states.dtype).T for part in self.matrix.split(8192)], 1)
        logits = logits if self.bias is None else logits + self.bias
        logits = logits if self.scale == 1 else logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def target_log_probs(
        self, states: torch.Tensor, targets: torch.Tensor, return_top1: bool = False
    ) -> TargetLogProbs:
        """Log probabilities [n] of targets [n] at states [n, h]; see `kedit_fast.ops.target_log_probs`."""
        if self.matrix is not None:
            return target_log_probs(*self._scaled(states), targets, self._scaled_bias(), self.softcap, return_top1)
        log_probs = _log_softmax(states)
        log_prob = log_probs.gather(1, targets[:, None])[:, 0]
        if not return_top1:
            return TargetLogProbs(log_prob, None, None)
        best, top1 = log_probs.detach().max(1)
        return TargetLogProbs(log_prob, top1, best)

    def distribution_kl(
        self, states: torch.Tensor, reference: torch.Tensor, *, temperature: float = 1.0, reverse: bool = False
    ) -> torch.Tensor:
        """KL(p(states) || p(reference)) [n], differentiable in `states`; see `kedit_fast.ops.distribution_kl`.

        Args:
            states: [n, h] last states, or logits [n, V] where `matrix` is None.
            reference: likewise.
            temperature: both distributions are softmax(logits / temperature). States, bias and cap are divided by it,
                which is exact: cap tanh(z / cap) / T = (cap / T) tanh((z / T) / (cap / T)).
            reverse: KL(p(reference) || p(states)) instead.
        """
        if self.matrix is not None:
            states, matrix = self._scaled(states, temperature)
            reference, _ = self._scaled(reference, temperature)
            bias, softcap = self._scaled_bias(temperature), self.softcap / temperature
            return distribution_kl(states, reference, matrix, bias, softcap, reverse=reverse)
        log_p, log_q = (_log_softmax(logits, temperature) for logits in (states, reference))
        first, second = (log_q, log_p) if reverse else (log_p, log_q)
        difference = torch.where(first.isinf(), 0.0, first - second)  # tokens that are never said
        return (first.exp() * difference).sum(1)

    def _scaled(self, states: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.matrix is not None
        factor = self.scale / temperature
        return states if factor == 1 else states * factor, self.matrix

    def _scaled_bias(self, temperature: float = 1.0) -> torch.Tensor | None:
        factor = self.scale / temperature
        return self.bias if self.bias is None or factor == 1 else self.bias * factor


def _log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    logits = logits.to(accumulation_dtype(logits))
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)


def sample_rows(config: Any, vocabulary: int) -> list[list[int]]:
    """Short rows of ordinary tokens for checks of a model; the second one is the beginning of the first.

    Tokens that the configuration gives a meaning of their own (images, padding) are left out. A row is no longer than
    the model takes, and the first one is longer than a short sliding window.
    """
    special = {value for part in (config, text_config(config)) for value in _token_ids(part)}
    wanted = sum(_ROWS)
    ordinary: list[int] = []
    for k in range(4 * wanted):
        token = (k * 7919 + 11) % vocabulary
        if token not in special and token not in ordinary:
            ordinary.append(token)
    ordinary = (ordinary or [0]) * wanted  # of a vocabulary of a few tokens
    window = getattr(text_config(config), "sliding_window", None) or 0
    first = ordinary[: _ROWS[0]]
    if isinstance(window, int) and _ROWS[0] <= window + 2 <= _LONGEST:
        first = [*first, *(ordinary * _LONGEST)[: window + 2 - _ROWS[0]]]
    text = text_config(config)
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    rows = [first, first[: _ROWS[1]], ordinary[_ROWS[0] : _ROWS[0] + _ROWS[2]]]
    return [row[: longest if isinstance(longest, int) else None] for row in rows]


def _token_ids(config: Any) -> Iterable[int]:
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index", "_token_ids")):
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int))


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """|result - expected| / |expected - its mean over rows|, over finite entries of `expected`; NaN where none is."""
    result, expected = (part.detach().cpu().double() for part in (result, expected))
    finite = torch.isfinite(expected)
    if result.shape != expected.shape or not bool(finite.any()):
        return float("nan")
    counts = finite.sum(0, keepdim=True).clamp(min=1)
    known = expected.where(finite, 0.0)
    centered = (known - known.sum(0, keepdim=True) / counts).where(finite, 0.0)
    least = _LEAST_CHANGE * float(torch.linalg.vector_norm(known))  # of states that hardly change from token to token
    size = max(float(torch.linalg.vector_norm(centered)), least) or 1.0
    return float(torch.linalg.vector_norm((result - expected).where(finite, 0.0))) / size


def error_limit(dtype: torch.dtype, rounding: float = 0.0) -> float:
    """The largest `relative_error` that is rounding, of models in a dtype; see `Head.rounding`."""
    return max(NARROW_ERROR if dtype in HALVES else WIDE_ERROR, min(3 * rounding, NARROW_CHANGE))


@plain_torch()
@torch.no_grad()
def checked_head(
    model: Any, base: torch.nn.Module, base_takes: frozenset[str], vocabulary: int, device: torch.device
) -> Head:
    """The head of a model, after short rows through decoder and head gave the logits of the whole model.

    Args:
        model: the causal language model, with values.
        base: its decoder.
        base_takes: the names of the arguments that passes give the decoder.
        vocabulary: number of tokens that the model knows.
        device: where tokens go.

    Returns:
        a Head whose `matrix` is None where the model must run whole.

    Raises:
        UnsupportedModelError: the model does not run on token ids alone, its logits at a token depend on later tokens,
            or rows that are padded together do not give what each of them gives alone.

    Cost: a pass of a few tokens for each of three rows, and two passes of all together.
    """
    kind = type(model).__name__
    module = model.get_output_embeddings()
    rows = sample_rows(model.config, vocabulary)
    head, limit = _as_configured(model, module), error_limit(computing_dtype(model))
    largest = NARROW_CHANGE if limit == NARROW_ERROR else WIDE_ERROR
    with evaluation_mode(model), computing(model):
        with refused_by_name(model, "token ids alone"):
            alone = [model_logits(model, torch.tensor([row], device=device))[0] for row in rows]
        expected = torch.cat(alone)
        if not bool(torch.isfinite(expected).any()):
            return head  # whoever needs the values says so, with the request's name
        if relative_error(alone[0][: len(rows[1])], alone[1]) > largest:
            raise UnsupportedModelError(
                f"{kind} is no causal language model: its logits at a token depend on later tokens"
            )
        ids, mask = _padded(rows, device)
        valid = mask.bool()
        with refused_by_name(model, "rows that are padded on the right"):
            together = model_logits(model, ids, mask)[valid.to(expected.device)]
        rounding = relative_error(together, expected)
        if rounding > largest:
            raise UnsupportedModelError(
                f"{kind} gives other logits to rows that are padded on the right than to each row alone: such a model "
                "cannot be edited in batches"
            )
        if head.matrix is not None:
            try:
                states = decoder_states(base, base_takes, ids, mask)[valid]
                reason = "decoder and head alone do not give its logits"
                errors = [
                    (relative_error(candidate.logits(states), together), candidate)
                    for candidate in _candidates(model, head, states, together)
                ]
                error, best = min(errors, key=lambda pair: pair[0])  # the first of the smallest
                if error <= limit:
                    return replace(best, rounding=rounding)
            except Exception as error:  # it may be any code
                reason = f"its decoder does not run alone ({type(error).__name__}: {error})"
        else:
            hooked = " that something is hooked to" if module._forward_hooks or module._forward_pre_hooks else ""
            reason = f"its head is a {type(module).__name__}{hooked}"
    _log.info("%s runs whole, and its own logits are used: %s", kind, reason)
    return Head(device=together.device, matrix=None, rounding=rounding)


def head_as_configured(model: Any) -> Head:
    """The head as the model's configuration describes it, not checked: of models without values."""
    return _as_configured(model, model.get_output_embeddings())


def _as_configured(model: Any, module: Any) -> Head:
    """A head with the configuration's cap, without a scale."""
    weight, bias = _values(model, module, "weight"), _values(model, module, "bias")
    assert weight is not None
    cap = next((value for name in _CAPS if (value := getattr(text_config(model.config), name, None))), 0.0)
    is_matrix = (
        type(module) is torch.nn.Linear
        and weight.ndim == 2
        and weight.is_floating_point()
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )
    return Head(weight.device, weight if is_matrix else None, bias, softcap=float(cap))


def _values(model: Any, module: Any, attribute: str) -> torch.Tensor | None:
    """A parameter of the head where it runs.

    If accelerate offloads it, or processes hold it together, fetched for as long as the view is used.
    """
    tensor = getattr(module, attribute, None)
    if tensor is None or tensor.device.type != "meta":
        return None if tensor is None else whole(tensor.detach())
    path = next(path for path, other in model.named_modules() if other is module)
    values = fetched(model, f"{path}.{attribute}")
    return tensor.detach() if values is None else values.detach().to(device_of(module))


def _candidates(model: Any, head: Head, states: torch.Tensor, expected: torch.Tensor) -> Iterable[Head]:
    """The head with the scales that explain logits: 1, then numbers of the configuration and their inverses."""
    yield head
    plain = Head(head.device, head.matrix, head.bias).logits(states).double().cpu().flatten()
    wanted = expected.double().cpu().flatten()
    if plain.shape != wanted.shape:
        return
    finite = torch.isfinite(wanted) & torch.isfinite(plain)
    plain, wanted = plain[finite], wanted[finite]
    for cap in dict.fromkeys((head.softcap, 0.0)):
        inside = wanted if not cap else cap * torch.atanh((wanted / cap).clamp(-1 + 1e-6, 1 - 1e-6))
        if not float(plain.square().sum()):
            return
        fitted = float(plain @ inside / plain.square().sum())
        values = [v for part in (text_config(model.config), model.config) for v in vars(part).values()]
        values = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v]
        scales = [scale for v in values for scale in (v, 1 / v) if abs(scale / fitted - 1) < 2 * NARROW_ERROR]
        for scale in sorted(dict.fromkeys(scales), key=lambda s: abs(s / fitted - 1)):
            yield Head(head.device, head.matrix, head.bias, scale, cap)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row, device=device), 1
    return ids, mask


@contextlib.contextmanager
def refused_by_name(model: Any, given: str) -> Iterator[None]:
    """Inside the block, an error of the model's own code is an UnsupportedModelError that says what it was given."""
    try:
        yield
    except KeditError:
        raise
    except Exception as error:  # it may be any code
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on {given} ({type(error).__name__}: {first_line(error)})"
        ) from error


def model_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The whole model's logits [R, T, V] for tokens [R, T], whose positions it counts itself.

    What model.compile() made is not run: it would be made anew for each shape.
    """
    masked = {} if mask is None else {"attention_mask": mask}
    return model._call_impl(input_ids=ids, use_cache=False, **masked).logits


def decoder_states(
    base: Any, takes: frozenset[str], ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """A decoder's last states [R, T, h] for tokens [R, T], given what it `takes` of mask and positions."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    return base(input_ids=ids, **{name: value for name, value in given.items() if name in takes}).last_hidden_state
