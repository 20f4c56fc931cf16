"""Dead input channels: channels that no calibration token activated, such as those added by padding.

GPTQ solvers set the Hessian diagonal of a dead channel to 1 and *then* damp all channels by a share of the mean
diagonal. If the live diagonals are far below 1, as in experts with small activations, the dead channels dominate that
mean, and the damping hides the correlations between the live ones: at worst the solver only rounds.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def settle_dead_channels(hessian_II: "torch.Tensor", weight_OI: "torch.Tensor") -> None:
    """Set the Hessian diagonal of dead channels to the mean of the live ones, and their weights to zero, in place.

    The mean diagonal, and with it the damping, is then that of the live channels alone. Dead channels have no
    off-diagonal entries, so they do not affect the rest of the solution. If all channels are dead, nothing is changed.
    """
    diagonal = hessian_II.diagonal()
    dead = diagonal == 0
    if dead.any() and not dead.all():
        diagonal[dead] = diagonal[~dead].mean()
        weight_OI[:, dead] = 0
