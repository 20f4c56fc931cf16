"""Behaviour that perplexity does not see: tool calls, thinking, JSON, stop tokens, and a long context."""
