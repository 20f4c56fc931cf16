"""Repair of a quantized checkpoint: its MLPs are widened by whole groups of zero codes, without quantizing again.

A rank of a tensor-parallel engine loads its share of ``down_proj``'s inputs and of its groups, each rounded down. If
the number of groups is not divisible by the ranks, the scales that it loads belong to other inputs, and some engines
give wrong answers without an error. Added groups make it divisible. Live codes, scales and zero points are unchanged.
"""

from collections.abc import Iterator
from dataclasses import replace

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.errors import CheckpointRefused, InputRefused, listed
from qwen_pipeline.qwen.channels import channels_of, sized_tensors
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.geometry import (
    PaddedSize,
    PadPlan,
    attention_obstacles,
    plan_padding,
    resized_config,
    with_towers,
)
from qwen_pipeline.qwen.names import FUSED, parse_name
from qwen_pipeline.transforms.codes.formats import CodeFormat, declared_for
from qwen_pipeline.transforms.codes.parts import Widening


def plan_repair(
    config: Config,
    form: CodeFormat,
    *,
    tensor_parallel: int,
    towers: bool = False,
    attention: CodeFormat | None = None,
) -> PadPlan:
    """Return the whole groups to add to each size for ``tensor_parallel`` ranks, and channels to add to ``towers``.

    Args:
        config: The model's config.
        form: The format of the MLPs' codes; where they differ, that with the largest groups (:func:`coarsest`).
        tensor_parallel: Number of ranks.
        towers: Whether to widen the MLPs of towers.
        attention: The same for attention, if it has another format.

    Raises:
        InputRefused: Added groups cannot make the model divisible; the remedy names alternatives.
    """
    if form.group_size < 1:
        raise InputRefused(
            f"The codes have group_size {form.group_size}, one scale for all inputs: no groups can be added.",
            remedy="Serve the checkpoint without repair: ranks share such layers by their inputs alone.",
        )
    plan = plan_padding(config, group_size=form.group_size, tensor_parallel=tensor_parallel, layout="groups")
    incomplete = [size for size in plan.sizes if size.live % form.group_size]
    if incomplete:
        raise InputRefused(
            listed([f"{size.field} {size.live} is {size.live / form.group_size:g} groups" for size in incomplete])
            + f" of {form.group_size}: the last group is incomplete, and engines may give wrong answers even on one"
            " rank.",
            remedy="Pad the full-precision checkpoint and quantize it again: qwen-pipeline pad"
            f" --group-size {form.group_size} --tp {tensor_parallel}, then qwen-pipeline quantize.",
        )
    of_attention = (attention or form).group_size
    if obstacles := attention_obstacles(config, group_size=of_attention, tensor_parallel=tensor_parallel):
        raise InputRefused(
            f"{tensor_parallel} ranks cannot share this model, whatever the width of its MLP: {listed(obstacles)}.",
            remedy=_alternatives(config, of_attention, tensor_parallel),
        )
    return with_towers(plan, config, ranks=tensor_parallel) if towers else plan


def coarsest(checkpoint: Checkpoint, form: CodeFormat, *, mlps: bool) -> CodeFormat:
    """Return the format with the largest groups among those declared for the codes of MLPs, or of attention."""
    modules = [name.rpartition(".")[0] for name in checkpoint if name.endswith((".qweight", ".weight_packed"))]
    forms = [declared_for(checkpoint, form, module) for module in modules if (".mlp." in module) == mlps]
    return max(forms, key=lambda own: own.group_size, default=form)


def repair(checkpoint: Checkpoint, form: CodeFormat, plan: PadPlan) -> Checkpoint:
    """Return the checkpoint with every planned size widened, in the codes and in the config.

    Raises:
        CheckpointRefused: A tensor of a layer is missing or unknown, or its width contradicts the config.
    """
    for size in plan.sizes:
        if size.zeros:
            tensors = dict(_widened_tensors(checkpoint, form, size))
            checkpoint = checkpoint.replace(
                tensors=tensors, config=resized_config(checkpoint.config, size, size.padded)
            )
    return checkpoint


def widenings(checkpoint: Checkpoint, size: PaddedSize) -> dict[str, Widening]:
    """Return the layers to widen for a size: module -> the dimension that has the size's channels.

    Raises:
        CheckpointRefused: A projection is missing, a tensor is unknown, or experts are stored in stacks.
    """
    if stacks := [name for name in sized_tensors(checkpoint, size.field) if name.endswith(FUSED)]:
        raise CheckpointRefused(
            f"Experts are stored in stacks, which no format of packed codes supports: {listed(stacks)}.",
            remedy="Pad the full-precision checkpoint and quantize it again.",
        )
    found: dict[str, Widening] = {}
    for name in checkpoint:
        module, parsed = name.rpartition(".")[0], parse_name(name, checkpoint.config)
        channels = channels_of(replace(parsed, parameter="weight"), checkpoint[name].shape, checkpoint.config)
        if channels and channels.field == size.field:
            dimension = "in" if channels.axis else "out"
            found[module] = Widening(dimension=dimension, size=size)
    return found


def _widened_tensors(checkpoint: Checkpoint, form: CodeFormat, size: PaddedSize) -> Iterator[tuple[str, LazyTensor]]:
    modules = _names_by_module(checkpoint)
    wrong: list[str] = []
    for module, widening in widenings(checkpoint, size).items():
        names, own = modules[module], declared_for(checkpoint, form, module)
        by = replace(widening, group_size=own.group_size)
        wrong += [f"{module}.{code} is missing" for code in own.codes if code not in names and "weight" not in names]
        for suffix, name in names.items():
            code_tensor = own.code_tensors.get(suffix)
            if code_tensor is None:
                wrong.append(f"{name} is not a tensor of this format")
            elif not code_tensor.fits(checkpoint[name], by):
                wrong.append(f"{name} is {list(checkpoint[name].shape)}")
            else:
                yield name, code_tensor.widened(checkpoint.tensors[name], by)
    if wrong:
        raise CheckpointRefused(
            f"The codes do not fit {size.field} {size.live} in groups of {form.group_size} at {form.bits} bits:"
            f" {listed(wrong)}.",
            remedy="Download the checkpoint again. If its layers differ and the config does not say how, it cannot be"
            " repaired: pad the full-precision checkpoint and quantize it again.",
        )


def _names_by_module(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Return module -> suffix -> name of each tensor."""
    names: dict[str, dict[str, str]] = {}
    for name in checkpoint:
        module, _, suffix = name.rpartition(".")
        names.setdefault(module, {})[suffix] = name
    return names


def _alternatives(config: Config, group_size: int, tensor_parallel: int) -> str:
    """Return a remedy: the degrees that can serve the model, and smaller groups if they would help."""

    def serves(degree: int, group_size: int) -> bool:
        return not attention_obstacles(config, group_size=group_size, tensor_parallel=degree)

    degrees = [str(degree) for degree in range(1, tensor_parallel) if serves(degree, group_size)]
    fewer = f"Serve it on fewer ranks ({', '.join(degrees) or 'no number is possible'})"
    return f"{fewer}, or quantize it again in smaller groups." if serves(tensor_parallel, 1) else f"{fewer}."
