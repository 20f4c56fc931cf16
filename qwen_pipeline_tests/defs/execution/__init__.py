"""Tests of needs, op tags and executors."""
