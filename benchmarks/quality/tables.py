"""Tables of the comparison: each recipe's figures, and the mean ratio to GPTQModel's own loop over paired draws."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import pandas as pd

from benchmarks.quality.contenders import CONTENDERS, PEER

Row = Mapping[str, Any]
TAIL = {"kl": "KL", "p99_9": "p99.9", "tail": "top .1 %", "rare": "rare", "first": "first 32", "last": "last quarter"}
"""Figures whose ratios are compared with that of the mean, and their titles."""


def main_table(rows: Sequence[Row], texts: Sequence[str], baseline: str = PEER) -> pd.DataFrame:
    """Return format x recipe: the mean KL on each text and its ratio to the baseline's, seconds and memory.

    A ratio is the mean over the draws that both have, with its standard error.
    """
    return pd.DataFrame([_main_line(own, rows, texts, baseline) for own in _by_recipe(rows)])


def _main_line(own: Sequence[Row], rows: Sequence[Row], texts: Sequence[str], baseline: str) -> dict[str, Any]:
    line = _head(own)
    for text in texts:
        found = [row[text]["kl"] for row in own if text in row]
        line[text] = f"{mean(found):.4f}{_ratio(_ratios(own, rows, text, 'kl', baseline))}" if found else ""
    line["perplexity"] = f"{mean(row[texts[0]]['perplexity'] for row in own):.3f}"
    line["top-1"] = f"{mean(row[texts[0]]['top1'] for row in own):.2%}"
    for name, title in (("engine_seconds", "engine s"), ("seconds", "wall s"), ("processor_seconds", "processor s")):
        line[title] = round(mean(row[name] for row in own))
    for name, title in (("host_peak_bytes", "host GiB"), ("gpu_peak_bytes", "GPU GiB")):
        line[title] = f"{mean(row[name] for row in own) / 2**30:.2f}"
    return line


def tail_table(rows: Sequence[Row], texts: Sequence[str], baseline: str = PEER) -> pd.DataFrame:
    """Return format x recipe x text: the ratios to the baseline of the mean KL, its tail, and parts of the text."""
    lines: list[dict[str, Any]] = []
    for own in _by_recipe(rows):
        for text in texts:
            ratios = {title: _ratios(own, rows, text, name, baseline) for name, title in TAIL.items()}
            lines.append({**_head(own), "text": text, **{title: _ratio(each)[2:] for title, each in ratios.items()}})
    return pd.DataFrame(lines)


def errors_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Return the recipes that learn: the mean share of a layer's error that is left, and how far offsets could go."""
    lines: list[dict[str, Any]] = []
    for own in _by_recipe(rows):
        learned = [each for row in own for each in row.get("errors", ()) if "before_learning" in each]
        if learned:
            travels = [str(each.get("travel", "kept")) for each in learned]
            counts = {travel: travels.count(travel) / len(own) for travel in sorted(set(travels), reverse=True)}
            left = mean(each["output"] / each["before_learning"] for each in learned if each["before_learning"])
            shown = ", ".join(f"{travel}: {count:.1f}" for travel, count in counts.items())
            lines.append({**_head(own), "error left": f"{left:.3f}", "layers by travel": shown})
    return pd.DataFrame(lines)


def losers_of_the_tail(rows: Sequence[Row], texts: Sequence[str], baseline: str = PEER) -> list[str]:
    """Return a sentence for each recipe and text whose mean KL is better than the baseline's, and its tail worse."""
    found: list[str] = []
    for own in _by_recipe(rows):
        for text in texts:
            means, tails = (_ratios(own, rows, text, name, baseline) for name in ("kl", "tail"))
            if means and mean(means) < 1 < mean(tails):
                named = ", ".join(str(value) for value in _head(own).values())
                found.append(f"{named}, {text}: mean {mean(means):.3f}, top 0.1 % {mean(tails):.3f} of {baseline}'s.")
    return found


def _by_recipe(rows: Sequence[Row]) -> Iterable[list[Row]]:
    order = list(dict.fromkeys([*CONTENDERS, *(row["recipe"] for row in rows)]))
    by_format: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (*_format(row), order.index(row["recipe"]), row["seed"])):
        by_format.setdefault((*_format(row), row["recipe"]), []).append(row)
    return by_format.values()


def _format(row: Row) -> tuple[Any, ...]:
    return row["model"], row["bits"], row["group_size"]


def _head(own: Sequence[Row]) -> dict[str, Any]:
    model, bits, group_size = _format(own[0])
    return {"model": model, "bits": bits, "groups": group_size, "recipe": own[0]["recipe"], "draws": len(own)}


def _ratios(own: Iterable[Row], rows: Sequence[Row], text: str, figure: str, baseline: str) -> list[float]:
    others = {(*_format(row), row["seed"]): row for row in rows if row["recipe"] == baseline}
    pairs = [(row, others.get((*_format(row), row["seed"]))) for row in own]
    return [row[text][figure] / other[text][figure] for row, other in pairs if other and text in row and text in other]


def _ratio(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    error = f" ± {stdev(ratios) / len(ratios) ** 0.5:.3f}" if len(ratios) > 1 else ""
    return f", {mean(ratios):.3f}{error}"
