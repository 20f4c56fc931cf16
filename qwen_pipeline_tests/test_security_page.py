"""``docs/security.md`` names tests that exist, and the SBOM of the package is one that others can read."""

import json
import re
from importlib.metadata import version

import pytest
from cyclonedx.schema import SchemaVersion

from qwen_pipeline.lineage.product_bom import product_bom
from qwen_pipeline_tests import REPOSITORY

PAGE = (REPOSITORY / "docs" / "security.md").read_text()


def test_tests_that_the_page_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    sources = "\n".join(file.read_text() for file in (REPOSITORY / "qwen_pipeline_tests").rglob("test_*.py"))
    assert len(named) > 30
    assert not {name for name in named if f"def {name}(" not in sources}


def test_every_threat_has_a_gate_and_a_test() -> None:
    rows = re.findall(r"^\| \*\*(.+?)\*\*.*?\|(.+?)\|(.+?)\|$", PAGE, re.MULTILINE)
    assert len(rows) > 15
    for threat, gate, tests in rows:
        assert gate.strip(), threat
        assert "`test_" in tests, threat


def test_telemetry_is_off() -> None:
    assert "telemetry:\n  enabled: false" in (REPOSITORY / "qwen_pipeline" / "runner" / "dagster.yaml").read_text()


def test_the_sbom_lists_what_is_installed() -> None:
    from cyclonedx.validation.json import JsonStrictValidator  # four seconds

    bom = product_bom()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom)) is None
    versions = {each["name"]: each["version"] for each in bom["components"]}
    for name in ("torch", "transformers", "dagster", "safetensors", "pydantic"):
        assert versions[name] == version(name)
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): found for name, found in pinned.items()}
    unpinned = {name for name in versions.keys() - pinned.keys() if not name.startswith("nvidia")}
    assert unpinned <= {"torch", "triton", "setuptools"}  # those of the machine


@pytest.mark.parametrize("name", ["sbom"])
def test_the_make_target_exists(name: str) -> None:
    assert f"\n{name}:" in (REPOSITORY / "Makefile").read_text()
