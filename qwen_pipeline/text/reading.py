"""The tokens of a source of text, record by record: records that cannot be used are skipped, counted and named."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.reports import CheckReport, CheckSpec
from qwen_pipeline.text.records import BadRecord, EmptyRecord, parse_record
from qwen_pipeline.text.sources import TextSource
from qwen_pipeline.text.spec import DEFAULT_TEXT_SPEC, TextSpec
from qwen_pipeline.text.tokenizers import Tokenizer

NAMED = 5
"""Skipped records that are named, the first ones."""
JUDGED = 100
"""Records of which the share of skipped ones is meaningful, if the source has as many."""

RECORDS_USED = CheckSpec(
    name="records_used",
    description="Every record that was drawn from the calibration text could be used.",
    blocking=False,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordUse:
    """The use of the records that were read.

    Attributes:
        used: Records with tokens.
        empty: Records without any text.
        skipped: Reason -> records that were skipped for it.
        first: The location and fault of the first skipped records.
    """

    used: int
    empty: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict[str, int])
    first: tuple[str, ...] = ()

    @property
    def faults(self) -> int:
        return sum(self.skipped.values())

    @property
    def share(self) -> float:
        """The share of records that were skipped, empty ones left out."""
        return self.faults / max(self.faults + self.used, 1)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} ({reason})" for reason, count in self.skipped.items())
        skipped = f"{self.faults:,} of {self.used + self.faults:,} records were skipped: {reasons}." if reasons else ""
        first = f" The first: {'; '.join(self.first)}." if self.first else ""
        empty = f" Empty records that were passed over: {self.empty:,}." if self.empty else ""
        return (skipped + first + empty).strip() or f"All {self.used:,} records were used."

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "skipped": dict(self.skipped), "first": list(self.first)}

    @staticmethod
    def from_json(value: object) -> "RecordUse":
        """Read what :meth:`to_json` returned.

        Raises:
            CheckpointRefused: It is something else.
        """
        try:
            return _RECORD_USE.validate_python(value)
        except ValidationError as error:
            raise CheckpointRefused(
                f"A manifest has damaged counts of records: {error.errors()[0]['msg']}.",
                remedy="Delete the directory and run its stage again.",
            ) from error

    def report(self) -> CheckReport:
        """Report on :data:`RECORDS_USED`."""
        return RECORDS_USED.report(
            passed=not self.faults, measured=f"{self.used} of {self.used + self.faults}", detail=str(self)
        )


_RECORD_USE = TypeAdapter(RecordUse)


class RecordReader:
    """Reads the tokens of records; those that cannot be used are skipped within a limit.

    Args:
        source: The records.
        tokenizer: A checkpoint's tokenizer.
        spec: The limit, and arguments of the chat template.
    """

    def __init__(self, source: TextSource, tokenizer: Tokenizer, spec: TextSpec = DEFAULT_TEXT_SPEC) -> None:
        self._source, self._tokenizer, self._spec = source, tokenizer, spec
        self._used = self._empty = 0
        self._reasons, self._first = Counter[str](), list[str]()
        self._remedies: dict[str, str] = {}

    @property
    def use(self) -> RecordUse:
        """The records read so far."""
        return RecordUse(
            used=self._used, empty=self._empty, skipped=dict(self._reasons.most_common()), first=tuple(self._first)
        )

    def tokens(self, order: Iterable[int]) -> Iterator[list[int]]:
        """Yield the token ids of each record that can be used.

        Raises:
            InputRefused: The records skipped so far are too many for the whole source, or see :meth:`Tokenizer.encode`.
        """
        arguments = self._spec.template_arguments
        for index in order:
            where = self._source.where(index)
            try:
                record = parse_record(self._source.record(index))
                tokens = self._tokenizer.encode(record, where=where, arguments=arguments)
            except EmptyRecord:
                tokens = []
            except BadRecord as bad:
                self._skip(bad, where)
                continue
            self._used += bool(tokens)
            self._empty += not tokens
            if tokens:
                yield tokens

    def require_few_skipped(self, rest: Iterator[list[int]]) -> None:
        """Check the records read so far against the limit; if they are few and exceed it, read some of the rest too.

        Args:
            rest: The iterator of :meth:`tokens`, if it is not exhausted.

        Raises:
            InputRefused: A larger share was skipped. The message counts the reasons and names the first records.
        """
        while self.use.share > self._spec.max_skipped:
            if self.use.faults + self._used >= JUDGED or next(rest, None) is None:
                self._refuse()

    def _skip(self, bad: BadRecord, where: str) -> None:
        self._reasons[bad.reason] += 1
        self._remedies[bad.reason] = bad.remedy
        if len(self._first) < NAMED:
            self._first.append(f"{where}: {bad}")
        if self._reasons.total() > max(JUDGED, self._spec.max_skipped * len(self._source)):
            self._refuse()

    def _refuse(self) -> None:
        use = self.use
        remedy = self._remedies[next(iter(use.skipped))]
        is_command = not remedy.endswith(".")  # a full stop would become a part of it
        raise InputRefused(
            f"{self._source.name} has too many records that cannot be used, more than max_skipped ="
            f" {self._spec.max_skipped:g}: {use}",
            remedy=remedy + (f"{chr(10) if is_command else ' '}Or raise max_skipped." if use.used else ""),
        )
