"""Tests of the stage ``quantize``, with the real quantizers and tiny models."""
