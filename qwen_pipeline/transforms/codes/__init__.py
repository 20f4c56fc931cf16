"""Packed codes of quantized layers: their formats, the conversion between them, and repair by added groups."""
