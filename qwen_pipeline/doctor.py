"""Findings about the machine, the settings and Dagster, each with a remedy: what would stop a run, before it starts."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from qwen_pipeline.checkpoint.files import with_home
from qwen_pipeline.checkpoint.memory_budget import available_memory
from qwen_pipeline.checkpoint.store.products import DEFAULT_RECIPE
from qwen_pipeline.config import Settings, load_settings, settings_of
from qwen_pipeline.config.file import config_file
from qwen_pipeline.config.inputs import (
    base_model_name,
    calibration_source,
    held_out_text,
    quantizer_environment,
    require_padding,
)
from qwen_pipeline.errors import EnvironmentFault, InputRefused, PipelineError, listed
from qwen_pipeline.intake.outlay import estimate
from qwen_pipeline.lineage.sign import load_key
from qwen_pipeline.models.inbox import Inbox
from qwen_pipeline.notifications import missing_secrets
from qwen_pipeline.quantization.spec import default_device, usable_cores
from qwen_pipeline.runner.dagster_home import dagster_home, open_instance

Outcome = Literal["ok", "warning", "failed"]
_LAUNCHED = "SENSOR"
"""The daemon that starts runs of new fine-tunes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: Its name.
        detail: What was found.
        remedy: What to do; empty if there is nothing to do.
    """

    subject: str
    outcome: Outcome
    detail: str
    remedy: str = ""


Look = Callable[[Settings], Finding | str]


def examine() -> Iterator[Finding]:
    """Yield a finding for each subject. Nothing is downloaded, and no engine is imported."""
    yield Finding(subject="machine", outcome="ok", detail=_machine())
    try:
        settings = load_settings()
    except PipelineError as fault:
        yield _failed("settings", fault)
        return
    is_file = config_file().is_file()
    detail = str(config_file()) if is_file else f"{config_file()} does not exist; defaults and environment count."
    yield Finding(subject="settings", outcome="ok" if is_file else "warning", detail=detail)
    for subject, look in _OF_PRODUCTS.items():
        yield from _for_each_product(subject, look, settings)
    for subject, look in _OF_SITE.items():
        yield _look(subject, look, settings)


def _for_each_product(subject: str, look: Look, settings: Settings) -> Iterator[Finding]:
    """Yield what is found with the settings of each base and recipe, once where it is the same with several."""
    found: list[Finding] = []
    for name, own in _products(settings):
        finding = _look(subject, look, own)
        if finding not in found:
            found.append(finding)
            yield replace(finding, subject=f"{subject} ({name})") if name else finding


def _products(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Yield a name for each base with each recipe that may be applied to it, and their settings."""
    defaults = settings.default_recipes or (DEFAULT_RECIPE,)
    for base in settings.bases or (None,):
        if DEFAULT_RECIPE in defaults:
            yield base or "", settings_of(settings, None, base=base)
        for recipe, rule in settings.recipes.items():
            if rule.base in (None, base):
                yield f"{base or ''}@{recipe}", settings_of(settings, recipe, base=base)


def _look(subject: str, look: Look, settings: Settings) -> Finding:
    try:
        found = look(settings)
    except PipelineError as fault:
        return _failed(subject, fault)
    return found if isinstance(found, Finding) else Finding(subject=subject, outcome="ok", detail=found)


def _failed(subject: str, fault: PipelineError) -> Finding:
    return Finding(subject=subject, outcome="failed", detail=fault.what, remedy=fault.remedy)


def _machine() -> str:
    cores, memory = usable_cores(), (available_memory() or 0) / 1e9
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "dagster"))
    return f"Python {platform.python_version()}, {packages}; {cores} cores, {memory:.1f} GB of memory free"


def _device(settings: Settings) -> Finding | str:
    wanted, found = settings.quantization.device, default_device()
    if wanted == found == "cpu":
        return "No GPU: everything is computed in float32 on the CPU."
    if wanted == "cpu":
        return Finding(subject="device", outcome="warning", detail="There is a GPU, and quantization.device is 'cpu'.")
    if found == "cpu":
        raise EnvironmentFault(
            "quantization.device is 'cuda', and this machine has no NVIDIA device (/dev/nvidiactl).",
            remedy="Load the driver, or give the container its GPUs, or set device = 'cpu'.",
        )
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentFault(
            f"There is an NVIDIA device, but torch {torch.__version__} cannot use it.",
            remedy="Install a torch that was built for the driver's CUDA version.",
        )
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return listed([f"{device.name}, {device.total_memory / 1e9:.0f} GB" for device in devices])


def _base(settings: Settings) -> Finding | str:
    name = base_model_name(settings)
    directory = config_file().parent / with_home(Path(name))
    if not directory.is_dir():
        return Finding(
            subject="base_model",
            outcome="ok" if settings.base_revision else "warning",
            detail=f"{name} of the hub, revision {settings.base_revision or 'main, which may change'}",
            remedy="" if settings.base_revision else "Set base_revision to a commit.",
        )
    require_padding(settings)
    return f"{directory}, {_weights(directory) / 1e9:.1f} GB of weights"


def _weights(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _calibration(settings: Settings) -> str:
    if not settings.quantization.needs_calibration:
        return f"{settings.quantization.method} needs none"
    return calibration_source(settings)


def _quantizer(settings: Settings) -> str:
    environment = quantizer_environment(settings)
    versions = ", ".join(f"{package} {number}" for package, number in environment.versions().items())
    return f"{environment.name}: {versions}"


def _serving(settings: Settings) -> str:
    plan = settings.serving_plan()
    return f"{plan.engine} at {', '.join(map(str, plan.degrees))} ranks" if plan else "no engine (validation.serve)"


def _tasks(settings: Settings) -> str:
    plan = settings.task_plan()
    return ", ".join(plan.tasks) if plan else "none (validation.lm_eval)"


def _disk(settings: Settings) -> Finding | str:
    root = next(each for each in (settings.store_root, *settings.store_root.absolute().parents) if each.exists())
    if not os.access(root, os.W_OK):
        raise EnvironmentFault(f"{root} cannot be written.", remedy="Give this user the right to, or move workspace.")
    free = shutil.disk_usage(root).free
    needed = estimate(settings).disk_bytes if settings.base_model else 0
    said = f"{free / 1e9:.1f} GB free at {settings.store_root}"
    if free < needed:
        return Finding(
            subject="disk",
            outcome="failed",
            detail=f"{said}; a fine-tune of this base needs about {needed / 1e9:.1f} GB",
            remedy="Free space, enlarge the disk, or set store.merged and store.padded to false.",
        )
    return f"{said}; a fine-tune needs about {needed / 1e9:.1f} GB" if needed else said


def _inbox(settings: Settings) -> Finding | str:
    if not settings.inbox.is_dir():
        return Finding(
            subject="inbox",
            outcome="warning",
            detail=f"{settings.inbox} does not exist yet.",
            remedy="Make it, so that fine-tunes can be copied into it.",
        )
    obstacles = {arrival.name: arrival.obstacle() for arrival in Inbox(settings.inbox).arrivals()}
    waiting = [f"{name[:60]}: {obstacle}" for name, obstacle in obstacles.items() if obstacle]
    detail = f"{settings.inbox}: {len(obstacles)} fine-tunes"
    if not waiting:
        return detail
    return Finding(
        subject="inbox",
        outcome="warning",
        detail=f"{detail}, {len(waiting)} not usable: {listed(waiting, limit=3)}",
        remedy="Complete or remove them: qwen-pipeline inspect DIR shows what is wrong.",
    )


def _dagster(settings: Settings) -> Finding | str:
    home = dagster_home(settings)
    if not home.is_absolute() or not home.is_dir():
        raise InputRefused(
            f"DAGSTER_HOME is {home}, which is not an existing absolute path.", remedy="Correct or unset the variable."
        )
    with open_instance(settings) as instance:
        storage = type(instance.run_storage).__name__
        statuses = instance.get_daemon_statuses()
        limits = {limit.name: limit.limit for limit in instance.event_log_storage.get_pool_limits()}
    said = f"{home}: {storage}" + (f", pools {limits}" if limits else "")
    if not ((daemon := statuses.get(_LAUNCHED)) and daemon.healthy):
        return Finding(
            subject="dagster",
            outcome="warning",
            detail=f"{said}; no daemon is running, so nothing that arrives is noticed.",
            remedy="Start it: qwen-pipeline ui, or dagster-daemon run with this DAGSTER_HOME.",
        )
    return f"{said}; the daemon is running"


def _signing(settings: Settings) -> str:
    if settings.signing.key is None:
        return "none (signing.key): releases are not signed"
    certificate = settings.signing.certificate
    certified = f", certified by {certificate}" if certificate else ""
    return f"key {load_key(settings.signing.key, certificate).keyid[:16]} of {settings.signing.key}{certified}"


def _notify(settings: Settings) -> str:
    if missing := missing_secrets(settings.notify):
        raise EnvironmentFault(
            f"notify.urls names environment variables that are not set: {', '.join(missing)}.",
            remedy="Set them where Dagster's daemon runs.",
        )
    count = len(settings.notify.urls)
    return f"{count} addresses; qwen-pipeline notify tries them" if count else "none (notify.urls)"


_OF_PRODUCTS: Mapping[str, Look] = {
    "device": _device,
    "base_model": _base,
    "calibration": _calibration,
    "held-out text": lambda settings: str(held_out_text(settings)),
    "quantizer": _quantizer,
    "serving": _serving,
    "tasks": _tasks,
    "disk": _disk,
}
"""Subjects that are looked at with the settings of each base and recipe."""
_OF_SITE: Mapping[str, Look] = {
    "inbox": _inbox,
    "dagster": _dagster,
    "signing": _signing,
    "notifications": _notify,
}
