"""Tiny models with other heads than that of a language model: classifiers, reward models and embedding models."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, PreTrainedModel

from qwen_pipeline.qwen.families import FAMILIES
from qwen_pipeline_tests.tiny import LINEARS, tiny_tokenizer

Head = Literal["ForSequenceClassification", "ForTokenClassification", "Model"]
SCORED_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.scored)
TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "Model": "FEATURE_EXTRACTION"}


def load_headed(root: Path, head: Head, *, dtype: torch.dtype = torch.float64, **config: Any) -> PreTrainedModel:
    """Load a directory as the class of a head; a new ``score`` is random, every other tensor must be stored."""
    settings = AutoConfig.from_pretrained(root, **config)
    kind = getattr(transformers, FAMILIES[settings.model_type].scored + head)
    model, report = kind.from_pretrained(root, config=settings, dtype=dtype, output_loading_info=True)
    assert {name.partition(".")[0] for name in report["missing_keys"]} <= {"score"}
    assert not report["mismatched_keys"]
    model.set_experts_implementation("eager")  # the default, a grouped product, does not support float64
    return model.eval()


def tiny_headed(base: Path, root: Path, head: Head, *, labels: int = 3, seed: int = 1, **config: Any) -> Path:
    """Save a full fine-tune of ``base`` with another head: every weight differs from the base's."""
    torch.manual_seed(seed)
    names = {str(number): f"kind {number}" for number in range(labels)}
    fields = {} if head == "Model" else {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}
    model = load_headed(base, head, dtype=torch.float32, pad_token_id=tiny_tokenizer().pad_token_id, **fields, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 if name.startswith("score") else 0.02)
    model.to(torch.bfloat16).save_pretrained(root)  # pyright: ignore[reportArgumentType, reportCallIssue]
    tiny_tokenizer().save_pretrained(root)
    return root


def tiny_headed_adapter(base: Path, root: Path, head: Head, *, labels: int = 3, **lora: Any) -> Path:
    """Have PEFT save a LoRA for the model of a task, with its trained ``score``."""
    torch.manual_seed(2)
    model: Any = load_headed(base, head, dtype=torch.float32, num_labels=labels)
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(LINEARS), "task_type": TASKS[head]}
    peft = get_peft_model(model, LoraConfig(**(defaults | lora)))
    with torch.no_grad():
        for parameter in (p for p in peft.parameters() if p.requires_grad):
            parameter.normal_(std=0.1)
    peft.save_pretrained(str(root))
    return root


def as_sentence_transformer(root: Path, *, pooling: str = "lasttoken", normalize: bool = True) -> Path:
    """Add the files with which sentence-transformers publishes an embedding model, as Qwen's have them."""
    steps = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    steps += ["sentence_transformers.models.Normalize"] * normalize
    modules = [
        {"idx": n, "name": str(n), "path": f"{n}_{kind.rpartition('.')[2]}" if n else "", "type": kind}
        for n, kind in enumerate(steps)
    ]
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    flags = {f"pooling_mode_{name}": pooling in (name, name.rpartition("_")[0]) for name in names}
    hidden = json.loads((root / "config.json").read_text())["hidden_size"]
    (root / "modules.json").write_text(json.dumps(modules, indent=2))
    (root / "1_Pooling").mkdir(exist_ok=True)
    (root / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": hidden} | flags))
    (root / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "Q: "}}))
    return root
