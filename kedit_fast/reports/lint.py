"""Requests checked before any edit: the rules of texts, and those that need a tokenizer or a model."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kedit_fast.editing.keys import KeyPass
from kedit_fast.editing.solver_state import SolverState
from kedit_fast.editing.values.loop import SITES
from kedit_fast.errors import StatisticsError
from kedit_fast.evaluation.asks import Ask, Forced, ForcedAnswer
from kedit_fast.evaluation.engine import answer_rows
from kedit_fast.evaluation.rows import Row, rows_of
from kedit_fast.methods.hparams import Hparams
from kedit_fast.methods.presets import is_guess, make_hparams
from kedit_fast.methods.recipe import Recipe
from kedit_fast.methods.registry import find_recipe
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.fingerprint import difference, fingerprint
from kedit_fast.models.forward import Site
from kedit_fast.models.view import ModelView
from kedit_fast.requests.encoded import EncodedRequest, encode_requests
from kedit_fast.requests.lint import (
    TEXT_RULES,
    Checked,
    Finding,
    Rule,
    Severity,
    counts_by_severity,
    in_order,
    subject_of,
    unplaced,
)
from kedit_fast.requests.prefixes import generate_prefixes
from kedit_fast.requests.prompts import PreparedRequest, PromptFormat, prepare_each
from kedit_fast.requests.reading import RequestList, as_requests
from kedit_fast.requests.relations import PUBLISHED, RelationRules
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO
from kedit_fast.requests.tokens import non_words, unknown_id
from kedit_fast.statistics.collect import Statistics
from kedit_fast.support.torch_state import plain_torch

LONG_TARGET = 16
"""Tokens above which a target is long: one vector must carry it."""
NEAR_KEYS, SAME_KEYS = 0.95, 0.999
"""Cosines of keys of different subjects above which a finding is a warning, and an error."""
_ROWS = 1024  # keys that are compared with all others at a time


@dataclass(frozen=True)
class LintReport:
    """What linting has seen."""

    findings: tuple[Finding, ...]
    """By record, the gravest first."""
    not_run: dict[str, str]
    """Rule -> why it was not run."""
    records: int
    """Number of records, whether they are requests or not."""

    @property
    def counts(self) -> dict[Severity, int]:
        """Severity -> number of findings."""
        return counts_by_severity(self.findings)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that stop an edit."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "records": self.records,
            "counts": self.counts,
            "findings": [finding.as_dict() for finding in self.findings],
            "not_run": self.not_run,
        }


@dataclass(frozen=True)
class Encoded:
    """Requests with their tokens, for rules that need a tokenizer."""

    checked: Checked
    tokenizer: Any
    recipe: Recipe
    encoded: Sequence[EncodedRequest | str]
    """Of each request its tokens, or why it has none."""
    formatted: bool
    """Whether prompts are in a format, which writes special tokens itself."""

    def usable(self) -> Iterator[tuple[int, EncodedRequest]]:
        """(index, tokens) of the requests that have tokens."""
        for i, one in enumerate(self.encoded):
            if not isinstance(one, str):
                yield i, one

    def shown(self, ids: Iterable[int]) -> str:
        """Tokens as messages show them: the text of each."""
        return "[" + " ".join(repr(self.tokenizer.decode([i])) for i in ids) + "]"


class Measured:
    """Requests on a model, for rules that run it. Each measurement is taken once, when a rule first asks for it.

    Args:
        checked: the requests.
        view: the model.
        tokenizer: its tokenizer.
        recipe, hparams: the method.
        statistics: second moments of the edited layers, or None.
        prompt_format, target_separator: as in `Editor`.
        seed: of the context prefixes.
    """

    def __init__(
        self,
        checked: Checked,
        view: ModelView,
        tokenizer: Any,
        recipe: Recipe,
        hparams: Hparams,
        statistics: Statistics | None,
        prompt_format: PromptFormat | None,
        target_separator: str,
        seed: int,
    ):
        self.checked, self.view, self.tokenizer = checked, view, tokenizer
        self.recipe, self.hparams, self.statistics = recipe, hparams, statistics
        self.prompt_format, self.target_separator, self.seed = prompt_format, target_separator, seed

    @functools.cached_property
    def _prepared(self) -> tuple[dict[int, PreparedRequest], dict[int, str]]:
        """Index -> each request as editing prepares it, and index -> why that is not possible."""
        lengths = self.hparams.context_template_length_params if self.recipe.optimizes_values else ()
        prefixes = generate_prefixes(self.view, self.tokenizer, lengths, self.seed)
        prepared, problems = prepare_each(
            self.tokenizer,
            dict(enumerate(self.checked.requests)),
            prefixes,
            self.view.max_length,
            self.prompt_format,
            vocabulary=self.view.vocabulary,
            target_separator=self.target_separator,
        )
        indices = [i for i in range(len(self.checked.requests)) if i not in problems]
        return dict(zip(indices, prepared, strict=True)), problems

    @property
    def prepared(self) -> dict[int, PreparedRequest]:
        """Index -> request as editing prepares it, of those that can be."""
        return self._prepared[0]

    @property
    def problems(self) -> dict[int, str]:
        """Index -> why a request cannot be prepared."""
        return self._prepared[1]

    @functools.cached_property
    def _rows(self) -> tuple[dict[Ask, Row], dict[int, str]]:
        """What is asked of the model, as token ids, and index -> why a prompt of a request cannot be measured."""
        asked: dict[Ask, int] = {ask: i for i in self.prepared for ask in self._asks(self.checked.requests[i])}
        rows, problems = rows_of(self.view, self.tokenizer, asked, self.prompt_format, self.target_separator)
        return rows, {asked[ask]: problem for ask, problem in reversed(problems.items())}

    @property
    def unmeasurable(self) -> dict[int, str]:
        """Index -> why a prompt of a request that can be written cannot be measured."""
        return self._rows[1]

    @functools.cached_property
    def answers(self) -> dict[Forced, ForcedAnswer]:
        """What the model, as it is now, says: of new and old targets on prompts, of old ones on the neighborhood."""
        rows = {ask: row for ask, row in self._rows[0].items() if ask not in self._paraphrases}
        answered = answer_rows(self.view, self.tokenizer, rows).items()
        return {ask: answer for ask, answer in answered if isinstance(ask, Forced) and isinstance(answer, ForcedAnswer)}

    @functools.cached_property
    def _paraphrases(self) -> set[Ask]:
        """What is only asked whether it could be measured."""
        answered: set[Ask] = set()
        paraphrases: set[Ask] = set()
        for i in self.prepared:
            request = self.checked.requests[i]
            answered.update([*self.of_new(request), *self.of_true(request), *self.of_neighborhood(request)])
            paraphrases.update(_forced(request, text, request.target_new) for text in request.paraphrase_prompts)
        return paraphrases - answered

    def _asks(self, request: EditRequest) -> list[Forced]:
        paraphrases = [_forced(request, text, request.target_new) for text in request.paraphrase_prompts]
        return [*self.of_new(request), *self.of_true(request), *self.of_neighborhood(request), *paraphrases]

    def of_new(self, request: EditRequest) -> list[Forced]:
        """The new target and its other names, on the prompt."""
        return [_forced(request, request.text, one) for one in (request.target_new, *request.target_aliases)]

    def of_true(self, request: EditRequest) -> list[Forced]:
        """The old target and its other names, on the prompt; none for a request without."""
        names = () if request.target_true is None else (request.target_true, *request.true_aliases)
        return [_forced(request, request.text, one) for one in names]

    def of_neighborhood(self, request: EditRequest) -> list[Forced]:
        """The old target, on each neighborhood prompt."""
        true = request.target_true
        return [] if true is None else [_forced(request, text, true) for text in request.neighborhood_prompts]

    @functools.cached_property
    def whitened(self) -> bool:
        """Whether keys are compared in the coordinates of the method's statistics."""
        return self.statistics is not None and self.hparams.uses_statistics

    def keys_by_layer(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(layer, keys [d, u]) of the prepared requests at each edited layer, as editing reads them, whitened or not.

        Cost: the passes of `KeyPass`; whitening d^2 u.
        """
        site = Site(self.hparams.layers[-1], SITES[self.recipe.values_on(self.view.spec.post_norm)][-1])
        passes = KeyPass(self.view, list(self.prepared.values()), site, self.recipe.key_weights)
        state = SolverState(self.view, self.recipe, self.hparams, self.statistics)
        for layer in self.hparams.layers:
            keys = passes.at(layer).keys
            yield layer, state.preconditioner(layer).whiten(keys) if self.whitened else keys


def _forced(request: EditRequest, prompt: str, target: str) -> Forced:
    return Forced(prompt, target, request.target_separator)


@plain_torch()
def lint_requests(
    requests: Iterable[EditRequest | Mapping[str, Any]],
    model: torch.nn.Module | None = None,
    tokenizer: Any | None = None,
    *,
    method: str = "memit",
    batch_size: int | None = None,
    statistics: Statistics | None = None,
    hparams: Mapping[str, Any] | None = None,
    relations: RelationRules = PUBLISHED,
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
    seed: int = 0,
    spec: ArchSpec | None = None,
) -> LintReport:
    """Check requests before any edit: duplicates, contradictions, what is known already, tokens across boundaries.

    Args:
        requests: as `load_requests` returned them, which also reports the records that could not be read; or records.
        model: for the rules that run it; nothing in it changes. Without it they are named in `not_run`.
        tokenizer: for the rules that need one.
        method: the method that will write them: it says which layers are edited and whether subjects are needed.
        batch_size: requests of a batch; None for one batch of all. Two targets of one fact are an error in one batch.
        statistics: of the edited layers, so that keys are compared in the coordinates of the solve.
        hparams: name -> value, overrides of the preset.
        relations: which relations imply each other.
        prompt_format: from a prompt to the text that the model reads.
        target_separator: for requests that say "auto".
        seed: of the context prefixes.
        spec: module names of an architecture that is not known.

    Returns:
        `LintReport`: the findings by record, and the rules that were not run.

    Raises:
        RequestError: `requests` is no collection of records.
        StatisticsError: statistics of another model, or bad ones.

    Cost: texts about 0.15 ms a request; a fast tokenizer 0.5 ms; a model one forward pass over every prompt with its
        targets, one over all context prefixes for keys, and u^2 d for their cosines.

    Example:
        >>> twice = [
        ...     {"prompt": "{} is twinned with", "subject": "Lyon", "target_new": "Manila"},
        ...     {"prompt": "{} is twinned with", "subject": "Lyon", "target_new": "Karachi"},
        ... ]
        >>> report = lint_requests(twice)
        >>> print(report.findings[0].rule, report.findings[0].records, report.counts["error"])
        two-targets (1, 2) 1
        >>> lint_requests(twice, batch_size=1).counts
        {'error': 0, 'warning': 0, 'note': 1}
        >>> [finding.rule for finding in lint_requests(requests, model, tokenizer, statistics=statistics).errors]
        []
    """
    recipe = find_recipe(method)
    read = as_requests(requests, "skip", recipe.needs_subject or None)
    checked = Checked.of(
        read, batch_size=batch_size if recipe.is_batched else 1, shares_values=recipe.merge, relations=relations
    )
    findings = [finding for rule in TEXT_RULES for finding in rule.check(checked)]
    not_run: dict[str, str] = {}
    if tokenizer is None:
        not_run |= {rule.name: "needs a tokenizer" for rule in TOKEN_RULES}
    else:
        findings += _token_findings(checked, tokenizer, recipe, prompt_format, target_separator)
    if model is None or tokenizer is None:
        not_run |= {rule.name: "needs a model" for rule in MODEL_RULES}
    else:
        view = ModelView(model, spec)
        chosen, origin = make_hparams(method, view.config, dict(hparams or {}))
        if is_guess(origin) and "layers" not in (hparams or {}):
            chosen = replace(chosen, layers=view.nearest_editable(chosen.layers))
        if statistics is not None and (different := difference(statistics.model, fingerprint(view, tokenizer))):
            raise StatisticsError(f"the statistics are of another model: different {different}")
        measured = Measured(checked, view, tokenizer, recipe, chosen, statistics, prompt_format, target_separator, seed)
        for rule in MODEL_RULES:
            if rule is KEY_RULE and (why := _no_keys(measured)):
                not_run[rule.name] = why
            else:
                findings += rule.check(measured)
    return LintReport(tuple(in_order(findings)), not_run, len({*checked.records, *checked.unreadable}))


def lint_tokens(
    requests: RequestList,
    tokenizer: Any,
    *,
    method: str = "memit",
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
) -> list[Finding]:
    """The findings of the rules that need a tokenizer, alone; see `lint_requests`."""
    recipe = find_recipe(method)
    return in_order(_token_findings(Checked.of(requests), tokenizer, recipe, prompt_format, target_separator))


def _token_findings(
    checked: Checked, tokenizer: Any, recipe: Recipe, prompt_format: PromptFormat | None, target_separator: str
) -> list[Finding]:
    rows = encode_requests(tokenizer, checked.requests, prompt_format, target_separator)
    encoded = Encoded(checked, tokenizer, recipe, rows, prompt_format is not None)
    return [finding for rule in TOKEN_RULES for finding in rule.check(encoded)]


def _no_keys(measured: Measured) -> str:
    """Why keys cannot be compared; "" where they can."""
    if not measured.recipe.guards_subjects or not measured.hparams.layers:
        return f"{measured.recipe.name} has no keys of subjects"
    return ""


# Rules that need a tokenizer


def _split_spans(encoded: Encoded) -> Iterator[Finding]:
    if not encoded.recipe.needs_subject:
        return
    for i, one in encoded.usable():
        beyond = next((lookup.beyond for lookup in one.lookups if lookup.beyond), "")
        tokens = [lookup.token for lookup in one.lookups]
        subject = one.request.subject
        if beyond:
            yield encoded.checked.finding(
                "span-split",
                "error",
                (i,),
                f"the last token of {subject!r} also covers {beyond!r} in {one.bare.text!r}: "
                f"{encoded.shown(one.bare.ids)}; the key would not be the subject's",
                "make what the token covers part of the subject, or choose another prompt",
                (i,),
            )
        elif len(set(tokens)) > 1:
            bare, prefixed = (encoded.tokenizer.decode([token]) for token in tokens)
            spaced = bare.strip() == prefixed.strip()
            yield encoded.checked.finding(
                "span-split",
                "note" if spaced else "warning",
                (i,),
                f"the last token of {subject!r} is {bare!r} in the bare prompt and {prefixed!r} after a context: "
                "the key is a mean over both",
                "" if spaced else "begin the prompt with another word than the subject",
            )


def _spaces(encoded: Encoded) -> Iterator[Finding]:
    for i, one in encoded.usable():
        if one.stripped is None:
            continue
        target = one.request.target_new
        where = f"the target {target!r} begins" if target[:1].isspace() else f"the prompt {one.bare.text!r} ends"
        same = one.full.ids == one.stripped.ids and not one.merges
        if same:
            text = "it is read as the separator"
        elif one.merges:
            text = (
                f"the prompt's tokens end in {encoded.shown(one.bare.ids[-3:])}, those of prompt and target in "
                f"{encoded.shown(one.full.ids[-5:])}, where the target follows another token"
            )
        else:
            text = (
                f"the tokens end in {encoded.shown(one.full.ids[-5:])}, else in {encoded.shown(one.stripped.ids[-5:])}"
            )
        yield encoded.checked.finding(
            "leading-space", "note" if same else "warning", (i,), f"{where} with a space: {text}", "take it out"
        )


def _merges(encoded: Encoded) -> Iterator[Finding]:
    for i, one in encoded.usable():
        if one.merges and one.stripped is None:
            yield encoded.checked.finding(
                "merge",
                "error",
                (i,),
                f"{one.full.text!r} has the tokens {encoded.shown(one.full.ids[-8:])} at its end, its prompt alone "
                f"{encoded.shown(one.bare.ids[-8:])}: no position predicts the target {one.request.target_new!r}",
                "end the prompt at a word, or give another target_separator",
                (i,),
            )


def _shared_first_tokens(encoded: Encoded) -> Iterator[Finding]:
    for i, one in encoded.usable():
        new, true = one.target_ids(one.full), one.target_ids(one.full_true)
        if new and true and new[0] == true[0] and new != true:
            yield encoded.checked.finding(
                "shared-first-token",
                "warning",
                (i,),
                f"{one.request.target_new!r} and {one.request.target_true!r} begin with one token, "
                f"{encoded.tokenizer.decode(new[:1])!r}: an edit has nothing to change there, and success says little",
                "measure the token accuracy",
            )


def _special_tokens(encoded: Encoded) -> Iterator[Finding]:
    tokenizer, unknown = encoded.tokenizer, unknown_id(encoded.tokenizer)
    special, named = non_words(tokenizer).special, {}
    for name in ("bos", "eos", "pad", "unk"):
        token, number = getattr(tokenizer, f"{name}_token", None), getattr(tokenizer, f"{name}_token_id", None)
        if isinstance(token, str) and len(token) > 1 and number in special:
            named.setdefault(token, f"the {name.upper()} token")
    others = {token: "a special token" for token in special.values() if len(token) > 1}
    for i, one in encoded.usable():
        target = one.request.target_new
        for field, text, tokens in (("prompt", one.request.text, named), ("target", target, {**others, **named})):
            if token := next((token for token in tokens if token in text), None):
                yield _special(encoded.checked, i, field, text, f"holds {token!r}, {tokens[token]}")
            elif unknown is not None and not encoded.formatted:
                ids = one.bare.ids if field == "prompt" else one.target_ids(one.full)
                if unknown in ids:
                    yield _special(encoded.checked, i, field, text, "holds a character that the vocabulary lacks")


def _special(checked: Checked, i: int, field: str, text: str, holding: str) -> Finding:
    return checked.finding("special-token", "error", (i,), f"the {field} {text!r} {holding}", "take it out", (i,))


def _long_targets(encoded: Encoded) -> Iterator[Finding]:
    if encoded.recipe.needs_chunks:
        return
    for i, one in encoded.usable():
        count = len(one.full.ids) - len(one.bare.ids)
        if count > LONG_TARGET:
            yield encoded.checked.finding(
                "long-target",
                "warning",
                (i,),
                f"the target has {count} tokens, and one vector must carry them: {one.request.target_new[:60]!r}",
                "closed forms write facts: shorten it to the answer, or use anyedit",
            )


TOKEN_RULES: tuple[Rule[Encoded], ...] = (
    Rule("span-split", "error", "a token that covers the end of the subject and more", _split_spans),
    Rule("leading-space", "warning", "white space where prompt and target meet", _spaces),
    Rule("merge", "error", "a token across prompt and target", _merges),
    Rule("shared-first-token", "warning", "new and old target with one first token", _shared_first_tokens),
    Rule("special-token", "error", "BOS, EOS, padding or the unknown token in a text", _special_tokens),
    Rule("long-target", "warning", f"a target of more than {LONG_TARGET} tokens", _long_targets),
)
"""The rules that need a tokenizer."""


# Rules that need a model


def _problems(rule: str, measured: Measured) -> Iterator[Finding]:
    for index, problem in {**measured.unmeasurable, **measured.problems}.items():
        kind = next((name for name, pattern in _KINDS.items() if re.search(pattern, problem)), "unusable")
        if kind == rule:
            yield measured.checked.finding(rule, "error", (index,), unplaced(problem), "", (index,))


_KINDS = {
    "no-tokens": r"has no tokens|no tokens for a part",
    "too-long": r"the model takes",
    "special": "special token",
}


def _known(measured: Measured) -> Iterator[Finding]:
    allowed = measured.hparams.on_predicted == "allow"
    for i in measured.prepared:
        request = measured.checked.requests[i]
        said = [ask for ask in measured.of_new(request) if _says(measured.answers.get(ask))]
        if said:
            target = said[0].target
            alias = "" if target == request.target_new else f", another name of {request.target_new!r},"
            severity: Severity = "note" if allowed else "warning" if alias else "error"
            yield measured.checked.finding(
                "already-known",
                severity,
                (i,),
                f"the model says {target!r}{alias} on {request.text!r} already (p = {_p(measured.answers[said[0]])})",
                "take the record out, or write it with on_predicted = allow",
                (i,) if severity == "error" else (),
            )


def _says(seen: ForcedAnswer | None) -> bool:
    """Whether every token of a target is the most probable one."""
    return seen is not None and all(seen.hits)


def _p(seen: ForcedAnswer) -> str:
    """The probability of a target, all of its tokens together."""
    p = math.exp(sum(seen.log_probs))
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _unknown_truths(measured: Measured) -> Iterator[Finding]:
    for i in measured.prepared:
        request = measured.checked.requests[i]
        on_prompt = [ask for ask in measured.of_true(request) if ask in measured.answers]
        beside = [measured.answers[ask] for ask in measured.of_neighborhood(request) if ask in measured.answers]
        missed = sum(not _says(seen) for seen in beside)
        places = []
        if on_prompt and not any(_says(measured.answers[ask]) for ask in on_prompt):
            places.append(f"on its prompt (p = {_p(measured.answers[on_prompt[0]])})")
        if missed:
            places.append(f"on {missed} of {len(beside)} neighborhood prompts")
        if places:
            yield measured.checked.finding(
                "true-unknown",
                "warning",
                (i,),
                f"the model does not say the old target {request.target_true!r} {' and '.join(places)}: what an edit "
                "does to it there cannot be seen",
            )


def _near_keys(measured: Measured) -> Iterator[Finding]:
    checked, indices = measured.checked, list(measured.prepared)
    names = [subject_of(checked.requests[i]) for i in indices]
    first: dict[str, int] = {}
    subject = torch.tensor([first.setdefault(name, len(first)) for name in names])
    if len(first) < 2:
        return
    nearest: dict[int, tuple[float, int, int, int, torch.Tensor]] = {}
    for layer, keys in measured.keys_by_layer():
        closest = _closest(keys, subject)
        for place, (cosine, other, others) in closest.items():
            if cosine > nearest.get(place, (0.0,))[0]:
                pair = keys[:, [place, other]]
                nearest[place] = (cosine, layer, other, others, (pair.T @ pair).cpu())
    how = "whitened keys" if measured.whitened else "plain keys (without statistics)"
    reported: set[tuple[int, int]] = set()
    for place, (cosine, layer, other, others, gram) in sorted(nearest.items()):
        pair = (min(place, other), max(place, other))
        if pair in reported:
            continue
        reported.add(pair)
        both = [indices[j] for j in pair]
        together = checked.batch_of(indices[place]) == checked.batch_of(indices[other])
        more = (
            f", and {others - 1} more {'is' if others == 2 else 'are'} near to {names[place]!r}" if others > 1 else ""
        )
        severe = cosine > SAME_KEYS and together
        yield checked.finding(
            "key-collision",
            "error" if severe else "warning",
            both[::-1],
            f"{checked.list_of(both)} ({names[pair[0]]!r} and {names[pair[1]]!r}) have nearly one key at layer "
            f"{layer}: the cosine of their {how} is {cosine:.4f}{more}{_unwritten(measured, gram)}",
            "an edit of one is an edit of the other: take one out" if severe else "measure both after the edit",
            both[1:] if severe else (),
        )


def _closest(keys: torch.Tensor, subject: torch.Tensor) -> dict[int, tuple[float, int, int]]:
    """Column -> (largest cosine, that column, how many are near) with columns of other subjects, where it is near."""
    unit = torch.nn.functional.normalize(keys, dim=0).float()
    subject = subject.to(unit.device)
    closest = {}
    for begin in range(0, unit.shape[1], _ROWS):
        cosines = unit[:, begin : begin + _ROWS].T @ unit  # [rows, u]
        cosines.masked_fill_(subject[begin : begin + _ROWS, None] == subject, -1.0)
        best, place = cosines.max(1)
        near = (cosines > NEAR_KEYS).sum(1)
        for i in torch.nonzero(near).flatten().tolist():
            closest[begin + i] = (float(best[i]), int(place[i]), int(near[i]))
    return closest


def _unwritten(measured: Measured, gram: torch.Tensor) -> str:
    """What the solve leaves of the difference of two values, from the Gram matrix [2, 2] of their whitened keys.

    The batch's system leaves R (I + G)^-1 of its residuals R; of a pair's difference that is 1 / (1 + the mean of the
    squared norms - the product).
    """
    if not measured.whitened or measured.hparams.scale_name is not None or measured.recipe.constraint != "ridge":
        return ""
    apart = float(gram.diagonal().mean())
    share = 1 / (1 + apart - float(gram[0, 1]))
    return f"; {share:.0%} of a difference of their values stays unwritten there, of one alone {1 / (1 + apart):.0%}"


KEY_RULE: Rule[Measured] = Rule("key-collision", "error", "different subjects with nearly one key", _near_keys)
MODEL_RULES: tuple[Rule[Measured], ...] = (
    Rule("no-tokens", "error", "a subject or target without tokens", functools.partial(_problems, "no-tokens")),
    Rule("too-long", "error", "more tokens than the model takes", functools.partial(_problems, "too-long")),
    Rule(
        "unusable",
        "error",
        "a request that cannot be prepared for other reasons",
        functools.partial(_problems, "unusable"),
    ),
    Rule("already-known", "error", "a new target that the model says already", _known),
    Rule("true-unknown", "warning", "an old target that the model does not say", _unknown_truths),
    KEY_RULE,
)
"""The rules that run a model."""
