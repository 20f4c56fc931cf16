"""Text for calibration and evaluation: its sources, its records, and windows of tokens."""
