"""The inputs that the settings name: base model, calibration and held-out text, and the quantizer's environment."""

from pathlib import Path

from qwen_pipeline.config.file import config_file
from qwen_pipeline.config.loading import require_setting
from qwen_pipeline.config.settings import Settings
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.lineage.sign import load_key
from qwen_pipeline.lineage.verification.envelopes import PublicKey, SigningKey, load_public_key
from qwen_pipeline.models.hub import find_base, load_config
from qwen_pipeline.qwen.geometry import require_towers
from qwen_pipeline.qwen.tensor_parallel.plan import plan_for
from qwen_pipeline.workers.environments import WorkerEnvironment, find_environment


def base_model_name(settings: Settings) -> str:
    """Return the setting ``base_model``: a directory or a hub id.

    Raises:
        InputRefused: It is missing.
    """
    return require_setting(settings.base_model, "base_model", '"Qwen/Qwen2.5-7B-Instruct"')


def base_model_path(settings: Settings) -> Path:
    """Return the directory of the base model, which is downloaded from the hub if it is not cached."""
    return find_base(base_model_name(settings), revision=settings.base_revision, relative_to=config_file().parent)


def calibration_source(settings: Settings) -> str:
    """Return the source of the calibration text; a dataset is not looked up here.

    Raises:
        InputRefused: The setting is missing, or is an absolute path that does not exist.
    """
    source = require_setting(settings.calibration.source, "calibration", '"calibration.jsonl"')
    if Path(source).is_absolute() and not Path(source).exists():
        raise InputRefused(
            f"The setting calibration names {source}, which does not exist.", remedy="Correct the setting."
        )
    return source


def held_out_text(settings: Settings) -> Path:
    """Return the file or directory of the held-out text.

    Raises:
        InputRefused: The setting is missing, or names a path that does not exist.
    """
    file = require_setting(settings.validation.text, "validation.text", '"held-out.txt"')
    if not file.exists():
        raise InputRefused(
            f"The setting validation.text names {file}, which does not exist.", remedy="Correct the setting."
        )
    return file


def quantizer_environment(settings: Settings) -> WorkerEnvironment:
    return find_environment(settings.quantization.environment, settings.engine_python())


def signing_key(settings: Settings) -> SigningKey | None:
    """Return the key that signs releases, their pointers and approvals; None if they are not signed.

    Raises:
        InputRefused: The key or its certificate cannot be used: see :func:`~qwen_pipeline.lineage.sign.load_key`.
        EnvironmentFault: ``cryptography`` is not installed.
    """
    signing = settings.signing
    return load_key(signing.key, signing.certificate) if signing.key else None


def trusted_keys(settings: Settings) -> list[PublicKey] | None:
    """Return the keys of which one must have signed a statement about a release; None if none has to.

    Raises:
        InputRefused: A key cannot be read.
        EnvironmentFault: ``cryptography`` is not installed.
    """
    signing = settings.signing
    trusted = [load_public_key(file) for file in signing.trusted]
    own = signing_key(settings)
    return [own.public, *trusted] if own else trusted or None


def require_ready(settings: Settings) -> None:
    """Check every input before a run, so that a missing one is reported now and not hours later.

    Raises:
        InputRefused: A required setting is missing, names a file that does not exist, or does not fit the base model.
        EnvironmentFault: The environment of a configured engine is not installed.
    """
    base_model_name(settings)
    if settings.quantization.needs_calibration:
        calibration_source(settings)
    held_out_text(settings)
    quantizer_environment(settings)
    settings.serving_plan()
    require_padding(settings)
    settings.task_plan()


def require_padding(settings: Settings) -> None:
    """Check that the base model can be padded as the settings demand.

    Raises:
        InputRefused: Padding helps no target, or the model has no towers.
    """
    padding = settings.padding
    if not (padding.targets or padding.towers):
        return
    name = base_model_name(settings)
    config = load_config(name, revision=settings.base_revision, relative_to=config_file().parent)
    if padding.targets:
        plan_for(config, settings.padding_spec)
    if padding.towers:
        require_towers(config, ranks=settings.padding_spec.ranks)
