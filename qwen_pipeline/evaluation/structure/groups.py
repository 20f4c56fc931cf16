"""Quantization groups whose scale or codes are not those of the weights they were made from.

One group is a few dozen weights of one output: lost in a layer's norm, loud in an answer. Two figures tell it from
rounding, given the group's weights ``w`` and what its codes stand for, ``v``:

- its error ``||w - v|| / ||w||``. The norm of a quiet group counts as a tenth of the row's at least: GPTQ makes up for
  the rounding of loud groups there.
- its gain ``<w, v> / <v, v>``, the factor that its scale is short of. Only where ``w`` has both signs: symmetric codes
  reach 7 of 15 steps up, and a group without a negative weight is clipped there.

Groups of zeros are checked by :func:`~qwen_pipeline.evaluation.structure.weights.check_padding`.

GPTQ makes up for the rounding of earlier channels in later ones, so codes need not stand for the weights alone. Seen in
221,184 groups of SmolLM2-135M at 4 bits in groups of 64 (GPTQModel 7.6), and in tiny dense and MoE models: errors up to
0.45, gains from 0.79 to 1.10. In a fine-tune of it (1.8 million groups), outputs with massive activations take on much
more in their last groups: errors up to 1.40, gains down to 0.34, never above 1.17. So a scale that is half of what it
was, or four times that, is told from a sound one; one that is twice that is not, if its group alone is looked at.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

MAX_ERROR = 2.0
MAX_GAIN = 1.5
QUIET = 0.1
"""The least norm of a group, as a share of the root mean square of its row's groups."""


@dataclass(slots=True)
class GroupFaults:
    """How many groups of a weight are not its own, and the first of them.

    Attributes:
        first: Output, group, error and gain; the gain is 0 where codes stand for zeros.
    """

    count: int = 0
    first: tuple[int, int, float, float] | None = None

    def see(self, start: int, w_OI: Tensor, v_OI: Tensor, g_idx: Tensor) -> None:
        """Take the rows from ``start`` on into account."""
        groups = int(g_idx.max()) + 1

        def over_groups(values_OI: Tensor) -> Tensor:
            return values_OI.new_zeros(len(values_OI), groups).index_add_(1, g_idx.long(), values_OI)

        norm, error = over_groups(w_OI.square()).sqrt(), over_groups((w_OI - v_OI).square()).sqrt()
        quietest = QUIET * norm.square().mean(dim=1, keepdim=True).sqrt()
        error = torch.where(error > 0, error / torch.maximum(norm, quietest), 0)
        gain = torch.nan_to_num(over_groups(w_OI * v_OI) / over_groups(v_OI.square()), nan=0, posinf=0, neginf=0)
        signs = over_groups((w_OI > 0).float()).bool() & over_groups((w_OI < 0).float()).bool()
        loud = norm > quietest
        wrong = ~(error <= MAX_ERROR) | (signs & loud & (gain > MAX_GAIN))
        wrong &= norm > 0
        self.count += int(wrong.sum())
        if self.first is None and self.count:
            row, group = wrong.nonzero()[0].tolist()
            self.first = (start + row, group, error[row, group].nan_to_num(nan=inf).item(), gain[row, group].item())

    @property
    def sentence(self) -> str:
        """What is wrong with the first, for a reader."""
        assert self.first
        output, group, error, gain = self.first
        scale = f", as if its scale were {1 / gain:.2g} times what it should be" if gain > 0 else ""
        return f"output {output}, group {group} is off by {error:.0%} of its norm{scale}"
