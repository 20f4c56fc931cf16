"""Forward passes and greedy decoding with one decoder layer in memory at a time."""
