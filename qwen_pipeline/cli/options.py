"""Option types that several commands share, and options that are generated from the fields of a spec."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.text.spec import TextSpec, parse_template_arguments

TEXT_FORMATS = 'JSONL of {"text"}, {"messages"} or other forms, Parquet, or a dataset on the hub'
ENGINE_HELP = "Quantization engine: this package's layer loop with GPTQModel's solver, or a library's own loop."
RANKS_HELP = "Tensor-parallel ranks, each of which must get whole groups."
TOWERS_HELP = "Also pad vision and audio towers, to widths that all ranks can share."
GROUP_SIZE_HELP = "Consecutive input channels that share one scale."

Source = Annotated[Path, typer.Option("--in", help="Input checkpoint.")]
Out = Annotated[Path, typer.Option(help="New or empty directory. Running the same command again reuses the result.")]
BaseCheckpoint = Annotated[Path, typer.Option(help="Full-precision base checkpoint.")]
TrainedOn = Annotated[
    Path | None,
    typer.Option(help="Padded checkpoint of the base that the LoRA was trained on, if its settings do not name it."),
]
BaseDequantize = Annotated[
    bool,
    typer.Option("--base-dequantize", help="Read FP8, GPTQ, AWQ or compressed-tensors weights as full precision."),
]
BaseNf4 = Annotated[
    Literal["single", "double"] | None,
    typer.Option(help="Round the base as QLoRA does: NF4 without or with double quantization of its statistics."),
]
TextOnly = Annotated[
    bool, typer.Option("--text-only", help="Take the language model of a model with towers, and release it alone.")
]
MaxSkipped = Annotated[
    float | None,
    typer.Option(help="Largest share of records that may be skipped because they cannot be used; default: settings."),
]
TemplateArgument = Annotated[
    list[str] | None,
    typer.Option(help="Argument of the chat template, such as enable_thinking=false; repeatable. Default: settings."),
]
LeaveBehind = Annotated[
    list[str] | None,
    typer.Option(help="Weights beside the fine-tune's own that were not trained: a path or a pattern."),
]
EnginePython = Annotated[Path | None, typer.Option(help="Python interpreter of an environment with the engine.")]


def text_spec(configured: TextSpec, max_skipped: float | None, template_argument: list[str] | None) -> TextSpec:
    """Return the settings that decide how records become tokens; what is not given is as configured.

    Raises:
        InputRefused: A value is invalid.
    """
    return replace(
        configured,
        max_skipped=configured.max_skipped if max_skipped is None else max_skipped,
        template_arguments=parse_template_arguments(template_argument)
        if template_argument
        else configured.template_arguments,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldOption:
    """An option that differs from its field in name or form.

    Attributes:
        flag: The option's name, such as ``--tp``; None if it is the field's name.
        parse: Converts the values of a repeatable option to the field's value; None if the option has the field's type.
    """

    help: str
    flag: str | None = None
    parse: Callable[[list[str]], Any] | None = None


@dataclass(frozen=True, slots=True)
class SpecOptions:
    """Annotation that makes a command's parameter a spec whose fields are options of the command.

    Types and defaults are those of the fields. A flag that is off by default has no ``--no-`` form. A default that
    depends on the machine is not shown in the help.

    Attributes:
        spec: A dataclass.
        options: Field name -> help text, in the order of ``--help``. Fields that are left out keep their defaults.
    """

    spec: type[Any]
    options: Mapping[str, str | FieldOption]

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield a parameter for Typer for each option."""
        types, defaults = get_type_hints(self.spec), {field.name: field.default for field in fields(self.spec)}
        for name, option in self.options.items():
            option = FieldOption(help=option) if isinstance(option, str) else option
            kind, default = (list[str], MISSING) if option.parse else (types[name], defaults[name])
            if default is MISSING:
                kind, default = kind | None, None
            flags = [option.flag or f"--{name.replace('_', '-')}"] if option.flag or default is False else []
            annotation = Annotated[kind, typer.Option(*flags, help=option.help)]
            yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def build(self, arguments: Mapping[str, Any]) -> Any:
        """Return the spec; an argument that is None leaves the field's default."""
        given = {name: arguments[name] for name in self.options if arguments[name] is not None}
        for name, option in self.options.items():
            if isinstance(option, FieldOption) and option.parse and name in given:
                given[name] = option.parse(given[name])
        return self.spec(**given)


def spec_options(parameter: inspect.Parameter) -> SpecOptions | None:
    """Return the options of a command's spec parameter; None for an ordinary parameter."""
    notes = get_args(parameter.annotation)[1:] if get_origin(parameter.annotation) is Annotated else ()
    return next((note for note in notes if isinstance(note, SpecOptions)), None)


PADDING_OPTIONS = SpecOptions(
    PaddingSpec,
    {
        "group_size": GROUP_SIZE_HELP,
        "tensor_parallel": FieldOption(flag="--tp", help=RANKS_HELP),
        "layout": "New channels are halves of live ones (split), or zeros between the live ones or after them.",
        "towers": TOWERS_HELP,
    },
)
