"""The README of a release: metadata for a hub in the front matter, and a description for users."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, get_args

from qwen_pipeline.checkpoint.store.lineage import Step
from qwen_pipeline.evaluation.heads import HeadTask
from qwen_pipeline.evaluation.report.usage import PIPELINE_TAGS, loading_code
from qwen_pipeline.qwen.families import SizeField, TowerField
from qwen_pipeline.qwen.tensor_parallel.feasibility import assess_degrees
from qwen_pipeline.qwen.tensor_parallel.towers import tower_obstacles

DEGREES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Tensor-parallel degrees that a card lists."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


_SIZE_NAMES: Mapping[SizeField, str] = {
    "intermediate_size": "MLP",
    "moe_intermediate_size": "routed expert",
    "shared_expert_intermediate_size": "shared expert",
    "vision_config.intermediate_size": "MLP of the vision tower",
    "audio_config.encoder_ffn_dim": "MLP of the audio tower",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Widened:
    """A size field before and after padding."""

    field: SizeField
    live: int
    padded: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The content of a model card.

    Attributes:
        name: The fine-tune's name.
        base_model: Hub id of the base, or a directory, of which the card shows only the name.
        config: The quantized checkpoint's ``config.json``.
        padding: Every size field that padding or a repair widened.
        split: Whether the new channels are parts of split channels; if not, they are zeros.
        quality: A Markdown table of the measurements.
        verdict: The outcome of the checks, in words.
        skipped: A sentence for each check that did not run: its name and the reason.
        steps: The lineage, from the first step to the validation.
        task: The task of the model.
    """

    name: str
    base_model: str
    config: Mapping[str, Any]
    padding: Sequence[Widened]
    split: bool
    quality: str
    verdict: str
    steps: Sequence[Step]
    skipped: Sequence[str] = ()
    task: HeadTask = field(default_factory=HeadTask)

    def render(self) -> str:
        """Return the card: YAML front matter, then Markdown."""
        sections = [
            f"# {self.name}, GPTQ {self._bits} bits",
            f"A fine-tune of {self._base_link}, quantized with GPTQ to {self._bits} bits in groups of"
            f" {self._group_size}. The weights are safetensors; no remote code is needed.",
            "## How to load it",
            loading_code(self.name, self.task),
            self._vllm(),
            "## Quality",
            f"Measured on held-out text before release: {self.verdict}. The full report is in"
            " [validation/report.md](validation/report.md).",
            *(["\n".join(f"- **skipped** {each}" for each in self.skipped)] if self.skipped else []),
            self.quality,
            *self._padding(),
            "## Lineage",
            "A content digest covers tensors and files, but not times or machines; the same inputs give the same"
            " digest. Settings are in [provenance.json](provenance.json).",
            self._lineage(),
        ]
        return f"---\n{self._front_matter()}\n---\n\n" + "\n\n".join(sections) + "\n"

    @property
    def _quantization(self) -> Mapping[str, Any]:
        return self.config["quantization_config"]

    @property
    def _bits(self) -> int:
        return self._quantization["bits"]

    @property
    def _group_size(self) -> int:
        return self._quantization["group_size"]

    @property
    def base_name(self) -> str:
        """The base's hub id, or the name of its directory."""
        return self.base_model if _HUB_ID.fullmatch(self.base_model) else PurePath(self.base_model).name

    @property
    def _base_link(self) -> str:
        return (
            f"[{self.base_name}](https://huggingface.co/{self.base_name})"
            if "/" in self.base_name
            else f"`{self.base_name}`"
        )

    def _front_matter(self) -> str:
        from huggingface_hub import ModelCardData

        data = ModelCardData(
            base_model=self.base_name,
            base_model_relation="quantized",
            library_name="transformers",
            license=self.config.get("license"),
            pipeline_tag=PIPELINE_TAGS[self.task.kind],
            tags=["gptq", f"{self._bits}-bit", str(self.config["model_type"])],
        )
        return data.to_yaml()

    def _vllm(self) -> str:
        degrees = serving_degrees(self.config)
        command = f"vllm serve {self.name}" + (f" --tensor-parallel-size {degrees[-1]}" if degrees[-1:] > [1] else "")
        listed = ", ".join(map(str, degrees)) or "none"
        shown = f"```bash\n{command}\n```\n\n" if self.task.kind == "language" else ""  # others were not served
        return (
            f"{shown}Tensor-parallel degrees at which every rank holds whole quantization groups and heads:"
            f" **{listed}** (of {', '.join(map(str, DEGREES))}). Other degrees may load and silently give wrong"
            " answers."
            + "".join(f" {each}" for each in (tower_obstacles(self.config, {"vllm": degrees}) if degrees else ()))
        )

    def _padding(self) -> list[str]:
        if not self.padding:
            return []
        towers = [size for size in self.padding if size.field in get_args(TowerField)]
        sentences = [
            *self._decoder_padding([size for size in self.padding if size not in towers]),
            *(f"E{_widened(size)[1:]}: zeros at the end, so that ranks can share the tower." for size in towers),
            "Adapters trained on this checkpoint do not fit the unpadded base.",
        ]
        return ["## Padding", " ".join(sentences)]

    def _decoder_padding(self, padding: Sequence[Widened]) -> list[str]:
        if not padding:
            return []
        widths = " and ".join(map(_widened, padding))
        added = (
            "The added channels are parts of split channels; the parts add up to the original channel."
            if self.split
            else "The added channels are zeros. They change no output: silu(0) x 0 = 0 is multiplied by zero columns of"
            " `down_proj`, and validation found all of them to be exactly zero."
        )
        return [
            f"E{widths[1:]}, so that tensor-parallel ranks can share whole groups of {self._group_size}.",
            added,
        ]

    def _lineage(self) -> str:
        outputs = {step.content_digest for step in self.steps}
        inputs = ((role, digest) for step in self.steps for role, digest in step.inputs.items())
        sources: dict[str, str] = {}
        for role, digest in inputs:
            if digest not in outputs:
                sources.setdefault(digest, role)
        return "\n".join(
            [
                "| artifact | content digest | made from |",
                "| --- | --- | --- |",
                *(f"| {role} | `{digest}` | |" for digest, role in sources.items()),
                *(f"| {step.stage} | `{step.content_digest}` | {', '.join(step.inputs)} |" for step in self.steps),
            ]
        )


def _widened(size: Widened) -> str:
    return f"each {_SIZE_NAMES[size.field]} has {size.padded} channels instead of the base's {size.live}"


def serving_degrees(config: Mapping[str, Any]) -> list[int]:
    """Return the degrees of :data:`DEGREES` at which every rank holds whole groups and whole heads."""
    group_size = max(1, config["quantization_config"]["group_size"])
    rows = assess_degrees(config, group_size=group_size, degrees=DEGREES)
    return [row.degree for row in rows if row.legal and row.whole]
