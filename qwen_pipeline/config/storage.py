"""The sections of the settings file about what is stored, signed and released."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qwen_pipeline.config.sections import ConfiguredPath, Section

Rule = Annotated[int, Field(ge=0)] | Literal["until validated", "forever"]


class Keep(Section):
    """Retention: the outputs of a stage that are kept, for each fine-tune.

    A number: that many of the newest. ``until validated``: those of which no validation has passed yet. ``forever``:
    all of them. What a pointer leads to, a run uses, or nothing can make again is kept in any case.

    Attributes:
        merged: Merged checkpoints.
        padded: Padded checkpoints.
        calibration: Calibration tokens.
        quantized: Quantized checkpoints; a release has a copy of its own.
        validated: Validations; a release has a copy of its own.
        published: Releases that no pointer leads to.
        irreplaceable: Whether what nothing can make again, such as merged weights whose upload was replaced, is kept.
        partial_days: Days after which what an interrupted run left behind is removed.
    """

    merged: Rule = "forever"
    padded: Rule = "forever"
    calibration: Rule = "forever"
    quantized: Rule = "forever"
    validated: Rule = "forever"
    published: Annotated[int, Field(ge=0)] | Literal["forever"] = "forever"
    irreplaceable: bool = True
    partial_days: float = Field(default=7, ge=0, le=36_500)


class Store(Section):
    """Storage of checkpoints.

    Attributes:
        merged: Whether merged weights are stored. If not, merging and padding are a single pass, and the merged
            checkpoint is a recipe with the same digest. Changes the asset graph when the code location is loaded; a run
            cannot change it.
        padded: Whether padded weights are stored. If not, and if merged ones are not stored either, the pass only
            computes digests, and quantization and validation compute what they read from base and fine-tune.
        hard_links: Whether an unchanged shard may be a hard link to the base model's file. Writing to either file then
            changes both.
        keep: Retention: what is kept of each stage's outputs.
    """

    merged: bool = True
    padded: bool = True
    hard_links: bool = False
    keep: Keep = Field(default_factory=Keep)


class Signing(Section):
    """Signing of releases.

    Attributes:
        key: A P-256 private key in PEM; without one, releases are not signed. The passphrase of an encrypted one is in
            the environment variable ``QWEN_PIPELINE_KEY_PASSPHRASE``. Pointers and approvals are signed too.
        certificate: Certificate that an authority made for the key (PEM), followed by intermediate ones; verifiers then
            need the authority's alone.
        trusted: Public keys whose approvals and moves of pointers count as well.
    """

    key: ConfiguredPath | None = None
    certificate: ConfiguredPath | None = None
    trusted: tuple[ConfiguredPath, ...] = ()


_PLACES = {"directory": "path", "objects": "url", "huggingface": "repository"}
"""Kind of a target -> the setting with its location."""


class ReleaseTarget(Section):
    """A place that promoted releases are delivered to.

    Attributes:
        kind: ``directory``, ``objects`` (object storage such as S3) or ``huggingface``.
        path: For kind ``directory``: releases go to ``<path>/<product>/<digest>``, beside a link ``production``.
        hard_links: For kind ``directory``: whether files may be hard links to those of the store.
        url: For kind ``objects``: releases go below ``<url>/<product>/<digest>``, beside an object ``production.json``.
        endpoint: For kind ``objects``: address of an S3-compatible server other than Amazon's.
        repository: For kind ``huggingface``: the repository's name, in which ``{product}`` is replaced.
        private: Whether a repository that has to be created is private.
        dry_run: For kind ``huggingface``: whether the upload is only listed.
    """

    kind: Literal["directory", "objects", "huggingface"]
    path: ConfiguredPath | None = None
    hard_links: bool = False
    url: str | None = Field(default=None, pattern=r"^(s3|gs|file)://\S+$")
    endpoint: str | None = Field(default=None, pattern=r"^https?://\S+$")
    repository: str | None = Field(default=None, pattern=r"^[\w-][\w.-]*/[\w{}.-]+$")
    private: bool = True
    dry_run: bool = True

    @model_validator(mode="after")
    def _require_place(self) -> "ReleaseTarget":
        needed = _PLACES[self.kind]
        others = [name for name in _PLACES.values() if name != needed]
        if getattr(self, needed) is None or any(getattr(self, name) is not None for name in others):
            raise ValueError(f"a target of kind {self.kind!r} has {needed!r}, and not {' or '.join(map(repr, others))}")
        return self


class Release(Section):
    """Releases: approval, promotion, and the places that they are delivered to.

    Attributes:
        approval: Whether a person has to approve a release before it is promoted: ``required`` or ``none``.
        promote: ``automatic``: the pointer ``production`` follows each release that may be promoted. ``manual``: a
            person moves it.
        targets: Places that promoted releases are delivered to.
    """

    approval: Literal["none", "required"] = "none"
    promote: Literal["automatic", "manual"] = "automatic"
    targets: tuple[ReleaseTarget, ...] = ()
