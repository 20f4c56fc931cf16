"""A prepared stage that computes one checkpoint from others: its derivation and its lazy output."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.hashing_reader import HashingReader
from qwen_pipeline.checkpoint.lazy import CONFIG, Checkpoint
from qwen_pipeline.checkpoint.manifest import Contents, Derivation
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.checkpoint.store.stage_input import StageInput
from qwen_pipeline.checkpoint.writer import write_checkpoint, write_recipe
from qwen_pipeline.progress import Observe, unobserved


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """A prepared stage that computes one checkpoint from its inputs.

    Attributes:
        sources: Role -> input checkpoint.
        others: Role -> digest of each further input.
        output: The checkpoint to write, lazily.
        result: Returns the stage's findings for the manifest, once everything is written.
        if_not_finite: See :func:`write_checkpoint`.
        config_name: See :func:`write_checkpoint`.
    """

    stage: str
    code_version: str
    spec: Mapping[str, Any]
    sources: Mapping[str, StageInput]
    others: Mapping[str, str] = field(default_factory=dict[str, str])
    output: Checkpoint
    result: Callable[[], Mapping[str, Any]]
    if_not_finite: str | None = None
    config_name: str = CONFIG

    @property
    def derivation(self) -> Derivation:
        return self._derivation({role: source.digest for role, source in self.sources.items()})

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Role -> fingerprint of each source."""
        return {role: source.fingerprint for role, source in self.sources.items()}

    @property
    def fingerprint(self) -> str:
        """The derivation key with fingerprints in place of digests: known before the sources are read."""
        return self._derivation(self.fingerprints).key

    @property
    def readers(self) -> list[HashingReader]:
        return [reader for source in self.sources.values() for reader in source.readers]

    def final_digests(self) -> dict[str, str]:
        """Return role -> digest of each source, once the readers have finished."""
        return {role: source.final_digest() for role, source in self.sources.items()}

    def write_recipe(
        self,
        destination: Destination | Path,
        recipe: Callable[[], Mapping[str, str]],
        *,
        task: str,
        observe: Observe = unobserved,
    ) -> Artifact:
        """Write the output as a recipe, unless it exists: its weights are computed and hashed, but not stored.

        Args:
            destination: The output directory.
            recipe: Returns what the manifest says of the inputs (:class:`Manifest`), once all were read.
            task: Name of the progress.
            observe: Called with the progress.
        """
        return self._derive(write_recipe, destination, recipe, task=task, observe=observe)

    def write(
        self, destination: Destination | Path, *, task: str, hard_links: bool = False, observe: Observe = unobserved
    ) -> Artifact:
        """Write the output, unless it exists."""
        write = functools.partial(write_checkpoint, hard_links=hard_links)
        return self._derive(write, destination, task=task, observe=observe)

    def _derive(
        self,
        write: Callable[..., Contents],
        destination: Destination | Path,
        recipe: Callable[[], Mapping[str, str] | None] = lambda: None,
        *,
        task: str,
        observe: Observe,
    ) -> Artifact:
        def build(partial: Path) -> Built:
            contents = write(
                self.output,
                partial,
                task=task,
                readers=self.readers,
                if_not_finite=self.if_not_finite,
                config_name=self.config_name,
                observe=observe,
            )
            return Built(contents=contents, result=self.result(), inputs=self.final_digests(), recipe=recipe())

        return derive(self.derivation, destination, build, fingerprints=self.fingerprints)

    def _derivation(self, inputs: Mapping[str, str]) -> Derivation:
        return Derivation(
            stage=self.stage, inputs={**inputs, **self.others}, spec=self.spec, code_version=self.code_version
        )
