"""Tests that mirror the package, and the builders and oracles that they share."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
