"""One pass over a corpus for the second moments of several layers' inputs, or of gradients at their outputs."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from tqdm import tqdm

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.experts import ExpertInputs, ExpertRows
from kedit_fast.models.fingerprint import fingerprint
from kedit_fast.models.forward import Site, TokenBatch, evaluating, pad, visit
from kedit_fast.models.gradients import output_gradients
from kedit_fast.models.view import ModelView
from kedit_fast.models.widened import computing_dtype
from kedit_fast.statistics.corpus import Corpus, Document, Position, Reader, Window, ahead, batches
from kedit_fast.statistics.expert_moments import ExpertMomentSum, warn_of_unused
from kedit_fast.statistics.labels import TOKENS_A_DIMENSION, OutputGradients, row_seeds, sampled_labels
from kedit_fast.statistics.memory_plan import STATES_A_BLOCK, Group, Masters, plan_groups, side_size, stack_of
from kedit_fast.statistics.moments import MomentSum, SecondMoment, SecondMomentAccumulator, Side
from kedit_fast.statistics.token_weights import CONFIDENCE, NamedWeights, TokenWeights, confidences, weights_of
from kedit_fast.statistics.updates import CountedRows, Updates, real_positions, rows_of
from kedit_fast.support import process_group
from kedit_fast.support.dtypes import dtype_name
from kedit_fast.support.messages import comma_list
from kedit_fast.support.page_locked import HostStage
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
BATCH_PARTS = 4
"""A pass with gradients takes so many times fewer tokens a batch: it holds what all blocks need for going back."""


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
    """Of the inputs of the edited linear layers."""
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
    tokens: int = 0
    """How many were read; 0 where that is not known."""
    outputs: Mapping[int, SecondMoment] = field(default_factory=dict)
    """Raw second moments [out, out] of the gradients g = d(-sum_s log p(y_s)) / d(output of the edited linear layer),
    mean over tokens that have a label y; empty where they were not collected."""
    outputs_from: Mapping[str, str] = field(default_factory=dict)
    """What `outputs` were made from: labels, label_seed, and the text and settings as for the inputs; empty without."""

    def moment(self, layer: int) -> SecondMoment:
        """The second moment of one layer; raises StatisticsError when it was not collected."""
        if layer not in self.layers:
            collected = comma_list(sorted(self.layers))
            raise StatisticsError(f"no statistics for layer {layer}: they were collected for layers {collected}")
        return self.layers[layer]

    def output_metric(self, layer: int) -> torch.Tensor:
        """The raw second moment [out, out] of gradients at a layer's output; raises StatisticsError without one."""
        if layer not in self.outputs:
            others = f"only of layers {comma_list(sorted(self.outputs))}" if self.outputs else "of no layer"
            raise StatisticsError(
                f"no output metric for layer {layer}: there is one {others}. `kedit-fast stats MODEL --text FILE "
                "--layers N --out DIR --resume --output-metric` adds it to statistics, "
                "collect_statistics(..., output_metric=True) in memory"
            )
        return self.outputs[layer].moment


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
    token_weights: TokenWeights | NamedWeights | None = None,
    output_metric: OutputGradients | bool = False,
    batch_tokens: int = 4096,
    masters: Masters = "auto",
    progress: bool = False,
    spec: ArchSpec | None = None,
) -> Statistics:
    """Second moments of the inputs of the edited linear layers over a corpus, in memory.

    Of layers with experts they are those of stacked keys, [E, m, m]; see `SecondMoment`.

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
        token_weights: weights of a document's tokens, by a function or by name; None for ones.
        output_metric: also collect second moments of gradients at the layers' outputs (`Statistics.outputs`), of which
            loss and from how many tokens `OutputGradients` says; True for its defaults. Weights of tokens do not count.
        batch_tokens: tokens of a batch, padding included; sequences of similar length share a batch. Passes with
            gradients take a quarter.
        masters: where the fp64 sums are: "device", "cpu", or "auto" for the device if they fit there.
        progress: show a bar on stderr.
        spec: an ArchSpec for an architecture that is not known.

    Returns:
        Statistics with fp64 moments, on the devices of the sums.

    Raises:
        StatisticsError: no text, moments that are not finite, no room for a layer's sum, or an output metric of a
            model that processes hold together.
        UnsupportedModelError: an output metric of a model without gradients at the layers' outputs.

    Cost: a pass through the blocks up to the last layer, and tokens * d (d + 1) flops per layer; with k of E experts a
        token, tokens * k m (m + 1), and their activations once more. Memory: 8 d^2 bytes per layer (8 E m^2) and one
        batch (two on a GPU, whose updates and forward passes overlap, and where there is room for them the inputs of up
        to `memory_plan.UPDATE_ROWS` tokens of each layer, which wait for one update). Where the sums of all layers
        do not fit, there are several passes. With several processes and `max_tokens` the text is tokenized twice.
        An output metric: a forward pass to the logits and a backward pass to the lowest layer over its tokens, two to
        three times a forward pass; memory for what that pass needs of a batch in all blocks above, and 8 out^2 bytes.

    Example:
        >>> statistics = collect_statistics(model, tokenizer, texts, layers=[0, 1], max_tokens=2_000)
        >>> statistics.moment(1).count
        2000
    """
    corpus = Corpus(texts, max_tokens, max_samples, max_length, seed, token_weights)
    job = Job(model, tokenizer, corpus, layers, batch_tokens, spec)
    statistics, *outputs = [_collected(part, masters, progress) for part in job.parts(output_metric)]
    for metric in outputs:
        statistics = replace(statistics, outputs=metric.outputs, outputs_from=metric.outputs_from)
    return statistics


def _collected(job: Job, masters: Masters, progress: bool) -> Statistics:
    """What a job collects, in as few passes as memory allows."""
    moments: dict[int, SecondMoment] = {}
    groups, end = job.plan(job.layers, masters), Position()
    job.check_groups(groups)
    for group in groups:
        sums = job.accumulators(group)
        end = job.run(sums, progress=progress)
        end = job.agreed(end)
        for layer, second in job.finish(sums):
            moments[layer] = second
            if len(groups) > 1:  # the next group needs the memory
                shared = None if second.shared is None else second.shared.cpu()
                moments[layer] = replace(second, moment=second.moment.cpu(), shared=shared)
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
    sums: dict[int, MomentSum] | None = None
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

    side: Side = "input"
    """Of which rows the moments are: inputs of the layers, or gradients at their outputs."""

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
        self.tokenizer, self.layers = tokenizer, self.view.check_layers(tuple(layers))
        self.corpus, self.batch_tokens = corpus, batch_tokens
        self.model = fingerprint(self.view, tokenizer)
        self.dtype = dtype_name(computing_dtype(self.view.base))
        view = self.view
        self.reader = Reader(tokenizer, corpus, batch_tokens, view.max_length, view.vocabulary, view.work_share)

    @property
    def settings(self) -> dict[str, str]:
        """The settings that choose the text, as the files record them; `max_length` is at most the model's."""
        return {**self.corpus.about(), "max_length": str(self.reader.max_length)}

    def parts(self, output_metric: OutputGradients | bool, inputs: bool = True) -> list[Job]:
        """The jobs of a collection, which are run one after the other: this one, and that of gradients at outputs.

        Args:
            output_metric: of which loss the gradients are; False for none.
            inputs: whether this job is wanted.

        Raises:
            StatisticsError: the text can be read once only, and is needed twice; or the model has no output metric.
        """
        parts: list[Job] = [self] if inputs else []
        if output_metric is not False:
            parts.append(OutputJob(self, OutputGradients() if output_metric is True else output_metric))
        if not parts:
            raise InvalidArgumentError("inputs=False collects an output metric alone: give output_metric")
        if len(parts) > 1 and not self.corpus.repeatable:
            raise StatisticsError("an output metric reads the text once more: give a list or a file")
        return parts

    def plan(self, layers: tuple[int, ...], masters: Masters, budget: int | None = None) -> list[Group]:
        """Some of the layers divided into passes; see `plan_groups`."""
        return plan_groups(self.view, layers, self.batch_tokens, masters, budget, self.side, self._held)

    @property
    def _held(self) -> int:
        """States that a batch holds at once, beside those of the block that runs; see `plan_groups`."""
        return len(self.layers) if self.corpus.token_weights == CONFIDENCE else 0

    def check_groups(self, groups: Sequence[Group]) -> None:
        """Raise StatisticsError when a corpus that can be read once would have to be read again."""
        if len(groups) > 1 and not self.corpus.repeatable:
            raise StatisticsError(
                f"the sums of all layers do not fit at once: {len(groups)} passes over the text, but it can be read "
                "once only. Give a list or a file, or fewer layers"
            )

    @plain_torch()
    def accumulators(self, group: Group) -> dict[int, MomentSum]:
        """Empty sums of a group's layers."""
        sums: dict[int, MomentSum] = {}
        stage = HostStage()
        for layer in group.layers:
            name, device = self.view.module_name(layer), self.view.row_device(layer)
            master = torch.device("cpu") if group.on_cpu else device
            stack = stack_of(self.view, layer, self.side)
            if stack is not None:
                shared, size = stack.shared_inputs, stack.inputs
                sums[layer] = ExpertMomentSum(name, stack.count, size, device, master, shared, group.update_rows, stage)
            else:
                size = side_size(self.view, layer, self.side)
                sums[layer] = SecondMomentAccumulator(name, size, device, master, group.update_rows, stage)
        return sums

    @plain_torch()
    def run(
        self,
        sums: Mapping[int, MomentSum],
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
        with evaluating(self.view), bar, _closing(windows), Updates() as updates:
            for window in windows:
                skip = start.batches if end == start else 0
                for number, documents in enumerate(batches(window.documents, self.batch_tokens), 1):
                    if number <= skip:
                        continue
                    self._add(documents, sums, updates)
                    bar.update(sum(map(len, documents)))
                    if saver is not None and saver.due():
                        updates.flush(sums.values())
                        updates.wait()
                        saver.save(replace(window.before, batches=number, until=window.after.digest))
                end = window.after
            updates.flush(sums.values())
        return end

    def _add(self, documents: list[Document], sums: Mapping[int, MomentSum], updates: Updates) -> None:
        """Run one batch, and add its keys to the sums."""
        rows = [document.ids for document in documents]
        width = max(map(len, rows))
        positions = real_positions([len(row) for row in rows], width)
        batch = TokenBatch(pad(rows, self.view.device).input_ids, None)
        sites = [Site(layer, "key") for layer in sums]
        if self.corpus.token_weights == CONFIDENCE:
            keys: dict[Site, torch.Tensor | ExpertRows] = {}  # of all layers: the weights are known after the pass

            def hold(site: Site, states: torch.Tensor | ExpertInputs) -> None:
                keys[site] = rows_of(states, positions)

            states = visit(self.view, batch, sites, hold, to_the_end=True)
            assert states is not None
            counted = self._by_confidence(states.flatten(0, 1), positions)
            for site, of_layer in keys.items():
                counted.add(updates, sums[site.layer], of_layer)
        else:
            counted = CountedRows(positions, *self._weights(rows, width))

            def add(site: Site, states: torch.Tensor | ExpertInputs) -> None:
                counted.add(updates, sums[site.layer], rows_of(states, positions))

            visit(self.view, batch, sites, add)
        updates.next_batch()

    def _weights(self, rows: list[list[int]], width: int) -> tuple[torch.Tensor | None, tuple[int, float]]:
        """Weights [R T] of a padded batch (None for ones); how many of its tokens count, and the sum of weights."""
        weigh = self.corpus.token_weights
        if weigh is None or isinstance(weigh, str):
            count = sum(map(len, rows))
            return None, (count, float(count))
        weights = torch.zeros(len(rows), width, dtype=torch.float64)
        for i, row in enumerate(rows):
            weights[i, : len(row)] = weights_of(weigh, row)
        return weights.flatten(), (int((weights != 0).sum()), float(weights.sum()))

    def _by_confidence(self, states: torch.Tensor, positions: torch.Tensor | None) -> CountedRows:
        """The rows of a batch that count, weighted by the model's confidence at its last states [R T, h]."""
        real = states if positions is None else states.index_select(0, positions.to(states.device))
        weights = confidences(self.view.head, real)
        totals = len(weights), float(weights.sum())
        if positions is not None:
            weights = weights.new_zeros(len(states)).index_copy_(0, positions.to(weights.device), weights)
        return CountedRows(positions, weights, totals)

    def agreed(self, end: Position) -> Position:
        """The end of the text, with the tokens that all processes have read.

        Raises:
            StatisticsError: processes that were given different texts.
        """
        ends = process_group.gather(end)
        if len({(position.documents, position.digest) for position in ends}) > 1:
            raise StatisticsError("the processes were given different texts")
        return end if self.view.is_sharded else replace(end, tokens=sum(position.tokens for position in ends))

    def finish(self, sums: Mapping[int, MomentSum]) -> Iterator[tuple[int, SecondMoment]]:
        """Layer by layer, the moment of the sums of all processes, in the memory of the sum.

        Raises:
            StatisticsError: no tokens, or moments that are not finite.
        """
        for layer, total in sums.items():
            if not self.view.is_sharded:  # otherwise each process has counted every token
                total.reduce_()
            if total.count == 0:
                raise StatisticsError(
                    "no tokens were counted: the corpus has no text, or none of its tokens has a weight or a label"
                )
            size = total.sum.shape[-1]
            if total.count < size:
                _log.warning(
                    "%d tokens for second moments of dimension %d: they are singular, use more text", total.count, size
                )
            second = total.finish()
            warn_of_unused(second)
            yield layer, second

    def statistics(self, layers: dict[int, SecondMoment], end: Position) -> Statistics:
        """Moments with the model and the text they were made from."""
        return Statistics(
            layers,
            self.model,
            end.digest,
            self.reader.max_length,
            self.dtype,
            end.documents,
            self.settings,
            end.tokens,
        )


class OutputJob(Job):
    """The gradients of a loss at the layers' outputs, from a forward and a backward pass over some of a job's text.

    Args:
        inputs: the job of the layers' inputs.
        gradients: of which loss, and from how many tokens.
    """

    side: Side = "output"

    @plain_torch()
    def __init__(self, inputs: Job, gradients: OutputGradients):
        if inputs.view.is_sharded:
            raise StatisticsError(
                "an output metric is collected from models that are whole in each process; this one is tensor-parallel"
            )
        self.gradients, view = gradients, inputs.view
        self.view, self.tokenizer, self.layers = view, inputs.tokenizer, inputs.layers
        self.model, self.dtype = inputs.model, inputs.dtype
        enough = TOKENS_A_DIMENSION * max(side_size(view, layer, self.side) for layer in self.layers)
        tokens = gradients.tokens or min(enough, inputs.corpus.max_tokens or enough)
        self.corpus = replace(inputs.corpus, max_tokens=tokens, token_weights=None)
        self.batch_tokens = max(1, inputs.batch_tokens // BATCH_PARTS)
        self.reader = Reader(
            self.tokenizer, self.corpus, self.batch_tokens, view.max_length, view.vocabulary, view.work_share
        )

    @property
    def _held(self) -> int:
        return STATES_A_BLOCK * (self.view.num_layers - self.layers[0])

    @property
    def settings(self) -> dict[str, str]:
        """The settings that choose the text and its labels, as the files record them."""
        return {**super().settings, **self.gradients.about()}

    def _add(self, documents: list[Document], sums: Mapping[int, MomentSum], updates: Updates) -> None:
        """Run one batch, and add the gradients at its tokens that have labels to the sums."""
        rows = [document.ids for document in documents]
        sampled = self.gradients.labels == "sampled"
        lengths = [len(row) - (not sampled) for row in rows]  # no token follows the last one
        count, width = sum(lengths), max(map(len, rows))
        if not count:
            return
        counted = CountedRows(positions := real_positions(lengths, width), None, (count, float(count)))
        head, labels = self.view.head, [token for row in rows for token in row[1:]]
        seeds = [
            seed for document in documents for seed in row_seeds(self.gradients.seed, document.number, len(document))
        ]

        def loss(states: torch.Tensor) -> torch.Tensor:
            flat = states.flatten(0, 1)
            chosen = flat if positions is None else flat.index_select(0, positions.to(flat.device))
            chosen = chosen.to(head.device)  # [n, h]
            if sampled:
                targets = sampled_labels(head, chosen.detach(), seeds)
            else:
                targets = torch.tensor(labels, device=head.device)
            return -head.target_log_probs(chosen, targets).log_prob.sum()

        batch = TokenBatch(pad(rows, self.view.device).input_ids, None)
        for layer, gradient in output_gradients(self.view, batch, tuple(sums), loss).items():
            counted.add(updates, sums[layer], gradient)
        updates.next_batch()

    def statistics(self, layers: dict[int, SecondMoment], end: Position) -> Statistics:
        """Moments of gradients alone, with the model and the text they were made from."""
        source = {"corpus": end.digest, "documents": str(end.documents), "tokens": str(end.tokens), "dtype": self.dtype}
        empty: dict[int, SecondMoment] = {}
        return replace(super().statistics(empty, end), outputs=layers, outputs_from={**source, **self.settings})


@contextmanager
def _closing(windows: Generator[Window, None, None]) -> Iterator[None]:
    """End the thread behind a generator when the block ends."""
    try:
        yield
    finally:
        windows.close()
