"""Quantization: specs, quantizers (this package's layer loop, GPTQModel, AutoGPTQ), and per-module evidence."""
