"""Load SOURCE and QUANTIZED with Transformers on a CPU; print the KL divergence and the keys that do not match."""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def log_probabilities(path: str, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    with torch.inference_mode():
        return model(ids).logits.double().log_softmax(-1), info


def main() -> None:
    ids = torch.arange(256).reshape(4, 64)
    reference, _ = log_probabilities(sys.argv[1], ids)
    candidate, info = log_probabilities(sys.argv[2], ids)
    kl = (reference.exp() * (reference - candidate)).sum(-1).mean().item()
    names = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    print()
    print(json.dumps({"kl": kl, **names}))


if __name__ == "__main__":
    main()
