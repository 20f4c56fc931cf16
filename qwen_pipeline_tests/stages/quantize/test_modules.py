"""A checkpoint whose modules have several precisions: its codes, its config, and those who read them."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Artifact, Directory
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.structure.check import check_structure
from qwen_pipeline.evaluation.tensor_parallel.findings import Target
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.export import export
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.transforms.codes.dequantize import dequantized
from qwen_pipeline.transforms.codes.gptq import gptq_format
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint
from qwen_pipeline.workers.environments import WorkerEnvironment
from qwen_pipeline.workers.parent import run_worker
from qwen_pipeline_tests.chain import Chain
from qwen_pipeline_tests.evaluation.simulated import find_targets
from qwen_pipeline_tests.quantizers import logits_of
from qwen_pipeline_tests.stages.quantize.quantizing import SPEC, require_passed
from qwen_pipeline_tests.tiny import VOCABULARY

MIXED = replace(
    SPEC,
    engine="layerwise",
    modules={r"\.q_proj|\.k_proj|\.v_proj": 8, r"layers\.1\.mlp\.down_proj": "keep", r"layers\.0\..*down_proj": "4g64"},
)


@pytest.fixture(scope="module")
def mixed(chain: Chain, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Codes of 4 and 8 bits in groups of 32 and 64, and a weight."""
    out = Directory(tmp_path_factory.mktemp("mixed") / "out")
    return quantize(source=chain.padded, destination=out, calibration=calibration, spec=MIXED, engine=chain.engine)


@pytest.mark.slow
def test_every_module_is_stored_as_requested(chain: Chain, mixed: Artifact) -> None:
    require_passed(mixed)
    source, output = open_checkpoint(chain.padded), open_checkpoint(mixed.path)
    assert mixed.manifest.derivation.spec["modules"] == [
        [pattern, str(word)] for pattern, word in MIXED.modules.items()
    ]
    form = gptq_format(output.config)
    for linear in decoder_linears(source):
        precision = MIXED.precision_of(linear.module)
        if precision.coded:
            own = form.of(output, linear.module)
            assert (own.bits, own.group_size) == (precision.bits, precision.group_size)
            weight_OI = source.load(linear.tensor).double()
            rows_OI = form.load(output, linear.module).weight_rows(0, linear.out_features).double()
            error = (rows_OI - weight_OI).norm() / weight_OI.norm()
            assert error < (0.01 if precision.bits == 8 else 0.15), linear.module
        else:
            assert torch.equal(output.load(linear.tensor), source.load(linear.tensor))
    assert len(mixed.manifest.result["losses"]) == 13


def test_the_structure_is_what_the_config_declares(chain: Chain, mixed: Artifact) -> None:
    source, output = open_checkpoint(chain.padded), open_checkpoint(mixed.path)
    found = check_structure(source, output)
    assert found.problems == []
    assert len(found.errors) == 13
    assert found.padding.channels == 2 * 32, "also those of the MLP whose down projection is kept"
    for rule, named in {
        r"+:.*\.self_attn\.q_proj$": "model.layers.0.self_attn.q_proj.qweight is I32 [16, 64], expected I32 [8, 64]",
        r"+:.*\.self_attn\.qkv_proj$": "but 4 bits in groups of 32 for model.layers.0.self_attn.qkv_proj",
        r"-:.*\.layers\.1\.mlp\.down_proj$": "model.layers.1.mlp.down_proj.qweight is missing",
    }.items():
        problems = check_structure(source, without_rule(output, rule)).problems
        assert any(named in problem for problem in problems), problems


def test_ranks_are_simulated_with_the_groups_of_each_module(chain: Chain, mixed: Artifact) -> None:
    source, output = open_checkpoint(chain.padded), open_checkpoint(mixed.path)
    whole, straddling = find_targets(
        source, output, [Target(engine="vllm-marlin", degree=2), Target(engine="vllm-marlin", degree=4)]
    )
    assert whole.found
    assert whole.found.compared == 13
    assert not whole.found.errors
    assert straddling.verdict == "refused", "32 inputs per rank are half a group of 64"


def test_the_export_has_a_scheme_for_each_format(chain: Chain, mixed: Artifact, tmp_path: Path) -> None:
    """compressed-tensors matches schemes with modules; Transformers computes with what it decompresses."""
    exported = export(source=mixed.path, destination=tmp_path / "out")
    assert all(report.passed for report in load_reports(exported.manifest.result))
    config = open_checkpoint(exported.path).config["quantization_config"]
    assert len(config["config_groups"]) == 3
    matching: Any = import_module("compressed_tensors.utils.match")
    for linear in decoder_linears(open_checkpoint(chain.padded)):
        precision = MIXED.precision_of(linear.module)
        groups = [
            group["weights"]
            for group in config["config_groups"].values()
            if any(matching.match_name(linear.module, target) for target in group["targets"])
        ]
        expected = [(precision.bits, precision.group_size)] if precision.coded else []
        assert [(each["num_bits"], each["group_size"]) for each in groups] == expected, linear.module
    assert logits(exported.path) == pytest.approx(own_logits(mixed.path), abs=1e-5)


@pytest.mark.slow
def test_gptqmodel_computes_the_logits_of_our_own_weights(
    mixed: Artifact, tmp_path: Path, engine: WorkerEnvironment
) -> None:
    target = "qwen_pipeline_tests.quantization.targets:gptqmodel_logits"
    found = run_worker(engine.python, target, {"model": str(mixed.path)}, log=tmp_path / "log").value
    own = own_logits(mixed.path)
    assert found["logits"] == pytest.approx(own, abs=1e-4)
    assert found["linears"] == {"4": 7, "8": 6}


@pytest.mark.slow
def test_transformers_loads_weights_beside_codes(chain: Chain, tmp_path: Path) -> None:
    """Optimum reads no rules: the list of modules with codes makes it leave the others as they are.

    Its kernel rounds products of codes and scales to float16.
    """
    source, whole = open_checkpoint(chain.padded), open_checkpoint(chain.quantized)
    kept = ("model.layers.1.mlp.down_proj.", "model.layers.0.self_attn.o_proj.")
    codes = {name: tensor for name, tensor in whole.tensors.items() if not name.startswith(kept)}
    packed = replace(whole, tensors=codes, shards={name: whole.shards[name] for name in codes})
    settings = {name: value for name, value in whole.config["quantization_config"].items() if name != "dynamic"}
    output = quantized_checkpoint(source, packed, decoder_linears(source), settings)
    assert check_structure(source, output).problems == []
    full = dequantized(output.replace(config={**output.config, "dtype": "float16"}))
    for name, each in {"mixed": output, "full": full}.items():
        (tmp_path / name).mkdir()
        write_checkpoint(each, tmp_path / name, task=name)
    found, expected = logits_of(tmp_path / "mixed", tmp_path / "full")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_served_or_read_is_refused(chain: Chain, calibration: Path, tmp_path: Path) -> None:
    for modules, named in (
        ({"q_proj": 8}, r"vLLM and SGLang build self_attn\.qkv_proj as one module"),
        ({r"mlp\.up_proj": "keep"}, r"mlp\.gate_up_proj as one module"),
        ({"lm_head": "keep"}, "'lm_head' is found in no name"),
        ({"": "keep"}, "keeps every linear layer"),
        ({"o_proj": "4g128"}, "not a multiple of 128"),
    ):
        with pytest.raises(InputRefused, match=named) as refused:
            quantize(
                source=chain.padded, destination=Directory(tmp_path / "out"), calibration=calibration,
                spec=replace(MIXED, modules=modules), engine=chain.engine,
            )  # fmt: skip
        assert refused.value.remedy
    with pytest.raises(InputRefused, match="modules or precision is set, but gptqmodel"):
        QuantSpec(engine="gptqmodel", modules={"a": "8"})


def without_rule(checkpoint: Checkpoint, rule: str) -> Checkpoint:
    settings = json.loads(json.dumps(checkpoint.config["quantization_config"]))
    del settings["dynamic"][rule]
    return checkpoint.replace(config={**checkpoint.config, "quantization_config": settings})


@torch.inference_mode()
def logits(root: Path) -> list[float]:
    model: Any = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    return model(torch.arange(VOCABULARY)[None, :48]).logits.flatten().tolist()


def own_logits(root: Path) -> list[float]:
    """Compute with Transformers and the weights that the codes represent."""
    full = dequantized(open_checkpoint(root).replace(config={**open_checkpoint(root).config, "dtype": "float32"}))
    model: Any = AutoModelForCausalLM.from_config(import_module("transformers").AutoConfig.from_pretrained(root))
    model.float().load_state_dict({name: full.load(name).float() for name in full}, strict=False)
    with torch.inference_mode():
        return model(torch.arange(VOCABULARY)[None, :48]).logits.flatten().tolist()
