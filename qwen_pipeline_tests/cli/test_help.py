"""Help has examples, and is fast."""

import os

import pytest

from qwen_pipeline_tests.cli.terminal import qwen_pipeline

COMMANDS = (
    "run",
    "convert",
    "merge",
    "pad",
    "calibrate",
    "evidence",
    "export",
    "quantize",
    "validate",
    "publish",
    "repair",
    "plan",
    "inspect",
    "status",
    "sign",
    "verify",
    "demo",
    "ui",
)
GROUPED = (
    ("engine", "install"),
    ("engine", "check"),
    ("audit", "show"),
    ("audit", "diff"),
    ("audit", "descendants"),
    ("audit", "recall"),
)


def test_help_answers_within_half_a_second() -> None:
    """Processor time is measured, so that a busy machine does not matter."""
    seconds: list[float] = []
    for _ in range(3):
        before = os.times()
        assert qwen_pipeline("--help").code == 0
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.5


def test_help_names_every_command_and_exit_code() -> None:
    text = qwen_pipeline("--help").out
    assert all(command in text for command in (*COMMANDS, "engine"))
    assert "Exit codes: 0 success, 1 a check failed, 2" in text


@pytest.mark.parametrize("command", [*((name,) for name in COMMANDS), *GROUPED])
def test_every_command_has_an_example_and_json_output(command: tuple[str, ...]) -> None:
    text = qwen_pipeline(*command, "--help").out
    assert f"qwen-pipeline {' '.join(command)}" in text
    assert "--json" in text


def test_the_version() -> None:
    assert qwen_pipeline("--version").out.strip() == "0.1.0"
