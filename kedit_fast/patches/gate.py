"""A lock for a model in use: edits are swapped in between requests, so that no request sees half of them.

gate = Gate()
with gate.serving():             # in every thread that answers requests
    model.generate(...)

prepared = patch.prepare(model)  # the work; requests continue
with gate.swapping():            # waits for running requests, and makes new ones wait
    applied = prepared.swap_()   # takes as long as copying the edited matrices
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Many requests may run at once; a swap runs alone. Requests that arrive while a swap waits, wait for it."""

    def __init__(self):
        self._changed = threading.Condition()
        self._serving = 0
        self._waiting = 0
        self._swapping = False

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Held around one request; must not be nested in itself or in `swapping`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._swapping and not self._waiting)
            self._serving += 1
        try:
            yield
        finally:
            with self._changed:
                self._serving -= 1
                self._changed.notify_all()

    @contextmanager
    def swapping(self) -> Iterator[None]:
        """Held around a change of weights."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._swapping and not self._serving)
                self._swapping = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._swapping = False
                self._changed.notify_all()
