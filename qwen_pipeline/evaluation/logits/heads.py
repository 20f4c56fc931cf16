"""Outputs of classifiers, reward models and embedding models, and the distance between those of two models."""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor

from qwen_pipeline.evaluation.figures import HeadFigures
from qwen_pipeline.evaluation.heads import HeadTask
from qwen_pipeline.layerwise.forward import LayerStream
from qwen_pipeline.qwen.heads import SCORE_BIAS, SCORE_WEIGHT, Pooling

RANKED = 1024
"""Number of rewards whose order is compared, pair by pair; of more, evenly spaced ones."""


def _weighted_mean(states_BTH: Tensor) -> Tensor:
    weights_T = torch.arange(1, states_BTH.shape[1] + 1, dtype=states_BTH.dtype, device=states_BTH.device)
    return (states_BTH * weights_T[:, None]).sum(dim=1) / weights_T.sum()


_POOLS: Mapping[Pooling, Callable[[Tensor], Tensor]] = {
    "lasttoken": lambda states_BTH: states_BTH[:, -1],
    "cls": lambda states_BTH: states_BTH[:, 0],
    "mean": lambda states_BTH: states_BTH.mean(dim=1),
    "max": lambda states_BTH: states_BTH.amax(dim=1),
    "weightedmean": _weighted_mean,
    "mean_sqrt_len_tokens": lambda states_BTH: states_BTH.sum(dim=1) / sqrt(states_BTH.shape[1]),
}
"""Pooling of hidden states [B, T, H] to [B, H], as sentence-transformers computes it for texts without padding."""


@torch.inference_mode()
def head_outputs(stream: LayerStream, batches: Sequence[Tensor], task: HeadTask) -> Tensor:
    """Return the outputs of a model whose layers have run, float64: logits [N, labels], or embeddings [N, D].

    Args:
        stream: The hidden states after the last layer, which are removed.
        batches: Token ids [B, T] of the stream.
        task: The task of the model; N is the number of texts, or of tokens where each is classified.
    """
    states = [stream.context.fetch(each).double() for each in stream.pop_head_inputs()]
    if task.kind == "embedding":
        return torch.cat([torch.cat([_POOLS[mode](each) for mode in task.pooling], dim=1) for each in states])
    if task.kind == "token":
        chosen = [each.flatten(0, 1) for each in states]
    else:
        ends = [_last_tokens(batch, task.pad_token) for batch in batches]
        chosen = [each[torch.arange(len(each)), end.to(each.device)] for each, end in zip(states, ends, strict=True)]
    checkpoint, device = stream.weights.checkpoint, stream.context.device
    logits_NL = torch.cat(chosen) @ checkpoint.load(SCORE_WEIGHT).to(device, torch.float64).T
    if SCORE_BIAS in checkpoint:
        logits_NL += checkpoint.load(SCORE_BIAS).to(device, torch.float64)
    return logits_NL


def compare_outputs(outputs_ND: Tensor, reference_ND: Tensor, task: HeadTask) -> HeadFigures:
    """Return the distance of a model's outputs from the reference's."""
    difference_ND = outputs_ND - reference_ND
    spread = (reference_ND - reference_ND.mean(dim=0)).norm().item()
    cosines_N = torch.cosine_similarity(outputs_ND, reference_ND, dim=1)
    is_embedding = task.kind == "embedding"
    return HeadFigures(
        outputs=len(outputs_ND),
        error=difference_ND.norm().item() / spread if spread else difference_ND.norm().item(),
        max_error=difference_ND.abs().max().item(),
        agreement=_agreement(outputs_ND, reference_ND) if task.labels > 1 else None,
        order=_same_order(outputs_ND[:, 0], reference_ND[:, 0]) if task.is_reward else None,
        cosine=cosines_N.mean().item() if is_embedding else None,
        min_cosine=cosines_N.min().item() if is_embedding else None,
    )


def _agreement(outputs_NL: Tensor, reference_NL: Tensor) -> float:
    return (outputs_NL.argmax(dim=1) == reference_NL.argmax(dim=1)).double().mean().item()


def _same_order(rewards_N: Tensor, reference_N: Tensor) -> float:
    """Return the share of pairs with different reference rewards that have the same order; 1 if there are none."""
    step = max(1, len(rewards_N) // RANKED)
    ours_NN, theirs_NN = ((each[:, None] - each[None, :]).sign() for each in (rewards_N[::step], reference_N[::step]))
    pairs_NN = theirs_NN > 0
    return (ours_NN[pairs_NN] > 0).double().mean().item() if pairs_NN.any() else 1.0


def _last_tokens(tokens_BT: Tensor, pad_token: int | None) -> Tensor:
    """Return the place of the last token that is not the pad token, in each text, as Transformers finds it."""
    if pad_token is None:
        return torch.full((len(tokens_BT),), tokens_BT.shape[1] - 1)
    places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    return (places_T * (tokens_BT != pad_token)).argmax(dim=1)
