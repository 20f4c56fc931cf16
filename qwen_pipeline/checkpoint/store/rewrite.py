"""A stage that makes one checkpoint of others: what it derives from and what it writes, before a byte moves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.hashing_reader import HashingReader
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.manifest import Derivation
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.checkpoint.store.source import StageInput
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.progress import Observe, unobserved


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """One stage's work on one input, prepared.

    Attributes:
        sources: Role -> input checkpoint.
        others: Role -> digest of each further input.
        output: What is to be written, lazily.
        result: Says what the stage found out, once everything is written.
        if_not_finite: See :func:`write_checkpoint`.
    """

    stage: str
    code_version: str
    spec: Mapping[str, Any]
    sources: Mapping[str, StageInput]
    others: Mapping[str, str] = field(default_factory=dict[str, str])
    output: Checkpoint
    result: Callable[[], Mapping[str, Any]]
    if_not_finite: str | None = None

    @property
    def derivation(self) -> Derivation:
        return self._derivation({role: source.digest for role, source in self.sources.items()})

    @property
    def appearance(self) -> Mapping[str, str]:
        return {role: source.appearance for role, source in self.sources.items()}

    @property
    def attempt(self) -> Derivation:
        """The derivation by what its inputs look like."""
        return self._derivation(self.appearance)

    @property
    def readers(self) -> list[HashingReader]:
        return [reader for source in self.sources.values() for reader in source.readers]

    def settle(self) -> dict[str, str]:
        """Return the digest of each source, once the taps are settled."""
        return {role: source.settle() for role, source in self.sources.items()}

    def write(
        self, destination: Destination | Path, *, task: str, hard_links: bool = False, observe: Observe = unobserved
    ) -> Artifact:
        """Do the work, unless its result is there."""

        def build(partial: Path) -> Built:
            contents = write_checkpoint(
                self.output,
                partial,
                task=task,
                readers=self.readers,
                if_not_finite=self.if_not_finite,
                hard_links=hard_links,
                observe=observe,
            )
            return Built(contents=contents, result=self.result(), inputs=self.settle())

        return derive(self.derivation, destination, build, appearance=self.appearance)

    def _derivation(self, inputs: Mapping[str, str]) -> Derivation:
        return Derivation(
            stage=self.stage, inputs={**inputs, **self.others}, spec=self.spec, code_version=self.code_version
        )
