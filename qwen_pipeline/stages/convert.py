"""``a trainer's checkpoint -> converted``: the same weights as safetensors, in a directory that the inbox takes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_pipeline.checkpoint.config_types import load_config_file
from qwen_pipeline.checkpoint.digest import digest_files, hash_tensors
from qwen_pipeline.checkpoint.digest_cache import HashedCheckpoint, stat_key
from qwen_pipeline.checkpoint.hashing_reader import HashingReader
from qwen_pipeline.checkpoint.lazy import CONFIG, SINGLE_SHARD, Checkpoint, open_checkpoint, open_sidecars
from qwen_pipeline.checkpoint.manifest import UNREAD
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination, as_destination
from qwen_pipeline.checkpoint.store.rewrite import Rewrite
from qwen_pipeline.checkpoint.store.stage_input import StageInput
from qwen_pipeline.checkpoint.trainers.find import open_trained
from qwen_pipeline.checkpoint.trainers.weights import TrainedWeights
from qwen_pipeline.errors import CheckpointRefused, InputRefused, listed
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.families import FAMILIES, declares_tied
from qwen_pipeline.qwen.fused_weights import parts_of, split_fused
from qwen_pipeline.qwen.names import parse_name, parse_names
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG
from qwen_pipeline.transforms.trained import (
    Dtype,
    Selection,
    is_adapter_tensor,
    part_of,
    plan_shards,
    rounded,
    select_adapter,
    select_model,
    with_dtype,
)

STAGE = "converted"
CODE_VERSION = "1"
ADAPTER_SHARD = "adapter_model.safetensors"
_FINITE_REMEDY = "Convert without --dtype, or to bfloat16. If values are not finite then either, the training diverged."

WEIGHTS_WRITTEN = CheckSpec(
    name="every_weight_is_written",
    description="Each trained tensor is in the output, under its own name or that of the tensor it is tied to.",
)
NAMES_KNOWN = CheckSpec(
    name="names_are_the_models",
    description="Each tensor has a name of the model's family, and of the base if one is given.",
    blocking=False,
)
CHECKS = (WEIGHTS_WRITTEN, NAMES_KNOWN)


def convert(
    *,
    source: Path,
    destination: Destination | Path,
    base: Path | None = None,
    dtype: Dtype | None = None,
    observe: Observe = unobserved,
) -> Artifact:
    """Write the weights of a trainer's checkpoint as safetensors, with config, tokenizer and adapter settings.

    Read are state dicts of ``torch.save`` (one file or shards, and an adapter's ``non_lora_state_dict.bin``),
    DeepSpeed's ZeRO 1 to 3, and ``torch.distributed.checkpoint`` (FSDP). No code of theirs is run.

    Args:
        source: A file, a trainer's directory, or the directory of one step in it.
        destination: The output directory.
        base: The base model, whose config, tokenizer and names complete those of a full fine-tune.
        dtype: The dtype to round floating-point weights to; by default they keep theirs (ZeRO's are float32).
        observe: Called with the progress.

    Raises:
        CheckpointRefused: A file names anything that is not part of a state dict, is damaged or is missing, or it is
            unclear which weights are meant.
        InputRefused: There is no config.
        CheckFailed: A value is not finite in the requested dtype.
    """
    weights = open_trained(source)
    home = _home(source, base)
    _require_settings_of_adapter(weights, home)
    read = _checkpoint(weights, home)
    select = select_adapter if home.is_adapter else select_model
    selection = select(weights, read.config)
    read_now = as_destination(destination).may_hold(STAGE)
    given = _input(read, home, weights.files, read_now=read_now, observe=observe)
    output = _output(selection, given.checkpoint, dtype)
    reports = [_written_report(selection, home), _names_report(output, home, base)]
    summary = {
        "layout": weights.layout,
        "left_out": dict(selection.left_out),
        "unused": list(weights.unused),
        "left_behind": _left_behind(source if home.root == base else home.root, weights.files, output),
    }
    rewrite = Rewrite(
        stage=STAGE,
        code_version=CODE_VERSION,
        spec={"dtype": dtype, "layout": weights.layout, "names": selection.spec},
        sources={"source": given},
        output=output,
        config_name=home.config_name,
        if_not_finite=_FINITE_REMEDY if dtype else None,
        result=lambda: {**summary, "checks": dump_reports(reports)},
    )
    return rewrite.write(destination, task="convert", observe=observe)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Home:
    """The directory of the files beside the weights.

    Attributes:
        root: The directory.
        config_name: ``config.json``, or ``adapter_config.json`` of an adapter.
        sidecars: Tokenizer, chat template and the like: relative path -> file.
    """

    root: Path
    config_name: str
    sidecars: Mapping[str, Path]

    @property
    def is_adapter(self) -> bool:
        return self.config_name == ADAPTER_CONFIG


def _home(source: Path, base: Path | None) -> _Home:
    """Return the source's directory or the one around it, whichever has a config; else the base's."""
    root = source if source.is_dir() else source.parent
    for directory in dict.fromkeys((root, source.parent)):
        for name in (ADAPTER_CONFIG, CONFIG):
            if (directory / name).is_file():
                own = open_sidecars(directory)
                inherited = open_sidecars(base) if base and name == CONFIG and not own else {}
                return _Home(root=directory, config_name=name, sidecars={**inherited, **own})
    if base is None:
        raise InputRefused(
            f"Neither {root} nor the directory around it has {CONFIG} or {ADAPTER_CONFIG}.",
            remedy="Pass the base model as --base, whose config a full fine-tune shares; for an adapter, copy its"
            f" {ADAPTER_CONFIG} beside the weights.",
        )
    return _Home(root=base, config_name=CONFIG, sidecars=open_sidecars(base))


def _require_settings_of_adapter(weights: TrainedWeights, home: _Home) -> None:
    adapted = [name for name in weights.tensors if is_adapter_tensor(name)]
    if adapted and not home.is_adapter:
        raise CheckpointRefused(
            f"The weights hold a LoRA ({listed(adapted)}), but {home.root} has no {ADAPTER_CONFIG}.",
            remedy=f"Copy the adapter's {ADAPTER_CONFIG} beside the weights.",
        )


def _checkpoint(weights: TrainedWeights, home: _Home) -> Checkpoint:
    """Return the distinct tensors as a checkpoint; the shards are those of :func:`_output`."""
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in weights.aliases}
    config = home.root / home.config_name
    return Checkpoint(
        config=load_config_file(config),
        config_bytes=config.read_bytes(),
        tensors=tensors,
        shards=dict.fromkeys(tensors, SINGLE_SHARD),
        sidecars=home.sidecars,
    )


def _input(read: Checkpoint, home: _Home, files: Collection[Path], *, read_now: bool, observe: Observe) -> StageInput:
    """Return the source as an input whose digest covers its weights, config and sidecars, whatever their layout."""
    beside = {home.config_name: home.root / home.config_name, **read.sidecars}
    before = stat_key({*files, *beside.values()})
    reader = HashingReader("source", read, check_finite=False)

    def digest() -> str:
        if stat_key({*files, *beside.values()}) != before:
            raise CheckpointRefused(
                f"{home.root} was changed while it was read.",
                remedy="Wait until its files stop changing, then run again.",
            )
        return HashedCheckpoint(tensors=reader.results, files=digest_files(beside)).digest

    if read_now:
        for name, tensor in hash_tensors(read.tensors, task="digest of the source", observe=observe).items():
            reader.restore(name, tensor)
    return StageInput(
        checkpoint=reader.checkpoint,
        digest=digest() if read_now else UNREAD,
        fingerprint=f"files:{before}",
        readers=() if read_now else (reader,),
        final_digest=digest,
    )


def _output(selection: Selection, source: Checkpoint, dtype: Dtype | None) -> Checkpoint:
    tensors = {name: rounded(source.tensors[stored], dtype) for name, stored in selection.written.items()}
    config, changed = with_dtype(selection.config or source.config, dtype)
    is_changed = changed or selection.config is not None
    is_adapter = "peft_type" in config
    return replace(
        source,
        config=config,
        config_bytes=None if is_changed else source.config_bytes,
        tensors=tensors,
        shards=dict.fromkeys(tensors, ADAPTER_SHARD) if is_adapter else plan_shards(tensors),
    )


def _left_behind(root: Path, files: Collection[Path], output: Checkpoint) -> list[str]:
    """Return the files of a trainer's directory that were neither read nor copied, a subdirectory with their number."""
    kept = {*(file.resolve() for file in files), *(file.resolve() for file in output.sidecars.values())}
    left: dict[str, int] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.resolve() not in kept and path.name not in (CONFIG, ADAPTER_CONFIG):
            relative = path.relative_to(root)
            name = relative.name if len(relative.parts) == 1 else f"{relative.parts[0]}/"
            left[name] = left.get(name, 0) + 1
    return [f"{name} ({count} files)" if name.endswith("/") else name for name, count in left.items()]


def _written_report(selection: Selection, home: _Home) -> CheckReport:
    total = len(selection.written) + len(selection.left_out)
    reasons = sorted(set(selection.left_out.values()))
    omitted = f" Left out: {len(selection.left_out)} ({listed(reasons)})." if reasons else ""
    kind = "The adapter" if home.is_adapter else "The model"
    return WEIGHTS_WRITTEN.report(
        passed=True,
        measured=f"{len(selection.written)} of {total}",
        detail=f"{kind} has {len(selection.written)} tensors.{omitted}",
    )


def _names_report(output: Checkpoint, home: _Home, base: Path | None) -> CheckReport:
    if home.is_adapter:
        return NAMES_KNOWN.skipped("The names of an adapter are matched to its base when it is merged.")
    config = output.config
    is_known = config.get("model_type") in FAMILIES
    split = [part for name in output for part in (parts_of(name, config) if is_known else []) or [name]]
    unknown = [name for name in split if part_of(name, config) is None]
    wrong = [f"{name} is unknown" for name in unknown]
    if base and not unknown:
        expected = parse_names(split_fused(open_checkpoint(base)).checkpoint)
        found = {parse_name(name, config): name for name in split}
        wrong += [f"{name} has two spellings" for name in split if found[parse_name(name, config)] != name]
        wrong += [f"{expected[name]} is missing" for name in expected.keys() - found.keys()]
        wrong += [f"{found[name]} is not in the base" for name in found.keys() - expected.keys()]
        wrong = [each for each in sorted(wrong) if "lm_head" not in each or not declares_tied(output.config)]
    return NAMES_KNOWN.report(
        passed=not wrong,
        measured=float(len(wrong)),
        limit=0.0,
        detail=f"{listed(wrong)}. Merging matches them to the base; if it refuses, pass the trainer's own save."
        if wrong
        else f"All {len(output)} names are those of {output.config.get('model_type')}.",
    )
