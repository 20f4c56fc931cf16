"""From a fine-tune of a Qwen model to a quantized checkpoint that is proven to serve right."""

__version__ = "0.1.0"
