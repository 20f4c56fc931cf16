"""A language model without its weights, which still knows how each decoder layer is called.

Transformers builds the model on the meta device. Its decoder layers are taken out and replaced by recorders that note
their keyword arguments (attention masks, position embeddings, whatever a family hands down) and return the hidden state
as it came. So the model's own forward pass, run over recorders, says for any family what enters the first layer, how
each layer is to be called, and what becomes of the last layer's output before the output head.
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
    """What a model does with a batch before its first layer.

    Attributes:
        hidden: What enters the first layer, [B, T, H].
        arguments: Keyword arguments of each layer.
    """

    hidden: Tensor
    arguments: Sequence[Arguments]


class MetaModel:
    """A checkpoint's language model, its layers on the meta device; embedding rows are read as they are needed.

    Args:
        weights: The checkpoint, by the names of its language model.
        device: Where batches are computed.
        dtype: What they are computed in.

    Attributes:
        layers: The decoder layers, without weights.

    Raises:
        CheckpointRefused: Transformers does not have the architecture.
    """

    def __init__(self, weights: ModelWeights, *, device: torch.device, dtype: torch.dtype) -> None:
        self._decoder = _decoder_on_meta(weights.checkpoint.config)
        self._device = device
        self.layers: list[nn.Module] = list(self._decoder.layers)
        self._recorders = [_Recorder(layer) for layer in self.layers]
        self._embedding = _Rows(weights, dtype)
        stand_ins: dict[str, nn.Module] = {"layers": nn.ModuleList(self._recorders), "embed_tokens": self._embedding}
        for name, child in self._decoder.named_children():
            real = stand_ins.get(name) or _real(name, child, weights, self._decoder.config, device, dtype)
            setattr(self._decoder, name, real)
        self._decoder.eval()

    def new_cache(self) -> Any:
        """Return a cache of Transformers for one batch that comes in parts: its layers fill it as they are called."""
        from transformers import DynamicCache

        return DynamicCache(config=self._decoder.config)

    @torch.inference_mode()
    def enter(self, tokens_BT: Tensor, cache: Any = None) -> LayerInputs:
        """Run a batch up to the first layer; with a cache, the part of it that follows what the cache has seen."""
        self._run(tokens_BT, cache)
        arguments = [recorder.arguments for recorder in self._recorders]
        return LayerInputs(hidden=self._recorders[0].hidden, arguments=arguments)

    @torch.inference_mode()
    def leave(self, tokens_BT: Tensor, hidden: Tensor) -> Tensor:
        """Return what enters the output head, [B, T, H], given what left the last layer."""
        with self._recorders[-1].returning(hidden):
            return self._run(tokens_BT)

    def _run(self, tokens_BT: Tensor, cache: Any = None) -> Tensor:
        tokens_BT = tokens_BT.to(self._device)
        return self._decoder(input_ids=tokens_BT, past_key_values=cache, use_cache=cache is not None).last_hidden_state


class _Recorder(nn.Module):
    """Stands where a layer was; attributes that the model asks of it are the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not registered: its weights are nobody's here
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


class _Rows(nn.Module):
    """An embedding of which only the rows that a batch needs are ever read."""

    def __init__(self, weights: ModelWeights, dtype: torch.dtype) -> None:
        super().__init__()
        self._weights, self._dtype = weights, dtype

    def forward(self, tokens_BT: Tensor) -> Tensor:
        ids, places_BT = tokens_BT.unique(return_inverse=True)
        return self._weights.rows(ids.tolist()).to(tokens_BT.device, self._dtype)[places_BT]


def _decoder_on_meta(config: Mapping[str, Any]) -> Any:
    """Build the model of a config without memory and return its language model: what embeds tokens and has layers."""
    import transformers

    architecture = next(iter(config.get("architectures") or ()), None)
    family = getattr(transformers, str(architecture), None)
    if family is None:
        raise CheckpointRefused(
            f"config.json has architectures {config.get('architectures')!r}, which Transformers"
            f" {transformers.__version__} does not have.",
            remedy="Name the model's class in config.json, as save_pretrained does.",
        )
    fields = {name: value for name, value in config.items() if name not in ("model_type", "quantization_config")}
    with torch.device("meta"):
        model: nn.Module = family(transformers.AutoConfig.for_model(config["model_type"], **fields))
    return next(m for m in model.modules() if hasattr(m, "embed_tokens") and hasattr(m, "layers"))


def _real(
    name: str, child: nn.Module, weights: ModelWeights, config: Any, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Give a module beside the layers its weights; one that has none (rotary embeddings) is made anew."""
    if child.state_dict():
        return fill(child, weights.part(name, child).load(device=device, dtype=dtype))
    return type(child)(config).to(device)
