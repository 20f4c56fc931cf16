"""The heads of models: language models, classifiers, reward and embedding models, recognized by their weights.

Transformers has a class for each, with the same decoder: ``score`` classifies a text by its last token
(``...ForSequenceClassification``, without a bias; reward models have one label) or each token
(``...ForTokenClassification``, with a bias), and an embedding model (``...Model``) has no head. Embedding models are
published in the layout of sentence-transformers, often under the class of the language model that they were made from.

Sources: ``modeling_layers.py`` of Transformers 5.23; ``Pooling.load`` of sentence-transformers 5.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, cast, get_args

from qwen_pipeline.checkpoint.files import load_json, parse_json
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused, listed
from qwen_pipeline.qwen.families import ARCHITECTURES, FAMILIES, Config, Family, text_config
from qwen_pipeline.qwen.names import DRAFTS, SCORE

HeadKind = Literal["language", "sequence", "token", "embedding"]
"""The use of the last hidden states: next tokens, a text's label or reward, labels of tokens, a text's embedding."""
Pooling = Literal["lasttoken", "mean", "cls", "max", "weightedmean", "mean_sqrt_len_tokens"]
"""Ways to combine the hidden states of a text, under sentence-transformers' names."""

MODULES = "modules.json"
"""The file in which sentence-transformers lists the steps after the model, each with its directory."""
SCORE_WEIGHT, SCORE_BIAS = f"{SCORE}.weight", f"{SCORE}.bias"
_STEPS = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]*_*/*")
_CLASSES: Mapping[HeadKind, tuple[str, ...]] = {
    "sequence": ("ForSequenceClassification",),
    "token": ("ForTokenClassification",),
    "embedding": ("Model", "ForCausalLM"),
}


def head_kind(checkpoint: Checkpoint) -> HeadKind:
    """Return the kind of a checkpoint's head; that of a language model if its family has no other classes."""
    family = FAMILIES.get(str(checkpoint.config.get("model_type")), Family())
    if not family.scored:
        return "language"
    if SCORE_WEIGHT in checkpoint:
        return "token" if SCORE_BIAS in checkpoint else "sequence"
    has_head = any(f"{head}.weight" in checkpoint for head in family.heads)
    has_no_class = list(checkpoint.config.get("architectures") or []) == [f"{family.scored}Model"]
    return "embedding" if not has_head and (has_no_class or _pooling_config(checkpoint.sidecars)) else "language"


def architectures_of(kind: HeadKind, config: Config) -> tuple[str, ...]:
    """Return the classes of Transformers that a checkpoint of this kind may declare, the exact one first."""
    family = str(config["model_type"])
    if kind == "language":
        return ARCHITECTURES[family]
    return tuple(f"{FAMILIES[family].scored}{suffix}" for suffix in _CLASSES[kind])


def class_of(checkpoint: Checkpoint) -> str | None:
    """Return the class that loads an embedding model, whatever class it declares; None for others."""
    is_embedding = head_kind(checkpoint) == "embedding"
    return architectures_of("embedding", checkpoint.config)[0] if is_embedding else None


def number_of_labels(config: Config) -> int:
    """Return the number of labels that Transformers reads from a config, which is 2 if it has none."""
    return len(config.get("id2label") or ()) or int(config.get("num_labels") or 2)


def left_out(base: Checkpoint, fine_tune: Checkpoint) -> str:
    """Return a sentence about the base's heads that a fine-tune of another class does not have; empty without any."""
    names = [name for name in (*_heads(base), *drafts(base)) if name not in fine_tune]
    if head_kind(base) == head_kind(fine_tune) or not names:
        return ""
    return f" {listed(names)} of the base is left out: {fine_tune.config['architectures'][0]} has no such head."


def drafts(checkpoint: Checkpoint) -> list[str]:
    """Return the names of a draft head, which predicts tokens and so is of no use without an output head."""
    is_drafting = FAMILIES[checkpoint.config["model_type"]].drafts
    return [name for name in checkpoint if name.startswith(DRAFTS)] if is_drafting else []


def _heads(checkpoint: Checkpoint) -> list[str]:
    heads = FAMILIES[checkpoint.config["model_type"]].heads
    return [name for name in (*(f"{head}.weight" for head in heads), SCORE_WEIGHT, SCORE_BIAS) if name in checkpoint]


def as_trained(base: Checkpoint, fine_tune: Checkpoint) -> Checkpoint:
    """Return a fine-tune that declares the class without a head, if it stores none and its base is an embedding model.

    Trainers keep the base's class, which may be that of a language model.
    """
    if head_kind(base) != "embedding" or head_kind(fine_tune) != "language" or _heads(fine_tune):
        return fine_tune
    classes = list(architectures_of("embedding", base.config)[:1])
    return fine_tune.replace(config={**fine_tune.config, "architectures": classes})


def with_prefix(checkpoint: Checkpoint) -> Checkpoint:
    """Return a classifier with ``model.`` before the names of its decoder, which embedding models do not have.

    Transformers adds the prefix where it is missing; vLLM does so only if the decoder is all that is stored.
    """
    if head_kind(checkpoint) not in ("sequence", "token"):
        return checkpoint
    known = ("model.", f"{SCORE}.", DRAFTS)
    names = {name: name if name.startswith(known) else f"model.{name}" for name in checkpoint}
    return checkpoint if all(new == name for name, new in names.items()) else checkpoint.renamed(names)


def label_fields(count: int, names: Config | None = None) -> dict[str, Any]:
    """Return the config fields of a number of labels: their names in another config, if it has as many; or numbers."""
    given = dict((names or {}).get("id2label") or {})
    named = {str(number): str(name) for number, name in given.items()} if len(given) == count else {}
    id2label = named or {str(number): f"LABEL_{number}" for number in range(count)}
    return {"id2label": id2label, "label2id": {name: int(number) for number, name in id2label.items()}}


def corrected_labels(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the config fields that do not describe the stored ``score``; none if they do, or if there is none.

    Raises:
        CheckpointRefused: A language head is stored beside it, its class has a bias and it has none or vice versa, or
            its inputs are not hidden states.
    """
    kind = head_kind(checkpoint)
    if kind not in ("sequence", "token"):
        return {}
    _require_one_head(checkpoint, kind)
    labels, width = checkpoint[SCORE_WEIGHT].shape
    if width != (hidden := text_config(checkpoint.config).get("hidden_size")):
        raise CheckpointRefused(
            f"{SCORE_WEIGHT} has {width} inputs, but hidden_size is {hidden}.",
            remedy="Use config and weights of the same model.",
        )
    return label_fields(labels) if labels != number_of_labels(checkpoint.config) else {}


def _require_one_head(checkpoint: Checkpoint, kind: HeadKind) -> None:
    family = FAMILIES[checkpoint.config["model_type"]]
    if beside := [f"{head}.weight" for head in family.heads if f"{head}.weight" in checkpoint]:
        raise CheckpointRefused(
            f"Both {SCORE_WEIGHT} and {beside[0]} are stored, but no class of Transformers has both.",
            remedy=f"Remove {beside[0]} to get a classifier, or {SCORE} to get a language model.",
        )
    other: HeadKind = "token" if kind == "sequence" else "sequence"
    if set(checkpoint.config.get("architectures") or []) & set(architectures_of(other, checkpoint.config)):
        raise CheckpointRefused(
            f"architectures is {checkpoint.config['architectures']}, whose {SCORE} has {_bias(other)}, but"
            f" {_bias(kind)} is stored.",
            remedy=f"Provide the shard with all of {SCORE}, or set architectures to"
            f" {list(architectures_of(kind, checkpoint.config))}.",
        )


def _bias(kind: HeadKind) -> str:
    return "a bias" if kind == "token" else "no bias"


def without_steps(sidecars: Mapping[str, Path], kind: HeadKind) -> dict[str, Path]:
    """Return a base's sidecars without those of sentence-transformers, if a fine-tune of it is a classifier."""
    if kind not in ("sequence", "token"):
        return dict(sidecars)
    return {path: file for path, file in sidecars.items() if not any(fnmatch(path, glob) for glob in _STEPS)}


def pooling_of(checkpoint: Checkpoint) -> tuple[Pooling, ...]:
    """Return the ways in which an embedding model combines hidden states; the results are concatenated.

    Without sentence-transformers' files it is the last token, as for Qwen's published embedding models.

    Raises:
        CheckpointRefused: The file names a way that is not known here.
    """
    if not (file := _pooling_config(checkpoint.sidecars)):
        return ("lasttoken",)
    config = load_json(file)
    given = config.get("pooling_mode")
    modes = [given] if isinstance(given, str) else list(cast("Sequence[str]", given or ()))
    modes += [_OF_FLAG.get(name, name) for name, value in config.items() if name.startswith("pooling_mode_") and value]
    if unknown := [mode for mode in modes if mode not in get_args(Pooling)]:
        raise CheckpointRefused(
            f"{file} has the pooling {', '.join(unknown)}, expected {', '.join(get_args(Pooling))}.",
            remedy="Correct the file, or use a version of this package that knows it.",
        )
    return tuple(cast("Sequence[Pooling]", modes)) or ("mean",)


_OF_FLAG = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Fields of sentence-transformers before 5.4, one for each way."""


def further_steps(checkpoint: Checkpoint) -> list[str]:
    """Return the directories of the steps after pooling that change more than the length of an embedding."""
    steps = _steps(checkpoint.sidecars)
    pooling = next((number for number, (_, kind) in enumerate(steps) if kind.endswith(".Pooling")), len(steps))
    return [path for path, kind in steps[pooling + 1 :] if not kind.endswith(".Normalize")]


def _pooling_config(sidecars: Mapping[str, Path]) -> Path | None:
    """Return the config of the step that pools hidden states; None if the files list no such step."""
    paths = [path for path, kind in _steps(sidecars) if kind.endswith(".Pooling")]
    return next((found for path in paths if (found := sidecars.get(f"{path}/config.json"))), None)


def _steps(sidecars: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Return the directory and the class of each step of sentence-transformers; none without its file."""
    if not (file := sidecars.get(MODULES)):
        return []
    try:
        return [(str(step["path"]), str(step["type"])) for step in parse_json(file.read_bytes())]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointRefused(
            f"{file} is not a list of steps of sentence-transformers: {error!r}.", remedy="Fetch the file again."
        ) from error
