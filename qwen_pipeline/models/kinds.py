"""Recognition of a directory's contents, and of the tools that seem to have saved it, from names and small files."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any, cast

from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import CONFIG, relative_files
from qwen_pipeline.errors import InputRefused, listed
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG
from qwen_pipeline.transforms.lora.adapter_set import ADAPTER_SET

_README = "README.md"
_README_BYTES = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of directory.

    Attributes:
        name: For people, with an article.
        files: Patterns of paths, of which each must match a file.
        without: Patterns that match no file.
        fields: Paths of fields that the adapter's or the model's config must have.
        refusal: Why it cannot be a fine-tune, and the remedy; None if it can be. The remedy may name ``{root}``, and
            with ``{inside}`` the directories in it that hold a model or an adapter.
        is_incomplete: Whether a file is missing that may still arrive.
    """

    name: str
    files: Sequence[str]
    without: Sequence[str] = ()
    fields: Sequence[str] = ()
    refusal: tuple[str, str] | None = None
    is_incomplete: bool = False


_SHARDED = (
    "the ranks of a sharded training saved their parts, which only the trainer puts together",
    "Convert it, and use the result: qwen-pipeline convert --from {root} --out CONVERTED",
)
_MLX = (
    "MLX saves its factors under other names and transposed, and scales them in its own way",
    "Fuse it where it was trained, with the full-precision base, and use the result as a full fine-tune:"
    " mlx_lm.fuse --model BASE --adapter-path {root} --save-path FUSED --dequantize",
)
_SEVERAL = (
    "each checkpoint in it is a fine-tune of its own",
    "Pass the one that is meant: {inside}.",
)
_BARE_ADAPTER = (
    f"{ADAPTER_CONFIG}, which states rank and scaling, is missing",
    "Fetch it too: PEFT saves it beside the weights.",
)
_BARE_MODEL = (f"{CONFIG} is missing", "Fetch it too: it is saved beside the weights.")
_ADAPTERS = (
    "each directory in it is a fine-tune of its own",
    "Pass the one that is meant: {inside}. To merge several, pass each with --adapter, or list them in"
    f" {{root}}/{ADAPTER_SET}.",
)
_MODELS = ("each directory in it is a fine-tune of its own", "Pass the one that is meant: {inside}.")
_CACHED = (
    "it holds each revision of the model in a directory of its own",
    "Pass the revision that is meant: {inside}.",
)
_MEGATRON = (
    "Megatron names and splits its tensors in its own way",
    "Export it to Hugging Face's format where it was trained, and use the result; ms-swift does so with --to_hf true.",
)
_PACKED = ("the files are in an archive", "Unpack it, and pass the directory that holds the files.")
_GGUF = ("GGUF files hold quantized weights", "Use the full-precision model or adapter that they were made from.")

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".7z", ".rar")
KINDS: Sequence[Kind] = (
    Kind(name="a set of adapters", files=(ADAPTER_SET,)),
    Kind(
        name="an adapter of MLX", files=("adapters.safetensors",), without=("adapter_model*.safetensors",), refusal=_MLX
    ),
    Kind(name="an adapter of MLX", files=(ADAPTER_CONFIG,), fields=("lora_parameters",), refusal=_MLX),
    Kind(name="an adapter", files=(ADAPTER_CONFIG, "adapter_model*")),
    Kind(name="a model of Sentence Transformers", files=("modules.json", "*.safetensors")),
    Kind(name="a text-only model", files=(CONFIG, "*.safetensors"), fields=("model_type=*_text",)),
    Kind(name="a whole model", files=(CONFIG, "*.safetensors")),
    Kind(name="an adapter", files=(ADAPTER_CONFIG,)),
    Kind(name="a checkpoint of Megatron", files=("latest_checkpointed_iteration.txt",), refusal=_MEGATRON),
    Kind(name="a checkpoint of Megatron", files=("**mp_rank_*/model_optim_rng.pt",), refusal=_MEGATRON),
    Kind(name="a sharded checkpoint of DeepSpeed", files=("**global_step*/*_states.pt",), refusal=_SHARDED),
    Kind(name="a sharded checkpoint of DeepSpeed", files=("*_model_states.pt",), refusal=_SHARDED),
    Kind(name="a sharded checkpoint of FSDP", files=("**.distcp",), refusal=_SHARDED),
    Kind(name="a sharded checkpoint of verl", files=("**model_world_size_*.pt",), refusal=_SHARDED),
    Kind(name="an output directory of a trainer", files=("checkpoint-*/*",), refusal=_SEVERAL),
    Kind(
        name="an adapter without its settings",
        files=("adapter_model*.safetensors",),
        refusal=_BARE_ADAPTER,
        is_incomplete=True,
    ),
    Kind(
        name="a model without its config",
        files=("model*.safetensors",),
        without=(CONFIG,),
        refusal=_BARE_MODEL,
        is_incomplete=True,
    ),
    Kind(name="a folder of a hub's cache", files=("snapshots/*/*",), refusal=_CACHED),
    Kind(name="a directory of adapters", files=(f"*/{ADAPTER_CONFIG}",), refusal=_ADAPTERS),
    Kind(name="a directory of models", files=(f"*/{CONFIG}", "*/*.safetensors"), refusal=_MODELS),
    Kind(name="a directory of GGUF files", files=("*.gguf",), refusal=_GGUF),
    *(Kind(name="an archive", files=(f"*{ending}",), refusal=_PACKED) for ending in ARCHIVES),
)
"""In the order in which they are tried; the first whose evidence is complete is taken."""
UNKNOWN = Kind(name="none of the known kinds", files=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The traces of one tool, each of which is enough.

    Attributes:
        tool: Its name.
        files: Patterns of paths.
        words: Words in ``README.md``.
        fields: Fields of the adapter's or the model's config; ``name=pattern`` compares the value.
        version: The field that states its version.
    """

    tool: str
    files: Sequence[str] = ()
    words: Sequence[str] = ()
    fields: Sequence[str] = ()
    version: str | None = None


TRACES: Sequence[Trace] = (
    Trace(tool="PEFT", fields=("peft_type",), version="peft_version"),
    Trace(tool="MLX", files=("adapters.safetensors",), words=("- mlx",), fields=("lora_parameters",)),
    Trace(
        tool="Unsloth",
        words=("unsloth",),
        fields=("auto_mapping.unsloth_fixed", "unsloth_version", "unsloth_fixed", "base_model_name_or_path=unsloth/*"),
        version="unsloth_version",
    ),
    Trace(tool="TRL", words=("- trl", "[TRL]")),
    Trace(tool="ms-swift", files=("args.json", "additional_config.json", "vit.safetensors"), words=("ms-swift",)),
    Trace(tool="LLaMA-Factory", files=("trainer_log.jsonl", "llamaboard_config.yaml"), words=("llama-factory",)),
    Trace(tool="Axolotl", words=("axolotl",)),
    Trace(tool="verl", files=("**model_world_size_*", "**fsdp_config.json")),
    Trace(tool="DeepSpeed", files=("zero_to_fp32.py", "global_step*/*", "*_model_states.pt")),
    Trace(tool="FSDP", files=("**.distcp", "pytorch_model_fsdp*/*")),
    Trace(tool="Sentence Transformers", files=("config_sentence_transformers.json",)),
    Trace(tool="the Trainer of Transformers", files=("trainer_state.json", "training_args.bin")),
    Trace(tool="Transformers", fields=("transformers_version",), version="transformers_version"),
    Trace(tool="this pipeline", files=("manifest.json",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognized:
    """The kind of a directory.

    Attributes:
        root: The directory.
        kind: Its kind.
        tools: Each tool that seems to have saved it, with its version if it states one -> the evidence.
    """

    root: Path
    kind: Kind
    tools: Mapping[str, str]

    @property
    def refusal(self) -> tuple[str, str] | None:
        """The reason why it cannot be a fine-tune, and the remedy with the paths of this directory; None if it can."""
        if self.kind.refusal is None:
            return None
        reason, remedy = self.kind.refusal
        inside = listed([quote(str(self.root / path)) for path in _inside(relative_files(self.root))])
        return reason, remedy.format(root=quote(str(self.root)), inside=inside)


def recognize(root: Path) -> Recognized:
    """Recognize a directory by the names of its files, its configs and its model card; no weight is read."""
    files = relative_files(root) if root.is_dir() else []
    config = {**_object(root / CONFIG), **_object(root / ADAPTER_CONFIG)}
    kind = next((kind for kind in KINDS if _is_kind(kind, files, config)), UNKNOWN)
    card = _card(root / _README)
    tools = {
        _versioned(trace, config): evidence
        for trace in TRACES
        if (evidence := next(_evidence(trace, files, config, card), None))
    }
    return Recognized(root=root, kind=kind, tools=tools)


def require_kind(root: Path) -> Recognized:
    """Recognize a directory that can be a fine-tune.

    Raises:
        InputRefused: It is of a kind that cannot be merged; the message names the kind.
    """
    found = recognize(root)
    if refusal := found.refusal:
        raise InputRefused(f"{root} is {found.kind.name}: {refusal[0]}.", remedy=refusal[1])
    if found.kind is UNKNOWN and root.is_dir() and not (root / CONFIG).is_file():
        raise InputRefused(
            f"{root} is {UNKNOWN.name}; it has {listed(relative_files(root)) or 'no files'}.",
            remedy=f"Pass a directory with {ADAPTER_CONFIG}, {ADAPTER_SET}, or {CONFIG} and *.safetensors. Weights that"
            f" a trainer saved in its own form are converted by: qwen-pipeline convert --from {quote(str(root))} --out"
            " CONVERTED",
        )
    return found


def _inside(files: Collection[str]) -> list[str]:
    """Return the directories that hold a model or an adapter; without any, those at the top."""
    holding = {PurePosixPath(path).parent for path in files if path.endswith((f"/{CONFIG}", f"/{ADAPTER_CONFIG}"))}
    outermost = {str(path) for path in holding if not holding & {*path.parents}}
    return sorted(outermost or {path.split("/")[0] for path in files if "/" in path})


def _is_kind(kind: Kind, files: Collection[str], config: Mapping[str, Any]) -> bool:
    return (
        all(_first(files, pattern) for pattern in kind.files)
        and not any(_first(files, pattern) for pattern in kind.without)
        and all(_has_field(config, field) for field in kind.fields)
    )


def _evidence(trace: Trace, files: Collection[str], config: Mapping[str, Any], card: str) -> Iterator[str]:
    yield from (f"{field.partition('=')[0]} in its config" for field in trace.fields if _has_field(config, field))
    yield from (found for pattern in trace.files if (found := _first(files, pattern)))
    yield from (f"{word.removeprefix('- ')!r} in {_README}" for word in trace.words if word.lower() in card)


def _versioned(trace: Trace, config: Mapping[str, Any]) -> str:
    version = config.get(trace.version) if trace.version else None
    return f"{trace.tool} {version}" if version else trace.tool


def _has_field(config: Mapping[str, Any], field: str) -> bool:
    """Return whether a config has a field, such as ``auto_mapping.unsloth_fixed`` or ``model_type=*_text``."""
    path, _, pattern = field.partition("=")
    value: object = config
    for name in path.split("."):
        value = cast("Mapping[str, object]", value).get(name) if isinstance(value, Mapping) else None
    return fnmatch(str(value), pattern) if pattern else bool(value)


def _first(files: Collection[str], pattern: str) -> str | None:
    """Return the first file that matches a pattern; without a slash or a leading ``**`` it is at the top."""
    is_deep = "/" in pattern or pattern.startswith("**")
    return next((path for path in files if fnmatch(path, pattern) and (is_deep or "/" not in path)), None)


def _object(path: Path) -> dict[str, Any]:
    try:
        return load_json(path)
    except InputRefused:
        return {}


def _card(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_README_BYTES).decode(errors="replace").lower()
    except OSError:
        return ""
