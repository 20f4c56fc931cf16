"""Stages of the pipeline: each derives a finished directory from its inputs and reports on checks of its output."""
