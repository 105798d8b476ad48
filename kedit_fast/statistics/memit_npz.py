"""The statistics files of memit, AlphaEdit and EasyEdit, so that none is computed twice.

`{stats_dir}/{model}/{data set}_stats/{module}_{precision}_mom2[_{samples}].npz` with `mom2.mom2` [d, d], the *sum* of
k k^T, `mom2.count` (tokens), `mom2.constructor` and `sample_size`. Ours carry their metadata in one more entry, which
those programs do not look at.
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
from kedit_fast.support.files import write_npz
from kedit_fast.support.torch_state import plain_torch

CONSTRUCTOR = "util.runningstats.SecondMoment()"
METADATA = "kedit_fast"
_NAME = re.compile(r"(?P<module>.+)_(?P<precision>float(?:16|32|64))_mom2(?P<size>(?:_t\{?\w+\}?)?(?:_\d+)?)\.npz")
# How those programs write None.
_NULL = numpy.array(struct.unpack(">d", struct.pack(">Q", 0xFFF8000000000002))[0])
SYMMETRIC = 1e-4  # of the largest entry, by which a sum in float32 may differ from its transpose


def find(folder: Path, module: str, samples: int | None = None, precision: str | None = None) -> Path | None:
    """The npz file of a module in a folder, None where there is none.

    Args:
        folder: the folder.
        module: the module's path.
        samples, precision: `mom2_n_samples` and `mom2_dtype`, which choose where there are several; None for any.

    Raises:
        StatisticsError: there are several, and these do not name one of them.
    """
    found = {path: m for path in sorted(folder.glob("*.npz"))
             if (m := _NAME.fullmatch(path.name)) and m["module"] == module}  # fmt: skip
    if len(found) <= 1:
        return next(iter(found), None)
    asked = [path for path, m in found.items() if _is(m, samples, precision)]
    if len(asked) == 1:
        return asked[0]
    names = ", ".join(path.name for path in found)
    wanted = " ".join(f"{name} = {value}" for name, value in
                      (("mom2_n_samples", samples), ("mom2_dtype", precision)) if value is not None)  # fmt: skip
    why = f"{wanted} names {len(asked)} of them: " if wanted else ""
    raise StatisticsError(f"{folder} has several statistics files of {module} ({names}): {why}leave one there")


def is_named(path: Path, samples: int | None, precision: str | None) -> bool:
    """Whether a file's name says so many samples (None for any) in this precision (None for any)."""
    match = _NAME.fullmatch(path.name)
    return match is not None and _is(match, samples, precision)


def module_of(path: Path) -> str | None:
    """The module that a file's name says it is of; None for other files."""
    match = _NAME.fullmatch(path.name)
    return None if match is None else match["module"]


def _is(match: re.Match[str], samples: int | None, precision: str | None) -> bool:
    return (samples is None or match["size"] == f"_{samples}") and precision in (None, match["precision"])


def modules_in(folder: Path) -> list[str]:
    """The modules of which a folder has npz files."""
    return sorted({m["module"] for path in folder.glob("*.npz") if (m := _NAME.fullmatch(path.name))})


@plain_torch()
def read(path: str | os.PathLike, module: str) -> tuple[SecondMoment, dict[str, str]]:
    """The mean, and the metadata: what we wrote there, or what is known of a foreign file.

    Raises:
        StatisticsError: a damaged file, one of another layout, or one that holds pickled objects; by its name.
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
    known = {"corpus": f"npz {Path(path).parent.name}", "dtype": str(total.dtype).removeprefix("torch."),
             "max_length": "0", "count": str(count)}  # fmt: skip
    metadata = {**known, **metadata} if isinstance(metadata, dict) else known
    return SecondMoment(module, total.double().div_(count), count), metadata


def metadata_in(path: str | os.PathLike) -> dict[str, str]:
    """What we wrote into a file beside its sum; empty for a file of another program. Does not read the sum.

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
    """Where those programs look for a module's file: `model` is the last part of the model's path."""
    size = "" if samples is None else f"_{samples}"
    return Path(root) / model / f"{data_set}_stats" / f"{module}_{precision}_mom2{size}.npz"


def sum_in(second: SecondMoment, precision: str) -> numpy.ndarray:
    """The sum of k k^T [d, d] as a file holds it; raises StatisticsError where it does not fit the precision."""
    with numpy.errstate(over="ignore"):
        total = (second.moment.double() * second.count).cpu().numpy().astype(precision)
    if not numpy.isfinite(total).all():
        raise StatisticsError(f"the sum of {second.module} is beyond {precision}")
    return total


@plain_torch()
def write(
    path: Path, second: SecondMoment, metadata: dict[str, str], samples: int | None, precision: str = "float32"
) -> None:
    """Write a file that those programs take for their own, whole or not at all.

    Raises:
        StatisticsError: it cannot be written, or a sum does not fit the precision.
    """
    total = sum_in(second, precision)
    entries: dict[str, Any] = {
        "mom2.constructor": CONSTRUCTOR, "mom2.count": second.count, "mom2.mom2": total,
        "sample_size": _NULL if samples is None else samples, METADATA: json.dumps(metadata),
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StatisticsError(f"cannot write {path}: {error.strerror or error}") from error
    write_npz(path, entries, StatisticsError)
