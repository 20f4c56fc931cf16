"""Load SOURCE with Transformers and QUANTIZED with GPTQModel on a GPU, with its KERNEL; print the KL divergence."""

import json
import os
import sys
from importlib import import_module
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    library: Any = import_module("gptqmodel")
    ids = torch.arange(256).reshape(4, 64)
    kernel = library.BACKEND(os.environ.get("KERNEL", "gptq_torch"))
    candidate = library.GPTQModel.load(sys.argv[2], device="cuda:0", backend=kernel).model
    reference: Any = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    with torch.inference_mode():
        exact = reference(ids).logits.double().log_softmax(-1)
        close = candidate(ids.cuda()).logits.double().cpu().log_softmax(-1)
    print()
    print(json.dumps({"kl": (exact.exp() * (exact - close)).sum(-1).mean().item()}))


if __name__ == "__main__":
    main()
