"""The commands about statistics: `kedit-fast stats MODEL ...` collects; show, converge, import, export, project."""

from __future__ import annotations

from typing import Any

from kedit_fast.cli.lazy import LazyGroup, lazy_app

COLLECT = "collect"
COMMANDS = {
    COLLECT: (
        "kedit_fast.cli.stats.collect:collect",
        "Collect the second moments an edit needs, in one pass over a text, with checkpoints.",
    ),
    "show": (
        "kedit_fast.cli.stats.show:show",
        "Show counts, traces, condition numbers, effective ranks and null spaces, and draw the spectra.",
    ),
    "converge": (
        "kedit_fast.cli.stats.converge:converge",
        "Report how an update, the null space and the condition change as statistics see more text.",
    ),
    "import": ("kedit_fast.cli.stats.exchange:import_", "Take over statistics of memit, AlphaEdit or EasyEdit."),
    "export": (
        "kedit_fast.cli.stats.exchange:export",
        "Write statistics where memit, AlphaEdit or EasyEdit look for their own.",
    ),
    "project": (
        "kedit_fast.cli.stats.exchange:project",
        "Write the projections on null spaces as AlphaEdit's null_space_project.pt.",
    ),
}


class _CollectByDefault(LazyGroup):
    """`stats MODEL ...` is `stats collect MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [COLLECT, *args]
        return super().parse_args(ctx, args)


app = lazy_app(
    COMMANDS,
    _CollectByDefault,
    help="Second moments of layer inputs. `stats MODEL ...` collects them (`stats collect --help` has its options).",
)
