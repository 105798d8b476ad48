"""Captured rows on disk: passes that a file of values has are not run again, and the results have the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from kedit_fast.editing.values.store import ValueFile, model_identity
from kedit_fast.models.patching import attention_name
from kedit_fast.models.row_runner import RecordedRows, row_pass
from kedit_fast.models.view import ModelView
from kedit_fast.models.widened import computing_dtype


class StoredRows:
    """The passes over rows up to one layer of a model as it is now: a `models.row_runner.RowStore`.

    What a pass gives depends on the model up to the layer, its edited matrices there included, on how and in which
    dtype passes run, and on the tokens of all rows that run together.

    Args:
        file: where they are.
        view, tokenizer: the model.
        layer: where passes end.

    Cost: one pass over the matrices of the layers up to this one.
    """

    def __init__(self, file: ValueFile, view: ModelView, tokenizer: Any, layer: int):
        self._file, self._view, self._layer = file, view, layer
        identity = {
            **model_identity(view, tokenizer, [i for i in view.editable if i <= layer]),
            "rows": layer,
            "pass": row_pass(view, layer),
            "computes in": str(computing_dtype(view.entry)),
            "attention": attention_name(view.config),
            "device": view.row_device(layer).type,
        }
        self._context = json.dumps(identity, sort_keys=True, default=str)

    def load(self, rows: Sequence[Sequence[int]]) -> RecordedRows | None:
        """What a pass over these rows has given, on the device of the layer; None where it is not there.

        Raises:
            EditError: what is there is not what was written.
        """
        block = self._file.load_block(self._key(rows))
        if block is None:
            return None
        device = self._view.row_device(self._layer)
        inputs, outputs, beside = (
            block[name].to(device) if name in block else None for name in ("inputs", "outputs", "beside")
        )
        assert inputs is not None and outputs is not None
        return RecordedRows(inputs, outputs, beside)

    def store(self, rows: Sequence[Sequence[int]], recorded: RecordedRows) -> None:
        """Take what a pass has just given."""
        parts = {"inputs": recorded.inputs, "outputs": recorded.outputs, "beside": recorded.beside}
        self._file.store_block(self._key(rows), {name: part for name, part in parts.items() if part is not None})

    def _key(self, rows: Sequence[Sequence[int]]) -> str:
        tokens = json.dumps([list(map(int, row)) for row in rows])
        return hashlib.sha256((self._context + tokens).encode()).hexdigest()
