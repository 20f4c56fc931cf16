"""``base + fine-tune -> merged``: one full-precision checkpoint of a base and its adapters or fine-tuned model."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination, as_destination
from qwen_pipeline.checkpoint.store.rewrite import Rewrite
from qwen_pipeline.checkpoint.store.stage_input import StageInput, open_input
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.models.base_names import BASE_MATCHES, KnownBase, base_report
from qwen_pipeline.models.changes import (
    CHANGES_BASE,
    adapter_change_report,
    model_change_report,
    require_change,
    require_effect,
)
from qwen_pipeline.models.fine_tune_files import (
    FILES_READ,
    files_of,
    files_report,
    require_all_weights_read,
    require_no_code_of_its_own,
)
from qwen_pipeline.models.open import open_fine_tune, paddings_of, with_weights
from qwen_pipeline.models.padded import padded_model, trained_on, unpad_data
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.geometry import dump_plan
from qwen_pipeline.qwen.heads import left_out
from qwen_pipeline.qwen.settle import CONFIG_MATCHES, Settled, config_report, settle
from qwen_pipeline.qwen.text_only import LANGUAGE, language_model, others_than_language
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports
from qwen_pipeline.transforms.codes.base_weights import AS_STORED, BaseWeights
from qwen_pipeline.transforms.fine_tune.adopt import Adopted, adopt
from qwen_pipeline.transforms.fine_tune.reports import CARRIED, adoption_summary, carried_report, used_detail
from qwen_pipeline.transforms.lora import reports as lora_reports
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
from qwen_pipeline.transforms.lora.changes import ChangeMeter
from qwen_pipeline.transforms.lora.merge import Merged, merge_lora
from qwen_pipeline.transforms.sidecars import with_sidecars
from qwen_pipeline.transforms.tokenizer_fits import TOKENIZER_FITS, tokenizer_report

STAGE = "merged"
CODE_VERSION = "5"

TENSORS_USED = CheckSpec(
    name="every_tensor_is_used", description="Each tensor of the fine-tune is matched to one tensor of the base."
)
FINITE = CheckSpec(name="weights_are_finite", description="No merged weight is NaN or infinite.")
CHECKS = (
    TENSORS_USED,
    BASE_MATCHES,
    CARRIED,
    CONFIG_MATCHES,
    CHANGES_BASE,
    FILES_READ,
    TOKENIZER_FITS,
    FINITE,
)


def merge(
    *,
    base: Path,
    fine_tune: Path | AdapterSet,
    destination: Destination | Path,
    base_names: Collection[str] = (),
    base_revision: str | None = None,
    padded: Path | None = None,
    base_weights: BaseWeights = AS_STORED,
    leave_behind: Collection[str] = (),
    hard_links: bool = False,
    observe: Observe = unobserved,
) -> Artifact:
    """Merge a fine-tune into its base.

    Args:
        base: A full-precision model directory.
        fine_tune: A directory with a PEFT LoRA, with several adapters and a file of their weights, or with a complete
            fine-tuned model, whose tensors are then the result; or a set of adapters.
        destination: The output directory.
        base_names: Every name of the base, or patterns with ``*``. If given, an adapter that names another base fails
            a check; if not, the directory's name is compared, and a difference is only a warning.
        base_revision: The base's commit, tag or branch. An adapter that names another revision fails the same check.
        padded: The padded checkpoint that the adapter was trained on, if the adapter does not name it.
        base_weights: The way to read the base: by default as it is stored; and whether only the language model of the
            merge is kept.
        leave_behind: Patterns of paths, in the fine-tune's directory, of weights that are ignored.
        hard_links: Whether a shard that the fine-tune does not change may be a hard link to the base's file.
        observe: Called with the progress.

    Raises:
        InputRefused: The fine-tune does not fit the base exactly, one of them is quantized, or the fine-tune has
            weights that are neither read nor left behind.
        CheckFailed: A merged weight is not finite, or the fine-tune is seen to change nothing before it is merged.
    """
    rewrite = prepare(
        KnownBase(root=base, names=base_names, revision=base_revision, weights=base_weights),
        fine_tune,
        padded=padded,
        leave_behind=leave_behind,
        read_now=as_destination(destination).may_hold(STAGE),
        observe=observe,
    )
    artifact = rewrite.write(destination, task="merge", hard_links=hard_links, observe=observe)
    return with_weights(artifact, observe=observe)


def prepare(
    base: KnownBase,
    fine_tune: Path | AdapterSet,
    *,
    padded: Path | None = None,
    leave_behind: Collection[str] = (),
    read_now: bool,
    observe: Observe = unobserved,
) -> Rewrite:
    """Check a merge and return its derivation and its lazy output; see :func:`merge`.

    Args:
        base: The base.
        fine_tune: See :func:`merge`.
        padded: See :func:`merge`.
        leave_behind: See :func:`merge`.
        read_now: See :func:`open_input`.
        observe: Called with the progress.
    """
    sources = {"base": open_input("base", base.root, read_now=read_now, observe=observe)}
    settled = settle(base.weights.of(sources["base"].checkpoint))
    parent = settled.checkpoint
    child = fine_tune if isinstance(fine_tune, AdapterSet) else open_fine_tune(fine_tune)
    files = files_of(fine_tune if isinstance(fine_tune, Path) else None, child, leave_behind)
    require_all_weights_read(files)
    if isinstance(child, AdapterSet):
        merge = _merge_adapters(base, settled, child, padded, base_digest=sources["base"].final_digest)
    else:
        assert isinstance(fine_tune, Path)
        sources["fine_tune"] = open_input("fine_tune", fine_tune, read_now=read_now, observe=observe)
        child = sources["fine_tune"].checkpoint
        require_no_code_of_its_own(child)
        adopted = _adopt_model(settled, child, text_only=base.weights.text_only)
        merge = _with_change_report(adopted, sources, base.root, fine_tune)
    if base.weights.text_only:
        merge = _language_model_of(merge, parent)
    if isinstance(child, Checkpoint):
        require_change(base.weights.kept(parent), merge.output)
    output = with_sidecars(merge.output, parent, child.sidecars, text_only=base.weights.text_only)

    def reports() -> list[CheckReport]:
        of_output = [files_report(files, leave_behind), tokenizer_report(output), _finite_report(output)]
        return [*merge.reports(), *of_output]

    return Rewrite(
        stage=STAGE,
        code_version=CODE_VERSION,
        spec={
            "base_names": sorted(base.names),
            **base.weights.spec(sources["base"].checkpoint),
            **merge.spec,
            **_left_behind(leave_behind),
        },
        sources=sources,
        others=merge.others,
        output=output,
        result=lambda: {**merge.summary, "checks": dump_reports(reports())},
        if_not_finite="If the base is finite, the training diverged: use an earlier checkpoint of the fine-tune.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merge:
    """A checked merge of either kind of fine-tune; ``reports`` is called once the weights are written."""

    output: Checkpoint
    summary: Mapping[str, Any]
    reports: Callable[[], list[CheckReport]]
    spec: Mapping[str, Any] = field(default_factory=dict[str, Any])
    others: Mapping[str, str] = field(default_factory=dict[str, str])


def _merge_adapters(
    base: KnownBase,
    settled: Settled,
    adapters: AdapterSet,
    padded: Path | None,
    *,
    base_digest: Callable[[], str],
) -> _Merge:
    meter = ChangeMeter()
    paddings = paddings_of(base.root, adapters, padded=padded)
    if base.weights.text_only and paddings.base:
        raise InputRefused(
            f"{base.root} is padded, and its padding map names the tensors of the whole model.",
            remedy="Merge into the model that it was padded from (qwen-pipeline unpad), or leave out text_only.",
        )
    merged = merge_lora(settled.checkpoint, adapters, paddings=paddings, meter=meter)
    require_effect(adapters)
    dropped = others_than_language(merged.checkpoint) if base.weights.text_only else ()
    model = trained_on(adapters, padded) if merged.bridge else None

    def reports() -> list[CheckReport]:
        is_padded_base = model is not None and model.live_digest == base_digest()
        return [
            _adapter_use_report(adapters, merged, remark=left_out(settled.checkpoint, merged.checkpoint)),
            base_report(base, adapters, is_padded_base=is_padded_base),
            CARRIED.report(passed=True, detail="An adapter changes tensors of the base, which has every part."),
            config_report(settled),
            adapter_change_report(meter, merged.checkpoint.without(dropped)),
        ]

    return _Merge(
        output=merged.checkpoint,
        summary=lora_reports.adapter_summary(merged, adapters) | unpad_data(merged, padded_model(base.root)),
        reports=reports,
        spec={"base_revision": base.revision, **_bridge_spec(merged)},
        others={"fine_tune": adapters.digest()},
    )


def _adopt_model(base: Settled, child: Checkpoint, *, text_only: bool) -> _Merge:
    adopted = adopt(base.checkpoint, child)
    if text_only:
        carried = {part: count for part, count in adopted.carried.items() if part in LANGUAGE}
        adopted = replace(adopted, carried=carried, remarks=())
    return _Merge(
        output=adopted.checkpoint,
        summary=adoption_summary(adopted),
        reports=lambda: _model_reports(adopted, base),
    )


def _with_change_report(merge: _Merge, sources: Mapping[str, StageInput], base: Path, fine_tune: Path) -> _Merge:
    def reports() -> list[CheckReport]:
        for source in sources.values():
            source.final_digest()
        return [*merge.reports(), model_change_report(base, fine_tune, sources["base"].checkpoint.config)]

    return replace(merge, reports=reports)


def _language_model_of(merge: _Merge, parent: Checkpoint) -> _Merge:
    """Return a merge of which the language model is kept; manifest and check name the parts that are left out."""
    output, left = language_model(merge.output), others_than_language(merge.output)
    changed = sum(merge.output.tensors[name] is not parent.tensors.get(name) for name in left)
    parts = dict(Counter(left.values()))
    remark = (
        f" Left out on request: {', '.join(parts)} ({len(left)} tensors, {changed} of them changed)." if left else ""
    )

    def reports() -> list[CheckReport]:
        return [
            replace(report, detail=report.detail + remark) if report.name == TENSORS_USED.name else report
            for report in merge.reports()
        ]

    return replace(merge, output=output, reports=reports, summary={**merge.summary, "left_out": parts})


def _left_behind(patterns: Collection[str]) -> dict[str, Any]:
    return {"leave_behind": sorted(patterns)} if patterns else {}


def _bridge_spec(merged: Merged) -> dict[str, Any]:
    bridge = merged.bridge
    return {"trained": bridge.trained, "padding": dump_plan(bridge.plan)} if bridge else {}


def _adapter_use_report(adapters: AdapterSet, merged: Merged, *, remark: str) -> CheckReport:
    count = sum(len(adapter.weights.specs) for adapter in adapters.adapters)
    return TENSORS_USED.report(
        passed=True, measured=f"{count} of {count}", detail=lora_reports.used_detail(merged, count) + remark
    )


def _model_reports(adopted: Adopted, base: Settled) -> list[CheckReport]:
    exception = ", except for the rows of its vocabulary" if adopted.is_resized else ""
    return [
        TENSORS_USED.report(
            passed=True,
            measured=f"{adopted.stored} of {adopted.stored}",
            detail=used_detail(adopted, len(base.checkpoint)) + left_out(base.checkpoint, adopted.checkpoint),
        ),
        BASE_MATCHES.report(passed=True, detail=f"A complete model, with the base's tensors and shapes{exception}."),
        carried_report(adopted),
        config_report(adopted.settled, *adopted.remarks, *(f"in the base, {remark}" for remark in base.split)),
    ]


def _finite_report(merged: Checkpoint) -> CheckReport:
    return FINITE.report(
        passed=True,
        measured=f"{len(merged)} of {len(merged)}",
        detail="Every block was tested as it was written; a NaN or an infinity would have stopped the stage.",
    )
