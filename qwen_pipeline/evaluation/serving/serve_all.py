"""Serve each requested checkpoint at each requested tensor-parallel degree, one server after another."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qwen_pipeline.errors import PipelineError
from qwen_pipeline.evaluation.heads import HeadTask
from qwen_pipeline.evaluation.samples import MAX_NEW_TOKENS
from qwen_pipeline.evaluation.serving.findings import (
    SERVE,
    PoolingTask,
    ServerJob,
    ServerRun,
    ServingFindings,
    ServingPlan,
    first_divergence,
    load_server_run,
)
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.heads import HeadKind
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
    return _serve_each(
        plan,
        models,
        ServerQuestions(prompts=prompts, max_new_tokens=MAX_NEW_TOKENS),
        {role: partial(_compared, expected=answers, decode=decode) for role, answers in expected.items() if answers},
        logs,
        observe,
    )


def serve_heads(
    plan: ServingPlan,
    *,
    models: Mapping[str, Path],
    task: HeadTask,
    texts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[float]],
    logs: Path,
    observe: Observe = unobserved,
) -> list[ServingFindings]:
    """Serve checkpoints with another head, and compare their outputs with those of the merged model.

    Args:
        plan: The checkpoints, the degrees and the engine.
        models: Role -> directory.
        task: Their task.
        texts: Token ids of each text.
        expected: The merged model's outputs, without an activation: a row for each text, or for each of its tokens;
            empty if it has none.
        logs: Directory for each server's output.
        observe: Called while a server starts, and for each text.
    """
    questions = ServerQuestions(prompts=texts, pooling=POOLING_TASKS[task.kind])
    compare = partial(_compared_outputs, expected=expected, task=task)
    return _serve_each(plan, models, questions, dict.fromkeys(models, compare) if expected else {}, logs, observe)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerQuestions:
    """The token ids of what each server is asked, and what for."""

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int = 0
    pooling: PoolingTask | None = None


POOLING_TASKS: Mapping[HeadKind, PoolingTask] = {
    "embedding": "embed",
    "sequence": "classify",
    "token": "token_classify",
}


def _serve_each(
    plan: ServingPlan,
    models: Mapping[str, Path],
    questions: ServerQuestions,
    compare: Mapping[str, Callable[[ServingFindings, ServerRun], ServingFindings]],
    logs: Path,
    observe: Observe,
) -> list[ServingFindings]:
    """Ask a server of each role and degree; ``compare`` has the roles whose answers can be compared."""
    found: list[ServingFindings] = []
    for role in plan.models:
        for degree in plan.degrees:
            findings = ServingFindings(role=role, degree=degree, engine=plan.engine)
            if role not in models or role not in compare:
                reason = "there are no answers to compare with" if role in models else "there is no such checkpoint"
                found.append(replace(findings, fault=f"not tried, because {reason}"))
                continue
            job = ServerJob(
                root=str(models[role]),
                title=f"serve {findings.name}",
                degree=degree,
                prompts=questions.prompts,
                max_new_tokens=questions.max_new_tokens,
                log=str(logs / f"serve-{role}-{degree}.log"),
                ready_seconds=plan.ready_seconds,
                arguments=plan.arguments,
                module=plan.module,
                pooling=questions.pooling,
            )
            try:
                worker = run_worker(plan.python, SERVE, job.to_json(), log=logs / "serving.log", observe=observe)
            except PipelineError as error:
                found.append(replace(findings, fault=str(error)))
                continue
            run = load_server_run(worker.value)
            if run.fault:
                found.append(replace(findings, ready=run.ready, fault=run.fault, lacking=_lacking(run.fault)))
            else:
                found.append(compare[role](replace(findings, ready=True), run))
    return found


def _compared(
    findings: ServingFindings,
    run: ServerRun,
    *,
    expected: Sequence[Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> ServingFindings:
    return replace(
        findings,
        texts=tuple(decode(answer.tokens) for answer in run.answers),
        expected=tuple(map(decode, expected)),
        tokens=tuple(map(len, expected)),
        partings=tuple(first_divergence(answer, tokens) for answer, tokens in zip(run.answers, expected, strict=True)),
    )


def _compared_outputs(
    findings: ServingFindings, run: ServerRun, *, expected: Sequence[Sequence[float]], task: HeadTask
) -> ServingFindings:
    from torch import float64, tensor  # here, since the command line imports this module

    from qwen_pipeline.evaluation.logits.heads import compare_outputs

    shapes = [(len(rows), *{len(row) for row in rows}) for rows in (run.outputs, expected)]
    if shapes[0] != shapes[1]:
        return replace(findings, fault=f"outputs and values are {shapes[0]}, expected {shapes[1]}")
    ours, reference = (tensor(rows, dtype=float64) for rows in (run.outputs, expected))
    return replace(findings, head=compare_outputs(ours, reference, task))


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
