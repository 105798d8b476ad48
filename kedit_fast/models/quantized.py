"""Quantized models: the matrices that are edited, and they alone, become 16-bit.

What a quantizer stores has no room for an edit: a small update would be rounded away. So the edited modules are
replaced by plain linear ones with the matrices that the quantized modules stand for, and the model's quantization
config lists them among those that are not to be quantized. The other modules stay as they are, and the saved folder
loads as what was saved.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kedit_fast.errors import InvalidArgumentError, KeditError, UnsupportedModelError
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.schemes import Scheme, scheme_of
from kedit_fast.models.view import ModelView
from kedit_fast.support.dtypes import FLOATS, dtype_name
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")


@dataclass(frozen=True)
class Dequantized:
    """What `dequantize_edited` did to a model."""

    view: ModelView
    """The model."""
    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    """Path -> the quantized module that was there; empty if none of the edited ones is quantized."""
    listed: list[str] | None = None
    """The exceptions of the quantization config from before."""

    def put_back(self, except_layers: Sequence[int] = ()) -> None:
        """Put quantized modules back as they were; what was written into the plain ones is lost.

        Args:
            except_layers: whose edited matrices stay plain.
        """
        staying = {self.view.module_name(layer) for layer in except_layers}
        for path in [path for path in self.modules if path not in staying]:
            module = self.modules.pop(path)
            scheme = scheme_of(module)
            assert scheme is not None, "only modules of a scheme are replaced"
            self.view.model.set_submodule(path, module)
            _list_exceptions(self.view.model, scheme, self.listed, self.modules)


@plain_torch()
def dequantize_edited(
    model: Any, layers: Sequence[int] | None = None, modules: Sequence[str] = (), spec: ArchSpec | None = None
) -> Dequantized:
    """Give the edited modules of a quantized model plain matrices in the model's own dtype, in place.

    W = dequantize(W_q), rounded once to the dtype of the embeddings (bfloat16 or float16 of most models). The
    quantization config then lists these modules as exceptions. Modules that are plain already stay as they are.

    Args:
        model: a causal language model that bitsandbytes (4 or 8 bits) or transformers' fp8 has quantized.
        layers: whose edited matrices become plain; None for those of all layers.
        modules: paths of other linear modules, for methods that edit modules by name (`inner_params`).
        spec: the model's module names, where they are not found by themselves.

    Returns:
        the quantized modules by path, which can be put back.

    Raises:
        UnsupportedModelError: another quantizer, by name; one whose config has no list of exceptions; or an offloaded
            module. The model is then as it was.

    Cost: 2 bytes for each entry of the edited matrices; the quantized ones stay in memory while the result does.
    """
    view = ModelView(model, spec)
    chosen = view.editable if layers is None else view.check_layers(tuple(layers)) if layers else ()
    paths = [*(view.module_name(layer) for layer in chosen), *modules]
    quantized = {path: scheme for path in paths if (scheme := _scheme_at(view, path))}
    if not quantized:
        _log.info("no edited matrix of this %s is quantized", type(view.model).__name__)
        return Dequantized(view)
    scheme = next(iter(quantized.values()))
    if others := [path for path in quantized if quantized[path] != scheme]:
        raise UnsupportedModelError(f"{others[0]} is quantized by another scheme than {next(iter(quantized))}")
    listed = _exceptions(view.model, scheme)
    dtype = view.model.get_input_embeddings().weight.dtype
    if dtype not in FLOATS:
        raise UnsupportedModelError(f"the embeddings are {dtype_name(dtype)}: the dtype to compute in is not known")
    old = {path: view.model.get_submodule(path) for path in quantized}
    plain = {path: _plain(module, scheme.matrix(module), dtype) for path, module in old.items()}
    for path, module in plain.items():  # all of them are there before the model changes
        view.model.set_submodule(path, module)
    _list_exceptions(view.model, scheme, listed, old)
    _log.info("%s: %d edited matrices are %s now", scheme.name, len(plain), dtype_name(dtype))
    return Dequantized(view, old, listed)


def _scheme_at(view: ModelView, path: str) -> Scheme | None:
    """The scheme that the module at a path is quantized by; None if it is plain.

    Raises:
        UnsupportedModelError, InvalidArgumentError: it is neither, or offloaded.
    """
    try:
        module: Any = view.model.get_submodule(path)
    except AttributeError:
        raise InvalidArgumentError(f"the model has no module {path!r}") from None
    scheme = scheme_of(module)
    if scheme is None:
        view.linear(path)
    elif module.weight.device.type == "meta":
        raise UnsupportedModelError(f"{path} is offloaded: load the model with this layer on a device")
    return scheme


def _plain(module: Any, matrix: torch.Tensor, dtype: torch.dtype) -> torch.nn.Module:
    """The module that was quantized: torch's Linear, or transformers' Conv1D with its matrix [in, out]."""
    source = getattr(module, "source_cls", torch.nn.Linear)
    with torch.device("meta"):
        if source.__name__ == "Conv1D":
            plain = source(matrix.shape[0], matrix.shape[1])
            matrix = matrix.T
        else:
            plain = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=module.bias is not None)
    plain.weight = torch.nn.Parameter(matrix.to(dtype).contiguous().clone(), requires_grad=False)
    bias = module.bias
    if bias is None and plain.bias is not None:  # a Conv1D always has one
        bias = torch.zeros_like(plain.bias, device=matrix.device)
    if bias is not None:
        plain.bias = torch.nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return plain.train(module.training)


def _config_of(model: Any) -> Any:
    return getattr(model.config, "quantization_config", None)


def _exceptions(model: Any, scheme: Scheme) -> list[str] | None:
    """The modules that the quantization config excepts; None where it leaves them to the quantizer.

    Raises:
        UnsupportedModelError: it has no list of exceptions.
    """
    config = _config_of(model)
    has_field = scheme.exceptions in config if isinstance(config, dict) else hasattr(config, scheme.exceptions)
    if not has_field:
        kind = "no quantization config" if config is None else f"a {type(config).__name__}"
        raise UnsupportedModelError(
            f"the model has {kind} without {scheme.exceptions}: a saved folder could not say that the edited matrices "
            "are not quantized. Load the model in bfloat16 or float16 to edit it"
        )
    listed = config[scheme.exceptions] if isinstance(config, dict) else getattr(config, scheme.exceptions)
    return None if listed is None else list(listed)


def _list_exceptions(model: Any, scheme: Scheme, listed: list[str] | None, paths: Collection[str]) -> None:
    """Let the quantization config except `paths` beside what it excepted, and what its quantizer left by itself."""
    exceptions = listed
    if paths:
        if listed is None:  # a quantizer leaves the head, but not where there is a list
            listed = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear or type(m).__name__ == "Conv1D"]
        exceptions = [*listed, *(path for path in paths if path not in listed)]
    configs = [_config_of(model), getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)]
    for config in configs:
        if isinstance(config, dict):
            config[scheme.exceptions] = exceptions
        elif config is not None:
            setattr(config, scheme.exceptions, exceptions)


@contextlib.contextmanager
def saved_as_quantized(model: Any) -> Iterator[None]:
    """Inside the block, save_pretrained writes the tensors of quantized modules as they are.

    transformers 5 undoes on saving what it did on loading, and cannot undo how bitsandbytes' tensors are put together,
    which needs no undoing: the modules write what they read.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None or getattr(model, "hf_quantizer", None) is None:
        yield
        return
    model._weight_conversions = [
        conversion
        for conversion in conversions
        if not any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))
    ]
    try:
        yield
    finally:
        model._weight_conversions = conversions


def require_same_modules(model: Any) -> None:
    """Raise KeditError unless loading a quantized model's files would quantize the modules that are quantized here.

    A model of the same class is made without memory, and its quantizer prepares it as for loading.
    """
    quantizer = model.hf_quantizer
    try:
        with torch.device("meta"):
            fresh = type(model)(copy.deepcopy(model.config))
        again = type(quantizer)(copy.deepcopy(quantizer.quantization_config), pre_quantized=True)
        again.preprocess_model(model=fresh, device_map={"": "cpu"})
    except Exception:  # a class that cannot be made without memory; what was written is still compared
        return
    kinds = {name: type(module).__name__ for name, module in fresh.named_modules()}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if name in kinds and kinds[name] != kind and (scheme_of(module) or scheme_of(fresh.get_submodule(name))):
            raise KeditError(
                f"what is saved would not load as this {type(model).__name__}: {name} is a {kind}, and the "
                f"quantization config makes a {kinds[name]} of it. `dequantize_edited` lists what it makes plain; "
                "other modules must be listed where they are replaced"
            )
