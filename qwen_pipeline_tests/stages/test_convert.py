"""The convert stage: trainers' checkpoints become the directories that ``save_pretrained`` would have written."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.journal import JOURNAL
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.errors import CheckFailed, CheckpointRefused, InputRefused
from qwen_pipeline.models.inbox import Arrival
from qwen_pipeline.progress import Progress
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.convert import ADAPTER_SHARD, convert
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.transforms.trained import plan_shards
from qwen_pipeline_tests.checkpoint.trainers.test_deepspeed import ZERO
from qwen_pipeline_tests.checkpoint.trainers.train_with_deepspeed import base_model
from qwen_pipeline_tests.in_memory import lazy
from qwen_pipeline_tests.layouts import fused_projections
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_model, tiny_qwen2

WEIGHTS = "model.safetensors"


def as_trainer_saves(model: Path, root: Path, save: Callable[[dict[str, torch.Tensor], Path], None]) -> Path:
    """Write a model's weights as ``save`` does, with config, tokenizer and files that trainers add."""
    shutil.copytree(model, root, ignore=shutil.ignore_patterns("*.safetensors"))
    save(load_file(model / WEIGHTS), root)
    torch.save({"state": {}}, root / "optimizer.pt")
    (root / "trainer_state.json").write_text("{}")
    return root


def one_file(tensors: dict[str, torch.Tensor], root: Path) -> None:
    torch.save(tensors, root / "pytorch_model.bin")


def shards(tensors: dict[str, torch.Tensor], root: Path) -> None:
    names, owners = list(tensors), dict[str, str]()
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, root / file)
        owners |= dict.fromkeys(part, file)
    (root / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owners}))


def wrapped(tensors: dict[str, torch.Tensor], root: Path) -> None:
    names = {name: f"module._orig_mod.{name.replace('.mlp.', '._fsdp_wrapped_module.mlp.')}" for name in tensors}
    torch.save({names[name]: tensor for name, tensor in tensors.items()}, root / "pytorch_model_fsdp.bin")


def nested(tensors: dict[str, torch.Tensor], root: Path) -> None:
    torch.save({"epoch": 3, "state_dict": tensors, "optimizer_states": [{}]}, root / "last.ckpt")


@pytest.mark.parametrize("save", [one_file, shards, wrapped, nested])
def test_a_state_dict_becomes_the_model_that_was_saved(
    save: Callable[[dict[str, torch.Tensor], Path], None], tmp_path: Path
) -> None:
    model = tiny_qwen2(tmp_path / "model")
    artifact = convert(source=as_trainer_saves(model, tmp_path / "trained", save), destination=tmp_path / "out")
    require_intact(artifact.path)
    assert_same_model(artifact.path, model)
    assert Arrival("out", artifact.path).obstacle() is None
    left = artifact.manifest.result["left_behind"]
    assert {"optimizer.pt", "trainer_state.json"} <= {*left}
    assert not any(name in left for name in ("tokenizer.json", "config.json"))


def assert_same_model(found: Path, expected: Path) -> None:
    assert_same_tensors(load_file(found / WEIGHTS), load_file(expected / WEIGHTS))
    for path in expected.iterdir():
        if path.suffix != ".safetensors":
            assert (found / path.name).read_bytes() == path.read_bytes(), path.name


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shared", [True, False], ids=["one storage", "two copies"])
def test_the_config_decides_about_a_tied_head(shared: bool, tmp_path: Path) -> None:
    def with_head(tensors: dict[str, torch.Tensor], root: Path) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        one_file(tensors | {"lm_head.weight": embedding if shared else embedding.clone()}, root)

    model = tiny_qwen2(tmp_path / "model", tie=True)
    root = as_trainer_saves(model, tmp_path / "trained", with_head)
    tied = convert(source=root, destination=tmp_path / "tied")
    assert_same_model(tied.path, model)
    assert tied.manifest.result["left_out"] == {"lm_head.weight": "tied to model.embed_tokens.weight"}
    config = json.loads((root / "config.json").read_bytes())
    (root / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    untied = load_file(convert(source=root, destination=tmp_path / "untied").path / WEIGHTS)
    assert torch.equal(untied["lm_head.weight"], untied["model.embed_tokens.weight"])


def test_a_head_that_differs_from_its_embedding_is_kept(tmp_path: Path) -> None:
    model = tiny_qwen2(tmp_path / "model", tie=True)
    head = load_file(model / WEIGHTS)["model.embed_tokens.weight"] + 1
    root = as_trainer_saves(
        model, tmp_path / "trained", lambda tensors, root: one_file(tensors | {"lm_head.weight": head}, root)
    )
    found = load_file(convert(source=root, destination=tmp_path / "out").path / WEIGHTS)
    assert torch.equal(found["lm_head.weight"], head)


def test_weights_are_rounded_on_request_and_the_config_says_so(tmp_path: Path) -> None:
    model = tiny_qwen2(tmp_path / "model", dtype=torch.float32)
    root = as_trainer_saves(model, tmp_path / "trained", one_file)
    out = convert(source=root, destination=tmp_path / "out", dtype="bfloat16").path
    expected = {name: tensor.bfloat16() for name, tensor in load_file(model / WEIGHTS).items()}
    assert_same_tensors(load_file(out / WEIGHTS), expected)
    assert json.loads((out / "config.json").read_bytes())["dtype"] == "bfloat16"


def test_a_value_that_the_requested_dtype_cannot_hold_fails(tmp_path: Path) -> None:
    model = tiny_qwen2(tmp_path / "model")
    tensors = load_file(model / WEIGHTS)
    tensors["model.norm.weight"][3] = 1e6
    root = as_trainer_saves(model, tmp_path / "trained", lambda _, root: one_file(tensors, root))
    with pytest.raises(CheckFailed, match=r"model\.norm\.weight"):
        convert(source=root, destination=tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert convert(source=root, destination=tmp_path / "out", dtype="bfloat16").path.exists()


def test_a_base_gives_config_and_tokenizer_and_its_names_are_compared(tmp_path: Path) -> None:
    model = tiny_qwen2(tmp_path / "model")
    tensors = load_file(model / WEIGHTS)
    file = tmp_path / "weights.pt"
    torch.save(tensors, file)
    with pytest.raises(InputRefused, match=r"config\.json"):
        convert(source=file, destination=tmp_path / "out")
    artifact = convert(source=file, destination=tmp_path / "out", base=model)
    assert_same_model(artifact.path, model)
    assert all(report.passed for report in load_reports(artifact.manifest.result))
    del tensors["model.norm.weight"]
    torch.save(tensors, file)
    report = load_reports(convert(source=file, destination=tmp_path / "less", base=model).manifest.result)[1]
    assert (report.outcome, report.measured) == ("warning", 1)
    assert "model.norm.weight is missing" in report.detail


def test_names_of_fused_projections_are_those_of_the_layers_that_they_hold(tmp_path: Path) -> None:
    model = tiny_qwen2(tmp_path / "model")
    tensors = fused_projections(load_file(model / WEIGHTS))
    torch.save(tensors, file := tmp_path / "weights.pt")
    artifact = convert(source=file, destination=tmp_path / "out", base=model)
    assert all(report.passed for report in load_reports(artifact.manifest.result))
    assert set(open_checkpoint(artifact.path)) == set(tensors)
    torch.save(load_file(model / WEIGHTS), file)
    of_fused = convert(source=file, destination=tmp_path / "of-fused", base=artifact.path)
    assert all(report.passed for report in load_reports(of_fused.manifest.result))


def test_zero_with_a_base_is_a_model_of_that_base(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base", tie=True)
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "tie_word_embeddings": True}))
    artifact = convert(source=ZERO / "zero3", destination=tmp_path / "out", base=base, dtype="bfloat16")
    expected = load_file(ZERO / "zero3" / "expected.safetensors")
    del expected["lm_head.weight"]
    found = load_file(artifact.path / WEIGHTS)
    assert_same_tensors(found, {name: tensor.bfloat16() for name, tensor in expected.items()})
    assert artifact.manifest.result["layout"] == "DeepSpeed ZeRO-3 of 3 ranks"


def test_an_adapter_is_merged_like_the_one_that_peft_saved(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    saved = tiny_adapter(base, tmp_path / "saved")
    root = Path(shutil.copytree(saved, tmp_path / "trained"))
    torch.save(load_file(root / ADAPTER_SHARD), root / "adapter_model.bin")
    (root / ADAPTER_SHARD).unlink()
    with pytest.raises(InputRefused, match="pickled"):
        merge(base=base, fine_tune=root, destination=tmp_path / "merged")
    artifact = convert(source=root, destination=tmp_path / "out")
    require_files(artifact.path, {"adapter_config.json", ADAPTER_SHARD, "manifest.json"})
    assert_same_tensors(load_file(artifact.path / ADAPTER_SHARD), load_file(saved / ADAPTER_SHARD))
    assert Arrival("out", artifact.path).obstacle() is None
    merged = [
        merge(base=base, fine_tune=each, destination=tmp_path / f"m-{each.name}") for each in (saved, artifact.path)
    ]
    assert merged[0].manifest.content_digest == merged[1].manifest.content_digest


def require_files(root: Path, names: set[str]) -> None:
    assert names <= {path.name for path in root.iterdir()}
    assert not any(path.name.endswith((".bin", ".tmp")) for path in root.rglob("*"))


@pytest.mark.parametrize("pickled", [True, False], ids=["adapter_model.bin", "adapter_model.safetensors"])
def test_what_was_trained_beside_the_adapter_is_merged_too(pickled: bool, tmp_path: Path) -> None:
    base = tiny_model("qwen2_vl", tmp_path / "base")
    root = tiny_adapter(base, tmp_path / "trained", target_modules=["q_proj"])
    names = [name for name in load_file(base / WEIGHTS) if ".merger." in name]
    assert names
    trained = {name: torch.randn_like(load_file(base / WEIGHTS)[name]) for name in names}
    in_memory = {
        name: name.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else name for name in names
    }
    torch.save(
        {f"base_model.model.{in_memory[name]}": trained[name] for name in names}, root / "non_lora_state_dict.bin"
    )
    if pickled:
        torch.save(load_file(root / ADAPTER_SHARD), root / "adapter_model.bin")
        (root / ADAPTER_SHARD).unlink()
    out = convert(source=root, destination=tmp_path / "out").path
    merged = load_file(merge(base=base, fine_tune=out, destination=tmp_path / "merged").path / WEIGHTS)
    for name in names:
        assert torch.equal(merged[name], trained[name]), name


def test_an_adapter_of_zero_holds_the_trained_tensors_alone(tmp_path: Path) -> None:
    root = Path(shutil.copytree(ZERO / "zero3-lora", tmp_path / "trained"))
    expected = load_file(root / "expected.safetensors")
    (root / "expected.safetensors").unlink()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    (root / "adapter_config.json").write_text(json.dumps(settings))
    out = convert(source=root, destination=tmp_path / "out").path
    assert_same_tensors(load_file(out / ADAPTER_SHARD), expected)
    base = tmp_path / "base"
    base_model().save_pretrained(base)
    merged = load_file(merge(base=base, fine_tune=out, destination=tmp_path / "merged").path / WEIGHTS)
    for name, weight in load_file(base / WEIGHTS).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a_RI, b_OR = (expected.get(f"{module}.lora_{side}.default.weight") for side in "AB")
        update = 0 if a_RI is None or b_OR is None else 4 * b_OR.double() @ a_RI.double()
        assert torch.equal(merged[name], (weight.double() + update).float()), name


def test_the_bases_weights_in_an_adapters_checkpoint_are_left_out_and_listed(tmp_path: Path) -> None:
    root = tiny_adapter(tiny_qwen2(tmp_path / "base"), tmp_path / "trained")
    adapter = load_file(root / ADAPTER_SHARD)
    (root / ADAPTER_SHARD).unlink()
    prefix = "base_model.model.model.layers.0."
    base = {
        f"{prefix}self_attn.q_proj.base_layer.weight": torch.ones(2),
        f"{prefix}input_layernorm.weight": torch.ones(2),
    }
    torch.save(adapter | base, root / "pytorch_model.bin")
    artifact = convert(source=root, destination=tmp_path / "out")
    assert_same_tensors(load_file(artifact.path / ADAPTER_SHARD), adapter)
    assert artifact.manifest.result["left_out"].keys() == base.keys()


def test_a_lora_without_its_settings_is_refused(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    root = tiny_adapter(base, tmp_path / "trained")
    torch.save(load_file(root / ADAPTER_SHARD), tmp_path / "adapter.bin")
    with pytest.raises(CheckpointRefused, match=r"no adapter_config\.json"):
        convert(source=tmp_path / "adapter.bin", destination=tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("mark",)


def test_a_hostile_pickle_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    def save(tensors: dict[str, torch.Tensor], root: Path) -> None:
        torch.save({**tensors, "x": Hostile()}, root / "pytorch_model.bin")

    root = as_trainer_saves(tiny_qwen2(tmp_path / "model"), tmp_path / "trained", save)
    with pytest.raises(CheckpointRefused, match=r"posix\.mkdir"):
        convert(source=root, destination=tmp_path / "out")
    assert not Path("mark").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("found", ["safetensors", "nothing", "two", "training_args", "no path"])
def test_a_directory_without_one_checkpoint_is_refused(found: str, tmp_path: Path) -> None:
    root = tmp_path / "trained"
    if found != "no path":
        tiny_qwen2(root)
    if found not in ("safetensors", "no path"):
        (root / WEIGHTS).unlink()
    if found == "two":
        one_file({"a": torch.ones(2)}, root)
        torch.save({"a": torch.ones(2)}, root / "adapter_model.bin")
    if found == "training_args":
        torch.save(Hostile(), root / "training_args.bin")
    with pytest.raises(CheckpointRefused) as refused:
        convert(source=root, destination=tmp_path / "out")
    expected = {"safetensors": "nothing to convert", "two": "several", "no path": "does not exist"}
    assert expected.get(found, "holds no weights") in str(refused.value)


def test_the_output_is_found_again_and_a_changed_input_is_refused(tmp_path: Path) -> None:
    root = as_trainer_saves(tiny_qwen2(tmp_path / "model"), tmp_path / "trained", one_file)
    first, second = (convert(source=root, destination=tmp_path / "out") for _ in range(2))
    assert (first.reused, second.reused) == (False, True)
    assert first.manifest.content_digest == second.manifest.content_digest
    one_file(load_file(tiny_qwen2(tmp_path / "other", seed=1) / WEIGHTS), root)
    with pytest.raises(InputRefused, match="other inputs"):
        convert(source=root, destination=tmp_path / "out")


def test_a_killed_conversion_is_continued(tmp_path: Path) -> None:
    root, out = as_trainer_saves(tiny_qwen2(tmp_path / "model"), tmp_path / "trained", one_file), tmp_path / "out"

    def kill_once_journaled(_: Progress) -> None:
        if (out.with_name("out.partial") / JOURNAL).exists():
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        convert(source=root, destination=out, observe=kill_once_journaled)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not out.exists()
    journal = out.with_name("out.partial") / JOURNAL
    assert journal.read_text()
    convert(source=root, destination=out)
    assert_same_model(out, tmp_path / "model")
    require_intact(out)


def test_the_digest_of_the_input_is_that_of_its_weights_in_any_layout(tmp_path: Path) -> None:
    model = tiny_qwen2(tmp_path / "model")
    digests = {
        convert(
            source=as_trainer_saves(model, tmp_path / save.__name__, save),
            destination=tmp_path / f"out-{save.__name__}",
        ).manifest.derivation.inputs["source"]
        for save in (one_file, shards, wrapped)
    }
    assert len(digests) == 1


def test_shards_have_at_most_so_many_bytes_and_an_index(tmp_path: Path) -> None:
    tensors = {name: lazy(torch.zeros(size)) for name, size in (("a", 3), ("b", 2), ("c", 9), ("d", 1))}
    assert plan_shards(tensors, most=24) == {
        "a": "model-00001-of-00003.safetensors",
        "b": "model-00001-of-00003.safetensors",
        "c": "model-00002-of-00003.safetensors",
        "d": "model-00003-of-00003.safetensors",
    }
    assert set(plan_shards(tensors).values()) == {WEIGHTS}


def test_a_model_that_is_converted_is_opened_like_any_other(tmp_path: Path) -> None:
    root = as_trainer_saves(tiny_qwen2(tmp_path / "model"), tmp_path / "trained", one_file)
    opened = open_checkpoint(convert(source=root, destination=tmp_path / "out").path)
    save_file({name: opened.load(name) for name in opened}, tmp_path / "copy.safetensors")
    assert_same_tensors(load_file(tmp_path / "copy.safetensors"), load_file(tmp_path / "model" / WEIGHTS))
