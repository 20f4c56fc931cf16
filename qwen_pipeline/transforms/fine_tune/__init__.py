"""Full fine-tunes: complete models whose tensors take the places of a base's."""
