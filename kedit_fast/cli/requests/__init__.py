"""The commands about files of requests: show, convert, sample, lint, paraphrase."""

from __future__ import annotations

from kedit_fast.cli.lazy import lazy_app

COMMANDS = {
    "show": (
        "kedit_fast.cli.requests.show:show",
        "Show which data set's form a file has, what its requests hold, and a few of them.",
    ),
    "convert": (
        "kedit_fast.cli.requests.convert:convert",
        "Write the requests of a file of any form as records of this package.",
    ),
    "sample": (
        "kedit_fast.cli.requests.sample:sample",
        "Draw some of a file's requests, whole cases together, and write them as records of this package.",
    ),
    "lint": (
        "kedit_fast.cli.requests.lint:lint",
        "Check requests before any edit: duplicates, contradictions, what the model knows, tokens across boundaries.",
    ),
    "paraphrase": (
        "kedit_fast.cli.requests.paraphrase:paraphrase",
        "Add other phrasings to requests, from templates of the same relation; needs no model.",
    ),
}
app = lazy_app(COMMANDS, help="Files of requests: what they hold, and in which form.")
