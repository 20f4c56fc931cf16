"""A store is what a plain model of it says, after any order of runs, kills, concurrent runs, damage and deletions."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from qwen_pipeline.checkpoint.lazy import MANIFEST
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, CheckpointStore
from qwen_pipeline.checkpoint.store.log import LOG, START, read_log
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.errors import CheckpointRefused, DestinationLocked
from qwen_pipeline_tests.checkpoint.copies import note, write_note

pytestmark = pytest.mark.lengthy

FINE_TUNES, TEXTS = st.sampled_from(("alice", "bob")), st.sampled_from(("one", "two", "three"))
CALLS = ("fsync", "rename", "replace", "symlink", "unlink", "mkdir", "rmdir")
SEAL = "seal.txt"
FEW, MANY = 3, int(os.environ.get("FUZZ_EXAMPLES", "20"))


class StoreMachine(RuleBasedStateMachine):
    """The store beside a dictionary: fine-tune -> texts whose output is finished, and the one requested last."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="store"))
        self.store = CheckpointStore(self.root)
        self.finished: dict[str, set[str]] = {"alice": set(), "bob": set()}
        self.latest: dict[str, str] = {}
        self.builds = 0

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def derive(self, fine_tune: str, text: str) -> Artifact:
        def build(partial: Path) -> Built:
            self.builds += 1
            return write_note(partial)

        seal: Callable[[Path], object] = lambda root: (root.parent / f"{root.name}.{SEAL}").write_text("sealed")  # noqa: E731
        return derive(note(text), self.store.slot(fine_tune), build, attest=seal)

    @rule(fine_tune=FINE_TUNES, text=TEXTS)
    def run(self, fine_tune: str, text: str) -> None:
        before = self.builds
        made = self.derive(fine_tune, text)
        assert made.reused == (text in self.finished[fine_tune])
        assert self.builds == before + (not made.reused) or self.builds == before  # a kill may have left all but a name
        assert (made.path.parent / f"{made.path.name}.{SEAL}").exists()
        self.finished[fine_tune].add(text)
        self.latest[fine_tune] = text

    @rule(fine_tune=FINE_TUNES, text=TEXTS, call=st.integers(1, 25))
    def run_killed(self, fine_tune: str, text: str, call: int) -> None:
        """A process that is killed at its n-th change may have finished or not, but nothing in between."""
        if (child := os.fork()) == 0:
            die_at(call)
            self.derive(fine_tune, text)
            os._exit(0)
        os.waitpid(child, 0)
        if text in self.stored(fine_tune):
            self.finished[fine_tune].add(text)
        if (found := self.store.latest("note", fine_tune)) and found.manifest.derivation.spec["text"] == text:
            self.latest[fine_tune] = text

    @rule(fine_tune=FINE_TUNES, texts=st.lists(TEXTS, min_size=2, max_size=3))
    def run_together(self, fine_tune: str, texts: list[str]) -> None:
        """Runs at the same time succeed, or are told that another one is writing the same output."""

        def attempt(text: str) -> str | None:
            try:
                return str(self.derive(fine_tune, text).manifest.derivation.spec["text"])
            except DestinationLocked:
                return None

        with ThreadPoolExecutor(len(texts)) as pool:
            done = [text for text in pool.map(attempt, texts) if text]
        assert set(done) == set(texts)
        self.finished[fine_tune] |= set(done)
        found = self.store.require_latest("note", fine_tune)
        assert found.manifest.derivation.spec["text"] in done
        self.latest[fine_tune] = str(found.manifest.derivation.spec["text"])

    @rule(fine_tune=FINE_TUNES)
    def damage_and_delete(self, fine_tune: str) -> None:
        """Damage is found by reading, and a deleted directory is made again."""
        if (text := self.latest.get(fine_tune)) is None:
            return
        root = self.store.require_latest("note", fine_tune).path
        file = root / "note.txt"
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
        with pytest.raises(CheckpointRefused, match=r"note\.txt"):
            require_intact(root)
        shutil.rmtree(root)
        self.finished[fine_tune].discard(text)
        del self.latest[fine_tune]

    @invariant()
    def the_store_is_what_the_model_says(self) -> None:
        for fine_tune, texts in self.finished.items():
            assert set(self.stored(fine_tune)) == texts
            found = self.store.latest("note", fine_tune)
            assert (found.manifest.derivation.spec["text"] if found else None) == self.latest.get(fine_tune)

    @invariant()
    def what_has_its_name_is_complete(self) -> None:
        for root in self.root.glob("note/*/*"):
            if root.is_dir() and not root.is_symlink() and root.suffix != ".partial":
                assert (root / MANIFEST).is_file()
                require_intact(root)

    @invariant()
    def the_log_is_a_chain(self) -> None:
        previous = START
        lines = (self.root / LOG).read_bytes().splitlines() if (self.root / LOG).is_file() else []
        for number, (entry, line) in enumerate(zip(read_log(self.root), lines, strict=True), 1):
            assert (entry.number, entry.previous) == (number, previous)
            previous = hashlib.sha256(line).hexdigest()

    def stored(self, fine_tune: str) -> list[str]:
        return [str(each.manifest.derivation.spec["text"]) for each in self.store.finished("note", fine_tune)]


def die_at(number: int) -> None:
    """End this process before its n-th call that changes the disk."""
    left = iter(range(1, number))

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                os._exit(9)
            return call(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_the_store_is_what_a_model_of_it_says(examples: int) -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=8 if examples == FEW else 20,
            deadline=None,
            derandomize=examples == FEW,
            suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
        ),
    )
