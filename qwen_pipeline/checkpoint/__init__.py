"""Checkpoints as files: read lazily, hashed, written by several threads, and kept in a store."""
