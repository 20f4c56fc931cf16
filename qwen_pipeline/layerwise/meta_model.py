"""A language model without its weights that records the arguments of each decoder layer.

Transformers builds the model on the meta device. Its decoder layers are replaced by recorders that store their keyword
arguments (attention masks, position embeddings, and others that depend on the family) and return the hidden state
unchanged. The model's own forward pass, run over the recorders, yields for any family the input of the first layer, the
arguments of each layer, and what is computed between the last layer and the output head.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.layerwise.weights import ModelWeights, fill

Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInputs:
    """Inputs of a model's decoder layers for a batch.

    Attributes:
        hidden: Input of the first layer, [B, T, H].
        arguments: Keyword arguments of each layer.
    """

    hidden: Tensor
    arguments: Sequence[Arguments]


class MetaModel:
    """The language model of a checkpoint with its layers on the meta device; embedding rows are read on demand.

    Args:
        weights: The weights of the language model.
        device: Device of the computation.
        dtype: Dtype of the computation.

    Attributes:
        layers: The decoder layers, without weights.

    Raises:
        CheckpointRefused: The installed Transformers does not have the architecture.
    """

    def __init__(self, weights: ModelWeights, *, device: torch.device, dtype: torch.dtype) -> None:
        self._decoder = _decoder_on_meta(weights.checkpoint.config)
        self._device = device
        self.layers: list[nn.Module] = list(self._decoder.layers)
        self._recorders = [_Recorder(layer) for layer in self.layers]
        self._embedding = _LazyEmbedding(weights, dtype)
        replacements: dict[str, nn.Module] = {"layers": nn.ModuleList(self._recorders), "embed_tokens": self._embedding}
        for name, child in self._decoder.named_children():
            child_with_weights = replacements.get(name) or _with_weights(
                name, child, weights, self._decoder.config, device, dtype
            )
            setattr(self._decoder, name, child_with_weights)
        self._decoder.eval()

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last layer."""
        return self._decoder.norm

    def new_cache(self) -> Any:
        """Return an empty cache of Transformers for a batch that is processed in parts; calls of layers fill it."""
        from transformers import DynamicCache

        return DynamicCache(config=self._decoder.config)

    @torch.inference_mode()
    def layer_inputs(self, tokens_BT: Tensor, cache: Any = None) -> LayerInputs:
        """Return the layer inputs of a batch; with a cache, ``tokens_BT`` follows the tokens in the cache."""
        self._run(tokens_BT, cache)
        arguments = [recorder.arguments for recorder in self._recorders]
        return LayerInputs(hidden=self._recorders[0].hidden, arguments=arguments)

    @contextmanager
    def holding_rows(self, batches: Sequence[Tensor]) -> Generator[None]:
        """Read the rows of the embedding for all batches at once, and keep them within the body.

        Most rows are needed by several batches, and rows that are close are read together.
        """
        self._embedding.hold(batches)
        try:
            yield
        finally:
            self._embedding.hold(())

    @torch.inference_mode()
    def head_inputs(self, tokens_BT: Tensor, hidden: Tensor) -> Tensor:
        """Return the input of the output head, [B, T, H], given the output of the last layer."""
        with self._recorders[-1].returning(hidden):
            return self._run(tokens_BT)

    def _run(self, tokens_BT: Tensor, cache: Any = None) -> Tensor:
        tokens_BT = tokens_BT.to(self._device)
        return self._decoder(input_ids=tokens_BT, past_key_values=cache, use_cache=cache is not None).last_hidden_state


class _Recorder(nn.Module):
    """Replaces a layer; other attributes that the model reads are those of the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not registered as a submodule: its weights stay on the meta device
        self.hidden = torch.empty(0)
        self.arguments: Arguments = {}
        self._output: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        if self._output is not None:
            return self._output
        self.hidden, self.arguments = hidden_states, arguments
        return hidden_states

    @contextmanager
    def returning(self, output: Tensor) -> Generator[None]:
        self._output = output
        try:
            yield
        finally:
            self._output = None


class _LazyEmbedding(nn.Module):
    """An embedding that reads only the rows that a batch needs."""

    def __init__(self, weights: ModelWeights, dtype: torch.dtype) -> None:
        super().__init__()
        self._weights, self._dtype = weights, dtype
        self._held: tuple[Tensor, Tensor] | None = None

    def hold(self, batches: Sequence[Tensor]) -> None:
        """Read and keep the rows of some batches of tokens, in place of those of earlier ones."""
        ids = torch.cat([batch.flatten() for batch in batches]).unique().cpu() if len(batches) > 1 else None
        self._held = None if ids is None else (ids, self._weights.rows(ids.tolist()))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        ids, indices_BT = tokens_BT.unique(return_inverse=True)
        return self._rows(ids.cpu()).to(tokens_BT.device, self._dtype)[indices_BT]

    def _rows(self, ids: Tensor) -> Tensor:
        if self._held is None:
            return self._weights.rows(ids.tolist())
        held_ids, rows = self._held
        return rows[torch.searchsorted(held_ids, ids)]


def _decoder_on_meta(config: Mapping[str, Any]) -> Any:
    """Build the model of a config on the meta device; return its module with ``embed_tokens`` and ``layers``."""
    import transformers

    architecture = next(iter(config.get("architectures") or ()), None)
    family = getattr(transformers, str(architecture), None)
    if family is None:
        raise CheckpointRefused(
            f"config.json has architectures {config.get('architectures')!r}, which Transformers"
            f" {transformers.__version__} does not have.",
            remedy="Set architectures in config.json to the model's class, as save_pretrained does.",
        )
    fields = {name: value for name, value in config.items() if name not in ("model_type", "quantization_config")}
    with torch.device("meta"):
        model: nn.Module = family(transformers.AutoConfig.for_model(config["model_type"], **fields))
    return next(m for m in model.modules() if hasattr(m, "embed_tokens") and hasattr(m, "layers"))


def _with_weights(
    name: str, child: nn.Module, weights: ModelWeights, config: Any, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Return a child other than the layers with its weights; one without any (rotary embeddings) is rebuilt."""
    if child.state_dict():
        return fill(child, weights.part(name, child).load(device=device, dtype=dtype))
    return type(child)(config).to(device)
