"""Answers on disk as they come, so that a run that was killed goes on where it was.

A folder has one file of JSON lines. A line is an answer, under a hash of the model's weights and configuration, of the
tokens that it was asked with, and of how they were generated: an answer of another model, prompt format or tokenizer is
not taken for it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kedit_fast.errors import KeditError
from kedit_fast.evaluation.asks import (
    Answer,
    Ask,
    Distributions,
    DistributionsAnswer,
    ForcedAnswer,
    Generated,
    GeneratedAnswer,
    LikelihoodAnswer,
    RouteAnswer,
)
from kedit_fast.evaluation.rows import Row
from kedit_fast.models.fingerprint import with_values
from kedit_fast.models.head import Head
from kedit_fast.models.routes import attached_routes
from kedit_fast.models.sharded import whole
from kedit_fast.models.view import ModelView
from kedit_fast.support.files import locked
from kedit_fast.support.matrix_bits import edit_fingerprint

FILE = "answers.jsonl"
_KINDS: dict[str, Any] = {"forced": ForcedAnswer, "generated": GeneratedAnswer, "likelihood": LikelihoodAnswer,
                            "route": RouteAnswer}  # fmt: skip
_DISTRIBUTIONS = "distributions"
_NAMES = ("_name_or_path", "transformers_version")  # of a configuration: where it is from


def model_hash(view: ModelView) -> str:
    """A hash of all weights and buffers of a model, by name, of its configuration, and of a memory in it.

    Cost: one pass over them, on their devices.
    """
    settings = {name: value for name, value in view.model.config.to_dict().items() if name not in _NAMES}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(view.model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # a module's "extra state" may be anything
            continue
        values = whole(with_values(view, name, tensor)).detach()
        digest.update(f"{name} {values.dtype} {list(values.shape)} ".encode())
        if values.numel():
            matrix = values.reshape(-1, values.shape[-1] if values.ndim else 1).contiguous()
            digest.update(edit_fingerprint([matrix if matrix.element_size() <= 8 else matrix.real]).encode())
    if (routes := attached_routes(view.model)) is not None:
        digest.update(f"memory {routes.memory.digest}".encode())
    return digest.hexdigest()


def as_json(answer: Answer) -> list[Any]:
    """An answer as JSON can hold it; numbers come back with the same bits."""
    if isinstance(answer, DistributionsAnswer):
        states = answer.states.contiguous()
        data = base64.b64encode(states.reshape(-1).view(torch.uint8).numpy().tobytes()).decode()
        return [_DISTRIBUTIONS, data, str(states.dtype).removeprefix("torch."), list(states.shape)]
    kind = next(name for name, type_ in _KINDS.items() if isinstance(answer, type_))
    return [kind, *vars(answer).values()]


def from_json(values: list[Any], head: Head) -> Answer:
    """The answer that `as_json` was given, of a model with this head."""
    kind, *parts = values
    if kind == _DISTRIBUTIONS:
        data, dtype, shape = parts
        flat = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=getattr(torch, dtype))
        return DistributionsAnswer(flat.reshape(shape), head)
    return _KINDS[kind](*(tuple(part) if isinstance(part, list) else part for part in parts))


class StoredAnswers:
    """What `engine.answer_rows` takes as its store: answers of one model in a folder."""

    def __init__(self, path: Path, model: str, ends: Iterable[int], head: Head):
        self._path, self._model, self._ends, self._head = path, model, sorted(ends), head
        self._lines: dict[str, list[Any]] = {}
        self._read()

    def get(self, ask: Ask, row: Row) -> Answer | None:
        """An answer of an earlier run; None if there is none."""
        line = self._lines.get(self._key(ask, row))
        if line is None:
            return None
        return from_json(line, self._head)

    def add(self, answers: Mapping[Ask, Answer], rows: Mapping[Ask, Row]) -> None:
        """Write the answers of one batch; they are on disk when this returns."""
        lines = []
        for ask, answer in answers.items():
            lines.append(json.dumps([self._key(ask, rows[ask]), *as_json(answer)]))
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise KeditError(f"cannot write {self._path}: {error.strerror or error}") from error

    def _key(self, ask: Ask, row: Row) -> str:
        how: list[Any] = [type(ask).__name__]
        if isinstance(ask, Generated):
            how += [ask.top_k, ask.seed, ask.stops, self._ends]
        if isinstance(ask, Distributions):
            how.append(ask.last)
        parts = [self._model, *how, row.prompt, row.target, row.read, row.new]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _read(self) -> None:
        """Read the lines; a last one that a killed run has left without its end is cut off."""
        if not self._path.exists():
            return
        try:
            data = self._path.read_bytes()
            complete = data.rfind(b"\n") + 1
            for line in data[:complete].splitlines():
                key, *values = json.loads(line)
                self._lines[key] = values
            if complete < len(data):
                with self._path.open("r+b") as file:
                    file.truncate(complete)
        except OSError as error:
            raise KeditError(f"cannot read {self._path}: {error.strerror or error}") from error
        except (ValueError, TypeError) as error:
            raise KeditError(f"{self._path} is damaged, delete it to begin again: {error}") from error


@contextlib.contextmanager
def stored_answers(
    folder: str | os.PathLike | None, view: ModelView, ends: Iterable[int]
) -> Iterator[StoredAnswers | None]:
    """The store in a folder, which is made, for a model as it is now and texts that end at `ends`; None without one.

    Raises:
        KeditError: the folder cannot be written, its file is damaged, or another process uses it.
    """
    if folder is None:
        yield None
        return
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KeditError(f"cannot write {path}: {error.strerror or error}") from error
    lock = path / "lock"
    with locked(lock, KeditError, f"{path} is in use by another evaluation"):
        try:
            yield StoredAnswers(path / FILE, model_hash(view), ends, view.head)
        finally:
            if not (path / FILE).exists():  # nothing was answered
                with contextlib.suppress(OSError):
                    lock.unlink()
                    path.rmdir()
