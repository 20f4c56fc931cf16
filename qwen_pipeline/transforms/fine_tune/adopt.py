"""Adoption of a full fine-tune: each tensor takes the place of the base's tensor with the same meaning.

The meaning is a :class:`ParsedName`, so names and layouts may differ: Transformers saves a decoder at ``model`` or
``model.language_model``, experts one by one or stacked. Parts that training does not load, such as the draft head that
Transformers drops, are carried over from the base. Nothing else may be missing, and nothing may be left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.trainers.weights import plain_names
from qwen_pipeline.errors import CheckpointRefused, listed
from qwen_pipeline.qwen.config import FULL_PRECISION_BASE, require_full_precision
from qwen_pipeline.qwen.families import ModelPart, is_tied
from qwen_pipeline.qwen.fused_weights import split_fused
from qwen_pipeline.qwen.heads import as_trained, drafts, head_kind, with_prefix
from qwen_pipeline.qwen.names import SCORE, ParsedName, parse_names
from qwen_pipeline.qwen.settle import Settled, require_sizes, settle
from qwen_pipeline.transforms.fine_tune.graft import graft, with_sections_of
from qwen_pipeline.transforms.fine_tune.layouts import Placed, Source, placed, require_stacks
from qwen_pipeline.transforms.lora.vocabulary import embedding_name, head_name
from qwen_pipeline.transforms.tokenizer_fits import embedding_rows

OPTIONAL: tuple[ModelPart, ...] = ("mtp", "vision", "audio", "talker", "vocoder")
"""Parts that a fine-tune may lack, since a class of Transformers computes logits without them."""
_RESIZABLE = ("embedding", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """A full fine-tune in the base's spelling and layout.

    Attributes:
        checkpoint: The fine-tune, to be written; unchanged if it has the base's spelling and layout.
        settled: The fine-tune as it was stored, with its config settled.
        remarks: Sentences about other differences between its config and the written one.
        stored: Number of its tensors.
        respelled: Number of the base's tensors that it stores under other names or in another layout.
        carried: Part of the model that comes from the base -> number of tensors.
        is_resized: Whether its vocabulary has another size than the base's.
    """

    checkpoint: Checkpoint
    settled: Settled
    remarks: tuple[str, ...] = ()
    stored: int
    respelled: int = 0
    carried: Mapping[ModelPart, int]
    is_resized: bool = False


def adopt(base: Checkpoint, fine_tune: Checkpoint) -> Adopted:
    """Return a full fine-tune of ``base`` in the base's spelling and layout.

    The vocabulary may have another size, and the head may be tied in only one of them; what the fine-tune stores is
    kept.

    Raises:
        QuantizedInputRefused: The base or the fine-tune is quantized.
        InputRefused: See :func:`settle`.
        CheckpointRefused: A tensor is missing, is not in the base, is stored twice or has another shape than in the
            base or in the fine-tune's own config; the message names it.
    """
    require_full_precision(
        base,
        because="A fine-tune takes the places of full-precision weights.",
        remedy=FULL_PRECISION_BASE,
    )
    require_full_precision(
        fine_tune,
        because="Padding and quantization need the full-precision weights of a fine-tune.",
        remedy="Provide the model as it was saved before quantization.",
    )
    base, stored = settle(base, reads_values=False).checkpoint, fine_tune
    fine_tune = _unwrapped(stored)
    grafted = graft(base.config, fine_tune.config)
    own = fine_tune if grafted.config is fine_tune.config else _with_config(fine_tune, base, grafted.config)
    split = split_fused(own, like=base)
    settled = settle(as_trained(base, split.checkpoint), tied_base=is_tied(base))
    if head_kind(settled.checkpoint) != "language":
        base = base.without(drafts(base))
    places = parse_names(base)
    source = Source(checkpoint=settled.checkpoint, names=parse_names(settled.checkpoint))
    for each in (source, Source(checkpoint=base, names=places)):
        require_stacks(each)
    found = {name: placed(parsed, base[name], source) for parsed, name in places.items() if parsed.part != "head"}
    carried = _carried(places, source.names)
    _require_all(base, places, source, found, carried)
    sections = with_sections_of(base.config, settled.checkpoint.config, carried)
    in_place = {name: each.tensor for name, each in found.items() if each}
    adopted = with_prefix(_assembled(base, source, in_place))
    if sections.config is not settled.checkpoint.config:
        adopted = adopted.replace(config=sections.config)
    return Adopted(
        checkpoint=require_sizes(adopted),
        settled=settled,
        remarks=(*grafted.remarks, *split.remarks, *sections.remarks),
        stored=len(settled.checkpoint),
        respelled=sum(tensor is not stored.tensors.get(name) for name, tensor in in_place.items()),
        carried=carried,
        is_resized=embedding_rows(settled.checkpoint) != embedding_rows(base),
    )


def _unwrapped(fine_tune: Checkpoint) -> Checkpoint:
    """Return a fine-tune without the names of modules that torch.compile, FSDP and trainers put around others."""
    names = plain_names(fine_tune, source="The fine-tune")
    return fine_tune if all(name == plain for name, plain in names.items()) else fine_tune.renamed(names)


def _with_config(fine_tune: Checkpoint, base: Checkpoint, config: Mapping[str, object]) -> Checkpoint:
    """Return a fine-tune with the base's config, or with one that was made from it."""
    changed = fine_tune.replace(config=config)
    return replace(changed, config_bytes=base.config_bytes) if config is base.config else changed


def _carried(places: Mapping[ParsedName, str], stored: Mapping[ParsedName, str]) -> dict[ModelPart, int]:
    """Return the parts of which the fine-tune stores nothing, with the number of the base's tensors."""
    present = {parsed.part for parsed in stored}
    counts: dict[ModelPart, int] = {
        part: sum(parsed.part == part for parsed in places) for part in OPTIONAL if part not in present
    }
    return {part: count for part, count in counts.items() if count}


def _require_all(
    base: Checkpoint,
    places: Mapping[ParsedName, str],
    source: Source,
    found: Mapping[str, Placed | None],
    carried: Mapping[ModelPart, int],
) -> None:
    """Require that every tensor of the fine-tune is used, and that only carried parts are missing."""
    parts: dict[str, ModelPart] = {name: parsed.part for parsed, name in places.items()}
    used = {name for each in found.values() if each for name in each.sources}
    used |= {name for parsed, name in source.names.items() if parsed.part == "head"}
    wrong = [f"{name} is missing" for name, each in found.items() if not each and parts[name] not in carried]
    wrong += [f"{name} is not in the base" for name in source.checkpoint if name not in used]
    if not wrong:
        wrong = [
            f"{each.sources[0]} is {list(each.tensor.spec.shape)}, but {list(base[name].shape)} in the base"
            for name, each in found.items()
            if each and not _fits(each.tensor.spec.shape, base[name].shape, parts[name])
        ]
    if wrong:
        raise CheckpointRefused(
            f"The full fine-tune does not match this base: {listed(wrong)}.",
            remedy="Use the base that the model was trained from, and provide all shards of the fine-tune.",
        )


def _fits(shape: Sequence[int], expected: Sequence[int], part: ModelPart) -> bool:
    first = 1 if part in _RESIZABLE else 0
    return shape[first:] == expected[first:]


def _assembled(base: Checkpoint, source: Source, in_place: Mapping[str, LazyTensor]) -> Checkpoint:
    """Return the fine-tune with the base's names: as it is if it has them already, else in the order of the base."""
    own, stored = source.checkpoint, _heads(base, source)
    replaced = {name for parsed, name in parse_names(base).items() if parsed.part == "head"}
    is_same = {*in_place, *stored} == set(own) and set(in_place) == set(base) - replaced
    if is_same and all(tensor is own.tensors[name] for name, tensor in in_place.items()):
        return own
    has_tied_head = head_kind(own) == "language" and is_tied(own)
    heads = {name: head for name, head in stored.items() if name in base or not has_tied_head}
    kept = base.without(replaced - heads.keys())
    for name in [name for name in reversed(heads) if name not in kept]:
        kept = kept.with_tensor(name, heads[name], after=embedding_name(base))
    placed_tensors = {**in_place, **heads}
    tensors = {name: placed_tensors.get(name, tensor) for name, tensor in kept.tensors.items()}
    return replace(own, tensors=tensors, shards=kept.shards)


def _heads(base: Checkpoint, source: Source) -> dict[str, LazyTensor]:
    """Return the fine-tune's heads in the base's spelling; those of classifiers have only one."""
    heads = {parsed: name for parsed, name in source.names.items() if parsed.part == "head"}
    return {
        name if parsed.module == SCORE else head_name(base): source.checkpoint.tensors[name]
        for parsed, name in heads.items()
    }
