"""Serve each requested checkpoint at each requested tensor-parallel degree, one server after another."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qwen_pipeline.errors import PipelineError
from qwen_pipeline.evaluation.samples import MAX_NEW_TOKENS
from qwen_pipeline.evaluation.serving.findings import (
    SERVE,
    ServerJob,
    ServerRun,
    ServingFindings,
    ServingPlan,
    first_divergence,
    load_server_run,
)
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.workers.parent import run_worker

_NO_KERNEL = re.compile(r"'_C' object has no attribute '(\w+)'")


def serve_all(
    plan: ServingPlan,
    *,
    models: Mapping[str, Path],
    prompts: Sequence[Sequence[int]],
    expected: Mapping[str, Sequence[Sequence[int]]],
    decode: Callable[[Sequence[int]], str],
    logs: Path,
    observe: Observe = unobserved,
) -> list[ServingFindings]:
    """Serve checkpoints and compare their answers with those of Transformers; a server that fails is a finding.

    Args:
        plan: The checkpoints, the degrees and the engine.
        models: Role -> directory.
        prompts: Token ids of each prompt.
        expected: Role -> tokens of the greedy answer to each prompt; empty if the model did not answer.
        decode: Converts tokens to text.
        logs: Directory for each server's output.
        observe: Called while a server starts, and for each answer.
    """
    found: list[ServingFindings] = []
    for role in plan.models:
        for degree in plan.degrees:
            findings = ServingFindings(role=role, degree=degree, engine=plan.engine)
            if role not in models or not expected.get(role):
                reason = "there are no answers to compare with" if role in models else "there is no such checkpoint"
                found.append(replace(findings, fault=f"not tried, because {reason}"))
                continue
            job = ServerJob(
                root=str(models[role]),
                title=f"serve {findings.name}",
                degree=degree,
                prompts=prompts,
                max_new_tokens=MAX_NEW_TOKENS,
                log=str(logs / f"serve-{role}-{degree}.log"),
                ready_seconds=plan.ready_seconds,
                arguments=plan.arguments,
                module=plan.module,
            )
            try:
                worker = run_worker(plan.python, SERVE, job.to_json(), log=logs / "serving.log", observe=observe)
            except PipelineError as error:
                found.append(replace(findings, fault=str(error)))
            else:
                found.append(_compared(findings, load_server_run(worker.value), expected[role], decode))
    return found


def _compared(
    findings: ServingFindings,
    run: ServerRun,
    expected: Sequence[Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> ServingFindings:
    if run.fault:
        return replace(findings, ready=run.ready, fault=run.fault, lacking=_lacking(run.fault))
    return replace(
        findings,
        ready=True,
        texts=tuple(decode(answer.tokens) for answer in run.answers),
        expected=tuple(map(decode, expected)),
        tokens=tuple(map(len, expected)),
        partings=tuple(first_divergence(answer, tokens) for answer, tokens in zip(run.answers, expected, strict=True)),
    )


def _lacking(fault: str) -> str | None:
    """Return the kernel that the engine lacks on this machine, or None if a kernel is not the cause."""
    kernel = _NO_KERNEL.search(fault)
    if kernel is None:
        return None
    return f"the engine has no kernel {kernel[1]}" + (
        "" if has_avx512() else ", which needs AVX512, and this CPU does not have it"
    )


def has_avx512() -> bool:
    """Return whether the CPU has AVX512, which vLLM for CPUs needs for GPTQ codes; True if /proc/cpuinfo is absent."""
    cpu = Path("/proc/cpuinfo")
    return not cpu.is_file() or "avx512f" in cpu.read_text()
