"""Mutations of every file that comes from outside, read by what reads it."""
