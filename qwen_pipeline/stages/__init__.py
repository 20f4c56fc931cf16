"""Stages of the pipeline: each derives one finished directory from others and reports on checks of its output."""
