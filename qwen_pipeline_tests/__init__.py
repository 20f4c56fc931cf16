"""Tests, in the order of the package; what several of them need lies beside them."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
