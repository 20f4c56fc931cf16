"""One pass over two models finds what separate passes find, and reads each layer once."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.safetensors_file import SafetensorsFile
from qwen_pipeline.evaluation.computed_padding import computed_padding
from qwen_pipeline.evaluation.findings import MERGED, PADDED, QUANTIZED
from qwen_pipeline.evaluation.logits.streamed import NOTHING, InPassing, activation_peaks, evaluate
from qwen_pipeline.evaluation.measurement import Measurement
from qwen_pipeline.evaluation.quantized_codes import QuantizedCodes
from qwen_pipeline.evaluation.tensor_parallel.findings import Sharding
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.progress import unobserved
from qwen_pipeline.qwen.padding_spec import Layout, PaddingSpec
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.unpad import unpad
from qwen_pipeline_tests.rounding import round_to_codes
from qwen_pipeline_tests.tiny import VOCABULARY, tiny_model, tiny_qwen2

pytestmark = pytest.mark.lengthy

CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
TOKENS = torch.randint(0, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))
SHARDINGS = [Sharding(ranks=2), Sharding(ranks=4, pads_mlps=True), Sharding(ranks=2, halves_groups=True)]


def measurement_of(roots: dict[str, Path]) -> Measurement:
    return Measurement(
        models={role: str(root) for role, root in roots.items()},
        reference=MERGED,
        compared=[QUANTIZED],
        answering=[],
        windows=TOKENS[:3].tolist(),
        prompts=[],
        max_new_tokens=1,
        device="cpu",
        structure=True,
        shardings=SHARDINGS,
    )


def count_reads(patch: pytest.MonkeyPatch) -> Counter[tuple[Path, str]]:
    """Count the bytes that are read of each tensor."""
    read: Counter[tuple[Path, str]] = Counter()
    plain: Any = SafetensorsFile._read  # pyright: ignore[reportPrivateUsage]

    def counted(self: SafetensorsFile, name: str, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = plain(self, name, offset, shape)
        read[self.path, name] += tensor.nbytes
        return tensor

    patch.setattr(SafetensorsFile, "_read", counted)
    return read


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_one_pass_finds_what_separate_passes_find(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_model(family, tmp_path / "source")
    roots = {MERGED: source, QUANTIZED: round_to_codes(source, tmp_path / "candidate", group_size=32)}
    models: dict[str, Checkpoint] = {role: open_checkpoint(root) for role, root in roots.items()}
    measurement = measurement_of(roots)

    def run(codes: QuantizedCodes, **options: Any) -> Any:
        return evaluate(models, list(TOKENS[:3]), reference=MERGED, compared=[QUANTIZED], context=CPU, **options)

    separate = QuantizedCodes.of(measurement, models, unobserved)
    expected, figures = separate.findings(CPU), run(separate)
    peaks = activation_peaks(models[QUANTIZED], list(TOKENS[3:]), CPU)
    assert expected[0].problems == []
    assert expected[0].errors
    assert any(sharding.errors for sharding in expected[1])

    monkeypatch.setattr(ComputeContext, "has_own_memory", True)
    read = count_reads(monkeypatch)
    codes = QuantizedCodes.of(measurement, models, unobserved)
    in_passing = replace(codes.in_passing(models, CPU), tokens={QUANTIZED: list(TOKENS[3:])})
    found = run(codes, in_passing=in_passing)
    in_layers = {key: nbytes for key, nbytes in read.items() if ".layers." in key[1]}
    assert codes.findings(CPU) == expected
    assert found[QUANTIZED].calibration_peaks == peaks
    assert found[QUANTIZED].divergence == figures[QUANTIZED].divergence
    for (path, name), nbytes in in_layers.items():
        role = next(role for role, root in roots.items() if path.parent == root)
        assert nbytes == models[role][name].nbytes, f"{name} of the {role} model was not read once"
    assert {name for _, name in in_layers} == {
        name for model in models.values() for name in model if ".layers." in name
    }


def test_layers_that_no_forward_pass_reads_are_read_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model("qwen2", tmp_path / "source")
    roots = {MERGED: source, QUANTIZED: round_to_codes(source, tmp_path / "candidate", group_size=32)}
    models = {role: open_checkpoint(root) for role, root in roots.items()}
    expected = QuantizedCodes.of(measurement_of(roots), models, unobserved).findings(CPU)
    monkeypatch.setattr(ComputeContext, "has_own_memory", True)
    codes = QuantizedCodes.of(measurement_of(roots), models, unobserved)
    assert codes.in_passing({MERGED: models[MERGED]}, CPU).keeping == ()
    assert codes.findings(CPU) == expected


@pytest.mark.parametrize("layout", ["split", "interleave"])
def test_the_padded_model_is_computed_from_the_layers_of_the_merged_one(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = PaddingSpec(group_size=32, tensor_parallel=2, layout=layout)
    first = pad(source=tiny_qwen2(tmp_path / "model"), destination=tmp_path / "first", spec=spec).path
    merged_root = unpad(source=first, destination=tmp_path / "merged").path
    root = pad(source=merged_root, destination=tmp_path / "padded", spec=spec).path
    merged, stored = open_checkpoint(merged_root), open_checkpoint(root)
    assert computed_padding(open_checkpoint(tmp_path / "model"), tmp_path / "model", stored, root) is None

    def run(padded: Checkpoint, in_passing: InPassing = NOTHING) -> Any:
        models, windows = {MERGED: merged, PADDED: padded}, list(TOKENS[:3])
        found = evaluate(models, windows, reference=MERGED, compared=[PADDED], context=CPU, in_passing=in_passing)
        return {role: replace(figures, computed_from=None) for role, figures in found.items()}

    expected = run(stored)
    padding = computed_padding(merged, merged_root, stored, root)
    assert padding
    for name in stored:
        assert torch.equal(padding.checkpoint.load(name), stored.load(name)), name
    monkeypatch.setattr(ComputeContext, "has_own_memory", True)
    read = count_reads(monkeypatch)
    assert run(padding.checkpoint, NOTHING.computing(PADDED, MERGED, padding.compute)) == expected
    assert not [path for path, _ in read if path.parent == root]
    once = {name: nbytes for (_, name), nbytes in read.items() if ".layers." in name}
    assert once == {name: spec.nbytes for name, spec in merged.items() if ".layers." in name}
