"""Tests of the requests, and of what their answers are worth."""
