"""`kedit-fast spec`."""

from __future__ import annotations

from kedit_fast.cli.console import command, notices, output
from kedit_fast.cli.options import MergeAdapter, ModelArgument, SpecOption, read_spec
from kedit_fast.models.architectures import ARCHITECTURES, spec_as_json
from kedit_fast.models.loading import empty_model, load_config
from kedit_fast.models.view import ModelView


@command
def spec(model: ModelArgument, spec: SpecOption = None, merge_adapter: MergeAdapter = False) -> None:
    """Print the names of a model's modules as JSON, for --spec; with --spec, check those of a file.

    The weights are not loaded. Standard error says where the names are from, and the matrix that is edited.
    """
    given = read_spec(spec)
    view = ModelView(empty_model(load_config(model, merge_adapter)), given)
    source = str(spec) if given else "known" if view.spec in ARCHITECTURES else "found in its modules"
    matrix = " x ".join(map(str, view.weight(0).shape))
    notices.print(f"kedit-fast: {view.spec.name} ({source}); edits {view.module_name(0)} [{matrix}]", markup=False)
    output.print(spec_as_json(view.spec), markup=False, soft_wrap=True)
