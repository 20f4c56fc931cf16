"""Text for calibration and evaluation: where it comes from, its records, and windows of tokens."""
