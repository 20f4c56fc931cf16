"""The table of docs/geometry.md. ``python -m qwen_pipeline_tests.qwen.geometry_document`` writes it anew."""

from pathlib import Path

from qwen_pipeline.qwen.geometry import head_obstacles
from qwen_pipeline.qwen.planning import options
from qwen_pipeline.qwen.serving import ENGINES, Verdict, serving
from qwen_pipeline_tests.qwen.published import PUBLISHED, Published, as_config

DOCUMENT = Path(__file__).parents[2] / "docs" / "geometry.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
DEGREES = (1, 2, 4, 8)
LETTERS: dict[Verdict, str] = {"ok": "o", "padded at load": "p", "unknown": "?", "refused": "R", "silently wrong": "W"}


def table() -> str:
    """Return the rows for every published size, engine and degree, and the rules' sources."""
    head = ["model", *(f"`{engine}`" for engine in ENGINES), "cure for `vllm-marlin`"]
    rows = [_row(model) for model in PUBLISHED]
    lines = [head, ["---"] * len(head), *rows]
    rules = [f"- `{name}`: {engine.source}." for name, engine in ENGINES.items()]
    return "\n".join(
        [
            *("| " + " | ".join(line) + " |" for line in lines),
            *("", "Where each rule was read:", "", *rules),
            *("", "Where each size was read:", "", *_sources(), ""),
        ]
    )


def written(text: str) -> str:
    """Return the document with the table between its marks replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


def _row(model: Published) -> list[str]:
    config = as_config(model)
    cells = [
        "".join(LETTERS[serving(config, engine, group_size=128, degree=degree).verdict] for degree in DEGREES)
        for engine in ENGINES
    ]
    name = model.name if model.source else f"{model.name} *"
    return [name, *(f"`{cell}`" for cell in cells), _cure(model)]


def _sources() -> list[str]:
    models = {
        source: [m.name for m in PUBLISHED if m.source == source] for source in {m.source: None for m in PUBLISHED}
    }
    return [f"- {', '.join(names)}: {source or 'from memory (*)'}." for source, names in models.items()]


def _cure(model: Published) -> str:
    config = as_config(model)
    highest = max(degree for degree in DEGREES if not head_obstacles(config, degree))
    best = options(config, {"vllm-marlin": [highest]})[0]
    sizes = ", ".join(f"{size.live} to {size.padded}" for size in best.plan.sizes if size.zeros)
    cost = f" (+{best.weights:.1%} weights)" if sizes else ""
    return f"TP {highest}: groups of {best.group_size}" + (f", pad {sizes}{cost}" if sizes else "")


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
