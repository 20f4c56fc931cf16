"""Print the perplexity of two checkpoints on windows of tokens (JSON), and the mean KL between them, in float64."""

import json
import sys
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM


def main(tokens: str, *roots: str) -> None:
    windows, logits = torch.tensor(json.loads(tokens)), list[torch.Tensor]()
    for root in roots:
        model: Any = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(input_ids=windows).logits[:, :-1].flatten(0, 1).double())
    p, q = (rows.log_softmax(-1) for rows in logits)
    figures = {
        "perplexity": [cross_entropy(rows, windows[:, 1:].flatten()).exp().item() for rows in logits],
        "kl": kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
