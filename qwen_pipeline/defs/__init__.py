"""The pipeline as Dagster sees it. Nothing outside this room, ``definitions`` and two commands imports Dagster."""
