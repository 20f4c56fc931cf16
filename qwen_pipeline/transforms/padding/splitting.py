"""The choice of the live channels that the layout ``split`` divides in two, and its encoding in a manifest.

Both parts of a split channel have its inputs, and each gives half of its output. The added width improves accuracy, as
in outlier channel splitting (arXiv:1901.09504): where the channel's weight was the largest of its group, the group
gets a finer scale, and of two codes the second compensates for the rounding of the first.
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
"""Maximum number of outputs that gains are summed over; of more outputs, evenly spaced cells are sampled."""

OUTPUTS_AT_A_TIME = 16
"""Outputs whose groups are compared together: few enough for the intermediate results to fit a processor's cache."""


def choose_splits(checkpoint: Checkpoint, plan: PadPlan) -> PadPlan:
    """Return the plan with the split channels of its ``split`` sizes, which are chosen for each MLP on first access.

    The chosen channels are those whose halving lowers the squares of ``down_proj``'s group scales the most, summed over
    outputs (over :data:`OUTPUTS` of them if there are more): the expected rounding error of a group is proportional to
    them. Ties go to the first channel.
    """
    sizes = [
        replace(size, splits=SplitChoices(checkpoint, size)) if size.layout == "split" and size.zeros else size
        for size in plan.sizes
    ]
    return replace(plan, sizes=tuple(sizes))


class SplitChoices(Mapping[str, str]):
    """Module of an MLP, an expert or a stack of experts -> its encoded split channels, chosen on first access."""

    def __init__(self, checkpoint: Checkpoint, size: PaddedSize) -> None:
        sized = sized_tensors(checkpoint, size.field)
        self._checkpoint = checkpoint
        self._size = size
        self._down = {
            mlp_module(name): (name, channels) for name, channels in sized.items() if is_down_projection(name)
        }
        self._running: dict[str, SharedWork[torch.Tensor]] = {}
        self._chosen: dict[str, str] = {}
        self._lock = Lock()

    def __getitem__(self, module: str) -> str:
        if module not in self._chosen:
            name, channels = self._down[module]
            with self._lock:
                gains = _gains(self._checkpoint, name, channels, self._size)
                running = self._running.setdefault(module, SharedWork(gains))
            with hashing_paused():
                self._chosen[module] = self._choice(running.results(), is_stack=_is_stack(self._checkpoint, name))
            self._running.pop(module, None)
        return self._chosen[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._down)

    def __len__(self) -> int:
        return len(self._down)

    def _choice(self, gains: "Sequence[torch.Tensor]", *, is_stack: bool) -> str:
        import torch

        gains_EI = torch.stack(list(gains)) if is_stack else torch.stack(list(gains)).sum(dim=0, keepdim=True)
        return _encoded(_largest(gains_EI, self._size.padded % self._size.live))


def split_map(size: PaddedSize, module: str) -> "torch.Tensor":
    """Return the map of an MLP's channels, int64 [P], or [E, P] for a stack of experts; parts are adjacent."""
    return _map_of(size.splits[module], size.live, size.padded)


def mlp_module(name: str) -> str:
    """Return the module path of the MLP, the expert or the stack of experts that a projection's tensor belongs to."""
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]


def is_down_projection(name: str) -> bool:
    """Return whether a tensor is the weight whose inputs are the channels: ``down_proj``, or ``fc2`` of a tower."""
    return name.removesuffix(".weight").endswith(("down_proj", "fc2"))


@lru_cache(maxsize=4)
def _map_of(bits: str, live: int, padded: int) -> "torch.Tensor":
    """Return the map of decoded channels; cached for the MLPs in progress, since each of their blocks needs it."""
    import torch

    chosen_EI = _decoded(bits, live)
    copies_EI = padded // live + chosen_EI.long()
    source = torch.arange(live).repeat(len(chosen_EI)).repeat_interleave(copies_EI.flatten())
    return source.reshape(len(chosen_EI), padded).squeeze(0)


def _gains(
    checkpoint: Checkpoint, name: str, channels: Channels, size: PaddedSize
) -> "list[Callable[[], torch.Tensor]]":
    """Return functions that compute each channel's gain, float64 [I]: one per expert, or one per part of the outputs.

    The gain is the decrease of the squared group maxima when the channel is halved: from a weight that is its group's
    largest to the second largest or to half of it, whichever is larger.
    """
    import torch

    def gain(start: int, stop: int) -> "torch.Tensor":
        parts = checkpoint.load(name, slice(start, stop)).split(OUTPUTS_AT_A_TIME)
        return torch.stack([_gain(part_OI, size.group_size) for part_OI in parts]).sum(dim=0)

    def gain_of_expert(number: int) -> "torch.Tensor":
        matrix = checkpoint.load(name, slice(number, number + 1))[0]
        outputs_OI = matrix if channels.axis == 2 else matrix.T
        return _gain(outputs_OI[:: ceil(len(outputs_OI) / OUTPUTS)], size.group_size)

    rows = checkpoint[name].rows
    if _is_stack(checkpoint, name):
        return [partial(gain_of_expert, number) for number in range(rows)]
    if rows <= OUTPUTS:
        return [partial(gain, *rows_of) for rows_of in block_ranges(checkpoint[name])]
    cells = OUTPUTS // CELL_ROWS
    starts = [cell * rows // cells // CELL_ROWS * CELL_ROWS for cell in range(cells)]
    return [partial(gain, start, start + CELL_ROWS) for start in starts]


def _is_stack(checkpoint: Checkpoint, name: str) -> bool:
    return len(checkpoint[name].shape) == 3


def _gain(weight_OI: "torch.Tensor", group_size: int) -> "torch.Tensor":
    """Return the gain of each channel, summed over these outputs: float64 [I]."""
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
    """Return a mask of the ``count`` channels of each expert with the largest gains: bool [E, I]."""
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
