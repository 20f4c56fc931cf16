"""Dead input channels: those that no calibration token reached, as every channel that padding added.

GPTQ's solvers give a dead channel the Hessian diagonal 1 and *then* damp all channels by a share of the mean diagonal.
Where live diagonals are far below 1, as in experts with small activations, that mean is the dead channels' and the
damping drowns what the live ones know of each other: at worst the solver only rounds.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def settle_dead_channels(hessian_II: "torch.Tensor", weight_OI: "torch.Tensor") -> None:
    """Give dead channels the mean Hessian diagonal of the live ones, in place, and weights of zero.

    The mean diagonal, and with it the damping, is then that of the live channels alone. Dead channels have no
    off-diagonal entries, so nothing else of the solver sees them. Where all are dead nothing was learnt, and nothing is
    changed.
    """
    diagonal = hessian_II.diagonal()
    dead = diagonal == 0
    if dead.any() and not dead.all():
        diagonal[dead] = diagonal[~dead].mean()
        weight_OI[:, dead] = 0
