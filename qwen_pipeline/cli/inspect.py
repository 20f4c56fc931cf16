"""``qwen-pipeline inspect``: what a fine-tune is, where its tensors would land, and what would be refused."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    base: Annotated[Path | None, typer.Option(help="Base that it would be merged into.")] = None,
    trained_on: Annotated[
        Path | None, typer.Option(help="Padded checkpoint of the base that the LoRA was trained on, if it names none.")
    ] = None,
) -> CommandResult:
    """Say what a fine-tune is, what it was trained on, and with a base where each of its tensors lands.

    FINE_TUNE is a directory with a LoRA, with several and an adapters.toml, or with a whole model. What cannot be
    merged exactly is named as merge would name it, and ends with exit code 2.
    """
    from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
    from qwen_pipeline.cli.tables import size
    from qwen_pipeline.errors import InputRefused
    from qwen_pipeline.models.open import open_fine_tune, paddings_of
    from qwen_pipeline.stages.merge import KnownBase, base_report
    from qwen_pipeline.transforms.lora.fine_tune import adopt
    from qwen_pipeline.transforms.lora.merge import merge_lora

    data: dict[str, Any] = {"fine_tune": str(fine_tune), "base": str(base) if base else None}
    view: list[Table | str] = []
    try:
        child = open_fine_tune(fine_tune)
        if isinstance(child, Checkpoint):
            data |= {"kind": "full", "tensors": len(child)}
            if base:
                adopt(open_checkpoint(base), child)
            return CommandResult(data=data, view=[f"A whole model of {len(child)} tensors, {size(child.nbytes)}."])
        data |= {"kind": "adapter", "combination": child.combination, "adapters": _described(child)}
        view.append(_settings_table(data["adapters"]))
        if base:
            data["names_base"] = asdict(base_report(KnownBase(root=base), child))
            parent = open_checkpoint(base)
            merged = merge_lora(parent, child, paddings=paddings_of(base, child, padded=trained_on))
            data["trained"] = merged.bridge.trained if merged.bridge else None
            data["config"] = _changes(parent.config, merged.checkpoint.config)
            data["lands"] = {name: _landing(recipe) for name, recipe in merged.plan.recipes.items() if recipe.uses}
            view += [_landing_table(data["lands"]), *_remarks(data)]
    except InputRefused as refusal:
        return CommandResult(data=_declared(fine_tune) | data, view=view, fault=refusal)
    return CommandResult(data=data, view=view)


def _declared(root: Path) -> dict[str, Any]:
    """Return what the settings of an adapter call it, also if it is refused."""
    from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG

    try:
        settings = json.loads((root / ADAPTER_CONFIG).read_bytes())
        return {"declared": {name: settings.get(name) for name in ("peft_type", "base_model_name_or_path", "revision")}}
    except (OSError, ValueError, AttributeError):
        return {}


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config that a merge sets, by their paths."""
    changed: dict[str, Any] = {}
    for field, value in after.items():
        if isinstance(value, Mapping):
            changed |= {f"{field}.{path}": new for path, new in _changes(before.get(field, {}), value).items()}
        elif field not in before or before[field] != value:
            changed[field] = value
    return changed


def _remarks(data: Mapping[str, Any]) -> list[str]:
    """Say what else a merge into this base means."""
    sides = {
        "live": "It was trained on what this base was padded from: unpadded to merge, padded again by its own map.",
        "padded": "It was trained on a padded checkpoint of this base: the channels that padding added are left out.",
    }
    remarks = [sides[data["trained"]]] if data["trained"] else []
    remarks += [f"config.json: {path} becomes {json.dumps(value)}." for path, value in data["config"].items()]
    if not data["names_base"]["passed"] and not data["trained"]:
        remarks.append(data["names_base"]["detail"])
    return remarks


def _described(adapters: "AdapterSet") -> list[dict[str, Any]]:
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


def _landing(recipe: "TensorMerge") -> dict[str, Any]:
    """Say what becomes of one tensor of the base, and of which tensors of the adapters."""
    happens = {
        "replaced": recipe.is_replaced,
        "updated": bool(recipe.terms),
        "renormed": recipe.norms is not None,
        "rows replaced": recipe.tokens is not None,
    }
    return {
        "what": [what for what, it_is in happens.items() if it_is] or ["kept"],
        "scalings": sorted({term.scaling for term in recipe.terms}),
        "from": [name for _, name in recipe.uses],
    }


def _settings_table(adapters: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table("adapter", "trained on", "PEFT", "tensors", "weight", "settings")
    for adapter in adapters:
        settings = ", ".join(f"{name} {value}" for name, value in adapter["settings"].items() if value not in _UNSET)
        trained_on = " at ".join(filter(None, (adapter["base"] or "not named", adapter["revision"])))
        table.add_row(
            adapter["path"],
            trained_on,
            adapter["peft_version"] or "",
            str(adapter["tensors"]),
            f"{adapter['weight']:g}",
            settings,
        )
    return table


def _landing_table(lands: dict[str, dict[str, Any]]) -> "Table":
    """Return the tensors that change, those that differ in numbers only in one line."""
    from rich.table import Table

    lines = Counter(
        (_NUMBER.sub("*", name), ", ".join(landing["what"]), ", ".join(f"{s:g}" for s in landing["scalings"]))
        for name, landing in lands.items()
    )
    table = Table("tensors of the base", "how many", "what happens", "scaling")
    for (name, what, scaling), count in lines.items():
        table.add_row(name, str(count), what, scaling)
    return table
