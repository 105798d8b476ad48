"""A causal language model seen through its ArchSpec."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar, cast

import torch

from kedit_fast.errors import InvalidArgumentError, UnsupportedModelError
from kedit_fast.models.architectures import ARCHITECTURES, ArchSpec, text_config
from kedit_fast.models.editable import is_adapter, plain_model
from kedit_fast.models.experts import ExpertStack, expert_stack, refusal
from kedit_fast.models.head import Head, checked_head, head_as_configured
from kedit_fast.models.introspection import find_spec
from kedit_fast.models.offloaded import device_of, on_host
from kedit_fast.models.routes import require_no_memory, suspended
from kedit_fast.models.schemes import scheme_of
from kedit_fast.models.sharded import is_sharded, require_whole_world, splits_inputs, whole, work_share
from kedit_fast.models.shared_experts import SharedExpert
from kedit_fast.models.weight_names import EXPERTS_WEIGHT, has_experts_name, is_experts_path, weight_name_of
from kedit_fast.support.dtypes import FLOATS
from kedit_fast.support.messages import comma_list

T = TypeVar("T")


def check_weight(name: str, module: torch.nn.Module) -> None:
    """Raise UnsupportedModelError unless a module's weight is a float matrix that can be written.

    It is plain, or split over its inputs (`models.sharded`).
    """
    weight = getattr(module, "weight", None)
    plain = weight if isinstance(weight, torch.Tensor) and type(weight) in (torch.Tensor, torch.nn.Parameter) else None
    if isinstance(weight, torch.Tensor) and splits_inputs(weight) and isinstance(module, torch.nn.Linear):
        plain = weight
    if plain is None or plain.dtype not in FLOATS or plain.ndim != 2:
        if scheme := scheme_of(module):
            raise UnsupportedModelError(
                f"{name} is quantized ({scheme.name}, a {type(module).__name__}): make the edited matrices alone "
                "16-bit, with --dequantize-edited or kedit_fast.models.quantized.dequantize_edited(model, layers)"
            )
        kind = f"{type(weight).__name__}, {weight.dtype}" if isinstance(weight, torch.Tensor) else "no weight"
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__} with a quantized or sharded weight ({kind}): "
            "load the model in float32, bfloat16 or float16 to edit it"
        )


def linear_module(model: torch.nn.Module, path: str) -> Any:
    """A linear module, torch's Linear or transformers' Conv1D, by its path.

    Raises:
        InvalidArgumentError: no such module, or not a linear one.
        UnsupportedModelError: it is an adapter's, or its weight is quantized or sharded.
    """
    if is_experts_path(path):
        raise InvalidArgumentError(
            f"{path!r} is the stacked matrix of experts, not a linear module: methods that solve for values (memit, "
            "alphaedit, rome) change it. Others take linear modules, as attention and shared experts have: name these "
            "by path (inner_params)"
        )
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise InvalidArgumentError(f"the model has no module {path!r}") from None
    kind = type(module).__name__
    if is_adapter(module):
        raise UnsupportedModelError(f"{path!r} is an adapter's {kind}: merge it first (peft's merge_and_unload())")
    if not isinstance(module, torch.nn.Linear) and kind != "Conv1D":  # whose weight is [in, out]
        raise InvalidArgumentError(f"{path!r} is a {kind}, not a linear module that can be edited")
    check_weight(path, module)
    return module


def linear_weight(model: torch.nn.Module, path: str) -> tuple[torch.Tensor, bool]:
    """The weight of a linear module as [out, in], a view on the model's memory; and whether it is stored transposed.

    The path of stacked experts (`models.weight_names`) gives [E, out, in].

    Of a weight that accelerate offloads to the host, it is the view on the memory there.
    Of a tensor-parallel model it is a DTensor, see `models.sharded`.

    Raises:
        InvalidArgumentError, UnsupportedModelError: see `linear_module` and `expert_stack`; or the weight is offloaded
            to disk.
    """
    if is_experts_path(path):
        parent = path.rpartition(".")[0]
        try:
            module = expert_stack(model, parent).module
        except AttributeError:
            raise InvalidArgumentError(f"the model has no module {parent!r}") from None
        weight, is_transposed = module.down_proj.detach(), module.is_transposed
    else:
        module = linear_module(model, path)
        weight, is_transposed = module.weight.detach(), type(module).__name__ == "Conv1D"
    if weight.device.type == "meta":
        held = on_host(model, weight_name_of(path))
        if held is None:
            raise UnsupportedModelError(
                f"{path!r} has no values in memory: it is offloaded to disk, or the model is not loaded"
            )
        weight = held
    return (weight.mT, True) if is_transposed else (weight, False)


class ModelView:
    """A causal language model seen through its ArchSpec: its blocks, edited matrices and head by what they are.

    Nothing in the model is changed. What the configuration says of the head is checked by a few short passes when the
    head is first asked for; see `models.head`.

    Args:
        model: a causal language model of transformers; of a multimodal one, its text decoder is seen.
        spec: its module names; None for those that ARCHITECTURES lists, or else that `find_spec` reads from the model.

    Raises:
        UnsupportedModelError: it is no causal language model of transformers, it does not have the modules of the spec,
            or an edited matrix is sharded, or quantized by another scheme than those of `models.schemes`; by name.
    """

    model: Any
    """The model itself, without wrappers of torch.compile."""
    config: Any
    """Its configuration; of a multimodal model, that of the text decoder."""
    spec: ArchSpec
    blocks: torch.nn.ModuleList
    base: torch.nn.Module
    """The decoder without its head."""
    editable: tuple[int, ...]
    """The layers whose block has the edited module: all, but in models with blocks of several kinds."""

    def __init__(self, model: Any, spec: ArchSpec | None = None):
        self.model = model = plain_model(model)
        self.config = text_config(self.model.config)
        require_whole_world(model)
        head = self.model.get_output_embeddings()
        if not isinstance(getattr(head, "weight", None), torch.Tensor):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no head that gives logits of tokens: load it with AutoModelForCausalLM"
            )
        self.spec = spec or find_spec(model)
        try:
            self.blocks = cast(torch.nn.ModuleList, model.get_submodule(self.spec.blocks))
            self.base = model.get_submodule(self.spec.blocks.rpartition(".")[0])
            if self.spec.norm:
                model.get_submodule(self.spec.norm)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not have the modules of {self.spec.name} ({error}): "
                "load it with AutoModelForCausalLM"
            ) from None
        if not isinstance(self.blocks, torch.nn.ModuleList):
            raise UnsupportedModelError(
                f"{self.spec.blocks} is a {type(self.blocks).__name__}, not the list of blocks of {self.spec.name}"
            )
        problems = {layer: problem for layer in range(len(self.blocks)) if (problem := self._problem(layer))}
        if problems and (self.spec in ARCHITECTURES or len(problems) == len(self.blocks)):
            raise UnsupportedModelError(next(iter(problems.values())))
        self._not_editable = problems
        if has_experts_name(self.spec.edit) and is_sharded(model):
            raise UnsupportedModelError(
                f"the experts of {type(model).__name__} are held by several processes together: load the model whole, "
                "without tp_plan, to edit them"
            )
        self.editable = tuple(layer for layer in range(len(self.blocks)) if layer not in problems)
        for layer in self.editable:
            is_plain = self.experts(layer) is None and scheme_of(self.edited_module(layer)) is None
            if is_plain:  # of a quantized one the inputs can be read, and `weight` refuses it
                check_weight(self.weight_name(layer), self.edited_module(layer))
            if (shared := self.shared_experts(layer)) is not None:
                check_weight(weight_name_of(shared.path), shared.last)
        self._computed: dict[Callable[[ModelView], Any], Any] = {}
        self._head: tuple[torch.Tensor, Head] | None = None  # of which weight

    def _problem(self, layer: int) -> str:
        """Why a layer cannot be edited; "" if it can."""
        try:
            _, _, edited = self.attention(layer), self.mlp(layer), self.edited_module(layer)
        except AttributeError as error:
            return (
                f"block {layer} is a {type(self.block(layer)).__name__} that does not have the modules of "
                f"{self.spec.name} ({error}): is it wrapped? Pass the model without wrappers inside"
            )
        if problem := self._problem_of_shared(layer, edited):
            return problem
        if has_experts_name(self.spec.edit):
            problem = refusal(edited)
            return f"{self.spec.blocks}.{layer}.{self.spec.edit} ({type(edited).__name__}) {problem}" if problem else ""
        if self.spec.transposed != (type(edited).__name__ == "Conv1D"):
            return (
                f"{self.module_name(layer)} is a {type(edited).__name__}, and the spec of {self.spec.name} says "
                f"transposed = {self.spec.transposed}: true is for transformers' Conv1D alone"
            )
        return ""

    def _problem_of_shared(self, layer: int, edited: Any) -> str:
        """Why what the spec says of shared experts does not hold in a layer; "" if it does, or says nothing."""
        spec, block = self.spec, self.block(layer)
        if not spec.shared and not spec.shared_gate:
            return ""
        if spec.shared and (not has_experts_name(spec.edit) or spec.mlp == spec.edit):
            return f"{spec.name}: shared experts are a block of the stack of experts in {spec.mlp}, not of {spec.edit}"
        try:
            last = block.get_submodule(spec.shared) if spec.shared else edited
            gate = block.get_submodule(spec.shared_gate) if spec.shared_gate else None
        except AttributeError as error:
            return f"block {layer} does not have the shared experts of {spec.name} ({error})"
        path = f"{spec.blocks}.{layer}.{spec.shared or spec.edit}"
        if not isinstance(last, torch.nn.Linear):
            return f"{path} is a {type(last).__name__}, not the last linear layer of shared experts"
        if gate is not None and (getattr(gate, "out_features", 0) != 1 or last.bias is not None):
            return f"{path} has a bias behind its gate, or a gate of several numbers: what it puts out is not linear"
        return ""

    @property
    def head(self) -> Head:
        """From the last states of passes to logits, checked against the model's own.

        Raises:
            UnsupportedModelError: the model does not run on token ids, or is no causal language model.
        """
        weight = self.model.get_output_embeddings().weight
        is_replaced = self._head is not None and self._head[0] is not weight and weight.device.type != "meta"
        if self._head is None or is_replaced:  # accelerate makes a new meta tensor for an offloaded one after each pass
            if self.device.type == "meta":
                head = head_as_configured(self.model)
            else:
                with suspended(self.model):
                    head = checked_head(self.model, self.base, self.base_takes, self.vocabulary, self.device)
            self._head = weight, head
        return self._head[1]

    @property
    def entry(self) -> Any:
        """The module that passes run: the decoder, or the whole model where its logits are taken as they are."""
        return self.model if self.head.matrix is None else self.base

    @cached_property
    def base_takes(self) -> frozenset[str]:
        """Names of the arguments of the decoder's forward function."""
        return frozenset(inspect.signature(type(self.base).forward).parameters)

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold the model together, so that each pass needs all of them (`models.sharded`)."""
        return self.once(_is_sharded)

    @property
    def work_share(self) -> tuple[int, int]:
        """Which part of the work on many prompts or texts this process takes, of how many (`models.sharded`)."""
        return work_share(self.model)

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """The device that token ids go to, that of the embedding."""
        return device_of(self.model.get_input_embeddings())

    def row_device(self, layer: int) -> torch.device:
        """The device that the inputs of a layer's edited module are on."""
        return device_of(self.edited_module(layer), "weight" if self.experts(layer) is None else EXPERTS_WEIGHT)

    def once(self, compute: Callable[[ModelView], T]) -> T:
        """What `compute` returns for this view, computed on the first call and stored with the view.

        It is about the model alone: a memory that is attached to it is suspended.
        """
        if compute not in self._computed:
            with suspended(self.model):
                self._computed[compute] = compute(self)
        return self._computed[compute]

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows: larger ids have no embedding, or no row of the head."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        return min(embedding.weight.shape[0], getattr(head, "out_features", head.weight.shape[0]))

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that the model takes; for longrope models, that its short factors are for.

        Past that, transformers rotates every row of a batch by the long factors, so a row would depend on the others.
        """
        config = self.config
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        if (rope.get("rope_type") or rope.get("type")) == "longrope":
            short = rope.get("original_max_position_embeddings")
            return int(short or getattr(config, "original_max_position_embeddings", config.max_position_embeddings))
        return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31)

    def block(self, layer: int) -> torch.nn.Module:
        """Decoder block `layer`."""
        return self.blocks[layer]

    def attention(self, layer: int) -> torch.nn.Module:
        """The attention of block `layer`; where the spec names none, the block itself."""
        return self.block(layer).get_submodule(self.spec.attention)

    def mlp(self, layer: int) -> torch.nn.Module:
        """The MLP of block `layer`."""
        return self.block(layer).get_submodule(self.spec.mlp)

    def edited_module(self, layer: int) -> Any:
        """The linear layer of block `layer` whose weight is edited; or the module of experts whose stack is."""
        return self.block(layer).get_submodule(self.spec.edit)

    def experts(self, layer: int) -> ExpertStack | None:
        """The experts of block `layer`, where their stacked matrix is edited; None where a linear layer is, or nothing.

        Raises:
            UnsupportedModelError: their matrix cannot be edited; see `expert_stack`.
        """
        if not has_experts_name(self.spec.edit) or self._has_no(layer, self.spec.edit):
            return None
        stack = expert_stack(self.model, f"{self.spec.blocks}.{layer}.{self.spec.edit}")
        shared = self.shared_experts(layer)
        return stack if shared is None else replace(stack, shared=shared)

    def _has_no(self, layer: int, path: str) -> bool:
        """Whether a block has no module of this path, as the first blocks of DeepSeek-V3 have no experts."""
        try:
            self.block(layer).get_submodule(path)
        except AttributeError:
            return True
        return False

    def shared_experts(self, layer: int) -> SharedExpert | None:
        """The shared experts of block `layer`, where they are one more block of the stack that is edited."""
        spec = self.spec
        if not spec.shared or self._has_no(layer, spec.shared):
            return None
        block, path = self.block(layer), f"{spec.blocks}.{layer}.{spec.shared}"
        mlp = block.get_submodule(spec.shared.rpartition(".")[0])
        return SharedExpert(path, mlp, block.get_submodule(spec.shared), self.shared_gate(layer))

    def adding_module(self, layer: int) -> Any:
        """The module that puts out the key times the edited matrix, or a sum with it: the edited one, unless gated."""
        return self.mlp(layer) if self.is_gated else self.edited_module(layer)

    @property
    def is_gated(self) -> bool:
        """Whether a gate multiplies what the edited linear layer puts out: that of shared experts, edited alone."""
        return bool(self.spec.shared_gate and not self.spec.shared)

    def shared_gate(self, layer: int) -> Any:
        """The linear layer whose sigmoid multiplies what shared experts put out; None where the spec names none."""
        return self.block(layer).get_submodule(self.spec.shared_gate) if self.spec.shared_gate else None

    @property
    def edited_path(self) -> str:
        """The part of `module_name` that follows the block: the same for all layers."""
        edit = self.spec.edit
        return f"{edit}.{EXPERTS_WEIGHT}" if has_experts_name(edit) else edit

    def module_name(self, layer: int) -> str:
        """The path of the edited module in the model, for example `model.layers.4.mlp.down_proj`.

        Of experts that of their stacked matrix, `model.layers.4.mlp.experts.down_proj`.
        """
        return f"{self.spec.blocks}.{layer}.{self.edited_path}"

    def weight_name(self, layer: int) -> str:
        """The name of the edited weight in the state dict."""
        return weight_name_of(self.module_name(layer))

    def edited_weights(self, layer: int) -> dict[str, torch.Tensor]:
        """Path of each edited module of a layer -> its `weight`: one, and that of shared experts in the stack."""
        weights = {self.module_name(layer): self.weight(layer)}
        if (shared := self.shared_experts(layer)) is not None:
            weights[shared.path] = shared.weight
        return weights

    def edited_matrix(self, layer: int) -> torch.Tensor:
        """The edited matrix [out, in], whole; of stacked experts [W_1 ... W_E] [h, E m], and shared ones, a copy."""
        weight = self.weight(layer)
        if weight.ndim == 2:
            return whole(weight)
        matrix, shared = weight.transpose(0, 1).flatten(1), self.shared_experts(layer)
        return matrix if shared is None else torch.cat([matrix, shared.weight.to(matrix)], 1)

    def edited_shape(self, layer: int) -> tuple[int, int]:
        """Rows and columns [out, in] of the edited matrix, also where it is quantized; [h, E m] of stacked experts.

        Shared experts in the stack add their m_s columns.
        """
        if (stack := self.experts(layer)) is not None:
            return stack.outputs, stack.size
        module = self.edited_module(layer)
        if scheme_of(module):
            return module.out_features, module.in_features
        out, size = self.weight(layer).shape
        return out, size

    def weight(self, layer: int) -> torch.Tensor:
        """The edited weight as [out, in], a view on the model's memory whatever the stored orientation.

        Of experts it is [E, h, m]; `edited_shape` is the shape of the matrix in any layer.

        Of one that accelerate offloads to the host, it is the view on the memory there.
        Of a tensor-parallel model it is a DTensor, with the shape of the whole matrix (`models.sharded`).

        Raises:
            UnsupportedModelError: it is quantized.
        """
        weight = self.stored_weight(layer)
        if weight.device.type == "meta" and (held := on_host(self.model, self.weight_name(layer))) is not None:
            weight = held
        return self.oriented(layer, weight)

    def stored_weight(self, layer: int) -> torch.Tensor:
        """The edited weight as the module has it: perhaps transposed, and without values where it is offloaded.

        Raises:
            UnsupportedModelError: it is quantized.
        """
        module = self.edited_module(layer)
        if self.experts(layer) is not None:
            return module.down_proj.detach()
        if scheme_of(module):
            check_weight(self.weight_name(layer), module)
        return module.weight.detach()

    def oriented(self, layer: int, stored: torch.Tensor) -> torch.Tensor:
        """A weight stored as that of `layer` is, seen as [out, in] or [E, h, m]; and the other way round."""
        stack = self.experts(layer)
        return stored.mT if (self.spec.transposed if stack is None else stack.module.is_transposed) else stored

    def linear(self, path: str) -> tuple[Any, torch.Tensor]:
        """Any linear module by its path, and its weight as [out, in], a view on the model's memory.

        Raises:
            InvalidArgumentError: no such module, or not a linear one.
        """
        module, (weight, _) = linear_module(self.model, path), linear_weight(self.model, path)
        if module is self.model.get_output_embeddings():
            raise InvalidArgumentError(f"{path!r} is the model's head: edit a module inside its blocks")
        return module, weight

    def nearest_editable(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The nearest layers that can be edited, sorted and without repetition: for layers that are a guess."""
        nearest = {min(self.editable, key=lambda other, layer=layer: abs(other - layer)) for layer in layers}
        return tuple(sorted(nearest))

    def check_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """Sorted layers without repetition; raises InvalidArgumentError when one is out of range."""
        if not layers:
            raise InvalidArgumentError("no layers given")
        for layer in layers:
            if not 0 <= layer < self.num_layers:
                raise InvalidArgumentError(
                    f"layer {layer} is out of range: the model has layers 0-{self.num_layers - 1}"
                )
            if layer in self._not_editable:
                raise InvalidArgumentError(
                    f"layer {layer} cannot be edited: it has no {self.spec.edit}. Layers that have one: "
                    f"{comma_list(self.editable)}"
                )
        return tuple(sorted(set(layers)))


def _is_sharded(view: ModelView) -> bool:
    return is_sharded(view.model)


def view_without_memory(model: Any, spec: ArchSpec | None = None) -> ModelView:
    """A view of a model whose passes compute what its weights say.

    Args:
        model: a causal language model, or a ModelView of it, which is returned.
        spec: its module names, see `ModelView`.

    Raises:
        UnsupportedModelError: a memory is attached to it, and not suspended; or see `ModelView`.
    """
    view = model if isinstance(model, ModelView) else ModelView(model, spec)
    require_no_memory(view.model)
    return view
