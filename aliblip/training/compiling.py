"""`--compile`: the layers of the towers through torch.compile, in place, so that no name in a checkpoint changes.

    compiled = CompiledTowers(model, momentum.encoders)
    ...train...
    print(compiled.told())

The layers of a tower share their graphs, so few are compiled however deep it is. Those of the ViT are compiled for the
one shape that they see in training, those of the BERT for pairs and lengths of any number. An evaluation runs without:
it has other shapes, and its results shall not depend on the flag.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.fx.experimental._config
from torch import nn

from aliblip.runtime.mistakes import usage_errors
from modeling_aliblip import DropPath

# Text layers with and without photos, for all tokens or the first, with and without gradient: times a few in reserve.
GRAPHS_PER_FUNCTION = 64


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2.0 * x


def check_compiler(device: torch.device, backend: Callable | str = "inductor") -> None:
    """Compile a line, to see that it can be done.

    Raises:
        UsageError: nothing can be compiled here, as without a C++ compiler, or on a GPU without Triton.
    """
    with usage_errors(RuntimeError, told="--compile can't be used here ({}): install what is missing, or leave it out"):
        torch.compile(_double, backend=backend)(torch.zeros(2, device=device))


class CompiledTowers:
    """Towers whose layers are compiled when they are first called.

    Args:
        models: each with `vision_model` and `text_encoder`; changed in place. Copies have to be made before.

    Raises:
        UsageError: nothing can be compiled here, as without a C++ compiler, or on a GPU without Triton.
    """

    backend = "inductor"

    def __init__(self, *models: nn.Module):
        self.graphs, self.seconds = 0, 0.0
        self._backend = torch._dynamo.lookup_backend(self.backend)
        check_compiler(next(models[0].parameters()).device, self._backend)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS_PER_FUNCTION)
        # As many pairs as a title has tokens is chance, and no case of its own.
        torch.fx.experimental._config.use_duck_shape = False
        # Each layer has a rate of its own, and would have a graph of its own.
        DropPath.dropped = torch.compiler.disable(DropPath.dropped)
        for model in models:
            for layer in model.vision_model.encoder.layers:
                layer.compile(backend=self._compile, dynamic=False)
            for layer in model.text_encoder.encoder.layer:
                layer.compile(backend=self._compile, dynamic=True)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list):
        start = time.perf_counter()
        compiled = self._backend(graph, inputs)
        self.seconds += time.perf_counter() - start
        self.graphs += 1
        return compiled

    def paused(self) -> AbstractContextManager:
        """Inside, everything runs as if nothing were compiled."""
        return torch.compiler.set_stance("force_eager")

    def told(self) -> str:
        """One line on how much was compiled."""
        return f"compiled {self.graphs} graphs of the towers' layers in {self.seconds:.0f} s"


__all__ = ["CompiledTowers", "check_compiler"]
