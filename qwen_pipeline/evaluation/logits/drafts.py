"""Draft heads (multi-token prediction): the share of their drafts that the model itself would accept.

At position t the head takes the model's last hidden state, after its final norm, and the embedding of token t + 1, and
drafts token t + 2, which is accepted if the model predicts the same one at position t + 1. This is the first draft of a
step of speculative decoding without sampling. Here tokens are those of held-out text, so that one pass suffices.

The computation is that of ``Qwen3_5MultiTokenPredictor`` in ``vllm/model_executor/models/qwen3_5_mtp.py``: both inputs
have a norm of their own, are concatenated, embedding first, and projected to one hidden state; a decoder layer with
full attention and a norm follow. Embedding and output head are the model's. Transformers does not load draft heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.evaluation.logits.divergence import Predictions
from qwen_pipeline.layerwise.forward import LayerStream, product
from qwen_pipeline.layerwise.weights import ModelWeights, fill
from qwen_pipeline.qwen.families import require_family

PREFIX = "mtp."
FC, NORM, OF_HIDDEN, OF_EMBEDDING = "fc", "norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"
MODEL, DRAFT = "model", "draft"
_ATTENTION = "self_attn"


def has_draft_head(stream: LayerStream) -> bool:
    """Return whether a model has a draft head of the known kind; Qwen4's, with several residual streams, is not."""
    if require_family(stream.weights.checkpoint.config).mixer not in ("next", "3.5"):
        return False
    names = (f"{PREFIX}{part}.weight" for part in (FC, NORM, OF_HIDDEN, OF_EMBEDDING, "layers.0.input_layernorm"))
    return all(name in stream.weights.checkpoint for name in names) and _place_of_attention(stream) is not None


@torch.inference_mode()
def draft_acceptance(stream: LayerStream, batches: Sequence[Tensor]) -> float | None:
    """Return the share of drafts that a model accepts, or None if it has no draft head.

    Args:
        stream: A model whose layers have all run; its hidden states are left as they are.
        batches: Token ids [B, T] of the stream.
    """
    if not has_draft_head(stream):
        return None
    head = _DraftHead(stream)
    accepted, drafted = 0, 0
    for batch, states in zip(batches, stream.hidden, strict=True):
        hidden_BTH = stream.meta_model.head_inputs(batch, stream.context.fetch(states))
        drafts_NH = head.drafts(batch, hidden_BTH[:, :-1]).flatten(0, 1)
        agrees_N = _agreement(stream, hidden_BTH[:, 1:].flatten(0, 1), drafts_NH)
        accepted, drafted = accepted + int(agrees_N.sum()), drafted + agrees_N.numel()
    return accepted / drafted


class _DraftHead:
    """The head of one model, with all its weights in memory."""

    def __init__(self, stream: LayerStream) -> None:
        self._stream, context = stream, stream.context
        self._weights = ModelWeights(checkpoint=stream.weights.checkpoint, prefix=PREFIX)
        place = _place_of_attention(stream)
        assert place is not None, "a model with a draft head has a layer with full attention"
        self._place, on_meta = place, stream.meta_model.layers[place]
        parameters = self._weights.part("layers.0", on_meta).load(device=context.device, dtype=context.dtype)
        self._layer = fill(on_meta, parameters)
        self._norms = {name: self._norm(name) for name in (NORM, OF_HIDDEN, OF_EMBEDDING)}
        self._fc = stream.weights.checkpoint.load(f"{PREFIX}{FC}.weight").to(context.device, context.dtype)

    def _norm(self, name: str) -> nn.Module:
        """Return a norm of the head, of the class of the model's final norm."""
        context, final = self._stream.context, self._stream.meta_model.final_norm
        return fill(final, self._weights.part(name, final).load(device=context.device, dtype=context.dtype))

    def drafts(self, tokens_BT: Tensor, hidden_BTH: Tensor) -> Tensor:
        """Return the inputs of the output head, [B, T - 1, H]; ``hidden_BTH`` are those of the model without the last.

        Their predictions are of the tokens from the third on, and of one after the end.
        """
        embedded_BTH = self._stream.meta_model.layer_inputs(tokens_BT[:, 1:]).hidden
        inputs = self._stream.meta_model.layer_inputs(tokens_BT[:, :-1])
        both = torch.cat([self._norms[OF_EMBEDDING](embedded_BTH), self._norms[OF_HIDDEN](hidden_BTH)], dim=-1)
        return self._norms[NORM](self._layer(functional.linear(both, self._fc), **inputs.arguments[self._place]))


def _place_of_attention(stream: LayerStream) -> int | None:
    """Return the number of the first layer with full attention; a draft layer has its class and its arguments."""
    layers = enumerate(stream.meta_model.layers)
    return next((number for number, layer in layers if _ATTENTION in dict(layer.named_children())), None)


def _agreement(stream: LayerStream, expected_NH: Tensor, drafts_NH: Tensor) -> Tensor:
    """Return whether both have the same most likely token, bool [N]; the output head is read in blocks."""
    targets = torch.zeros(len(expected_NH), dtype=torch.int64, device=expected_NH.device)
    found = Predictions(targets, roles=[MODEL, DRAFT], reference=MODEL, compared=[DRAFT])
    head = stream.weights.checkpoint.tensors[stream.weights.head]
    ranges = list(block_ranges(head.spec))
    blocks = stream.context.load_each([head.part(*rows_of) for rows_of in ranges])
    for (start, _), rows_VH in zip(ranges, blocks, strict=True):
        found.update(start, {MODEL: product(expected_NH, rows_VH), DRAFT: product(drafts_NH, rows_VH)})
    return found.agrees(DRAFT)
