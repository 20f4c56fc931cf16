"""Definitions for operators: releases, retention, audits, notifications."""
