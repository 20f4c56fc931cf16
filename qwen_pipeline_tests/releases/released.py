"""A workspace whose store has releases of one product, each made by the publish stage of one quantized checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.config import Settings
from qwen_pipeline.config.loading import settings_from_values
from qwen_pipeline.lineage.pointers import link_of
from qwen_pipeline.releases.promotion import offer
from qwen_pipeline.stages.publish import publish
from qwen_pipeline_tests.chain import Chain
from qwen_pipeline_tests.edited_validations import rewritten
from qwen_pipeline_tests.lineage.chained import write_key

PRODUCT = "bot"


@dataclass(frozen=True)
class Released:
    """A workspace, and what releases are made of."""

    root: Path
    chain: Chain
    validated: Path

    @property
    def store(self) -> Path:
        return self.root / "store"

    def settings(self, **sections: Any) -> Settings:
        return settings_from_values({"workspace": self.root, "base_model": str(self.chain.merged), **sections})

    def key(self, name: str) -> Path:
        """Return a private key, made if it is not there; ``<name>.pub`` is beside it."""
        file = self.root / f"{name}.pem"
        if not file.exists():
            write_key(file, file.with_suffix(".pub"))
        return file

    def make(self, settings: Settings, number: int, *, growth: float = 1.0) -> Path:
        """Publish a release whose perplexities have grown by a factor, and offer it as candidate."""
        validated = self.validated
        if growth != 1:
            findings = json.loads(json.dumps(dict(open_manifest(validated).result["findings"])))
            for model in findings["models"].values():
                model["perplexity"] *= growth
            validated = rewritten(validated, self.root / f"validated-{number}", {"findings": findings})
        release = publish(
            quantized=self.chain.quantized,
            validated=validated,
            destination=CheckpointStore(self.store).slot(PRODUCT),
            base_model=f"Qwen/Tiny-{number}",
            fine_tune=PRODUCT,
            signing_key=settings.signing.key,
        )
        offer(settings, PRODUCT, release.path)
        return release.path

    def pointer(self, name: Any) -> Path:
        """Return the release that a pointer's link leads to."""
        return link_of(self.store, PRODUCT, name).resolve()
