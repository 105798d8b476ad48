"""Requests, prompts, keys, values, and the ledger of what was written."""
