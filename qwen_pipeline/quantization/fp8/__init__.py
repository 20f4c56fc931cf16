"""Quantization to 8-bit floats: its settings, the derivation of its output, and the checks of it."""
