"""Matrices that a framework stored as one, such as ``qkv_proj``, split into the layers that Transformers loads.

vLLM, SGLang and models such as Phi fuse projections of the same inputs by rows: q, k, v, and gate, up. Transformers'
classes of Qwen have no such parameter, and start its parts at random. Megatron fuses too, but one group of heads after
the other, which shapes cannot tell from the first order. The weights of the base can: training moves a row less far
than it is from another row.

Sources: ``QKVParallelLinear`` and ``MergedColumnParallelLinear`` of vllm/model_executor/layers/linear.py, whose loaders
accept such matrices ("already fused on disk"); ``SelfAttention.get_query_key_value_tensors`` of Megatron-LM.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from qwen_pipeline.checkpoint.hashing_reader import hashing_paused
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor, concatenated
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.families import Config, text_config
from qwen_pipeline.qwen.fused import FUSED_MODULES
from qwen_pipeline.qwen.layers import head_geometry, layer_matrices, number_of_layers
from qwen_pipeline.qwen.names import DRAFTS, NUMBER, is_tensor_name, parse_name, parse_names

_NAME = re.compile(rf"((?:.*\.)?layers\.({NUMBER})\.)((?:self_attn|linear_attn|mlp)\.[\w.]+)\.(weight|bias)")
_EXPERT = re.compile(rf"mlp\.experts\.{NUMBER}\.gate_up_proj")
_SAMPLED = 16
"""Rows of each matrix that are compared with the base's."""
_CLOSER = 0.8
"""Largest share of the distance in one order that the distance in the right one has; for unrelated rows they are equal,
within 0.03 for 16 rows of 64 values."""

_Rows = Sequence[tuple[int, int]]
"""Ranges of rows of a fused matrix: those of one part, in its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """An order of rows: a description, and the rows of each part."""

    text: str
    rows: Sequence[_Rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class _FusedTensor:
    """A stored tensor that holds several parts.

    Attributes:
        name: Its name.
        kind: Its path in the layer, such as ``self_attn.qkv_proj``; an expert's without its number.
        parts: The names of its parts as tensors.
        orders: The orders that its rows may have, the usual one first.
    """

    name: str
    kind: str
    parts: Sequence[str]
    orders: Sequence[_Order]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitWeights:
    """A checkpoint without fused matrices.

    Attributes:
        checkpoint: The checkpoint; unchanged if nothing was fused.
        remarks: A sentence for each kind of matrix that was split, with the order of its rows.
    """

    checkpoint: Checkpoint
    remarks: Sequence[str] = field(default=())


def split_fused(checkpoint: Checkpoint, *, like: Checkpoint | None = None) -> SplitWeights:
    """Return a checkpoint with fused matrices as the layers that they hold.

    Args:
        checkpoint: A full-precision checkpoint of any Qwen family, in any layout.
        like: The base, split, whose weights decide the order of rows. Without it, rows are in the usual order: q, k, v
            and gate, up, as vLLM, SGLang and Phi fuse them.

    Raises:
        InputRefused: The family is unknown, or the config lacks a size.
        CheckpointRefused: A matrix does not have the rows of its parts, a part is stored twice, or the base's weights
            are not those of any order.
    """
    found = list(_fused_tensors(checkpoint))
    if not found:
        return SplitWeights(checkpoint=checkpoint)
    chosen = dict.fromkeys([tensor.kind for tensor in found], 0)
    if like is not None:
        chosen = {kind: _order_of([t for t in found if t.kind == kind], checkpoint, like) for kind in chosen}
    tensors, shards = dict[str, LazyTensor](), dict[str, str]()
    by_name = {tensor.name: tensor for tensor in found}
    for name, stored in checkpoint.tensors.items():
        parts = {name: stored}
        if fused := by_name.get(name):
            ranges = fused.orders[chosen[fused.kind]].rows
            parts = {part: _rows_of(stored, rows) for part, rows in zip(fused.parts, ranges, strict=True)}
        if twice := [part for part in parts if part in tensors or (part != name and part in checkpoint)]:
            raise CheckpointRefused(
                f"{twice[0]} is stored, and a part of {name} too.",
                remedy="Remove the stale one: files of two saves are mixed.",
            )
        tensors |= parts
        shards |= dict.fromkeys(parts, checkpoint.shards[name])
    return SplitWeights(
        checkpoint=replace(checkpoint, tensors=tensors, shards=shards),
        remarks=[_remark(kind, found, order, is_seen=like is not None) for kind, order in chosen.items()],
    )


def _fused_tensors(checkpoint: Checkpoint) -> Iterator[_FusedTensor]:
    config = checkpoint.config
    widths: dict[int | None, dict[str, int]] = {}
    for name, spec in checkpoint.items():
        names = parts_of(name, config)
        match = _NAME.fullmatch(name)
        if not names or not match:
            continue
        parts = [part.removeprefix(match[1]).rpartition(".")[0] for part in names]
        layer = None if name.startswith(DRAFTS) else int(match[2])
        if layer not in widths:
            widths[layer] = dict(_widths(config, layer, at_most=len(checkpoint)))
        sizes = [widths[layer].get(re.sub(r"experts\.\d+", "experts.*", part), 0) for part in parts]
        if not all(sizes) or spec.rows != sum(sizes):
            shown = ", ".join(f"{part} {size}" for part, size in zip(parts, sizes, strict=True))
            raise CheckpointRefused(
                f"{name} has {spec.rows} rows, but by the config its parts have {sum(sizes)} ({shown}).",
                remedy="Use config and weights of the same model, and a checkpoint that was saved as a whole: those of"
                " the ranks of a server hold a share of each matrix.",
            )
        yield _FusedTensor(
            name=name,
            kind=re.sub(r"experts\.\d+", "experts.*", match[3]),
            parts=names,
            orders=_orders([part.rpartition(".")[2] for part in parts], sizes, config),
        )


def parts_of(name: str, config: Config) -> list[str]:
    """Return the names of the tensors that a fused tensor holds; none if it is not fused, or if its family stores it.

    Raises:
        InputRefused: The family is unknown.
    """
    match = _NAME.fullmatch(name)
    parts = _parts_of(match[3]) if match else ()
    if not match or not parts or is_tensor_name(name, config):
        return []
    names = [f"{match[1]}{part}.{match[4]}" for part in parts]
    return names if all(is_tensor_name(part, config) for part in names) else []


def _parts_of(module: str) -> tuple[str, ...]:
    """Return the paths of the parts of a fused module of a layer; none if it is not fused."""
    if _EXPERT.fullmatch(module):
        owner = module.rpartition(".")[0]
        return (f"{owner}.gate_proj", f"{owner}.up_proj")
    return next((fused.parts for fused in FUSED_MODULES if fused.name == module), ())


def _widths(config: Config, layer: int | None, *, at_most: int) -> Iterator[tuple[str, int]]:
    """Yield (path in the layer, outputs) for a layer, or for all kinds of layers, which a draft head may have."""
    types = text_config(config).get("layer_types")
    number = min(number_of_layers(config), len(types) if types else at_most, at_most)
    for each in range(number) if layer is None else (layer,):
        if each < number:
            yield from ((matrix.kind, matrix.out_features) for matrix in layer_matrices(config, each))


def _orders(parts: Sequence[str], sizes: Sequence[int], config: Config) -> list[_Order]:
    ends = list(accumulate(sizes))
    whole: list[_Rows] = [[(end - size, end)] for size, end in zip(sizes, ends, strict=True)]
    orders = [_Order(text=", ".join(parts), rows=whole)]
    if len(parts) == 2:
        swapped: list[_Rows] = [[(sizes[1], ends[1])], [(0, sizes[1])]]
        return [*orders, _Order(text=f"{parts[1]}, {parts[0]}", rows=swapped)]
    groups = head_geometry(config)[1]
    if groups > 1 and not any(size % groups for size in sizes):
        text = f"{', '.join(parts)} of one group of heads after the other, as in Megatron"
        orders.append(_Order(text=text, rows=list(_grouped([size // groups for size in sizes], groups))))
    return orders


def _grouped(sizes: Sequence[int], groups: int) -> Iterator[_Rows]:
    ends, stride = list(accumulate(sizes)), sum(sizes)
    for size, end in zip(sizes, ends, strict=True):
        yield [(group * stride + end - size, group * stride + end) for group in range(groups)]


def _rows_of(tensor: LazyTensor, ranges: _Rows) -> LazyTensor:
    parts = [tensor.part(start, stop) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else concatenated(parts)


def _order_of(tensors: Sequence[_FusedTensor], checkpoint: Checkpoint, base: Checkpoint) -> int:
    """Return the number of the order in which the rows are close to the base's, the same for all layers.

    Raises:
        CheckpointRefused: There is none.
    """
    if len(tensors[0].orders) == 1:
        return 0
    places, votes, compared = parse_names(base), dict[int, str](), 0
    for tensor in tensors:
        names = [places.get(parse_name(part, checkpoint.config), "") for part in tensor.parts]
        parts = [base.tensors[name] for name in names if name]
        if _are_comparable(tensor, checkpoint[tensor.name].shape, parts):
            compared += 1
            number = _closest(tensor, checkpoint.tensors[tensor.name], parts)
            votes |= {} if number is None or number in votes else {number: tensor.name}
    if len(votes) == 1 or not compared:
        return next(iter(votes), 0)
    texts = [order.text for order in tensors[0].orders]
    reason = (
        f"the order of its rows is not that of other layers: {', '.join(votes.values())}"
        if votes
        else f"its rows are not close to the base's, neither in the order {', nor in the order '.join(texts)}"
    )
    raise CheckpointRefused(
        f"{tensors[0].name} holds {len(tensors[0].parts)} matrices, but {reason}.",
        remedy="Use the base that the model was trained from. If it is, split the matrices with the tool that fused"
        " them, such as by its export to Hugging Face's format.",
    )


def _are_comparable(tensor: _FusedTensor, shape: tuple[int, ...], parts: Sequence[LazyTensor]) -> bool:
    """Return whether the base has all parts as matrices of the same sizes; biases alone would show too little."""
    sizes = [sum(stop - start for start, stop in rows) for rows in tensor.orders[0].rows]
    return len(shape) > 1 and [part.spec.shape for part in parts] == [(size, *shape[1:]) for size in sizes]


def _closest(tensor: _FusedTensor, fused: LazyTensor, parts: Sequence[LazyTensor]) -> int | None:
    """Return the number of the order in which sampled rows are closest to those of the parts; None if it is unclear."""
    candidates = range(0, fused.spec.rows, max(1, fused.spec.rows // (8 * _SAMPLED)))
    places = {row: [_place(order, row) for order in tensor.orders] for row in candidates}
    telling = [row for row in candidates if len(set(places[row])) > 1]
    distances = [0.0] * len(tensor.orders)
    with hashing_paused():
        for row in telling[:: max(1, len(telling) // _SAMPLED)]:
            values = fused.read(row, row + 1).double()
            for number, (part, place) in enumerate(places[row]):
                difference = values - parts[part].read(place, place + 1).double()
                distances[number] += float(difference.square().sum())
    best, second = sorted(distances)[:2]
    return distances.index(best) if best < _CLOSER * second else None


def _place(order: _Order, row: int) -> tuple[int, int]:
    """Return the part that a row of a fused matrix belongs to, and its row there."""
    for part, ranges in enumerate(order.rows):
        first = 0
        for start, stop in ranges:
            if start <= row < stop:
                return part, first + row - start
            first += stop - start
    raise AssertionError(f"no part has row {row}")


def _remark(kind: str, found: Sequence[_FusedTensor], order: int, *, is_seen: bool) -> str:
    tensors = [tensor for tensor in found if tensor.kind == kind]
    chosen = tensors[0].orders[order]
    reason = ", as the base's weights show" if is_seen and len(tensors[0].orders) > 1 else ""
    return f"{kind} split ({len(tensors)} tensors): its rows are {chosen.text}{reason}"
