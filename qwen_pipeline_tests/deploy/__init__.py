"""Tests of ``deploy/``: the files with which teams run the pipeline on machines of their own."""

from qwen_pipeline_tests import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
