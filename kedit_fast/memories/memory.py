"""What edits beside the weights are: tensors, how a prompt is routed to them, and what they make of a module's output.

A memory belongs to one linear module with the matrix W_0, which it never changes. A sequence is routed once, from its
prompt: `decide` maps the module's inputs at the tokens of a prompt to one entry of the memory, or to -1. `outputs` then
replaces, adds to or leaves the module's output at every token. Both work on packed tokens [N, size], wait for no
device, and leave every bit of a sequence that is routed to -1 as it is.

It is a safetensors file: the tensors by the names of their fields; metadata `format_version`, `kedit_fast`, `kind`
("kedit_fast memory"), and every other field as JSON.
"""

from __future__ import annotations

import abc
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch

from kedit_fast._version import __version__
from kedit_fast.errors import InvalidArgumentError, SideMemoryError
from kedit_fast.memories.selection import (
    activation_name,
    farthest,
    largest_count,
    masked_product,
    published_order,
    routed_product,
)
from kedit_fast.ops import activation_distance, best_overlap, nearest_key, top_features
from kedit_fast.support.dtypes import FLOATS, describe_tensor
from kedit_fast.support.files import read_file, write_file
from kedit_fast.support.matrix_bits import sha256
from kedit_fast.support.torch_state import plain_torch

FORMAT_VERSION = "1"
KIND = "kedit_fast memory"
Self = TypeVar("Self", bound="SideMemory")


@dataclass(frozen=True)
class SideMemory(abc.ABC):
    """Edits beside one linear module; the kinds are ActivationMemory, FingerprintMemory and KeyValueMemory.

    Example:
        >>> about = kedit_fast.matrix_identity(model, "model.layers.3.mlp.down_proj")
        >>> weight = model.model.layers[3].mlp.down_proj.weight.detach()
        >>> memory = kedit_fast.ActivationMemory(weights=1.5 * weight[None], thresholds=torch.tensor([2.0]), **about)
        >>> memory.save("edits.safetensors")
        >>> kedit_fast.SideMemory.load("edits.safetensors").kind
        'activation'
    """

    kind: ClassVar[str]
    """What the file says of the class."""

    module: str
    """Path of the linear module, for example `model.layers.27.mlp.down_proj`."""
    original: str
    """SHA-256 of W_0 [out, in]; of a quantized module, of the matrix that it stands for."""
    dtype: str = "float32"
    """Of W_0, for example "bfloat16"."""
    transposed: bool = False
    """Whether the model stores it as [in, out] (transformers' Conv1D)."""
    method: str = ""
    """The method's name, for example "wise"."""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    """The hyper-parameters of the run."""
    requests: tuple[Mapping[str, Any], ...] = ()
    """prompt, subject and target_new of each edit."""
    prompt_format: str = ""
    """What the model read for the prompt "{} is" when the edits were made; "" where that is not known."""
    tokenizer: str = ""
    """`models.fingerprint.tokenizer_hash`; "" where that is not known."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """[out, in] of the module's matrix."""

    @property
    @abc.abstractmethod
    def entries(self) -> int:
        """Number of things that a sequence can be routed to."""

    @abc.abstractmethod
    def decide(self, x: torch.Tensor, output: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The entry that each sequence is routed to.

        Args:
            x: [N, in] the module's inputs at the prompt tokens of all sequences, one sequence after another.
            output: [N, out] the module's own output there.
            starts: [R + 1] int64, the first token of each sequence, and the end of the last one; tokens from there on
                belong to nobody.

        Returns:
            [R] int64, -1 where no entry is meant; so for sequences without a token and with inputs that are not finite.
        """

    @abc.abstractmethod
    def outputs(
        self, x: torch.Tensor, output: torch.Tensor, route: torch.Tensor, place: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The module's output with the memory.

        Args:
            x: [N, in] its inputs at any tokens.
            output: [N, out] its own output; not changed.
            route: [N] int64, the entry of each token's sequence, or -1.
            place: [N] int64, tokens behind the last one of the prompt: 0 there, negative before it; None for tokens
                that are all behind the prompt.

        Returns:
            [N, out], in the dtype of `output`.
        """

    @property
    def empty(self) -> bool:
        """Whether nothing can be routed to it."""
        return self.entries == 0

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors, by field."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides what it does: the matrix it is for, its tensors and numbers."""
        digest = hashlib.sha256()
        about = {**self._plain(), "configuration": None, "requests": None, "method": None}
        digest.update(json.dumps({"kind": self.kind, **about}, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {sha256(tensor.reshape(1, -1))} {list(tensor.shape)}".encode())
        return digest.hexdigest()

    def to(self: Self, device: torch.device | str) -> Self:
        """The same with its tensors on a device; itself where they are there."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return self if all(moved[name] is tensor for name, tensor in self.tensors.items()) else replace(self, **moved)

    def about(self) -> dict[str, Any]:
        """A summary as plain data: what `kedit-fast memory show --json` prints."""
        return {
            "kind": self.kind,
            "entries": self.entries,
            "edits": len(self.requests),
            "shape": list(self.shape),
            "bytes": self.nbytes,
            **self._plain(),
        }

    def _plain(self) -> dict[str, Any]:
        """All fields that are no tensors, as JSON reads them back."""
        names = self.tensors
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in names}
        plain["configuration"] = dict(self.configuration)
        plain["requests"] = [dict(request) for request in self.requests]
        return plain

    @plain_torch()
    def save(self, path: str | os.PathLike) -> None:
        """Write the file, whole or not at all; raises SideMemoryError when it cannot be written."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        metadata = {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "kedit_fast": __version__,
            "memory": self.kind,
            "fields": json.dumps(self._plain(), ensure_ascii=False, default=str),
        }
        write_file(path, tensors, metadata, SideMemoryError)

    @staticmethod
    @plain_torch()
    def load(path: str | os.PathLike) -> SideMemory:
        """Read a file that `save` wrote.

        Raises:
            SideMemoryError: the file cannot be read, is damaged, is no memory, or has a later format; the message names
                it.
        """
        tensors, metadata = read_file(path, SideMemoryError)
        if metadata.get("kind") != KIND:
            hint = f": it is a {metadata['kind']}" if str(metadata.get("kind")).startswith("kedit_fast") else ""
            raise SideMemoryError(f"{path} is not a memory of kedit_fast{hint}")
        if metadata.get("format_version") != FORMAT_VERSION:
            raise SideMemoryError(
                f"{path} has memory format {metadata.get('format_version')}, this version reads {FORMAT_VERSION}"
            )
        try:
            cls = KINDS[metadata["memory"]]
            plain = json.loads(metadata["fields"])
            plain["requests"] = tuple(plain["requests"])
            return cls(**tensors, **plain)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SideMemoryError(f"{path} is damaged: {error}") from error


@dataclass(frozen=True, kw_only=True)
class ActivationMemory(SideMemory):
    """WISE: copies of the matrix, of which the one whose output is farthest from W_0's answers for a sequence.

    D_m = mean over the prompt's tokens of |s(x W_m^T + b) - s(x W_0^T + b)|_2. A sequence is routed to the farthest
    m with D_m >= act_ratio * thresholds[m]; there the module puts out x W_m^T + b.

    Example:
        >>> about = kedit_fast.matrix_identity(model, "model.layers.3.mlp.down_proj")
        >>> weight = model.model.layers[3].mlp.down_proj.weight.detach()
        >>> memory = kedit_fast.ActivationMemory(weights=1.5 * weight[None], thresholds=torch.tensor([0.0]), **about)
        >>> memory.entries, memory.shape == tuple(weight.shape)
        (1, True)
    """

    kind: ClassVar[str] = "activation"

    weights: torch.Tensor
    """[M, out, in] float, the memories' matrices."""
    thresholds: torch.Tensor
    """[M] float, the smallest distance of what was edited into each; infinity closes it."""
    bias: torch.Tensor | None = None
    """[out], the module's bias; None where it has none."""
    act_ratio: float = 1.0
    """Share of a threshold that a sequence has to reach."""
    activation: str = "silu"
    """s: the model's activation function, which WISE applies to the output; "none" for the plain distance."""
    order: Literal["farthest", "published"] = "farthest"
    """"published": entry 0 is the memory being edited, and the others must be farther than it even where it is not
    over its threshold, as in the released code."""
    long: int = 100
    """A prompt of more tokens is routed by its largest distance instead of the mean; 0 for never."""

    def __post_init__(self):
        count, out = _leading(self.weights, 3, "weights", "[M, out, in]"), self.weights.shape[1]
        _floats(self.weights, "weights")
        _shaped(self.thresholds, (count,), "thresholds")
        if bool(torch.isnan(self.thresholds).any()):
            raise InvalidArgumentError("thresholds must not be NaN")
        if self.bias is not None:
            _shaped(self.bias, (out,), "bias")
        if self.order not in ("farthest", "published"):
            raise InvalidArgumentError(f'order must be "farthest" or "published"; got {self.order!r}')
        activation_name(self.activation)  # refuses by name
        _positive(self.act_ratio, "act_ratio")
        if self.long < 0:
            raise InvalidArgumentError(f"long must be at least 0; got {self.long}")

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the module's matrix."""
        return self.weights.shape[1], self.weights.shape[2]

    @property
    def entries(self) -> int:
        """M."""
        return self.weights.shape[0]

    @torch.no_grad()
    def distances(self, x: torch.Tensor, output: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """D [M, R] of sequences whose tokens are packed as `decide` takes them."""
        end = starts.new_full((1,), x.shape[0])  # what belongs to nobody is one more sequence
        act, long = activation_name(self.activation), self.long
        return activation_distance(x, output, self.weights, torch.cat([starts, end]), act, long, bias=self.bias)[:, :-1]

    @torch.no_grad()
    def decide(self, x: torch.Tensor, output: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The route [R] of each sequence; see `SideMemory.decide`."""
        if self.empty:
            return _nowhere(starts)
        distance = self.distances(x, output, starts)
        bounds = self.act_ratio * self.thresholds.to(distance)
        route = published_order(distance, bounds) if self.order == "published" else farthest(distance, bounds)
        return torch.where(starts.diff() > 0, route, -1)

    def outputs(
        self, x: torch.Tensor, output: torch.Tensor, route: torch.Tensor, place: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The module\'s output [N, out] with the memory; see `SideMemory.outputs`."""
        if self.empty:
            return output
        return routed_product(x, output, self.weights, route, self.bias)


@dataclass(frozen=True, kw_only=True)
class FingerprintMemory(SideMemory):
    """MEMOIR: one residual matrix, of which a sequence uses the columns that the most similar edit was written into.

    The fingerprint of a prompt is permutation[i] for the top_k largest |mean of x over its tokens - center|. A sequence
    is routed to the edit j of the book that shares the most features with it, if these are at least threshold * top_k;
    there the module puts out x W_0^T + (m_j * x) W, with the *stored* features m_j.

    Example:
        >>> book = torch.tensor([[0b11]], dtype=torch.uint8)  # one edit, of the features 0 and 1
        >>> memory = kedit_fast.FingerprintMemory(
        ...     module="layers.3.down_proj", original="", weight=torch.eye(8), book=book, center=torch.zeros(8),
        ...     permutation=torch.arange(8), top_k=2, threshold=0.5)
        >>> memory.decide(torch.eye(8)[:3], torch.zeros(3, 8), torch.tensor([0, 2, 3]))
        tensor([0, 0])
    """

    kind: ClassVar[str] = "fingerprint"

    weight: torch.Tensor
    """[in, out] float, the residual matrix, transposed: the rows of a fingerprint are contiguous."""
    book: torch.Tensor
    """[K, ceil(in / 8)] uint8, the features of each edit: bit i of byte j is feature 8 j + i."""
    center: torch.Tensor
    """[in] float, the mean features of unrelated prompts."""
    permutation: torch.Tensor
    """[in] int64, where each feature is stored; part of the edits, without it none is found."""
    top_k: int
    """Features of a fingerprint."""
    threshold: float
    """Share of them that a prompt must have in common with an edit; infinity closes the memory."""

    def __post_init__(self):
        size, _ = _leading(self.weight, 2, "weight", "[in, out]"), _floats(self.weight, "weight")
        if self.book.dtype != torch.uint8 or self.book.ndim != 2 or self.book.shape[1] != -(-size // 8):
            raise InvalidArgumentError(f"book must be uint8 [K, {-(-size // 8)}]; got {describe_tensor(self.book)}")
        _shaped(self.center, (size,), "center")
        if self.permutation.dtype != torch.int64 or tuple(self.permutation.shape) != (size,):
            raise InvalidArgumentError(f"permutation must be int64 [{size}]; got {describe_tensor(self.permutation)}")
        if not torch.equal(self.permutation.sort().values.cpu(), torch.arange(size)):
            raise InvalidArgumentError(f"permutation must have each of 0 to {size - 1} once")
        if not 1 <= self.top_k <= size:
            raise InvalidArgumentError(f"top_k must be 1 to {size}, the inputs of the module; got {self.top_k}")
        if (count := largest_count(self.book)) > self.top_k:
            raise InvalidArgumentError(f"book has {count} features in a row, top_k is {self.top_k}")
        _positive(self.threshold, "threshold")

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the module's matrix."""
        return self.weight.shape[1], self.weight.shape[0]

    @property
    def entries(self) -> int:
        """K."""
        return self.book.shape[0]

    @torch.no_grad()
    def fingerprints(self, x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Features [R, ceil(in / 8)] uint8 of sequences whose tokens are packed as `decide` takes them."""
        return top_features(x, starts, self.center, self.top_k, self.permutation)

    @torch.no_grad()
    def decide(self, x: torch.Tensor, output: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The route [R] of each sequence; see `SideMemory.decide`."""
        if self.empty:
            return _nowhere(starts)
        index, count = best_overlap(self.fingerprints(x, starts), self.book)
        return torch.where((count.double() / self.top_k >= self.threshold) & (starts.diff() > 0), index, -1)

    def outputs(
        self, x: torch.Tensor, output: torch.Tensor, route: torch.Tensor, place: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The module\'s output [N, out] with the memory; see `SideMemory.outputs`."""
        if self.empty:
            return output
        added = masked_product(x, self.weight, self.book[route.clamp(min=0)], self.top_k)
        return torch.where((route >= 0)[:, None], output + added.to(output.dtype), output)


@dataclass(frozen=True, kw_only=True)
class KeyValueMemory(SideMemory):
    """GRACE: a prompt whose last token's input lies within the radius of the nearest key gets that key's value.

    Published decoding asks the keys again at every generated token; here a sequence is routed once, by its prompt.

    Example:
        >>> memory = kedit_fast.KeyValueMemory(
        ...     module="layers.3.down_proj", original="", keys=torch.eye(2), values=torch.tensor([[5.0], [6.0]]),
        ...     radii=torch.tensor([0.1, 0.1]))
        >>> x, output = torch.tensor([[0.0, 1.05], [1.0, 1.0]]), torch.zeros(2, 1)
        >>> route = memory.decide(x, output, torch.tensor([0, 1, 2]))  # two prompts of one token
        >>> route, memory.outputs(x, output, route, place=torch.zeros(2))
        (tensor([ 1, -1]), tensor([[6.],
                [0.]]))
    """

    kind: ClassVar[str] = "key value"

    keys: torch.Tensor
    """[K, in] float, the module's inputs at the last token of the edits' prompts."""
    values: torch.Tensor
    """[K, out] float, what the module puts out instead."""
    radii: torch.Tensor
    """[K] float, how far from its key a prompt may be."""
    replacement: Literal["replace_last", "replace_all", "replace_prompt"] = "replace_last"
    """Where: at the prompt's last token; at every token, generated ones too; at the prompt's tokens before the last."""

    def __post_init__(self):
        count = _leading(self.keys, 2, "keys", "[K, in]")
        if _leading(self.values, 2, "values", "[K, out]") != count:
            raise InvalidArgumentError(f"there are {count} keys and {self.values.shape[0]} values")
        _floats(self.keys, "keys")
        _floats(self.values, "values")
        _shaped(self.radii, (count,), "radii")
        if self.replacement not in ("replace_last", "replace_all", "replace_prompt"):
            raise InvalidArgumentError(
                f"replacement must be replace_last, replace_all or replace_prompt; got {self.replacement!r}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the module's matrix."""
        return self.values.shape[1], self.keys.shape[1]

    @property
    def entries(self) -> int:
        """K."""
        return self.keys.shape[0]

    @torch.no_grad()
    def decide(self, x: torch.Tensor, output: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The route [R] of each sequence; see `SideMemory.decide`."""
        if self.empty or x.shape[0] == 0:
            return _nowhere(starts)
        queries = x[(starts[1:] - 1).clamp(min=0)]  # [R, in], of each prompt's last token
        index, _, inside = nearest_key(queries, self.keys, self.radii)
        return torch.where(inside & (starts.diff() > 0), index, -1)

    def outputs(
        self, x: torch.Tensor, output: torch.Tensor, route: torch.Tensor, place: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The module\'s output [N, out] with the memory; see `SideMemory.outputs`."""
        if self.empty:
            return output
        chosen = route >= 0
        if self.replacement != "replace_all":
            if place is None:
                return output
            chosen = chosen & (place == 0 if self.replacement == "replace_last" else place < 0)
        return torch.where(chosen[:, None], self.values[route.clamp(min=0)].to(output.dtype), output)


KINDS: dict[str, type[SideMemory]] = {cls.kind: cls for cls in (ActivationMemory, FingerprintMemory, KeyValueMemory)}
"""What a file says of its class -> the class."""


def _nowhere(starts: torch.Tensor) -> torch.Tensor:
    return torch.full_like(starts[1:], -1)


def _leading(tensor: torch.Tensor, dimensions: int, name: str, form: str) -> int:
    """The size of a tensor's first dimension; raises where it has not the dimensions."""
    if tensor.ndim != dimensions:
        raise InvalidArgumentError(f"{name} must be {form}; got {describe_tensor(tensor)}")
    return tensor.shape[0]


def _floats(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype not in FLOATS or not bool(torch.isfinite(tensor).all()):
        raise InvalidArgumentError(f"{name} must be finite floats; got {describe_tensor(tensor)}")


def _shaped(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
    if tensor.dtype not in FLOATS or tuple(tensor.shape) != shape:
        raise InvalidArgumentError(f"{name} must be float {list(shape)}; got {describe_tensor(tensor)}")


def _positive(value: float, name: str) -> None:
    if not value > 0 or math.isnan(value):
        raise InvalidArgumentError(f"{name} must be positive; got {value}")
