"""Serving with a real engine, and comparison of its answers with those of Transformers."""
