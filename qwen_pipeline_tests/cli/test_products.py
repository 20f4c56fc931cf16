"""Commands with several bases and recipes: ``status``, ``inspect``, ``plan`` and ``run`` before any run."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from qwen_pipeline.cli.tables import status_table
from qwen_pipeline.status import fine_tune_statuses
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.several import drop, make_several
from qwen_pipeline_tests.site import Site


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = make_several(tmp_path / "site")
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    return site


def test_commands_name_the_products_and_first_what_needs_a_person(several: Site) -> None:
    drop(several, "both-large", "other")
    lost = drop(several, "zz-lost", base_model_name_or_path="Qwen/Lost")
    rows = qwen_pipeline("status", "--json").data["fine_tunes"]
    assert [(row["name"], row["recipe"], row["base"], row["quarantined"]) for row in rows] == [
        ("zz-lost", None, None, True),
        ("both-large@floats", "floats", "large", False),
        ("both-large@wide", "wide", "large", False),
    ]
    terminal = Console(width=80, record=True, file=StringIO())
    terminal.print(status_table(fine_tune_statuses(several.settings)))
    said = terminal.export_text()
    assert said.index("quarantined") < said.index("both-large@floats")
    assert max(map(len, said.splitlines())) <= 80

    placed = qwen_pipeline("inspect", str(several.inbox.root / "both-large"), "--json")
    assert placed.data["intake"]["base"] == "large"
    assert placed.data["intake"]["products"] == ["both-large@wide", "both-large@floats"]
    assert "Its base in the settings is large." in qwen_pipeline("inspect", str(several.inbox.root / "both-large")).out
    found = qwen_pipeline("inspect", str(lost), "--json")
    assert (found.code, found.data["intake"]["state"]) == (0, "quarantined")
    assert "Qwen/Lost" in found.data["intake"]["reason"]

    planned = qwen_pipeline("plan", str(several.root / "other"), "--recipe", "wide", "--json")
    assert planned.code == 0, planned.data
    assert planned.data["targets"] == {"vllm": [3]}
    assert qwen_pipeline("plan", str(several.root / "other"), "--recipe", "wid", "--json").code == 2

    refused = qwen_pipeline("run", "zz-lost", "--json")
    assert (refused.code, "Qwen/Lost" in refused.data["error"]["what"]) == (2, True)
    for arguments in (("both-large", "--recipe", "slow"), ("both-large@slow",)):
        other = qwen_pipeline("run", *arguments, "--json")
        assert "There is no recipe 'slow'" in other.data["error"]["what"]
    nothing = qwen_pipeline("compare", "both-large", "--json")
    assert (nothing.code, "Nothing of 'both-large' is validated" in nothing.data["error"]["what"]) == (2, True)
    assert not several.settings.store_root.exists()
