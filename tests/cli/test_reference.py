"""The page of the command line and its commands say the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kedit_fast.cli import main, stats
from kedit_fast.cli.reference import functions, reference, replaced

PAGE = Path(__file__).parents[2] / "kedit_fast" / "cli" / "README.md"


@pytest.mark.skipif(not PAGE.exists(), reason="an installed package has no pages")
def test_the_page_has_the_options_of_every_command():
    text = PAGE.read_text(encoding="utf-8")
    assert replaced(text) == text, "run: python -m kedit_fast.cli.reference kedit_fast/cli/README.md"
    names = [name for name, _ in functions(main.COMMANDS)]
    assert {"demo", "edit", "stats collect", "patch export"} <= set(names)
    assert all(f"### `kedit-fast {name}`" in reference() for name in names)


def test_the_help_of_a_group_is_the_first_paragraph_of_each_command():
    lines = {name: line for name, (_, line) in main.COMMANDS.items()}
    lines |= {f"stats {name}": line for name, (_, line) in stats.COMMANDS.items()}
    for name, function in functions(main.COMMANDS):
        if name in lines:
            assert lines[name] == function.__doc__.split("\n\n")[0].strip(), name


def test_help_imports_no_command():

    code = (
        "import sys; from kedit_fast.cli.main import app; app(['--help'], standalone_mode=False); "
        "print([name for name in ('transformers', 'kedit_fast.editing.editor', 'kedit_fast.cli.edit') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr
