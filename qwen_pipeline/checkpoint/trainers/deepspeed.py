"""Checkpoints of DeepSpeed's ZeRO, stages 1 to 3: weights in float32 from the flat partitions of all ranks.

The layouts are those that ``zero_to_fp32.py`` reads (https://github.com/deepspeedai/DeepSpeed,
``deepspeed/utils/zero_to_fp32.py``, 0.19). ``*_model_states.pt`` has the names, shapes and order of parameters, and
those that were not trained; ``*_optim_states.pt`` has one part for each rank of the float32 weights:

- Stages 1 and 2: each group of parameters is one vector, the parameters one after the other, cut into a part for each
  rank. Newer versions align parameters and state the padding after each.
- Stage 3: each parameter is cut into a part for each rank, the last one padded; a rank's parts follow each other.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any, cast

from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.checkpoint.trainers.pieces import Run, joined
from qwen_pipeline.checkpoint.trainers.state_dicts import tensors_in
from qwen_pipeline.checkpoint.trainers.torch_file import StoredView, open_torch_file
from qwen_pipeline.checkpoint.trainers.unpickler import Record, damaged
from qwen_pipeline.checkpoint.trainers.weights import TrainedWeights, plain_names, require_weights
from qwen_pipeline.errors import CheckpointRefused, listed

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_00_model_states\.pt")
_OTHER_PARALLELISM = re.compile(
    r"(?:.*_)?mp_rank_(?!00)\d+_\w+_states\.pt|layer_.*_states\.pt|.*(?:expert|expp_rank).*_states\.pt"
)
_GROUPS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
_TAKE_SAVED = "Save the gathered weights from the training (stage3_gather_16bit_weights_on_model_save)."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ranks:
    """The files of all ranks, in their order.

    Attributes:
        root: The directory.
        models: The values of the model's states, one for each rank in stage 3, else one.
        optimizers: The values of the optimizers' states, one for each rank; empty if they were not saved.
    """

    root: Path
    models: Sequence[Mapping[str, Any]]
    optimizers: Sequence[Mapping[str, Any]]
    files: Sequence[Path]

    @property
    def stage(self) -> int:
        stage = self.optimizers[0].get("zero_stage")
        return int(stage.args[0] if isinstance(stage, Record) else stage or 0)


def is_zero(root: Path) -> bool:
    return any(_MODEL.fullmatch(path.name) or _OPTIMIZER.fullmatch(path.name) for path in root.glob("*_states.pt"))


def open_zero(root: Path) -> TrainedWeights:
    """Open the directory of one step, ``global_step*``.

    Weights that were trained are float32 (the optimizer's copy), others and buffers have the dtype of the training.

    Raises:
        CheckpointRefused: The file of a rank is missing, the training also split layers or experts over ranks, or sizes
            do not add up.
    """
    if other := sorted(path.name for path in root.iterdir() if _OTHER_PARALLELISM.fullmatch(path.name)):
        raise CheckpointRefused(
            f"{root} is of a training that also split layers or experts over ranks: {listed(other)}.",
            remedy="Convert it with DeepSpeed's ds_to_universal.py, or save the gathered weights from the training.",
        )
    ranks = _open_ranks(root)
    tensors: dict[str, LazyTensor] = {}
    frozen: dict[str, LazyTensor] = {}
    if ranks.optimizers:
        frozen = {name: _frozen(ranks, name, shape) for name, shape in _shapes(ranks, "frozen_param_shapes").items()}
        trained = dict(_trained_in_parts(ranks) if ranks.stage == 3 else _trained_in_vectors(ranks))
        tensors = _buffers(ranks) | frozen | trained
    else:
        tensors = _whole_module(ranks)
    shared = cast("Mapping[str, str]", ranks.models[0].get("shared_params") or {})
    aliases = {alias: name for alias, name in shared.items() if name in tensors}
    tensors |= {alias: tensors[name] for alias, name in aliases.items()}
    require_weights(tensors, root, [path.name for path in ranks.files])
    plain = plain_names(_in_order(tensors, ranks), source=root)
    return TrainedWeights(
        layout=f"DeepSpeed ZeRO-{ranks.stage} of {len(ranks.optimizers)} ranks" if ranks.optimizers else "DeepSpeed",
        tensors={short: tensors[name] for name, short in plain.items()},
        files=ranks.files,
        aliases={plain[alias]: plain[name] for alias, name in aliases.items()},
        frozen={plain[name] for name in frozen},
        unused=("optimizer and scheduler states",) if ranks.optimizers else (),
    )


def _open_ranks(root: Path) -> _Ranks:
    models, optimizers = _by_rank(root, _MODEL), _by_rank(root, _OPTIMIZER)
    states = [_table(open_torch_file(path), path) for path in models]
    found = [_table(_table(open_torch_file(path), path).get("optimizer_state_dict"), path) for path in optimizers]
    ranks = _Ranks(root=root, models=states, optimizers=found, files=(*models, *optimizers))
    if found and "zero_stage" not in found[0]:
        return _Ranks(root=root, models=states, optimizers=(), files=tuple(models))
    if found and ranks.stage not in _GROUPS:
        raise CheckpointRefused(f"{root} has ZeRO stage {ranks.stage}, expected 1, 2 or 3.", remedy=_TAKE_SAVED)
    _require_every_rank(ranks, [path.name for path in (*models, *optimizers)])
    return ranks


def _require_every_rank(ranks: _Ranks, names: Sequence[str]) -> None:
    if not ranks.optimizers:
        return
    counts: object = ranks.optimizers[0].get("partition_count")
    stated = cast("list[object]", counts) if isinstance(counts, list) else [counts]
    every = {count for count in stated if isinstance(count, int)}
    if not every:
        raise CheckpointRefused(
            f"{ranks.root} does not state the number of its ranks: partition_count is {counts!r}.",
            remedy="Copy the checkpoint again from where it was trained.",
        )
    if len(every) != 1:
        raise CheckpointRefused(
            f"{ranks.root} has groups of parameters in {sorted(every)} parts: its experts were split over ranks.",
            remedy="Convert it with DeepSpeed's ds_to_universal.py, or save the gathered weights from the training.",
        )
    (expected,) = every
    models = expected if ranks.stage == 3 else 1
    if len(ranks.optimizers) != expected or len(ranks.models) != models:
        raise CheckpointRefused(
            f"{ranks.root} was saved by {expected} ranks, but holds the states of {len(ranks.optimizers)} optimizers"
            f" and {len(ranks.models)} of {models} models: {listed(names)}.",
            remedy="Copy the files of every rank (and of every machine) into one directory.",
        )


def _by_rank(root: Path, pattern: re.Pattern[str]) -> list[Path]:
    found = [(match, path) for path in root.iterdir() if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted((int(match[1] or 0), path) for match, path in found)]


def _table(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise damaged(path, "it has no states of a model or an optimizer")
    return cast("Mapping[str, Any]", value)


def _shapes(ranks: _Ranks, key: str) -> dict[str, tuple[int, ...]]:
    """Return parameter -> shape; of trained parameters, the groups one after the other."""
    return {name: shape for group in _groups(ranks, key) for name, shape in group.items()}


def _groups(ranks: _Ranks, key: str) -> list[Mapping[str, tuple[int, ...]]]:
    found = ranks.models[0].get(key) or []
    groups = cast("list[Any]", found if isinstance(found, list) else [found])
    shapes = [shape for group in groups for shape in cast("dict[str, Any]", group).values()]
    if not all(isinstance(shape, tuple) and all(isinstance(n, int) for n in shape) for shape in shapes):
        raise damaged(ranks.root, f"{key} has a shape that is none")
    return groups


def _trained_in_vectors(ranks: _Ranks) -> Iterator[tuple[str, LazyTensor]]:
    """Yield name and tensor of stages 1 and 2."""
    paddings = ranks.optimizers[0].get("param_alignment_paddings")
    for number, shapes in enumerate(_groups(ranks, "param_shapes")):
        parts = [_flat(ranks, rank, number) for rank in range(len(ranks.optimizers))]
        bounds = [0]
        for part in parts:
            bounds.append(bounds[-1] + part.spec.rows)
        gaps = paddings[number] if paddings else [0] * len(shapes)
        at = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            stop = at + prod(shape)
            if stop > bounds[-1]:
                raise damaged(ranks.root, f"{name} ends at value {stop:,} of {bounds[-1]:,}")
            yield name, joined(_spec(parts, shape), list(_within(parts, bounds, at, stop)))
            at = stop + gap
        unit = 2 * len(parts)
        if ceil(at / unit) != ceil(bounds[-1] / unit):
            raise damaged(ranks.root, f"the parameters have {at:,} values, the partitions {bounds[-1]:,}")


def _within(parts: Sequence[StoredView], bounds: Sequence[int], start: int, stop: int) -> Iterator[Run]:
    """Yield the runs of values ``start:stop`` of parts that lie one after the other."""
    for part, begin in zip(parts, bounds, strict=False):
        low, high = max(start, begin), min(stop, begin + part.spec.rows)
        if low < high:
            yield Run(part, low - begin, high - begin)


def _trained_in_parts(ranks: _Ranks) -> Iterator[tuple[str, LazyTensor]]:
    """Yield name and tensor of stage 3."""
    count = len(ranks.optimizers)
    vectors: list[tuple[list[StoredView], list[int]]] = []
    for rank in range(count):
        parts = [_flat(ranks, rank, number) for number in range(len(ranks.optimizers[rank][_GROUPS[3]]))]
        bounds = [0]
        for part in parts:
            bounds.append(bounds[-1] + part.spec.rows)
        vectors.append((parts, bounds))
    total = {bounds[-1] for _, bounds in vectors}
    at = 0
    for name, shape in _shapes(ranks, "param_shapes").items():
        share = ceil(prod(shape) / count)
        if at + share > min(total):
            raise damaged(ranks.root, f"{name} ends at value {at + share:,} of {min(total):,} of a rank")
        yield name, joined(_spec(vectors[0][0], shape), list(_shares(vectors, at, share, prod(shape))))
        at += share
    if total != {at}:
        raise damaged(ranks.root, f"the parameters have {at:,} values on each rank, the partitions {sorted(total)}")


def _shares(
    vectors: Sequence[tuple[Sequence[StoredView], Sequence[int]]], at: int, share: int, total: int
) -> Iterator[Run]:
    for rank, (parts, bounds) in enumerate(vectors):
        live = min(share, total - rank * share)
        if live > 0:
            yield from _within(parts, bounds, at, at + live)


def _frozen(ranks: _Ranks, name: str, shape: tuple[int, ...]) -> LazyTensor:
    """Return a parameter that was not trained: whole in stages 1 and 2, in parts in stage 3."""
    fragments = [_fragment(model, name, ranks.root) for model in ranks.models]
    spec = TensorSpec(dtype=fragments[0].spec.dtype, shape=shape)
    runs: list[Run] = []
    missing = prod(shape)
    for fragment in fragments:
        live = min(prod(fragment.spec.shape), missing)
        runs.append(Run(fragment, 0, live))
        missing -= live
    if missing:
        raise damaged(ranks.root, f"{name} lacks {missing:,} of its {prod(shape):,} values")
    return joined(spec, runs)


def _fragment(model: Mapping[str, Any], name: str, root: Path) -> StoredView:
    fragments = cast("Mapping[str, Any]", model.get("frozen_param_fragments") or {})
    return _view(fragments.get(name), root, name)


def _flat(ranks: _Ranks, rank: int, group: int) -> StoredView:
    """Return one rank's part of the values of a group of parameters."""
    groups = cast("list[Any]", ranks.optimizers[rank].get(_GROUPS[ranks.stage]) or [])
    if group >= len(groups):
        raise damaged(ranks.root, f"rank {rank} has {len(groups)} groups of parameters, expected more")
    return _view(groups[group], ranks.root, f"group {group} of rank {rank}")


def _view(value: Any, root: Path, name: str) -> StoredView:
    if not isinstance(value, StoredView) or not value.is_contiguous:
        raise damaged(root, f"{name} is not a contiguous tensor")
    return value


def _spec(parts: Sequence[StoredView], shape: tuple[int, ...]) -> TensorSpec:
    """Return the spec of a trained parameter: float32, unless the training kept no such copy."""
    return TensorSpec(dtype=parts[0].spec.dtype, shape=shape)


def _buffers(ranks: _Ranks) -> dict[str, LazyTensor]:
    module = cast("Mapping[str, Any]", ranks.models[0].get("module") or {})
    names = cast("list[str]", ranks.models[0].get("buffer_names") or [])
    return {name: _view(module[name], ranks.root, name).lazy() for name in names if name in module}


def _whole_module(ranks: _Ranks) -> dict[str, LazyTensor]:
    """Return the weights in the training's dtype, of stages that do not split them, if no optimizer was saved."""
    found, _ = tensors_in(dict(ranks.models[0]), ranks.root)
    return {name: view.lazy() if isinstance(view, StoredView) else view for name, view in found.items()}


def _in_order(tensors: Mapping[str, LazyTensor], ranks: _Ranks) -> list[str]:
    """Return the names of tensors in the order of the module."""
    module = cast("Mapping[str, Any]", ranks.models[0].get("module") or {})
    places = {name: place for place, name in enumerate(module)}
    return sorted(tensors, key=lambda name: places.get(name, len(places)))
