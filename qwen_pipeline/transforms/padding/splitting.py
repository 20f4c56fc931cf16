"""Which live channels are split, and how that is written down.

A split channel becomes two: both read what it read, and each gives half of what it gave. Spare width then buys
accuracy, as in outlier channel splitting (arXiv:1901.09504): where the channel's weight was the largest of its group,
the group gets a finer scale, and of two codes the second makes up for the rounding of the first.
"""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import ceil
from threading import Lock
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.hashing_reader import hashing_paused
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.thread_pool import SharedWork
from qwen_pipeline.qwen.channels import Channels, sized_tensors
from qwen_pipeline.qwen.geometry import PaddedSize, PadPlan
from qwen_pipeline.transforms.lora.low_rank import CELL_ROWS

if TYPE_CHECKING:
    import torch

OUTPUTS = 1024
"""Outputs that a choice looks at, at most, in cells that are spread evenly. The gains are sums over outputs."""

OUTPUTS_AT_A_TIME = 16
"""Of these, groups are compared together: what that takes beside the weights stays in a processor's cache."""


def choose_splits(checkpoint: Checkpoint, plan: PadPlan) -> PadPlan:
    """Return the plan with the channels that its ``split`` sizes split: each MLP's are chosen when first asked for.

    They are those whose halving lowers the squares of ``down_proj``'s group scales the most, summed over outputs (over
    :data:`OUTPUTS` of them where there are more): the expected rounding error of a group is in proportion. Ties go to
    the first.
    """
    sizes = [
        replace(size, splits=Choices(checkpoint, size)) if size.layout == "split" and size.zeros else size
        for size in plan.sizes
    ]
    return replace(plan, sizes=tuple(sizes))


class Choices(Mapping[str, str]):
    """MLP, expert or stack of experts -> its split channels, each chosen when first asked for."""

    def __init__(self, checkpoint: Checkpoint, size: PaddedSize) -> None:
        sized = sized_tensors(checkpoint, size.field)
        self._checkpoint = checkpoint
        self._size = size
        self._down = {owner_of(name): (name, at) for name, at in sized.items() if gives_output(name)}
        self._making: dict[str, SharedWork[torch.Tensor]] = {}
        self._made: dict[str, str] = {}
        self._lock = Lock()

    def __getitem__(self, owner: str) -> str:
        if owner not in self._made:
            name, at = self._down[owner]
            with self._lock:
                making = self._making.setdefault(owner, SharedWork(_gains(self._checkpoint, name, at, self._size)))
            with hashing_paused():
                self._made[owner] = self._choice(making.results(), is_stack=_is_stack(self._checkpoint, name))
            self._making.pop(owner, None)
        return self._made[owner]

    def __iter__(self) -> Iterator[str]:
        return iter(self._down)

    def __len__(self) -> int:
        return len(self._down)

    def _choice(self, gains: "Sequence[torch.Tensor]", *, is_stack: bool) -> str:
        import torch

        gains_EI = torch.stack(list(gains)) if is_stack else torch.stack(list(gains)).sum(dim=0, keepdim=True)
        return _encoded(_largest(gains_EI, self._size.padded % self._size.live))


def split_map(size: PaddedSize, owner: str) -> "torch.Tensor":
    """Return the map of an MLP's channels, int64 [P], or [E, P] for a stack of experts; parts are neighbours."""
    return _map_of(size.splits[owner], size.live, size.padded)


def owner_of(name: str) -> str:
    """Return the MLP, the expert or the stack of experts that a tensor of a projection belongs to."""
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]


def gives_output(name: str) -> bool:
    """Whether a tensor has the channels as inputs: what they give is what its columns add up to."""
    return name.removesuffix(".weight").endswith(("down_proj", "fc2"))


@lru_cache(maxsize=4)
def _map_of(bits: str, live: int, padded: int) -> "torch.Tensor":
    """Kept for the MLPs in hand, since every block of them asks for it."""
    import torch

    chosen_EI = _decoded(bits, live)
    copies_EI = padded // live + chosen_EI.long()
    source = torch.arange(live).repeat(len(chosen_EI)).repeat_interleave(copies_EI.flatten())
    return source.reshape(len(chosen_EI), padded).squeeze(0)


def _gains(checkpoint: Checkpoint, name: str, at: Channels, size: PaddedSize) -> "list[Callable[[], torch.Tensor]]":
    """Return what computes each channel's gain, float64 [I]: for each expert, or for parts of the outputs.

    It is how much halving the channel takes off the squares of group maxima. A weight that is its group's largest gains
    down to the second largest, or to its own half.
    """
    import torch

    def gain(start: int, stop: int) -> "torch.Tensor":
        parts = checkpoint.load(name, slice(start, stop)).split(OUTPUTS_AT_A_TIME)
        return torch.stack([_gain(part_OI, size.group_size) for part_OI in parts]).sum(dim=0)

    def gain_of_expert(number: int) -> "torch.Tensor":
        matrix = checkpoint.load(name, slice(number, number + 1))[0]
        outputs_OI = matrix if at.axis == 2 else matrix.T
        return _gain(outputs_OI[:: ceil(len(outputs_OI) / OUTPUTS)], size.group_size)

    rows = checkpoint[name].rows
    if _is_stack(checkpoint, name):
        return [partial(gain_of_expert, number) for number in range(rows)]
    if rows <= OUTPUTS:
        return [partial(gain, *ends) for ends in block_ranges(checkpoint[name])]
    cells = OUTPUTS // CELL_ROWS
    starts = [cell * rows // cells // CELL_ROWS * CELL_ROWS for cell in range(cells)]
    return [partial(gain, start, start + CELL_ROWS) for start in starts]


def _is_stack(checkpoint: Checkpoint, name: str) -> bool:
    return len(checkpoint[name].shape) == 3


def _gain(weight_OI: "torch.Tensor", group_size: int) -> "torch.Tensor":
    import torch

    outputs, live = weight_OI.shape
    groups_OGN = torch.nn.functional.pad(weight_OI.abs(), (0, -live % group_size)).reshape(outputs, -1, group_size)
    largest_OG, where_OG = groups_OGN.max(dim=2)
    second_OG = groups_OGN.scatter(2, where_OG.unsqueeze(2), 0).amax(dim=2)
    lower_OG = torch.maximum(second_OG.float(), largest_OG.float() / 2)
    gain_OG = largest_OG.double().square() - lower_OG.double().square()
    channel_OG = where_OG + group_size * torch.arange(groups_OGN.shape[1])
    return gain_OG.new_zeros(live).index_add_(0, channel_OG.flatten().clamp_(max=live - 1), gain_OG.flatten())


def _largest(gains_EI: "torch.Tensor", count: int) -> "torch.Tensor":
    """Return which ``count`` channels of each expert gain the most, bool [E, I]."""
    import torch

    order_EI = gains_EI.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(gains_EI, dtype=torch.bool).scatter_(1, order_EI[:, :count], True)


def _encoded(chosen_EI: "torch.Tensor") -> str:
    """Return a bit for each live channel in base64; each expert starts at a byte, its first channel at the high bit."""
    import numpy as np

    return base64.b64encode(np.packbits(chosen_EI.numpy(), axis=1).tobytes()).decode()


def _decoded(bits: str, live: int) -> "torch.Tensor":
    import numpy as np
    import torch

    bytes_EB = np.frombuffer(base64.b64decode(bits), dtype=np.uint8).reshape(-1, ceil(live / 8))
    return torch.from_numpy(np.unpackbits(bytes_EB, axis=1, count=live).astype(bool))
