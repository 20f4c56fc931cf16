"""Inputs of layers cut into quantization groups, and shared by ranks: which groups two ranks would have to share."""

from dataclasses import dataclass
from math import ceil

from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.serving import distinct_matrices


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """The inputs of one kind of row-parallel layer, such as ``mlp.down_proj``."""

    kind: str
    inputs: int
    group_size: int
    ranks: int

    @property
    def groups_per_rank(self) -> float:
        """A fraction is what breaks."""
        return self.inputs / self.group_size / self.ranks

    @property
    def is_cut(self) -> list[bool]:
        """Whether a rank's end, the last one's left out, lies inside a group."""
        return [self.inputs * rank % (self.group_size * self.ranks) != 0 for rank in range(1, self.ranks)]

    @property
    def straddling(self) -> set[int]:
        """The numbers of the groups that lie on more than one rank."""
        ends = (self.inputs * rank / self.ranks for rank in range(1, self.ranks))
        return {ceil(end / self.group_size) - 1 for end in ends if end % self.group_size}

    def groups(self) -> list[tuple[int, int]]:
        """Return each group's first input and number of inputs; the last one may have fewer."""
        starts = range(0, self.inputs, self.group_size)
        return [(start, min(self.group_size, self.inputs - start)) for start in starts]


def divisions(config: Config, *, group_size: int, ranks: int) -> list[Division]:
    """Return how each kind of layer that ranks share by its inputs is divided."""
    shared = [matrix for matrix in distinct_matrices(config) if matrix.quantized and matrix.split == "rows"]
    widths = dict.fromkeys((matrix.kind, matrix.in_features) for matrix in shared)
    return [Division(kind=kind, inputs=inputs, group_size=group_size, ranks=ranks) for kind, inputs in widths]
