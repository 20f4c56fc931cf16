"""The README of a release: metadata for a hub in the front matter, and a description for users."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, get_args

from qwen_pipeline.checkpoint.store.lineage import Step
from qwen_pipeline.evaluation.heads import HeadTask
from qwen_pipeline.evaluation.report import markup
from qwen_pipeline.evaluation.report.usage import PIPELINE_TAGS, loading_code
from qwen_pipeline.qwen.families import SizeField, TowerField
from qwen_pipeline.qwen.tensor_parallel.feasibility import assess_degrees
from qwen_pipeline.qwen.tensor_parallel.floats import divided_blocks
from qwen_pipeline.qwen.tensor_parallel.towers import tower_obstacles
from qwen_pipeline.transforms.codes.fp8 import Fp8Format, fp8_format, is_fp8
from qwen_pipeline.transforms.codes.gptq import EXCLUDE
from qwen_pipeline.transforms.codes.packed import CODED_MODULES

DEGREES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Tensor-parallel degrees that a card lists."""
_LICENSE = re.compile(r"[\w.+-]{1,60}")
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
        recipe: The recipe of the pipeline's settings that made it; None for the default one.
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
    recipe: str | None = None
    task: HeadTask = field(default_factory=HeadTask)

    def render(self) -> str:
        """Return the card: YAML front matter, then Markdown."""
        sections = [
            f"# {self.name}, {f'FP8, {self._floats.method}' if self._floats else f'GPTQ {self._bits} bits'}",
            f"A fine-tune of {self._base_link}, quantized {self._codes}.{self._others}{self._made_by} The weights are"
            " safetensors; no remote code is needed.",
            "## How to load it",
            loading_code(self.name, self.task, self._floats.layout.container if self._floats else "gptq"),
            self._vllm(),
            "## Quality",
            f"Measured on held-out text before release: {self.verdict}. The full report is in"
            " [validation/report.md](validation/report.md).",
            *(["\n".join(f"- **skipped** {markup.text(each)}" for each in self.skipped)] if self.skipped else []),
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
    def _floats(self) -> Fp8Format | None:
        return fp8_format(self._quantization) if is_fp8(self._quantization) else None

    @property
    def _codes(self) -> str:
        if self._floats:
            return f"to {self._floats.layout.title}; engines round activations to 8-bit floats too, token by token"
        return f"with GPTQ to {self._bits} bits in groups of {self._group_size}"

    @property
    def _bits(self) -> int:
        return self._quantization["bits"]

    @property
    def _group_size(self) -> int:
        return self._floats.layout.unit if self._floats else self._quantization["group_size"]

    @property
    def _others(self) -> str:
        """A sentence about linear layers of the decoder with another precision; empty if there are none."""
        rules = self._quantization.get("dynamic") or {}
        formats = {tuple(fields.items()) for rule, fields in rules.items() if not rule.startswith(EXCLUDE)}
        found = [", ".join(f"{name} {value}" for name, value in fields) for fields in sorted(formats)]
        found = list(map(markup.text, found))
        found += ["full precision"] if CODED_MODULES in self._quantization else []
        reader = " Transformers reads one format of codes: load it with GPTQModel, vLLM or SGLang." if formats else ""
        return f" Some layers have {' or '.join(found)}, as `quantization_config` says.{reader}" if found else ""

    @property
    def _made_by(self) -> str:
        return f" It was made by the recipe `{self.recipe}`." if self.recipe else ""

    @property
    def base_name(self) -> str:
        """The base's hub id, or the name of its directory."""
        return public_name(self.base_model)

    @property
    def _base_link(self) -> str:
        return (
            f"[{self.base_name}](https://huggingface.co/{self.base_name})"
            if "/" in self.base_name
            else markup.code(self.base_name)
        )

    def _front_matter(self) -> str:
        from huggingface_hub import ModelCardData

        data = ModelCardData(
            base_model=self.base_name,
            base_model_relation="quantized",
            library_name="transformers",
            license=_license(self.config),
            pipeline_tag=PIPELINE_TAGS[self.task.kind],
            tags=[
                *(["fp8", "8-bit"] if self._floats else ["gptq", f"{self._bits}-bit"]),
                str(self.config["model_type"]),
            ],
        )
        return data.to_yaml()

    def _vllm(self) -> str:
        degrees = serving_degrees(self.config)
        command = serve_command(self.name, degrees)
        listed = ", ".join(map(str, degrees)) or "none"
        others = (
            "Engines refuse other degrees" if self._floats else "Other degrees may load and silently give wrong answers"
        )
        whole = "blocks and heads" if self._floats else "quantization groups and heads"
        shown = f"```bash\n{command}\n```\n\n" if self.task.kind == "language" else ""  # others were not served
        return (
            f"{shown}Tensor-parallel degrees at which every rank holds whole {whole}:"
            f" **{listed}** (of {', '.join(map(str, DEGREES))}). {others}."
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
                *(f"| {markup.text(role)} | {markup.code(digest)} | |" for digest, role in sources.items()),
                *(
                    f"| {step.stage} | {markup.code(step.content_digest)} | {markup.text(', '.join(step.inputs))} |"
                    for step in self.steps
                ),
            ]
        )


def public_name(base_model: str) -> str:
    """Return a base's hub id, or the name of its directory without the directories above."""
    return base_model if _HUB_ID.fullmatch(base_model) else PurePath(base_model).name


def _license(config: Mapping[str, Any]) -> str | None:
    """Return the name of a licence that a config states, such as ``apache-2.0``; None if it states no name."""
    name = config.get("license")
    return name if isinstance(name, str) and _LICENSE.fullmatch(name) else None


def _widened(size: Widened) -> str:
    return f"each {_SIZE_NAMES[size.field]} has {size.padded} channels instead of the base's {size.live}"


def serve_command(model: str, degrees: Sequence[int]) -> str:
    """Return vLLM's command line for a model, at the highest degree that it can be served at."""
    return f"vllm serve {model}" + (f" --tensor-parallel-size {degrees[-1]}" if degrees and degrees[-1] > 1 else "")


def serving_degrees(config: Mapping[str, Any]) -> list[int]:
    """Return the degrees of :data:`DEGREES` at which every rank holds whole groups and whole heads."""
    settings = config["quantization_config"]
    if is_fp8(settings):
        layout = fp8_format(settings).layout
        return [degree for degree in DEGREES if not divided_blocks(config, layout, degree=degree)]
    group_size = max(1, config["quantization_config"]["group_size"])
    rows = assess_degrees(config, group_size=group_size, degrees=DEGREES)
    return [row.degree for row in rows if row.legal and row.whole]
