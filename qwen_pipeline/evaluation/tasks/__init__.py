"""Benchmark tasks of lm-eval on layer-streamed checkpoints."""
