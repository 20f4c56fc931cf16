"""Quantization: specs, quantizers (an own layer loop, GPTQModel, AutoGPTQ), and the evidence that they leave."""
