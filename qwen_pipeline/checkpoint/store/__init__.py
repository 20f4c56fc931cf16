"""The outputs of stages, each in a directory named by its derivation: built once, verified, never overwritten."""
