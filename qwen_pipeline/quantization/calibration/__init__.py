"""Calibration: windows of tokens drawn from text, and the tokens that reach each expert."""
