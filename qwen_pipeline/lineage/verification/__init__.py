"""Verification of a release on a host that serves it, with the standard library and ``cryptography`` alone.

``blake3``, which vLLM brings along, is used if it is installed.
"""
