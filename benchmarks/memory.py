"""Peak resident memory of merge and pad against the model's size, with PEFT's merge beside them in the same run.

Each figure is the high-water mark of a process of its own, less that of a bare interpreter with torch imported.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen2

_PEAK = """
from pathlib import Path
print(next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""
_BARE = "import torch"
_STAGE = "from pathlib import Path; from qwen_pipeline.checkpoint.store import Directory;"
_RUNS = {
    "merge": _STAGE
    + "from qwen_pipeline.stages.merge import merge;"
    + "merge(base=Path('base'), fine_tune=Path('adapter'), destination=Directory(Path('merged')))",
    "pad": _STAGE
    + "from qwen_pipeline.stages.pad import pad;"
    + "pad(source=Path('base'), destination=Directory(Path('padded')), group_size=128, tensor_parallel=8)",
    "PEFT merge": "import torch; from transformers import AutoModelForCausalLM; from peft import PeftModel;"
    + "model = AutoModelForCausalLM.from_pretrained('base', dtype=torch.bfloat16);"
    + "PeftModel.from_pretrained(model, 'adapter').merge_and_unload().save_pretrained('peft')",
}


LAYERS = (8, 16, 32)


def measure() -> list[dict[str, int | str]]:
    """Return one row for each size and each way: base bytes and peak bytes above the bare interpreter."""
    rows: list[dict[str, int | str]] = []
    for layers in LAYERS:
        with tempfile.TemporaryDirectory() as scratch:
            base = tiny_qwen2(
                Path(scratch) / "base",
                hidden_size=1024,
                intermediate_size=2432,
                num_hidden_layers=layers,
                vocab_size=8192,
            )
            tiny_adapter(base, Path(scratch) / "adapter", r=16)
            size = (base / "model.safetensors").stat().st_size
            bare = _peak(_BARE, scratch)
            for name, code in _RUNS.items():
                rows.append({"base_bytes": size, "run": name, "peak_bytes_above": _peak(code, scratch) - bare})
    return rows


def _peak(code: str, directory: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code + _PEAK]
    done = subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024
