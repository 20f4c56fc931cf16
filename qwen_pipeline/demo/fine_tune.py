"""The demo's fine-tune: a LoRA on all linear layers, trained by PEFT on conversations about Python."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_pipeline.progress import Observe, Progress, unobserved


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One pass of AdamW with a linearly falling learning rate over windows of packed conversations."""

    steps: int = 20
    windows_per_step: int = 2
    seq_len: int = 256
    learning_rate: float = 1e-3
    seed: int = 0


def train_adapter(
    *, base: Path, texts: Path, out: Path, training: Training | None = None, observe: Observe = unobserved
) -> Path:
    """Train a LoRA on ``texts`` (JSONL of ``messages``) into ``out``; free when it is there.

    The directory is written beside ``out`` and renamed when it is complete, as an upload tool should do it.
    """
    if out.exists():
        return out
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    training = training or Training()
    torch.manual_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    _train(model, _windows(tokenizer, texts, training.seq_len), training, observe)
    partial = out.with_name(f".{out.name}.partial")
    model.save_pretrained(str(partial))
    tokenizer.save_pretrained(partial)
    partial.rename(out)
    return out


def _train(model: Any, windows_WT: torch.Tensor, training: Training, observe: Observe) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=training.steps)
    order = torch.randperm(len(windows_WT), generator=torch.Generator().manual_seed(training.seed))
    model.train()
    for step in range(training.steps):
        start = step * training.windows_per_step
        picked = order[torch.arange(start, start + training.windows_per_step) % len(order)]
        batch = windows_WT[picked]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        remark = f"loss {loss.item():.3f}"
        observe(Progress(task="fine-tune", done=step + 1, total=training.steps, remark=remark))


def _windows(tokenizer: Any, texts: Path, seq_len: int) -> torch.Tensor:
    """Pack all conversations into one row of tokens and cut it into windows ``[W, seq_len]``."""
    tokens: list[int] = []
    for line in texts.read_text().splitlines():
        rendered = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        tokens += tokenizer(rendered, add_special_tokens=False).input_ids
    count = len(tokens) // seq_len
    return torch.tensor(tokens[: count * seq_len]).reshape(count, seq_len)
