"""Figures from logits and activations, computed by a layer-streamed forward pass."""
