"""Assets whose steps ask for what they need, in the words of each engine, and the executor that reads them."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import dagster as dg

from qwen_pipeline.config import Settings
from qwen_pipeline.config.execution import Execution, ExecutionKind, Step
from qwen_pipeline.defs.execution.needs import Needs, step_needs
from qwen_pipeline.errors import EnvironmentFault

STEPS: Mapping[str, Step] = {
    "base_model": "read",
    "fine_tune": "read",
    "inbox": "read",
    "imported_checkpoint": "read",
    "lineage_audit": "read",
    "retention": "read",
    "merged_checkpoint": "merge",
    "otherwise_merged_checkpoint": "merge",
    "padded_checkpoint": "pad",
    "merged_and_padded_checkpoints": "pad",
    "calibration_tokens": "calibrate",
    "quantized_checkpoint": "quantize",
    "unpadded_quantized_checkpoint": "quantize",
    "validated_checkpoint": "validate",
    "published_checkpoint": "publish",
    "production_release": "publish",
    "repaired_checkpoint": "repair",
}
"""Name of an asset's op -> the step."""
RETRY_SECONDS = 30
_SHARED_MEMORY = "shared-memory"
"""Volume for the ranks of a serving engine: they exchange tensors through files in memory."""

Tags = Mapping[str, Any]


def placed(assets: Sequence[dg.AssetsDefinition], settings: Settings) -> list[dg.AssetsDefinition]:
    """Return the assets with the needs of their steps as op tags of the engine; those of ``local`` are unchanged.

    Dagster takes op tags only where an asset is defined, so that the op of each is defined again.

    Raises:
        InputRefused: The needs of a step are not known.
    """
    execution = settings.execution
    if execution.kind == "local":
        return list(assets)
    needs, tags_of = step_needs(settings), _TAGS[execution.kind]
    policy = dg.RetryPolicy(max_retries=execution.retries, delay=RETRY_SECONDS) if execution.retries else None
    return [_redefined(asset, tags_of(STEPS[asset.op.name], needs, execution), policy) for asset in assets]


def _redefined(asset: dg.AssetsDefinition, tags: Tags, policy: dg.RetryPolicy | None) -> dg.AssetsDefinition:
    op = asset.op
    again = dg.OpDefinition(
        compute_fn=op.compute_fn,
        name=op.name,
        ins={each.name: dg.In.from_definition(each) for each in op.input_defs},
        outs={each.name: dg.Out.from_definition(each) for each in op.output_defs},
        description=op.description,
        config_schema=op.config_schema,
        required_resource_keys=set(op.required_resource_keys),
        tags={**op.tags, **{name: json.dumps(value) for name, value in tags.items()}},
        code_version=op.version,
        retry_policy=policy,
        pool=op.pool,
    )
    attributes: dict[str, Any] = {**asset.get_attributes_dict(), "node_def": again}
    return dg.AssetsDefinition(**attributes)


def _ray_tags(step: Step, needs: Mapping[Step, Needs], _: Execution) -> Tags:
    need = needs[step]
    return {"dagster-ray/config": {"num_cpus": need.cores, "num_gpus": need.gpus, "memory": need.memory_bytes}}


def _kubernetes_tags(step: Step, needs: Mapping[Step, Needs], execution: Execution) -> Tags:
    """Return the tag for a job of one pod. Memory is limited to what is requested; cores are not limited."""
    need, kubernetes = needs[step], execution.kubernetes
    memory = f"{need.memory_bytes // 10**6}M"
    gpus = {"nvidia.com/gpu": str(need.gpus)} if need.gpus else {}
    container: dict[str, Any] = {
        "resources": {
            "requests": {"cpu": str(need.cores), "memory": memory, **gpus},
            "limits": {"memory": memory, **gpus},
        }
    }
    pod: dict[str, Any] = {}
    if step in kubernetes.images:
        container["image"] = kubernetes.images[step]
    if need.gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        if kubernetes.gpu_node_selector:
            pod["node_selector"] = dict(kubernetes.gpu_node_selector)
    if need.gpus > 1:
        container["volume_mounts"] = [{"name": _SHARED_MEMORY, "mount_path": "/dev/shm"}]  # noqa: S108
        pod["volumes"] = [{"name": _SHARED_MEMORY, "empty_dir": {"medium": "Memory"}}]
    job = {"active_deadline_seconds": kubernetes.deadline_hours * 3600, "ttl_seconds_after_finished": 86400}
    return {"dagster-k8s/config": {"container_config": container, "pod_spec_config": pod, "job_spec_config": job}}


_TAGS: Mapping[ExecutionKind, Callable[[Step, Mapping[Step, Needs], Execution], Tags]] = {
    "ray": _ray_tags,
    "kubernetes": _kubernetes_tags,
}


def executor_of(execution: Execution) -> dg.ExecutorDefinition:
    """Return the executor of all jobs.

    On one machine the steps of a run share its process: they follow each other, engines have processes of their own
    anyway, and a new process for each of eight steps would import Dagster and torch eight times.

    Raises:
        EnvironmentFault: The integration is not installed.
    """
    match execution.kind:
        case "local":
            return dg.in_process_executor
        case "ray":
            # Resources of the executor would replace those of the op, so it has none.
            ray = {"address": execution.ray.address, "env_vars": list(execution.ray.env_vars)}
            return _integration("dagster_ray", "ray").ray_executor.configured({"ray": ray, "retries": {"enabled": {}}})
        case "kubernetes":
            limit = execution.kubernetes.max_concurrent
            config = {"retries": {"enabled": {}}, **({"max_concurrent": limit} if limit else {})}
            return _integration("dagster_k8s", "kubernetes").k8s_job_executor.configured(config)


def _integration(module: str, extra: ExecutionKind) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise EnvironmentFault(
            f"execution.kind is {extra!r}, but {module} cannot be imported: {error}.",
            remedy=f"pip install 'qwen-pipeline[{extra}]', or set execution.kind to 'local'.",
        ) from error
