"""Options that the frameworks' files have no name for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from kedit_fast.errors import MethodError, RequestError
from kedit_fast.integrations.framework_statistics import Text
from kedit_fast.models.architectures import ArchSpec, spec_from_json
from kedit_fast.requests.spacing import AUTO, check_separator

OUR_HPARAMS = ("statistics_text", "ultraedit_rows", "target_separator", "spec")
"""Hyper-parameters of frameworks' files that no framework has."""
UltraEditRows = Literal["own", "easyedit"]


@dataclass(frozen=True)
class Options:
    """The options of a call. Where one is None, a hyper-parameter of its name counts, and then that of `defaults`."""

    statistics_text: Text | None = None
    """What statistics are computed from where none are found; see `framework_statistics`."""
    ultraedit_rows: UltraEditRows | None = None
    """UltraEdit's labels and tokens: EasyEdit's, or ours ("own", also for None)."""
    target_separator: str | None = None
    """As in `Editor`; None is "auto": decided from the text."""
    spec: ArchSpec | str | os.PathLike | None = None
    """The modules of an architecture that is not known, or the path of a JSON file of them."""
    whole_name: bool = False
    """Whether a new folder of statistics is named by the model's whole path (memit), not by its last part."""
    defaults: Options | None = None

    def key(self) -> tuple:
        """Equal for equal options; texts that are not a path count by their identity."""
        text = self.statistics_text
        is_name = text is None or isinstance(text, str | os.PathLike)
        separator = AUTO if self.target_separator is None else self.target_separator
        return str(text) if is_name else id(text), self.ultraedit_rows or "own", separator, self.spec, self.whole_name

    def with_hparams(self, raw: Mapping[str, Any]) -> Options:
        """These options, filled up from hyper-parameters and defaults.

        Raises:
            MethodError: an unknown `ultraedit_rows` or `target_separator`, or a `spec` that is none and no path.
            InvalidArgumentError: a file of an ArchSpec that is not one.
        """
        filled: dict[str, Any] = {}
        for name in OUR_HPARAMS:
            choices = (getattr(self, name), raw.get(name), getattr(self.defaults, name, None))
            filled[name] = next((choice for choice in choices if choice is not None), None)
        if filled["ultraedit_rows"] not in (None, *get_args(UltraEditRows)):
            raise MethodError(f"ultraedit_rows = {filled['ultraedit_rows']!r}: choose own or easyedit")
        try:
            check_separator(AUTO if filled["target_separator"] is None else filled["target_separator"])
        except RequestError as error:
            raise MethodError(str(error)) from None
        options = Options(**filled, whole_name=self.whole_name)
        return replace(options, spec=options.architecture)

    @property
    def architecture(self) -> ArchSpec | None:
        """`spec`, read where it is a path."""
        if isinstance(self.spec, str | os.PathLike):
            return spec_from_json(self.spec)
        if not isinstance(self.spec, ArchSpec | None):
            raise MethodError(f"spec must be an ArchSpec or the path of its file; got {type(self.spec).__name__}")
        return self.spec

    def given(self) -> dict[str, Any]:
        """The options that are not None."""
        values = {name: getattr(self, name) for name in OUR_HPARAMS}
        return {name: value for name, value in values.items() if value is not None}
