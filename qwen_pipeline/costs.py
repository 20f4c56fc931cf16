"""GPU time and cost of the outputs of stages, from their manifests and the prices in the settings."""

from collections.abc import Iterable

from qwen_pipeline.checkpoint.manifest import Manifest
from qwen_pipeline.config.assets import Costs

HOUR = 3600


def gpus_of(manifest: Manifest) -> int:
    """Return the number of GPUs that a stage held while it made an output: the most that any part of it used."""
    spec = manifest.derivation.spec
    device = spec.get("device", manifest.result.get("device"))
    computing = int(spec.get("gpus", 1)) if device == "cuda" else 0
    serving = spec.get("serving") or {}
    ranks = max(serving.get("degrees", ()), default=0) if serving.get("engine") == "vllm" else 0
    return max(computing, ranks)


def gpu_seconds(manifest: Manifest) -> float:
    """Return the seconds of making an output times its GPUs."""
    return manifest.run.seconds * gpus_of(manifest)


def cost(manifests: Iterable[Manifest], prices: Costs) -> float | None:
    """Return the cost of making outputs, or None without prices."""
    if not (prices.machine_hour or prices.gpu_hour):
        return None
    return sum(
        (each.run.seconds * prices.machine_hour + gpu_seconds(each) * prices.gpu_hour) / HOUR for each in manifests
    )
