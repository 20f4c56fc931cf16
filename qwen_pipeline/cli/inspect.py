"""``qwen-pipeline inspect``: describe a fine-tune and the base tensors that it changes, or say why it is refused."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_pipeline.cli.options import BaseDequantize, LeaveBehind, TextOnly, TrainedOn
from qwen_pipeline.cli.results import CommandResult, command

if TYPE_CHECKING:
    from rich.table import Table

    from qwen_pipeline.checkpoint.lazy import Checkpoint
    from qwen_pipeline.models.base_names import KnownBase
    from qwen_pipeline.models.kinds import Recognized
    from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
    from qwen_pipeline.transforms.lora.plan import TensorMerge

app = typer.Typer()


@command(
    app, "inspect", examples=["qwen-pipeline inspect my-lora/", "qwen-pipeline inspect my-lora/ --base base/ --json"]
)
def inspect(
    fine_tune: Path,
    base: Annotated[Path | None, typer.Option(help="Base to merge into.")] = None,
    trained_on: TrainedOn = None,
    leave_behind: LeaveBehind = None,
    base_dequantize: BaseDequantize = False,
    text_only: TextOnly = False,
) -> CommandResult:
    """Describe any directory: what it is, who saved it, what happens to each file, and which tensors it changes.

    FINE_TUNE is a directory with a LoRA, with several LoRAs and an adapters.toml, or with a full model. A fine-tune
    that cannot be merged exactly is refused with the message of merge and exit code 2. Headers, configs and tokenizer
    are read, and hardly any weights: merge also refuses values that are not finite, factors that are all zero, and a
    model that equals its base.
    """
    from qwen_pipeline.cli.inspect_views import what_table
    from qwen_pipeline.errors import PipelineError
    from qwen_pipeline.models.base_names import KnownBase
    from qwen_pipeline.models.kinds import recognize
    from qwen_pipeline.transforms.codes.base_weights import BaseWeights

    weights = BaseWeights(dequantize=base_dequantize, text_only=text_only)
    known = KnownBase(root=base, weights=weights) if base else None
    found = recognize(fine_tune)
    data: dict[str, Any] = {"fine_tune": str(fine_tune), "base": str(base) if base else None, **_what(found)}
    view: list[Table | str] = [what_table(data)]
    try:
        _describe(fine_tune, known, trained_on, leave_behind or [], data, view)
        _describe_intake(fine_tune, data, view)
    except PipelineError as refusal:
        return CommandResult(data=_declared(fine_tune) | data, view=view, fault=refusal)
    return CommandResult(data=data, view=view)


def _describe(
    root: Path,
    base: "KnownBase | None",
    padded: Path | None,
    leave_behind: list[str],
    data: dict[str, Any],
    view: "list[Table | str]",
) -> None:
    """Add to ``data`` and ``view`` whatever is known before the first refusal.

    Raises:
        PipelineError: The fine-tune is refused, as by merge.
    """
    from qwen_pipeline.checkpoint.lazy import Checkpoint
    from qwen_pipeline.cli.inspect_views import files_table, settings_table
    from qwen_pipeline.models.changes import require_effect
    from qwen_pipeline.models.fine_tune_files import files_of, require_all_weights_read
    from qwen_pipeline.models.open import open_fine_tune

    child = open_fine_tune(root)
    files = files_of(root, child, leave_behind)
    data["files"] = [{**asdict(each), "root": str(each.root)} for each in files]
    if isinstance(child, Checkpoint):
        data |= {"kind": "full", "tensors": len(child), "bytes": child.nbytes}
    else:
        data |= {"kind": "adapter", "combination": child.combination, "adapters": _adapter_data(child)}
        view.append(settings_table(data["adapters"]))
    view.append(files_table(files))
    require_all_weights_read(files)
    if isinstance(child, Checkpoint):
        _describe_model(child, base, data, view)
    else:
        require_effect(child, read_values=False)
        _describe_merge(child, base, padded, data, view)


def _describe_intake(root: Path, data: dict[str, Any], view: "list[Table | str]") -> None:
    """Add the base and the products that the fine-tune would get in the inbox, if the settings have a base."""
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.intake.placement import place
    from qwen_pipeline.models.inbox import Arrival

    settings = load_settings()
    if not (settings.base_model or settings.bases):
        return
    found = place(settings, Arrival(root.resolve().name, root))
    data["intake"] = {**asdict(found), "products": list(found.products)}
    if found.state == "placed":
        base = f"Its base in the settings is {found.base}. " if found.base else ""
        view.append(f"{base}In the inbox it becomes: {', '.join(found.products)}.")
    else:
        view.append(f"In the inbox it would be {found.state}: {found.reason} {found.remedy}".rstrip())


def _describe_model(
    child: "Checkpoint", base: "KnownBase | None", data: dict[str, Any], view: "list[Table | str]"
) -> None:
    from qwen_pipeline.checkpoint.lazy import open_checkpoint
    from qwen_pipeline.cli.console import size
    from qwen_pipeline.models.examine import require_full_precision_model
    from qwen_pipeline.qwen.settle import settle
    from qwen_pipeline.transforms.fine_tune.adopt import adopt
    from qwen_pipeline.transforms.sidecars import with_sidecars
    from qwen_pipeline.transforms.tokenizer_fits import require_tokenizer_fits

    view.append(f"Full model: {len(child)} tensors, {size(child.nbytes)}.")
    require_full_precision_model(child)
    if base:
        parent = settle(base.weights.of(open_checkpoint(base.root))).checkpoint
        adopted = adopt(parent, child)
        whole = adopted.checkpoint
        output, source = base.weights.kept(whole), base.weights.kept(parent)
        carried = [name for name, tensor in output.tensors.items() if tensor is source.tensors.get(name)]
        data |= {"taken": len(output) - len(carried), "carried_over": carried, "left_out": len(whole) - len(output)}
        view.append(f"{len(output) - len(carried)} tensors are taken, {len(carried)} are carried over from the base.")
        view += [f"{len(whole) - len(output)} tensors are left out: --text-only."] * base.weights.text_only
        data["settled"] = [*adopted.settled.remarks, *adopted.remarks]
        view += [f"Settled by the stored weights: {remark}." for remark in data["settled"]]
        require_tokenizer_fits(with_sidecars(output, parent, child.sidecars, text_only=base.weights.text_only))


def _describe_merge(
    child: "AdapterSet", base: "KnownBase | None", padded: Path | None, data: dict[str, Any], view: "list[Table | str]"
) -> None:
    from qwen_pipeline.checkpoint.lazy import open_checkpoint
    from qwen_pipeline.cli.inspect_views import merge_table
    from qwen_pipeline.models.base_names import base_report
    from qwen_pipeline.models.open import paddings_of
    from qwen_pipeline.qwen.config import diff_configs
    from qwen_pipeline.qwen.settle import settle
    from qwen_pipeline.transforms.lora.merge import merge_lora
    from qwen_pipeline.transforms.sidecars import with_sidecars
    from qwen_pipeline.transforms.tokenizer_fits import require_tokenizer_fits

    if base is None:
        return
    data["names_base"] = asdict(base_report(base, child))
    settled = settle(base.weights.of(open_checkpoint(base.root)))
    parent = settled.checkpoint
    merged = merge_lora(parent, child, paddings=paddings_of(base.root, child, padded=padded), check_values=False)
    output = base.weights.kept(merged.checkpoint)
    data["left_out"] = len(merged.checkpoint) - len(output)
    data["settled"] = [f"in the base, {remark}" for remark in settled.remarks]
    data["trained"] = merged.bridge.trained if merged.bridge else None
    data["config"] = diff_configs(parent.config, merged.checkpoint.config)
    merges = merged.plan.merges.items()
    data["lands"] = {name: _merge_data(merge) for name, merge in merges if merge.adapter_tensors}
    view += [merge_table(data["lands"]), *_remarks(data)]
    view += [f"Settled by the stored weights: {remark}." for remark in data["settled"]]
    require_tokenizer_fits(with_sidecars(output, parent, child.sidecars, text_only=base.weights.text_only))


def _what(found: "Recognized") -> dict[str, Any]:
    saved_by = [{"tool": tool, "evidence": evidence} for tool, evidence in found.tools.items()]
    return {"is": found.kind.name, "saved_by": saved_by}


def _declared(root: Path) -> dict[str, Any]:
    """Return the type and base that an adapter's settings declare, even if the adapter is refused."""
    from qwen_pipeline.checkpoint.files import load_json
    from qwen_pipeline.errors import InputRefused
    from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG

    try:
        settings = load_json(root / ADAPTER_CONFIG)
    except InputRefused:
        return {}
    return {"declared": {name: settings.get(name) for name in ("peft_type", "base_model_name_or_path", "revision")}}


def _remarks(data: Mapping[str, Any]) -> list[str]:
    """Return sentences about other effects of a merge into this base."""
    bridged = {
        "live": "Trained on the model that this base was padded from: the base is unpadded for the merge, then padded"
        " again in the same way.",
        "padded": "Trained on a padded checkpoint of this base: the channels that padding added are left out.",
    }
    remarks = [bridged[data["trained"]]] if data["trained"] else []
    remarks += [f"{data['left_out']} tensors are left out: --text-only."] if data["left_out"] else []
    remarks += [f"config.json: {path} becomes {json.dumps(value)}." for path, value in data["config"].items()]
    if not data["trained"]:
        remarks.append(data["names_base"]["detail"])
    return remarks


def _adapter_data(adapters: "AdapterSet") -> list[dict[str, Any]]:
    return [
        {
            "path": str(member.adapter.root),
            "weight": member.weight,
            "base": member.adapter.base_name,
            "revision": member.adapter.revision,
            "peft_version": member.adapter.config.get("peft_version"),
            "tensors": len(member.adapter.weights.specs),
            "spelling": list(member.adapter.weights.spelling.differences),
            "settings": asdict(member.adapter.settings),
        }
        for member in adapters.members
    ]


def _merge_data(merge: "TensorMerge") -> dict[str, Any]:
    """Return the changes of one tensor of the base, and the adapter tensors that cause them."""
    changes = {
        "replaced": merge.is_replaced,
        "updated": bool(merge.terms),
        "renormed": merge.norms is not None,
        "rows replaced": merge.token_rows is not None,
    }
    return {
        "what": [change for change, applies in changes.items() if applies] or ["kept"],
        "scalings": sorted({term.scaling for term in merge.terms}),
        "from": [name for _, name in merge.adapter_tensors],
    }
