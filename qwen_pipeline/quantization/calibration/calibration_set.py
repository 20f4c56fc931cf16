"""Calibration sets: windows of tokens of one length, drawn by seed, identified by a digest, saved in a directory.

The order of the records depends only on the seed and their number; they are tokenized until the windows are full.
``stream`` concatenates them and cuts the result into full windows, so that it needs no pad tokens; as in
pretraining, a token attends to all earlier tokens of its window, including those of other records. ``documents`` gives
every record one or more windows of its own, and fills the last one with pad tokens: causal attention ignores later
positions, and the mask excludes them from the solver's Hessian.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from qwen_pipeline.checkpoint.digest import digest_files, hash_tensors
from qwen_pipeline.checkpoint.files import write_bytes
from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.checkpoint.manifest import Contents, TensorDigest, find_manifest, open_manifest
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec, open_safetensors
from qwen_pipeline.errors import CheckFailed, CheckpointRefused, InputRefused
from qwen_pipeline.quantization.calibration.spec import CalibrationSpec
from qwen_pipeline.reports import load_reports
from qwen_pipeline.text.bounded_tokenizer import BoundedTokenizer
from qwen_pipeline.text.reading import RecordReader, RecordUse
from qwen_pipeline.text.sources import open_text
from qwen_pipeline.text.spec import DEFAULT_TEXT_SPEC, TextSpec

if TYPE_CHECKING:
    from torch import Tensor

STAGE = "calibration"
FILE = "calibration.safetensors"
_BINS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Upper ends of the histogram of record lengths, in tokens."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CalibrationSet:
    """Windows of tokens, S of length T.

    Attributes:
        input_ids: int32 [S, T].
        attention_mask: uint8 [S, T]: 1 for a token, 0 for a pad token after the last one.
        position_ids: int32 [S, T]: index of a token in its record; a record begins at each 0.
        spec: The spec with which the windows were drawn.
        lengths: Tokens of each drawn record, in the order of drawing.
        records: The records that were read, and those among them that could not be used.
    """

    input_ids: "Tensor"
    attention_mask: "Tensor"
    position_ids: "Tensor"
    spec: CalibrationSpec
    lengths: tuple[int, ...]
    records: RecordUse

    @property
    def tensors(self) -> dict[str, "Tensor"]:
        return {name: getattr(self, name) for name in ("input_ids", "attention_mask", "position_ids")}

    @property
    def digest(self) -> str:
        """The content digest of the directory that :meth:`save` writes."""
        return Contents(tensors=digests(self.tensors), files={}).digest

    @property
    def tokens(self) -> int:
        """Number of tokens, without pad tokens."""
        return int(self.attention_mask.sum())

    @property
    def stream(self) -> list[int]:
        """All tokens in order, without pad tokens."""
        return self.input_ids[self.attention_mask.bool()].tolist()

    def statistics(self) -> dict[str, Any]:
        """Return counts of tokens, windows and records, as JSON values; skipped records if there are any."""
        windows, seq_len = self.input_ids.shape
        skipped = {"skipped": self.records.to_json()} if self.records.faults else {}
        return {
            "tokens": self.tokens,
            "windows": windows,
            "seq_len": seq_len,
            "records": len(self.lengths),
            "padding_share": round(1 - self.tokens / self.input_ids.numel(), 6),
            "record_tokens": {"least": min(self.lengths), "median": median(self.lengths), "most": max(self.lengths)},
            "record_tokens_histogram": _histogram(self.lengths),
            "distinct_tokens": len(self.input_ids[self.attention_mask.bool()].unique()),
            "digest": self.digest,
            **skipped,
        }

    def save(self, root: Path) -> Contents:
        """Write the windows into a directory; return their digests."""
        from safetensors.torch import save

        write_bytes(root / FILE, save(self.tensors))
        return Contents(tensors=digests(self.tensors), files=digest_files({FILE: root / FILE}))


def digests(tensors: Mapping[str, "Tensor"]) -> dict[str, TensorDigest]:
    """Return the digest of each tensor."""
    in_memory = {name: _in_memory(tensor) for name, tensor in tensors.items()}
    hashed = hash_tensors(in_memory, task="digest calibration")
    return {name: tensor.digest for name, tensor in hashed.items()}


def _in_memory(tensor: "Tensor") -> LazyTensor:
    dtype = {"torch.int32": "I32", "torch.uint8": "U8"}[str(tensor.dtype)]
    spec = TensorSpec(dtype=dtype, shape=tuple(tensor.shape))
    return LazyTensor(spec=spec, read=lambda start, stop: tensor[start:stop])


def draw_calibration(
    text: str | Path, checkpoint: Path, spec: CalibrationSpec, *, text_spec: TextSpec = DEFAULT_TEXT_SPEC
) -> CalibrationSet:
    """Draw windows of tokens, with the tokenizer and the chat template of a checkpoint.

    Args:
        text: A source of text, as accepted by :func:`qwen_pipeline.text.sources.open_text`.
        checkpoint: The model that will be quantized.
        spec: Number, length and selection of the windows.
        text_spec: The share of records that may be skipped, and arguments of the chat template.

    Raises:
        InputRefused: The text is missing, too many of its records cannot be used, the checkpoint has no tokenizer or no
            chat template for conversations, or the whole text has too few tokens.
    """
    source, tokenizer = open_text(text), BoundedTokenizer(checkpoint, text_spec.limits)
    reader = RecordReader(source, tokenizer, text_spec)
    records = reader.tokens(shuffled(len(source), spec.seed))
    windows = _Windows(spec, pad_token=tokenizer.pad_token)
    for tokens in records:
        windows.add(tokens)
        if windows.are_full:
            reader.require_few_skipped(records)
            return windows.build(reader.use)
    reader.require_few_skipped(records)
    shortage = (
        f"{windows.count} windows of up to {spec.seq_len} tokens, expected {spec.samples}."
        if spec.packing == "documents"
        else f"{windows.tokens:,} tokens, but {spec.samples} windows of {spec.seq_len} need"
        f" {spec.samples * spec.seq_len:,}."
    )
    raise InputRefused(
        f"{text} has {shortage}" + ("" if reader.use.used == len(source) else f" {reader.use}"),
        remedy="Add calibration text, or lower samples or seq_len.",
    )


def require_vocabulary(drawn: CalibrationSet, rows: int) -> None:
    """Check that every token has a row in the embedding.

    Raises:
        InputRefused: A token has none, because the tokenizer is larger than the model.
    """
    if (highest := int(drawn.input_ids.max())) >= rows:
        raise InputRefused(
            f"The text has token {highest}, but the model's embedding has {rows:,} rows.",
            remedy="Use the tokenizer that the model was trained with, or text without the tokens that were added to"
            " it.",
        )


def is_prepared(text: str | Path) -> bool:
    """Return whether a calibration source is a finished output of the stage ``calibration``."""
    manifest = find_manifest(Path(text))
    return manifest is not None and manifest.derivation.stage == STAGE


def load_calibration(root: Path) -> CalibrationSet:
    """Load a calibration set from a finished directory.

    Raises:
        CheckpointRefused: The windows do not match the digests in the manifest, or its data are damaged.
        CheckFailed: The calibration failed a blocking check.
    """
    manifest, file = open_manifest(root), open_safetensors(root / FILE)
    again = "Delete the directory and calibrate again."
    try:
        spec = CalibrationSpec(**{name: manifest.derivation.spec[name] for name in CalibrationSpec.fields()})
        lengths = tuple(map(int, manifest.result["lengths"]))
        records = RecordUse.from_json(manifest.result.get("records", {"used": len(lengths)}))
    except (InputRefused, LookupError, TypeError, ValueError) as error:
        raise CheckpointRefused(f"{root} has a damaged manifest: {error!r}.", remedy=again) from error
    tensors = {name: file.load(name) for name in file.specs}
    if digests(tensors) != manifest.contents.tensors:
        raise CheckpointRefused(f"{root / FILE} does not match its manifest.", remedy=again)
    for report in load_reports(manifest.result):
        if report.blocks:
            raise CheckFailed(
                f"{root} failed the check {report.name}: {report.detail}",
                remedy="Delete the directory and calibrate again as the check says.",
            )
    return CalibrationSet(**tensors, spec=spec, lengths=lengths, records=records)


def shuffled(count: int, seed: int) -> list[int]:
    """Return a permutation of ``range(count)`` in the order of hashes, the same in every process and version."""
    return sorted(range(count), key=lambda index: sha256(f"{seed}:{index}".encode()).digest())


class _Windows:
    """Windows that are filled record by record."""

    def __init__(self, spec: CalibrationSpec, *, pad_token: int) -> None:
        self._spec, self._pad_token = spec, pad_token
        self._pieces: list[list[int]] = []
        self._stream: list[int] = []
        self._positions: list[int] = []
        self._lengths: list[int] = []

    @property
    def tokens(self) -> int:
        return sum(self._lengths)

    @property
    def count(self) -> int:
        return len(self._pieces)

    @property
    def are_full(self) -> bool:
        if self._spec.packing == "documents":
            return self.count >= self._spec.samples
        return self.tokens >= self._spec.samples * self._spec.seq_len

    def add(self, record: list[int]) -> None:
        self._lengths.append(len(record))
        if self._spec.packing == "documents":
            self._pieces += _cut(record, self._spec.seq_len)
        else:
            self._stream += record
            self._positions += range(len(record))

    def build(self, records: RecordUse) -> CalibrationSet:
        import torch

        samples, seq_len = shape = self._spec.samples, self._spec.seq_len
        if self._spec.packing == "stream":
            ids, positions = self._stream[: samples * seq_len], self._positions[: samples * seq_len]
            rows = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
            position_ids = torch.tensor(positions, dtype=torch.int32).reshape(shape)
        else:
            rows = self._pieces[:samples]
            position_ids = torch.arange(seq_len, dtype=torch.int32).repeat(samples, 1)
        input_ids = torch.full(shape, self._pad_token, dtype=torch.int32)
        attention_mask = torch.zeros(shape, dtype=torch.uint8)
        for window, mask, row in zip(input_ids, attention_mask, rows, strict=True):
            window[: len(row)] = torch.tensor(row, dtype=torch.int32)
            mask[: len(row)] = 1
        return CalibrationSet(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids * attention_mask,
            spec=self._spec,
            lengths=tuple(self._lengths),
            records=records,
        )


def _cut(record: list[int], length: int) -> Iterator[list[int]]:
    for start in range(0, len(record), length):
        yield record[start : start + length]


def _histogram(lengths: tuple[int, ...]) -> list[dict[str, int]]:
    ends = [end for end in _BINS if end < max(lengths)] + [next((e for e in _BINS if e >= max(lengths)), max(lengths))]
    starts = [0, *ends[:-1]]
    return [
        {"up_to": end, "records": sum(start < length <= end for length in lengths)}
        for start, end in zip(starts, ends, strict=True)
    ]
