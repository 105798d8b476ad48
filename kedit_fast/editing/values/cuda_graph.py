"""An iteration of the value loop as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kedit_fast.models.view import ModelView

WARM_UP = 2  # iterations before a graph is recorded: libraries choose their kernels in them


class GraphedStep:
    """A step that is run as it is at first, and replayed as a CUDA graph afterwards.

    Args:
        step: reads its state from tensors and writes it into the same ones, without waiting for the device.
    """

    def __init__(self, step: Callable[[], None]):
        self.step = step
        self.runs = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None  # of all warm-ups: each stream would hold memory of its own

    def run(self) -> None:
        """Run the step once."""
        if self.graph is None and self.runs < WARM_UP:
            self._warm_up()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records the step without running it
                self.step()
        self.graph.replay()

    def _warm_up(self) -> None:
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.runs += 1


def graph_obstacle(view: ModelView) -> str:
    """What a CUDA graph of a model's iterations would need that is not so, or "" when nothing is missing."""
    devices = sorted({str(parameter.device) for parameter in view.model.parameters()})
    if len(devices) > 1:  # a graph's memory is on one device
        return f"the whole model on one CUDA device; it is on {', '.join(devices)}"
    if hooked := [name for name, module in view.model.named_modules() if hasattr(module, "_hf_hook")]:
        return (
            f"a model that is not dispatched by accelerate, which moves tensors between devices ({hooked[0] or 'it'})"
        )
    if view.is_sharded:
        return "a model that is whole in one process; this one is tensor-parallel"
    if view.head.device.type != "cuda":
        return f"a CUDA device; the model is on {view.head.device}"
    rope = getattr(view.config, "rope_parameters", None) or getattr(view.config, "rope_scaling", None) or {}
    if (rope.get("rope_type") or rope.get("type")) == "dynamic":
        return "a model whose rotary embedding does not look at every pass's length (its rope type is dynamic)"
    return ""
