"""Qwen models: families, tensor names, layers, towers, and padding plans."""
