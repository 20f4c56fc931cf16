"""A small language model and fine-tune for trying the pipeline without a model hub.

The base is SmolLM2-135M-Instruct converted to Qwen2, with an MLP width that, as in Qwen2-72B, does not divide among the
ranks; the fine-tune is a LoRA that PEFT trains on the Python language reference.
"""
