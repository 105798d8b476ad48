"""The commands about files of requests: show, convert, sample."""

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
}
app = lazy_app(COMMANDS, help="Files of requests: what they hold, and in which form.")
