"""The streamed forward pass: logits equal to Transformers' for every family, its memory, and refused inputs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.layerwise.forward import LayerStream, advance, logit_blocks
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.transforms.codes.gptq import gptq_format
from qwen_pipeline_tests.chain import Chain
from qwen_pipeline_tests.layerwise.memory import require_a_layer_and_a_half
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, load_tiny, tiny_model, tiny_qwen2

CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
BATCHES = torch.randint(0, 250, (5, 20), generator=torch.Generator().manual_seed(0)).split(2)


def streamed_logits(checkpoint: Checkpoint) -> torch.Tensor:
    stream = LayerStream(checkpoint, BATCHES, CPU)
    assert list(advance([stream])) == list(range(len(stream.parts)))
    parts: list[list[torch.Tensor]] = [[] for _ in BATCHES]
    for block in logit_blocks([stream], CPU):
        parts[block.batch].append(block.values[0])
    return torch.cat([torch.cat(part, dim=-1) for part in parts])


@torch.no_grad()
def plain_logits(root: Path) -> torch.Tensor:
    model = load_tiny(root)
    return torch.cat([model(input_ids=batch).logits[:, :-1].flatten(0, 1) for batch in BATCHES])


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_logits_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    root = tiny_model(family, tmp_path / "model")
    torch.testing.assert_close(streamed_logits(open_checkpoint(root)), plain_logits(root), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_audio"])
def test_a_tied_head_is_the_embedding(family: str, tmp_path: Path) -> None:
    root = tiny_model(family, tmp_path / "model", tie=True)
    torch.testing.assert_close(streamed_logits(open_checkpoint(root)), plain_logits(root), rtol=1e-5, atol=1e-5)


def test_codes_compute_like_their_dequantized_weights(chain: Chain, tmp_path: Path) -> None:
    quantized = open_checkpoint(chain.quantized)
    root = tiny_qwen2(tmp_path / "model", intermediate_size=128, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    form = gptq_format(quantized.config)
    weights = {name: quantized.load(name).float() for name in quantized if name.endswith((".weight", ".bias"))}
    for name in quantized:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            packed = form.load(quantized, module)
            weights[f"{module}.weight"] = packed.weight_rows(0, packed.qweight.shape[1])
    model.load_state_dict(weights)
    model.save_pretrained(root)
    torch.testing.assert_close(streamed_logits(quantized), plain_logits(root), rtol=1e-5, atol=1e-5)


def test_a_missing_tensor_is_refused_before_anything_runs(tmp_path: Path) -> None:
    whole = open_checkpoint(tiny_qwen2(tmp_path / "model"))
    tensors = {name: tensor for name, tensor in whole.tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(CheckpointRefused, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        LayerStream(replace(whole, tensors=tensors), BATCHES, CPU)
    with pytest.raises(CheckpointRefused, match="NoSuchModel"):
        LayerStream(whole.replace(config={**whole.config, "architectures": ["NoSuchModel"]}), BATCHES, CPU)


def test_models_of_different_depth_are_refused(tmp_path: Path) -> None:
    roots = (tiny_qwen2(tmp_path / str(layers), num_hidden_layers=layers) for layers in (1, 2))
    with pytest.raises(InputRefused, match=r"\[1, 2\] layers"):
        next(advance([LayerStream(open_checkpoint(root), BATCHES, CPU) for root in roots]))


@pytest.mark.slow
@pytest.mark.lengthy
def test_memory_is_at_most_a_layer_and_a_half(tmp_path: Path) -> None:
    require_a_layer_and_a_half(tmp_path, "qwen_pipeline_tests.layerwise.peak_of_forward")


def test_rows_of_the_embedding_are_read_once_for_all_batches(tmp_path: Path) -> None:
    checkpoint, read = open_checkpoint(tiny_qwen2(tmp_path / "model")), 0
    embedding = checkpoint.tensors["model.embed_tokens.weight"]

    def counted(start: int, stop: int) -> torch.Tensor:
        nonlocal read
        read += stop - start
        return embedding.read(start, stop)

    watched = checkpoint.replace(tensors={"model.embed_tokens.weight": replace(embedding, read=counted, stored=None)})
    batches = [torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    together, alone = LayerStream(watched, batches, CPU), [LayerStream(checkpoint, [batch], CPU) for batch in batches]
    assert read <= 60
    for hidden, stream in zip(together.hidden, alone, strict=True):
        assert torch.equal(hidden, stream.hidden[0])


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_inputs_are_noted_while_a_layer_is_run_to_its_end(family: str, tmp_path: Path) -> None:
    """They are those that are captured on the way, and the hidden states are those of a plain pass."""
    checkpoint = open_checkpoint(tiny_model(family, tmp_path / "model"))
    noting, plain = (LayerStream(checkpoint, BATCHES, CPU) for _ in range(2))
    layer = next(plain.iter_layers())
    reached = ["post_attention_layernorm", "mlp.down_proj" if family == "qwen2" else "mlp.experts"]
    with torch.inference_mode():
        expected = [[inputs[0].clone() for inputs in found] for found in plain.inputs_on_the_way(0, layer, reached)]
        noted = [[inputs[0].clone() for inputs in found] for found in noting.run_noting(0, layer, reached)]
        plain.run(0, layer)
    for found, ours in zip(expected, noted, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, ours, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(plain.hidden, noting.hidden, strict=True))
