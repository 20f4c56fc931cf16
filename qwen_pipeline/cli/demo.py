"""``qwen-pipeline demo``: run a small base and fine-tune through the sensor and the graph, then in the wrong order."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.panel import Panel

from qwen_pipeline.checkpoint.store.destinations import Artifact, Directory
from qwen_pipeline.cli.results import CommandResult
from qwen_pipeline.cli.tables import artifact_data, artifact_table, check_table
from qwen_pipeline.config import Settings, config_file, load_settings
from qwen_pipeline.demo.base import GROUP_SIZE, TENSOR_PARALLEL, build_base
from qwen_pipeline.demo.fine_tune import train_adapter
from qwen_pipeline.demo.texts import write_texts
from qwen_pipeline.errors import InputRefused, QuantizedInputRefused
from qwen_pipeline.models.hub import find_base
from qwen_pipeline.progress import Observe, Progress

FINE_TUNE = "python-tutor"
_FIRST_LINE = "# Written by `qwen-pipeline demo`. Change it for a model of your own; see docs/operations.md."


def run_demo(*, base: str | None, observe: Observe) -> CommandResult:
    """Build or find a base, fine-tune it, let the sensor find the upload, run the graph, then try the wrong order.

    Raises:
        InputRefused: ``qwen_pipeline.toml`` of this directory was not written by the demo.
    """
    from qwen_pipeline.runner.headless import evaluate_inbox_sensor, run_fine_tune

    settings = _write_settings(base)
    home = settings.workspace / "demo"
    built = [] if base else [build_base(home / "base", observe=observe)]
    model = find_base(base) if base else built[0].path
    texts = write_texts(home)
    settings.inbox.mkdir(parents=True, exist_ok=True)
    train_adapter(base=model, texts=texts.training, out=settings.inbox / FINE_TUNE, observe=observe)
    ticks = evaluate_inbox_sensor(settings)
    for tick, remark in enumerate(ticks, 1):
        observe(Progress(task="inbox", done=tick, total=len(ticks), remark=remark))
    outcome = run_fine_tune(settings, FINE_TUNE, observe=observe)
    artifacts = [*built, *outcome.artifacts]
    if outcome.fault:
        return CommandResult(data=_data(artifacts), view=_results(artifacts), fault=outcome.fault)
    refusal = _wrong_order(settings, artifacts)
    return CommandResult(
        data={**_data(artifacts), "wrong_order": {"what": refusal.what, "remedy": refusal.remedy}},
        view=[*_results(artifacts), _refusal_panel(refusal), _next_steps(artifacts)],
    )


def _write_settings(base: str | None) -> Settings:
    file = config_file()
    if file.exists() and not file.read_bytes().startswith(_FIRST_LINE.encode()):
        raise InputRefused(
            f"{file} was not written by the demo, which would overwrite it.",
            remedy="Run the demo in another directory.",
        )
    file.write_text(_settings_text(base))
    return load_settings()


def _settings_text(base: str | None) -> str:
    return f"""{_FIRST_LINE}
workspace = "workspace"
base_model = {json.dumps(base or "workspace/demo/base")}
calibration = "workspace/demo/calibration.jsonl"
owners = ["team:demo"]

[padding]
tensor_parallel = {2 if base else TENSOR_PARALLEL}

[quantization]
bits = 4
group_size = {GROUP_SIZE}
recipe = "fast"
samples = 24
seq_len = 512

[validation]
text = "workspace/demo/held_out.jsonl"
"""


def _wrong_order(settings: Settings, artifacts: Sequence[Artifact]) -> QuantizedInputRefused:
    """Try to pad the checkpoint that is already quantized, and return the refusal."""
    from qwen_pipeline.stages import pad, quantize

    quantized = _stage(artifacts, quantize.STAGE)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            pad.pad(
                source=quantized.path,
                destination=Directory(Path(scratch) / "padded"),
                spec=settings.padding_spec,
            )
        except QuantizedInputRefused as refusal:
            return refusal
    raise AssertionError("a quantized checkpoint was padded")


def _stage(artifacts: Sequence[Artifact], stage: str) -> Artifact:
    return next(artifact for artifact in artifacts if artifact.manifest.derivation.stage == stage)


def _perplexity(artifacts: Sequence[Artifact]) -> dict[str, float]:
    """Return stage -> perplexity of its model on held-out text, as measured by validation."""
    results = (artifact.manifest.result for artifact in artifacts)
    models = next((result["findings"]["models"] for result in results if "findings" in result), {})
    return {role: figures["perplexity"] for role, figures in models.items()}


def _data(artifacts: Sequence[Artifact]) -> dict[str, Any]:
    return {
        "fine_tune": FINE_TUNE,
        "stages": [artifact_data(artifact) for artifact in artifacts],
        "perplexity": _perplexity(artifacts),
    }


def _results(artifacts: Sequence[Artifact]) -> list[RenderableType]:
    return [artifact_table(artifacts, _perplexity(artifacts)), check_table(artifacts)]


def _refusal_panel(refusal: QuantizedInputRefused) -> Panel:
    return Panel(str(refusal), title="In the wrong order: quantize, then pad", title_align="left")


def _next_steps(artifacts: Sequence[Artifact]) -> str:
    from qwen_pipeline.stages import publish, validate

    release, report = (_stage(artifacts, stage).path for stage in (publish.STAGE, validate.STAGE))
    return f"Released:  {release}\nReport:    {report}/report.md\nThe UI:    make ui, then http://127.0.0.1:3000"
