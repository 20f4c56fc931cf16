"""Environments of engines are complete or absent, are installed once, and have readable errors."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen_pipeline.errors import EnvironmentFault, InputRefused
from qwen_pipeline.progress import Progress
from qwen_pipeline.workers import environments
from qwen_pipeline.workers.environments import (
    RECORD,
    WorkerEnvironment,
    check_environment,
    find_environment,
    install_environment,
)


@pytest.mark.slow
@pytest.mark.engine
def test_the_installed_engine_imports_and_has_its_pinned_versions() -> None:
    versions = check_environment("gptqmodel")
    assert versions["gptqmodel"] == "7.6.0"
    assert versions == find_environment("gptqmodel").versions()
    assert set(versions) == {"gptqmodel", "optimum", "transformers", "torch"}


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(InputRefused, match="There is no engine 'other'"):
        find_environment("other")


def test_an_absent_engine_names_the_command_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="is not installed") as caught:
        find_environment("gptqmodel", engines=tmp_path)
    assert "qwen-pipeline engine install gptqmodel" in caught.value.remedy


def test_an_environment_without_a_record_is_incomplete(tmp_path: Path) -> None:
    (tmp_path / "gptqmodel" / "bin").mkdir(parents=True)
    (tmp_path / "gptqmodel" / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(EnvironmentFault, match="not installed completely"):
        find_environment("gptqmodel", engines=tmp_path)


def test_an_environment_that_the_user_names_needs_no_record() -> None:
    assert find_environment("gptqmodel", Path(sys.executable)).python == Path(sys.executable)
    with pytest.raises(EnvironmentFault, match="does not exist"):
        find_environment("gptqmodel", Path("/nowhere/python"))


def test_an_environment_without_the_engine_is_named() -> None:
    with pytest.raises(EnvironmentFault, match="lacks gptqmodel"):
        WorkerEnvironment(name="gptqmodel", python=Path(sys.executable)).versions()


@pytest.mark.parametrize("endless", ["sleep 60", "yes", "sleep 60 & yes no 1>&2"])
def test_an_interpreter_that_does_not_end_is_named(
    endless: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "ANSWER_SECONDS", 0.2)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{endless}\n")
    python.chmod(0o755)
    with pytest.raises(EnvironmentFault, match="did not answer with a version within"):
        WorkerEnvironment(name="gptqmodel", python=python).versions()


@pytest.mark.slow
def test_a_failed_installation_quotes_pip_and_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "_requirements", lambda _: f"{tmp_path}/no-such-package-1.0-py3-none-any.whl\n")
    with pytest.raises(EnvironmentFault, match=r"(?s)its last lines:.*no-such-package"):
        install_environment("gptqmodel", engines=tmp_path)
    assert not (tmp_path / "gptqmodel" / RECORD).exists()


def test_an_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        install_environment("gptqmodel", engines=tmp_path / "engines")


@pytest.mark.slow
def test_an_installation_is_layered_recorded_and_done_once(tmp_path: Path) -> None:
    events: list[Progress] = []
    found = install_environment("gptqmodel", events.append, engines=tmp_path)
    assert found.versions()["gptqmodel"] == "7.6.0"
    where = "import torch, numpy; print(torch.__file__); print(numpy.__file__)"
    torch_file, numpy_file = subprocess.check_output([found.python, "-c", where], text=True).split()
    assert tmp_path not in Path(torch_file).parents, "torch is shared"
    assert tmp_path in Path(numpy_file).parents, "numpy is the engine's own"
    assert any("gptqmodel" in event.remark for event in events)
    assert all(event.done <= event.total for event in events)

    events.clear()
    assert install_environment("gptqmodel", events.append, engines=tmp_path) == found
    assert not events, "a second installation has nothing to do"
