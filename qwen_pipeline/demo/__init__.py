"""A real language model and a real fine-tune for a machine without a model hub.

The base is SmolLM2-135M-Instruct in Qwen2 form with the serving problem of Qwen2-72B in small; the fine-tune is a LoRA
that PEFT trains on the Python language reference.
"""
