"""What is done to somebody's model is done by one file, and undone."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from tiny_models import make_model

import kedit_fast
from kedit_fast.models import patching
from kedit_fast.models.forward import Site, evaluating, last_states, pad, visit
from kedit_fast.models.view import ModelView

ROOT = Path(kedit_fast.__file__).parent
TOUCHES = {
    "_attn_implementation",
    "AttentionInterface",
    "AttentionMaskInterface",
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
}


def touches(source: str) -> list[str]:
    """What a source does to modules of others: hooks, forward functions, attention functions, their attributes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
            if isinstance(node.ctx, ast.Store) and node.attr == "forward":
                found.append(f"{node.lineno}: {ast.unparse(node)} is set")
        elif isinstance(node, ast.Name):
            names.append(node.id)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.Call):
            names += [part.value for part in node.args if isinstance(part, ast.Constant)]
            called, first = ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else ""
            if called == "object.__setattr__" and first != "self":
                found.append(f"{node.lineno}: {called}({first})")
            if called == "setattr" and "'forward'" in map(ast.unparse, node.args):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else ""
            if owner in ("_parameters", "_buffers", "_modules"):
                found.append(f"{node.lineno}: {ast.unparse(node)} is set")
        found += [
            f"{node.lineno}: {name}"
            for name in names
            if name in TOUCHES or (str(name).startswith("register_") and str(name).endswith(("hook", "_module")))
        ]
    return found


@pytest.mark.parametrize("path", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")))
def test_one_file_alone_touches_modules(path):
    if path == "models/patching.py":
        assert touches((ROOT / path).read_text(encoding="utf-8"))
    else:
        assert not touches((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "block.register_forward_hook(see)",
        "block.register_forward_pre_hook(see, with_kwargs=True)",
        "block.register_full_backward_hook(see)",
        "torch.nn.modules.module.register_module_forward_hook(see)",
        "hidden.register_hook(see)",
        "block.forward = other",
        "setattr(block, 'forward', other)",
        "config._attn_implementation = 'eager'",
        "getattr(config, '_attn_implementation', None)",
        "from transformers import AttentionInterface",
        "modeling_utils.ALL_ATTENTION_FUNCTIONS['mine'] = attention",
        "object.__setattr__(model, 'run', run)",
        "block._parameters['weight'] = copy",
    ],
)
def test_a_touch_is_noticed(source):
    assert touches(source)


def test_a_frozen_class_may_set_its_fields():
    assert not touches("object.__setattr__(self, 'subject', None)")


class Interrupted(BaseException):
    pass


@pytest.fixture
def model():
    return make_model("llama").train()


def state(model: torch.nn.Module) -> dict:
    """Everything of a model that a pass may have touched."""
    return {
        path: (
            {
                name: value
                for name, value in vars(module).items()
                if name not in ("_parameters", "_buffers", "_modules")
            },
            {name: id(value) for name, value in {**module._parameters, **module._buffers}.items()},
            [parameter.requires_grad for parameter in module.parameters(recurse=False)],
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for path, module in model.named_modules()
    }


def interrupted(context) -> list[str]:
    """The patches that are on a model in a context that ends with an interrupt."""
    manager, model = context
    inside: list[str] = []
    with pytest.raises(Interrupted), manager:
        inside += patching.patches_on(model)
        raise Interrupted
    return inside


def attention(module, query, key, value, attention_mask, **kwargs):
    return torch.zeros_like(query).transpose(1, 2), None


def ours(function):
    """A function that counts as the package's."""
    function.__module__ = "kedit_fast.somewhere"
    return function


@pytest.mark.parametrize(
    ("kind", "manager"),
    [
        ("forward function", lambda m: patching.replaced_forwards({m.model.norm: ours(lambda x: x)})),
        ("hook on outputs", lambda m: patching.output_hooks([(m.model.norm, ours(lambda *_: None))])),
        ("hook on inputs", lambda m: patching.input_hooks([(m.model.norm, ours(lambda *_: None))])),
        ("hook on inputs", lambda m: patching.surrounded_calls([m.model.norm], ours(lambda *_: None), lambda _: None)),
        ("attention function", lambda m: patching.replaced_attention(m.model, attention)),
        (None, lambda m: patching.evaluation_mode(m)),
    ],
)
def test_an_interrupt_leaves_nothing_in_the_model(model, kind, manager):
    if kind == "attention function" and not patching.takes_attention_functions(model.model, model.config):
        pytest.skip("this transformers has no registry of masks")
    before = state(model)
    inside = interrupted((manager(model), model))
    assert state(model) == before and patching.patches_on(model) == []
    assert kind is None or any(line.endswith(kind) for line in inside)


def test_the_attention_function_is_used_and_its_name_is_free_again(model):
    if not patching.takes_attention_functions(model.model, model.config):
        pytest.skip("this transformers has no registry of masks")
    registries = patching._attention_registries()
    before = [set(registry) for registry in registries]
    ids = torch.tensor([[1, 2, 3]])
    with patching.evaluation_mode(model), torch.no_grad():
        plain = model.model(ids).last_hidden_state
        with patching.replaced_attention(model.model, attention):
            assert not torch.equal(model.model(ids).last_hidden_state, plain)
        assert torch.equal(model.model(ids).last_hidden_state, plain)
    assert [set(registry) for registry in registries] == before


def test_a_pass_has_its_patches_in_the_model_and_takes_them_out(model, monkeypatch):
    monkeypatch.setenv("KEDIT_FAST_16BIT", "float32")
    model = model.bfloat16()
    before, view, inside = state(model), ModelView(model), []
    batch = pad([[1, 2, 3]], view.device)
    with evaluating(view):
        visit(view, batch, [Site(1, "key")], lambda site, states: inside.extend(patching.patches_on(model)))
        last_states(view, batch)
    assert {"hook on inputs", "hook on outputs"} <= {line.split(": ")[1] for line in inside}
    assert state(model) == before and not patching.patches_on(model)


def test_a_forward_function_of_the_callers_stays(model):
    function = model.model.norm.forward
    model.model.norm.forward = function
    with patching.replaced_forwards({model.model.norm: lambda x: x}):
        assert model.model.norm.forward is not function
    assert vars(model.model.norm)["forward"] is function


def test_a_slot_holds_a_stand_in_for_a_time():
    module = torch.nn.Linear(2, 2).bfloat16()
    weight = module.weight
    slot, _bias = patching.tensor_slots(module, {torch.bfloat16})
    slot.put(weight.detach().float())
    assert module.weight.dtype == torch.float32 and not module.weight.requires_grad and not slot.is_original
    slot.restore()
    assert module.weight is weight and slot.is_original


def test_what_is_attached_stays_with_the_model_alone(model):
    patching.attach(model, "_a_run", "run")
    assert patching.attached(model, "_a_run") == "run"
    assert patching.attached(copy.deepcopy(model), "_a_run") is None
    assert patching.patches_on(model) == ["LlamaForCausalLM: _a_run"]
