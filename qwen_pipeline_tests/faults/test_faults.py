"""Whatever fails, and wherever: nothing partial is visible, the error says what to do, and the next run completes.

``FAULTS=1000 make test-slow`` injects as many faults; 30 are injected without the variable.
"""

import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qwen_pipeline_tests.faults.conftest import Undisturbed
from qwen_pipeline_tests.faults.plans import KINDS, Kind, drawn
from qwen_pipeline_tests.faults.steps import (
    Inputs,
    digests,
    require_clean,
    require_nothing_partial,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the shim needs a C compiler"),
]
FAULTS = int(os.environ.get("FAULTS", "15"))
SEED = int(os.environ.get("FAULTS_SEED", "21"))
ENDED_BY_SIGNAL = {"killed": -9, "killed in the middle of a write": -9}


def test_the_chain_uses_no_network(undisturbed: Undisturbed) -> None:
    assert list(undisturbed.expected) == ["calibration", "merged", "padded", "published", "quantized"]
    assert not undisturbed.connections


def copied(inputs: Inputs, root: Path) -> Inputs:
    """Copy what a fault may change."""
    for path in (inputs.base, inputs.adapter):
        shutil.copytree(path, root / path.name)
    shutil.copy(inputs.text, root)
    names = {"base": inputs.base, "adapter": inputs.adapter, "text": inputs.text}
    return replace(inputs, **{name: root / path.name for name, path in names.items()})


def require_explained(name: str, kind: Kind, found: dict[str, Any]) -> str:
    """Assert that the run ended well, by the signal, or with an error that helps; return which."""
    assert "hung" not in found, (name, found)
    if name in ENDED_BY_SIGNAL:
        assert found["code"] in (0, ENDED_BY_SIGNAL[name]), (name, found)
        return "killed" if found["code"] else "done"
    assert found["code"] == 0, (name, found)
    if "kind" not in found:
        return "done"
    assert not kind.harmless, (name, found)
    if found["kind"] == "KeyboardInterrupt":
        assert name == "interrupted"
        return "interrupted"
    assert found["exit_code"] in (1, 2, 3), (name, found.get("traceback"), found)
    assert re.search(r"/\S|manifest|\w+\.\w+", found["what"]), (name, found)  # names what it is about
    assert len(found["what"]) > 20, (name, found)
    assert re.match(r"[A-Z]\w+ ", found["remedy"]), (name, found)
    return f"refused with {found['exit_code']}"


def test_any_fault_is_survived(undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moment, outcomes, slowest = Random(SEED), Counter[tuple[str, str]](), 0.0
    fallen: list[str] = []
    for number in range(FAULTS):
        name, nth = drawn(moment, undisturbed.counts)
        kind, root = KINDS[name], tmp_path / f"{number}"
        (out := root / "out").mkdir(parents=True)
        inputs = copied(undisturbed.inputs, root)
        target = moment.choice([*inputs.base.glob("*.safetensors"), *inputs.adapter.glob("*.safetensors"), inputs.text])
        about = f"fault {number} of seed {SEED}: {name} at operation {nth} ({target.name})"
        sound, changed = target.read_bytes(), kind.inputs and kind.action is not None
        found = undisturbed.process.run(kind, inputs, out, nth=nth, target=target)
        try:
            outcome = require_explained(name, kind, found)
            out.mkdir(exist_ok=True)
            require_nothing_partial(out)
            if changed:
                target.write_bytes(sound)
            ended = undisturbed.process.run(replace(kind, jump=0), inputs, out, nth=-1, target=target)
            assert (ended["code"], ended.get("what"), ended.get("traceback")) == (0, None, None)
            made = digests(out)
            if changed:  # to other sound inputs, perhaps, of which something else was made
                made = {stage: sorted({*found} & {*undisturbed.expected[stage]}) for stage, found in made.items()}
            assert made == undisturbed.expected
            require_clean(out, inputs_changed=changed)
        except Exception as error:
            fallen.append(f"{about}: {type(error).__name__} {error}\n{found}")
            continue
        outcomes[name, outcome] += 1
        slowest = max(slowest, found["seconds"])
        shutil.rmtree(root)
    with capsys.disabled():
        print(f"\n{FAULTS} faults, the slowest run took {slowest:.1f} s:")
        for (name, outcome), count in sorted(outcomes.items()):
            print(f"  {name}: {outcome} {count}")
    assert not fallen, "\n\n".join(fallen)
