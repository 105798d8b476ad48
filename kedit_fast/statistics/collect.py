"""One forward pass over a corpus for the second moments of several layers."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from tqdm import tqdm

from kedit_fast.errors import StatisticsError
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.fingerprint import fingerprint
from kedit_fast.models.forward import Site, TokenBatch, evaluating, pad, visit
from kedit_fast.models.view import ModelView
from kedit_fast.models.widened import computing_dtype
from kedit_fast.statistics.corpus import Corpus, Position, Reader, Window, ahead, batches
from kedit_fast.statistics.memory_plan import Group, Masters, plan_groups
from kedit_fast.statistics.moments import SecondMoment, SecondMomentAccumulator
from kedit_fast.statistics.token_weights import TokenWeights, weights_of
from kedit_fast.support import process_group
from kedit_fast.support.dtypes import dtype_name
from kedit_fast.support.messages import comma_list
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")


class Saver(Protocol):
    """Writes checkpoints of a pass while it runs."""

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        ...

    def save(self, position: Position) -> None:
        """Write the sums, which go up to this position in the corpus."""
        ...


@dataclass(frozen=True)
class Statistics:
    """Second moments by layer, with the model and the text they were made from."""

    layers: dict[int, SecondMoment]
    model: dict[str, str]
    """Fingerprint of the model and its tokenizer."""
    corpus: str
    """Chained SHA-256 of the documents that were used, in order."""
    max_length: int
    """Tokens that sequences were cut to."""
    dtype: str
    """In which the model was computed."""
    documents: int = 0
    """How many were used; 0 where that is not known."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """`Job.settings`."""

    def moment(self, layer: int) -> SecondMoment:
        """The second moment of one layer; raises StatisticsError when it was not collected."""
        if layer not in self.layers:
            collected = comma_list(sorted(self.layers))
            raise StatisticsError(f"no statistics for layer {layer}: they were collected for layers {collected}")
        return self.layers[layer]


@plain_torch()
def collect_statistics(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    layers: Sequence[int],
    *,
    max_tokens: int | None = None,
    max_samples: int | None = None,
    max_length: int = 1024,
    seed: int | None = None,
    token_weights: TokenWeights | None = None,
    batch_tokens: int = 4096,
    masters: Masters = "auto",
    progress: bool = False,
    spec: ArchSpec | None = None,
) -> Statistics:
    """Second moments of the inputs of the edited linear layers over a corpus, in memory.

    `collect_into` does the same into a folder, with checkpoints. In a process group every process takes its share of
    the batches, and all of them get the result. Processes that hold the model together (`models.sharded`) run every
    batch together; each has the sums of all layers.

    Args:
        model: a causal language model of a known architecture, on one device or several. It runs in its own dtype and
            is not changed.
        tokenizer: its tokenizer; special tokens that it adds by itself count, padding does not.
        texts: documents, each one sequence; see `Corpus` for this and the next five.
        layers: zero-based.
        max_tokens, max_samples: stop after this many tokens or documents; None for all.
        max_length: sequences are cut to this many tokens (and to what the model takes).
        seed: of a random order; None for the documents' own.
        token_weights: weights of a document's tokens; None for ones.
        batch_tokens: tokens of a batch, padding included; sequences of similar length share a batch.
        masters: where the fp64 sums are: "device", "cpu", or "auto" for the device if they fit there.
        progress: show a bar on stderr.
        spec: an ArchSpec for an architecture that is not known.

    Returns:
        Statistics with fp64 moments, on the devices of the sums.

    Raises:
        StatisticsError: no text, moments that are not finite, or no room for a layer's sum.

    Cost: a pass through the blocks up to the last layer, and tokens * d (d + 1) flops per layer. Memory: 8 d^2 bytes
        per layer and one batch (two on a GPU, whose updates and forward passes overlap). Where the sums of all layers
        do not fit, there are several passes. With several processes and `max_tokens` the text is tokenized twice.

    Example:
        >>> statistics = collect_statistics(model, tokenizer, texts, layers=[0, 1], max_tokens=2_000)
        >>> statistics.moment(1).count
        2000
    """
    corpus = Corpus(texts, max_tokens, max_samples, max_length, seed, token_weights)
    job = Job(model, tokenizer, corpus, layers, batch_tokens, spec)
    moments: dict[int, SecondMoment] = {}
    groups, end = plan_groups(job.view, job.layers, batch_tokens, masters), Position()
    job.check_groups(groups)
    for group in groups:
        sums = job.accumulators(group)
        end = job.run(sums, progress=progress)
        for layer, second in job.finish(sums, end):
            moments[layer] = second
            if len(groups) > 1:  # the next group needs the memory
                moments[layer] = replace(second, moment=second.moment.cpu())
    return job.statistics(moments, end)


def growing_statistics(
    model: torch.nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    layers: Sequence[int],
    counts: Iterable[int],
    batch_tokens: int = 4096,
    spec: ArchSpec | None = None,
) -> Iterator[Statistics]:
    """Statistics after growing numbers of tokens, up to the end of the corpus.

    Args:
        model, tokenizer, layers, batch_tokens, spec: see `collect_statistics`.
        corpus: read again for every count, up to the position of the last one. Its own `max_tokens` is the last count.
        counts: numbers of tokens, growing. The rest of a document in which a count is reached is left out.

    Cost: one forward pass over the text in all; each Statistics is a copy.
    """
    if process_group.world()[1] > 1:
        raise StatisticsError("growing counts are for a single process")
    if not corpus.repeatable:
        raise StatisticsError("growing counts read the text again: give a list or a file")
    sums: dict[int, SecondMomentAccumulator] | None = None
    position = Position()
    for count in counts:
        limited = replace(corpus, max_tokens=min(count, corpus.max_tokens or count))
        job = Job(model, tokenizer, limited, layers, batch_tokens, spec)
        if sums is None:
            sums = job.accumulators(Group(job.layers, False))
        before, position = position, job.run(sums, position)
        if position != before:
            yield job.statistics({layer: total.result() for layer, total in sums.items()}, position)
        if position.tokens < count:
            return


class Job:
    """A model, a corpus and layers: what all passes of a collection share.

    Args:
        model, tokenizer, spec: see `collect_statistics`.
        corpus: the text.
        layers: zero-based.
        batch_tokens: tokens of a batch, padding included.
    """

    @plain_torch()
    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        corpus: Corpus,
        layers: Sequence[int],
        batch_tokens: int = 4096,
        spec: ArchSpec | None = None,
    ):
        self.view = ModelView(model, spec)
        self.layers = self.view.check_layers(tuple(layers))
        self.corpus, self.batch_tokens = corpus, batch_tokens
        self.model = fingerprint(self.view, tokenizer)
        self.dtype = dtype_name(computing_dtype(self.view.base))
        view = self.view
        self.reader = Reader(tokenizer, corpus, batch_tokens, view.max_length, view.vocabulary, view.work_share)

    @property
    def settings(self) -> dict[str, str]:
        """The settings that choose the text, as the files record them; `max_length` is at most the model's."""
        return {**self.corpus.about(), "max_length": str(self.reader.max_length)}

    def check_groups(self, groups: Sequence[Group]) -> None:
        """Raise StatisticsError when a corpus that can be read once would have to be read again."""
        if len(groups) > 1 and not self.corpus.repeatable:
            raise StatisticsError(
                f"the sums of all layers do not fit at once: {len(groups)} passes over the text, but it can be read "
                "once only. Give a list or a file, or fewer layers"
            )

    @plain_torch()
    def accumulators(self, group: Group) -> dict[int, SecondMomentAccumulator]:
        """Empty sums of a group's layers."""
        sums = {}
        for layer in group.layers:
            device, size = self.view.row_device(layer), self.view.edited_shape(layer)[1]
            master = torch.device("cpu") if group.on_cpu else device
            sums[layer] = SecondMomentAccumulator(self.view.module_name(layer), size, device, master)
        return sums

    @plain_torch()
    def run(
        self,
        sums: Mapping[int, SecondMomentAccumulator],
        start: Position | None = None,
        saver: Saver | None = None,
        progress: bool = False,
    ) -> Position:
        """Add this process's share of the corpus to sums.

        Args:
            sums: by layer; those of the text before `start`.
            start: a position in the corpus; None for its beginning.
            saver: writes a checkpoint after a batch where one is due; None for no checkpoints.
            progress: show a bar on stderr.

        Returns:
            the position where the corpus ended.
        """
        self.reader.prepare()
        start = end = start or Position()
        bar = tqdm(
            total=self.corpus.max_tokens if self.view.work_share[1] == 1 else None,
            initial=next(iter(sums.values())).count,
            unit="tok",
            unit_scale=True,
            desc="statistics",
            disable=not progress,
            leave=False,
        )
        windows = ahead(self.reader.windows(start))
        with evaluating(self.view), bar, _closing(windows), _Updates() as updates:
            for window in windows:
                skip = start.batches if end == start else 0
                for number, rows in enumerate(batches(window.sequences, self.batch_tokens), 1):
                    if number <= skip:
                        continue
                    self._add(rows, sums, updates)
                    bar.update(sum(map(len, rows)))
                    if saver is not None and saver.due():
                        updates.wait()
                        saver.save(replace(window.before, batches=number, until=window.after.digest))
                end = window.after
        return end

    def _add(self, rows: list[list[int]], sums: Mapping[int, SecondMomentAccumulator], updates: _Updates) -> None:
        """Run one batch, and add its keys to the sums."""
        padded = pad(rows, self.view.device)
        lengths = [len(row) for row in rows]
        real = _real_positions(lengths)
        weights, totals = self._weights(rows, max(lengths))
        copies: dict[torch.device, _Chosen] = {}

        def add_keys(site: Site, states: torch.Tensor) -> None:
            keys = states.flatten(0, 1)  # [R T, d]
            if keys.device not in copies:
                copies[keys.device] = _Chosen.on(keys.device, real, len(keys), weights)
            chosen = copies[keys.device]
            if chosen.index is not None:
                keys = keys.index_select(0, chosen.index)  # [n, d]
            updates.add(sums[site.layer], keys, chosen.mask, chosen.weights, totals)

        batch = TokenBatch(padded.input_ids, None)
        visit(self.view, batch, [Site(layer, "key") for layer in sums], add_keys)
        updates.next_batch()

    def _weights(self, rows: list[list[int]], width: int) -> tuple[torch.Tensor | None, tuple[int, float]]:
        """Weights [R T] of a padded batch (None for ones); how many of its tokens count, and the sum of weights."""
        if self.corpus.token_weights is None:
            count = sum(map(len, rows))
            return None, (count, float(count))
        weights = torch.zeros(len(rows), width, dtype=torch.float64)
        for i, row in enumerate(rows):
            weights[i, : len(row)] = weights_of(self.corpus.token_weights, row)
        return weights.flatten(), (int((weights != 0).sum()), float(weights.sum()))

    def finish(self, sums: Mapping[int, SecondMomentAccumulator], end: Position) -> Iterator[tuple[int, SecondMoment]]:
        """Layer by layer, the moment of the sums of all processes, in the memory of the sum.

        Raises:
            StatisticsError: no tokens, moments that are not finite, or processes that were given different texts.
        """
        ends = {(position.documents, position.digest) for position in process_group.gather(end)}
        if len(ends) > 1:
            raise StatisticsError("the processes were given different texts")
        for layer, total in sums.items():
            if not self.view.is_sharded:  # otherwise each process has counted every token
                total.reduce_()
            if total.count == 0:
                raise StatisticsError(
                    "no tokens were counted: the corpus has no text, or none of its tokens has a weight"
                )
            size = len(total.sum)
            if total.count < size:
                _log.warning(
                    "%d tokens for second moments of dimension %d: they are singular, use more text", total.count, size
                )
            yield layer, total.finish()

    def statistics(self, layers: dict[int, SecondMoment], end: Position) -> Statistics:
        """Moments with the model and the text they were made from."""
        return Statistics(
            layers, self.model, end.digest, self.reader.max_length, self.dtype, end.documents, self.settings
        )


def _real_positions(lengths: Sequence[int]) -> torch.Tensor | None:
    """Positions [n] of the tokens among those of a batch that is padded on the right; None where nothing is padded."""
    width = max(lengths)
    if min(lengths) == width:
        return None
    return torch.cat([torch.arange(i * width, i * width + length) for i, length in enumerate(lengths)])


@dataclass(frozen=True)
class _Chosen:
    """Which rows of a batch's states count, on a device: by index or by mask, and with which weights."""

    index: torch.Tensor | None
    """[n] int64, rows to gather before the update; None for all."""
    mask: torch.Tensor | None
    """[R T] bool, for the update; None for all."""
    weights: torch.Tensor | None
    """Of the gathered rows, or of all; None for ones."""

    @classmethod
    def on(cls, device: torch.device, real: torch.Tensor | None, count: int, weights: torch.Tensor | None) -> _Chosen:
        """Of `count` rows those at `real`, by the faster way of the device, and the weights that go with them."""
        index, mask = real, None
        if real is not None and not _gathers(device):
            index, mask = None, torch.zeros(count, dtype=torch.bool).index_fill_(0, real, True)
        elif real is not None and weights is not None:
            weights = weights[real]
        return cls(*(None if t is None else t.to(device, non_blocking=True) for t in (index, mask, weights)))


def _gathers(device: torch.device) -> bool:
    """Whether rows are gathered: on a GPU an update takes 1.8 times as long with a mask (H200, bf16, d 14336)."""
    return device.type == "cuda"


class _Updates:
    """Adds rows to sums: at once on a CPU; on a GPU on a stream of its own, beside the next forward pass."""

    def __init__(self):
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._batches: deque[list[torch.Event]] = deque()  # ends of the updates, of at most two batches

    def __enter__(self) -> _Updates:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def add(
        self,
        accumulator: SecondMomentAccumulator,
        rows: torch.Tensor,
        mask: torch.Tensor | None,
        weights: torch.Tensor | None,
        totals: tuple[int, float],
    ) -> None:
        """`SecondMomentAccumulator.update`, perhaps later."""
        device = rows.device
        if device.type != "cuda":
            accumulator.update(rows, mask, weights, totals)
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            accumulator.update(rows, mask, weights, totals)
            for tensor in (rows, mask, weights):
                if tensor is not None:
                    tensor.record_stream(stream)  # its memory is not reused before the update has read it

    def next_batch(self) -> None:
        """Wait for the updates of the previous batch; those of this one may still run."""
        self._batches.append([stream.record_event() for stream in self._streams.values()])
        while len(self._batches) > 1:
            for event in self._batches.popleft():
                event.synchronize()

    def wait(self) -> None:
        """Wait for all updates."""
        for stream in self._streams.values():
            stream.synchronize()


@contextmanager
def _closing(windows: Generator[Window, None, None]) -> Iterator[None]:
    """End the thread behind a generator when the block ends."""
    try:
        yield
    finally:
        windows.close()
