"""What all ranks of a tensor-parallel engine compute with together, for each way of sharing packed layers.

Each packed layer is cut as the loader cuts it (after whole groups of zeros are appended to MLPs, or experts' groups are
halved, where the engine does that), every rank's part is turned into weights as the rank would do it, and compared with
the whole. On slices: groups run along the inputs, so a few outputs of a row-parallel layer show all of them, and the
outputs at the edges of a rank's share show where a column-parallel layer was cut. In memory at a time: the codes of one
layer.
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
from qwen_pipeline.evaluation.tensor_parallel.findings import ShardedModules, Sharding, ShardingFindings
from qwen_pipeline.evaluation.tensor_parallel.ranks import groups_met, rank_part
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.geometry import PaddedSize
from qwen_pipeline.qwen.layers import Matrix, head_geometry, layer_matrices
from qwen_pipeline.qwen.linears import Linear, decoder_linears
from qwen_pipeline.transforms.codes.gptq import CODES, GptqFormat, PackedLinear, gptq_format, in_order
from qwen_pipeline.transforms.codes.parts import Widening

SLICE = 64
"""Outputs of a row-parallel layer that are compared; of a column-parallel one, half as many at each end of a share."""
MIN_GROUP = 32
"""vLLM's MoE WNA16 halves groups no further."""


def compare_shardings(
    source: Checkpoint,
    candidate: Checkpoint,
    form: GptqFormat,
    cuts: Sequence[Sharding],
    *,
    observe: Observe = unobserved,
) -> list[ShardingFindings]:
    """Compare what ranks compute with, for each way of cutting, with the whole; every layer is read once."""
    layers = list(_shared_layers(source)) if cuts else []
    errors: list[dict[str, float]] = [{} for _ in cuts]
    for done, (linear, matrix) in enumerate(layers, start=1):
        specs = form.code_specs(linear.out_features, linear.in_features)
        sound = all(candidate.get(f"{linear.module}.{code}") == spec for code, spec in specs.items())
        packed = form.load(candidate, linear.module) if sound else None
        if packed and not 0 <= packed.g_idx.min() <= packed.g_idx.max() < len(packed.scales):
            packed = None
        for found, cut in zip(errors, cuts, strict=True):
            if error := _error(packed, candidate.config, matrix, cut) if packed else inf:
                found[linear.module] = error
        observe(Progress(task="simulate ranks", done=done, total=len(layers), unit="modules"))
    return [
        ShardingFindings(cut=cut, compared=len(layers), errors=found) for cut, found in zip(cuts, errors, strict=True)
    ]


def over_ranks(candidate: Checkpoint, modules: Sequence[str], ranks: int) -> Checkpoint:
    """Return the checkpoint that ranks are together: each input of ``modules`` meets the scale that its rank applies.

    Sums over ranks are sums of the same products in another order, so that one model with these weights says what all
    ranks say.
    """
    form = gptq_format(candidate.config)

    def met(name: str) -> LazyTensor:
        module = name.removesuffix(".g_idx")
        return replace(
            candidate.tensors[name],
            read=lambda start, stop: groups_met(form.load(candidate, module), ranks)[start:stop],
            stored=None,
        )

    return candidate.replace(tensors={name: met(name) for name in (f"{module}.g_idx" for module in modules)})


def diverge(
    candidate: Checkpoint, cuts: Sequence[ShardedModules], windows: Sequence[Tensor], context: ComputeContext
) -> list[ModelFigures]:
    """Return, for each cut, how far the model that its ranks are together is from the whole."""
    return [
        evaluate(
            {"whole": candidate, "cut": over_ranks(candidate, modules, ranks)},
            windows,
            reference="whole",
            compared=["cut"],
            context=context,
        )["cut"]
        for ranks, modules in cuts
    ]


def _shared_layers(source: Checkpoint) -> Iterator[tuple[Linear, Matrix]]:
    """Yield each packed layer with the matrix that says how ranks share it."""
    config = source.config
    matrices: dict[int, dict[str, Matrix]] = {}
    for linear in decoder_linears(source):
        if linear.layer not in matrices:
            of_layer = layer_matrices(config, linear.layer)
            matrices = {linear.layer: {kind: matrix for matrix in of_layer for kind in matrix.kinds()}}
        if (matrix := matrices[linear.layer][linear.kind]).split != "whole":
            yield linear, matrix


def _error(packed: PackedLinear, config: Config, matrix: Matrix, cut: Sharding) -> float:
    """Return the relative error of the weight that ranks compute with, over slices; 0 means the same bits."""
    if matrix.split == "rows":
        pairs = _row_parallel(packed, _loaded(packed, matrix, cut), cut.ranks)
    else:
        key_values = matrix.kind in ("self_attn.k_proj", "self_attn.v_proj")
        shares = min(cut.ranks, head_geometry(config)[1]) if key_values else cut.ranks
        if packed.qweight.shape[1] % (shares * packed.format.codes_per_word):
            return inf
        pairs = _column_parallel(packed, shares)
    squares = torch.tensor([[vector_norm(held - w).item(), vector_norm(w).item()] for held, w in pairs]).double()
    error, norm = squares.square().sum(dim=0).sqrt().tolist()
    return error / norm if norm else error


def _row_parallel(whole: PackedLinear, loaded: PackedLinear, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what ranks hold of the first outputs, and the whole's; inputs that nobody holds count as zero."""
    w_SI = whole.weight_rows(0, SLICE)
    parts = [rank_part(loaded, "in", rank, ranks).weight_rows(0, SLICE) for rank in range(ranks)]
    held = torch.zeros_like(w_SI)
    joined = torch.cat(parts, dim=1)[:, : w_SI.shape[1]]
    held[:, : joined.shape[1]] = joined
    yield held, w_SI


def _column_parallel(whole: PackedLinear, shares: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what a rank holds of the outputs at each end of its share, and the whole's."""
    outputs = whole.qweight.shape[1] // shares
    edge = min(SLICE // 2, outputs)
    for share in range(shares):
        part, first = rank_part(whole, "out", share, shares), share * outputs
        for start in (0, outputs - edge):
            yield part.weight_rows(start, start + edge), whole.weight_rows(first + start, first + start + edge)


def _loaded(packed: PackedLinear, matrix: Matrix, cut: Sharding) -> PackedLinear:
    """Return a layer as the loader has it before ranks take their shares."""
    inputs, size = len(packed.g_idx), packed.format.group_size
    if cut.pads_mlps and matrix.size and inputs % (cut.ranks * size) and not inputs % size:
        return _padded(packed, matrix, -inputs % (cut.ranks * size))
    if cut.halves_groups and "*" in matrix.kind:
        halved = size
        while inputs // cut.ranks % halved and halved > MIN_GROUP:
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
    tensor: Tensor = getattr(packed, code)
    spec = TensorSpec(dtype="F16" if code == "scales" else "I32", shape=tuple(tensor.shape))
    wide = packed.format.code_tensors[code].widened(LazyTensor(spec=spec, read=lambda a, b: tensor[a:b]), by)
    return wide.read(0, wide.spec.rows)


def _regrouped(packed: PackedLinear, group_size: int) -> PackedLinear:
    """Return the same weights in smaller groups, every scale repeated."""
    factor = packed.format.group_size // group_size
    return replace(
        packed,
        format=replace(packed.format, group_size=group_size),
        qzeros=packed.qzeros.repeat_interleave(factor, dim=0),
        scales=packed.scales.repeat_interleave(factor, dim=0),
        g_idx=in_order(len(packed.g_idx), group_size),
    )
