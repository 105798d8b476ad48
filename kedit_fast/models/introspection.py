"""The ArchSpec of a model that nobody listed, read from its own modules.

The list of decoder blocks stands beside the input embedding and is as long as the configuration says. In a block, the
MLP is the module (or the pair of layers) that widens the residual stream and narrows it again without being attention
or another mixer of positions. Its last linear layer is edited; or, where a router chooses experts for each token, their
stacked matrix (`models.experts`). Whether what is edited joins the residual sum unchanged is tried with a few tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch

from kedit_fast.errors import InvalidArgumentError, UnsupportedModelError
from kedit_fast.models.architectures import (
    ArchSpec,
    SharedExperts,
    known_architecture,
    require_decoder,
    text_config,
)
from kedit_fast.models.experts import refusal, stack_shape
from kedit_fast.models.head import error_limit, model_logits, refused_by_name, sample_rows
from kedit_fast.models.offloaded import device_of
from kedit_fast.models.patching import evaluation_mode, output_hooks
from kedit_fast.models.shared_experts import with_shared_experts
from kedit_fast.models.weight_names import has_experts_name
from kedit_fast.models.widened import computing
from kedit_fast.support.messages import comma_list
from kedit_fast.support.torch_state import plain_torch

_MLP = re.compile(r"mlp|ffn|feed_?forward|(^|_)ff($|_)", re.IGNORECASE)
_MIXER = re.compile(r"attn|attention|mixer|mamba|ssm|conv|delta|recurrent|rwkv|lstm|router|experts|lora", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|_)ln($|_)", re.IGNORECASE)
_ADVICE = "Pass an ArchSpec with its module names (kedit_fast.models.architectures.ArchSpec, or --spec FILE)"


class _Linear(NamedTuple):
    """A linear layer of a block."""

    path: str
    """Its path inside the block."""
    module: Any
    inputs: int
    outputs: int

    @property
    def container(self) -> str:
        """Path of the module that it is in; "" for the block itself."""
        return self.path.rpartition(".")[0]


class _Mlp(NamedTuple):
    """Where a block's MLP is; paths inside the block."""

    mlp: str
    edit: str
    """The linear layer, or the experts."""
    transposed: bool


@plain_torch()
def find_spec(model: Any, shared_experts: SharedExperts = "leave") -> ArchSpec:
    """The ArchSpec of a model: the listed one of its configuration, or what its own modules show.

    Args:
        model: a causal language model of transformers. Without values, whether a norm or a multiplier follows the MLP
            is read from names alone.
        shared_experts: what an edit of a mixture does to the experts that every token passes: "leave" does not change
            them, "stack" makes them one more block of the stack of the others, "alone" edits them and no others.

    Raises:
        InvalidArgumentError: another value of `shared_experts`.
        UnsupportedModelError: a mixture of experts whose stacked matrix cannot be edited, an encoder-decoder, or a
            model in which a part cannot be told; or, with "stack" or "alone", one without shared experts. The message
            names the part.

    Cost: nothing for a listed architecture; else a pass of a few tokens, twice for each class of blocks.

    Example:
        >>> find_spec(model).edit  # of a dense model
        'mlp.down_proj'
        >>> find_spec(model, "stack")
        Traceback (most recent call last):
        ...
        kedit_fast.errors.UnsupportedModelError: shared_experts = 'stack': ...
    """
    if shared_experts not in get_args(SharedExperts):
        raise InvalidArgumentError(
            f"shared_experts must be one of {comma_list(get_args(SharedExperts))}; got {shared_experts!r}"
        )
    spec = _find_spec(model)
    if shared_experts == "leave":
        return spec
    blocks: Any = model.get_submodule(spec.blocks)
    for block in blocks if has_experts_name(spec.edit) else ():
        if _has(block, spec.edit) and (changed := with_shared_experts(spec, block, shared_experts == "alone")):
            return changed
    raise UnsupportedModelError(
        f"shared_experts = {shared_experts!r}: no MLP that every token passes was seen beside experts in the blocks of "
        f"{spec.name} ({spec.blocks}); 'leave' edits {spec.edit}"
    )


def _find_spec(model: Any) -> ArchSpec:
    require_decoder(model.config)
    listed = known_architecture(text_config(model.config))
    if listed is not None and _has(model, listed.blocks):
        return listed
    kind = getattr(text_config(model.config), "model_type", None) or type(model).__name__
    path, blocks = _blocks(model, kind)
    size = _hidden_size(model)
    per_block = [_stacked(block, size) for block in blocks]
    if not any(per_block):
        per_block = [None if _experts(block) else _mlp(block, size) for block in blocks]
    mlps = [mlp for mlp in per_block if mlp is not None]
    if not mlps and (layer := next((i for i, block in enumerate(blocks) if _experts(block)), None)) is not None:
        raise _refused_experts(kind, f"{path}.{layer}.", blocks[layer], size)
    if not mlps:
        raise UnsupportedModelError(
            f"unknown architecture {kind!r}: no linear layer that ends an MLP was seen in {path}.0, a "
            f"{type(blocks[0]).__name__} of {', '.join(name for name, _ in blocks[0].named_children())}. {_ADVICE}"
        )
    mlp = max(mlps, key=mlps.count)  # the first of the most frequent
    first = per_block.index(mlp)
    base = path.rpartition(".")[0]
    if listed is not None:  # inside a multimodal model
        norm = listed.norm.rpartition(".")[2]
        return ArchSpec(
            listed.name, listed.model_types, path, listed.attention, listed.mlp, listed.edit, listed.transposed,
            f"{base}.{norm}", listed.post_norm,
        )  # fmt: skip
    spec = ArchSpec(
        kind,
        (kind,),
        path,
        _attention(blocks),
        mlp.mlp,
        mlp.edit,
        mlp.transposed,
        next(reversed(_norms(model, base)), ""),
        _names_post_norm(model, blocks[first]),
    )
    if next(blocks.parameters()).device.type == "meta":
        return spec
    kinds = {type(block): layer for layer, block in reversed([*enumerate(blocks)]) if per_block[layer] == mlp}
    tried = [_tried(model, spec, layer) for layer in sorted(kinds.values())]
    mlps_alone = all(each.mlp == spec.mlp for each in tried)
    return replace(tried[0], mlp=spec.mlp if mlps_alone else spec.edit, post_norm=any(each.post_norm for each in tried))


def _has(model: torch.nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _blocks(model: Any, kind: str) -> tuple[str, torch.nn.ModuleList]:
    """The list of decoder blocks, by its path."""
    config = text_config(model.config)
    count = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layer", None)
    embedding = model.get_input_embeddings()
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    lists = [(path, module) for path, module in lists if len(module) and not _inside(path, [p for p, _ in lists])]
    for path, module in lists:
        base = model.get_submodule(path.rpartition(".")[0])
        if len(module) == count and base is not model and any(part is embedding for part in base.modules()):
            return path, module
    seen = ", ".join(f"{path} ({len(module)})" for path, module in lists) or "none"
    raise UnsupportedModelError(
        f"unknown architecture {kind!r}: no list of {count} decoder blocks stands beside the input embedding (lists of "
        f"modules: {seen}). {_ADVICE}"
    )


def _inside(path: str, others: list[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


def _hidden_size(model: Any) -> int:
    config = text_config(model.config)
    size = getattr(config, "hidden_size", None) or getattr(config, "n_embd", None) or getattr(config, "d_model", None)
    return int(size or model.get_input_embeddings().weight.shape[1])


def _linears(block: torch.nn.Module) -> Iterator[_Linear]:
    """The linear layers of a block, in the order of its modules."""
    for path, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ == "Conv1D":  # whose weight is [in, out]
            assert weight is not None
            yield _Linear(path, module, *weight.shape)
        elif isinstance(module, torch.nn.Linear):  # the weight of a quantized one has another shape
            yield _Linear(path, module, module.in_features, module.out_features)


def _mlp(block: torch.nn.Module, size: int) -> _Mlp | None:
    """Where the MLP of a block is; None if it has none."""
    containers: dict[str, list[_Linear]] = {}
    for linear in _linears(block):
        containers.setdefault(linear.container, []).append(linear)
    usable = {path: linears for path, linears in containers.items() if _is_mlp(block, path, linears, size)}
    if not usable:  # up and down in modules of their own (BERT's intermediate and output)
        together = [linear for path, linears in containers.items() if not _mixes(block, path) for linear in linears]
        usable = {"": together} if _is_mlp(block, "", together, size) else {}
    if not usable:
        return None
    path, linears = max(usable.items(), key=lambda item: bool(_MLP.search(_words(block, item[0]))))
    last = [linear for linear in linears if _narrows(linear, linears, size)][-1]
    return _Mlp(path or last.path, last.path, type(last.module).__name__ == "Conv1D")


def _experts(block: torch.nn.Module) -> str:
    """Path of the experts inside a block, those that a router chooses first; "" where it has none."""
    named = [
        path
        for path, module in block.named_modules()
        if re.search("experts?$", path.rpartition(".")[2], re.IGNORECASE) and any(True for _ in module.parameters())
    ]
    return min(named, key=lambda path: (path.rpartition(".")[2] != "experts", not _MLP.search(path)), default="")


def _stacked(block: torch.nn.Module, size: int) -> _Mlp | None:
    """Where the experts of a block are, if their stacked matrix can be edited; None if not, or if it has none."""
    experts = _experts(block)
    if not has_experts_name(experts) or _problem(block.get_submodule(experts), size):
        return None
    return _Mlp(experts.rpartition(".")[0] or experts, experts, False)


def _problem(experts: torch.nn.Module, size: int) -> str:
    """Why the stacked matrix of experts cannot be edited; "" if it can."""
    if problem := refusal(experts):
        return problem
    _, outputs, _ = stack_shape(experts)
    return "" if outputs == size else f"puts out {outputs} numbers, and the model's states have {size}"


def _refused_experts(kind: str, prefix: str, block: torch.nn.Module, size: int) -> UnsupportedModelError:
    path = _experts(block)
    module = block.get_submodule(path)
    return UnsupportedModelError(
        f"{kind!r} is a mixture-of-experts model that cannot be edited: {prefix}{path} ({type(module).__name__}) "
        f"{_problem(module, size)}"
    )


def _words(block: torch.nn.Module, path: str) -> str:
    """The name of a module inside a block, and its class, if that is not the class of a block."""
    kind = type(block.get_submodule(path)).__name__
    is_block = kind.endswith(("Layer", "Block"))  # a whole block inside a block, named after its attention (Zamba 2)
    return f"{path.rpartition('.')[2]} {'' if is_block else kind}"


def _is_mlp(block: torch.nn.Module, path: str, linears: list[_Linear], size: int) -> bool:
    """Whether the linear layers of one container widen the residual stream, narrow it again, and are no mixer."""
    return any(_narrows(linear, linears, size) for linear in linears) and not _mixes(block, path)


def _mixes(block: torch.nn.Module, path: str) -> bool:
    """Whether a module, or one that it is in, has the name of attention or another mixer of positions."""
    parts = [path.rsplit(".", i)[0] for i in range(path.count(".") + 1)] if path else []
    words = [_words(block, part) for part in parts]
    return any(_MIXER.search(word) and not _MLP.search(word) for word in words)


def _narrows(linear: _Linear, linears: list[_Linear], size: int) -> bool:
    """Whether a layer leads back to the residual stream from what another (gate and up in one, perhaps) has widened."""
    widened = [other.outputs for other in linears if other is not linear and other.inputs == size]
    return linear.outputs == size and any(outputs in (linear.inputs, 2 * linear.inputs) for outputs in widened)


def _attention(blocks: torch.nn.ModuleList) -> str:
    """The child of all blocks that is their attention; "" where they have it under several names, or none."""
    paths = {
        next((name for name, child in block.named_children() if re.search("attn|attention", name, re.IGNORECASE)
              and not _NORM.search(name) and any(True for _ in child.children())), "")
        for block in blocks
    }  # fmt: skip
    return paths.pop() if len(paths) == 1 else ""


def _norms(model: torch.nn.Module, base: str) -> dict[str, torch.nn.Module]:
    """The norms among a decoder's own modules, by path."""
    children = model.get_submodule(base).named_children()
    return {
        f"{base}.{name}": child for name, child in children if _NORM.search(f"{name} {type(child).__name__}")
    }  # fmt: skip


def _names_post_norm(model: Any, block: torch.nn.Module) -> bool:
    """Whether names say that a norm or a multiplier follows the MLP."""
    follows = re.compile(r"post_?(feed_?forward|mlp|ffn?)", re.IGNORECASE)
    if any(follows.search(name) for name, _ in block.named_children()):
        return True
    return getattr(text_config(model.config), "residual_multiplier", 1) not in (None, 1)


@torch.no_grad()
def _tried(model: Any, spec: ArchSpec, layer: int) -> ArchSpec:
    """The spec after two passes, the second with a change at the edited layer's output.

    Where the change comes out of the MLP as another one, or the MLP gets more than its input, the site of values is the
    edited layer itself. Where it comes out of the block as another one, something follows the MLP.
    """
    block = model.get_submodule(f"{spec.blocks}.{layer}")
    mlp, edit = block.get_submodule(spec.mlp), block.get_submodule(spec.edit)
    row = sample_rows(model.config, model.get_input_embeddings().weight.shape[0])[0]
    outputs: dict[str, list[torch.Tensor]] = {"block": [], "mlp": [], "edit": []}
    norms: list[str] = []  # that ran, in order
    dtypes: list[torch.dtype] = []
    calls: list[int] = []
    change: torch.Tensor | None = None

    def record(name: str):
        def hook(module: torch.nn.Module, args: tuple, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple | list) else output
            changed = None
            if name == "edit" and change is not None:
                states = changed = states + change.to(states).view(1, *[1] * (states.ndim - 2), -1)
            if name == "mlp":
                calls.append(sum(isinstance(value, torch.Tensor) for value in args))
            dtypes.append(states.dtype)
            outputs[name].append(states.detach().float().flatten(0, -2).cpu())
            return changed

        return hook

    with evaluation_mode(model), computing(model):
        hooks = [(block, record("block")), (edit, record("edit"))]
        if mlp is not edit:
            hooks.append((mlp, record("mlp")))
        for path, norm in _norms(model, spec.blocks.rpartition(".")[0]).items():
            hooks.append((norm, lambda module, args, output, path=path: norms.append(path)))
        ids = torch.tensor([row], device=device_of(model.get_input_embeddings()))
        for _ in range(2):
            with output_hooks(hooks), refused_by_name(model, "token ids alone"):
                model_logits(model, ids)
            if any(len(states) == 0 for name, states in outputs.items() if name != "mlp" or mlp is not edit):
                raise UnsupportedModelError(
                    f"{spec.blocks}.{layer}.{spec.edit} did not run in a forward pass of {type(model).__name__}. "
                    f"{_ADVICE}"
                )
            if change is None:
                scale = float(outputs["block"][0].square().mean().sqrt()) or 1.0
                generator = torch.Generator().manual_seed(0)
                change = scale * torch.randn(outputs["edit"][0].shape[-1], generator=generator)
    assert change is not None
    limit = error_limit(dtypes[0])

    def passes_on(name: str) -> bool:
        before, after = outputs[name][:2]
        if before.shape != after.shape or before.shape[0] != len(row):
            return False
        return float((after - before - change).norm() / change.expand_as(before).norm()) <= limit

    is_alone = mlp is not edit and passes_on("mlp") and max(calls) == 1
    return ArchSpec(
        spec.name, spec.model_types, spec.blocks, spec.attention, spec.mlp if is_alone else spec.edit, spec.edit,
        spec.transposed, norms[-1] if norms else "", not passes_on("block"),
    )  # fmt: skip
