"""Helpers that know no model: files, text files, bits, dtypes, processes, torch's settings, clocks, figures."""
