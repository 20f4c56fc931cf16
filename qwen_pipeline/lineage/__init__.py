"""Lineage of checkpoints for auditors: audits, signatures, statements in public formats, and a log of each store."""
