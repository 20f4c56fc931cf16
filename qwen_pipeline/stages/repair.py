"""``imported -> repaired``: whole groups of zero codes for a checkpoint that was quantized without padding."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_pipeline.checkpoint.digest_cache import DigestCache, checkpoint_digest
from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import INDEX, SINGLE_SHARD, STEM, Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.manifest import Derivation
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import listed
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.config import diff_configs, flat_config
from qwen_pipeline.qwen.geometry import PadPlan, dump_plan
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports
from qwen_pipeline.transforms.codes.formats import CodeFormat, code_format
from qwen_pipeline.transforms.codes.repair import coarsest, plan_repair, widenings
from qwen_pipeline.transforms.codes.repair import repair as repair_checkpoint

if TYPE_CHECKING:
    from qwen_pipeline.evaluation.tensor_parallel.repair_proof import RepairFindings

STAGE = "repaired"
CODE_VERSION = "1"
SETTINGS = ("quantize_config.json", "quant_config.json")
"""Files in which quantizers repeat the settings of ``config.json``, or write them instead."""

WHOLE_GROUPS = CheckSpec(
    name="whole_groups_on_every_rank", description="Every rank holds whole quantization groups of every MLP."
)
LIVE_IDENTICAL = CheckSpec(
    name="live_weights_identical",
    description="Every weight of the source, read back and sharded over the ranks, has the same bits as before.",
)
NEW_ZERO = CheckSpec(name="new_weights_are_zero", description="Every new weight dequantizes to exactly zero.")
CONFIG_FOLLOWS = CheckSpec(
    name="config_follows_weights", description="The config states the new widths; nothing else changed."
)
IN_ORDER = CheckSpec(
    name="inputs_in_order",
    description="Groups are consecutive inputs; with act-order, only some engines can shard them over ranks.",
    blocking=False,
)
CHECKS = (WHOLE_GROUPS, LIVE_IDENTICAL, NEW_ZERO, CONFIG_FOLLOWS, IN_ORDER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A quantized checkpoint as its quantizer wrote it.

    Attributes:
        checkpoint: The tensors. The config contains the quantization settings, whichever file they come from; settings
            files are sidecars.
        form: The format of the codes, except for layers to which the config gives another.
        mlps: The one with the largest groups among those of MLPs.
        attention: The same for attention.
        stem: The file name of the weights without suffixes, such as ``model``, or AutoGPTQ's ``gptq_model-4bit-128g``.
    """

    checkpoint: Checkpoint
    form: CodeFormat
    mlps: CodeFormat
    attention: CodeFormat
    stem: str


def open_quantized(root: Path) -> Quantized:
    """Open a quantized checkpoint as quantizers write it; only headers are read.

    Raises:
        CheckpointRefused: The checkpoint is not quantized, or its format is not supported.
    """
    stem = _stem(root)
    checkpoint = open_checkpoint(root, stem=stem)
    files = {name: root / name for name in SETTINGS if (root / name).is_file()}
    checkpoint = checkpoint.replace(sidecars={**checkpoint.sidecars, **files})
    settings = checkpoint.config.get("quantization_config") or _settings_in(files)
    form = code_format(settings)
    if settings != checkpoint.config.get("quantization_config"):
        checkpoint = checkpoint.replace(config={**checkpoint.config, "quantization_config": dict(settings)})
    mlps, attention = (coarsest(checkpoint, form, mlps=mlps) for mlps in (True, False))
    return Quantized(checkpoint=checkpoint, form=form, mlps=mlps, attention=attention, stem=stem)


def quantized_digest(root: Path, *, observe: Observe = unobserved) -> str:
    """Return the content digest of a checkpoint as quantizers write it. Weights are read once; the digest is cached."""
    return checkpoint_digest(root, checkpoint=open_quantized(root).checkpoint, observe=observe)


def remembered_quantized_digest(root: Path) -> str | None:
    """Return the content digest if it is cached, else None; no weights are read.

    Raises:
        CheckpointRefused: The checkpoint is not quantized, or its format is not supported.
    """
    known = DigestCache().find(root, open_quantized(root).checkpoint)
    return known.digest if known else None


def plan(source: Path, *, tensor_parallel: int, towers: bool = False) -> PadPlan:
    """Plan a repair from headers alone; raises the errors of :func:`repair`."""
    quantized = open_quantized(source)
    config, form = quantized.checkpoint.config, quantized.form
    pad_plan = plan_repair(
        config, quantized.mlps, tensor_parallel=tensor_parallel, towers=towers, attention=quantized.attention
    )
    repair_checkpoint(quantized.checkpoint, form, pad_plan)
    return pad_plan


def repair(
    *,
    source: Path,
    destination: Destination | Path,
    tensor_parallel: int = 8,
    towers: bool = False,
    observe: Observe = unobserved,
) -> Artifact:
    """Add whole groups of zero codes to a quantized checkpoint's MLPs, so that ``tensor_parallel`` ranks can share it.

    The weights that the codes decode to, before and after, are compared bit for bit. A checkpoint that already divides
    is copied unchanged.

    Args:
        source: A quantized checkpoint (GPTQ, AWQ or compressed-tensors).
        destination: The output directory.
        tensor_parallel: Number of ranks that will serve it.
        towers: Whether to also widen the MLPs of vision and audio towers, which have weights instead of codes.
        observe: Called with the progress.

    Raises:
        CheckpointRefused: The checkpoint is not quantized, or its tensors do not fit its config.
        InputRefused: New groups cannot make this model divide; the remedy names an alternative.
    """
    quantized = open_quantized(source)
    before, form = quantized.checkpoint, quantized.form
    pad_plan = plan_repair(
        before.config, quantized.mlps, tensor_parallel=tensor_parallel, towers=towers, attention=quantized.attention
    )
    after = _named_for_loaders(repair_checkpoint(before, form, pad_plan), quantized.stem)

    def build(partial: Path) -> Built:
        from qwen_pipeline.evaluation.tensor_parallel.repair_proof import prove_repair

        contents = write_checkpoint(after, partial, task="repair", observe=observe)
        changed = {module: by for size in pad_plan.sizes for module, by in widenings(before, size).items()}
        proof = prove_repair(before, open_checkpoint(partial), form, changed, ranks=tensor_parallel, observe=observe)
        reports = [
            _groups_report(pad_plan),
            _identical_report(proof, tensor_parallel),
            _zeros_report(proof),
            _config_report(before.config, after.config, pad_plan),
            _order_report(proof, tensor_parallel),
        ]
        return Built(contents=contents, result={"padding": dump_plan(pad_plan), "checks": dump_reports(reports)})

    derivation = Derivation(
        stage=STAGE,
        inputs={"source": checkpoint_digest(source, checkpoint=before, observe=observe)},
        spec={"tensor_parallel": tensor_parallel, **({"towers": True} if towers else {})},
        code_version=CODE_VERSION,
    )
    return derive(derivation, destination, build)


def _named_for_loaders(checkpoint: Checkpoint, stem: str) -> Checkpoint:
    """Rename the shards to ``model*``, as Transformers and serving engines expect."""
    return replace(checkpoint, shards={name: shard.replace(stem, STEM, 1) for name, shard in checkpoint.shards.items()})


def _stem(root: Path) -> str:
    """Return the file name of the weights without suffixes: ``model``, unless there is one set with another name."""
    indices = [path.name.removesuffix(INDEX.removeprefix(STEM)) for path in root.glob("*.safetensors.index.json")]
    files = [path.name.removesuffix(SINGLE_SHARD.removeprefix(STEM)) for path in root.glob("*.safetensors")]
    stems = indices or files
    return stems[0] if len(stems) == 1 else STEM


def _settings_in(files: Mapping[str, Path]) -> Mapping[str, Any]:
    for file in files.values():
        settings = load_json(file)
        method = "awq" if "w_bit" in settings else "gptq"
        return {"quant_method": method, **settings}
    return {}


def _groups_report(plan: PadPlan) -> CheckReport:
    unit = plan.group_size * plan.tensor_parallel
    return WHOLE_GROUPS.report(
        passed=all(size.padded % (size.group_size * plan.tensor_parallel) == 0 for size in plan.sizes),
        measured=", ".join(str(size.padded) for size in plan.sizes),
        limit=f"multiples of {plan.group_size} x {plan.tensor_parallel} = {unit}",
        detail="; ".join(
            f"{size.field}: {size.live // size.group_size} live {'channels' if size.of_tower else 'groups'}"
            f" and {size.zeros // size.group_size} of zeros"
            for size in plan.sizes
        )
        + ".",
    )


def _identical_report(proof: "RepairFindings", ranks: int) -> CheckReport:
    return LIVE_IDENTICAL.report(
        passed=not proof.changed,
        measured=f"{proof.live_weights:,} weights",
        detail=f"{listed(proof.changed)}. Report this as a defect."
        if proof.changed
        else f"The codes before, and the shards of {ranks} ranks after, decode to the same bits.",
    )


def _zeros_report(proof: "RepairFindings") -> CheckReport:
    return NEW_ZERO.report(
        passed=not proof.nonzero,
        measured=f"{proof.new_weights:,} weights",
        detail=f"{listed(proof.nonzero)}. Report this as a defect."
        if proof.nonzero
        else "Their codes are their groups' zero points.",
    )


def _config_report(before: Mapping[str, Any], after: Mapping[str, Any], plan: PadPlan) -> CheckReport:
    expected = {place: size.padded for size in plan.sizes for place in size.places}
    new, changed = flat_config(after), diff_configs(before, after).keys()
    return CONFIG_FOLLOWS.report(
        passed=changed <= expected.keys() and all(new[place] == width for place, width in expected.items()),
        measured=", ".join(sorted(changed)) or "unchanged",
        limit=", ".join(sorted(expected)),
        detail="Config and weights have the same widths; all other fields are unchanged.",
    )


def _order_report(proof: "RepairFindings", ranks: int) -> CheckReport:
    return IN_ORDER.report(
        passed=not proof.reordered or ranks == 1,
        measured=f"{proof.reordered} layers with act-order",
        detail="vLLM's Marlin kernels give every rank all scales, which is correct; Exllama, Machete and TurboMind"
        f" cannot shard such layers over {ranks} ranks. Quantize again without desc_act to serve with those."
        if proof.reordered
        else "Groups are consecutive inputs, as every engine expects.",
    )
