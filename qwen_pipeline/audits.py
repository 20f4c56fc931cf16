"""Audits by the settings: the places that an audit searches, and the state of every release."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from qwen_pipeline.checkpoint.lazy import MANIFEST
from qwen_pipeline.checkpoint.store.destinations import PARTIAL, CheckpointStore
from qwen_pipeline.config import Settings, settings_of
from qwen_pipeline.config.inputs import trusted_keys
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.intake.bases import known_bases
from qwen_pipeline.lineage.audit import Audit, audit
from qwen_pipeline.lineage.library import Library, Sources, located, open_library, store_of
from qwen_pipeline.lineage.pointers import pointed_releases
from qwen_pipeline.lineage.statements import path_of
from qwen_pipeline.lineage.verification.findings import Finding
from qwen_pipeline.lineage.verification.model_signature import signer_hint
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.stages import publish
from qwen_pipeline.status import STAGES, fine_tune_statuses

if TYPE_CHECKING:  # pandas takes long to import, and only audit_frame needs it
    import pandas as pd

ReleaseState = Literal["verified", "stale", "orphaned", "recalled", "tampered"]
STATES: tuple[ReleaseState, ...] = get_args(ReleaseState)
"""``verified``: everything behind it is proven here, or can be made again. ``stale``: the same, but its upload and
the settings would give another release now. ``orphaned``: a stage before it is a claim alone. ``recalled``: it descends
from what was recalled. ``tampered``: something contradicts its records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseAudit:
    """The state of one release.

    Attributes:
        nbytes: Size of the outputs behind it that were read.
        faults: What contradicts its records.
        signer: The key id that its signature names; None if it is not signed.
        pointers: ``<product>/<pointer>`` of the pointers that lead to it.
    """

    fine_tune: str
    path: Path
    digest: str
    state: ReleaseState
    nbytes: int
    signer: str | None
    faults: Sequence[str]
    pointers: Sequence[str] = ()


def audit_releases(
    settings: Settings, *, witness: Callable[[Audit], Sequence[Finding]] = lambda _: (), observe: Observe = unobserved
) -> list[ReleaseAudit]:
    """Audit every release of the store, sorted by fine-tune and time; all bytes behind them are read.

    Args:
        settings: The settings.
        witness: Returns what else is known about a chain, such as by Dagster's instance.
        observe: Called with the bytes compared.
    """
    manifests = (settings.store_root / publish.STAGE).glob(f"*/*/{MANIFEST}")
    roots = sorted({located(path.parent) for path in manifests})
    library, signers = library_of([], settings, None), trusted_keys(settings) or ()
    pointers, current = pointed_releases(settings.store_root), _current(settings)
    found: list[ReleaseAudit] = []
    for root in roots:
        if root.name.endswith(PARTIAL):
            continue
        try:
            sources = sources_of(root, settings, None)
            result = audit(root, library=library, sources=sources, stated_by=signers, observe=observe)
            result = replace(result, findings=[*result.findings, *witness(result)])
            digest, faults = next(iter(result.nodes)), result.faults
            is_current = path_of(root) in current and not _is_of_another_base(result, settings)
            state, nbytes = _state(result, is_current=is_current), _nbytes(result)
        except CheckpointRefused as refused:
            digest, state, faults, nbytes = "", "tampered", [refused.what], 0
        found.append(
            ReleaseAudit(
                fine_tune=root.parent.name,
                path=root,
                digest=digest,
                state=state,
                nbytes=nbytes,
                signer=signer_hint(root),
                faults=faults,
                pointers=pointers.get(path_of(root), ()),
            )
        )
    return found


def _nbytes(result: Audit) -> int:
    return sum(node.nbytes for node in result.nodes.values())


def _current(settings: Settings) -> set[str]:
    """Return ``published/<fine-tune>/<key>`` of each release that its upload and the settings give now."""
    current: set[str] = set()
    for product in fine_tune_statuses(settings):
        published = product.stages[publish.STAGE].artifact
        if published and all(stage.state != "stale" for stage in product.stages.values()):
            current.add(path_of(published.path))
    return current


def _is_of_another_base(result: Audit, settings: Settings) -> bool:
    """Return whether a chain's base is not among those that the settings name and that are here."""
    bases = known_bases(settings).values() if settings.base_model or settings.bases else ()
    lost = any(node.name == "base" and node.state == "claimed" for node in result.nodes.values())
    return lost and any(base.root.exists() for base in bases)


def _state(result: Audit, *, is_current: bool) -> ReleaseState:
    if result.faults:
        recalled = all(fault.startswith("recalled: ") for fault in result.faults)
        return "recalled" if recalled else "tampered"
    lost = [node for node in result.nodes.values() if node.state == "claimed" and node.inputs]
    return "orphaned" if lost else "verified" if is_current else "stale"


def audit_frame(name: str | Path, settings: Settings) -> "pd.DataFrame":
    """Audit the chain behind a directory or a fine-tune's last output; return a row for each statement.

    The columns are ``kind`` (``node``: an output or input; ``finding``: a statement about signature, order or log),
    ``name``, ``verdict``, ``digest``, ``made_from`` (roles of its inputs), ``bytes``, ``path`` and ``detail``.

    Raises:
        CheckpointRefused: There is no such directory, or it has no manifest that can be read.
    """
    import pandas as pd

    root = output_of(str(name), settings)
    signers = trusted_keys(settings) or ()
    found = audit(
        root,
        library=library_of([root], settings, None),
        sources=sources_of(root, settings, None),
        keys=signers,
        stated_by=signers,
    )
    nodes = [
        ("node", node.name, node.state, node.digest, ", ".join(node.inputs), node.nbytes, node.path, node.detail)
        for node in found.nodes.values()
    ]
    findings = [("finding", each.name, each.verdict, "", "", 0, None, each.detail) for each in found.findings]
    columns = ["kind", "name", "verdict", "digest", "made_from", "bytes", "path", "detail"]
    return pd.DataFrame([*nodes, *findings], columns=columns)


def output_of(name: str, settings: Settings) -> Path:
    """Return the finished directory that a path names, or the last output of a product in the store.

    Raises:
        CheckpointRefused: There is none.
    """
    path = Path(name)
    if (path / MANIFEST).is_file() or path.is_dir():
        return path
    store = CheckpointStore(settings.store_root)
    for stage in reversed(STAGES):
        link = store.link(stage, name)
        if "/" not in name and (link / MANIFEST).is_file():
            return located(link)
    raise CheckpointRefused(
        f"{name} is neither a finished directory nor a fine-tune with an output below {settings.store_root}.",
        remedy=f"Pass a directory that has a {MANIFEST}, or a name that qwen-pipeline status shows.",
    )


def library_of(roots: Sequence[Path], settings: Settings, more: Sequence[Path] | None) -> Library:
    """Find the finished directories of the stores that some directories lie in, beside them, and in further places.

    Raises:
        InputRefused: One of the further places is not there.
    """
    _require_there(more or ())
    stores = [store_of(root) or located(root).parent for root in roots]
    return open_library([settings.store_root, *stores, *(more or ())])


def sources_of(root: Path, settings: Settings, more: Sequence[Path] | None, *, remembered: bool = False) -> Sources:
    """Return the inputs that the options and the settings name; nothing is downloaded.

    Args:
        root: A finished directory.
        settings: The settings.
        more: Further inputs.
        remembered: Whether a digest may be taken from the cache.

    Raises:
        InputRefused: One of the further inputs is not there.
    """
    _require_there(more or ())
    paths = [*(more or ()), *(path for path in _configured(root, settings) if path.exists())]
    return Sources(paths, remembered=remembered)


def _require_there(paths: Sequence[Path]) -> None:
    if missing := [path for path in paths if not path.exists()]:
        raise InputRefused(
            f"{missing[0]} is not there, so nothing can be compared with it.",
            remedy="Pass a directory or a file of this machine; an audit downloads nothing.",
        )


def _configured(root: Path, settings: Settings) -> Iterator[Path]:
    if settings.base_model or settings.bases:
        yield from (base.root for base in known_bases(settings).values())
    yield settings.inbox / located(root).parent.name
    yield settings.imports / located(root).parent.name
    for each in (settings, *(settings_of(settings, recipe) for recipe in settings.recipes)):
        if each.calibration.source:
            yield Path(each.calibration.source)
        if each.validation.text:
            yield each.validation.text
