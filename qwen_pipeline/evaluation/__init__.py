"""Validation of a quantized checkpoint: measurements, findings, checks and reports."""
