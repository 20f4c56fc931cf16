"""``qwen-pipeline audit``, ``sign`` and ``verify``."""
