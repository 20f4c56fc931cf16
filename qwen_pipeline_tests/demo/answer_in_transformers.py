"""Print the answer of a checkpoint to one question, and the width of its MLPs, as Transformers computes them."""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(root: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(root)
    model: Any = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, device_map="cpu")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    width = model.config.intermediate_size
    print(json.dumps({"answer": tokenizer.decode(answer, skip_special_tokens=True), "width": width}))


if __name__ == "__main__":
    main(sys.argv[1])
