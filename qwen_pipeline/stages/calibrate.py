"""``padded + text -> calibration``: the tokens on which a model is calibrated, and their number at each expert."""

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.digest import digest_files
from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.checkpoint.manifest import Contents, Derivation
from qwen_pipeline.checkpoint.store.canonical import LOGS
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.errors import listed
from qwen_pipeline.models.open import open_model
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.quantization.calibration import calibration_set
from qwen_pipeline.quantization.calibration.calibration_set import (
    FILE,
    CalibrationSet,
    draw_calibration,
    require_vocabulary,
)
from qwen_pipeline.quantization.calibration.spec import MIN_EXPERT_TOKENS, CalibrationSpec
from qwen_pipeline.quantization.spec import Device, default_device
from qwen_pipeline.qwen.settle import require_settled
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports
from qwen_pipeline.text.bounded_tokenizer import prepare_tokenizers
from qwen_pipeline.text.reading import RECORDS_USED
from qwen_pipeline.text.sources import open_text
from qwen_pipeline.text.spec import DEFAULT_TEXT_SPEC, TextSpec
from qwen_pipeline.transforms.tokenizer_fits import embedding_rows
from qwen_pipeline.workers.parent import run_worker

STAGE = calibration_set.STAGE
CODE_VERSION = "2"
PLOT, EXPERT_TABLE = f"{LOGS}calibration.png", f"{LOGS}expert_tokens.csv"

EXPERTS_REACHED = CheckSpec(
    name="experts_reached", description="The router sends enough calibration tokens to each expert of each layer."
)
CHECKS = (RECORDS_USED, EXPERTS_REACHED)


def calibrate(
    *,
    source: Path,
    text: str | Path,
    destination: Destination | Path,
    spec: CalibrationSpec,
    text_spec: TextSpec = DEFAULT_TEXT_SPEC,
    all_experts: bool = False,
    min_expert_tokens: int = MIN_EXPERT_TOKENS,
    device: Device | None = None,
    observe: Observe = unobserved,
) -> Artifact:
    """Draw calibration tokens with a model's tokenizer and chat template, and save them.

    The content digest covers only the tokens: while they are equal, checkpoints quantized with them stay up to date.

    Args:
        source: The checkpoint that will be quantized.
        text: A file of records, a directory, or the name of a dataset: see :mod:`qwen_pipeline.text.sources`.
        destination: The output directory.
        spec: Number, length and selection of the windows.
        text_spec: The share of records that may be skipped, and arguments of the chat template.
        all_experts: Whether the quantizer will calibrate every expert on every token, regardless of the router.
        min_expert_tokens: Tokens that each expert must receive to pass the check.
        device: Device on which the routers of a mixture are computed; by default a GPU if there is one.
        observe: Receives progress for each layer of a mixture.

    Raises:
        InputRefused: The text or the tokenizer cannot be used, or there is too little text.
        EnvironmentFault: A library that reads the text is missing, or memory ran out.
    """
    from qwen_pipeline.quantization.calibration.expert_coverage import has_experts

    checkpoint = open_model(source)
    is_mixture = has_experts(require_settled(checkpoint))
    opened = open_text(text)
    inputs = {"source": checkpoint_digest(source, observe=observe), "text": opened.digest()}
    settings = {"text": opened.name, "all_experts": all_experts, "min_expert_tokens": min_expert_tokens}
    settings |= asdict(spec) | text_spec.to_json()
    derivation = Derivation(stage=STAGE, inputs=inputs, spec=settings, code_version=CODE_VERSION)

    def build(partial: Path) -> Built:
        prepare_tokenizers()
        drawn = draw_calibration(text, source, spec, text_spec=text_spec)
        require_vocabulary(drawn, embedding_rows(checkpoint))
        contents = drawn.save(partial)
        (partial / LOGS).mkdir(exist_ok=True)
        experts, peak = dict[int, list[int]](), 0
        on = device or default_device() if is_mixture and not all_experts else None
        if on:
            experts, peak = _count_expert_tokens(source, partial, on, observe)
        _write_logs(partial, drawn.statistics(), experts, min_expert_tokens)
        reports = [drawn.records.report(), check_experts(experts, min_expert_tokens, is_mixture=is_mixture)]
        result = _result(drawn, experts, reports) | ({"device": on} if on else {})
        return Built(contents=_with_logs(contents, partial), result=result, worker_peak_bytes=peak)

    return derive(derivation, destination, build)


def check_experts(experts: Mapping[int, Sequence[int]], least: int, *, is_mixture: bool = True) -> CheckReport:
    """Report on :data:`EXPERTS_REACHED`.

    Args:
        experts: Layer -> tokens of each expert; empty if every expert gets every token.
        least: Tokens that each expert must receive.
        is_mixture: Whether the model has experts.
    """
    if not is_mixture:
        return EXPERTS_REACHED.skipped("The model has no experts.")
    if not experts:
        return EXPERTS_REACHED.report(passed=True, detail="Every expert will get every token.")
    too_few = [
        (count, f"layer {layer} expert {expert} gets {count}")
        for layer, tokens in experts.items()
        for expert, count in enumerate(tokens)
        if count < least
    ]
    total = sum(map(len, experts.values()))
    detail = f"Each of {total} experts gets at least {least} tokens."
    if too_few:
        worst = listed([description for _, description in sorted(too_few)])
        detail = (
            f"{len(too_few)} of {total} experts get fewer than {least} tokens: {worst}."
            " Calibrate with more samples, with text closer to the model's use, or with all experts"
            " (all_experts gives each of them every token)."
        )
    fewest = min(count for tokens in experts.values() for count in tokens)
    return EXPERTS_REACHED.report(passed=not too_few, detail=detail, measured=float(fewest), limit=float(least))


def _count_expert_tokens(
    source: Path, partial: Path, device: Device, observe: Observe
) -> tuple[dict[int, list[int]], int]:
    """Count the tokens of each expert in a process of its own, so that all memory is released.

    Returns:
        Layer -> tokens of each expert, and the peak memory of the process in bytes.
    """
    worker = run_worker(
        Path(sys.executable),
        "qwen_pipeline.quantization.calibration.expert_coverage:measure_coverage",
        {"source": str(source.resolve()), "windows": str((partial / FILE).resolve()), "device": device},
        log=partial / LOGS / "calibrate.log",
        observe=observe,
    )
    return {int(layer): tokens for layer, tokens in worker.value["layers"].items()}, worker.peak_memory_bytes


def _result(
    drawn: CalibrationSet, experts: Mapping[int, Sequence[int]], reports: Sequence[CheckReport]
) -> dict[str, Any]:
    return {
        "statistics": drawn.statistics(),
        "experts": {str(layer): _summary(tokens) for layer, tokens in experts.items()},
        "lengths": list(drawn.lengths),
        "records": drawn.records.to_json(),
        "checks": dump_reports(reports),
    }


def _summary(tokens: Sequence[int]) -> dict[str, float]:
    ordered = sorted(tokens)
    return {"least": ordered[0], "median": ordered[len(ordered) // 2], "most": ordered[-1]}


def _write_logs(
    partial: Path, statistics: Mapping[str, Any], experts: Mapping[int, Sequence[int]], min_expert_tokens: int
) -> None:
    """Write the plot, and the table of the tokens of each expert."""
    from qwen_pipeline.quantization.calibration.plot import draw_calibration_plot

    draw_calibration_plot(statistics, experts, min_expert_tokens, partial / PLOT)
    with (partial / EXPERT_TABLE).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("layer", "expert", "tokens"))
        table.writerows(
            (layer, expert, count) for layer, tokens in experts.items() for expert, count in enumerate(tokens)
        )


def _with_logs(contents: Contents, partial: Path) -> Contents:
    logs = {path.relative_to(partial).as_posix(): path for path in (partial / LOGS).iterdir()}
    return replace(contents, files={**contents.files, **digest_files(logs)})
