"""Under which names a checkpoint's files have the weights of a layer's experts.

In memory, transformers 5 has one tensor for all experts of a layer. Files have one too, or one for each expert, under
names that differ from architecture to architecture. transformers' own conversion says which tensors of the files become
which one in memory; here it is asked for names alone, on a model without memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kedit_fast.errors import KeditError, PatchError
from kedit_fast.models.loading import empty_model, load_config
from kedit_fast.support.messages import comma_list


@dataclass(frozen=True)
class StoredNames:
    """Where a layer's experts are in a checkpoint's files."""

    tensors: tuple[str, ...]
    """Of each expert, in order; or the one tensor that has them all."""
    is_fused: bool
    """Whether one tensor has them all."""
    is_flipped: bool
    """Whether an expert's matrix is stored the other way round than the model has it in memory."""


class ExpertNames:
    """What transformers makes of the tensors of a checkpoint.

    Args:
        folder: of the checkpoint, with its config.json.
        tensors: the name of each tensor in the files.

    Raises:
        PatchError: this version of transformers has no experts modules, or it does not know the model.

    Cost: a model without memory, and a look at each name.
    """

    def __init__(self, folder: str | os.PathLike, tensors: Iterable[str]):
        self._folder, self.tensors = folder, frozenset(tensors)
        try:
            from transformers import conversion_mapping, core_model_loading
        except ImportError:
            raise PatchError(
                f"{folder}: experts in files are read by the weight conversion of transformers 5, which this version "
                "does not have (pip install 'transformers>=5')"
            ) from None
        try:
            model: Any = empty_model(load_config(folder))
        except KeditError as error:
            raise PatchError(f"{folder}: {error}") from error
        loading, in_memory = core_model_loading, model.state_dict()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in in_memory.items()}
        transforms = conversion_mapping.get_model_conversion_mapping(model)
        renamings = [one for one in transforms if isinstance(one, loading.WeightRenaming)]
        converters: list[Any] = [one for one in transforms if isinstance(one, loading.WeightConverter)]
        operations = {pattern: one.operations for one in converters for pattern in one.source_patterns}
        self._sources: dict[str, list[tuple[str, list[Any]]]] = {}  # name in memory -> names in files, what is done
        prefix = model.base_model_prefix
        for name in sorted(self.tensors, key=loading.dot_natural_key):  # the order in which experts are merged
            renamed, pattern = loading.rename_source_key(name, renamings, converters, prefix, in_memory)
            if renamed not in in_memory and name in in_memory:
                renamed, pattern = name, None
            done = [] if pattern is None else operations[pattern]
            self._sources.setdefault(renamed, []).append((name, done))

    def of(self, module: str, shape_of: Callable[[str], Sequence[int]]) -> StoredNames:
        """Where the experts of a module are.

        Args:
            module: the path of the stacked weight, ending in "experts.down_proj".
            shape_of: name of a tensor in the files -> its shape there.

        Raises:
            PatchError: the model has no such weight, the files have it not or quantized, or transformers makes it from
                them in a way that cannot be undone here.
        """
        if module not in self._shapes:
            raise PatchError(f"the model in {self._folder} has no {module}")
        sources = self._sources.get(module, [])
        if not sources:
            near = sorted(n for n in self._sources if n.startswith(module))
            hint = f" (it has {near[0]}: quantized experts)" if near else ""
            raise PatchError(f"{self._folder} has no {module}{hint}")
        tensors, count = tuple(name for name, _ in sources), self._shapes[module][0]
        kinds = [type(one).__name__ for one in sources[0][1]]
        is_flipped = False
        for turn in (one for one in sources[0][1] if type(one).__name__ == "Transpose"):
            if {turn.dim0, turn.dim1} not in ({1, 2}, {-1, -2}):
                raise PatchError(self._not_read(module, kinds))
            is_flipped = not (turn.check_dims and tuple(shape_of(tensors[0])) == self._shapes[module])
        if len(sources) == 1 and kinds in ([], ["Transpose"]):
            return StoredNames(tensors, True, is_flipped)
        merges = [one for one in sources[0][1] if type(one).__name__ == "MergeModulelist"]
        if kinds not in (["MergeModulelist"], ["MergeModulelist", "Transpose"]) or merges[0].dim != 0:
            raise PatchError(self._not_read(module, kinds))
        if len(tensors) != count:
            raise PatchError(f"{self._folder} has {len(tensors)} of the {count} experts of {module}")
        return StoredNames(tensors, False, is_flipped)

    def _not_read(self, module: str, kinds: list[str]) -> str:
        return (
            f"transformers makes {module} of the tensors in {self._folder} by {comma_list(kinds) or 'other ways'}, "
            "which patches on disk do not undo: load the model, apply the patch, and save it"
        )
