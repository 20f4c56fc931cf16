"""Functions that run in processes of their own, under the Python of another environment."""
