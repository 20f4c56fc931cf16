"""``padded + text -> calibration``: the tokens that a model is quantized with, and whether they reach all of it."""

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from qwen_pipeline.checkpoint.digest import digest_files
from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.manifest import LOGS, Derivation
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.errors import listed
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.quantization.calibration import calibration_set
from qwen_pipeline.quantization.calibration.calibration_set import FILE, draw_calibration
from qwen_pipeline.quantization.spec import MIN_EXPERT_TOKENS, CalibrationSpec, Device, default_device
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports
from qwen_pipeline.text.sources import open_text
from qwen_pipeline.workers.parent import run_worker

STAGE = calibration_set.STAGE
CODE_VERSION = "1"
PLOT, EXPERT_TABLE = f"{LOGS}calibration.png", f"{LOGS}expert_tokens.csv"

EXPERTS_REACHED = CheckSpec(
    name="experts_reached", description="The router sends enough calibration tokens to each expert of each layer."
)
CHECKS = (EXPERTS_REACHED,)


def calibrate(
    *,
    source: Path,
    text: str | Path,
    destination: Destination,
    spec: CalibrationSpec,
    all_experts: bool = False,
    min_expert_tokens: int = MIN_EXPERT_TOKENS,
    device: Device | None = None,
    observe: Observe = unobserved,
) -> Artifact:
    """Draw calibration tokens with a model's tokenizer and chat template, and keep them.

    The content digest covers the tokens alone: equal tokens leave what was quantized with them up to date.

    Args:
        source: The checkpoint that will be quantized.
        text: A file of records, a directory, or the name of a dataset: see :mod:`qwen_pipeline.text.sources`.
        destination: Where the tokens go.
        spec: How many tokens, which, and how they are packed.
        all_experts: Whether the engine will give every token to every expert, so that routing does not matter.
        min_expert_tokens: What an expert needs to pass the check.
        device: Where the router of a mixture computes; by default a GPU where there is one.
        observe: Told about each layer of a mixture.

    Raises:
        InputRefused: The text or the tokenizer cannot be used, or there is too little text.
        EnvironmentFault: A library that reads the text is missing, or memory ran out.
    """
    from qwen_pipeline.quantization.calibration.expert_coverage import has_experts

    routed = has_experts(open_checkpoint(source)) and not all_experts
    opened = open_text(text)
    derivation = Derivation(
        stage=STAGE,
        inputs={"source": checkpoint_digest(source, observe=observe), "text": opened.digest()},
        spec={
            **asdict(spec),
            "text": opened.name,
            "all_experts": all_experts,
            "min_expert_tokens": min_expert_tokens,
        },
        code_version=CODE_VERSION,
    )

    def build(partial: Path) -> Built:
        from qwen_pipeline.quantization.calibration.plot import draw_calibration_plot

        drawn = draw_calibration(text, source, spec)
        contents = drawn.save(partial)
        (partial / LOGS).mkdir(exist_ok=True)
        experts, peak = _count(source, partial, device or default_device(), observe) if routed else ({}, 0)
        statistics = drawn.statistics()
        draw_calibration_plot(statistics, experts, min_expert_tokens, partial / PLOT)
        _write_table(experts, partial / EXPERT_TABLE)
        report = check_experts(experts, min_expert_tokens, all_experts=all_experts)
        logs = {path.relative_to(partial).as_posix(): path for path in (partial / LOGS).iterdir()}
        return Built(
            contents=replace(contents, files={**contents.files, **digest_files(logs)}),
            result={
                "statistics": statistics,
                "experts": {str(layer): _summary(tokens) for layer, tokens in experts.items()},
                "lengths": list(drawn.lengths),
                "checks": dump_reports([report]),
            },
            worker_peak_bytes=peak,
        )

    return derive(derivation, destination, build)


def check_experts(experts: Mapping[int, Sequence[int]], least: int, *, all_experts: bool = False) -> CheckReport:
    """Report on :data:`EXPERTS_REACHED`, given layer -> tokens of each expert."""
    starved = [
        (count, f"layer {layer} expert {expert} gets {count}")
        for layer, tokens in experts.items()
        for expert, count in enumerate(tokens)
        if count < least
    ]
    total = sum(map(len, experts.values()))
    if starved:
        worst = listed([which for _, which in sorted(starved)])
        detail = (
            f"{len(starved)} of {total} experts get fewer than {least} tokens: {worst}."
            " Calibrate with more samples, with text that is more like what the model will see, or with all experts"
            " (all_experts gives each of them every token)."
        )
    elif experts:
        detail = f"Each of {total} experts gets at least {least} tokens."
    else:
        detail = "Every expert will get every token." if all_experts else "The model has no experts."
    counts = [count for tokens in experts.values() for count in tokens]
    return CheckReport(
        name=EXPERTS_REACHED.name,
        passed=not starved,
        detail=detail,
        measured=float(min(counts)) if counts else None,
        limit=float(least) if counts else None,
    )


def _count(source: Path, partial: Path, device: Device, observe: Observe) -> tuple[dict[int, list[int]], int]:
    """Count each expert's tokens in a process of its own, which gives all memory back."""
    worker = run_worker(
        Path(sys.executable),
        "qwen_pipeline.quantization.calibration.expert_coverage:measure_coverage",
        {"source": str(source.resolve()), "windows": str((partial / FILE).resolve()), "device": device},
        log=partial / LOGS / "calibrate.log",
        observe=observe,
    )
    return {int(layer): tokens for layer, tokens in worker.value["layers"].items()}, worker.peak_memory_bytes


def _summary(tokens: Sequence[int]) -> dict[str, float]:
    ordered = sorted(tokens)
    return {"least": ordered[0], "median": ordered[len(ordered) // 2], "most": ordered[-1]}


def _write_table(experts: Mapping[int, Sequence[int]], path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("layer", "expert", "tokens"))
        table.writerows(
            (layer, expert, count) for layer, all_of in experts.items() for expert, count in enumerate(all_of)
        )
