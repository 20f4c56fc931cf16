"""Definitions for who runs the pipeline day by day: releases, retention, audits, notifications."""
