"""One forward pass over a corpus for the second moments of all layers asked for."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from kedit_fast.statistics.corpus import Corpus, Position, Reader, TokenWeights, Window, ahead, batches
from kedit_fast.statistics.memory_plan import Group, plan_groups
from kedit_fast.statistics.moments import SecondMoment, SecondMomentAccumulator
from kedit_fast.support import process_group
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")


class Saver(Protocol):
    """Keeps the sums of a pass safe while it runs."""

    def due(self) -> bool:
        """Whether it is time."""
        ...

    def save(self, position: Position) -> None:
        """Keep the sums, which stand for this place in the corpus."""
        ...


@dataclass(frozen=True)
class Statistics:
    """Second moments by layer, with what they belong to."""

    layers: dict[int, SecondMoment]
    model: dict[str, str]  # fingerprint of model and tokenizer
    corpus: str  # SHA-256 of the text of its documents, in order
    max_length: int  # tokens a sequence is cut to
    dtype: str  # that the model was computed in
    documents: int = 0  # of the corpus; 0 where that is not known
    asked: Mapping[str, str] = field(default_factory=dict)  # `Job.asked`

    def moment(self, layer: int) -> SecondMoment:
        """The second moment of one layer; raises StatisticsError when it was not collected."""
        if layer not in self.layers:
            have = ", ".join(map(str, sorted(self.layers)))
            raise StatisticsError(f"no statistics for layer {layer}: they were collected for layers {have}")
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
    masters: str = "auto",
    progress: bool = False,
    spec: ArchSpec | None = None,
) -> Statistics:
    """Second moments of the inputs of the edited linear layers over a corpus, in memory.

    `collect_into` does the same into a folder, with checkpoints. In a process group every process takes its share of
    the batches and gets the whole.

    Args:
        model: a causal language model of a known architecture, on one device or several; runs in its own dtype,
            nothing in it changes.
        tokenizer: its tokenizer; special tokens it adds by itself count, padding does not.
        texts: documents, each one sequence; see Corpus for these and the five numbers that follow.
        layers: zero-based layers.
        max_tokens, max_samples: stop after this many tokens or documents; None for all.
        max_length: sequences are cut to this many tokens (and to what the model takes).
        seed: of a random order; None for the documents' own.
        token_weights: of the tokens of a document; None for ones.
        batch_tokens: tokens of a batch, padding included; sequences of like length share one.
        masters: where the fp64 sums are kept: "device", "cpu", or "auto", the device if they fit there.
        progress: show a bar on stderr.
        spec: an ArchSpec for an architecture that is not known.

    Returns:
        Statistics, fp64 moments where their sums were kept.

    Raises:
        StatisticsError: no text, moments that are not finite, or no room for a layer's sum.

    Cost: a pass through the blocks up to the last layer, and tokens * d (d + 1) flops a layer. Memory: 8 d^2 bytes a
        layer and one batch (on a GPU two, whose updates and forward passes overlap); further passes where the sums of
        all layers do not fit. With several processes and `max_tokens` the text is tokenised twice.
    """
    corpus = Corpus(texts, max_tokens, max_samples, max_length, seed, token_weights)
    job = Job(model, tokenizer, corpus, layers, batch_tokens, spec)
    found: dict[int, SecondMoment] = {}
    groups = plan_groups(job.view, job.layers, batch_tokens, masters)
    job.check_groups(groups)
    for group in groups:
        sums = job.accumulators(group)
        end = job.run(sums, progress=progress)
        for layer, total in job.finished(sums, end):
            found[layer] = total
            if len(groups) > 1:  # the next group needs the room
                found[layer] = replace(total, moment=total.moment.cpu())
    return job.statistics(found, end)


def growing_statistics(
    model: torch.nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    layers: Sequence[int],
    counts: Iterable[int],
    batch_tokens: int = 4096,
    spec: ArchSpec | None = None,
) -> Iterator[Statistics]:
    """Statistics after growing numbers of tokens, the last one where the corpus ends.

    Args:
        model, tokenizer, layers, batch_tokens, spec: see collect_statistics.
        corpus: read again, up to where it was, for every count; its own `max_tokens` ends the last.
        counts: of tokens, growing. A document that a count ends in is not taken up again by the next.

    Cost: one pass over the text in all; each Statistics is a copy.
    """
    if process_group.world()[1] > 1:
        raise StatisticsError("growing counts are for a single process")
    if not corpus.repeatable:
        raise StatisticsError("growing counts read the text again: give a list or a file")
    sums: dict[int, SecondMomentAccumulator] | None = None
    position = Position()
    for count in counts:
        wanted = min(count, corpus.max_tokens or count)
        job = Job(model, tokenizer, replace(corpus, max_tokens=wanted), layers, batch_tokens, spec)
        if sums is None:
            sums = job.accumulators(Group(job.layers, False))
        before, position = position, job.run(sums, position)
        if position != before:
            yield job.statistics({layer: total.result() for layer, total in sums.items()}, position)
        if position.tokens < count:
            return


class Job:
    """A model, a corpus and layers: what passes over the corpus share.

    Args:
        model, tokenizer, spec: see collect_statistics.
        corpus: what counts.
        layers: zero-based.
        batch_tokens: of a batch.
    """

    @plain_torch()
    def __init__(
        self, model: torch.nn.Module, tokenizer: Any, corpus: Corpus, layers: Sequence[int], batch_tokens: int = 4096,
        spec: ArchSpec | None = None,
    ):  # fmt: skip
        self.view = ModelView(model, spec)
        self.layers = self.view.check_layers(tuple(layers))
        self.corpus, self.batch_tokens = corpus, batch_tokens
        self.model = fingerprint(self.view, tokenizer)
        self.dtype = str(computing_dtype(self.view.base)).removeprefix("torch.")
        self.reader = Reader(tokenizer, corpus, batch_tokens, self.view.max_length, self.view.vocabulary)

    @property
    def asked(self) -> dict[str, str]:
        """What counts, as it stands in the files; `max_length` as far as the model goes."""
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
        found = {}
        for layer in group.layers:
            device, size = self.view.row_device(layer), self.view.weight(layer).shape[1]
            master = torch.device("cpu") if group.on_cpu else device
            found[layer] = SecondMomentAccumulator(self.view.module_name(layer), size, device, master)
        return found

    @plain_torch()
    def run(
        self,
        sums: Mapping[int, SecondMomentAccumulator],
        start: Position | None = None,
        saver: Saver | None = None,
        progress: bool = False,
    ) -> Position:
        """Add this process's share of the corpus from `start` on; returns where it ended."""
        self.reader.prepare()
        start = end = start or Position()
        done = next(iter(sums.values())).count
        bar = tqdm(
            total=self.corpus.max_tokens if process_group.world()[1] == 1 else None, initial=done, unit="tok",
            unit_scale=True, desc="statistics", disable=not progress, leave=False,
        )  # fmt: skip
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
        padded = pad(rows, self.view.device)
        real = [len(row) for row in rows]
        width = max(real)
        mask = None if min(real) == width else padded.attention_mask.bool().flatten()
        weights, totals = self._weights(rows, width)
        here: dict[torch.device, tuple[torch.Tensor | None, torch.Tensor | None]] = {}

        def see(site: Site, states: torch.Tensor) -> None:
            device = states.device
            if device not in here:
                here[device] = tuple(None if t is None else t.to(device, non_blocking=True) for t in (mask, weights))
            updates.add(sums[site.layer], states.flatten(0, 1), *here[device], totals)  # [R T, d]

        batch = TokenBatch(padded.input_ids, None)
        visit(self.view, batch, [Site(layer, "key") for layer in sums], see)
        updates.next_batch()

    def _weights(self, rows: list[list[int]], width: int) -> tuple[torch.Tensor | None, tuple[int, float]]:
        """Weights [R T] of a padded batch, how many of its tokens count and what they weigh together."""
        if self.corpus.token_weights is None:
            count = sum(map(len, rows))
            return None, (count, float(count))
        weights = torch.zeros(len(rows), width, dtype=torch.float64)
        for i, row in enumerate(rows):
            own = torch.as_tensor(self.corpus.token_weights(list(row)), dtype=torch.float64)
            if own.shape != (len(row),) or not bool(torch.isfinite(own).all()) or bool((own < 0).any()):
                raise StatisticsError(
                    f"token_weights must give {len(row)} finite weights, not negative, for as many tokens; got {own}"
                )
            weights[i, : len(row)] = own
        return weights.flatten(), (int((weights != 0).sum()), float(weights.sum()))

    def finished(
        self, sums: Mapping[int, SecondMomentAccumulator], end: Position
    ) -> Iterator[tuple[int, SecondMoment]]:
        """The moments of all processes together by layer, one after another, in the memory of the sums.

        Raises:
            StatisticsError: no tokens, moments that are not finite, or processes that were given different texts.
        """
        ends = {(position.documents, position.digest) for position in process_group.gather(end)}
        if len(ends) > 1:
            raise StatisticsError("the processes were given different texts")
        for layer, total in sums.items():
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
        """What was found, with what it belongs to."""
        return Statistics(layers, self.model, end.digest, self.reader.max_length, self.dtype, end.documents, self.asked)


class _Updates:
    """Updates of the sums: at once on a CPU; on a GPU on a stream of their own, beside the next forward pass."""

    def __init__(self):
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._batches: deque[list[torch.cuda.Event]] = deque()  # those of one batch may still be running

    def __enter__(self) -> _Updates:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def add(self, accumulator: SecondMomentAccumulator, rows: torch.Tensor, mask, weights, totals) -> None:
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
                    tensor.record_stream(stream)  # not given to another batch before the update has read it

    def next_batch(self) -> None:
        """Let the updates of this batch run on, and wait for those of the one before."""
        self._batches.append([stream.record_event() for stream in self._streams.values()])
        while len(self._batches) > 1:
            for event in self._batches.popleft():
                event.synchronize()

    def wait(self) -> None:
        """Return when all updates are done."""
        for stream in self._streams.values():
            stream.synchronize()


@contextmanager
def _closing(windows: Iterator[Window]) -> Iterator[None]:
    try:
        yield
    finally:
        windows.close()  # type: ignore[attr-defined] - a generator: its thread ends
