"""One pass gives the bytes of two, and a recipe has the digest of the stored weights."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.measure import measured
from qwen_pipeline.checkpoint.store.destinations import Artifact, CheckpointStore
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.errors import CheckFailed, CheckpointRefused, InputRefused
from qwen_pipeline.models.open import materialize, open_model
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.padding_spec import Layout, PaddingSpec
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.merge_pad import estimate_resources, merge_pad
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.stages.unpad import unpad
from qwen_pipeline.transforms.lora.adapter_set import weighted
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen2
from qwen_pipeline_tests.whole import load_model

GEOMETRY = PaddingSpec(group_size=32, tensor_parallel=2)


class Inputs:
    """A base of three shards, an adapter, and the outputs of the two stages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = tiny_qwen2(root / "base", shards=3)
        self.adapter = tiny_adapter(self.base, root / "adapter")
        self.merged = merge(base=self.base, fine_tune=self.adapter, destination=root / "merged")
        self.padded = pad(source=self.merged.path, destination=root / "padded", spec=GEOMETRY)

    def one_pass(
        self, out: Path, *, spec: PaddingSpec = GEOMETRY, stores_padded: bool = True
    ) -> tuple[Artifact, Artifact]:
        return merge_pad(
            base=self.base,
            fine_tune=self.adapter,
            merged=out / "recipe",
            padded=out / "padded",
            spec=spec,
            stores_padded=stores_padded,
        )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("unread", [True, False])
def test_one_pass_gives_the_same_result_as_two(
    inputs: Inputs, tmp_path: Path, unread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if unread:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe, padded = inputs.one_pass(tmp_path)

    assert padded.manifest.derivation == inputs.padded.manifest.derivation
    assert padded.manifest.contents == inputs.padded.manifest.contents
    require_intact(padded.path)
    assert recipe.manifest.derivation == inputs.merged.manifest.derivation
    assert recipe.manifest.content_digest == inputs.merged.manifest.content_digest
    assert recipe.manifest.contents.tensors == inputs.merged.manifest.contents.tensors
    assert not list(recipe.path.glob("*.safetensors"))
    require_intact(recipe.path)
    again = inputs.one_pass(tmp_path)
    assert all(artifact.reused for artifact in again)


@pytest.mark.parametrize("layout", ["interleave", "split"])
def test_neither_weights_need_be_stored(inputs: Inputs, tmp_path: Path, layout: Layout) -> None:
    spec = replace(GEOMETRY, layout=layout)
    padded = pad(source=inputs.merged.path, destination=tmp_path / "stored", spec=spec)
    recipes = inputs.one_pass(tmp_path, spec=spec, stores_padded=False)
    assert not list(tmp_path.glob("recipe/*.safetensors")) + list(tmp_path.glob("padded/*.safetensors"))
    for recipe, stored in zip(recipes, (inputs.merged, padded), strict=True):
        require_intact(recipe.path)
        assert recipe.manifest.derivation == stored.manifest.derivation
        assert recipe.manifest.content_digest == stored.manifest.content_digest
        assert recipe.manifest.result == stored.manifest.result
        expected, computed = open_model(stored.path), open_model(recipe.path)
        assert computed.config == expected.config
        assert all(torch.equal(expected.load(name), computed.load(name)) for name in expected)

    quantized = [
        quantize(source=source, destination=source.with_suffix(".fp8"), spec=QuantSpec(method="fp8-dynamic"))
        for source in (padded.path, recipes[1].path)
    ]
    assert quantized[0].manifest.derivation == quantized[1].manifest.derivation
    assert quantized[0].manifest.contents == quantized[1].manifest.contents
    merged_again = unpad(source=recipes[1].path, destination=tmp_path / "unpadded")
    assert merged_again.manifest.contents.tensors == inputs.merged.manifest.contents.tensors

    again = inputs.one_pass(tmp_path, spec=spec, stores_padded=False)
    assert all(artifact.reused for artifact in again)
    _, filled = inputs.one_pass(tmp_path, spec=spec)
    assert filled.manifest.recipe is None
    assert filled.manifest.contents == padded.manifest.contents
    require_intact(filled.path)


def test_what_is_not_finite_is_refused_before_a_recipe_exists(inputs: Inputs, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(inputs.adapter, tmp_path / "adapter"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    huge = {name: tensor.fill_(1e30) for name, tensor in tensors.items()}
    save_file(huge, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckFailed, match="not finite"):
        merge_pad(
            base=inputs.base, fine_tune=adapter, merged=tmp_path / "recipe", padded=tmp_path / "padded",
            spec=GEOMETRY, stores_padded=False,
        )  # fmt: skip
    assert not (tmp_path / "recipe").exists()
    assert not (tmp_path / "padded").exists()


def test_only_the_layer_loop_reads_a_recipe(inputs: Inputs, tmp_path: Path) -> None:
    _, padded = inputs.one_pass(tmp_path, stores_padded=False)
    with pytest.raises(InputRefused, match="materialize"):
        quantize(source=padded.path, destination=tmp_path / "out", spec=QuantSpec(engine="gptqmodel"))


def test_a_recipe_reads_like_stored_weights_and_can_be_stored_later(inputs: Inputs, tmp_path: Path) -> None:
    recipe, _ = inputs.one_pass(tmp_path)
    stored, computed = open_model(inputs.merged.path), open_model(recipe.path)
    assert all(torch.equal(stored.load(name), computed.load(name)) for name in stored)

    filled = materialize(recipe.path)
    assert filled.manifest.recipe is None
    assert filled.manifest.contents == inputs.merged.manifest.contents
    require_intact(recipe.path)
    assert materialize(recipe.path).reused
    assert merge(base=inputs.base, fine_tune=inputs.adapter, destination=recipe.path).reused


def test_merging_stores_the_weights_of_an_existing_recipe(inputs: Inputs, tmp_path: Path) -> None:
    recipe, _ = inputs.one_pass(tmp_path)
    made = merge(base=inputs.base, fine_tune=inputs.adapter, destination=recipe.path)
    assert made.manifest.contents == inputs.merged.manifest.contents


def test_a_recipe_whose_fine_tune_was_changed_is_refused(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path)
    recipe, _ = inputs.one_pass(tmp_path / "out")
    config = inputs.adapter / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(CheckpointRefused, match="whose digest must be sha256"):
        open_model(recipe.path)


def test_one_pass_and_two_stages_share_a_directory_of_the_store(inputs: Inputs, tmp_path: Path) -> None:
    slot = CheckpointStore(tmp_path).slot("poet")
    recipe, padded = merge_pad(base=inputs.base, fine_tune=inputs.adapter, merged=slot, padded=slot, spec=GEOMETRY)
    assert pad(source=recipe.path, destination=slot, spec=GEOMETRY).path == padded.path
    assert merge(base=inputs.base, fine_tune=inputs.adapter, destination=slot).path == recipe.path
    assert open_manifest(recipe.path).recipe is None
    assert pad(source=recipe.path, destination=slot, spec=GEOMETRY).reused


def test_a_recipe_of_several_weighted_adapters_reads_like_stored_weights(inputs: Inputs, tmp_path: Path) -> None:
    other = tiny_adapter(inputs.base, tmp_path / "other", r=3, target_modules=["q_proj", "up_proj"])
    both = weighted([inputs.adapter, other], [0.25, -2.0], combination="cat")
    stored = merge(base=inputs.base, fine_tune=both, destination=tmp_path / "stored")
    recipe, _ = merge_pad(
        base=inputs.base,
        fine_tune=both,
        merged=tmp_path / "recipe",
        padded=tmp_path / "padded",
        spec=GEOMETRY,
    )

    assert recipe.manifest.content_digest == stored.manifest.content_digest
    assert materialize(recipe.path).manifest.contents == stored.manifest.contents
    shutil.rmtree(other)
    open_model(recipe.path)


def test_a_recipe_without_one_of_its_adapters_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    other = tiny_adapter(inputs.base, tmp_path / "other", r=3, target_modules=["q_proj"])
    recipe, _ = merge_pad(
        base=inputs.base,
        fine_tune=weighted([inputs.adapter, other], [], combination="cat"),
        merged=tmp_path / "recipe",
        padded=tmp_path / "padded",
        spec=GEOMETRY,
    )
    shutil.rmtree(other)

    with pytest.raises(
        CheckpointRefused, match=r"computed from .*other, whose digest must be sha256:.*, but it is missing"
    ):
        open_model(recipe.path)


def test_transformers_loads_a_recipe_without_storing_it(inputs: Inputs, tmp_path: Path) -> None:
    recipe, _ = inputs.one_pass(tmp_path)
    stored, computed = (load_model(str(root)) for root in (inputs.merged.path, recipe.path))

    assert stored.state_dict().keys() == computed.state_dict().keys()
    assert all(torch.equal(weight, computed.state_dict()[name]) for name, weight in stored.state_dict().items())
    assert cast("Any", computed).generation_config.to_dict() == cast("Any", stored).generation_config.to_dict()
    assert not list(recipe.path.glob("*.safetensors"))


def test_the_estimate_is_what_the_stages_read_and_write(inputs: Inputs) -> None:
    estimate = estimate_resources(inputs.base, GEOMETRY)
    assert estimate
    assert estimate.base_bytes == open_model(inputs.merged.path).nbytes
    assert estimate.padded_bytes == open_model(inputs.padded.path).nbytes
    ways = {way.name: (way.read_bytes, way.needs.disk_bytes) for way in estimate.ways}
    assert ways == {
        "merge": (estimate.base_bytes, estimate.base_bytes),
        "merge, then pad": (2 * estimate.base_bytes, estimate.base_bytes + estimate.padded_bytes),
        "one pass": (estimate.base_bytes, estimate.padded_bytes),
        "one pass, nothing stored": (estimate.base_bytes, 0),
    }
    run = inputs.padded.manifest.run
    assert run.written_bytes >= estimate.padded_bytes
    assert run.read_bytes >= estimate.base_bytes


def test_there_is_no_estimate_without_weights(tmp_path: Path) -> None:
    assert estimate_resources(tmp_path, GEOMETRY) is None


def test_a_nested_measurement_does_not_reset_the_outer_peak() -> None:
    with measured() as outer:
        held = torch.ones(2**24)
        del held
        with measured() as inner:
            pass
        assert outer().peak_memory_bytes == inner().peak_memory_bytes
        assert outer().added_memory_bytes > 2**25
