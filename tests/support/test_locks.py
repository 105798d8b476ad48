"""One process at a time: with fcntl, and where Python has none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kedit_fast.errors import KeditError
from kedit_fast.support.files import locked

BUSY = "another process uses the folder"


@pytest.fixture(params=("fcntl", "no fcntl"))
def locks(request, monkeypatch):
    if request.param == "no fcntl":
        monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it raises ImportError
    else:
        pytest.importorskip("fcntl")
    return request.param


def test_a_second_holder_is_refused_until_the_first_has_ended(locks, tmp_path):
    path = tmp_path / ".lock"
    with locked(path, KeditError, BUSY):
        with pytest.raises(KeditError, match=BUSY), locked(path, KeditError, BUSY):
            pytest.fail("two holders")
        with pytest.raises(KeditError, match=BUSY), locked(path, KeditError, BUSY):  # nor has the refusal ended it
            pytest.fail("two holders")
    with locked(path, KeditError, BUSY):
        assert path.exists()


def test_an_error_in_the_block_ends_the_lock(locks, tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / ".lock", KeditError, BUSY):
        _ = 1 / 0
    with locked(tmp_path / ".lock", KeditError, BUSY):
        pass


def test_a_folder_that_is_not_there_is_named(locks, tmp_path):
    path = tmp_path / "missing" / ".lock"
    with pytest.raises(KeditError, match=f"cannot write {path}"), locked(path, KeditError, BUSY):
        pass


def test_a_block_may_delete_its_lock_file(locks, tmp_path):
    """As the commands do that leave no folder behind when they wrote nothing."""
    path = tmp_path / ".lock"
    with locked(path, KeditError, BUSY):
        path.unlink()
    assert not path.exists()


def killed_while_locked(path, hidden):
    code = (
        f"import os, signal, sys\nif {hidden}: sys.modules['fcntl'] = None\n"
        "from kedit_fast.errors import KeditError\nfrom kedit_fast.support.files import locked\n"
        f"with locked({str(path)!r}, KeditError, 'busy'): print(os.getpid(), flush=True); os.kill(os.getpid(), 9)"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)


def test_the_lock_of_a_killed_process_ends_with_it_or_is_named(locks, tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    pid = killed_while_locked(path, locks == "no fcntl")
    if locks == "fcntl":
        with locked(path, KeditError, BUSY):
            return
    with pytest.raises(KeditError, match=rf"{BUSY}.*killed.*{path}.*delete it"), locked(path, KeditError, BUSY):
        pass
    assert int(path.read_text()) == pid  # and it tells whose it is
    path.unlink()
    with locked(path, KeditError, BUSY):
        pass
