"""Peak resident memory of merge and pad above a bare interpreter with torch imported, with PEFT's merge beside them.

Run as ``python -m benchmarks.memory [--layers N]`` from the root of the repository. Each figure is the kernel's
high-water mark of a process of its own.
"""

import argparse
import os
import platform
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16, help="16 layers are about 300 MB")
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as scratch:
        base = tiny_qwen2(
            Path(scratch) / "base", hidden_size=1024, intermediate_size=2432, num_hidden_layers=layers, vocab_size=8192
        )
        tiny_adapter(base, Path(scratch) / "adapter", r=16)
        size = (base / "model.safetensors").stat().st_size
        bare = _peak(_BARE, scratch)
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
        print(f"base {size / 1e6:.0f} MB; bare interpreter with torch {bare / 1e6:.0f} MB")
        for name, code in _RUNS.items():
            print(f"{name:12} {(_peak(code, scratch) - bare) / 1e6:6.0f} MB above")


def _peak(code: str, directory: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code + _PEAK]
    done = subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024


if __name__ == "__main__":
    main()
