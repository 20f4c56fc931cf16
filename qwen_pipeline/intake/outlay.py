"""The disk that a product takes from its merge to its release, and the part of it that is written already."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.store.products import product
from qwen_pipeline.config import Settings, config_file
from qwen_pipeline.config.inputs import base_model_name
from qwen_pipeline.errors import PipelineError
from qwen_pipeline.intake.placement import settings_of_product
from qwen_pipeline.models.hub import cached_base
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.tensor_parallel.plan import quantized_bytes, weight_count
from qwen_pipeline.stages.merge_pad import estimate_resources

COPIES = 2
"""Quantized checkpoints that exist at once: codes and their packed form, later the packed form and the release."""
_BLOCK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlay:
    """Bytes that a product takes.

    Attributes:
        read_bytes: Weights of its base.
        disk_bytes: All outputs of its stages, if none is reused and the file system has no reflinks.
    """

    read_bytes: int = 0
    disk_bytes: int = 0


@dataclass(slots=True)
class Outlays:
    """The outlays of products, each pair of base and recipe estimated once, with the numbers of ``plan``."""

    settings: Settings
    known: dict[tuple[str, str | None], Outlay] = field(default_factory=dict[tuple[str, str | None], Outlay])

    def of(self, key: str) -> Outlay:
        """Return the outlay of a product; an empty one if its base is not here or not known."""
        try:
            own = settings_of_product(self.settings, key)
            pair = base_model_name(own), product(key).recipe
            if pair not in self.known:
                self.known[pair] = estimate(own)
        except (PipelineError, OSError):  # the run will say so
            return Outlay()
        return self.known[pair]


def estimate(settings: Settings) -> Outlay:
    """Return the outlay of a product with these settings; an empty one if the weights of its base are not here.

    Raises:
        InputRefused: No base is set, or it cannot be opened.
    """
    name = base_model_name(settings)
    root = cached_base(name, revision=settings.base_revision, relative_to=config_file().parent)
    estimated = estimate_resources(root, settings.padding_spec)
    if estimated is None:
        return Outlay()
    coded = _coded_bytes(open_checkpoint(root).config, settings.quantization)
    wider = estimated.padded_bytes / estimated.base_bytes
    merged = estimated.base_bytes if settings.store.merged else 0
    padded = estimated.padded_bytes if settings.store.padded else 0
    return Outlay(read_bytes=estimated.base_bytes, disk_bytes=merged + padded + COPIES * int(coded * wider))


def _coded_bytes(config: Config, quantization: QuantSpec) -> int:
    words = {pattern: str(word) for pattern, word in quantization.modules.items()}
    four_bits = quantized_bytes(config, quantization.group_size, words)
    is_wider = quantization.method != "gptq" or quantization.bits == 8
    return four_bits + (weight_count(config) // 2 if is_wider else 0)


def written_bytes(store: Path, key: str, *, since: float) -> int:
    """Return the bytes on the disk of what the stages of a product's fine-tune wrote since a Unix time."""
    outputs = store.glob(f"*/{product(key).fine_tune}/*")
    return sum(sum(_blocks(path, since)) for path in outputs if path.is_dir() and not path.is_symlink())


def _blocks(root: Path, since: float) -> Iterator[int]:
    for path in root.rglob("*"):
        with suppress(OSError):  # it was renamed meanwhile
            stat = path.lstat()
            if path.is_file() and stat.st_ctime >= since:
                yield stat.st_blocks * _BLOCK
