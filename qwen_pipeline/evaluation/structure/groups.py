"""Detect quantization groups whose scale or codes do not represent the weights that they were made from.

One group is a few dozen weights of one output: negligible in a layer's norm, but noticeable in answers. Two figures
distinguish a wrong group from rounding, given the group's weights ``w`` and its dequantized codes ``v``:

- its error ``||w - v|| / ||w||``. The norm of a group of small weights counts as at least a tenth of the row's: GPTQ
  compensates there for the rounding of groups of large weights.
- its gain ``<w, v> / <v, v>``, the factor by which its scale is too small. It is used only if ``w`` has both signs:
  symmetric codes reach only 7 of 15 steps above zero, and a group without negative weights is clipped there.

Groups of zeros are checked by :func:`~qwen_pipeline.evaluation.structure.weights.check_padding`.

GPTQ compensates for the rounding of earlier channels in later ones, so codes do not encode the weights alone. Measured
in 221,184 groups of SmolLM2-135M at 4 bits in groups of 64 (GPTQModel 7.6), and in tiny dense and MoE models: errors up
to 0.45, gains from 0.79 to 1.10. In a fine-tune of it (1.8 million groups), outputs with massive activations compensate
much more in their last groups: errors up to 1.40, gains down to 0.34, never above 1.17. A recipe with corrected targets
makes such outputs pay back what earlier layers lost: errors up to 2.1, gains down to 0.13 in another fine-tune. But
these groups no longer point where their weights do (cosines of 0.6 and 0.3), while a wrong scale keeps the direction.
So an error between :data:`MAX_ERROR` and :data:`MAX_CORRECTION` counts only if the cosine is at least :data:`ALIGNED`.
A scale that is halved or quadrupled can be distinguished from a correct one; a doubled one cannot, from its group
alone. Scales may be negative (:mod:`qwen_pipeline.quantization.steps.scale_search`); one whose sign was changed has a
gain of about -1.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

MAX_ERROR, MAX_CORRECTION = 2.0, 4.0
ALIGNED = 0.8
MIN_GAIN, MAX_GAIN = -0.5, 1.5
MIN_NORM_SHARE = 0.1
"""The minimum norm of a group, as a share of the root mean square of its row's groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The inputs of each group of a layer.

    Attributes:
        count: Number of groups, up to the highest that occurs.
        places: Inputs of each group [G, S]; a smaller group than the largest is filled up with inputs beyond
            the last. None if groups are consecutive inputs, the same number each.
    """

    count: int
    places: Tensor | None = None

    @classmethod
    def of(cls, g_idx: Tensor) -> "Groups":
        """Return the groups of a layer, of which ``g_idx`` [I] is that of each input."""
        count, inputs = int(g_idx.max()) + 1, len(g_idx)
        consecutive = torch.arange(inputs, device=g_idx.device, dtype=g_idx.dtype) // max(1, inputs // count)
        if inputs % count == 0 and torch.equal(g_idx, consecutive):
            return cls(count=count)
        members = [(g_idx == group).nonzero().flatten() for group in range(count)]
        return cls(count=count, places=pad_sequence(members, batch_first=True, padding_value=inputs))

    def divide(self, values_OI: Tensor) -> Tensor:
        """Return the values by group [O, G, S]; places without an input are zero."""
        if self.places is None:
            return values_OI.unflatten(1, (self.count, -1))
        return pad(values_OI, (0, 1))[:, self.places]


@dataclass(slots=True)
class GroupFaults:
    """The number of wrong groups of a weight, and the first of them.

    Attributes:
        first: Output, group, error and gain; the gain is 0 if the codes decode to zeros.
    """

    count: int = 0
    first: tuple[int, int, float, float] | None = None

    def update(self, start: int, w_OI: Tensor, v_OI: Tensor, groups: Groups) -> Tensor:
        """Add the rows from ``start`` on; return the squares of their error and of their norm, float64 [2]."""
        w_OGS, v_OGS = groups.divide(w_OI), groups.divide(v_OI)
        norm, error = vector_norm(w_OGS, dim=2), vector_norm(w_OGS - v_OGS, dim=2)
        squares = torch.stack([error, norm]).double().square().sum(dim=(1, 2))
        min_norm = MIN_NORM_SHARE * norm.square().mean(dim=1, keepdim=True).sqrt()
        error = torch.where(error == 0, 0, error / torch.maximum(norm, min_norm))
        product, v_norm = (w_OGS * v_OGS).sum(dim=2), vector_norm(v_OGS, dim=2)
        gain = torch.nan_to_num(product / v_norm.square(), nan=0, posinf=0, neginf=0)
        aligned = product >= ALIGNED * norm * v_norm
        signs = (w_OGS.amax(dim=2) > 0) & (w_OGS.amin(dim=2) < 0)
        wrong = ~(error <= torch.where(aligned, MAX_ERROR, MAX_CORRECTION))
        wrong |= signs & (norm > min_norm) & ((gain > MAX_GAIN) | (gain < MIN_GAIN))
        wrong &= norm > 0
        self.count += int(wrong.sum())
        if self.first is None and self.count:
            row, group = wrong.nonzero()[0].tolist()
            self.first = (start + row, group, error[row, group].nan_to_num(nan=inf).item(), gain[row, group].item())
        return squares

    @property
    def sentence(self) -> str:
        """A description of the first wrong group."""
        assert self.first
        output, group, error, gain = self.first
        scale = f", as if its scale were {1 / gain:.2g} times what it should be" if gain else ""
        return f"output {output}, group {group} differs by {error:.0%} of its norm{scale}"
