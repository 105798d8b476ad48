"""The statistics files of memit, AlphaEdit and EasyEdit, read and written, so that none is computed twice.

`{stats_dir}/{model}/{data set}_stats/{module}_{precision}_mom2[_{samples}].npz` with `mom2.mom2` [d, d], the *sum* of
k k^T, `mom2.count` (tokens), `mom2.constructor` and `sample_size`. Files that are written here have one more
entry, with our metadata, which those programs ignore.
"""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy
import torch

from kedit_fast.errors import StatisticsError
from kedit_fast.statistics.moments import SecondMoment
from kedit_fast.support.dtypes import dtype_name
from kedit_fast.support.files import write_npz
from kedit_fast.support.messages import comma_list
from kedit_fast.support.torch_state import plain_torch

CONSTRUCTOR = "util.runningstats.SecondMoment()"
METADATA = "kedit_fast"
_NAME = re.compile(r"(?P<module>.+)_(?P<precision>float(?:16|32|64))_mom2(?P<size>(?:_t\{?\w+\}?)?(?:_\d+)?)\.npz")
# How those programs write None.
_NULL = numpy.array(struct.unpack(">d", struct.pack(">Q", 0xFFF8000000000002))[0])
SYMMETRIC = 1e-4
"""Share of the largest entry by which a sum in float32 may differ from its transpose."""


def find(folder: Path, module: str, samples: int | None = None, precision: str | None = None) -> Path | None:
    """The npz file of a module in a folder, None where there is none.

    Args:
        folder: to be searched.
        module: the module's path.
        samples, precision: `mom2_n_samples` and `mom2_dtype`, which choose among several files; None for any.

    Raises:
        StatisticsError: there are several files, and not exactly one matches.
    """
    parsed = {path: _NAME.fullmatch(path.name) for path in sorted(folder.glob("*.npz"))}
    files = {path: match for path, match in parsed.items() if match and match["module"] == module}
    if len(files) <= 1:
        return next(iter(files), None)
    matching = [path for path, match in files.items() if _matches(match, samples, precision)]
    if len(matching) == 1:
        return matching[0]
    names = comma_list(path.name for path in files)
    criteria = {"mom2_n_samples": samples, "mom2_dtype": precision}
    wanted = " ".join(f"{name} = {value}" for name, value in criteria.items() if value is not None)
    why = f"{wanted} names {len(matching)} of them: " if wanted else ""
    raise StatisticsError(f"{folder} has several statistics files of {module} ({names}): {why}leave one there")


def is_named(path: Path, samples: int | None, precision: str | None) -> bool:
    """Whether a file's name has this number of samples and this precision (None for any)."""
    match = _NAME.fullmatch(path.name)
    return match is not None and _matches(match, samples, precision)


def module_of(path: Path) -> str | None:
    """The module in a file's name; None for files of other kinds."""
    match = _NAME.fullmatch(path.name)
    return None if match is None else match["module"]


def _matches(match: re.Match[str], samples: int | None, precision: str | None) -> bool:
    return (samples is None or match["size"] == f"_{samples}") and precision in (None, match["precision"])


def modules_in(folder: Path) -> list[str]:
    """The modules that a folder has npz files of."""
    return sorted({m["module"] for path in folder.glob("*.npz") if (m := _NAME.fullmatch(path.name))})


@plain_torch()
def read(path: str | os.PathLike, module: str) -> tuple[SecondMoment, dict[str, str]]:
    """Read a file's moment (the mean) and its metadata: ours, or what can be known of another program's file.

    Raises:
        StatisticsError: a damaged file, one of another layout, or one that holds pickled objects; the message names it.
    """
    try:
        with numpy.load(path, allow_pickle=False) as file:
            missing = [name for name in ("mom2.mom2", "mom2.count") if name not in file]
            if missing:
                raise StatisticsError(f"{path} has no {missing[0]}: it is no statistics file of memit's layout")
            total, count = torch.from_numpy(file["mom2.mom2"]), int(file["mom2.count"])
            metadata = json.loads(str(file[METADATA])) if METADATA in file else None
    except StatisticsError:
        raise
    except OSError as error:
        raise StatisticsError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever a damaged zip, or what is packed in it, makes the reader raise
        raise StatisticsError(f"{path} is damaged or holds pickled objects: {error}") from error
    square = total.ndim == 2 and total.shape[0] == total.shape[1] and total.numel() > 0
    if not square or not total.is_floating_point() or count < 1:
        raise StatisticsError(f"{path}: mom2 is {list(total.shape)} {total.dtype} of {count} tokens")
    gap = float((total - total.T).abs().max()) / max(float(total.abs().max()), 1e-300)
    if not gap <= SYMMETRIC:
        raise StatisticsError(f"{path}: mom2 is not symmetric (by {gap:.1e} of its largest entry) or not finite")
    known = {
        "corpus": f"npz {Path(path).parent.name}",
        "dtype": dtype_name(total.dtype),
        "max_length": "0",
        "count": str(count),
    }
    metadata = {**known, **metadata} if isinstance(metadata, dict) else known
    return SecondMoment(module, total.double().div_(count), count), metadata


def metadata_in(path: str | os.PathLike) -> dict[str, str]:
    """Our metadata in a file; empty for a file of another program. The sum is not read.

    Raises:
        StatisticsError: a damaged file.
    """
    try:
        with numpy.load(path, allow_pickle=False) as file:
            metadata = json.loads(str(file[METADATA])) if METADATA in file else {}
    except OSError as error:
        raise StatisticsError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever a damaged zip makes the reader raise
        raise StatisticsError(f"{path} is damaged: {error}") from error
    return metadata if isinstance(metadata, dict) else {}


def path_of(
    root: str | os.PathLike, model: str, data_set: str, module: str, samples: int | None, precision: str = "float32"
) -> Path:
    """Where those programs look for a module's file; `model` is the last part of the model's path."""
    size = "" if samples is None else f"_{samples}"
    return Path(root) / model / f"{data_set}_stats" / f"{module}_{precision}_mom2{size}.npz"


def sum_in(second: SecondMoment, precision: str) -> numpy.ndarray:
    """The sum of k k^T [d, d] as it is stored.

    Raises:
        StatisticsError: it overflows the precision, or a layer's experts have one sum each.
    """
    if second.moment.ndim != 2:
        raise StatisticsError(
            f"{second.module} holds the second moments of {len(second.moment)} experts: memit's npz files have room "
            "for one matrix a layer, and its programs edit no mixtures of experts"
        )
    with numpy.errstate(over="ignore"):
        total = (second.moment.double() * second.count).cpu().numpy().astype(precision)
    if not numpy.isfinite(total).all():
        raise StatisticsError(f"the sum of {second.module} is beyond {precision}")
    return total


@plain_torch()
def write(
    path: Path, second: SecondMoment, metadata: dict[str, str], samples: int | None, precision: str = "float32"
) -> None:
    """Write a file that those programs read like their own, whole or not at all.

    Raises:
        StatisticsError: it cannot be written, a sum overflows the precision, or a layer's experts have one each.
    """
    entries: dict[str, Any] = {
        "mom2.constructor": CONSTRUCTOR,
        "mom2.count": second.count,
        "mom2.mom2": sum_in(second, precision),
        "sample_size": _NULL if samples is None else samples,
        METADATA: json.dumps(metadata),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StatisticsError(f"cannot write {path}: {error.strerror or error}") from error
    write_npz(path, entries, StatisticsError)
