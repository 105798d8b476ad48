"""Statistics on disk: one safetensors file per layer, `{module path}.safetensors`.

Tensor `second_moment` [d, d] is the mean of k k^T, both triangles; of a layer with experts [E, m, m], beside a tensor
`tokens_by_expert` [E] int64 of how many tokens chose each; and, where shared experts are a block of the stack, a tensor
`shared_second_moment` [m_s, m_s]. Metadata: format_version, layer, count (tokens),
tokens (that were read), corpus (SHA-256 of the text), documents, the settings that chose the text (max_tokens,
max_samples, max_length, seed, token_weights), model fingerprint, dtype, checksum, kedit_fast (version), and of experts
tokens_checksum and shared_checksum. A file is written under another name and then renamed.

`{module path}.output_metric.safetensors` holds the mean of g g^T [out, out], tensor `output_metric`, of gradients g at
the layer's output, with the same metadata for itself, and labels and label_seed of the loss.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kedit_fast._version import __version__
from kedit_fast.errors import StatisticsError
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.fingerprint import difference, fingerprint
from kedit_fast.models.view import ModelView
from kedit_fast.statistics import memit_npz
from kedit_fast.statistics.collect import Statistics
from kedit_fast.statistics.expert_moments import require_shared
from kedit_fast.statistics.memory_plan import sum_shape
from kedit_fast.statistics.moments import SecondMoment, Side
from kedit_fast.support.files import write_file
from kedit_fast.support.matrix_bits import aligned, row_checksum
from kedit_fast.support.torch_state import plain_torch

FORMAT_VERSION = "1"
MODEL_FIELDS = ("model_config", "model_samples", "tokenizer")
SETTINGS_FIELDS = ("max_tokens", "max_samples", "max_length", "seed", "token_weights")
OUTPUT_FIELDS = ("corpus", "documents", "tokens", "dtype", *SETTINGS_FIELDS, "labels", "label_seed")
TENSORS: dict[Side, str] = {"input": "second_moment", "output": "output_metric"}
TOKENS_BY_EXPERT = "tokens_by_expert"
SHARED = "shared_second_moment"
_SUFFIXES: dict[Side, str] = {"input": "", "output": ".output_metric"}


@dataclass(frozen=True)
class LayerFile:
    """A second moment with its file's metadata."""

    path: Path
    second: SecondMoment
    metadata: dict[str, str]

    @property
    def model(self) -> dict[str, str]:
        """The fingerprint of the model it was collected on; empty for a file without one."""
        return {field: self.metadata[field] for field in MODEL_FIELDS if field in self.metadata}


@plain_torch()
def save_statistics(
    statistics: Statistics, folder: str | os.PathLike, dtype: torch.dtype = torch.float64
) -> list[Path]:
    """Write one file per layer, and one for each output metric.

    Args:
        statistics: what to write.
        folder: made if absent.
        dtype: of the files' moments.

    Returns:
        the files' paths.

    Raises:
        StatisticsError: the folder or a file cannot be written; files that are complete stay.

    Example:
        >>> [path.name for path in save_statistics(statistics, "stats")]
        ['model.layers.0.mlp.down_proj.safetensors', 'model.layers.1.mlp.down_proj.safetensors']
    """
    folder = Path(folder)
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StatisticsError(f"cannot write statistics to {folder}: {error.strerror or error}") from error
    sides: tuple[tuple[Side, Mapping[int, SecondMoment]], ...] = (
        ("input", statistics.layers),
        ("output", statistics.outputs),
    )
    for side, layers in sides:
        for layer, second in sorted(layers.items()):
            path = path_of(folder, second.module, side)
            moment = second.moment.to("cpu", dtype).contiguous()
            metadata = {**metadata_of(statistics, layer, side), "checksum": row_checksum(moment)}
            tensors = {TENSORS[side]: moment}
            if second.tokens_by_expert is not None:
                tensors[TOKENS_BY_EXPERT] = by_expert = second.tokens_by_expert.cpu()
                metadata["tokens_checksum"] = row_checksum(by_expert[:, None])
            if second.shared is not None:
                tensors[SHARED] = shared = second.shared.to("cpu", dtype).contiguous()
                metadata["shared_checksum"] = row_checksum(shared)
            write_file(path, tensors, metadata, StatisticsError)
            paths.append(path)
    return paths


def path_of(folder: Path, module: str, side: Side = "input") -> Path:
    """The path of a layer's file."""
    return folder / f"{module}{_SUFFIXES[side]}.safetensors"


def metadata_of(statistics: Statistics, layer: int, side: Side = "input") -> dict[str, str]:
    """The metadata of a layer's file."""
    moments, source = statistics.outputs, statistics.outputs_from
    if side == "input":
        moments = statistics.layers
        source = {
            "corpus": statistics.corpus,
            "documents": str(statistics.documents),
            "tokens": str(statistics.tokens),
            "dtype": statistics.dtype,
            **statistics.settings,
            "max_length": str(statistics.max_length),
        }
    return {
        "format_version": FORMAT_VERSION,
        "layer": str(layer),
        "count": str(moments[layer].count),
        "kedit_fast": __version__,
        **source,
        **statistics.model,
    }


@plain_torch()
def load_statistics(
    folder: str | os.PathLike,
    model: torch.nn.Module,
    tokenizer: Any,
    layers: Sequence[int] | None = None,
    spec: ArchSpec | None = None,
    trust: bool = False,
    samples: int | None = None,
    precision: str | None = None,
) -> Statistics:
    """Read statistics, with the output metrics of layers that have one, and check that they are of this model.

    Args:
        folder: that `collect_into` or `save_statistics` wrote; or a `{data set}_stats` folder of memit, AlphaEdit or
            EasyEdit, with npz files.
        model: the model they are to be used with; edits of it do not matter.
        tokenizer: its tokenizer.
        layers: layers to read; None for all in the folder.
        spec: an ArchSpec for an architecture that is not known.
        trust: accept files without a model fingerprint (npz of other programs); only their sizes are checked.
        samples, precision: choose among several npz files of a layer by their names; None where there is one.

    Raises:
        StatisticsError: a missing layer, a damaged or foreign file, or statistics of another model; the message names
            the file.

    Example:
        >>> paths = save_statistics(statistics, "stats")
        >>> load_statistics("stats", model, tokenizer, layers=[1]).moment(1).moment.shape
        torch.Size([768, 768])
    """
    folder = Path(folder)
    view = ModelView(model, spec)
    if not folder.is_dir():
        raise StatisticsError(f"no statistics folder {folder}: make one with `kedit-fast stats`")
    if layers is None:
        layers = _layers_in(folder, view)
    current = fingerprint(view, tokenizer)
    moments: dict[int, SecondMoment] = {}
    outputs: dict[int, SecondMoment] = {}
    source: dict[str, str] = {}
    first: LayerFile | None = None
    for layer in view.check_layers(tuple(layers)):
        file = read_layer(folder, view.module_name(layer), samples, precision)
        if not file.model and not trust:
            raise StatisticsError(
                f"{file.path} does not say which model it was made from: pass --trust (trust=True) if it is this one"
            )
        require_shared(view, layer, file.second)
        if file.model and (changed := difference(file.model, current)):
            raise StatisticsError(f"{file.path} holds statistics of another model: different {changed}")
        expected, moment = sum_shape(view, layer), file.second.moment
        if tuple(moment.shape) != expected:
            raise StatisticsError(
                f"{file.path}: second_moment is {list(moment.shape)}, the layer takes {list(expected)}"
            )
        moments[layer] = file.second
        first = first or file
        if file.metadata["corpus"] != first.metadata["corpus"]:
            raise StatisticsError(f"{file.path} was made from another corpus than the other layers in {folder}")
        if path_of(folder, view.module_name(layer), "output").exists():
            metric = _output_metric(folder, view, layer, current)
            made_from = {name: metric.metadata.get(name, "") for name in OUTPUT_FIELDS}
            if outputs and (other := [name for name in OUTPUT_FIELDS if source[name] != made_from[name]]):
                raise StatisticsError(
                    f"{metric.path} was made from something else than the output metrics of other layers in {folder}: "
                    f"different {other[0]}"
                )
            outputs[layer], source = metric.second, made_from
    assert first is not None
    metadata = first.metadata
    return Statistics(
        moments,
        current,
        metadata["corpus"],
        int(metadata["max_length"]),
        metadata["dtype"],
        int(metadata.get("documents", 0)),
        {name: metadata[name] for name in SETTINGS_FIELDS if name in metadata},
        int(metadata.get("tokens") or 0),
        outputs,
        source,
    )


def _output_metric(folder: Path, view: ModelView, layer: int, current: dict[str, str]) -> LayerFile:
    """The output metric of a layer, checked to be of the model with this fingerprint."""
    module, size = view.module_name(layer), view.edited_shape(layer)[0]
    file = _read(path_of(folder, module, "output"), module, "output")
    if changed := difference(file.model, current):
        raise StatisticsError(f"{file.path} holds an output metric of another model: different {changed}")
    if tuple(file.second.moment.shape) != (size, size):
        shape = list(file.second.moment.shape)
        raise StatisticsError(f"{file.path}: output_metric is {shape}, the layer puts out {size} numbers")
    _check_finite(file, "output")
    return file


@plain_torch()
def read_layer(folder: Path, module: str, samples: int | None = None, precision: str | None = None) -> LayerFile:
    """Read one layer's file, ours or an npz, without checking the model that it is of.

    Args:
        folder: of the files.
        module: the layer's path.
        samples, precision: choose among several npz files by their names; None where there is one.

    Raises:
        StatisticsError: there is no file, several npz files match, or it is damaged or not finite.
    """
    path = path_of(folder, module)
    if path.exists():
        file = _read(path, module)
    elif foreign := memit_npz.find(folder, module, samples, precision):
        second, metadata = memit_npz.read(foreign, module)
        file = LayerFile(foreign, second, metadata)
    else:
        raise StatisticsError(f"no statistics file {path}: collect them for this layer with `kedit-fast stats`")
    _check_finite(file)
    return file


def read_tokens_by_expert(path: Path) -> torch.Tensor | None:
    """How many tokens chose each expert [E], from a file of `collect_into` or `save_statistics`; None without experts.

    Raises:
        StatisticsError: it is damaged or no statistics file.
    """
    metadata_in(path)
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(TOKENS_BY_EXPERT) if TOKENS_BY_EXPERT in file.keys() else None  # noqa: SIM118


def read_output_metric(folder: Path, module: str) -> LayerFile | None:
    """Read one layer's output metric, without checking the model that it is of; None where there is none.

    Raises:
        StatisticsError: it is damaged or not finite.
    """
    path = path_of(folder, module, "output")
    if not path.exists():
        return None
    file = _read(path, module, "output")
    _check_finite(file, "output")
    return file


def _check_finite(file: LayerFile, side: Side = "input") -> None:
    parts = [part for part in (file.second.moment, file.second.shared) if part is not None]
    if not all(bool(torch.isfinite(part.sum(dtype=torch.float64))) for part in parts):
        raise StatisticsError(f"{file.path}: {TENSORS[side]} has values that are not finite")


def modules_in(folder: str | os.PathLike) -> list[str]:
    """The modules that a folder has statistics of, in the order of their layers.

    Raises:
        StatisticsError: there is no such folder, or it has no statistics.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StatisticsError(f"no statistics folder {folder}: make one with `kedit-fast stats`")
    names = {path.stem for path in folder.glob("*.safetensors")} | set(memit_npz.modules_in(folder))
    names = {name for name in names if any(part.isdigit() for part in name.split("."))}  # not checkpoints
    inputs = {name for name in names if not name.endswith(_SUFFIXES["output"])}
    if names and not inputs:
        raise StatisticsError(f"{folder} holds output metrics alone: collect the second moments of inputs into it, too")
    if not inputs:
        raise StatisticsError(f"{folder} holds no statistics")
    return sorted(inputs, key=layer_of)


def layer_of(module: str) -> int:
    """The number in a module's path."""
    return next(int(part) for part in module.split(".") if part.isdigit())


def _layers_in(folder: Path, view: ModelView) -> list[int]:
    pattern = re.compile(re.escape(view.spec.blocks) + r"\.(\d+)\." + re.escape(view.edited_path))
    names = {path.stem for path in folder.glob("*.safetensors")} | set(memit_npz.modules_in(folder))
    layers = sorted(int(m[1]) for name in names if (m := pattern.fullmatch(name)))
    if not layers:
        raise StatisticsError(f"{folder} holds no statistics of a {view.spec.name} model")
    return layers


def metadata_in(path: Path, side: Side = "input") -> dict[str, str]:
    """Read a file's metadata alone.

    Raises:
        StatisticsError: it is damaged or no statistics file.
    """
    name = TENSORS[side]
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format_version") != FORMAT_VERSION or name not in file.keys():  # noqa: SIM118
                raise StatisticsError(f"{path} is not a statistics file of kedit_fast (format {FORMAT_VERSION})")
            shape = file.get_slice(name).get_shape()
            of_experts = side == "input" and TOKENS_BY_EXPERT in file.keys()  # noqa: SIM118
            if len(shape) != 2 + of_experts or shape[-2] != shape[-1] or 0 in shape:
                raise StatisticsError(f"{path} is damaged: {name} is {shape}; remove it and collect it again")
            if of_experts and file.get_slice(TOKENS_BY_EXPERT).get_shape() != shape[:1]:
                raise StatisticsError(f"{path} is damaged: {TOKENS_BY_EXPERT} is not [{shape[0]}]; collect it again")
    except SafetensorError as error:
        raise StatisticsError(f"{path} is damaged: {error}; remove it and collect it again") from error
    except OSError as error:
        raise StatisticsError(f"cannot read {path}: {error.strerror or error}") from error
    invalid = [name for name in ("count", "max_length") if not metadata.get(name, "").isdigit()]
    required = ("corpus", "dtype") if side == "input" else (*OUTPUT_FIELDS, *MODEL_FIELDS)
    invalid += [name for name in required if name not in metadata]
    for name in invalid[:1]:
        raise StatisticsError(
            f"{path} is damaged: its {name} is {metadata.get(name)!r}; remove it and collect it again"
        )
    return metadata


def _read(path: Path, module: str, side: Side = "input") -> LayerFile:
    metadata = metadata_in(path, side)
    with safe_open(path, framework="pt") as file:
        moment = aligned(file.get_tensor(TENSORS[side]))
        by_expert = file.get_tensor(TOKENS_BY_EXPERT) if moment.ndim == 3 else None
        has_shared = by_expert is not None and SHARED in file.keys()  # noqa: SIM118
        shared = aligned(file.get_tensor(SHARED)) if has_shared else None
    changed = "checksum" in metadata and metadata["checksum"] != row_checksum(moment)  # older files have none
    if by_expert is not None:
        changed = changed or metadata.get("tokens_checksum") != row_checksum(by_expert[:, None])
    if shared is not None:
        changed = changed or metadata.get("shared_checksum") != row_checksum(shared)
    elif "shared_checksum" in metadata:
        changed = True
    if changed:
        raise StatisticsError(f"{path} is damaged: it is not what was written; remove it and collect it again")
    return LayerFile(path, SecondMoment(module, moment, int(metadata["count"]), by_expert, shared), metadata)
