"""A store with a whole chain up to a signed release, and keys: made once, copied by each test that changes it."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store.destinations import CheckpointStore, Slot
from qwen_pipeline.lineage.audit import Audit, audit
from qwen_pipeline.lineage.library import Sources, located, open_library
from qwen_pipeline.lineage.verification.envelopes import load_public_key
from qwen_pipeline.lineage.verification.trust import Signer
from qwen_pipeline.stages.publish import publish
from qwen_pipeline_tests.chain import Chain

NAME = "bot"


@dataclass(frozen=True, slots=True)
class Chained:
    """A directory with ``store/``, ``merged/`` (which no stage made) and the keys ``release.pem`` and ``release.pub``.

    The store has the outputs ``padded``, ``quantized``, ``validated`` and the signed release; ``other/`` is another
    release of the same weights by the same signer.
    """

    root: Path

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def key(self) -> Path:
        return self.root / "release.pem"

    @property
    def public_key(self) -> Path:
        return self.root / "release.pub"

    def output(self, stage: str) -> Path:
        return located(self.store / stage / NAME / "latest")

    @property
    def release(self) -> Path:
        return self.output("published")

    @property
    def other(self) -> Path:
        return self.root / "other"

    def copy(self, root: Path) -> "Chained":
        shutil.copytree(self.root, root, symlinks=True)
        return Chained(root)

    def audit(self, root: Path | None = None, *, signers: Sequence[Signer] = ()) -> Audit:
        """Audit the release, or another output; its own key is trusted, unless others are named."""
        return audit(
            root or self.release,
            library=open_library([self.store]),
            sources=Sources([self.root / "merged"]),
            keys=signers or [load_public_key(self.public_key)],
        )


def make_chained(root: Path, chain: Chain, validated: Path) -> Chained:
    """Copy a chain into a store, each output where its derivation belongs, and publish and sign it."""
    chained = Chained(root)
    write_key(chained.key, chained.public_key)
    shutil.copytree(chain.merged, root / "merged")
    slot = CheckpointStore(chained.store).slot(NAME)
    for source in (chain.padded, chain.quantized, validated):
        _place(source, slot)
    publish_again(chained, slot, "Qwen/Tiny")
    publish_again(chained, chained.other, "Qwen/Other")
    return chained


def publish_again(chained: Chained, destination: Slot | Path, base_model: str) -> None:
    """Publish and sign a release of the chain whose card names another base."""
    publish(
        quantized=chained.output("quantized"),
        validated=chained.output("validated"),
        destination=destination,
        base_model=base_model,
        fine_tune=NAME,
        signing_key=chained.key,
    )


def write_key(private: Path, public: Path, passphrase: bytes | None = None) -> None:
    """Write a new P-256 key pair."""
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    private.parent.mkdir(parents=True, exist_ok=True)
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))


def _place(source: Path, slot: Slot) -> None:
    out = slot.path_for(open_manifest(source).derivation)
    shutil.copytree(source, out)
    slot.on_finished(out, made=True)
