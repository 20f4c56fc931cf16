"""Tests of the output of quantizers."""
