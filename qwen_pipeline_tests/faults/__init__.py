"""Faults of the machine, at system calls of the stages."""
