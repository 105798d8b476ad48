"""A run of batches on disk, so that the same call goes on after any interruption and ends with the same bits.

A folder holds a log of records (`kedit_fast.support.record_log`). The first one is what the run found out before it
wrote anything; each further one is a batch, in the order of the run: the ledger's entries, what the state between
batches has got, the values where they are stored, and what the caller adds, such as answers of the model. Nothing in a
record is computed again: the weights are written by the same op from the same factors.

A batch that was not recorded when its process ended is begun again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from kedit_fast._version import __version__
from kedit_fast.editing.batch_record import BatchRecord
from kedit_fast.editing.editor import Editor
from kedit_fast.editing.result import EditResult
from kedit_fast.editing.values.memit_values import MemitCache
from kedit_fast.editing.values.store import ValueFile
from kedit_fast.errors import CheckpointError, EditError, InvalidArgumentError
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.solver.low_rank import Update
from kedit_fast.support.files import require_space, write_text
from kedit_fast.support.matrix_bits import edit_fingerprint
from kedit_fast.support.messages import first_line
from kedit_fast.support.process_group import from_all, world
from kedit_fast.support.record_log import Record, RecordLog

_log = logging.getLogger("kedit_fast")
Result = TypeVar("Result")
COST_SHARE = 0.05
"""Without a number of batches, checkpoints are written as often as they take at most this share of the time."""
CHOICE, OUTPUTS = "choice.json", "outputs.json"
"""Files of the command line in the same folder: hyper-parameters that trials chose, and what is being saved."""
_VALUES = "values/"


@dataclass(frozen=True)
class StoredBatch:
    """A batch of the run, as it was recorded."""

    requests: tuple[int, ...]
    """Indices of its requests in the run."""
    skipped: dict[int, str]
    """Index of a request -> why it was left out, by this batch."""
    result: EditResult | None
    """None where the batch failed. Its updates are the ledger's, in the precision of the master."""
    beside: dict[str, Any]
    """What the caller has added."""


class RunCheckpoint:
    """The folder of a run. `opened` makes one; `claim` comes before anything is written.

    Args:
        log: the folder, locked by the first process.
        editor: which has written nothing.
        every: batches between two writes; None for as often as is cheap.
    """

    def __init__(self, log: RecordLog, editor: Editor, every: int | None):
        self._log, self._editor, self._every = log, editor, every
        self.is_new = log.is_new
        """Whether the run has not begun before."""
        self._prepared: Mapping[int, PreparedRequest] = {}
        self._begin = self._last_end = time.monotonic()
        self._last_cost, self._failed = 0.0, False
        self._earlier = float(log.facts.get("seconds", 0.0))
        self.seconds = 0.0
        """What this process has spent on writing."""

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: str | os.PathLike, editor: Editor, every: int | None = None) -> Iterator[RunCheckpoint]:
        """The checkpoint of a run, in a folder that is made or holds an earlier one.

        In a process group every process calls this, the first one writes, and all read the same folder.

        Args:
            folder: of the checkpoint; locked while the block runs.
            editor: which has written nothing; it takes over the context prefixes of an earlier process.
            every: batches between two writes; None for as often as is cheap.

        Raises:
            CheckpointError: the folder cannot be written, is in use, or holds other files; nothing has run.
        """
        if every is not None and every < 1:
            raise InvalidArgumentError(f"checkpoint_every is a number of batches, at least 1; got {every}")
        if editor.view.is_sharded:
            raise CheckpointError(
                "a checkpoint is for models that are whole in each process; this one is tensor-parallel"
            )
        if editor.values is not None and not isinstance(editor.values, ValueFile | MemitCache):
            raise CheckpointError(
                "with a checkpoint, values are in a file of ours or in memit's: another store cannot wait"
            )
        busy = f"{folder} is the checkpoint of a run that is still going on"
        with contextlib.ExitStack() as stack:

            def open_log() -> RecordLog | None:
                if world()[0]:
                    return None
                return stack.enter_context(RecordLog.opened(folder, CheckpointError, busy, (CHOICE, OUTPUTS)))

            mine = _in_all(open_log)
            self = cls(mine or RecordLog(Path(folder), CheckpointError), editor, every)
            self.is_new = from_all(lambda: self._log.is_new, CheckpointError)[0]
            if not self.is_new and "prefixes" in self._log.facts:
                editor.take_over(self._log.facts["prefixes"], self._log.facts["values_most"])
            yield self

    @property
    def batches(self) -> int:
        """Number of batches that are safe."""
        return max(0, self._log.written - 1)

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._log.folder

    def claim(self, prepared: Mapping[int, PreparedRequest], settings: Mapping[str, Any]) -> None:
        """Begin a run in the folder, or see that it is the one that was begun there.

        Args:
            prepared: index of a request in the run -> the request; in the order of the run.
            settings: what the run depends on beside its editor and requests; JSON can hold it.

        Raises:
            CheckpointError: the folder is of another run, and the message says what differs; or its disk has too
                little room. No value was optimized.
        """
        self._prepared = prepared
        identity = self._identity(settings)
        _in_all(lambda: self._compare(identity))

    def _identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that the bits of the run depend on, by the names that messages use."""
        editor, requests = self._editor, list(self._prepared.items())
        identity = {
            "method": editor.recipe.name,
            "hyper-parameters": asdict(editor.hparams),
            "seed": editor.seed,
            "target separator": editor.target_separator,
            "statistics": _fingerprints_of_statistics(editor),
            **editor.identity(),
            "requests": f"{len(requests)}, {hashlib.sha256(repr(requests).encode()).hexdigest()[:16]}",
            **settings,
        }
        return json.loads(json.dumps(identity, default=str))

    def _compare(self, here: Mapping[str, Any]) -> None:
        """Raise CheckpointError when the folder is of another run; in the first process."""
        if world()[0]:
            return
        environment = _environment(self._editor)
        if self._log.is_new:
            require_space({self._log.folder: self.needed_bytes(len(self._prepared))}, CheckpointError)
            self._log.facts = {"identity": dict(here), "environment": environment}
            self._log.write(self._facts())
            return
        there = self._log.facts.get("identity", {})
        for name in dict.fromkeys((*here, *there)):
            if there.get(name) != here.get(name):
                raise CheckpointError(
                    f"{self._log.folder} is the checkpoint of another run: {_difference(name, there, here)}. Give it "
                    "again, or another folder"
                )
        before = self._log.facts.get("environment", {})
        changed = [f"{name} {before.get(name)}" for name, now in environment.items() if before.get(name) != now]
        if changed:
            _log.warning("%s was begun with %s: the last bits may differ", self._log.folder, ", ".join(changed))

    def needed_bytes(self, requests: int) -> int:
        """About what records of so many requests take: factors, keys of earlier edits, masks."""
        editor, total = self._editor, 0
        for weight in editor.modules.values():
            *experts, out, inner = weight.shape
            inner *= math.prod(experts)  # of the stacked matrix
            wide = 8 if weight.dtype == torch.float64 else 4
            total += wide * min(requests * (out + inner), out * inner + min(out, inner) ** 2)
            total += 8 * inner * requests if editor.recipe.memory else 0
            total += out * inner // 8 if editor.recipe.shaping == "rect" else 0
        return total

    def reserve(self, requests: int) -> None:
        """Raise CheckpointError when a batch of so many requests could not be written now."""
        _in_all(lambda: None if world()[0] else self._log.reserve(self.needed_bytes(requests)))

    def begin(self, beside: Mapping[str, Any]) -> None:
        """Record what is known before the first batch, at once.

        Args:
            beside: what `resume` is to return; JSON can hold it.

        Raises:
            CheckpointError: it cannot be written; no value was optimized.
        """
        editor = self._editor
        answers = from_all(lambda: editor.values_together(list(self._prepared.values())), CheckpointError)
        most = min((answer for answer in answers if answer is not None), default=None)
        editor.take_over(editor.prefixes, most)
        self._log.facts |= {"prefixes": list(editor.prefixes), "values_most": most}
        self._log.append(Record({"beside": dict(beside)}))
        _in_all(self._write)

    def resume(self) -> Iterator[dict[str, Any] | StoredBatch]:
        """What the caller gave to `begin`, then each recorded batch when the editor has written it again.

        Nothing where the run was not begun.

        Raises:
            CheckpointError: a damaged file, or matrices that get other bits than when the batch was recorded.
        """
        for number, record in enumerate(self._log):
            if number == 0:
                yield dict(record.facts["beside"])
            else:
                yield self._repeated(number, record)
        self._last_end = time.monotonic()

    def _repeated(self, number: int, record: Record) -> StoredBatch:
        """Write a recorded batch again."""
        editor, tensors = self._editor, dict(record.tensors)
        batch = result = None
        try:
            values = {n.removeprefix(_VALUES): tensors.pop(n) for n in list(tensors) if n.startswith(_VALUES)}
            indices = tuple(int(index) for index in record.facts["requests"])
            skipped = {int(index): str(reason) for index, reason in record.facts["skipped"].items()}
            if record.facts["batch"] is not None:
                batch = BatchRecord.from_parts(record.facts["batch"], tensors)
            if record.facts["result"] is not None:
                written = [self._prepared[i] for i in indices if i not in skipped] if batch is not None else []
                result = _restored(record.facts["result"], written, batch, editor.prefixes)
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self._log.folder}: batch {number} is damaged: {first_line(error)}") from error
        if batch is not None and result is not None:
            try:
                editor.repeat(batch, result.requests)
            except EditError as error:
                raise CheckpointError(f"{self._log.folder}: batch {number}: {error}") from error
            result = replace(result, resolved=editor.resolved)
        if isinstance(editor.values, ValueFile | MemitCache):
            editor.values.absorb(values)
        return StoredBatch(indices, skipped, result, dict(record.facts["beside"]))

    def add(
        self,
        requests: Sequence[int],
        skipped: Mapping[int, str],
        result: EditResult | None,
        beside: Mapping[str, Any],
    ) -> None:
        """Record a batch that has just been written or has failed, and write it with others when that is due.

        Where the disk cannot take it, a warning says so, the run goes on, and the next batch tries again.

        Args:
            requests: indices of its requests.
            skipped: index of a request -> why this batch left it out.
            result: what `Editor.edit` returned; None where it failed.
            beside: what `resume` is to return; JSON can hold it.
        """
        editor = self._editor
        batch = editor.recorded(result) if result is not None and result.batch else None
        tensors = {} if batch is None else batch.tensors()
        if isinstance(editor.values, ValueFile | MemitCache):
            tensors |= {f"{_VALUES}{name}": tensor for name, tensor in editor.values.drain().items()}
        facts = {
            "requests": list(requests),
            "skipped": {str(index): reason for index, reason in skipped.items()},
            "result": None if result is None else _as_json(result),
            "batch": None if batch is None else batch.facts(),
            "beside": dict(beside),
        }
        self._log.append(Record(facts, tensors))
        if self._is_due():
            self.save()

    def _is_due(self) -> bool:
        if self._every is not None:
            return len(self._log.pending) >= self._every
        alone = world()[1] == 1  # several processes write together, and their clocks differ
        return not alone or self._last_cost <= COST_SHARE * (time.monotonic() - self._last_end)

    def save(self) -> bool:
        """Make all batches that were added safe; where that fails, a warning says so and they wait for the next call.

        Returns:
            whether they are safe.
        """
        if not self._log.pending:
            return True
        try:
            _in_all(self._write)
        except CheckpointError as error:
            if not self._failed and world()[0] == 0:
                waiting = len(self._log.pending)
                _log.warning("%s; %d batches wait to be written, and the run goes on", first_line(error), waiting)
            self._failed = True
            return False
        self._failed = False
        return True

    def _write(self) -> None:
        """Write what is pending, in the first process."""
        begin = time.monotonic()
        if world()[0] == 0:
            self._log.write(self._facts())
        else:
            self._log.pending = []
        self._last_end = time.monotonic()
        self._last_cost = self._last_end - begin
        self.seconds += self._last_cost

    def _facts(self) -> dict[str, Any]:
        return {**self._log.facts, "seconds": self.elapsed}

    @property
    def elapsed(self) -> float:
        """Seconds of the run, those of earlier processes up to their last write included."""
        return self._earlier + time.monotonic() - self._begin


def _in_all(run: Callable[[], Result]) -> Result:
    """Run something in every process; where it fails in one, all raise. Returns this process's result."""
    return from_all(run, CheckpointError)[world()[0]] if world()[1] > 1 else run()


def _as_json(result: EditResult) -> dict[str, Any]:
    """What a result says beside its requests and updates."""
    apart = {"requests", "separators", "targets", "updates", "prefixes", "resolved"}
    return {one.name: getattr(result, one.name) for one in fields(result) if one.name not in apart}


def _restored(
    facts: Mapping[str, Any],
    written: Sequence[PreparedRequest],
    batch: BatchRecord | None,
    prefixes: tuple[str, ...],
) -> EditResult:
    """The result that `_as_json` was given. Its updates are those of the ledger."""
    updates: dict[str, tuple[Update, ...]] = {}
    for entry in () if batch is None else batch.entries:
        updates[entry.name] = (*updates.get(entry.name, ()), entry.update)
    return EditResult(
        **{
            **facts,
            "losses": tuple(facts["losses"]),
            "steps": tuple(facts["steps"]),
            "rounds": tuple(facts["rounds"]),
            "collisions": tuple((int(a), int(b)) for a, b in facts["collisions"]),
            "skipped": {int(place): reason for place, reason in facts["skipped"].items()},
        },
        requests=tuple(p.request for p in written),
        separators=tuple(p.separator for p in written),
        targets=tuple(p.target for p in written),
        updates=updates,
        prefixes=prefixes,
    )


def _fingerprints_of_statistics(editor: Editor) -> dict[str, str]:
    """Layer -> a hash of the statistics that its solves are made from; {} where the method uses none."""
    hashes, hparams, state = {}, editor.hparams, editor.solver_state
    for layer in hparams.layers if hparams.uses_statistics else ():
        tensors = []
        if hparams.uses_moments:
            space = state.null_space_overrides.get(layer)
            tensors.append(state.moment(layer) if space is None else space.basis)
        if hparams.constrains_curvature and editor.statistics is not None:
            tensors.append(editor.statistics.moment(layer).moment)
        if (hparams.weighs_outputs or hparams.constrains_curvature) and editor.statistics is not None:
            tensors.append(editor.statistics.output_metric(layer))
        hashes[str(layer)] = edit_fingerprint(tensors)[:16]
    return hashes


def _environment(editor: Editor) -> dict[str, str]:
    """What the last bits of results may depend on."""
    device = editor.view.head.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "kedit_fast": __version__,
        "torch": torch.__version__,
        "device": f"{device.type} ({name}, {platform.machine()})",
        "threads": str(torch.get_num_threads()),
        "processes": str(world()[1]),
        "backend": os.environ.get("KEDIT_FAST_BACKEND", "auto"),
    }


def _difference(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """How an entry of two identities differs, in words."""
    one, other = there.get(name), here.get(name)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = [part for part in dict.fromkeys((*one, *other)) if one.get(part) != other.get(part)]
        return f"different {name}: " + ", ".join(_both(part, one.get(part), other.get(part)) for part in names)
    return f"different {_both(name, one, other)}"


def _both(name: str, there: Any, here: Any) -> str:
    texts = [str(value) for value in (there, here)]
    return name if max(map(len, texts)) > 60 else f"{name} ({texts[0]} there, {texts[1]} here)"


def recorded_batches(folder: str | os.PathLike) -> int:
    """Number of batches that are safe in a folder; 0 where no run has begun there."""
    return max(0, RecordLog(Path(folder), CheckpointError).written - 1)


def outputs_of(folder: str | os.PathLike) -> set[str]:
    """Paths that the run in a folder was saving when it ended: what is there may be replaced by the same run."""
    try:
        return set(json.loads((Path(folder) / OUTPUTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return set()


def note_outputs(folder: str | os.PathLike, paths: Sequence[str]) -> None:
    """Note that a run begins to save its results."""
    write_text(Path(folder) / OUTPUTS, json.dumps(list(paths)), CheckpointError)
