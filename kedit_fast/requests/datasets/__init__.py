"""Data sets of other repositories: a record for each form of file, which says how its records become requests."""
