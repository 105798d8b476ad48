"""Edge scores by their definition: every head reads a copy of the residual stream, and autograd gives its slope.

Nothing here uses the package: weights are cut by hand for each family, and gradients are those of the copies.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch

WHOLE = ("gemma2", "gemma3_text", "olmo2")


def layout(model, kind):
    """Per layer: norms, attention, MLP, projections with the rows of q, k, v, and the output matrix [d, H, e]."""
    config = model.config
    heads, d = config.num_attention_heads, config.hidden_size
    e = getattr(config, "head_dim", None) or d // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    blocks = {"gpt2": "transformer.h", "gptj": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(kind, "model.layers")
    layers = []
    for block in model.get_submodule(blocks):
        if kind == "gpt2":
            norm, mlp_norm, attention = block.ln_1, block.ln_2, block.attn
            rows = attention.c_attn.weight.T.reshape(3, heads, e, d)
            biases = attention.c_attn.bias.reshape(3, heads, e)
            fused, out = attention.c_attn, attention.c_proj.weight.T
            separate = None
        elif kind == "gpt_neox":
            norm, mlp_norm, attention = block.input_layernorm, block.post_attention_layernorm, block.attention
            rows = attention.query_key_value.weight.reshape(heads, 3, e, d).transpose(0, 1)
            biases = attention.query_key_value.bias.reshape(heads, 3, e).transpose(0, 1)
            fused, out, separate = attention.query_key_value, attention.dense.weight, None
        elif kind == "gptj":
            norm, mlp_norm, attention = block.ln_1, None, block.attn
            separate = (attention.q_proj, attention.k_proj, attention.v_proj)
            rows, biases = [m.weight.reshape(heads, e, d) for m in separate], [None] * 3
            fused, out = None, attention.out_proj.weight
        elif kind == "phi3":
            norm, mlp_norm, attention = block.input_layernorm, block.post_attention_layernorm, block.self_attn
            cut = [heads * e, groups * e, groups * e]
            rows = [part.reshape(-1, e, d) for part in attention.qkv_proj.weight.split(cut)]
            biases, fused, out, separate = [None] * 3, attention.qkv_proj, attention.o_proj.weight, None
        elif kind in WHOLE:
            layers.append(SimpleNamespace(block=block, mlp=block.mlp, attention=block.self_attn))
            continue
        else:
            norm, mlp_norm, attention = block.input_layernorm, block.post_attention_layernorm, block.self_attn
            separate = (attention.q_proj, attention.k_proj, attention.v_proj)
            rows = [m.weight.reshape(-1, e, d) for m in separate]
            biases = [None if m.bias is None else m.bias.reshape(-1, e) for m in separate]
            fused, out = None, attention.o_proj.weight
        output = next(getattr(attention, n) for n in ("o_proj", "out_proj", "c_proj", "dense") if hasattr(attention, n))
        layers.append(
            SimpleNamespace(
                block=block, norm=norm, mlp_norm=mlp_norm, attention=attention, mlp=block.mlp, rows=rows, biases=biases,
                fused=fused, separate=separate, out=out.reshape(d, heads, e), output=output, groups=groups,
            )
        )  # fmt: skip
    names = {"gpt2": "transformer.ln_f", "gptj": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}
    last = model.get_submodule(names.get(kind, "model.norm"))
    return SimpleNamespace(layers=layers, heads=heads, e=e, last=last, kind=kind)


class Run:
    """One pass of one prompt with copies for every target; what sources put out and what targets read."""

    def __init__(self, model, kind, ids, entering=None):
        self.parts, self.model = layout(model, kind), model
        self.sources, self.targets, self.entering = [], [], entering
        with contextlib.ExitStack() as stack:
            self.stack = stack
            self.hook(self.parts.layers[0].block, self.enter, before=True)
            for layer in self.parts.layers:
                self.whole(layer) if kind in WHOLE else self.split(layer)
            self.hook(self.parts.last, self.target, before=True)
            self.logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]

    def hook(self, module, function, before=False):
        def pre(_, args, kwargs):
            if args:
                return (function(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": function(kwargs["hidden_states"])}

        def post(_, args, output):
            function(output[0] if isinstance(output, tuple) else output)

        if before:
            self.stack.callback(module.register_forward_pre_hook(pre, with_kwargs=True).remove)
        else:
            self.stack.callback(module.register_forward_hook(post).remove)

    def enter(self, x):
        x = x if self.entering is None else self.entering.clone().requires_grad_()
        self.sources.append(x)
        return x

    def target(self, x):
        copy = x.clone()
        self.targets.append(copy)
        return copy

    def whole(self, layer):
        before = getattr(layer.block, "input_layernorm", None) or layer.attention
        self.hook(before, self.target, before=True)
        self.hook(layer.block.post_attention_layernorm, self.sources.append)
        self.hook(getattr(layer.block, "pre_feedforward_layernorm", None) or layer.mlp, self.target, before=True)
        self.hook(layer.block.post_feedforward_layernorm, self.sources.append)

    def split(self, layer):
        heads, made = self.parts.heads, {}
        for name, value in (("num_key_value_groups", 1), ("num_key_value_heads", heads)):
            if name in vars(layer.attention):
                self.stack.callback(setattr, layer.attention, name, getattr(layer.attention, name))
                setattr(layer.attention, name, value)

        def read(x):
            for place in range(3):
                outputs = []
                for head in range(heads):
                    group = head * len(layer.rows[place]) // heads
                    y = layer.norm.forward(self.target(x)) @ layer.rows[place][group].T
                    outputs.append(y if layer.biases[place] is None else y + layer.biases[place][group])
                made[place] = outputs
            made["x"] = x
            return x

        def given(place):
            return lambda *_: torch.cat(made[place], -1)

        def mixed(z):
            for head in range(heads):
                self.sources.append(z[..., head * self.parts.e : (head + 1) * self.parts.e] @ layer.out[:, head].T)
            return z

        self.hook(layer.norm, read, before=True)
        if layer.fused is None:
            for place, module in enumerate(layer.separate):
                self.stack.callback(module.register_forward_hook(given(place)).remove)
        else:
            order = [(h, p) for h in range(heads) for p in range(3)]
            if self.parts.kind != "gpt_neox":
                order.sort(key=lambda pair: pair[1])
            fuse = lambda *_: torch.cat([made[place][head] for head, place in order], -1)  # noqa: E731
            self.stack.callback(layer.fused.register_forward_hook(fuse).remove)
        self.hook(layer.output, mixed, before=True)
        if layer.mlp_norm is None:
            self.hook(layer.mlp, lambda _: layer.norm.forward(self.target(made["x"])), before=True)
        else:
            self.hook(layer.mlp_norm, self.target, before=True)
        self.hook(layer.mlp, self.sources.append)


def dense_scores(model, kind, pair, points, loss):
    """[F, V] of one pair, all pairs of nodes: D of every source times the mean slope of every target.

    `loss` takes logits and those of the clean prompt.
    """
    with torch.no_grad():
        clean, corrupted = Run(model, kind, pair.clean), Run(model, kind, pair.corrupted)
    changes = torch.stack([b - a for a, b in zip(clean.sources, corrupted.sources, strict=True)])
    total = 0
    for point in points:
        entering = corrupted.sources[0] + point * (clean.sources[0] - corrupted.sources[0])
        run = Run(model, kind, pair.clean, entering)
        slopes = torch.autograd.grad(loss(run.logits, clean.logits), run.targets)
        total = total + torch.stack(slopes) / len(points)
    return changes.flatten(1) @ total.flatten(1).T
