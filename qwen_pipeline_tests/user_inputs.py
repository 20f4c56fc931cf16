"""Sound inputs of the command line, and the commands that read them, in this process."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save
from typer.main import get_command

from qwen_pipeline.cli import app
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.stages.pad import pad
from qwen_pipeline_tests.codes import METHODS, Packing, replace_mlps_by_codes
from qwen_pipeline_tests.layouts import fused_copy
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_model, tiny_qwen3, tiny_tokenizer
from qwen_pipeline_tests.tiny_heads import tiny_headed_adapter
from qwen_pipeline_tests.transforms.codes.test_dequantize import to_fp8

ZERO = Path(__file__).parent / "checkpoint/trainers/zero"
FEW = "--samples 1 --seq-len 4"
NO_ENGINE = f"--engine-python {shutil.which('false')}"
"""Ends a command where a worker would start."""

MODEL_COMMANDS = (
    "pad --in {model} --out {out} --tp 2 --group-size 32",
    "unpad --in {model} --out {out}",
    "merge --base {model} --adapter {sound} --out {out}",
    "merge --base {sound} --adapter {model} --out {out}",
    "merge --base {sound} --adapter {adapter} --trained-on {model} --out {out}",
    "merge-pad --base {model} --adapter {adapter} --recipe {recipe} --out {out} --tp 2 --group-size 32",
    "materialize {model}",
    "inspect {model} --base {sound}",
    "plan {model} --tp 2",
    f"calibrate --in {{model}} --text {{text}} --out {{out}} --all-experts {FEW}",
    f"quantize --in {{model}} --calibration {{text}} --out {{out}} --group-size 32 {FEW} {NO_ENGINE}",
    "quantize --in {model} --method fp8-dynamic --out {out}",
    f"validate --reference {{sound}} --candidate {{model}} --text {{text}} --out {{out}} {NO_ENGINE}",
    f"validate --reference {{model}} --candidate {{coded}} --text {{text}} --out {{out}} {NO_ENGINE}",
    "allocate --in {sound} --candidate {model} --text {text} --bits 5 --windows 1 --seq-len 4 --out {out}",
    "repair {model} --tp 2 --out {out}",
    "export --in {model} --out {out}",
    "evidence {model} --before {sound}",
    "audit show {model}",
    "audit diff {model} {sound}",
    "compare {model} {sound}",
    "verify {model}",
    "convert --from {model} --base {sound} --out {out}",
)
"""Commands that read a model in any state."""

CODE_COMMANDS = (
    "merge --base {model} --adapter {adapter} --base-dequantize --out {out}",
    "pad --in {model} --out {out} --tp 2 --group-size 32 --base-dequantize",
    "inspect {adapter} --base {model} --base-dequantize",
    "repair {model} --tp 2 --out {out}",
    "export --in {model} --out {out}",
    "plan {model} --tp 2",
)
"""Commands that read a base in codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Sound inputs to damage.

    Attributes:
        fused: A model whose projections are fused.
        padded: The output of a stage, with a manifest.
        coded: A model whose MLPs are codes of GPTQ.
        bases_in_codes: Models in codes or 8-bit floats of each format that is read as a base.
        other_adapters: Adapters of a classifier and of experts, each with its base.
        trained: Checkpoints of trainers, in pickles.
    """

    base: Path
    mixture: Path
    fused: Path
    adapter: Path
    padded: Path
    coded: Path
    bases_in_codes: Sequence[Path]
    other_adapters: Sequence[tuple[Path, Path]]
    trained: Sequence[Path]
    text: Path


def make_site(root: Path) -> Site:
    base = tiny_qwen3(root / "base", intermediate_size=96)
    text = root / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"Some words, number {n}."}) for n in range(9)))
    saved = root / "saved"
    shutil.copytree(base, saved)
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    save({"model": load_file(base / "model.safetensors")}, checkpoint_id=root / "distributed", no_dist=True)
    shutil.copy(base / "config.json", root / "distributed")
    return Site(
        base=base,
        mixture=tiny_model("qwen3_moe", root / "mixture"),
        fused=fused_copy(base, root / "fused"),
        adapter=tiny_adapter(base, root / "adapter"),
        padded=pad(source=base, destination=root / "padded", spec=PaddingSpec(group_size=32, tensor_parallel=2)).path,
        coded=replace_mlps_by_codes(Path(shutil.copytree(base, root / "coded")), Packing(method="gptq", group_size=32)),
        bases_in_codes=_bases_in_codes(base, root),
        other_adapters=_other_adapters(base, root),
        trained=[saved, root / "distributed", ZERO / "zero2", ZERO / "zero3-lora"],
        text=text,
    )


def _bases_in_codes(base: Path, root: Path) -> list[Path]:
    coded = [
        replace_mlps_by_codes(
            Path(shutil.copytree(base, root / f"base-in-{method}")),
            Packing(method=method, group_size=32, sym=method != "awq"),
        )
        for method in METHODS
    ]
    return [*coded, to_fp8(Path(shutil.copytree(base, root / "base-in-fp8")))]


def _other_adapters(base: Path, root: Path) -> list[tuple[Path, Path]]:
    stacked = tiny_model("qwen3_moe", root / "stacked", layout="fused")
    experts: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    classifier = tiny_headed_adapter(base, root / "classifier", "ForSequenceClassification")
    tiny_tokenizer().save_pretrained(classifier)
    return [(base, classifier), (stacked, tiny_adapter(stacked, root / "of-experts", **experts))]


_COMMANDS = get_command(app)  # built once: Typer takes longer for it than most commands for their work


def run(*arguments: object) -> dict[str, Any]:
    """Run a command in this process; return its JSON, after checking that an error has a remedy."""
    ended = CliRunner().invoke(_COMMANDS, [*map(str, arguments), "--json"])
    data: dict[str, Any] = json.loads(ended.stdout)
    if ended.exit_code:
        assert ended.exit_code in (1, 2, 3), (ended.exit_code, data, ended.stderr)
        assert data["error"]["remedy"], data
    return data


def run_on_model(command: str, model: Path, sound: Path, site: Site, root: Path) -> dict[str, Any]:
    """Run one of :data:`MODEL_COMMANDS` on ``model``; ``sound`` is the model before its damage."""
    known = {"model": model, "sound": sound, "out": root / "out", "recipe": root / "recipe", "text": site.text,
             "adapter": site.adapter, "coded": site.coded}  # fmt: skip
    return run(*(word.format_map(known) for word in command.split()))


def calibrate(model: Path, text: Path, root: Path, *more: str) -> dict[str, Any]:
    return run("calibrate", "--in", model, "--text", text, "--out", root / "tokens", *FEW.split(), *more)
