"""The section that decides where steps run, and what each of them may take there."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from qwen_pipeline.config.sections import Section

ExecutionKind = Literal["local", "ray", "kubernetes"]
Step = Literal["read", "merge", "pad", "calibrate", "quantize", "validate", "publish", "repair"]
"""The work of an asset: that of its stage, or reading a directory to compute its digest."""


class StepNeeds(Section):
    """The needs of a step; those that are omitted are derived from the base model.

    Attributes:
        cores: Processor cores.
        memory_gb: Memory of the host, in GB of 10^9 bytes.
        gpus: GPUs.
    """

    cores: PositiveInt | None = None
    memory_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    gpus: NonNegativeInt | None = None


class Ray(Section):
    """The Ray cluster that runs steps.

    Attributes:
        address: Address of its dashboard, to which jobs are submitted.
        env_vars: Names of environment variables of the run that steps also get. They are shown in Ray's dashboard:
            give secrets to the environment of the nodes instead.
    """

    address: Annotated[str, Field(pattern=r"https?://\S+")] = "http://127.0.0.1:8265"
    env_vars: tuple[str, ...] = ("DAGSTER_HOME", "QWEN_PIPELINE_CONFIG")


class Kubernetes(Section):
    """The Kubernetes jobs that run steps. Volumes, secrets and the account are those of the run: see Helm's values.

    Attributes:
        images: Image of a step, if it is not that of the code location.
        gpu_node_selector: Labels of nodes for steps that need a GPU.
        max_concurrent: Steps of one run at a time.
        deadline_hours: Time after which a step is ended.
    """

    images: Mapping[Step, str] = Field(default_factory=dict[Step, str])
    gpu_node_selector: Mapping[str, str] = Field(default_factory=dict[str, str])
    max_concurrent: PositiveInt | None = None
    deadline_hours: PositiveInt = 48


class Execution(Section):
    """The place where steps run. It is read when the code location is loaded; a run cannot change it.

    Attributes:
        kind: ``local``: processes of this machine. ``ray``: jobs of a Ray cluster. ``kubernetes``: jobs of Kubernetes.
        retries: Number of times a step is repeated after its node was lost; ``local`` never repeats one for that.
        needs: Step -> what it needs, where the numbers derived from the base model do not fit.
        ray: The Ray cluster.
        kubernetes: The Kubernetes jobs.
    """

    kind: ExecutionKind = "local"
    retries: NonNegativeInt = 2
    needs: Mapping[Step, StepNeeds] = Field(default_factory=dict[Step, StepNeeds])
    ray: Ray = Field(default_factory=Ray)
    kubernetes: Kubernetes = Field(default_factory=Kubernetes)


MACHINE_SETTINGS = ("device", "threads")
"""Settings of a quantization whose defaults are those of the machine that reads them."""


def unpinned(values: Mapping[str, Any]) -> list[str]:
    """Return the settings of the machine that must be given, but are not, where steps run on several machines.

    Each process would take the defaults of its own machine, and both settings are part of a checkpoint's identity.
    """
    execution, quantization = values.get("execution") or {}, values.get("quantization") or {}
    kind = execution.get("kind", "local") if isinstance(execution, Mapping) else execution.kind
    if kind == "local" or not isinstance(quantization, Mapping):
        return []
    if quantization.get("method", "gptq") != "gptq" and not values.get("recipes"):
        return []  # 8-bit floats have neither
    return [f"quantization.{name}" for name in MACHINE_SETTINGS if name not in quantization]
