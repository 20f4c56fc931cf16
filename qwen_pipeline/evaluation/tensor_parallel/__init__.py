"""Simulation of the ranks of serving engines."""
