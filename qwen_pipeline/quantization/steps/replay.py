"""Functions whose kernels are recorded once on a GPU and then replayed.

GPTQ rounds one column at a time by kernels that take a few microseconds; it takes Python longer to launch them. A
recording launches all kernels of a block of columns at once, and gives the same bytes.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
"""A function of tensors alone, which it may change; its kernels depend on their shapes alone."""
RECORDINGS = 16
"""Recordings that are kept, each with its tensors."""


def replayed(function: Function) -> Function:
    """Return the function for tensors on a GPU; it is recorded at the first call for their shapes.

    Equal functions share recordings. What it returns is overwritten by the next call.
    """

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        return _recording(function, tuple(each.shape for each in inputs), inputs[0].device)(*inputs)

    return call


@lru_cache(RECORDINGS)
def _recording(function: Function, shapes: tuple[torch.Size, ...], device: torch.device) -> "_Recording":
    return _Recording(function, shapes, device)


class _Recording:
    """Kernels of a function for inputs of given shapes, float32.

    Other threads may use the GPU while it is recorded: they read the weights of the following layers.
    """

    def __init__(self, function: Function, shapes: tuple[torch.Size, ...], device: torch.device) -> None:
        self._inputs = [torch.ones(shape, device=device) for shape in shapes]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            function(*self._inputs)  # sets up the libraries, which must not happen during the recording
            self._graph.capture_begin(capture_error_mode="thread_local")
            self._outputs = function(*self._inputs)
            self._graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs, and change the inputs as the function does."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        for own, given in zip(self._inputs, inputs, strict=True):
            given.copy_(own)
        return self._outputs
