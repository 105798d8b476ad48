"""Definitions of metrics, a family a file: `PROMPTS`, `SCORINGS` and `METRICS`, merged by the registry."""
