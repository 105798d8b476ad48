"""Edits of a model in use: swapped in between requests, never half of them.

gate = Gate()
with gate.serving():            # in every thread that answers requests
    model.generate(...)

prepared = patch.prepare(model)  # the work; requests go on
with gate.swapping():            # waits for the requests that run, and keeps new ones waiting
    applied = prepared.swap_()   # as long as copying the edited matrices takes
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Requests pass together, a swap alone; requests that come while one waits wait behind it."""

    def __init__(self):
        self._changed = threading.Condition()
        self._serving = 0
        self._waiting = 0
        self._swapping = False

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Around one request; must not be nested in itself or in `swapping`."""
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
        """Around a change of weights."""
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
