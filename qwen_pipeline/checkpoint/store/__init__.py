"""The outputs of stages, each in a directory that its derivation names: built once, verified, never overwritten."""
