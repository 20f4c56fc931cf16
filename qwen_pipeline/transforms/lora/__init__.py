"""LoRA adapters as PEFT saves them, and their merge into a base."""
