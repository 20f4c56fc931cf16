"""Shares of accepted drafts, against the draft head computed as one module, and heads whose drafts are known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.evaluation.logits.drafts import draft_acceptance, has_draft_head
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.layerwise.forward import LayerStream, advance
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline_tests.in_memory import lazy
from qwen_pipeline_tests.tiny import load_tiny, tiny_model

CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
TOKENS = torch.arange(2 * 24).reshape(2, 24) * 5 % 256


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5_text", "qwen3_5_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose last layer has full attention, and a draft head with random projection and norms."""
    types: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
    root = tiny_model(request.param, tmp_path_factory.mktemp("model") / "m", layout="mtp", **types)
    tensors, generator = load_file(root / "model.safetensors"), torch.Generator().manual_seed(3)
    for name in ("fc", "norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        tensor = tensors[f"mtp.{name}.weight"]
        tensors[f"mtp.{name}.weight"] = (torch.randn(tensor.shape, generator=generator) / 4).to(tensor.dtype)
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    return root


@torch.inference_mode()
def accepted_by_transformers(root: Path) -> float:
    """Compute the drafts with the modules of Transformers: a copy of the last layer takes the draft layer's weights."""
    model: Any = load_tiny(root)
    tensors = load_file(root / "model.safetensors")
    decoder = next(m for m in model.modules() if hasattr(m, "embed_tokens") and hasattr(m, "layers"))
    own = {name.removeprefix("mtp."): tensor.float() for name, tensor in tensors.items() if name.startswith("mtp.")}
    last = decoder.layers[-1]
    hidden = decoder(input_ids=TOKENS).last_hidden_state
    expected = model.lm_head(hidden).argmax(-1)[:, 1:]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        before = decoder.norm.weight.clone()
        decoder.norm.weight.copy_(own[f"{name}.weight"])
        found = decoder.norm(x)
        decoder.norm.weight.copy_(before)
        return found

    embedded = decoder.embed_tokens(TOKENS[:, 1:])
    both = torch.cat([norm("pre_fc_norm_embedding", embedded), norm("pre_fc_norm_hidden", hidden[:, :-1])], dim=-1)
    x = both @ own["fc.weight"].T
    positions = torch.arange(x.shape[1])[None]
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
    rotary = decoder.rotary_emb(x, positions)
    out = last(x, position_embeddings=rotary, attention_mask=mask, position_ids=positions)
    drafts = model.lm_head(norm("norm", out[0] if isinstance(out, tuple) else out)).argmax(-1)
    return (drafts == expected).double().mean().item()


def stream_of(checkpoint: Checkpoint) -> LayerStream:
    stream = LayerStream(checkpoint, TOKENS.split(1), CPU)
    list(advance([stream]))
    return stream


def test_the_share_is_that_of_the_modules_of_transformers(model: Path) -> None:
    """The draft layer of the tiny model has the weights of its last layer."""
    checkpoint = open_checkpoint(model)
    share = draft_acceptance(stream_of(checkpoint), TOKENS.split(1))
    assert share == pytest.approx(accepted_by_transformers(model))
    figures = evaluate({"a": checkpoint}, list(TOKENS), reference="a", compared=["a"], context=CPU)
    assert figures["a"].draft_acceptance == pytest.approx(share)


def test_a_head_that_repeats_the_models_hidden_state_drafts_its_previous_prediction(model: Path) -> None:
    """With a layer and an embedding that add nothing, and norms that change nothing but length, drafts are known."""
    checkpoint = open_checkpoint(model)
    stream = stream_of(checkpoint)
    hidden = torch.cat(
        [stream.meta_model.head_inputs(b, h) for b, h in zip(TOKENS.split(1), stream.hidden, strict=True)]
    )
    rows = checkpoint.load(stream.weights.head).float()
    predicted = (hidden @ rows.T).argmax(-1)
    width = hidden.shape[-1]
    silent = ("o_proj.weight", "down_proj.weight", "down_proj")
    changes = {
        name: torch.zeros(spec.shape, dtype=spec.torch_dtype)
        for name, spec in checkpoint.items()
        if name.startswith("mtp.layers.") and name.endswith(silent)
    }
    changes["mtp.fc.weight"] = torch.cat([torch.zeros(width, width), torch.eye(width)], dim=1).bfloat16()
    changes |= {f"mtp.{name}.weight": torch.zeros(width).bfloat16() for name in ("norm", "pre_fc_norm_hidden")}
    still = checkpoint.replace(tensors={name: lazy(tensor) for name, tensor in changes.items()})
    share = draft_acceptance(stream_of(still), TOKENS.split(1))
    assert share == pytest.approx((predicted[:, :-1] == predicted[:, 1:]).double().mean().item())


def test_a_model_without_a_draft_head_has_no_share(tmp_path: Path) -> None:
    stream = stream_of(open_checkpoint(tiny_model("qwen3", tmp_path / "model")))
    assert not has_draft_head(stream)
    assert draft_acceptance(stream, TOKENS.split(1)) is None
    assert isinstance(stream.meta_model.final_norm, nn.Module)
