"""`kedit-fast spec`."""

from __future__ import annotations

from kedit_fast.cli.console import command, notices, output
from kedit_fast.cli.options import MergeAdapter, ModelArgument, SharedExpertsOption, SpecOption, read_spec
from kedit_fast.errors import InvalidArgumentError, UnsupportedModelError
from kedit_fast.models.architectures import ARCHITECTURES, spec_as_json
from kedit_fast.models.introspection import find_spec
from kedit_fast.models.loading import empty_model, load_config
from kedit_fast.models.view import ModelView
from kedit_fast.support.messages import comma_list


@command
def spec(
    model: ModelArgument,
    spec: SpecOption = None,
    shared_experts: SharedExpertsOption = "leave",
    merge_adapter: MergeAdapter = False,
) -> None:
    """Print the names of a model's modules as JSON, for --spec; with --spec, check those of a file.

    The weights are not loaded, so what follows the MLP is told by names; an edit tries it. Standard error says where
    the names are from, and which matrices are edited. Shared experts of a mixture are edited where the file says so:
    give it to `stats` and `edit` alike.
    """
    if spec is not None and shared_experts != "leave":
        raise InvalidArgumentError("--shared-experts writes a spec, --spec reads one: give one of them")
    given, empty = read_spec(spec), empty_model(load_config(model, merge_adapter))
    view = ModelView(empty, find_spec(empty, shared_experts) if given is None else given)
    source = str(spec) if given else "known" if view.spec in ARCHITECTURES else "found in its modules"
    first = view.editable[0]
    rows, columns = view.edited_shape(first)
    size = getattr(view.config, "hidden_size", rows)
    if rows != size:
        raise UnsupportedModelError(
            f"{view.module_name(first)} puts out {rows} numbers, and the model's states have {size}: it is not the "
            "last linear layer of the MLP"
        )
    blocks = f"{view.spec.blocks}.*.{view.spec.edit}" + (f" and {view.spec.shared}" if view.spec.shared else "")
    count = "" if len(view.editable) == view.num_layers else f" in layers {comma_list(view.editable)}"
    notices.print(f"kedit-fast: {view.spec.name} ({source}); edits {blocks} [{rows} x {columns}]{count}", markup=False)
    output.print(spec_as_json(view.spec), markup=False, soft_wrap=True)
