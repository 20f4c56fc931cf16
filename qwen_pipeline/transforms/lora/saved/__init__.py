"""Shards, other spellings of names and other layouts, in which trainers save adapters."""
