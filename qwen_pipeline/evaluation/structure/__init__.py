"""Comparison of a quantized checkpoint's headers and codes with its source."""
