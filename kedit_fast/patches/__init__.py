"""Edits as files.

`patch` saves, loads and merges them, `swap` puts them into a model in memory, `checkpoint` into one on disk, `lora`
exports them to peft, `gate` lets a server swap them in between requests.
"""
