"""What a batch of MEMIT edits must compute and move, by formula, and how long that takes at a machine's peaks.

A multiplication and an addition count as one flop each. Counted is what the algorithm cannot do without: each block
once where `kedit_fast` may run it again, each text once however many requests begin with it, one half of a symmetric
product; not norms, activations and rotations. So a limit is a lower bound of the time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.solver.least_squares import system_flops

PHASES = ("values", "keys", "solve", "write")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    layers: int
    """L, blocks."""
    hidden: int
    """h."""
    inner: int
    """d, inputs of the matrix that is edited: the width of the MLP."""
    queries: int
    """Width of all queries, heads times their size."""
    groups: int
    """Width of all keys of attention, and of all values."""
    vocabulary: int
    """V."""
    matrices: int = 3
    """Of the MLP: 3 where it is gated."""

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The sizes in a Llama's configuration."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            queries=size * config.num_attention_heads,
            groups=size * config.num_key_value_heads,
            vocabulary=config.vocab_size,
        )

    @property
    def attention(self) -> int:
        """Weights of a block's attention."""
        return 2 * self.hidden * (self.queries + self.groups)

    @property
    def mlp(self) -> int:
        """Weights of a block's MLP."""
        return self.matrices * self.hidden * self.inner

    @property
    def block(self) -> int:
        """Weights of a block."""
        return self.attention + self.mlp

    @property
    def head(self) -> int:
        """Weights of the output embedding."""
        return self.hidden * self.vocabulary


@dataclass(frozen=True)
class Texts:
    """Tokens of the prompts of u requests."""

    requests: int
    """u."""
    tails: int
    """Tokens that an iteration runs: of each context those from the lookup token on, with the target but for its last
    one; and of "{subject} is a" the lookup token."""
    attended: int
    """Over these, the tokens that each of them attends to."""
    scored: int
    """Of these, the ones whose next token is scored."""
    whole: int
    """Tokens of all rows; what several rows begin with counts once."""
    until_lookup: int
    """The same of rows cut after their lookup tokens."""

    @classmethod
    def of(cls, prepared: Sequence[PreparedRequest]) -> Texts:
        """The tokens of prepared requests."""
        tails = attended = scored = 0
        rows: list[tuple[int, ...]] = []
        cut: list[tuple[int, ...]] = []
        for request in prepared:
            for prompt in request.rewriting:
                row = (*prompt.ids, *request.target[:-1])
                tails += len(row) - prompt.lookup
                attended += sum(range(prompt.lookup + 1, len(row) + 1))
                scored += len(request.target)
                rows.append(row)
                cut.append(prompt.cut().ids)
            kl = request.kl.cut().ids
            tails, attended, scored = tails + 1, attended + len(kl), scored + 1
            rows.append(kl)
        return cls(len(prepared), tails, attended, scored, distinct(rows), distinct(cut))


def distinct(rows: Iterable[Sequence[int]]) -> int:
    """The number of different beginnings of some rows of tokens: what is computed where no beginning is run twice.

    Example:
        >>> distinct([(1, 2, 3), (1, 2, 4), (1, 2), (5,)])
        5
    """
    count = 0
    before: tuple[int, ...] = ()
    for row in sorted(map(tuple, rows)):
        pairs = zip(before, row, strict=False)
        count += len(row) - sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        before = row
    return count


@dataclass(frozen=True)
class Work:
    """Of one phase."""

    flops: float
    """Multiplications and additions."""
    bytes: float
    """That move between memory and processor at least."""

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """At these peaks, when both go on at once."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


def works(
    shape: Shape, layers: Sequence[int], texts: Texts, steps: float, *, batch: int = 64, element: int = 4
) -> dict[str, Work]:
    """The phases of a batch of MEMIT edits.

    Args:
        shape: of the model.
        layers: the edited ones, ascending; values are at the output of the last.
        texts: of the requests.
        steps: that the optimizer takes for a value, the mean over requests; there is one pass more than steps.
        batch: requests whose values are optimized together.
        element: bytes of a weight.

    Returns:
        phase -> its work. With P the weights of a block, H those of the head, b the blocks above the last edited layer,
        t, a and s the `tails`, `attended` and `scored` tokens, q the width of queries:

        values: (2 steps + 1) (2 b P t + 2 H s) for products, forward and backward, the last block's MLP on s tokens;
        (3 steps + 1) 4 b q a for attention; and once 2 P for each token below and, up to the lookup tokens, above.
        keys: 2 P for each token up to the lookup tokens and each block up to the last edited one.
        solve, per layer: d^3 / 3 for the factor, 2 d^2 u for whitening and back, and `system_flops`; in fp64.
        write, per layer: 2 h d u.
    """
    last, count, u = layers[-1], len(layers), texts.requests
    live = shape.layers - 1 - last
    products = 2.0 * (live * shape.attention + max(0, live - 1) * shape.mlp) * texts.tails
    products += 2.0 * ((shape.mlp if live else 0) + shape.head) * texts.scored
    attention = 4.0 * live * shape.queries * texts.attended
    first = 2.0 * shape.block * ((last + 1) * texts.whole + live * texts.until_lookup)
    passes = (2 * steps + 1) * -(-u // batch)  # of the blocks' weights, forward and backward
    d, h = shape.inner, shape.hidden
    return {
        "values": Work(
            (2 * steps + 1) * products + (3 * steps + 1) * attention + first,
            element * (passes * (live * shape.block + shape.head) + shape.layers * shape.block),
        ),
        "keys": Work(
            2.0 * shape.block * (last + 1) * texts.until_lookup, float(element * (last + 1) * shape.block)
        ),
        "solve": Work(
            count * (d**3 / 3 + 2.0 * d * d * u + system_flops(d, u)), count * 8.0 * (2 * d * d + 2 * d * u)
        ),
        "write": Work(count * 2.0 * h * d * u, count * (2.0 * element * h * d + 4.0 * (h + d) * u)),
    }  # fmt: skip


def limits(each: Mapping[str, Work], peaks: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase at `harness.measured_peaks`: the solve in fp64, the others in fp32."""
    dtypes = {"solve": "fp64"}
    return {
        phase: work.seconds(peaks[f"{dtypes.get(phase, 'fp32')}_flops_per_s"], peaks["copy_bytes_per_s"])
        for phase, work in each.items()
    }
