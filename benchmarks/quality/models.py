"""The models that are measured: the demo's base, the same with widths that 128 divides, and a mixture made of it.

The base's weights come from a 4-bit file and lie on its grid, so a quantizer could find them again: all models are
trained a little, all weights of them, on the demo's conversations.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.upcycled import upcycle
from qwen_pipeline.demo.base import build_base

NOISE = 0.02
"""Standard deviation of new weights."""
WIDE = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 1664}
BATCH, SEQ_LEN, LEARNING_RATE = 8, 512, 1e-4


def make_model(name: str, scratch: Path, *, base: Path | None, training: Path, steps: int, device: str) -> Path:
    """Return a model of :data:`MODELS`, trained for a number of steps; it is made if it is not in ``scratch``.

    Args:
        name: Its name.
        scratch: Directory of models.
        base: The demo's base, if it was built before.
        training: JSONL of conversations.
        steps: Steps of training; without any, the model is as it was made.
        device: Where it is trained.
    """
    out = scratch / f"{name}-{steps}"
    if not out.exists():
        made = MODELS[name](base or build_base(scratch / "base").path, scratch)
        if not steps:
            return made
        partial = scratch / f".{out.name}"
        _train(made, training, partial, steps, device)
        partial.rename(out)
    return out


def _dense(base: Path, _: Path) -> Path:
    return base


def _experts(base: Path, scratch: Path) -> Path:
    out = scratch / "experts"
    return out if out.exists() else upcycle(base, out, step=1)


def _wide(base: Path, scratch: Path) -> Path:
    """Write the base with more hidden channels, heads and MLP channels; new weights are small and random.

    The norms keep the size of their inputs as it was.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = scratch / "wide"
    if out.exists():
        return out
    small: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = small.config
    grow = (WIDE["hidden_size"] / config.hidden_size) ** -0.5
    wide: Any = type(small)(type(config)(**{**config.to_dict(), **WIDE}))
    random = torch.Generator().manual_seed(0)
    state = {name: _grown(small, name, tensor, random, grow) for name, tensor in wide.state_dict().items()}
    wide.load_state_dict(state)
    wide.tie_weights()
    wide.bfloat16().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def _grown(small: Any, name: str, shape_of: Tensor, random: torch.Generator, grow: float) -> Tensor:
    """Return a parameter of the larger model: the smaller one's, surrounded by noise."""
    known = small.state_dict()[name]
    if name.endswith("norm.weight"):
        grown = torch.full_like(shape_of, float(known.mean()) * grow)
        known = known * grow
    elif name.endswith("bias"):
        grown = torch.zeros_like(shape_of)
    else:
        grown = torch.randn(shape_of.shape, generator=random) * NOISE * (known.std() / 0.05).clamp(max=1)
    grown[tuple(slice(size) for size in known.shape)] = known
    return grown


MODELS: Mapping[str, Callable[[Path, Path], Path]] = {"dense": _dense, "wide": _wide, "experts": _experts}


def _train(source: Path, conversations: Path, out: Path, steps: int, device: str) -> None:
    """Train all weights by AdamW, whose steps fall linearly, on windows of conversations; save in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    tokens: list[int] = []
    for line in conversations.read_text().splitlines():
        rendered = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        tokens += tokenizer(rendered, add_special_tokens=False).input_ids
    windows_WT = torch.tensor(tokens[: len(tokens) // SEQ_LEN * SEQ_LEN]).view(-1, SEQ_LEN)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    order = torch.randperm(len(windows_WT), generator=torch.Generator().manual_seed(0))
    loss = torch.tensor(torch.nan)
    for step in range(steps):
        chosen = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        batch = windows_WT[chosen].to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"{source.name}: loss {loss.item():.3f} after {steps} steps", flush=True)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
