"""The command line `kedit-fast`: the table of its commands. A command's module is imported when it is called.

Exit status: 0 done, 1 an error (a few lines on stderr, nothing on stdout), 2 wrong options, 130 interrupted.
"""

from __future__ import annotations

from kedit_fast.cli.lazy import lazy_app

COMMANDS = {
    "demo": (
        "kedit_fast.cli.demo:demo",
        "Change facts inside the bundled demo model and show what changed. Saves nothing without --out.",
    ),
    "edit": ("kedit_fast.cli.edit:edit", "Write facts into a model and save it."),
    "eval": ("kedit_fast.cli.eval:evaluation", "Measure what edits did: every metric before and after."),
    "plan": (
        "kedit_fast.cli.plan:plan",
        "Estimate the memory, the batch and the time of a run of edits before it is started.",
    ),
    "spec": (
        "kedit_fast.cli.spec:spec",
        "Print the names of a model's modules as JSON, for --spec; with --spec, check those of a file.",
    ),
    "suggest": (
        "kedit_fast.cli.suggest:suggest",
        "Try layers and other hyper-parameters on a few requests, and print the best configuration for --hparams.",
    ),
    "locate": (
        "kedit_fast.cli.locate:locate",
        "Say in which layers a model holds facts, and through which edges it answers.",
    ),
    "methods": (
        "kedit_fast.cli.methods:methods",
        "List the methods, where each is from, and what it keeps between batches; as JSON also their hyper-parameters.",
    ),
    "backends": (
        "kedit_fast.cli.environment:backends",
        "Show which backends can run here, and why the others cannot.",
    ),
    "stats": (
        "kedit_fast.cli.stats:app",
        "Second moments of layer inputs. `stats MODEL ...` collects them (`stats collect --help` has its options).",
    ),
    "requests": ("kedit_fast.cli.requests:app", "Files of requests: what they hold, and in which form."),
    "patch": ("kedit_fast.cli.patch:app", "Edits as files: show, apply, revert, merge, export."),
    "memory": ("kedit_fast.cli.memory:app", "Edits beside the weights as files: show, apply, revert, merge."),
}
app = lazy_app(COMMANDS, help="Closed-form knowledge editing of language models.")


def main() -> None:
    """The entry point `kedit-fast`."""
    app()
