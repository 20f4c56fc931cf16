"""Widening the MLPs of a quantized checkpoint by whole groups of zero codes, without quantizing again.

A rank of a tensor-parallel engine takes its share of ``down_proj``'s inputs and of its groups, each rounded down. Where
the groups do not divide, the scales that it takes belong to other inputs, and some engines answer wrongly without a
word. New groups make them divide. Every live code, scale and zero point keeps its bits.
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
from qwen_pipeline.transforms.codes.formats import CodeFormat
from qwen_pipeline.transforms.codes.parts import Widening


def plan_repair(config: Config, form: CodeFormat, *, tensor_parallel: int, towers: bool = False) -> PadPlan:
    """Return the whole groups that each size lacks for ``tensor_parallel`` ranks, and channels of ``towers`` if asked.

    Raises:
        InputRefused: New groups cannot help, or not all of the way; the remedy says what does.
    """
    if form.group_size < 1:
        raise InputRefused(
            "The codes have one scale for all inputs of an output: there are no groups to add.",
            remedy="Serve it as it is: engines share such layers by their inputs alone.",
        )
    plan = plan_padding(config, group_size=form.group_size, tensor_parallel=tensor_parallel, layout="groups")
    torn = [size for size in plan.sizes if size.live % form.group_size]
    if torn:
        raise InputRefused(
            listed([f"{size.field} {size.live} is {size.live / form.group_size:g} groups" for size in torn])
            + f" of {form.group_size}: the last group is not whole, and engines may answer wrongly even on one rank.",
            remedy="Quantize again from full precision, padded first: qwen-pipeline pad"
            f" --group-size {form.group_size} --tp {tensor_parallel}, then qwen-pipeline quantize.",
        )
    if obstacles := attention_obstacles(config, group_size=form.group_size, tensor_parallel=tensor_parallel):
        raise InputRefused(
            f"{tensor_parallel} ranks cannot share this model, however wide its MLP is: {listed(obstacles)}.",
            remedy=_other_ways(config, form.group_size, tensor_parallel),
        )
    return with_towers(plan, config, ranks=tensor_parallel) if towers else plan


def repair(checkpoint: Checkpoint, form: CodeFormat, plan: PadPlan) -> Checkpoint:
    """Return the checkpoint with every planned size widened, in the codes and in the config.

    Raises:
        CheckpointRefused: A tensor of a layer is missing, is not known, or has another width than the config says.
    """
    for size in plan.sizes:
        if size.zeros:
            tensors = dict(_widened_tensors(checkpoint, form, size))
            checkpoint = checkpoint.replace(
                tensors=tensors, config=resized_config(checkpoint.config, size, size.padded)
            )
    return checkpoint


def widenings(checkpoint: Checkpoint, size: PaddedSize) -> dict[str, Widening]:
    """Return the layers that have channels of a size: module -> which of its dimensions they are.

    Raises:
        CheckpointRefused: A projection is missing, a tensor is unknown, or experts lie in stacks.
    """
    if stacks := [name for name in sized_tensors(checkpoint, size.field) if name.endswith(FUSED)]:
        raise CheckpointRefused(
            f"These experts lie in stacks, which no format of codes has: {listed(stacks)}.",
            remedy="Pad the full-precision checkpoint and quantize again.",
        )
    found: dict[str, Widening] = {}
    for name in checkpoint:
        module, place = name.rpartition(".")[0], parse_name(name, checkpoint.config)
        channels = channels_of(replace(place, parameter="weight"), checkpoint[name].shape, checkpoint.config)
        if channels and channels.field == size.field:
            dimension = "in" if channels.axis else "out"
            found[module] = Widening(dimension=dimension, size=size)
    return found


def _widened_tensors(checkpoint: Checkpoint, form: CodeFormat, size: PaddedSize) -> Iterator[tuple[str, LazyTensor]]:
    parts = _parts_by_module(checkpoint)
    wrong: list[str] = []
    for module, by in widenings(checkpoint, size).items():
        held = parts[module]
        wrong += [f"{module}.{code} is missing" for code in form.codes if code not in held and "weight" not in held]
        for ending, name in held.items():
            part = form.parts.get(ending)
            if part is None:
                wrong.append(f"{name} is not a tensor of this format")
            elif not part.fits(checkpoint[name], by):
                wrong.append(f"{name} is {list(checkpoint[name].shape)}")
            else:
                yield name, part.widened(checkpoint.tensors[name], by)
    if wrong:
        raise CheckpointRefused(
            f"The codes do not fit {size.field} {size.live} in groups of {form.group_size} at {form.bits} bits:"
            f" {listed(wrong)}.",
            remedy="Fetch the checkpoint again. Layers with bits or groups of their own cannot be repaired: pad the"
            " full-precision checkpoint and quantize again.",
        )


def _parts_by_module(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Return module -> ending -> name of each tensor."""
    parts: dict[str, dict[str, str]] = {}
    for name in checkpoint:
        module, _, ending = name.rpartition(".")
        parts.setdefault(module, {})[ending] = name
    return parts


def _other_ways(config: Config, group_size: int, tensor_parallel: int) -> str:
    def serves(degree: int, group_size: int) -> bool:
        return not attention_obstacles(config, group_size=group_size, tensor_parallel=degree)

    degrees = [str(degree) for degree in range(1, tensor_parallel) if serves(degree, group_size)]
    fewer = f"Serve it on fewer ranks ({', '.join(degrees) or 'none fits'})"
    return f"{fewer}, or quantize it again in smaller groups." if serves(tensor_parallel, 1) else f"{fewer}."
