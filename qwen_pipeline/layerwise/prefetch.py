"""Prefetching of tensors from disk to a device, before they are requested, within a memory budget.

A few threads read blocks into buffers that are reused, page-locked for a GPU, and copy each block on a separate CUDA
stream: disk, bus and arithmetic work at the same time, and the host holds at most two blocks per thread. Tensors are
started in the order in which they are requested, regardless of the layer or model they belong to.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qwen_pipeline.checkpoint.buffers import BufferPool, recycling
from qwen_pipeline.checkpoint.digest import Block, blocks_of
from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.layerwise.weights import READERS


@dataclass(slots=True)
class _PendingTensor:
    """A tensor that is being read.

    Attributes:
        memory: All of its bytes, uint8 on the device.
        missing: Blocks whose copy has not been issued yet.
    """

    spec: TensorSpec
    memory: Tensor
    missing: int


class Prefetcher(Iterator[Tensor]):
    """Iterator over tensors on a device, in the order given; a context manager that ends its threads.

    A yielded tensor is not shared: the caller may keep and modify it, on the CUDA stream that is current when it is
    yielded.

    Args:
        tensors: The tensors to yield, in this order.
        device: Destination of the tensors.
        budget: Bytes of tensors that may be on the device before they are requested. A larger tensor is started once
            it is requested and no other is pending.

    Raises:
        CheckpointRefused: Raised by ``next``: a file ends before the bytes that its header declares.
    """

    def __init__(self, tensors: Sequence[LazyTensor], device: torch.device, *, budget: int) -> None:
        self._device, self._budget, self._left = device, budget, len(tensors)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._blocks, self._blocks_lock = self._iter_blocks(tensors), threading.Lock()
        self._changed = threading.Condition()
        self._pending: deque[_PendingTensor] = deque()
        self._held, self._requested, self._closed = 0, False, False
        self._error: BaseException | None = None
        self._readers = [threading.Thread(target=self._run_reader, daemon=True) for _ in range(READERS)]

    def __enter__(self) -> "Prefetcher":
        for reader in self._readers if self._left else ():
            reader.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for reader in self._readers:
            if reader.ident:
                reader.join()

    def __next__(self) -> Tensor:
        if not self._left:
            raise StopIteration
        with self._changed:
            self._requested = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error or (self._pending and not self._pending[0].missing))
            if self._error:
                raise self._error
            pending = self._pending.popleft()
            self._requested, self._left, self._held = False, self._left - 1, self._held - pending.spec.nbytes
            self._changed.notify_all()
        if self._stream:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            pending.memory.record_stream(computing)
        return pending.memory.view(pending.spec.torch_dtype).view(pending.spec.shape)

    def _iter_blocks(self, tensors: Sequence[LazyTensor]) -> Iterator[tuple[_PendingTensor, Block]]:
        """Yield the blocks of each tensor once it fits into the budget; stop early when the prefetcher is closed."""
        for tensor in tensors:
            if not self._reserve(tensor.spec.nbytes):
                return
            blocks = list(blocks_of(tensor))
            memory = torch.empty(tensor.spec.nbytes, dtype=torch.uint8, device=self._device)
            pending = _PendingTensor(tensor.spec, memory, missing=len(blocks))
            with self._changed:
                self._pending.append(pending)
            del memory
            for block in blocks:
                yield pending, block
            del pending

    def _reserve(self, nbytes: int) -> bool:
        """Wait until ``nbytes`` fit into the budget, and reserve them; return False if the prefetcher was closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_over or self._held + nbytes <= self._budget or (self._requested and not self._held)
            )
            self._held += nbytes
            return not self._is_over

    @property
    def _is_over(self) -> bool:
        return self._closed or self._error is not None

    def _run_reader(self) -> None:
        """Read the next block that no other thread has taken, until there are none."""
        copying: deque[tuple[Any, Tensor]] = deque()
        stream = torch.cuda.stream(self._stream) if self._stream else nullcontext()
        try:
            with recycling(BufferPool(page_locked=self._stream is not None)), stream:
                while block := self._next_block():
                    self._copy(*block, copying)
                    del block
                    self._wait_for_copies(copying, at_most=1)
                self._wait_for_copies(copying, at_most=0)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _next_block(self) -> tuple[_PendingTensor, Block] | None:
        with self._blocks_lock:
            return None if self._is_over else next(self._blocks, None)

    def _copy(self, pending: _PendingTensor, block: Block, copying: "deque[tuple[Any, Tensor]]") -> None:
        read = self._read(block)
        pending.memory[block.start :][: read.nbytes].copy_(read.reshape(-1).view(torch.uint8), non_blocking=True)
        if self._stream:
            copying.append((self._stream.record_event(torch.cuda.Event(blocking=True)), read))
        with self._changed:
            pending.missing -= 1
            self._changed.notify_all()

    def _read(self, block: Block) -> Tensor:
        return block.load()

    def _wait_for_copies(self, copying: "deque[tuple[Any, Tensor]]", *, at_most: int) -> None:
        """Wait until at most ``at_most`` blocks are being copied; the buffers of the others can be reused."""
        while len(copying) > at_most:
            copying.popleft()[0].synchronize()
