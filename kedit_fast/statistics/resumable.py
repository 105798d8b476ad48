"""Statistics collected into a folder: checkpoints during the job, one file per layer at its end.

{module path}.safetensors                  a finished layer
{module path}.output_metric.safetensors    the same of gradients at its output
checkpoint-R-of-N.safetensors              the sums of process R of an unfinished job
checkpoint-output-R-of-N.safetensors       the same of gradients
.lock                                      locked while a job runs
.overwriting                               exists until a job that replaces older files has finished
.overwriting-output                        the same of a job for gradients alone
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.fingerprint import difference
from kedit_fast.models.widened import SWITCH
from kedit_fast.statistics import checkpoint
from kedit_fast.statistics.checkpoint import Progress
from kedit_fast.statistics.collect import Job
from kedit_fast.statistics.corpus import Corpus, Position
from kedit_fast.statistics.expert_moments import ExpertTokens
from kedit_fast.statistics.labels import OutputGradients
from kedit_fast.statistics.memory_plan import Group, Masters, Needs, check_masters, needs
from kedit_fast.statistics.moments import MomentSum, Side
from kedit_fast.statistics.store import MODEL_FIELDS, metadata_in, path_of, read_tokens_by_expert, save_statistics
from kedit_fast.support import process_group
from kedit_fast.support.messages import comma_list, size_text
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
CHECKPOINT_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Collected:
    """What a call of `collect_into` did."""

    layers: tuple[int, ...]
    tokens: int
    """Tokens that the moments are of."""
    documents: int
    """Documents that these tokens are from."""
    files: tuple[Path, ...]
    """One per layer; those of `output_metric` come last."""
    resumed: int
    """Tokens that earlier calls had counted, of all processes."""
    passes: int
    """Passes over the text in this call; 0 when all layers were finished before."""
    seconds: float
    """Duration of this call."""
    checkpoint_seconds: float
    """The part of `seconds` that this process spent on checkpoints."""
    output_tokens: int = 0
    """Tokens that the second moments of gradients at the outputs are of; 0 where they were not wanted."""
    experts: Mapping[int, ExpertTokens] = field(default_factory=dict)
    """Layer -> how many tokens chose its experts; empty for models without experts."""


@plain_torch()
def collect_into(
    folder: str | os.PathLike,
    model: torch.nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    layers: Sequence[int],
    *,
    output_metric: OutputGradients | bool = False,
    inputs: bool = True,
    batch_tokens: int = 4096,
    checkpoint_every: float = CHECKPOINT_EVERY,
    resume: bool = False,
    overwrite: bool = False,
    masters: Masters = "auto",
    master_bytes: int | None = None,
    on_plan: Callable[[Needs], None] | None = None,
    progress: bool = False,
    spec: ArchSpec | None = None,
) -> Collected:
    """Second moments of the inputs of the edited linear layers over a corpus, into a folder, one file per layer.

    With `resume`, a job continues after any interruption, a killed process included. At most `checkpoint_every` seconds
    of work are repeated, and on a CPU the moments equal those of an uninterrupted job bit for bit. In a process group
    (torchrun) every process takes its share of the batches and writes its own checkpoint.

    Args:
        folder: made if absent. Without `resume` or `overwrite` it must be empty or absent. Unrelated files in it stay.
        model, tokenizer: see `collect_statistics`.
        corpus: the text, and how much of it counts.
        layers: zero-based.
        output_metric: also collect second moments of gradients at the layers' outputs, into files beside the others;
            see `collect_statistics`.
        inputs: False collects an output metric alone, beside whatever second moments of inputs the folder has.
        batch_tokens: tokens of a batch, padding included.
        checkpoint_every: seconds between checkpoints.
        resume: continue an earlier call with the same arguments, start one that never began, or leave a finished one as
            it is.
        overwrite: start anew; files of layers stay until the new ones replace them.
        masters: where the sums are: "device", "cpu", or "auto".
        master_bytes: bytes for sums on each device; None for what is free. Layers whose sums do not fit at once are
            collected in groups, with one pass over the corpus each.
        on_plan: called before the first pass, in every process, with what this call will take; not called where all
            layers are finished.
        progress: show a bar on stderr.
        spec: an ArchSpec for an architecture that is not known.

    Raises:
        StatisticsError: the folder has other content, is in use by another job or cannot be written; a checkpoint is
            damaged; the text or an argument is not the one that the job began with; there is no text; or moments are
            not finite. Complete files stay.

    Cost: as `collect_statistics`, and 8 d^2 bytes (8 E m^2 of experts) written per layer and checkpoint.

    Example:
        >>> corpus = Corpus(texts, max_tokens=2_000)
        >>> collect_into("stats", model, tokenizer, corpus, layers=[0, 1]).passes
        1
        >>> collect_into("stats", model, tokenizer, corpus, layers=[0, 1], resume=True).passes   # nothing is left to do
        0
    """
    folder, begin = Path(folder), time.monotonic()
    if not checkpoint_every >= 0:
        raise InvalidArgumentError(f"checkpoint_every is a time in seconds; got {checkpoint_every}")
    check_masters(masters)
    check_folder(folder, resume, overwrite)
    rank, _ = process_group.world()
    job = Job(model, tokenizer, corpus, layers, batch_tokens, spec)
    if job.view.is_sharded:
        raise StatisticsError(
            "checkpoints are for models that are whole in each process; this one is tensor-parallel: use "
            "collect_statistics, and save_statistics in the first process"
        )
    jobs = job.parts(output_metric, inputs)
    marker = folder / (checkpoint.OVERWRITING if inputs else checkpoint.OVERWRITING_OUTPUTS)
    if resume and not marker.exists():
        done = [_finished_layers(folder, part, False) for part in jobs]
        if all(len(finished) == len(job.layers) for finished in done):
            work = [_Work(part, None, finished, []) for part, finished in zip(jobs, done, strict=True)]
            return _collected(folder, work, sum(map(_tokens, done)), begin, 0.0)
    with checkpoint.claimed(folder, hold=rank == 0):
        if overwrite and rank == 0:
            for part in jobs:
                checkpoint.remove_all(folder, part.side)
            marker.touch()
        process_group.wait_for_all()
        overwriting = marker.exists()
        work = [_planned(folder, part, overwrite, overwriting, masters, master_bytes) for part in jobs]
        for part in work:
            if part.groups:
                _announce(folder, needs(part.job.view, part.groups, part.job.side), on_plan)
        clock = _Clock(checkpoint_every)
        resumed = sum(_run(folder, part, clock, progress and rank == 0) for part in work)
        if rank == 0:
            for part in jobs:
                checkpoint.remove_all(folder, part.side)
                _check_other_layers(folder, part, overwriting)
            if overwriting and inputs and len(jobs) == 1:
                _remove_outputs(folder, job)
            marker.unlink(missing_ok=True)
    resumed = sum(process_group.gather(resumed)) + sum(_tokens(part.done) for part in work if not part.groups)
    return _collected(folder, work, resumed, begin, clock.spent)


@dataclass
class _Work:
    """What a job has done in a folder, and what it has still to do."""

    job: Job
    stored: Progress | None
    """What this process's checkpoint belongs to; None without one."""
    done: dict[int, _FinishedLayer]
    groups: list[Group]
    """Layers that are left, in passes."""


def _planned(
    folder: Path, job: Job, overwrite: bool, overwriting: bool, masters: Masters, master_bytes: int | None
) -> _Work:
    """What is left of a job; raises StatisticsError where the folder has something of another one."""
    stored = checkpoint.read(folder, job.side)
    if stored is not None:
        _check_identity(checkpoint.path_of(folder, job.side), stored, _identity(job))
    done = {} if overwrite else _finished_layers(folder, job, overwriting)
    begun = [progress.layers for progress in process_group.gather(stored) if progress is not None]
    groups = _groups(job, done, begun, masters, master_bytes)
    job.check_groups(groups)
    return _Work(job, stored, done, groups)


def _run(folder: Path, work: _Work, clock: _Clock, progress: bool) -> int:
    """Do what is left; returns the tokens that this process's checkpoint had counted."""
    job, done, resumed = work.job, work.done, 0
    rank, world = process_group.world()
    for group in work.groups:
        sums = job.accumulators(group)
        start = Position()
        if work.stored is not None and work.stored.layers == group.layers:
            checkpoint.restore(folder, sums, job.side)
            start = work.stored.position
            resumed = next(iter(sums.values())).count
        saver = _Saver(folder, group, job, sums, clock)
        end = job.run(sums, start, saver, progress)
        if any(other.corpus != end.digest for layer, other in done.items() if layer not in group.layers):
            raise StatisticsError(f"the text is not that of the layers that {folder} has already")
        if world > 1:
            saver.save(end)  # other processes may still be at work, and one of them may die
        end = job.agreed(end)
        for layer, second in job.finish(sums):
            if rank == 0:
                save_statistics(job.statistics({layer: second}, end), folder)
            done[layer] = _FinishedLayer(second.count, end.tokens, end.documents, end.digest)
        process_group.wait_for_all()
        checkpoint.remove(folder, job.side)
    return resumed


def _announce(folder: Path, taken: Needs, on_plan: Callable[[Needs], None] | None) -> None:
    """Tell the caller what the passes take, and warn where the disk has less than that."""
    if on_plan is not None:
        on_plan(taken)
    free = shutil.disk_usage(folder).free
    if taken.disk_bytes > free and process_group.world()[0] == 0:
        _log.warning(
            "%s has %s free, and files with checkpoints take up to %s (the files alone %s)",
            folder,
            *map(size_text, (free, taken.disk_bytes, taken.file_bytes)),
        )


@dataclass(frozen=True)
class _FinishedLayer:
    """What a layer's file was made from."""

    tokens: int
    """That were counted."""
    read: int
    """That were read: with weights or labels, more may be."""
    documents: int
    corpus: str
    """Chained SHA-256 of the documents."""


def _tokens(done: Mapping[int, _FinishedLayer]) -> int:
    return next(iter(done.values())).tokens


def _collected(folder: Path, work: Sequence[_Work], resumed: int, begin: float, saving: float) -> Collected:
    job = work[0].job
    tokens = {part.job.side: _tokens(part.done) for part in work}
    files = [path_of(folder, job.view.module_name(layer), part.job.side) for part in work for layer in job.layers]
    return Collected(
        job.layers,
        tokens.get("input", 0),
        next(iter(work[0].done.values())).documents,
        tuple(files),
        resumed,
        sum(len(part.groups) for part in work),
        time.monotonic() - begin,
        saving,
        tokens.get("output", 0),
        {
            layer: ExpertTokens.of(by_expert)
            for part in work
            for layer in (job.layers if part.job.side == "input" else ())
            if (by_expert := read_tokens_by_expert(path_of(folder, job.view.module_name(layer)))) is not None
        },
    )


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise StatisticsError when statistics may not or cannot be collected into a folder."""
    if resume and overwrite:
        raise StatisticsError("--resume continues, --overwrite starts anew: give one of them")
    try:
        if folder.exists():
            has_files = any(not path.name.startswith(".") for path in folder.iterdir())
            if has_files and not resume and not overwrite:
                raise StatisticsError(f"{folder} exists: --resume continues it, --overwrite starts anew")
            if resume:
                return  # a finished job may be in a folder that is read-only
        parent = folder.absolute()
        while not parent.exists():
            parent = parent.parent
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=".kedit_fast."))
    except OSError as error:
        raise StatisticsError(f"cannot write statistics to {folder}: {error.strerror or error}") from error


def _identity(job: Job) -> dict[str, str]:
    """Everything that the sums in a checkpoint depend on, beside the text."""
    _, world = process_group.world()
    sizes = {"batch_tokens": str(job.batch_tokens), "processes": str(world)}
    return {**job.settings, "dtype": job.dtype, **sizes, **job.model}


def _dtype_hint(name: str) -> str:
    """The usual cause of another dtype than before is a processor with or without units for 16 bits."""
    return f"; {SWITCH}=native computes in the model's own dtype" if name == "dtype" else ""


def _check_identity(path: Path, stored: Progress, identity: Mapping[str, str]) -> None:
    """Raise StatisticsError when a checkpoint is of another job."""
    model = {name: stored.identity.get(name, "") for name in MODEL_FIELDS}
    if changed := difference(model, {name: identity[name] for name in MODEL_FIELDS}):
        raise StatisticsError(f"{path} was begun with another model: different {changed}")
    for name, value in identity.items():
        before = stored.identity.get(name)
        if name not in MODEL_FIELDS and before != value:
            raise StatisticsError(
                f"{path} was begun with {name} {before or 'not set'}, not {value or 'not set'}: give it again, or "
                f"start anew with --overwrite{_dtype_hint(name)}"
            )


def _finished_layers(folder: Path, job: Job, tolerate: bool) -> dict[int, _FinishedLayer]:
    """Layers whose files are those that this job would write.

    Args:
        folder: of the files.
        job: to compare them with.
        tolerate: ignore files that were made from something else, because this job replaces them.

    Raises:
        StatisticsError: a file that was made from something else.
    """
    finished, digests = {}, {}
    for layer in job.layers:
        path = path_of(folder, job.view.module_name(layer), job.side)
        if not path.exists():
            continue
        metadata = metadata_in(path, job.side)
        count = int(metadata["count"])
        read = int(metadata.get("tokens") or count)  # older files have no `tokens`
        file = _FinishedLayer(count, read, int(metadata.get("documents", 0)), metadata["corpus"])
        changed = ""
        if job.side == "input" and ("shared_checksum" in metadata) != (job.view.shared_experts(layer) is not None):
            changed = "spec (shared experts are in the stack there or here, not in both)"
        changed = changed or difference({name: metadata.get(name, "") for name in MODEL_FIELDS}, job.model)
        for name, value in {**job.settings, "dtype": job.dtype}.items():
            before = metadata.get(name, "")
            if not changed and before != value:
                changed = f"{name} ({before or 'not set'} there, {value or 'not set'} here{_dtype_hint(name)})"
        if not changed and job.corpus.repeatable:
            if file.documents not in digests:
                digests[file.documents] = job.reader.digest(file.documents)
            if file.corpus != digests[file.documents] or not job.reader.ends_at(file.documents, file.read):
                changed = "text"
        if not changed:
            finished[layer] = file
        elif not tolerate:
            raise StatisticsError(
                f"{path} was made from something else: different {changed}. Choose another folder, or start anew with "
                "--overwrite"
            )
    if len(finished) == len(job.layers) and not job.corpus.repeatable:
        file = next(iter(finished.values()))  # the text can be read now, since no pass will need it
        if job.reader.digest(file.documents) != file.corpus:
            raise StatisticsError(f"{folder} was made from something else: different text")
    return finished


def _groups(
    job: Job,
    done: Mapping[int, _FinishedLayer],
    begun: Sequence[tuple[int, ...]],
    masters: Masters,
    master_bytes: int | None,
) -> list[Group]:
    """The group of the checkpoint, unchanged (some of its files may be written), then the layers that are left.

    Args:
        job: with all layers.
        done: layers with files.
        begun: layers of each process's checkpoint.
        masters, master_bytes: see `collect_into`.
    """
    first = next((layers for layers in begun if not set(layers) <= set(done)), ())
    if not set(first) <= set(job.layers):
        raise StatisticsError(
            f"the checkpoint has layers {comma_list(first)}, this job wants {comma_list(job.layers)}: give them again, "
            "or start anew with --overwrite"
        )
    groups = job.plan(first, masters, master_bytes) if first else []
    if len(groups) > 1:
        raise StatisticsError(f"the sums of layers {comma_list(first)}, which were begun together, do not fit")
    rest = tuple(layer for layer in job.layers if layer not in first and layer not in done)
    return groups + (job.plan(rest, masters, master_bytes) if rest else [])


def _check_other_layers(folder: Path, job: Job, overwriting: bool) -> None:
    """Remove files of the model's other layers where the folder is overwritten; else warn if they are of other text."""
    corpus = metadata_in(path_of(folder, job.view.module_name(job.layers[0]), job.side), job.side)["corpus"]
    for layer in range(job.view.num_layers):
        path = path_of(folder, job.view.module_name(layer), job.side)
        if layer in job.layers or not path.exists():
            continue
        if overwriting:
            path.unlink()
            continue
        try:
            same = metadata_in(path, job.side)["corpus"] == corpus
        except StatisticsError as error:
            _log.warning("%s", error)
            continue
        if not same:
            _log.warning("%s is of another text than the layers that were collected now", path)


def _remove_outputs(folder: Path, job: Job) -> None:
    """Remove output metrics of older statistics, where the folder is overwritten without any."""
    for layer in range(job.view.num_layers):
        path_of(folder, job.view.module_name(layer), "output").unlink(missing_ok=True)


class _Clock:
    """When the next checkpoint is due, and how long they took in all."""

    def __init__(self, every: float):
        self.every, self.spent, self.last = every, 0.0, time.monotonic()  # seconds

    def due(self) -> bool:
        return time.monotonic() - self.last >= self.every


class _Saver:
    """Writes this process's checkpoint at intervals."""

    def __init__(
        self,
        folder: Path,
        group: Group,
        job: Job,
        sums: Mapping[int, MomentSum],
        clock: _Clock,
    ):
        self._folder, self._sums, self._clock = folder, sums, clock
        self._side: Side = job.side
        self._progress = Progress(group.layers, Position(), _identity(job))

    def due(self) -> bool:
        return self._clock.due()

    def save(self, position: Position) -> None:
        begin = time.monotonic()
        checkpoint.save(self._folder, replace(self._progress, position=position), self._sums, self._side)
        self._clock.last = time.monotonic()
        self._clock.spent += self._clock.last - begin
