"""The output of a quantizer while it runs and once it has finished, on its way into a checkpoint."""
