"""What EasyEdit's calls of WISE and GRACE return: an object that answers with the edits, and can be reset.

EasyEdit's own replaces a layer of the model. Here the edits are a memory that is attached to the model
(`kedit_fast.memories`), so the model itself answers with them, and this object hands calls to it.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from kedit_fast.errors import MethodError
from kedit_fast.integrations.sessions import Session
from kedit_fast.memories.memory import SideMemory
from kedit_fast.models.routes import prompt_tokens

IGNORED = -100
"""The label of a token that is no part of an answer."""


class EditedModel(torch.nn.Module):
    """A model with the edits of a method that keeps them beside the weights; as EasyEdit's WISE and GRACE objects.

    Whatever is not here is the model's: `config`, `device`, `parameters()`, ...

    Args:
        session: what the model's edits belong to.
    """

    def __init__(self, session: Session):
        super().__init__()
        self.model = session.editor.view.model
        self.session = session

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    @property
    def memory(self) -> SideMemory | None:
        """The memory that answers; None after `reset_layer`."""
        return self.session.memory

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's answer, with the edits.

        Args:
            *args: of the model; one mapping is taken as its keyword arguments.
            **kwargs: of the model, or `batch`, a mapping of them. With `labels`, the tokens before the first one of a
                row that has a label are the prompt, and routes are decided on these alone.
        """
        if not kwargs and len(args) == 1 and isinstance(args[0], dict):
            args, kwargs = (), dict(args[0])
        kwargs |= kwargs.pop("batch", None) or {}
        labels = kwargs.get("labels")
        if not isinstance(labels, torch.Tensor):
            return self.model(*args, **kwargs)
        with prompt_tokens(self.model, _prompt_lengths(labels, kwargs.get("attention_mask"))):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, with the edits.

        Routes are decided on the prompt and hold for what is generated, also with `use_cache=False`, as EasyEdit's
        evaluation asks.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        if kwargs.get("use_cache", True) or not isinstance(ids, torch.Tensor):
            return self.model.generate(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        lengths = torch.full(ids.shape[:1], ids.shape[1], device=ids.device) if mask is None else mask.sum(1)
        copies = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        with prompt_tokens(self.model, lengths.repeat_interleave(copies)):
            return self.model.generate(*args, **kwargs)

    def reset_layer(self) -> None:
        """Undo every edit: the memory is detached, the weights are as they always were."""
        self.session.reset()

    def rollback(self, batches: int = 1) -> None:
        """Undo the last `batches` calls. GRACE's `rolllback(edit_id)` of EasyEdit finds no edit and does nothing.

        Raises:
            InvalidArgumentError: there are fewer calls.
        """
        self.session.undo(batches)

    def save(self, save_path: str | os.PathLike) -> None:
        """Write the memory to a file of this package (`kedit_fast.memories.attach` reads it), not a pickle.

        Raises:
            MethodError: there is no memory: nothing was edited, or `reset_layer` was called.
        """
        memory = self.memory
        if memory is None:
            raise MethodError("there is no memory to save: nothing was edited since the last reset_layer()")
        os.makedirs(os.path.dirname(os.path.abspath(save_path)), exist_ok=True)
        memory.save(save_path)


def _prompt_lengths(labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Tokens of each row before its first label, padding not counted: [R] int64."""
    has_label = labels != IGNORED
    first = torch.where(has_label.any(1), has_label.int().argmax(1), labels.shape[1])
    before = torch.arange(labels.shape[1], device=labels.device) < first[:, None]
    return (before if mask is None else before & mask.bool()).sum(1)
