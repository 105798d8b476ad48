"""Everything that this package does to somebody's model for a pass, and undoes after it.

No other file replaces forward functions, registers hooks or touches attention functions; a test of the source says so.
Each context manager restores exactly what it changed, in the reverse order, also when the pass fails or is interrupted.
What a caller, accelerate or another library has put there stays. There is no state outside of the model: `patches_on`
answers from the model alone what is in it right now.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

Forward = Callable[..., Any]
_CHECK_FOR_PADDING = "warn_if_padding_and_no_attention_mask"  # a method of transformers' models
_ATTENTION_PREFIX = "kedit_fast_"  # of the names that attention functions are registered under


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[torch.nn.Module, Forward]) -> Iterator[None]:
    """Modules run other forward functions inside the block."""
    before = {module: vars(module).get("forward") for module in forwards}  # accelerate puts one on the instance
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is not None:
                module.forward = forward
            else:
                vars(module).pop("forward", None)  # the class's own method shows again


def has_replaced_forward(module: torch.nn.Module) -> bool:
    """Whether somebody, this package included, has given this module a forward function of its own."""
    return "forward" in vars(module)


class SurroundedForward:
    """A module's forward function inside a call of another one; it stays in the module until it is removed.

    `around(forward, args, kwargs)` is called for each call of the module, with the forward function that it had, and
    returns the result. Code that torch.compile made of the module notices, unlike of a hook. Copies of the module have
    the forward function of their class.
    """

    def __init__(self, module: torch.nn.Module, around: Callable[[Forward, tuple, dict], Any]):
        self.module, self.around = module, around
        self.__wrapped__: Forward = module.forward  # by this name, inspect.signature reads it
        self._before = vars(module).get("forward")
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward function returns, or what `around` makes of it."""
        return self.around(self.__wrapped__, args, kwargs)

    def __deepcopy__(self, memo: dict) -> Forward:
        copied = memo.get(id(self.module), self.module)
        return functools.partial(type(copied).forward, copied)

    def __reduce__(self) -> tuple:
        return functools.partial, (type(self.module).forward, self.module)

    def remove(self) -> None:
        """Give the module its forward function back; one that somebody has put around this one stays, and calls it."""
        if vars(self.module).get("forward") is not self:
            self.around = _straight
        elif self._before is not None:
            self.module.forward = self._before
        else:
            del self.module.forward  # the class's own method shows again


def _straight(forward: Forward, args: tuple, kwargs: dict) -> Any:
    return forward(*args, **kwargs)


@contextlib.contextmanager
def output_hooks(hooks: Iterable[tuple[torch.nn.Module, Callable[[torch.nn.Module, tuple, Any], Any]]]) -> Iterator:
    """Inside the block, `hook(module, args, output)` is called after each call of its module.

    What it returns takes the place of the output, unless it is None.
    """
    with contextlib.ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextlib.contextmanager
def input_hooks(hooks: Iterable[tuple[torch.nn.Module, Callable[[torch.nn.Module, tuple, dict], Any]]]) -> Iterator:
    """Inside the block, `hook(module, args, kwargs)` is called before each call of its module.

    What it returns, (args, kwargs), takes their place, unless it is None.
    """
    with contextlib.ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextlib.contextmanager
def surrounded_calls(
    modules: Collection[torch.nn.Module],
    before: Callable[[torch.nn.Module, tuple, dict], tuple[tuple, dict] | None],
    after: Callable[[torch.nn.Module], None],
) -> Iterator[None]:
    """Inside the block, `before` runs ahead of each call of the modules and of their other hooks, `after` after it.

    `before` may return other arguments, (args, kwargs). `after` is also called when the call fails, and once more for
    each module when the block ends, since an interrupt may have skipped it.
    """

    def behind(module: torch.nn.Module, args: tuple = (), output: Any = None) -> None:
        after(module)

    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [after(module) for module in modules])
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(behind, always_call=True).remove)
        yield


class Slot(NamedTuple):
    """A place in a module, with the module's own value of it, for which another may stand in temporarily."""

    store: dict[str, Any]
    name: str
    original: Any
    is_parameter: bool = False

    @property
    def is_original(self) -> bool:
        """Whether nothing stands in at present."""
        return self.store[self.name] is self.original

    def put(self, value: Any) -> None:
        """Let a value stand in; a tensor for a parameter becomes one that needs no gradient."""
        self.store[self.name] = torch.nn.Parameter(value, requires_grad=False) if self.is_parameter else value

    def restore(self) -> None:
        """Undo `put`."""
        self.store[self.name] = self.original


def tensor_slots(module: torch.nn.Module, dtypes: Collection[torch.dtype]) -> list[Slot]:
    """The places of a module's parameters and buffers of some dtypes, without those of modules inside it."""
    return [
        Slot(store, name, tensor, store is module._parameters)
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None and tensor.dtype in dtypes
    ]


def attribute_slot(module: torch.nn.Module, name: str) -> Slot:
    """The place of a plain attribute of a module."""
    return Slot(vars(module), name, vars(module)[name])


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation mode, and its parameters collect no gradients."""
    training = [module for module in model.modules() if module.training]
    required = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    try:
        model.eval()
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in required:
            parameter.requires_grad_(True)


def _attention_registries() -> tuple[Any, ...]:
    """transformers' registries of attention functions and of masks; none of versions before 4.53."""
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError:
        return ()
    return ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS


def takes_attention_functions(base: torch.nn.Module, config: Any) -> bool:
    """Whether a decoder takes its attention from transformers' registry, and plain attention is what it takes now."""
    return (
        bool(_attention_registries())
        and getattr(base, "_supports_attention_backend", False)
        and getattr(config, "_attn_implementation", None) in ("eager", "sdpa")
    )


def attention_name(config: Any) -> str | None:
    """The attention that a configuration has chosen, by its name in transformers; None where it says nothing."""
    return getattr(config, "_attn_implementation", None)


@contextlib.contextmanager
def replaced_attention(base: torch.nn.Module, attention: Callable[..., Any]) -> Iterator[None]:
    """Inside the block a decoder that `takes_attention_functions` computes attention by `attention`, without masks.

    The name that the function is registered under is unique to the block and is removed with it. GPT-2 checks its
    input for padding where it gets no mask, which waits for the device in every pass; the check is switched off.
    """
    configured: list[Any] = [module for module in base.modules() if hasattr(module, "config")]
    configs = {id(module.config): module.config for module in configured}
    name = f"{_ATTENTION_PREFIX}{id(configs)}"
    with contextlib.ExitStack() as stack:
        for registry, function in zip(_attention_registries(), (attention, _nothing), strict=True):
            registry[name] = function
            stack.callback(registry.pop, name)
        for config in configs.values():
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = name
        stack.enter_context(_without_padding_check(base))
        yield


@contextlib.contextmanager
def _without_padding_check(base: torch.nn.Module) -> Iterator[None]:
    before = vars(base).get(_CHECK_FOR_PADDING)
    try:
        setattr(base, _CHECK_FOR_PADDING, _nothing)
        yield
    finally:
        vars(base).pop(_CHECK_FOR_PADDING, None)  # the class's own method shows again
        if before is not None:
            setattr(base, _CHECK_FOR_PADDING, before)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Replaces functions whose result and effect are not wanted."""


class _Attachment:
    """An object that stays with one model: it is not copied with the model, and not pickled."""

    def __init__(self, value: Any = None):
        self.value = value

    def __deepcopy__(self, memo: Any) -> _Attachment:
        return _Attachment()

    def __reduce__(self) -> tuple:
        return _Attachment, ()


def attach(model: torch.nn.Module, name: str, value: Any) -> None:
    """Let an object stay with a model, until the model goes or another object is attached by the same name.

    It is no submodule and no part of the state dict; copies of the model have none.
    """
    vars(model)[name] = _Attachment(value)


def attached(model: torch.nn.Module, name: str) -> Any:
    """The object that `attach` left with a model, or None."""
    attachment = vars(model).get(name)
    return attachment.value if isinstance(attachment, _Attachment) else None


def detach(model: torch.nn.Module, name: str) -> None:
    """Undo `attach`; nothing happens where nothing is attached."""
    vars(model).pop(name, None)


def patches_on(model: torch.nn.Module) -> list[str]:
    """What this package has in a model right now, as "path of the module: what is there".

    That is: forward functions, hooks, attention functions, and objects that stay with the model (`attach`). Outside of
    passes only the last are left.
    """
    patches = []
    for path, module in model.named_modules():
        functions = [("forward function", vars(module).get("forward"))]
        functions += [("hook on inputs", hook) for hook in module._forward_pre_hooks.values()]
        functions += [("hook on outputs", hook) for hook in module._forward_hooks.values()]
        kinds = [kind for kind, function in functions if _is_ours(function)]
        if str(getattr(getattr(module, "config", None), "_attn_implementation", "")).startswith(_ATTENTION_PREFIX):
            kinds.append("attention function")
        kinds += [name for name, value in vars(module).items() if isinstance(value, _Attachment) and value.value]
        patches += [f"{path or type(module).__name__}: {kind}" for kind in kinds]
    return patches


def _is_ours(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("kedit_fast.")
