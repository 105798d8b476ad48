"""Statistics collected into a folder: checkpoints while it runs, a file a layer when it is done.

{module path}.safetensors        a finished layer
checkpoint-R-of-N.safetensors    the sums of process R of a job that is not finished
.lock                            held while a job runs
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

from kedit_fast import distributed
from kedit_fast.errors import StatisticsError
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.fingerprint import difference
from kedit_fast.statistics import checkpoint
from kedit_fast.statistics.checkpoint import Progress
from kedit_fast.statistics.collect import Job
from kedit_fast.statistics.corpus import Corpus, Position
from kedit_fast.statistics.memory_plan import Group, plan_groups
from kedit_fast.statistics.moments import SecondMomentAccumulator
from kedit_fast.statistics.store import MODEL_FIELDS, metadata_in, path_of, save_statistics

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
    progress: bool = True,
    spec: ArchSpec | None = None,
) -> Collected:
    """Second moments of the inputs of the edited linear layers over a corpus, into a folder, a file a layer.

    A job that ended for any reason, a killed process included, goes on with `resume`: at most `checkpoint_every`
    seconds are done again, and on a CPU the files are those of an uninterrupted job to the bit. In a process group
    (torchrun) every process takes its share of the batches and keeps its own checkpoint.

    Args:
        folder: made if absent; must be empty or absent without `resume` and `overwrite`.
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
        raise StatisticsError(f"checkpoint_every is a time in seconds; got {checkpoint_every}")
    rank, _ = distributed.world()
    check_folder(folder, resume, overwrite)
    job = Job(model, tokenizer, corpus, layers, batch_tokens, spec)
    with checkpoint.claimed(folder, hold=rank == 0):
        if overwrite and rank == 0:
            checkpoint.remove_all(folder)
        distributed.wait_for_all()
        plan = _plan(job)
        progress_made = None if overwrite else checkpoint.read(folder)
        if progress_made is not None:
            _check_plan(folder, progress_made, plan)
        finished = {} if overwrite else _finished(folder, job, tolerate=progress_made is not None)
        begun = [p.layers for p in distributed.gather(progress_made) if p is not None]
        groups = _groups(job, finished, begun, masters, master_bytes)
        job.check_groups(groups)
        clock = _Clock(checkpoint_every)
        resumed, end = 0, None
        for group in groups:
            sums = job.accumulators(group)
            start = Position()
            if progress_made is not None and progress_made.layers == group.layers:
                checkpoint.restore(folder, sums)
                start = progress_made.position
                resumed = next(iter(sums.values())).count
            saver = _Saver(folder, group, plan, sums, clock)
            end = job.run(sums, start, saver, progress and rank == 0)
            if distributed.world()[1] > 1:
                saver.save(end)  # the others may still be at work, and one of them may die
            moments = job.finished(sums, end)
            if rank == 0:
                save_statistics(job.statistics(moments, end), folder)
            finished |= {layer: found.count for layer, found in moments.items()}
            distributed.wait_for_all()
            checkpoint.remove(folder)
        documents = end.documents if end is not None else _documents(folder, job)
        if rank == 0:
            checkpoint.remove_all(folder)
            _tidy(folder, job, overwrite)
    tokens = next(iter(finished.values()))
    resumed = tokens if not groups else sum(distributed.gather(resumed))
    files = tuple(path_of(folder, job.view.module_name(layer)) for layer in job.layers)
    return Collected(job.layers, tokens, documents, files, resumed, len(groups), time.monotonic() - begin, clock.spent)


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise StatisticsError when statistics may not or cannot be collected into a folder."""
    try:
        begun = folder.exists() and any(path.name != checkpoint.LOCK for path in folder.iterdir())
        parent = folder.absolute()
        while not parent.exists():
            parent = parent.parent
        os.rmdir(tempfile.mkdtemp(dir=parent))
    except OSError as error:
        raise StatisticsError(f"cannot write statistics to {folder}: {error.strerror or error}") from error
    if begun and not resume and not overwrite:
        raise StatisticsError(f"{folder} exists: --resume goes on with it, --overwrite starts anew")


def _plan(job: Job) -> dict[str, str]:
    """What a checkpoint depends on."""
    _, world = distributed.world()
    return {
        **job.asked, "dtype": job.dtype, "batch_tokens": str(job.batch_tokens), "processes": str(world), **job.model,
    }  # fmt: skip


def _check_plan(folder: Path, progress: Progress, plan: Mapping[str, str]) -> None:
    path = checkpoint.path_of(folder)
    model = {name: progress.plan.get(name, "") for name in MODEL_FIELDS}
    if what := difference(model, {name: plan[name] for name in MODEL_FIELDS}):
        raise StatisticsError(f"{path} was begun with another model: different {what}")
    for name, value in plan.items():
        if name not in MODEL_FIELDS and progress.plan.get(name) != value:
            raise StatisticsError(
                f"{path} was begun with {name} {progress.plan.get(name) or 'not set'}, not {value or 'not set'}: give "
                "it again, or start anew with --overwrite"
            )


def _finished(folder: Path, job: Job, tolerate: bool) -> dict[int, int]:
    """Layer -> tokens of the files that are what this job would write.

    Raises:
        StatisticsError: a file of something else, unless `tolerate` (a job that replaces it is under way).
    """
    found, digests = {}, {}
    for layer in job.layers:
        path = path_of(folder, job.view.module_name(layer))
        if not path.exists():
            continue
        metadata = metadata_in(path)
        what = difference({name: metadata.get(name, "") for name in MODEL_FIELDS}, job.model)
        for name, value in job.asked.items():
            if not what and metadata.get(name, "") != value:
                what = f"{name} ({metadata.get(name) or 'not set'} there, {value or 'not set'} here)"
        if not what and metadata["dtype"] != job.dtype:
            what = f"dtype ({metadata['dtype']} there, {job.dtype} here)"
        documents = int(metadata.get("documents", 0))
        if not what and job.corpus.repeatable:
            if documents not in digests:
                digests[documents] = job.reader.digest(documents)
            if metadata["corpus"] != digests[documents]:
                what = "text"
        if not what:
            found[layer] = int(metadata["count"])
        elif not tolerate:
            raise StatisticsError(
                f"{path} was made from something else: different {what}. Choose another folder, or start anew with "
                "--overwrite"
            )
    return found


def _groups(
    job: Job, finished: Mapping[int, int], begun: Sequence[tuple[int, ...]], masters: str, master_bytes: int | None
) -> list[Group]:
    """The group that was begun, as it was (some of its files may be written), then the rest that is not finished."""
    first = next((layers for layers in begun if not set(layers) <= set(finished)), ())
    if not set(first) <= set(job.layers):
        raise StatisticsError(
            f"the checkpoint has layers {', '.join(map(str, first))}, this job wants "
            f"{', '.join(map(str, job.layers))}: give them again, or start anew with --overwrite"
        )
    groups = plan_groups(job.view, first, job.batch_tokens, masters, master_bytes) if first else []
    if len(groups) > 1:
        raise StatisticsError(f"the sums of layers {', '.join(map(str, first))}, which were begun together, do not fit")
    rest = tuple(layer for layer in job.layers if layer not in first and layer not in finished)
    return groups + (plan_groups(job.view, rest, job.batch_tokens, masters, master_bytes) if rest else [])


def _documents(folder: Path, job: Job) -> int:
    return int(metadata_in(path_of(folder, job.view.module_name(job.layers[0]))).get("documents", 0))


def _tidy(folder: Path, job: Job, overwrite: bool) -> None:
    """Other layers' files: gone where the folder is overwritten, else named if they are of another corpus."""
    own = [path_of(folder, job.view.module_name(layer)) for layer in job.layers]
    corpus = metadata_in(own[0])["corpus"]
    for path in sorted(folder.glob("*.safetensors")):
        if path in own:
            continue
        if overwrite:
            path.unlink()
        elif metadata_in(path)["corpus"] != corpus:
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
