"""An audit: the chain behind a directory, back to base, fine-tune and texts, with every byte that is here compared.

Parents are found by content digest, never by name. A parent without bytes is a claim; if the step that made it is
recorded and its own inputs are here, it was dropped, and can be rebuilt. The version that a validation compared with is
not a parent: it is named, and compared with its manifest, but its own inputs are not part of the chain.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qwen_pipeline.checkpoint.store.canonical import MANIFEST_FILE
from qwen_pipeline.errors import CheckpointRefused, listed
from qwen_pipeline.lineage.library import Library, Sources, located, misplaced, recorded_steps, store_of
from qwen_pipeline.lineage.log_proof import open_log, prove_anchor, prove_log, prove_removals
from qwen_pipeline.lineage.padding_proof import prove_padding_map
from qwen_pipeline.lineage.pointer_proof import prove_pointers
from qwen_pipeline.lineage.provenance import signed_log_head
from qwen_pipeline.lineage.verification.envelopes import PublicKey
from qwen_pipeline.lineage.verification.findings import Finding, Verdict, in_one_line, refuted
from qwen_pipeline.lineage.verification.intact import RELEASE, compare
from qwen_pipeline.lineage.verification.model_signature import confirmed_keys
from qwen_pipeline.lineage.verification.order import by_digest, find_step, prove_order, short
from qwen_pipeline.lineage.verification.policy import Policy
from qwen_pipeline.lineage.verification.records import Record, RecordedStep, read_record
from qwen_pipeline.lineage.verification.trust import Signer
from qwen_pipeline.lineage.verification.verify import Verification, judge
from qwen_pipeline.progress import Observe, Progress, unobserved

State = Literal["proven", "attested", "claimed", "dropped", "refuted"]
"""``proven``: its bytes are here and give the digest. ``dropped``: its bytes are gone, what they were made of is here.
``attested``: recorded only, in files that a trusted key signed. ``claimed``: recorded only. ``refuted``: what is here
does not give the digest."""
_NOT_FOUND = "No directory or file that was searched has this digest. Name it with --source."
_COMPARED = "Compared with, not made from"
_OF_TOKENS = (
    "No file that was searched has this digest. Name it with --source; where a stage drew the tokens itself, it is the"
    " digest of the tokens, which running the stage again gives."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One output or input of the chain.

    Attributes:
        digest: Its content digest, as the stage that used it recorded it.
        name: The stage that made it, or its role as an input.
        inputs: Role -> content digest; empty for what no stage made, or whose inputs nothing records.
        path: Where its bytes are, if they are here.
        detail: What was compared, or why it is no more than a claim.
        is_compared: Whether it is an earlier version that the validation compared with, and no part of the chain.
    """

    digest: str
    name: str
    state: State
    detail: str
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    path: Path | None = None
    nbytes: int = 0
    is_compared: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "name": self.name,
            "state": self.state,
            "detail": self.detail,
            "inputs": dict(self.inputs),
            "path": str(self.path) if self.path else None,
            "bytes": self.nbytes,
            "is_compared": self.is_compared,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The result of an audit.

    Attributes:
        root: The directory.
        nodes: Content digest -> node; the first is the directory itself.
        findings: Statements about signature, order, policy and padding map.
    """

    root: Path
    nodes: Mapping[str, Node]
    findings: Sequence[Finding]

    @property
    def faults(self) -> list[str]:
        """A sentence for each thing that contradicts the records."""
        damaged = [f"{node.name} {short(node.digest)}: {node.detail}" for node in self.nodes.values()]
        states = [node.state for node in self.nodes.values()]
        return [
            *(in_one_line(fault) for fault, state in zip(damaged, states, strict=True) if state == "refuted"),
            *(in_one_line(f"{finding.name}: {finding.detail}") for finding in refuted(self.findings)),
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "directory": str(self.root),
            "sound": not self.faults,
            "nodes": [node.to_json() for node in self.nodes.values()],
            "findings": [finding.to_json() for finding in self.findings],
        }


def audit(
    root: Path,
    *,
    library: Library,
    sources: Sources,
    keys: Sequence[Signer] = (),
    policy: Policy | None = None,
    stated_by: Sequence[PublicKey] = (),
    observe: Observe = unobserved,
) -> Audit:
    """Walk the chain behind a finished directory, and compare every byte of it that is here.

    Args:
        root: The directory.
        library: Finished directories in which its ancestors may be.
        sources: Inputs that no stage made.
        keys: Signers of which one must have signed a release, besides those of the policy.
        policy: Demands on a release.
        stated_by: Further keys of which one must have signed the pointers and approvals in force.
        observe: Called with the bytes compared.

    Raises:
        CheckpointRefused: The directory has no manifest that can be read.
    """
    signers = [*confirmed_keys(root, [*keys, *(policy.signers if policy else ())]), *stated_by]
    walk = _Walk(library=library, sources=sources, near=located(root), observe=observe, signers=signers)
    record = read_record(located(root))
    walk.visit(record)
    walk.visit_compared()
    verification = None
    if record.step.stage == RELEASE:
        verification = judge(record, walk.wrong[record.root], keys=keys, policy=policy)
        if verification.signer and not verification.faults:
            walk.attest(record, verification.signer)
    nodes = {digest: walk.nodes[digest] for digest in walk.order if digest in walk.nodes}
    findings = walk.order_findings(record)
    if verification:
        findings = [*_of_release(verification, findings), *findings]
    return Audit(
        root=root, nodes=nodes, findings=[*findings, *walk.padding_findings(), *walk.log_findings(), *walk.unreadable()]
    )


@dataclass
class _Walk:
    library: Library
    sources: Sources
    near: Path
    observe: Observe
    signers: Sequence[PublicKey]
    nodes: dict[str, Node] = field(default_factory=dict[str, Node])
    order: list[str] = field(default_factory=list[str])
    steps: dict[tuple[str, str], RecordedStep] = field(default_factory=dict[tuple[str, str], RecordedStep])
    records: dict[str, Record] = field(default_factory=dict[str, Record])
    wrong: dict[Path, dict[str, str]] = field(default_factory=dict[Path, "dict[str, str]"])
    compared: dict[str, str] = field(default_factory=dict[str, str])

    def visit(self, record: Record) -> None:
        """Compare a directory, and then everything that it was made from."""
        step = record.step
        self.order.append(step.content_digest)
        self.steps |= by_digest(recorded_steps(record.root)) | self.steps | by_digest([*self._twins(step), step])
        self.records[step.content_digest] = record
        self.sources.add(*map(Path, record.recipe.values()))
        wrong = self.wrong[record.root] = compare(record, observe=self._progress(record))
        fault = misplaced(record) or listed([f"{path} {why}" for path, why in sorted(wrong.items())])
        stored = "" if record.stored else " Its weights are a recipe, computed when they are read."
        self.nodes[step.content_digest] = Node(
            digest=step.content_digest,
            name=step.stage,
            state="refuted" if fault else "proven",
            detail=f"{fault}." if fault else f"{len(record.files)} files have the stated digests.{stored}",
            inputs=(inputs := self._inputs(step)),
            path=record.root,
            nbytes=record.nbytes,
        )
        self._follow_inputs(step, inputs)

    def visit_compared(self) -> None:
        """Add the nodes of what validations compared with, unless it is part of the chain; nothing behind them."""
        for digest, role in self.compared.items():
            if digest not in self.order:
                self.order.append(digest)
                self.nodes[digest] = self._compared(digest, role)

    def _compared(self, digest: str, role: str) -> Node:
        """Return the node of an earlier version; if its bytes changed, the comparison is no more than a claim."""
        path, nbytes, wrong, step = self.library.find(digest, near=self.near), 0, "its bytes are not here.", None
        if path:
            try:
                record = read_record(path)
                step, nbytes = record.step, record.nbytes
                changed = compare(record, observe=self._progress(record))
                wrong = listed([f"its bytes changed since: {name} {why}." for name, why in sorted(changed.items())])
            except CheckpointRefused as refused:
                wrong = refused.what
        elif step := self._dropped_step(digest):
            wrong = "retention dropped its bytes." if self._was_dropped(digest) else wrong
        return Node(
            digest=digest,
            name=step.stage if step else role,
            state="claimed" if wrong else "proven",
            detail=f"{_COMPARED}: {wrong or 'its files have the stated digests.'}",
            path=path,
            nbytes=nbytes,
            is_compared=True,
        )

    def _follow_inputs(self, step: RecordedStep, inputs: Mapping[str, str]) -> None:
        self.compared |= {digest: role for role, digest in step.compared_with.items()}
        for role, digest in inputs.items():
            if role not in step.compared_with:
                self.follow(role, digest)

    def _inputs(self, step: RecordedStep) -> Mapping[str, str]:
        """Return the inputs of a step; of one that changed nothing, those of the output that it has the digest of."""
        if step.content_digest not in step.inputs.values():
            return step.inputs
        made = find_step(self.steps, step.content_digest)
        others = {role: digest for role, digest in step.inputs.items() if digest != step.content_digest}
        return {**others, **(made.inputs if made and made.stage != step.stage else {})}

    def _twins(self, step: RecordedStep) -> Iterator[RecordedStep]:
        """Yield the steps of other stages with the same output: where padding has nothing to add, merged is padded."""
        for place in self.library.places.get(step.content_digest, ()):
            with suppress(CheckpointRefused):
                if (twin := read_record(place).step).stage != step.stage:
                    yield twin

    def follow(self, role: str, digest: str) -> None:
        """Add the node of an input, and what is behind it."""
        if digest in self.order or not digest.startswith("sha256:"):
            return
        place = self.library.find(digest, near=self.near, chain=self._chain())
        source = None if place else self.sources.find(role, digest)
        if place := place or (source if source and (source / MANIFEST_FILE).is_file() else None):
            try:
                self.visit(read_record(place))
            except CheckpointRefused as refused:
                self.order.append(digest)
                self.nodes[digest] = Node(digest=digest, name=role, state="refuted", detail=refused.what, path=place)
            return
        self.order.append(digest)
        step = find_step(self.steps, digest) or self._dropped_step(digest)
        if step:
            self._follow_inputs(step, step.inputs)
        self.nodes[digest] = self._elsewhere(role, digest, source, step)

    def _chain(self) -> set[str]:
        """Return the derivation keys and the content digests that are known to be of this chain."""
        steps = self.steps.values()
        return {each for step in steps for each in (step.key, step.content_digest, *step.made_from.values())}

    def _dropped_step(self, digest: str) -> RecordedStep | None:
        """Return the step of an output whose manifest alone retention kept."""
        for root in self.library.dropped.get(digest, ()):
            with suppress(CheckpointRefused):  # if the log knows the manifest, the log's finding names it
                self.steps |= by_digest([read_record(root).step])
        return find_step(self.steps, digest)

    def attest(self, release: Record, signer: str) -> None:
        """Give claims the weight of a signature over the files of the release that record them."""
        steps = recorded_steps(release.root)
        signed = {digest for step in steps for digest in (step.content_digest, *step.inputs.values())}
        for digest, node in self.nodes.items():
            if node.state == "claimed" and digest in signed:
                detail = f"{node.detail} Files of the release that {signer} signed record it."
                self.nodes[digest] = replace(node, state="attested", detail=detail)

    def _was_dropped(self, digest: str) -> bool:
        """Return whether the log of a store says that retention dropped an output of which it keeps the manifest."""
        kept = self.library.dropped.get(digest, ())
        return any(open_log(root.parents[3]).has_dropped(root) for root in kept)

    def order_findings(self, record: Record) -> list[Finding]:
        """Return the order proof; a link is proven if the bytes at its ends are here."""

        def strength(step: RecordedStep) -> Verdict:
            node = self.nodes.get(step.content_digest)
            return node.state if node and node.state in ("proven", "attested") else "claimed"

        return prove_order(record.step, self.steps, strength)

    def padding_findings(self) -> Iterator[Finding]:
        for digest, record in self.records.items():
            if record.step.stage == "padded" and record.stored and self.nodes[digest].state == "proven":
                yield prove_padding_map(record, observe=self.observe)

    def log_findings(self) -> Iterator[Finding]:
        """Yield the findings about the log of each store that outputs of the chain lie in."""
        stores: dict[Path, list[Path]] = {}
        for record in self.records.values():
            if store := store_of(record.root):
                stores.setdefault(store, []).append(record.root)
        for store, roots in stores.items():
            log = open_log(store)
            yield from prove_log(log, sorted({*roots, *self._beside(store)}))
            yield from prove_removals(log, self.near.parent.name)
            for anchor in filter(None, map(signed_log_head, roots)):
                yield prove_anchor(log, *anchor)
            yield from prove_pointers(log, self.near.parent.name, self.signers)
            yield from (
                Finding(name="recalled", verdict="refuted", detail=f"{self.nodes[digest].name} {digest}: {reason}")
                for digest, reason in log.recalled.items()
                if digest in self.nodes and not self.nodes[digest].is_compared
            )

    def unreadable(self) -> Iterator[Finding]:
        """Yield the directories of the same fine-tune whose manifests cannot be read: they may be of this chain."""
        for path, why in self.library.unreadable.items():
            if path.parent.name == self.near.parent.name:
                yield Finding(name="manifest_is_readable", verdict="refuted", detail=why)

    def _beside(self, store: Path) -> Iterator[Path]:
        """Yield the directories of the same fine-tune in a store, of which one may be the changed form of a parent."""
        kept = (path for paths in self.library.dropped.values() for path in paths)
        for path in (*self.library.directories(), *kept):
            if path.parent.name == self.near.parent.name and path.is_relative_to(store):
                yield path

    def _elsewhere(self, role: str, digest: str, source: Path | None, step: RecordedStep | None) -> Node:
        """Return the node of an input that no finished directory holds; ``step`` made it, if one is recorded."""
        inputs = step.inputs if step else {}
        parents = {parent: self.nodes[of] for parent, of in inputs.items() if of in self.nodes}
        lost = [f"{parent} {short(inputs[parent])}" for parent, node in parents.items() if node.state == "claimed"]
        lost += [f"{other} {short(of)}" for other, of in self._absent_comparisons(step)]
        state: State = "proven" if source else "dropped" if parents and not lost else "claimed"
        if source:
            detail = "Its bytes, read just now, give the digest."
        elif state == "dropped":
            how = "Retention dropped its bytes" if self._was_dropped(digest) else "Its bytes were dropped"
            detail = f"{how}; its inputs are here, and running its stage again gives the same digest."
        elif step:
            missing = listed(lost) or "its inputs"
            detail = f"Recorded by a later stage; neither its bytes nor those of {missing} are here."
        else:
            detail = _OF_TOKENS if role in ("text", "calibration") else _NOT_FOUND
        name = step.stage if step else role
        return Node(digest=digest, name=name, state=state, detail=detail, inputs=inputs, path=source)

    def _absent_comparisons(self, step: RecordedStep | None) -> Iterator[tuple[str, str]]:
        """Yield role and digest of what a step compared with and would need again, if no directory here has it."""
        for role, digest in (step.compared_with if step else {}).items():
            if not self.library.find(digest, near=self.near):
                yield role, digest

    def _progress(self, record: Record) -> Any:
        done, total = 0, record.nbytes

        def add(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            self.observe(Progress(task=f"audit {record.step.stage}", done=done, total=total, unit="bytes"))

        return add


def _of_release(verification: Verification, order: Sequence[Finding]) -> list[Finding]:
    """Return the findings about a release without those about its order, which the chain itself shows better."""
    names = {finding.name for finding in order}
    return [finding for finding in verification.findings if finding.name not in names]
