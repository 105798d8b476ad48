"""Statistics collected into a folder: checkpoints while it runs, a file a layer when it is done.

{module path}.safetensors        a finished layer
checkpoint-R-of-N.safetensors    the sums of process R of a job that is not finished
.lock                            held while a job runs
.overwriting                     there until a job that replaces older files has ended
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from kedit_fast.statistics.memory_plan import Group, check_masters, plan_groups
from kedit_fast.statistics.moments import SecondMomentAccumulator
from kedit_fast.statistics.store import MODEL_FIELDS, metadata_in, path_of, save_statistics
from kedit_fast.support import process_group
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
CHECKPOINT_EVERY = 60.0


@dataclass(frozen=True)
class Collected:
    """What a call of `collect_into` did."""

    layers: tuple[int, ...]
    tokens: int
    documents: int
    files: tuple[Path, ...]
    resumed: int  # tokens that were found done, by all processes
    passes: int  # over the text, in this call; 0 when everything was found finished
    seconds: float
    checkpoint_seconds: float  # of them, spent on writing checkpoints by this process


@plain_torch()
def collect_into(
    folder: str | os.PathLike,
    model: torch.nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    layers: Sequence[int],
    *,
    batch_tokens: int = 4096,
    checkpoint_every: float = CHECKPOINT_EVERY,
    resume: bool = False,
    overwrite: bool = False,
    masters: str = "auto",
    master_bytes: int | None = None,
    progress: bool = False,
    spec: ArchSpec | None = None,
) -> Collected:
    """Second moments of the inputs of the edited linear layers over a corpus, into a folder, a file a layer.

    A job that ended for any reason, a killed process included, goes on with `resume`: at most `checkpoint_every`
    seconds are done again, and on a CPU the moments are those of an uninterrupted job to the bit. In a process group
    (torchrun) every process takes its share of the batches and keeps its own checkpoint.

    Args:
        folder: made if absent; must be empty or absent without `resume` or `overwrite`. Files of others in it stay.
        model, tokenizer: see collect_statistics.
        corpus: what counts.
        layers: zero-based.
        batch_tokens: tokens of a batch, padding included.
        checkpoint_every: seconds between checkpoints.
        resume: go on where an earlier call with the same arguments stopped, start one that never began, and leave one
            that is finished as it is.
        overwrite: start anew; files of layers stay until the new ones take their places.
        masters: where sums are kept: "device", "cpu", or "auto".
        master_bytes: what they may take on each device; None for what is free. Layers whose sums do not fit at once
            are done in groups, a pass over the corpus each.
        progress: show a bar on stderr.
        spec: an ArchSpec for an architecture that is not known.

    Raises:
        StatisticsError: the folder holds something else, is in use by another job or cannot be written; a damaged
            checkpoint; other text or numbers than the job was begun with; no text; moments that are not finite. What
            was complete stays.

    Cost: as collect_statistics, and 8 d^2 bytes written a layer and checkpoint.
    """
    folder, begin = Path(folder), time.monotonic()
    if not checkpoint_every >= 0:
        raise InvalidArgumentError(f"checkpoint_every is a time in seconds; got {checkpoint_every}")
    check_masters(masters)
    check_folder(folder, resume, overwrite)
    rank, _ = process_group.world()
    job = Job(model, tokenizer, corpus, layers, batch_tokens, spec)
    marker = folder / checkpoint.OVERWRITING
    if resume and not marker.exists() and len(done := _done(folder, job, False)) == len(job.layers):
        return _collected(folder, job, done, _total(done), 0, begin, 0.0)
    with checkpoint.claimed(folder, hold=rank == 0):
        if overwrite and rank == 0:
            checkpoint.remove_all(folder)
            marker.touch()
        process_group.wait_for_all()
        overwriting = marker.exists()
        plan, found = _plan(job), checkpoint.read(folder)
        if found is not None:
            _check_plan(folder, found, plan)
        done = {} if overwrite else _done(folder, job, overwriting)
        begun = [p.layers for p in process_group.gather(found) if p is not None]
        groups = _groups(job, done, begun, masters, master_bytes)
        job.check_groups(groups)
        clock, resumed = _Clock(checkpoint_every), 0
        for group in groups:
            sums = job.accumulators(group)
            start = Position()
            if found is not None and found.layers == group.layers:
                checkpoint.restore(folder, sums)
                start = found.position
                resumed = next(iter(sums.values())).count
            saver = _Saver(folder, group, plan, sums, clock)
            end = job.run(sums, start, saver, progress and rank == 0)
            if any(other.corpus != end.digest for layer, other in done.items() if layer not in group.layers):
                raise StatisticsError(f"the text is not that of the layers that {folder} has already")
            if process_group.world()[1] > 1:
                saver.save(end)  # the others may still be at work, and one of them may die
            for layer, moment in job.finished(sums, end):
                if rank == 0:
                    save_statistics(job.statistics({layer: moment}, end), folder)
                done[layer] = _Done(moment.count, end.documents, end.digest)
            process_group.wait_for_all()
            checkpoint.remove(folder)
        if rank == 0:
            checkpoint.remove_all(folder)
            _tidy(folder, job, overwriting)
            marker.unlink(missing_ok=True)
    resumed = sum(process_group.gather(resumed)) if groups else _total(done)
    return _collected(folder, job, done, resumed, len(groups), begin, clock.spent)


@dataclass(frozen=True)
class _Done:
    """What a layer's file was made from."""

    tokens: int
    documents: int
    corpus: str


def _total(done: Mapping[int, _Done]) -> int:
    return next(iter(done.values())).tokens


def _collected(
    folder: Path, job: Job, done: Mapping[int, _Done], resumed: int, passes: int, begin: float, saving: float
) -> Collected:
    files = tuple(path_of(folder, job.view.module_name(layer)) for layer in job.layers)
    documents = next(iter(done.values())).documents
    return Collected(job.layers, _total(done), documents, files, resumed, passes, time.monotonic() - begin, saving)


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise StatisticsError when statistics may not or cannot be collected into a folder."""
    if resume and overwrite:
        raise StatisticsError("--resume goes on, --overwrite starts anew: give one of them")
    try:
        if folder.exists():
            begun = any(not path.name.startswith(".") for path in folder.iterdir())
            if begun and not resume and not overwrite:
                raise StatisticsError(f"{folder} exists: --resume goes on with it, --overwrite starts anew")
            if resume:
                return  # what is finished may well be read-only
        parent = folder.absolute()
        while not parent.exists():
            parent = parent.parent
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=".kedit_fast."))
    except OSError as error:
        raise StatisticsError(f"cannot write statistics to {folder}: {error.strerror or error}") from error


def _plan(job: Job) -> dict[str, str]:
    """What a checkpoint depends on."""
    _, world = process_group.world()
    return {
        **job.asked, "dtype": job.dtype, "batch_tokens": str(job.batch_tokens), "processes": str(world), **job.model,
    }  # fmt: skip


def _dtype_hint(name: str) -> str:
    """What may be behind another dtype than before: a processor with or without units for 16 bits."""
    return f"; {SWITCH}=native computes in the model's own dtype" if name == "dtype" else ""


def _check_plan(folder: Path, progress: Progress, plan: Mapping[str, str]) -> None:
    path = checkpoint.path_of(folder)
    model = {name: progress.plan.get(name, "") for name in MODEL_FIELDS}
    if what := difference(model, {name: plan[name] for name in MODEL_FIELDS}):
        raise StatisticsError(f"{path} was begun with another model: different {what}")
    for name, value in plan.items():
        if name not in MODEL_FIELDS and progress.plan.get(name) != value:
            raise StatisticsError(
                f"{path} was begun with {name} {progress.plan.get(name) or 'not set'}, not {value or 'not set'}: give "
                f"it again, or start anew with --overwrite{_dtype_hint(name)}"
            )


def _done(folder: Path, job: Job, tolerate: bool) -> dict[int, _Done]:
    """Layers whose files are what this job would write.

    Raises:
        StatisticsError: a file of something else, unless `tolerate` (a job that replaces it is under way).
    """
    found, digests = {}, {}
    for layer in job.layers:
        path = path_of(folder, job.view.module_name(layer))
        if not path.exists():
            continue
        metadata = metadata_in(path)
        own = _Done(int(metadata["count"]), int(metadata.get("documents", 0)), metadata["corpus"])
        what = difference({name: metadata.get(name, "") for name in MODEL_FIELDS}, job.model)
        for name, value in {**job.asked, "dtype": job.dtype}.items():
            if not what and metadata.get(name, "") != value:
                what = f"{name} ({metadata.get(name) or 'not set'} there, {value or 'not set'} here{_dtype_hint(name)})"
        if not what and job.corpus.repeatable:
            if own.documents not in digests:
                digests[own.documents] = job.reader.digest(own.documents)
            if own.corpus != digests[own.documents] or not job.reader.ends_at(own.documents, own.tokens):
                what = "text"
        if not what:
            found[layer] = own
        elif not tolerate:
            raise StatisticsError(
                f"{path} was made from something else: different {what}. Choose another folder, or start anew with "
                "--overwrite"
            )
    if len(found) == len(job.layers) and not job.corpus.repeatable:
        own = next(iter(found.values()))  # no pass will need the text
        if job.reader.digest(own.documents) != own.corpus:
            raise StatisticsError(f"{folder} was made from something else: different text")
    return found


def _groups(
    job: Job, done: Mapping[int, _Done], begun: Sequence[tuple[int, ...]], masters: str, master_bytes: int | None
) -> list[Group]:
    """The group that was begun, as it was (some of its files may be written), then the rest that is not finished."""
    first = next((layers for layers in begun if not set(layers) <= set(done)), ())
    if not set(first) <= set(job.layers):
        raise StatisticsError(
            f"the checkpoint has layers {', '.join(map(str, first))}, this job wants "
            f"{', '.join(map(str, job.layers))}: give them again, or start anew with --overwrite"
        )
    groups = plan_groups(job.view, first, job.batch_tokens, masters, master_bytes) if first else []
    if len(groups) > 1:
        raise StatisticsError(f"the sums of layers {', '.join(map(str, first))}, which were begun together, do not fit")
    rest = tuple(layer for layer in job.layers if layer not in first and layer not in done)
    return groups + (plan_groups(job.view, rest, job.batch_tokens, masters, master_bytes) if rest else [])


def _tidy(folder: Path, job: Job, overwriting: bool) -> None:
    """Files of this model's other layers: gone where the folder is overwritten, else named if of another text."""
    corpus = metadata_in(path_of(folder, job.view.module_name(job.layers[0])))["corpus"]
    for layer in range(job.view.num_layers):
        path = path_of(folder, job.view.module_name(layer))
        if layer in job.layers or not path.exists():
            continue
        if overwriting:
            path.unlink()
            continue
        try:
            same = metadata_in(path)["corpus"] == corpus
        except StatisticsError as error:
            _log.warning("%s", error)
            continue
        if not same:
            _log.warning("%s is of another text than the layers that were collected now", path)


class _Clock:
    """Says when an interval is over."""

    def __init__(self, every: float):
        self.every, self.spent, self.last = every, 0.0, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last >= self.every


class _Saver:
    """Writes this process's checkpoint at intervals."""

    def __init__(
        self, folder: Path, group: Group, plan: dict[str, str], sums: Mapping[int, SecondMomentAccumulator],
        clock: _Clock,
    ):  # fmt: skip
        self._folder, self._sums, self._clock = folder, sums, clock
        self._progress = Progress(group.layers, Position(), plan)

    def due(self) -> bool:
        return self._clock.due()

    def save(self, position: Position) -> None:
        begin = time.monotonic()
        checkpoint.save(self._folder, replace(self._progress, position=position), self._sums)
        self._clock.last = time.monotonic()
        self._clock.spent += self._clock.last - begin
