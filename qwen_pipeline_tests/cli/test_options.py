"""Options that are generated from the fields of a spec."""

import inspect
from dataclasses import fields
from typing import Annotated

import typer
from typer.testing import CliRunner

from qwen_pipeline.cli.options import PADDING_OPTIONS, SpecOptions, spec_options
from qwen_pipeline.cli.quantize import QUANTIZATION_OPTIONS
from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.quantization.spec import CalibrationSpec, QuantSpec
from qwen_pipeline.qwen.padding_spec import PaddingSpec

app = typer.Typer()


@command(app, "quantize", examples=["quantize --bits 8"])
def quantize(spec: Annotated[QuantSpec, QUANTIZATION_OPTIONS]) -> CommandResult:
    return CommandResult(data={"spec": spec.to_json(), "is_default": spec == QuantSpec()})


def test_arguments_become_the_spec_and_the_rest_are_its_defaults() -> None:
    ran = CliRunner().invoke(app, ["--json"])
    assert '"is_default": true' in ran.stdout
    options = ["--bits", "8", "--no-sym", "--desc-act", "--override", "mlp:mse=2.4", "--override", "q_proj:mse=1"]
    ran = CliRunner().invoke(app, [*options, "--json"])
    assert '"bits": 8' in ran.stdout
    assert '"sym": false' in ran.stdout
    assert '"desc_act": true' in ran.stdout
    assert '"dynamic": {"mlp": {"mse": 2.4}, "q_proj": {"mse": 1.0}}' in ran.stdout


def test_a_value_that_the_spec_refuses_ends_with_2() -> None:
    assert CliRunner().invoke(app, ["--bits", "5"]).exit_code == 2


def test_every_field_has_an_option() -> None:
    assert QUANTIZATION_OPTIONS.options.keys() == {field.name for field in fields(QuantSpec)}
    assert PADDING_OPTIONS.options.keys() == {field.name for field in fields(PaddingSpec)} - {"targets", "method"}


def test_only_annotated_parameters_become_options() -> None:
    options = SpecOptions(CalibrationSpec, {"samples": "Windows."})

    def function(spec: Annotated[CalibrationSpec, options], other: int) -> None: ...

    first, second = inspect.signature(function).parameters.values()
    assert spec_options(first) is options
    assert spec_options(second) is None
    assert [parameter.default for parameter in options.parameters()] == [CalibrationSpec().samples]
