"""From the path of an edited module to the name of its weight in the state dict, and back.

A linear layer's weight is its path and ".weight". The stacked weight of experts is a parameter of the experts module,
`model.layers.4.mlp.experts.down_proj`: there the path and the name are the same string.
"""

from __future__ import annotations

EXPERTS_WEIGHT = "down_proj"
_SUFFIX = ".weight"


def has_experts_name(path: str) -> bool:
    """Whether a path is that of experts which a router chooses, by its last part, as `mlp.experts` in a block.

    Shared experts (`mlp.shared_experts`) are an MLP of linear layers.
    """
    name = path.rpartition(".")[2]
    return name.endswith("experts") and not name.startswith("shared")


def is_experts_path(path: str) -> bool:
    """Whether a path is that of the stacked weight of experts, `mlp.experts.down_proj` in a block.

    Example:
        >>> is_experts_path("mlp.experts.down_proj"), is_experts_path("mlp.shared_experts.down_proj")
        (True, False)
    """
    parent, _, name = path.rpartition(".")
    return name == EXPERTS_WEIGHT and has_experts_name(parent)


def weight_name_of(path: str) -> str:
    """The name in the state dict of the weight that an edited module's path stands for.

    Example:
        >>> weight_name_of("model.layers.4.mlp.down_proj")
        'model.layers.4.mlp.down_proj.weight'
        >>> weight_name_of("model.layers.4.mlp.experts.down_proj")
        'model.layers.4.mlp.experts.down_proj'
    """
    return path if is_experts_path(path) else f"{path}{_SUFFIX}"


def module_path_of(weight_name: str) -> str:
    """The path of the edited module that a weight's name in the state dict stands for: the inverse of `weight_name_of`.

    Example:
        >>> module_path_of("model.layers.4.mlp.down_proj.weight")
        'model.layers.4.mlp.down_proj'
        >>> module_path_of("model.layers.4.mlp.experts.down_proj")
        'model.layers.4.mlp.experts.down_proj'
    """
    return weight_name.removesuffix(_SUFFIX)
