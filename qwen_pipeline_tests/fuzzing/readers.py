"""The readers of outside bytes: sound files of each kind, and the function that reads one."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen_pipeline.checkpoint.config_types import load_config_file
from qwen_pipeline.checkpoint.files import load_json, load_toml
from qwen_pipeline.checkpoint.lazy import CONFIG, INDEX, MANIFEST, open_checkpoint
from qwen_pipeline.checkpoint.manifest import (
    Contents,
    Derivation,
    FileDigest,
    Manifest,
    RunFigures,
    dump_manifest,
    open_manifest,
)
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec, header_bytes, open_safetensors
from qwen_pipeline.config.loading import settings_from_values
from qwen_pipeline.evaluation.checks import judge
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.report import load
from qwen_pipeline.qwen.geometry import dump_plan, load_plan, plan_padding
from qwen_pipeline.reports import dump_reports, load_reports
from qwen_pipeline.text.reading import RecordUse
from qwen_pipeline.text.record_files import load_records
from qwen_pipeline.text.records import BadRecord, parse_record
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qwen_pipeline.transforms.lora.adapter_set import ADAPTER_SET, open_set
from qwen_pipeline.transforms.lora.settings import lora_settings
from qwen_pipeline_tests.evaluation.example_findings import CONFIG as SIZES
from qwen_pipeline_tests.evaluation.example_findings import GOOD


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A reader of outside bytes.

    Attributes:
        name: The file's name.
        seeds: Sound contents.
        read: Reads the file from its directory.
        prepare: Writes what belongs beside the file.
    """

    name: str
    seeds: Sequence[bytes]
    read: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda root: None  # noqa: ARG005


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"up": 2},
    "alpha_pattern": {"^layers.0": 3}, "trainable_token_indices": {"embed_tokens": [1, 2]}, "use_rslora": False,
    "base_model_name_or_path": "Qwen/Qwen3-8B", "revision": None, "init_lora_weights": True, "modules_to_save": ["a"],
}  # fmt: skip
WEIGHT = "base_model.model.model.layers.0.self_attn.q_proj"
PADDING = {"field": "intermediate_size", "live": 1, "padded": 2}
HEADERS = [
    header_bytes({"a": TensorSpec(dtype="F32", shape=(2, 3)), "b": TensorSpec(dtype="BF16", shape=())}) + bytes(26),
    header_bytes({f"model.layers.{n}.x": TensorSpec(dtype="I8", shape=(n,)) for n in range(9)}) + bytes(36),
]
TOML = b"""base_model = "Qwen/Qwen3-8B"
owners = ["team:models"]
[calibration]
source = "a.jsonl"
max_skipped = 0.1
template_arguments = {enable_thinking = false}
[padding]
targets = {vllm = [2, 4]}
[quantization]
bits = 4
group_size = 32
[validation]
prompts = ["a"]
limits = {max_mean_kl = 0.1}
"""
RECORDS = b"\n".join(
    map(
        _json,
        (
            {"text": "Some words."},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "tools": "[]"},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f"}'}]},
            {"instruction": "Add.", "input": "1", "output": "3", "history": [["a", "b"]]},
            {"prompt": [{"role": "user", "content": "a"}], "chosen": [], "rejected": []},
        ),
    )
)
ARRAY = b"[" + RECORDS.replace(b"\n", b",") + b"]"


def _manifest() -> bytes:
    contents = Contents(tensors={}, files={"config.json": FileDigest(bytes=2, sha256="0" * 64)})
    result = {
        "checks": dump_reports(judge(GOOD, Limits())),
        "padding": dump_plan(plan_padding(SIZES, group_size=32, tensor_parallel=2)),
        "records": RecordUse(used=3, skipped={"x": 1}).to_json(),
    }
    return dump_manifest(
        Manifest(
            derivation=Derivation(stage="padded", inputs={"source": "sha256:1"}, spec={"a": 1}, code_version="1"),
            contents=contents,
            content_digest=contents.digest,
            result=result,
            run=RunFigures(
                seconds=1, peak_memory_bytes=1, added_memory_bytes=1, read_bytes=1, written_bytes=1, started="now",
                environment={"python": "3"},
            ),
        )
    )  # fmt: skip


def _read_manifest(file: Path) -> object:
    manifest = open_manifest(file.parent)
    if (padding := manifest.result.get("padding")) is not None:
        load_plan(padding)
    return load_reports(manifest.result), RecordUse.from_json(manifest.result.get("records"))


def _read_report(file: Path) -> object:
    return load._parse(file.parent, file.read_bytes(), load._REPORT)  # pyright: ignore[reportPrivateUsage]


def _read_records(file: Path) -> object:
    for record in load_records(file):
        try:
            parse_record(record.fields)
        except BadRecord as bad:
            str(bad).encode()
    return None


def _prepare_shards(root: Path) -> None:
    (root / CONFIG).write_bytes(_json(SIZES))
    for number in (1, 2):
        save_file({f"t{number}": torch.zeros(number)}, root / f"model-0000{number}-of-00002.safetensors")


def _prepare_adapters(root: Path) -> None:
    for name in ("a", "b"):
        (root / name).mkdir()
        (root / name / ADAPTER_CONFIG).write_bytes(_json({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
        save_file(
            {f"{WEIGHT}.lora_A.weight": torch.zeros(2, 4), f"{WEIGHT}.lora_B.weight": torch.zeros(4, 2)},
            root / name / ADAPTER_WEIGHTS,
        )


READERS: Mapping[str, Reader] = {
    "header": Reader(name="model.safetensors", seeds=HEADERS, read=open_safetensors),
    "index": Reader(
        name=INDEX,
        seeds=[_json({"metadata": {}, "weight_map": {f"t{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}})],
        read=lambda file: open_checkpoint(file.parent),
        prepare=_prepare_shards,
    ),
    "config": Reader(
        name=CONFIG,
        seeds=[_json(SIZES), _json({"model_type": "x", "text_config": SIZES, "eos_token_id": [1]})],
        read=load_config_file,
    ),
    "adapter": Reader(
        name=ADAPTER_CONFIG, seeds=[_json(ADAPTER)], read=lambda file: lora_settings(load_json(file), source=file)
    ),
    "adapters": Reader(
        name=ADAPTER_SET,
        seeds=[b'combination_type = "cat"\n[[adapters]]\npath = "a"\nweight = 0.5\n[[adapters]]\npath = "b"\n'],
        read=lambda file: open_set(file.parent),
        prepare=_prepare_adapters,
    ),
    "manifest": Reader(name=MANIFEST, seeds=[_manifest()], read=_read_manifest),
    "report": Reader(
        name=load.REPORT_JSON,
        seeds=[
            _json(
                {
                    "candidate": "sha256:1",
                    "text": "sha256:2",
                    "checks": dump_reports(judge(GOOD, Limits())),
                    "findings": GOOD.to_json(),
                    "lineage": [],
                    "padding": [PADDING],
                    "records": {"used": 1},
                }
            )
        ],
        read=_read_report,
    ),
    "records": Reader(name="text.jsonl", seeds=[RECORDS, ARRAY], read=_read_records),
    "settings": Reader(
        name="qwen_pipeline.toml", seeds=[TOML], read=lambda file: settings_from_values(load_toml(file))
    ),
}


def errors_of(reader: Reader, root: Path) -> Callable[[bytes], Any]:
    """Return a function that reads bytes in a directory, and returns the error that the user would see, if any."""
    from qwen_pipeline.errors import PipelineError

    root.mkdir(parents=True, exist_ok=True)
    reader.prepare(root)
    file = root / reader.name

    def read(data: bytes) -> PipelineError | None:
        file.write_bytes(data)
        try:
            reader.read(file)
        except PipelineError as error:
            return error
        return None

    return read
