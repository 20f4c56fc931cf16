"""Retention: rules, what is kept in any case, kills, and a disk that does not fill."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.audits import library_of, sources_of
from qwen_pipeline.checkpoint.files import open_locked
from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store import log
from qwen_pipeline.checkpoint.store.destinations import Artifact, CheckpointStore
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.config import FILE_VARIABLE, Settings
from qwen_pipeline.config.loading import settings_from_values
from qwen_pipeline.lineage.audit import audit
from qwen_pipeline.models.base_names import KnownBase
from qwen_pipeline.models.inbox import Inbox
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.retention.collect import Collection, collect
from qwen_pipeline.retention.remove import drop
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.merge_pad import merge_pad
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.status import status_of
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.test_kills import die_at
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen2

GEOMETRY = PaddingSpec(group_size=32, tensor_parallel=2)


def unused(_: str) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Workspace:
    """A workspace in which fine-tunes of one base are merged and padded."""

    root: Path
    base: Path

    def settings(self, **keep: Any) -> Settings:
        return settings_from_values(
            {
                "workspace": self.root,
                "base_model": str(self.base),
                "padding": {"tensor_parallel": 2},
                "quantization": {"group_size": 32},
                "store": {"keep": keep},
            }
        )

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.root / "store")

    def upload(self, name: str, *, seed: int = 1) -> Path:
        """Upload an adapter, which is made once for each seed."""
        made = self.base.parent / f"adapter-{seed}"
        if not made.exists():
            tiny_adapter(self.base, made, seed=seed)
        return Path(shutil.copytree(made, self.root / "inbox" / name))

    def run(self, name: str) -> tuple[Artifact, Artifact]:
        slot = self.store.slot(name)
        merged = merge(base=self.base, fine_tune=self.root / "inbox" / name, destination=slot)
        return merged, pad(source=merged.path, destination=slot, spec=GEOMETRY)

    def collect(self, *, dry_run: bool = False, **keep: Any) -> Collection:
        return collect(self.settings(**keep), uses=unused, dry_run=dry_run)

    def states(self, name: str, **keep: Any) -> dict[str, str]:
        found = status_of(self.settings(**keep), name, Inbox(self.root / "inbox").require(name))
        return {stage: each.state for stage, each in found.stages.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def workspace(tmp_path: Path, base: Path) -> Workspace:
    return Workspace(tmp_path / "workspace", base)


def names(decisions: Any) -> set[tuple[str, str]]:
    return {(each.stage, each.path.name) for each in decisions}


def test_by_default_everything_is_kept(workspace: Workspace) -> None:
    workspace.upload("poet")
    workspace.run("poet")
    found = workspace.collect()
    assert (found.dropped, found.kept, found.nbytes) == ([], [], 0)


def test_what_was_dropped_is_known_and_made_again_with_the_same_digest(workspace: Workspace) -> None:
    workspace.upload("poet")
    merged, padded = workspace.run("poet")
    rules: dict[str, Any] = {"merged": "0", "padded": 0}
    planned = workspace.collect(dry_run=True, **rules)
    assert names(planned.dropped) == {("merged", merged.path.name), ("padded", padded.path.name)}
    assert planned.nbytes > 2 * 100_000
    assert merged.path.is_dir()
    found = workspace.collect(**rules)
    assert names(found.dropped) == names(planned.dropped)
    assert found.nbytes == planned.nbytes
    assert not merged.path.exists()
    kept = workspace.store.root / "dropped" / "merged" / "poet" / merged.path.name / "manifest.json"
    assert open_manifest(kept.parent).content_digest == merged.manifest.content_digest
    lines = list(log.read_log(workspace.store.root))
    assert {(each.event, each.path.split("/")[0], each.detail) for each in lines[-2:]} == {
        ("dropped", "merged", "merged = 0"),
        ("dropped", "padded", "padded = 0"),
    }
    assert not padded.path.with_name(padded.path.name + ".lock").exists()
    states = workspace.states("poet")
    assert (states["merged"], states["padded"], states["quantized"]) == ("dropped", "dropped", "missing")

    again = workspace.run("poet")
    assert [each.manifest.content_digest for each in again] == [
        each.manifest.content_digest for each in (merged, padded)
    ]
    assert not any(each.reused for each in again)
    assert workspace.states("poet")["padded"] == "done"
    assert names(workspace.collect(**rules).dropped) == names(planned.dropped)
    assert workspace.collect(**rules).dropped == []


def test_an_audit_tells_what_retention_dropped_from_what_is_lost(workspace: Workspace) -> None:
    workspace.upload("poet")
    merged, padded = workspace.run("poet")
    settings = workspace.settings(merged=0)
    collect(settings, uses=unused)

    def audited() -> Any:
        return audit(
            padded.path,
            library=library_of([padded.path], settings, None),
            sources=sources_of(padded.path, settings, None),
        )

    found = audited()
    node = found.nodes[merged.manifest.content_digest]
    assert (node.name, node.state) == ("merged", "dropped")
    assert node.detail.startswith("Retention dropped its bytes; its inputs are here")
    assert found.faults == []
    tombstone = workspace.store.root / "dropped" / "merged" / "poet" / merged.path.name / "manifest.json"
    tombstone.write_text(tombstone.read_text().replace('"seconds": ', '"seconds": 1'))
    assert [fault for fault in audited().faults if "manifest.json was changed" in fault]


def test_the_newest_are_kept_and_what_nothing_can_make_again(workspace: Workspace) -> None:
    workspace.upload("poet", seed=1)
    first, _ = workspace.run("poet")
    shutil.rmtree(workspace.root / "inbox" / "poet")
    workspace.upload("poet", seed=2)
    second, _ = workspace.run("poet")
    assert names(workspace.collect(merged=1).dropped) == set()
    (kept,) = (each for each in workspace.collect(merged=1).kept if each.path == first.path)
    assert kept.kept.startswith("nothing can make it again: fine_tune")
    (newest,) = (each for each in workspace.collect(merged=1).kept if each.path == second.path)
    assert newest.kept == "one of the 1 newest"
    assert names(workspace.collect(merged=0).dropped) == {("merged", second.path.name)}
    assert names(workspace.collect(merged=0, irreplaceable=False).dropped) == {("merged", first.path.name)}


def test_what_a_merged_recipe_is_made_from_counts(workspace: Workspace) -> None:
    """A merged checkpoint without weights is no source: the padded one is the last that has the fine-tune."""
    upload = workspace.upload("poet")
    base, slot = KnownBase(root=workspace.base, names=()), workspace.store.slot("poet")
    merged, padded = merge_pad(base=base, fine_tune=upload, merged=slot, padded=slot, spec=GEOMETRY)
    (recipe,) = workspace.collect(merged=0).kept
    assert (recipe.path, recipe.kept) == (merged.path, "a recipe, without weights")
    shutil.rmtree(upload)
    (kept,) = workspace.collect(padded=0).kept
    assert kept.kept.startswith("nothing can make it again: fine_tune")
    assert kept.path == padded.path


def test_padding_that_changed_nothing_has_the_digest_of_its_source(workspace: Workspace) -> None:
    """One of the two directories with these bytes may go, and both if the upload is here; the last one may not."""
    upload = workspace.upload("poet")
    slot = workspace.store.slot("poet")
    merged = merge(base=workspace.base, fine_tune=upload, destination=slot)
    padded = pad(source=merged.path, destination=slot, spec=PaddingSpec(group_size=32, tensor_parallel=1))
    assert padded.manifest.content_digest == merged.manifest.content_digest
    settings = workspace.settings(merged=0)
    found = audit(
        padded.path,
        library=library_of([padded.path], settings, None),
        sources=sources_of(padded.path, settings, None),
    )
    assert (found.faults, {node.name for node in found.nodes.values()}) == ([], {"padded", "base", "fine_tune"})
    assert {each.stage for each in workspace.collect(merged=0, padded=0, dry_run=True).dropped} == {"merged", "padded"}
    workspace.collect(merged=0)
    shutil.rmtree(upload)
    (kept,) = workspace.collect(padded=0).kept
    assert kept.kept.startswith("nothing can make it again: fine_tune")


def test_each_recipe_has_its_own_newest(workspace: Workspace) -> None:
    workspace.upload("poet")
    merged, padded = workspace.run("poet")
    narrow = PaddingSpec(group_size=16, tensor_parallel=2)
    other = pad(source=merged.path, destination=workspace.store.slot("poet@narrow"), spec=narrow)
    assert {each.path: each.kept for each in workspace.collect(padded=1).kept} == dict.fromkeys(
        (padded.path, other.path), "one of the 1 newest"
    )
    assert {each.path for each in workspace.collect(padded=0).dropped} == {padded.path, other.path}


def test_the_command_lists_and_removes(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.upload("poet")
    merged, padded = workspace.run("poet")
    file = tmp_path / "settings.toml"
    file.write_text(
        f'workspace = "workspace"\nbase_model = "{workspace.base}"\n'
        '[store.keep]\nmerged = "0"\npadded = "until validated"\n'
    )
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    listed = qwen_pipeline("gc", "--dry-run")
    assert "1 output would be removed" in listed.out, listed.err
    assert "no validation of it has passed" in " ".join(listed.out.split())
    assert merged.path.is_dir()
    removed = qwen_pipeline("gc", "--json")
    assert [each["path"] for each in removed.data["dropped"]] == [str(merged.path)], removed.err
    assert padded.path.is_dir()
    assert "Nothing to remove" in qwen_pipeline("gc").out
    with open_locked(workspace.store.root / "dropped" / ".lock"):
        assert qwen_pipeline("gc").code == 3
    log_file = workspace.store.root / log.LOG
    log_file.write_text(log_file.read_text().replace("padded", "pbdded", 1))
    assert qwen_pipeline("gc").code == 2


def test_what_a_run_or_a_writer_uses_stays(workspace: Workspace) -> None:
    workspace.upload("poet")
    merged, padded = workspace.run("poet")
    settings = workspace.settings(merged=0)
    found = collect(settings, uses=lambda name: f"the run 1 uses {name}")
    assert [each.kept for each in found.kept] == ["the run 1 uses poet"]
    building = padded.path.with_name("0123456789abcdef.partial")
    building.mkdir()
    with open_locked(building.with_suffix(".lock")):  # a stage that may read any output of the fine-tune
        (kept,) = collect(settings, uses=unused).kept
        assert kept.kept == f"another process is writing {building}"
    with open_locked(merged.path.with_name(merged.path.name + ".lock")):
        assert [each.kept for each in collect(settings, uses=unused).kept] == ["another process is writing it"]

    (decision,) = collect(settings, uses=unused, dry_run=True).dropped
    assert drop(workspace.store.root, decision, lambda _: "a run that began meanwhile") == "a run that began meanwhile"
    require_intact(merged.path)


def test_what_interrupted_runs_left_behind_goes_after_some_days(workspace: Workspace) -> None:
    workspace.upload("poet")
    merged, _ = workspace.run("poet")
    folder = merged.path.parent
    old, young, held = (folder / f"{digit * 16}.partial" for digit in "abc")
    lone = folder / f"{'d' * 16}.lock"
    for path in (old, young, held):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"0" * 4096)
    lone.touch()
    long_ago = time.time() - 8 * 86400
    for path in (old / "model.safetensors", old, held / "model.safetensors", held, lone):
        os.utime(path, (long_ago, long_ago))
    with open_locked(held.with_suffix(".lock")):
        planned = workspace.collect(dry_run=True)
        assert set(planned.abandoned) == {old, held}
        found = workspace.collect()
    assert (set(found.abandoned), found.locks) == ({old}, 1)
    assert {path.name for path in folder.iterdir() if path.suffix == ".partial"} == {young.name, held.name}
    require_intact(merged.path)


@pytest.mark.slow
def test_a_killed_collection_goes_on(workspace: Workspace) -> None:
    """At every moment there is either the whole directory, or its manifest; in the end the log says so once."""
    moment = random.Random(11)
    workspace.upload("poet")
    made = workspace.run("poet")
    deaths = 0
    for _ in range(8):
        workspace.run("poet")
        call = moment.randrange(1, 13)
        if (child := os.fork()) == 0:
            try:
                dying(call)
                workspace.collect(merged=0, padded=0)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        deaths += code != 0
        for each in made:
            kept = workspace.store.root / "dropped" / each.path.relative_to(workspace.store.root)
            if each.path.exists():
                assert require_intact(each.path).content_digest == each.manifest.content_digest
            else:
                assert open_manifest(kept).content_digest == each.manifest.content_digest
        if moment.random() < 0.5:
            workspace.collect(merged=0, padded=0)
            assert not list(workspace.store.root.glob("*/poet/*.partial"))
            assert not any(each.path.exists() for each in made)
    workspace.collect(merged=0, padded=0)
    stated = [each for each in log.read_log(workspace.store.root) if each.event == "dropped"]
    assert len({each.manifest_sha256 for each in stated}) == len(stated)
    assert deaths > 2


def dying(number: int) -> None:
    """Have this process kill itself before its n-th removal, rename or sync."""
    die_at(number)
    left, unlink = iter(range(number)), os.unlink

    def wrapper(*args: Any, **kwargs: Any) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(*args, **kwargs)

    os.unlink = wrapper


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of a fixed size, if this account may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this account may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_small_disk_takes_twenty_fine_tunes_by_retention_alone(small_disk: Path, base: Path) -> None:
    workspace = Workspace(small_disk, base)
    sizes: list[int] = []
    for number in range(20):
        workspace.upload(f"bot-{number}", seed=1 + number % 2)
        workspace.run(f"bot-{number}")
        sizes.append(workspace.collect(merged=0, padded=0).nbytes)
    disk = shutil.disk_usage(small_disk)
    assert sum(sizes) > 2 * disk.total
    assert disk.used < disk.total / 2  # uploads and manifests alone
