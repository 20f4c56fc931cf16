"""The cheap chain that faults are injected into: five stages on a tiny model, with no engine and no other process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.checkpoint.store.log import read_log
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.quantization.calibration import calibration_set, plot
from qwen_pipeline.quantization.calibration.spec import CalibrationSpec
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.stages import calibrate as calibrate_stage
from qwen_pipeline.stages.calibrate import calibrate
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.publish import publish
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.stages.validate import ValidationInputs, ValidationPlan, validate
from qwen_pipeline.text.tokenizer_service import LoadedTokenizer
from qwen_pipeline.text.tokenizers import load_tokenizer
from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline_tests.chain import write_text
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 320, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


NAME = "bot"
ROLES = {"reference": "merged", "padded": "padded", "candidate": "quantized"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the chain starts from.

    Attributes:
        validated: A validation of what the chain makes; None before it was made.
    """

    base: Path
    adapter: Path
    text: Path
    validated: Path | None = None


def make_inputs(root: Path) -> Inputs:
    """Make a base of several shards, an adapter and a text below a directory."""
    base = tiny_model("qwen2", root / "base", shards=3, **SIZES)
    return Inputs(
        base=base,
        adapter=tiny_adapter(base, root / "adapter"),
        text=write_text(root / "text.jsonl", documents=24, stride=7),
    )


def make_validation(inputs: Inputs, out: Path, chain: Path) -> Path:
    """Validate an undisturbed chain."""
    made = {role: _latest(chain, stage) for role, stage in ROLES.items()}
    plan = ValidationPlan(tensor_parallel=2, windows=1, seq_len=32, prompts=["Hi"])
    engine = find_environment("transformers")
    validate(ValidationInputs(**made, text=inputs.text), plan=plan, destination=out, engine=engine)
    return out


def _latest(out: Path, stage: str) -> Path:
    return CheckpointStore(out).require_latest(stage, NAME).path


def steps(inputs: Inputs, out: Path) -> Mapping[str, Callable[[], object]]:
    """Return the stages in order, each by its name; they fill the store ``out``."""
    slot = CheckpointStore(out).slot(NAME)
    padding, tokens = PaddingSpec(group_size=128, tensor_parallel=2), CalibrationSpec(samples=4, seq_len=32)
    made: dict[str, Callable[[], object]] = {
        "merged": lambda: merge(base=inputs.base, fine_tune=inputs.adapter, destination=slot),
        "padded": lambda: pad(source=_latest(out, "merged"), destination=slot, spec=padding),
        "calibration": lambda: calibrate(
            source=_latest(out, "padded"), text=inputs.text, destination=slot, spec=tokens
        ),
        "quantized": lambda: quantize(
            source=_latest(out, "padded"), destination=slot, spec=QuantSpec(method="fp8-dynamic")
        ),
    }
    if validated := inputs.validated:
        made["published"] = lambda: publish(
            quantized=_latest(out, "quantized"),
            validated=validated,
            destination=slot,
            base_model="Qwen/Tiny",
            fine_tune=NAME,
        )
    return made


def digests(out: Path) -> dict[str, list[str]]:
    """Return the content digests of each stage's finished outputs."""
    stages = sorted(path.name for path in out.iterdir() if path.is_dir())
    return {
        stage: [made.manifest.content_digest for made in CheckpointStore(out).finished(stage, NAME)] for stage in stages
    }


def finished(out: Path) -> list[Path]:
    """Return the directories with a final name, as a reader of the store sees them."""
    found = [path for path in out.glob("*/*/*") if path.is_dir() and not path.is_symlink()]
    return [path for path in found if path.suffix != ".partial"]


def require_nothing_partial(out: Path) -> None:
    """Assert that every directory with its final name is complete."""
    for root in finished(out):
        manifest = open_manifest(root)
        assert all((root / path).stat().st_size == file.bytes for path, file in manifest.contents.files.items()), root


def require_clean(out: Path, *, inputs_changed: bool = False) -> None:
    """Assert that every directory is what its manifest says, that the log has all, and that nothing else is left.

    If inputs were changed in between, the attempt with the others may be left.
    """
    for root in finished(out):
        require_intact(root)
    left = [path for path in out.rglob("*") if path.suffix in (".tmp", ".new", ".partial")]
    assert inputs_changed or not left, left
    logged = [entry.path for entry in read_log(out)]
    assert sorted(set(logged)) == sorted(root.relative_to(out).as_posix() for root in finished(out))


def without_processes(patch: pytest.MonkeyPatch) -> None:
    """Keep the chain in one process, and without plots, which take seconds."""

    def tokenizer(root: Path, limits: object) -> LoadedTokenizer:
        del limits
        return LoadedTokenizer(load_tokenizer(root))

    def draw(*arguments: Any) -> None:
        arguments[-1].write_bytes(b"a plot")

    patch.setattr(calibrate_stage, "prepare_tokenizers", lambda: None)
    patch.setattr(calibration_set, "BoundedTokenizer", tokenizer)
    patch.setattr(plot, "draw_calibration_plot", draw)
