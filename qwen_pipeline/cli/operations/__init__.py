"""Commands for who runs the pipeline day by day."""
