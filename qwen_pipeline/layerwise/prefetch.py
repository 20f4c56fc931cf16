"""Tensors on their way from disk to where they are computed with, read before they are asked for, within a bound.

A few threads read blocks into memory of their own that is used again and again, page-locked for a GPU, and have each
copied on a stream beside the one that computes: disk, bus and arithmetic move at the same time, and the host has no
more than two blocks for each thread. Tensors are begun in the order in which they are taken, whichever layer or model
they belong to.
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
class _Arrival:
    """A tensor that is being read.

    Attributes:
        memory: All of its bytes, uint8 on the device.
        missing: Blocks that were not handed to the bus yet.
    """

    spec: TensorSpec
    memory: Tensor
    missing: int


class Prefetcher(Iterator[Tensor]):
    """Yields tensors on a device, in the order given; used as a context, which ends its threads.

    What was yielded is the receiver's alone, to keep and to change, on the stream that is current when it is yielded.

    Args:
        tensors: What will be asked for, in this order.
        device: Where.
        room: Bytes of tensors that may be on the device before they are asked for. One that is larger is begun when it
            is asked for and nothing else waits.

    Raises:
        CheckpointRefused: On being asked for the next one: a file ends before the bytes that its header promises.
    """

    def __init__(self, tensors: Sequence[LazyTensor], device: torch.device, *, room: int) -> None:
        self._device, self._room, self._left = device, room, len(tensors)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._blocks, self._turn = self._begun(tensors), threading.Lock()
        self._changed = threading.Condition()
        self._coming: deque[_Arrival] = deque()
        self._held, self._wanted, self._closed = 0, False, False
        self._fault: BaseException | None = None
        self._readers = [threading.Thread(target=self._serve, daemon=True) for _ in range(READERS)]

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
            self._wanted = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._fault or (self._coming and not self._coming[0].missing))
            if self._fault:
                raise self._fault
            arrival = self._coming.popleft()
            self._wanted, self._left, self._held = False, self._left - 1, self._held - arrival.spec.nbytes
            self._changed.notify_all()
        if self._stream:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            arrival.memory.record_stream(computing)
        return arrival.memory.view(arrival.spec.torch_dtype).view(arrival.spec.shape)

    def _begun(self, tensors: Sequence[LazyTensor]) -> Iterator[tuple[_Arrival, Block]]:
        """Yield the blocks of each tensor once there is room for it; end when nobody wants more."""
        for tensor in tensors:
            if not self._finds_room(tensor.spec.nbytes):
                return
            blocks = list(blocks_of(tensor))
            memory = torch.empty(tensor.spec.nbytes, dtype=torch.uint8, device=self._device)
            arrival = _Arrival(tensor.spec, memory, missing=len(blocks))
            with self._changed:
                self._coming.append(arrival)
            del memory
            for block in blocks:
                yield arrival, block
            del arrival

    def _finds_room(self, nbytes: int) -> bool:
        """Wait until so many bytes may be on the device, and take their room; False once nobody wants more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_over or self._held + nbytes <= self._room or (self._wanted and not self._held)
            )
            self._held += nbytes
            return not self._is_over

    @property
    def _is_over(self) -> bool:
        return self._closed or self._fault is not None

    def _serve(self) -> None:
        """Read blocks, whichever is next, until there are none."""
        on_the_bus: deque[tuple[Any, Tensor]] = deque()
        beside = torch.cuda.stream(self._stream) if self._stream else nullcontext()
        try:
            with recycling(BufferPool(page_locked=self._stream is not None)), beside:
                while taken := self._next_block():
                    self._bring(*taken, on_the_bus)
                    del taken
                    self._wait_for_bus(on_the_bus, at_most=1)
                self._wait_for_bus(on_the_bus, at_most=0)
        except BaseException as fault:
            with self._changed:
                self._fault = self._fault or fault
                self._changed.notify_all()

    def _next_block(self) -> tuple[_Arrival, Block] | None:
        with self._turn:
            return None if self._is_over else next(self._blocks, None)

    def _bring(self, arrival: _Arrival, block: Block, on_the_bus: "deque[tuple[Any, Tensor]]") -> None:
        read = self._read(block)
        arrival.memory[block.start :][: read.nbytes].copy_(read.reshape(-1).view(torch.uint8), non_blocking=True)
        if self._stream:
            on_the_bus.append((self._stream.record_event(torch.cuda.Event(blocking=True)), read))
        with self._changed:
            arrival.missing -= 1
            self._changed.notify_all()

    def _read(self, block: Block) -> Tensor:
        return block.load()

    def _wait_for_bus(self, on_the_bus: "deque[tuple[Any, Tensor]]", *, at_most: int) -> None:
        """Wait until only so many blocks are being copied; the memory of the others is read into again."""
        while len(on_the_bus) > at_most:
            on_the_bus.popleft()[0].synchronize()
