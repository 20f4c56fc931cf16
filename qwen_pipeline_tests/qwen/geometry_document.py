"""The tables of docs/geometry.md. ``python -m qwen_pipeline_tests.qwen.geometry_document`` writes it anew."""

from collections.abc import Sequence

from qwen_pipeline.qwen.geometry import head_obstacles, tower_sizes
from qwen_pipeline.qwen.tensor_parallel.engines import SERVING_ENGINES, ShardingVerdict, predict_serving
from qwen_pipeline.qwen.tensor_parallel.plan import options
from qwen_pipeline.qwen.tensor_parallel.towers import TOWER_RULES, predict_tower_serving
from qwen_pipeline.qwen.towers import towers_of
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.qwen.published import PUBLISHED, TOWERS, Published, PublishedTower, as_config

DOCUMENT = REPOSITORY / "docs" / "geometry.md"
MARK = "<!-- {}: {} -->\n"
DEGREES = (1, 2, 4, 8)
LETTERS: dict[ShardingVerdict, str] = {
    "ok": "o",
    "padded at load": "p",
    "unknown": "?",
    "refused": "R",
    "silently wrong": "W",
}


def table() -> str:
    """Return the rows for every published size, engine and degree, and the rules' sources."""
    head = ["model", *(f"`{engine}`" for engine in SERVING_ENGINES), "cure for `vllm-marlin`"]
    rows = [_row(model) for model in PUBLISHED]
    lines = [head, ["---"] * len(head), *rows]
    rules = [f"- `{name}`: {engine.source}." for name, engine in SERVING_ENGINES.items()]
    return "\n".join(
        [
            *("| " + " | ".join(line) + " |" for line in lines),
            *("", "Where each rule was read:", "", *rules),
            *("", "Where each size was read:", "", *_sources(PUBLISHED), ""),
        ]
    )


def tower_table() -> str:
    """Return the rows for every published tower, and where its sizes were read."""
    head = ["model", "tower", "MLP channels", "heads", *(f"`{engine}`" for engine in TOWER_RULES), "`--towers` at TP 8"]
    lines = [head, ["---"] * len(head), *map(_tower_row, TOWERS)]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", *_sources(TOWERS), ""])


def written(text: str) -> str:
    """Return the document with the tables between their marks replaced."""
    for name, rows in (("towers", tower_table()), ("table", table())):
        begin, end = MARK.format(name, "begin"), MARK.format(name, "end")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{rows}\n{end}{rest.split(end)[1]}"
    return text


def _tower_row(published: PublishedTower) -> list[str]:
    config, highest = published.config, max(DEGREES)
    (tower,) = towers_of(config)
    live = tower.width(config)
    (padded, *_) = [size.padded for size in tower_sizes(config, ranks=highest)] or [live]
    cells = [
        "".join(LETTERS[predict_tower_serving(config, tower, engine, degree=degree).verdict] for degree in DEGREES)
        for engine in TOWER_RULES
    ]
    cure = f"{padded} (+{(padded - live) / live:.2%})" if padded != live else "unpadded"
    heads = str(tower.size(config, tower.heads))
    return [published.name, tower.part, str(live), heads, *(f"`{cell}`" for cell in cells), cure]


def _row(model: Published) -> list[str]:
    config = as_config(model)
    cells = [
        "".join(LETTERS[predict_serving(config, engine, group_size=128, degree=degree).verdict] for degree in DEGREES)
        for engine in SERVING_ENGINES
    ]
    name = model.name if model.source else f"{model.name} *"
    return [name, *(f"`{cell}`" for cell in cells), _cure(model)]


def _sources(published: Sequence[Published] | Sequence[PublishedTower]) -> list[str]:
    models: dict[str, dict[str, None]] = {}
    for model in published:
        models.setdefault(model.source, {})[model.name] = None
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
