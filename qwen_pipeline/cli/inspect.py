"""``qwen-pipeline inspect``: what a fine-tune is, where its tensors would land, and what would be refused."""

import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_pipeline.cli.answers import Answer, answering

if TYPE_CHECKING:
    from rich.table import Table

    from qwen_pipeline.transforms.adapter_set import AdapterSet
    from qwen_pipeline.transforms.recipes import Recipe

app = typer.Typer()
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@answering(
    app, "inspect", examples=["qwen-pipeline inspect my-lora/", "qwen-pipeline inspect my-lora/ --base base/ --json"]
)
def inspect(
    fine_tune: Path,
    base: Annotated[Path | None, typer.Option(help="Base that it would be merged into.")] = None,
    trained_on: Annotated[
        Path | None, typer.Option(help="Padded checkpoint of the base that the LoRA was trained on, if it names none.")
    ] = None,
) -> Answer:
    """Say what a fine-tune is, what it was trained on, and with a base where each of its tensors lands.

    FINE_TUNE is a directory with a LoRA, with several and an adapters.toml, or with a whole model. What cannot be
    merged exactly is named as merge would name it, and ends with exit code 2.
    """
    from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
    from qwen_pipeline.errors import InputRefused
    from qwen_pipeline.stages.merge import open_fine_tune
    from qwen_pipeline.transforms.fine_tune import adopt
    from qwen_pipeline.transforms.lora import merge_lora
    from qwen_pipeline.transforms.model import paddings_of

    data: dict[str, Any] = {"fine_tune": str(fine_tune), "base": str(base) if base else None}
    view: list[Table] = []
    try:
        child = open_fine_tune(fine_tune)
        if isinstance(child, Checkpoint):
            data |= {"kind": "full", "tensors": len(child)}
            if base:
                adopt(open_checkpoint(base), child)
            return Answer(data=data, view=[f"A whole model of {len(child)} tensors, {child.nbytes / 1e9:.2f} GB."])
        data |= {"kind": "adapter", "combination": child.combination, "adapters": _described(child)}
        view.append(_settings_table(data["adapters"]))
        if base:
            paddings = paddings_of(base, child, padded=trained_on)
            merged = merge_lora(open_checkpoint(base), child, paddings=paddings)
            data["trained"] = merged.crossing.trained if merged.crossing else None
            data["lands"] = {name: _landing(recipe) for name, recipe in merged.plan.recipes.items() if recipe.uses}
            view.append(_landing_table(data["lands"]))
    except InputRefused as refusal:
        return Answer(data=data, view=view, fault=refusal)
    return Answer(data=data, view=view)


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


def _landing(recipe: "Recipe") -> dict[str, Any]:
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
        settings = ", ".join(f"{name} {value}" for name, value in adapter["settings"].items() if value)
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
