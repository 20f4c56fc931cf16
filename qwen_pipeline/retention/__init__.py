"""Retention: outputs that no rule keeps are removed, and their manifests stay, so that each can be made again."""
