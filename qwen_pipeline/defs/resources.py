"""What every step needs: the settings, the places they name, and a way to say how far it is and what went wrong."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from qwen_pipeline.checkpoint.store.destinations import Artifact, CheckpointStore, Slot
from qwen_pipeline.config import Settings, config_file, require_setting
from qwen_pipeline.errors import InputRefused, PipelineError
from qwen_pipeline.models.hub import find_base, load_config
from qwen_pipeline.models.inbox import Inbox
from qwen_pipeline.progress import Observe, Progress, as_lines, unobserved
from qwen_pipeline.qwen.geometry import require_towers
from qwen_pipeline.qwen.tensor_parallel.plan import padding_for
from qwen_pipeline.stages import calibrate, quantize
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.merge_pad import merge_pad
from qwen_pipeline.workers.environments import WorkerEnvironment, find_environment


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The resource of every asset.

    Attributes:
        watch: Sees the same progress as Dagster's log.
        pauses: Seconds to wait before each further attempt of a step after a fault of the machine.
    """

    settings: Settings
    watch: Observe = unobserved
    pauses: tuple[int, ...] = (30, 120)

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.settings.store_root)

    @property
    def inbox(self) -> Inbox:
        return Inbox(self.settings.inbox)

    @property
    def imports(self) -> Inbox:
        return Inbox(self.settings.imports)

    @property
    def base_name(self) -> str:
        return require_setting(self.settings.base_model, "base_model", '"Qwen/Qwen2.5-7B-Instruct"')

    @property
    def base(self) -> Path:
        return find_base(self.base_name, revision=self.settings.base_revision, beside=config_file().parent)

    @property
    def calibration_text(self) -> str:
        """A source of text: what is a path is there, what is a dataset is not looked up yet."""
        source = require_setting(self.settings.calibration.source, "calibration", '"calibration.jsonl"')
        if Path(source).is_absolute() and not Path(source).exists():
            raise InputRefused(f"The setting calibration names {source}, which is not there.", remedy="Correct it.")
        return source

    @property
    def text(self) -> Path:
        return _require_file(self.settings.validation.text, "validation.text", "held-out.txt")

    @property
    def engine(self) -> WorkerEnvironment:
        return find_environment(self.settings.quantization.environment, self.settings.engine_python())

    def require_ready(self) -> None:
        """Raise now what a setting or an environment that is missing would raise hours later."""
        for needed in ("base_name", "calibration_text", "text", "engine"):
            getattr(self, needed)
        self.settings.serving_plan()
        padding = self.settings.padding
        if padding.targets or padding.towers:
            config = load_config(self.base_name, revision=self.settings.base_revision, beside=config_file().parent)
            if padding.targets:
                padding_for(config, padding.targets, group_size=self.settings.quantization.group_size)
            if padding.towers:
                require_towers(config, ranks=self.settings.padding_spec.ranks)
        self.settings.task_plan()

    def slot(self, context: dg.AssetExecutionContext) -> Slot:
        return self.store.slot(context.partition_key)

    def latest(self, context: dg.AssetExecutionContext, stage: str) -> Artifact:
        """What a stage upstream last made of the context's fine-tune."""
        return self.store.require_latest(stage, context.partition_key)

    def merged(self, context: dg.AssetExecutionContext, observe: Observe) -> Artifact:
        """Merge the context's fine-tune; where merged weights are not stored, pad it in the same pass."""
        settings, slot = self.settings, self.slot(context)
        fine_tune = self.inbox.require(context.partition_key).path
        base_names = (self.base_name, *settings.base_names)
        hard_links = settings.store.hard_links
        if settings.store.merged:
            return merge(
                base=self.base,
                fine_tune=fine_tune,
                destination=slot,
                base_names=base_names,
                base_revision=settings.base_revision,
                hard_links=hard_links,
                observe=observe,
            )
        recipe, _ = merge_pad(
            base=self.base,
            fine_tune=fine_tune,
            merged=slot,
            padded=slot,
            base_names=base_names,
            base_revision=settings.base_revision,
            spec=settings.padding_spec,
            hard_links=hard_links,
            observe=observe,
        )
        return recipe

    def quantized(
        self, context: dg.AssetExecutionContext, observe: Observe, *, source: str, stage: str = quantize.STAGE
    ) -> Artifact:
        """Quantize what the stage ``source`` last made of the context's fine-tune, on its calibration tokens."""
        return quantize.quantize(
            source=self.latest(context, source).path,
            destination=self.slot(context),
            calibration=self.latest(context, calibrate.STAGE).path,
            spec=self.settings.quantization,
            engine=self.engine,
            stage=stage,
            observe=observe,
        )

    @contextmanager
    def step(self, context: dg.AssetExecutionContext) -> Generator[Observe, None, None]:
        """Run a stage: its progress goes to the log, its named faults become Dagster's failures.

        Only a fault that another attempt may not meet again is retried.
        """
        say = as_lines(context.log.info)

        def observe(progress: Progress) -> None:
            say(progress)
            self.watch(progress)

        try:
            yield observe
        except PipelineError as fault:
            if fault.retryable and context.retry_number < len(self.pauses):
                context.log.warning(str(fault))
                pause = self.pauses[context.retry_number]
                raise dg.RetryRequested(len(self.pauses), seconds_to_wait=pause) from fault
            raise dg.Failure(
                description=str(fault),
                metadata={"fault": type(fault).__name__, "what": fault.what, "remedy": fault.remedy},
                allow_retries=False,
            ) from fault


def _require_file(path: Path | None, key: str, example: str) -> Path:
    file = require_setting(path, key, f'"{example}"')
    if not file.is_file():
        raise InputRefused(f"The setting {key} names {file}, which is not a file.", remedy="Correct it.")
    return file
