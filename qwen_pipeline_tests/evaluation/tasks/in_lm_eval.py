"""Worker functions of tests in lm-eval's environment."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

from qwen_pipeline.evaluation.tasks.streamed_lm import StreamedLM
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.progress import Observe
from qwen_pipeline.text.tokenizers import load_tokenizer
from qwen_pipeline_tests.tiny import load_tiny

TEXTS = ["", "What is a test?", "Two spaces  ", "<|im_end|>begins like a text", "long enough to be cut " * 40]
PAIRS = [
    *((text, continuation) for text in TEXTS for continuation in ("a", "b", " and more of it")),
    ("short", "a continuation"),
]


def ask_both(spec: Mapping[str, Any], _: Observe) -> dict[str, Any]:
    """Evaluate ``spec["streamed"]`` with our class and ``spec["plain"]``, the same model, with lm-eval's own."""
    root = Path(spec["plain"])
    plain = HFLM(pretrained=load_tiny(root), tokenizer=load_tokenizer(root), batch_size=1)
    streamed = StreamedLM(Path(spec["streamed"]), ComputeContext(device=torch.device("cpu"), dtype=torch.float32))
    contexts = TEXTS[1:]
    whole = plain.generate_until(_requests("generate_until", [(text, _greedy([])) for text in contexts]))
    cut = [(text, _greedy([answer[5:7]])) for text, answer in zip(contexts, whole, strict=True)]
    return {
        name: {
            "likelihoods": model.loglikelihood(_requests("loglikelihood", PAIRS)),
            "rolling": model.loglikelihood_rolling(_requests("loglikelihood_rolling", [(text,) for text in TEXTS[1:]])),
            "whole": model.generate_until(_requests("generate_until", [(text, _greedy([])) for text in contexts])),
            "cut": model.generate_until(_requests("generate_until", cut)),
        }
        for name, model in {"plain": plain, "streamed": streamed}.items()
    }


def _greedy(until: list[str]) -> dict[str, Any]:
    return {"until": until, "max_gen_toks": 12, "do_sample": False}


def _requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]
