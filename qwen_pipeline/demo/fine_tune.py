"""The demo's fine-tune: a LoRA on all linear layers, trained by PEFT on conversations about Python."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.workers.parent import run_worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Settings of a short training: AdamW with linear decay, on windows of packed conversations."""

    steps: int = 20
    windows_per_step: int = 2
    seq_len: int = 256
    learning_rate: float = 1e-3
    seed: int = 0


def train_adapter(
    *, base: Path, texts: Path, out: Path, training: Training | None = None, observe: Observe = unobserved
) -> Path:
    """Train a LoRA on ``texts`` (JSONL of ``messages``) into ``out``, unless it exists.

    A worker process trains it, so that its memory is freed. The directory is written next to ``out`` and renamed once
    it is complete, as an upload tool should do.
    """
    if not out.exists():
        partial = out.with_name(f".{out.name}.partial")
        partial.mkdir(exist_ok=True)
        job = {
            "base": str(base.resolve()),
            "texts": str(texts.resolve()),
            "out": str(partial.resolve()),
            "training": asdict(training or Training()),
        }
        log = texts.with_name("training.log")
        run_worker(Path(sys.executable), f"{__name__}:train", job, log=log, observe=observe)
        partial.rename(out)
    return out


def train(job: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Train with the settings of ``job``, and save adapter and tokenizer; the worker of :func:`train_adapter`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    training = Training(**job["training"])
    torch.manual_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    loss = _train(model, _windows(tokenizer, Path(job["texts"]), training.seq_len), training, observe)
    model.save_pretrained(job["out"])
    tokenizer.save_pretrained(job["out"])
    return {"loss": loss}


def _train(model: Any, windows_WT: torch.Tensor, training: Training, observe: Observe) -> float:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=training.steps)
    order = torch.randperm(len(windows_WT), generator=torch.Generator().manual_seed(training.seed))
    model.train()
    loss = torch.tensor(torch.nan)
    for step in range(training.steps):
        start = step * training.windows_per_step
        batch = windows_WT[order[torch.arange(start, start + training.windows_per_step) % len(order)]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        remark = f"loss {loss.item():.3f}"
        observe(Progress(task="fine-tune", done=step + 1, total=training.steps, remark=remark))
    return loss.item()


def _windows(tokenizer: Any, texts: Path, seq_len: int) -> torch.Tensor:
    """Concatenate the tokens of all conversations and split them into windows ``[W, seq_len]``; drop the rest."""
    tokens: list[int] = []
    for line in texts.read_text().splitlines():
        rendered = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        tokens += tokenizer(rendered, add_special_tokens=False).input_ids
    count = len(tokens) // seq_len
    return torch.tensor(tokens[: count * seq_len]).reshape(count, seq_len)
