"""Simulate the ranks of a tensor-parallel engine: the weights that they compute with, and the resulting divergence.

Each packed layer is sharded as by the engine's loader (after appending whole groups of zeros to MLPs or halving
experts' groups, if the engine does that). The shard of every rank is dequantized as on the rank, and compared with the
unsharded weight on slices: groups run along the inputs, so a few outputs of a row-parallel layer cover all of them, and
the outputs at the edges of each shard cover the boundaries in a column-parallel layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf

import torch
from torch import Tensor
from torch.linalg import vector_norm

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.evaluation.tensor_parallel.findings import ShardedModules, Sharding
from qwen_pipeline.evaluation.tensor_parallel.ranks import effective_g_idx, first_outputs, rank_part
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.geometry import PaddedSize
from qwen_pipeline.qwen.layers import Matrix, head_geometry, layer_matrices
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.transforms.codes.gptq import CODES, PackedLinear, gptq_format, in_order
from qwen_pipeline.transforms.codes.parts import Widening

SLICE = 64
"""Compared outputs of a row-parallel layer; of a column-parallel one, half as many at each end of a shard."""
MIN_GROUP = 32
"""The smallest group to which vLLM's MoE WNA16 halves groups."""


def sharded_matrices(source: Checkpoint) -> dict[str, Matrix]:
    """Return each packed layer that is sharded, with its matrix, which determines the dimension."""
    config = source.config
    of_layer: dict[int, dict[str, Matrix]] = {}
    found: dict[str, Matrix] = {}
    for linear in decoder_linears(source):
        if linear.layer not in of_layer:
            kinds = {kind: matrix for matrix in layer_matrices(config, linear.layer) for kind in matrix.kinds()}
            of_layer = {linear.layer: kinds}
        if (matrix := of_layer[linear.layer][linear.kind]).split != "whole":
            found[linear.module] = matrix
    return found


def sharding_errors(packed: PackedLinear, config: Config, matrix: Matrix, shardings: Sequence[Sharding]) -> list[float]:
    """Return the relative error of each sharded weight, over slices; 0 means equal bits."""
    return [_error(packed, config, matrix, sharding) for sharding in shardings]


def over_ranks(candidate: Checkpoint, modules: Sequence[str], ranks: int) -> Checkpoint:
    """Return a checkpoint equivalent to all ranks together: inputs of ``modules`` have the scales of their ranks.

    Sums over ranks are sums of the same products in another order, so one model with these weights makes the
    predictions of all ranks together.
    """
    form = gptq_format(candidate.config)

    def as_sharded(name: str) -> LazyTensor:
        module = name.removesuffix(".g_idx")
        return replace(
            candidate.tensors[name],
            read=lambda start, stop: effective_g_idx(form.load(candidate, module), ranks)[start:stop],
            stored=None,
        )

    return candidate.replace(tensors={name: as_sharded(name) for name in (f"{module}.g_idx" for module in modules)})


def diverge(
    candidate: Checkpoint, shardings: Sequence[ShardedModules], windows: Sequence[Tensor], context: ComputeContext
) -> list[ModelFigures]:
    """Return the figures of the sharded model, compared with the unsharded one, for each sharding."""
    return [
        evaluate(
            {"unsharded": candidate, "sharded": over_ranks(candidate, modules, ranks)},
            windows,
            reference="unsharded",
            compared=["sharded"],
            context=context,
        )["sharded"]
        for ranks, modules in shardings
    ]


def _error(packed: PackedLinear, config: Config, matrix: Matrix, sharding: Sharding) -> float:
    """Return the relative error of the sharded weight, over slices; 0 means equal bits."""
    if matrix.split == "rows":
        whole = first_outputs(packed, SLICE)
        pairs = _row_parallel(whole, _loaded(whole, matrix, sharding), sharding.ranks)
    else:
        key_values = matrix.kind in ("self_attn.k_proj", "self_attn.v_proj")
        shares = min(sharding.ranks, head_geometry(config)[1]) if key_values else sharding.ranks
        if packed.qweight.shape[1] % (shares * packed.format.codes_per_word):
            return inf
        pairs = _column_parallel(packed, shares)
    norms = torch.stack([torch.stack([vector_norm(held - w), vector_norm(w)]) for held, w in pairs]).double()
    error, norm = norms.square().sum(dim=0).sqrt().tolist()
    return error / norm if norm else error


def _row_parallel(whole: PackedLinear, loaded: PackedLinear, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first outputs of the sharded and the unsharded weight; inputs that no rank holds count as zero."""
    outputs = whole.qweight.shape[1]
    w_SI = whole.weight_rows(0, outputs)
    parts = [rank_part(loaded, "in", rank, ranks).weight_rows(0, outputs) for rank in range(ranks)]
    held = torch.zeros_like(w_SI)
    joined = torch.cat(parts, dim=1)[:, : w_SI.shape[1]]
    held[:, : joined.shape[1]] = joined
    yield held, w_SI


def _column_parallel(whole: PackedLinear, shares: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the outputs at each end of a rank's shard, and those of the unsharded weight."""
    outputs = whole.qweight.shape[1] // shares
    edge = min(SLICE // 2, outputs)
    for share in range(shares):
        part, first = rank_part(whole, "out", share, shares), share * outputs
        for start in (0, outputs - edge):
            yield part.weight_rows(start, start + edge), whole.weight_rows(first + start, first + start + edge)


def _loaded(packed: PackedLinear, matrix: Matrix, sharding: Sharding) -> PackedLinear:
    """Return a layer as the loader prepares it for sharding."""
    inputs, size = len(packed.g_idx), packed.format.group_size
    if sharding.pads_mlps and matrix.size and inputs % (sharding.ranks * size) and not inputs % size:
        return _padded(packed, matrix, -inputs % (sharding.ranks * size))
    if sharding.halves_groups and "*" in matrix.kind:
        halved = size
        while inputs // sharding.ranks % halved and halved > MIN_GROUP:
            halved //= 2
        return _regrouped(packed, halved)
    return packed


def _padded(packed: PackedLinear, matrix: Matrix, zeros: int) -> PackedLinear:
    live, form = len(packed.g_idx), packed.format
    assert matrix.size
    size = PaddedSize(
        field=matrix.size, places=(), live=live, padded=live + zeros, group_size=form.group_size, layout="append"
    )
    return replace(packed, **{code: _widened(packed, code, Widening(dimension="in", size=size)) for code in CODES})


def _widened(packed: PackedLinear, code: str, by: Widening) -> Tensor:
    tensor: Tensor = getattr(packed, code).cpu()
    spec = TensorSpec(dtype="F16" if code == "scales" else "I32", shape=tuple(tensor.shape))
    wide = packed.format.code_tensors[code].widened(LazyTensor(spec=spec, read=lambda a, b: tensor[a:b]), by)
    return wide.read(0, wide.spec.rows).to(packed.qweight.device)


def _regrouped(packed: PackedLinear, group_size: int) -> PackedLinear:
    """Return the same weights in smaller groups, with every scale repeated."""
    factor = packed.format.group_size // group_size
    return replace(
        packed,
        format=replace(packed.format, group_size=group_size),
        qzeros=packed.qzeros.repeat_interleave(factor, dim=0),
        scales=packed.scales.repeat_interleave(factor, dim=0),
        g_idx=in_order(len(packed.g_idx), group_size).to(packed.g_idx.device),
    )
