"""Negative log-likelihoods and KL divergences of several models, computed from blocks of logits.

Logits arrive in blocks of the vocabulary, so every sum over the vocabulary is an online softmax: ``sum exp(z - m)``
with the highest logit ``m`` so far, rescaled when ``m`` rises. Everything is computed in float64 from float32 logits:
the divergence between a model and its padded version is about 1e-9, less than float32 can sum over a vocabulary.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor


class Predictions:
    """The predictions of several models for the same N tokens, updated by blocks of logits.

    Args:
        targets: The actual tokens, int64 [N].
        roles: The models.
        reference: The role with which others are compared.
        compared: Roles to compare with the reference.
    """

    def __init__(self, targets: Tensor, *, roles: Collection[str], reference: str, compared: Collection[str]) -> None:
        self._reference = reference
        self._sums = {role: Softmax(targets) for role in roles}
        self._gaps = {role: torch.zeros(len(targets), dtype=torch.float64, device=targets.device) for role in compared}

    def update(self, first: int, logits: Mapping[str, Tensor]) -> None:
        """Add a block of the vocabulary: the models' logits [N, block] of token ids from ``first`` on."""
        exact = {role: values.double() for role, values in logits.items() if values.shape[1]}
        for role, values in exact.items():
            shrinkage_N, weights_NV = self._sums[role].update(first, values)
            if role == self._reference:
                for other, gap_N in self._gaps.items():
                    gap_N.mul_(shrinkage_N).add_((weights_NV * (values - exact[other])).sum(dim=1))

    def nll(self, role: str) -> Tensor:
        """Return ``-log p(target)`` in nats for each token, float64 [N]."""
        return self._sums[role].log_total - self._sums[role].target

    def kl(self, role: str) -> Tensor:
        """Return KL(reference || role) in nats for each token, float64 [N]: ``E[z - z'] - log Z + log Z'``."""
        reference, other = self._sums[self._reference], self._sums[role]
        return self._gaps[role] / reference.total - (reference.log_total - other.log_total)

    def agrees(self, role: str) -> Tensor:
        """Return whether the reference and ``role`` have the same most likely token, bool [N]."""
        return self._sums[role].top == self._sums[self._reference].top


class Softmax:
    """The online softmax of one model, with the logit of the target and the most likely token so far.

    Args:
        targets_N: The actual tokens, int64.

    Attributes:
        total: The denominator, divided by ``exp`` of the highest logit, float64 [N].
        target: The logits of the targets, float64 [N].
        top: The likeliest token, int64 [N].
    """

    def __init__(self, targets_N: Tensor) -> None:
        self._targets = targets_N
        zeros = torch.zeros(len(targets_N), dtype=torch.float64, device=targets_N.device)
        self._highest, self.total, self.target = zeros - torch.inf, zeros, zeros.clone()
        self.top = torch.zeros_like(targets_N)

    @property
    def log_total(self) -> Tensor:
        return self._highest + self.total.log()

    def update(self, first: int, values_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Add a block; return the factor for earlier sums [N], and the weights ``exp(z - m)`` of the block [N, V]."""
        best_N, place_N = values_NV.max(dim=1)
        self.top = torch.where(best_N > self._highest, first + place_N, self.top)
        highest_N = torch.maximum(self._highest, best_N)
        shrinkage_N, weights_NV = (self._highest - highest_N).exp(), (values_NV - highest_N[:, None]).exp()
        self._highest, self.total = highest_N, self.total * shrinkage_N + weights_NV.sum(dim=1)
        here = ((self._targets >= first) & (self._targets < first + values_NV.shape[1])).nonzero().flatten()
        self.target[here] = values_NV[here, self._targets[here] - first]
        return shrinkage_N, weights_NV
