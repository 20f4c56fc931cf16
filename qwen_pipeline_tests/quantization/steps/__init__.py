"""Tests of the steps of recipes."""
