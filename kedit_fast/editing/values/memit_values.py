"""Values in the files of the memit repository, which its `cache_template` names.

One npz file for each request, with `v_star` [h], at a path with three {}: for layer, clamp and case id. The files do
not record the model that they were made with; only their paths tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from kedit_fast.editing.values.protocol import ValueRun, usable_requests
from kedit_fast.editing.values.result import Values
from kedit_fast.errors import EditError
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.solver.value_descent import Status
from kedit_fast.support.files import write_npz


class MemitCache:
    """The files that memit's `cache_template` names: `..._layer_{}_clamp_{}_case_{}.npz`, one file for each request.

    Raises:
        EditError: a template without three {}, a request without an id, or a file that is damaged.
    """

    def __init__(self, template: str):
        if template.count("{}") != 3:
            raise EditError(f"{template!r} must hold three {{}}: layer, clamp_norm_factor and case id")
        self.template = template
        self._layer, self._clamp, self._size = 0, 0.0, 0
        self._sites: tuple[str, ...] = ()
        self._held: dict[str, torch.Tensor] | None = None  # path -> value, taken since `drain`
        self._drained: dict[str, torch.Tensor] = {}  # path -> value, to be written by `release`

    def begin(self, run: ValueRun) -> None:
        """Say which call of the value loop the next calls belong to."""
        if len(run.sites) > 1:
            raise EditError("memit's npz files hold one value a request; these values have two")
        names = [request.request.id for request in run.requests if request.request.id is not None]
        if twice := sorted({str(name) for name in names if names.count(name) > 1}):
            raise EditError(f"memit's value files are named by case id, and several requests have the id {twice[0]!r}")
        self._sites = run.sites
        self._layer, self._clamp = run.layer, run.hparams.clamp_norm_factor
        self._size = run.view.edited_shape(run.layer)[0]

    def load(self, request: PreparedRequest) -> Values | None:
        """The value of a request, or None. The files hold no delta: `all_deltas` is NaN."""
        path = self._path(request)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                target = torch.from_numpy(file["v_star"]).double()
        except (OSError, ValueError, KeyError) as error:
            raise EditError(f"{path} is not one of memit's value files: {error}") from error
        if target.shape != (self._size,) or not bool(torch.isfinite(target).all()):
            raise EditError(f"{path}: v_star is {list(target.shape)}, a finite [{self._size}] is needed")
        no_delta = torch.full((1, self._size, 1), float("nan"), dtype=torch.float32)
        return Values(
            self._sites,
            target[None, :, None],
            no_delta,
            no_delta[0, 0],
            torch.tensor([0]),
            torch.tensor([Status.COMPLETED]),
        )

    def store(self, requests: Sequence[PreparedRequest], values: Values) -> None:
        """Write each usable value at once; an older file is replaced only when the new one is complete."""
        for i, request in usable_requests(requests, values):
            path, value = self._path(request), values.targets[:, i].float().cpu()
            if self._held is None:
                _write(path, value)
            else:
                self._held[str(path)] = value.clone()

    def flush(self) -> None:
        """Nothing to do: `store` has written everything, unless it is held."""

    def hold(self) -> None:
        """Write nothing until `release`; see `HeldValues`."""
        self._held = {}

    def drain(self) -> dict[str, torch.Tensor]:
        """The values that were taken since the last call, for `absorb`."""
        drained, self._held = self._held or {}, {}
        self._drained |= drained
        return drained

    def absorb(self, drained: Mapping[str, torch.Tensor]) -> None:
        """Take values that `drain` has given."""
        self._drained |= drained

    def release(self) -> None:
        """Write the values that were drained or absorbed; the others, of a batch that failed, are forgotten."""
        drained, self._drained, self._held = self._drained, {}, None
        for path, value in drained.items():
            _write(Path(path), value)

    def _path(self, request: PreparedRequest) -> Path:
        """The file of a request: one that exists, or the one to write."""
        if request.request.id is None:
            raise EditError(f"{request.name}: memit's value files are named by case id, and it has none")
        # memit writes the clamp as its file of hyper-parameters has it: 4 or 4.0.
        clamps = dict.fromkeys((f"{self._clamp:g}", str(self._clamp)))
        paths = [Path(self.template.format(self._layer, clamp, request.request.id)) for clamp in clamps]
        return next((path for path in paths if path.exists()), paths[0])


def _write(path: Path, value: torch.Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EditError(f"cannot write {path}: {error.strerror or error}") from error
    write_npz(path, {"v_star": value.numpy()}, EditError)
