"""Tests of the demo, and the scripts that they run in the quantizer's environment."""
