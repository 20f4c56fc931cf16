"""``qwen-pipeline inspect``: describe a fine-tune and the base tensors that it changes, or say why it is refused."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_pipeline.cli.options import TrainedOn
from qwen_pipeline.cli.results import CommandResult, command

if TYPE_CHECKING:
    from rich.table import Table

    from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
    from qwen_pipeline.transforms.lora.plan import TensorMerge

app = typer.Typer()
_UNSET: tuple[object, ...] = (False, "none", (), {})
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@command(
    app, "inspect", examples=["qwen-pipeline inspect my-lora/", "qwen-pipeline inspect my-lora/ --base base/ --json"]
)
def inspect(
    fine_tune: Path,
    base: Annotated[Path | None, typer.Option(help="Base to merge into.")] = None,
    trained_on: TrainedOn = None,
) -> CommandResult:
    """Describe a fine-tune and its base, and with --base the tensors of the base that it changes.

    FINE_TUNE is a directory with a LoRA, with several LoRAs and an adapters.toml, or with a full model. A fine-tune
    that cannot be merged exactly is refused with the message of merge and exit code 2.
    """
    from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
    from qwen_pipeline.cli.tables import size
    from qwen_pipeline.errors import InputRefused
    from qwen_pipeline.models.open import open_fine_tune, paddings_of
    from qwen_pipeline.qwen.config import diff_configs
    from qwen_pipeline.stages.merge import KnownBase, base_report
    from qwen_pipeline.transforms.fine_tune.adopt import adopt
    from qwen_pipeline.transforms.lora.merge import merge_lora

    data: dict[str, Any] = {"fine_tune": str(fine_tune), "base": str(base) if base else None}
    view: list[Table | str] = []
    try:
        child = open_fine_tune(fine_tune)
        if isinstance(child, Checkpoint):
            data |= {"kind": "full", "tensors": len(child)}
            if base:
                adopt(open_checkpoint(base), child)
            return CommandResult(data=data, view=[f"Full model: {len(child)} tensors, {size(child.nbytes)}."])
        data |= {"kind": "adapter", "combination": child.combination, "adapters": _adapter_data(child)}
        view.append(_settings_table(data["adapters"]))
        if base:
            data["names_base"] = asdict(base_report(KnownBase(root=base), child))
            parent = open_checkpoint(base)
            merged = merge_lora(parent, child, paddings=paddings_of(base, child, padded=trained_on))
            data["trained"] = merged.bridge.trained if merged.bridge else None
            data["config"] = diff_configs(parent.config, merged.checkpoint.config)
            merges = merged.plan.merges.items()
            data["lands"] = {name: _merge_data(merge) for name, merge in merges if merge.adapter_tensors}
            view += [_merge_table(data["lands"]), *_remarks(data)]
    except InputRefused as refusal:
        return CommandResult(data=_declared(fine_tune) | data, view=view, fault=refusal)
    return CommandResult(data=data, view=view)


def _declared(root: Path) -> dict[str, Any]:
    """Return the type and base that an adapter's settings declare, even if the adapter is refused."""
    from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG

    try:
        settings = json.loads((root / ADAPTER_CONFIG).read_bytes())
        return {"declared": {name: settings.get(name) for name in ("peft_type", "base_model_name_or_path", "revision")}}
    except (OSError, ValueError, AttributeError):
        return {}


def _remarks(data: Mapping[str, Any]) -> list[str]:
    """Return sentences about other effects of a merge into this base."""
    bridged = {
        "live": "Trained on the model that this base was padded from: the base is unpadded for the merge, then padded"
        " again in the same way.",
        "padded": "Trained on a padded checkpoint of this base: the channels that padding added are left out.",
    }
    remarks = [bridged[data["trained"]]] if data["trained"] else []
    remarks += [f"config.json: {path} becomes {json.dumps(value)}." for path, value in data["config"].items()]
    if not data["names_base"]["passed"] and not data["trained"]:
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


def _settings_table(adapters: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table("adapter", "trained on", "PEFT", "tensors", "weight", "settings")
    for adapter in adapters:
        settings = ", ".join(f"{name} {value}" for name, value in adapter["settings"].items() if value not in _UNSET)
        trained_on = " at ".join(filter(None, (adapter["base"] or "unknown", adapter["revision"])))
        table.add_row(
            adapter["path"],
            trained_on,
            adapter["peft_version"] or "",
            str(adapter["tensors"]),
            f"{adapter['weight']:g}",
            settings,
        )
    return table


def _merge_table(tensors: dict[str, dict[str, Any]]) -> "Table":
    """Return the tensors that change; names that differ only in numbers share a row."""
    from rich.table import Table

    lines = Counter(
        (_NUMBER.sub("*", name), ", ".join(merge["what"]), ", ".join(f"{s:g}" for s in merge["scalings"]))
        for name, merge in tensors.items()
    )
    table = Table("tensors of the base", "count", "change", "scaling")
    for (name, what, scaling), count in lines.items():
        table.add_row(name, str(count), what, scaling)
    return table
