"""Metrics of a model before and after edits: what they ask, collected once, asked in each state, and averaged."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from kedit_fast.errors import EvaluationError, InvalidArgumentError, RequestError
from kedit_fast.evaluation.asks import Answer, Ask, Generated
from kedit_fast.evaluation.contexts import Context, asked_in_context, context_of
from kedit_fast.evaluation.engine import answer_rows
from kedit_fast.evaluation.generation import end_tokens
from kedit_fast.evaluation.judge import Judge
from kedit_fast.evaluation.metric import Case, Derived, Fitting, Measured, Metric, Need, Scoring, State, Unit
from kedit_fast.evaluation.registry import PROMPTS, SCORINGS, select
from kedit_fast.evaluation.results import STATES, CaseScore, Evaluation, RecordScore, Result, measured, record_score
from kedit_fast.evaluation.rows import Row, rows_of
from kedit_fast.evaluation.stored import as_json, from_json, stored_answers
from kedit_fast.models.architectures import ArchSpec
from kedit_fast.models.view import ModelView
from kedit_fast.patches.patch import Patch, merge
from kedit_fast.requests.problems import OnError, check_on_error, require_no_problems
from kedit_fast.requests.prompts import PromptFormat
from kedit_fast.requests.reading import as_requests
from kedit_fast.requests.request import EditRequest
from kedit_fast.requests.spacing import AUTO, check_separator
from kedit_fast.support.torch_state import plain_torch

Average = Literal["record", "prompt"]
Source = Literal["requests", "groups", "texts", "choices"]
Place = tuple[State, Source, int]
"""A record, by its index, in a state."""
_NONE: dict[Source, str] = {
    "requests": "no request can be measured",
    "groups": "no requests share a group",
    "texts": "it needs texts (--texts)",
    "choices": "it needs multiple choice (--choices)",
}
"""Why a metric has no value where there are none of its records."""
_MISSING: dict[Need, str] = {
    "judge": "it needs a judge (--judge)",
    "memory": "it needs a memory that is attached to the model",
}
"""Why a metric has no value where what it needs was not given."""
_KINDS: dict[Source, str] = {"requests": "request", "groups": "group", "texts": "text", "choices": "item"}


class Evaluator:
    """Metrics of a model, state by state.

    Everything is checked when it is made: names of metrics, and every prompt and target as tokens. `measure` then asks
    the model, as it is at that moment, what all metrics need, each thing once; `result` averages.

    Args:
        model: a causal language model; nothing in it changes.
        tokenizer: its tokenizer.
        requests: as `Editor.edit` takes them.
        metrics: see `registry.select`.
        texts: for metrics over natural text.
        choices: for metrics over multiple choice.
        judge: a classifier of answers, for metrics of defense; without one they have no value.
        context: for the state "context", how the new fact stands in front of a prompt: "sentence", "triple", or a
            function of request and prompt; see `contexts.py`.
        prompt_format: what makes each prompt into the text that the model reads, for example `chat_format(tokenizer)`.
        target_separator: what stands between prompts and targets of requests that say "auto".
        spec: module names of an architecture that is not known.
        average: "record": the mean of each record first; "prompt": over all prompts alike; None: as each metric says.
        seed: of texts that are drawn; each prompt has draws of its own.
        folder: where answers are written as they come, so that a run that was killed goes on; see `stored.py`.
        on_error: "raise" at requests that cannot be measured, or "skip" them; they are then in `skipped`.
        progress: show a bar on stderr.

    Raises:
        RequestError: prompts that cannot be measured; it names all of them, by request.
        InvalidArgumentError: no such metric or mean.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        requests: Iterable[EditRequest | Mapping[str, Any]],
        metrics: str | Iterable[str] = "default",
        *,
        texts: Sequence[str] = (),
        choices: Sequence[Any] = (),
        judge: Judge | None = None,
        context: Context | str | None = None,
        prompt_format: PromptFormat | None = None,
        target_separator: str = AUTO,
        spec: ArchSpec | None = None,
        average: Average | None = None,
        seed: int = 0,
        folder: str | os.PathLike | None = None,
        on_error: OnError = "raise",
        progress: bool = False,
    ):
        check_on_error(on_error)
        if average not in (None, "record", "prompt"):
            raise InvalidArgumentError(f"average = {average!r}: choose record, prompt or None")
        check_separator(target_separator)
        self.model, self.tokenizer, self.spec = model, tokenizer, spec
        self.requests = list(as_requests(requests))
        self.metrics = select(metrics)
        self.average: Average | None = average
        self.progress = progress
        self._folder = folder
        self._judge = judge
        self._context = context_of(context)
        self._seed = seed
        self._settings = {
            "target_separator": target_separator,
            "prompt_format": prompt_format is not None,
            "seed": seed,
            **({} if judge is None else {"judge": judge.about}),
        }
        self._groups = _groups(self.requests)
        self._records: dict[Source, Sequence[Any]] = {
            "requests": self.requests,
            "groups": [
                tuple(self.requests[i] for i in group) for group in self._groups if _is_group(self.requests, group)
            ],
            "texts": tuple(texts),
            "choices": tuple(choices),
        }
        self._answers: dict[Place, Mapping[Ask, Answer]] = {}
        self._measured: set[tuple[State, Source]] = set()
        self.skipped: dict[int, str] = {}
        """Index of each request that cannot be measured -> why."""
        self._views: dict[Any, ModelView] = {}
        self._check(self._view_of(model), prompt_format, target_separator, on_error)

    @plain_torch()
    def _check(
        self, view: ModelView, prompt_format: PromptFormat | None, target_separator: str, on_error: OnError
    ) -> None:
        """Collect cases and asks, and make rows of them; raises RequestError that names all that cannot be measured."""
        self._cases: dict[str, list[tuple[Case, ...]]] = {}
        self._scorings: dict[str, Scoring] = {}
        self._asks: dict[tuple[str, str, bool], list[tuple[tuple[Ask, ...] | None, ...]]] = {}
        owners: dict[Ask, list[tuple[Source, int]]] = {}
        problems: dict[tuple[Source, int], str] = {}
        for metric in (metric for metric in self.metrics if isinstance(metric, Metric)):
            prompts = PROMPTS[metric.prompts]
            records = self._records[prompts.over]
            if metric.prompts not in self._cases:
                of_all = prompts.cases(records) if prompts.beside else [prompts.cases(record) for record in records]
                self._cases[metric.prompts] = list(of_all)
            if metric.scoring not in self._scorings:
                scoring = SCORINGS[metric.scoring]
                if not isinstance(scoring, Scoring):
                    scoring = scoring(Fitting(self.tokenizer, self._records["texts"], self._judge))
                self._scorings[metric.scoring] = scoring
            scoring = self._scorings[metric.scoring]
            has_context = self._context is not None and prompts.over in ("requests", "groups")
            for in_context in (False, True) if has_context else (False,):
                key = metric.prompts, metric.scoring, in_context
                if key in self._asks:
                    continue
                self._asks[key] = []
                for index, cases in enumerate(self._cases[metric.prompts]):
                    try:
                        asked = tuple(self._seeded(scoring.asks(case, self.tokenizer)) for case in cases)
                        if in_context:
                            asked = tuple(map(self._in_context, cases, asked))
                    except RequestError as error:
                        problems.setdefault((prompts.over, index), str(error))
                        asked = tuple(() for _ in cases)
                    self._asks[key].append(asked)
                    for ask in (ask for asks in asked if asks is not None for ask in asks):
                        owners.setdefault(ask, []).append((prompts.over, index))
        self._rows, unusable = rows_of(view, self.tokenizer, owners, prompt_format, target_separator)
        for ask, reason in unusable.items():
            for owner in owners[ask]:
                problems.setdefault(owner, reason)
        for group, reason in [(index, why) for (source, index), why in problems.items() if source == "groups"]:
            members = [indices for indices in self._groups if _is_group(self.requests, indices)][group]
            problems.update({("requests", index): reason for index in members if on_error == "skip"})
        order = list(_KINDS)
        problems = dict(sorted(problems.items(), key=lambda pair: (order.index(pair[0][0]), pair[0][1])))
        if on_error == "skip":
            self.skipped = {index: reason for (source, index), reason in problems.items() if source == "requests"}
            problems = {owner: reason for owner, reason in problems.items() if owner[0] in ("texts", "choices")}
        named = (f"{self._name(*owner)}: {reason}" for owner, reason in problems.items())
        require_no_problems(dict(enumerate(named)))

    def _view_of(self, model: torch.nn.Module) -> ModelView:
        """The view of a model; what it tries by short passes is tried once, not for each batch of a sequence."""
        key = model, tuple((p.device, p.dtype) for p in model.parameters())
        if key not in self._views:
            self._views = {**dict(list(self._views.items())[-1:]), key: ModelView(model, self.spec)}
        return self._views[key]

    def _seeded(self, asks: tuple[Ask, ...]) -> tuple[Ask, ...]:
        """The asks with the run's seed, where something is drawn."""
        return tuple(
            replace(ask, seed=self._seed) if isinstance(ask, Generated) and ask.top_k > 1 else ask for ask in asks
        )

    def _in_context(self, case: Case, asks: tuple[Ask, ...]) -> tuple[Ask, ...] | None:
        """The asks of a case with the new facts in front; None where one cannot be asked so."""
        assert self._context is not None
        facts = [record for record in _tuple_of(case.record) if isinstance(record, EditRequest)]
        group = facts[0].group if facts else None
        if case.probe is not None and case.probe.kind == "multi_hop" and group is not None:
            facts = [request for request in self.requests if request.group == group]
        asked = [asked_in_context(ask, facts, self._context, self.tokenizer) for ask in asks]
        there = tuple(ask for ask in asked if ask is not None)
        return there if len(there) == len(asks) else None

    def _name(self, source: Source, index: int) -> str:
        record = self._records[source][index]
        id = record[0].group if source == "groups" else getattr(record, "id", None)
        return f"{_KINDS[source]} {index + 1 if id is None else repr(id)}"

    @property
    def compared_states(self) -> frozenset[State]:
        """The states that some metric compares others with."""
        return frozenset(state for scoring in self._scorings.values() for state in scoring.states)

    @plain_torch()
    def measure(
        self, state: State = "final", requests: Sequence[int] | None = None, model: torch.nn.Module | None = None
    ) -> None:
        """Ask the model, as it is now, what all metrics need.

        Args:
            state: what to call it: "pre", "post", "final"; or "context", which puts the new fact in front. "post"
                measures the state "first" of groups, too.
            requests: indices, from 0, of the requests to measure, and nothing but requests; None for everything. For
                "post" they are those of the batch that was written last.
            model: another one of the same tokenizer, such as the unedited one; None for that of the evaluator.

        Raises:
            EvaluationError: the model gives no finite probabilities for a prompt, which is named.
        """
        if state not in STATES or state == "first":
            raise InvalidArgumentError(f"state {state!r}: choose pre, context, post or final")
        if state == "context" and self._context is None:
            raise InvalidArgumentError('the state "context" needs what puts facts in front of prompts: context=')
        if outside := [index for index in requests or () if not 0 <= index < len(self.requests)]:
            raise InvalidArgumentError(f"request {outside[0]} is out of range: there are {len(self.requests)}, from 0")
        view = self._view_of(self.model if model is None else model)
        chosen, asks = self._asked(state, requests)
        rows: dict[Ask, Row] = {ask: self._rows[ask] for ask in asks}
        bar = tqdm(
            total=len(rows), desc=f"evaluating ({state})", unit="ask", disable=not self.progress, leave=state != "post"
        )
        with bar, stored_answers(self._folder, view, end_tokens(view, self.tokenizer)) as store:
            try:
                answers = answer_rows(view, self.tokenizer, rows, bar.update, store)
            except EvaluationError as error:
                raise EvaluationError(f"state {state!r}: {error}") from None
        self._answers.update(dict.fromkeys(chosen, answers))
        self._measured.update(key[:2] for key in chosen)

    def recorded(self, state: State = "final", requests: Sequence[int] | None = None) -> list[Any]:
        """What the model has answered in the last call of `measure`, which had these arguments, for `recall`.

        JSON can hold it.
        """
        chosen, asks = self._asked(state, requests)
        return [as_json(self._answers[chosen[0]][ask]) for ask in asks]

    @plain_torch()
    def recall(self, recorded: Sequence[Any], state: State = "final", requests: Sequence[int] | None = None) -> None:
        """`measure` without the model, by what an evaluator like this one has recorded.

        Raises:
            EvaluationError: it is of other asks.
        """
        chosen, asks = self._asked(state, requests)
        if len(asks) != len(recorded):
            raise EvaluationError(f"{len(recorded)} answers were recorded, and {len(asks)} are asked for")
        head = self._view_of(self.model).head
        answers = {ask: from_json(values, head) for ask, values in zip(asks, recorded, strict=True)}
        self._answers.update(dict.fromkeys(chosen, answers))
        self._measured.update(key[:2] for key in chosen)

    def scores(self, metric: str, state: State, requests: Iterable[int]) -> dict[int, float]:
        """Index of each of some requests -> its score in a metric over requests, where it was measured in a state."""
        chosen = next((one for one in self.metrics if isinstance(one, Metric) and one.id == metric), None)
        scores: dict[int, float] = {}
        if chosen is not None and PROMPTS[chosen.prompts].over == "requests":
            for index in requests:
                record = self._record(chosen, "requests", (index,), [state])
                if state in record.scores:
                    scores[index] = record.scores[state]
        return scores

    def _asked(self, state: State, requests: Sequence[int] | None) -> tuple[list[Place], dict[Ask, None]]:
        """The records that a call of `measure` is about, and what it asks."""
        batch = range(len(self.requests)) if requests is None else requests
        chosen = self._chosen(state, [index for index in batch if index not in self.skipped], requests is None)
        asks = dict.fromkeys(
            ask
            for (prompts, _, in_context), by_record in self._asks.items()
            if in_context == (state == "context")
            for _, source, index in chosen
            if source == PROMPTS[prompts].over
            for case_asks in by_record[index]
            for ask in case_asks or ()
        )
        return chosen, asks

    def _chosen(self, state: State, requests: Sequence[int], everything: bool) -> list[Place]:
        """The records that a call measures, each with its state."""
        chosen: list[Place] = [(state, "requests", index) for index in requests]
        batch, number = set(requests), 0
        for group in self._groups:
            begins, ends = group[0] in batch, group[-1] in batch
            if state == "post" and begins:
                chosen.extend(("first", "requests", index) for index in group)
            if _is_group(self.requests, group):
                if begins and state == "post":
                    chosen.append(("first", "groups", number))
                if ends and (state == "post" or batch.issuperset(group)):
                    chosen.append((state, "groups", number))
                number += 1
        if everything and state != "context":
            chosen.extend((state, "texts", index) for index in range(len(self._records["texts"])))
            chosen.extend((state, "choices", index) for index in range(len(self._records["choices"])))
        return chosen

    def answers(self, state: State) -> dict[Ask, Answer]:
        """What the model answered in a state, by ask; where requests were asked the same at several times, the last."""
        parts = {id(part): part for place, part in self._answers.items() if place[0] == state}
        return {ask: known for part in parts.values() for ask, known in part.items()}

    def result(self, requests: Iterable[int] | None = None) -> Evaluation:
        """The metrics of all states that were measured.

        Args:
            requests: indices, from 0, of the requests that count, in every state; None for all that were measured. A
                group counts where all its requests do.
        """
        if requests is not None:
            return self._restricted_to(set(requests)).result()
        results: dict[str, Result] = {}
        scores: dict[str, tuple[RecordScore, ...]] = {}
        for metric in (metric for metric in self.metrics if isinstance(metric, Metric)):
            results[metric.id], scores[metric.id] = self._of(metric)
        pending = [metric for metric in self.metrics if isinstance(metric, Derived)]
        while pending:
            ready = [metric for metric in pending if all(part in results for part in metric.of)]
            if not ready:
                raise InvalidArgumentError(f"{pending[0].id} is derived from itself")
            for metric in ready:
                results[metric.id] = _derived(metric, results)
            pending = [metric for metric in pending if metric.id not in results]
        context = {
            "model": getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__,
            **{source: len(records) for source, records in self._records.items()},
            "average": self.average or "as each metric says",
            **self._settings,
        }
        ordered = {metric.id: results[metric.id] for metric in self.metrics}
        return Evaluation(ordered, scores, context, dict(self.skipped))

    def _restricted_to(self, requests: set[int]) -> Evaluator:
        """This evaluator without the answers of other requests."""
        groups = [indices for indices in self._groups if _is_group(self.requests, indices)]

        def counts(source: Source, index: int) -> bool:
            if source == "groups":
                return requests.issuperset(groups[index])
            return source != "requests" or index in requests

        restricted = copy.copy(self)
        restricted._answers = {key: known for key, known in self._answers.items() if counts(*key[1:])}
        return restricted

    def _of(self, metric: Metric) -> tuple[Result, tuple[RecordScore, ...]]:
        source: Source = PROMPTS[metric.prompts].over
        missing = [state for state in self._scorings[metric.scoring].states if (state, source) not in self._measured]
        states: list[State] = [state for state in STATES if (state, source) in self._measured]
        states = [] if missing else states
        unit = self._unit(metric)
        together = self._scored_together(source, unit)
        if (prepare := self._scorings[metric.scoring].together) is not None:
            every = (g for indices in together for i in indices for g in self._given(metric, source, i, states))
            prepare([(case, given) for case, _, by_state in every for given in by_state.values()])
        records = [self._record(metric, source, indices, states) for indices in together]
        result: dict[State, Measured] = {}
        for state in states:
            counting = [
                (record.scores[state], sum(c.weights[state] for c in record.cases if state in c.scores))
                for record in records
                if state in record.scores
            ]
            cases = sum(state in c.scores for record in records if state in record.scores for c in record.cases)
            result[state] = measured(counting, cases, unit, metric.scale, share=metric.share)
        between = ": `edit` measures it between batches" if missing and missing[0] in ("first", "post") else ""
        if not any(index not in self.skipped or source != "requests" for index in range(len(self._records[source]))):
            reason = _NONE[source]
        else:
            reason = f"it compares with the state {missing[0]!r}, which was not measured{between}" if missing else ""
        lacks = metric.needs == "memory" or (metric.needs == "judge" and self._judge is None)
        if lacks and not any(one.records for one in result.values()):
            reason = _MISSING[metric.needs]
        return Result(metric, result, unit, reason), tuple(r for r in records if r.scores)

    def _unit(self, metric: Metric) -> Unit:
        if self.average == "prompt":
            return "prompt"
        return "request" if self.average == "record" and metric.unit == "prompt" else metric.unit

    def _scored_together(self, source: Source, unit: Unit) -> list[tuple[int, ...]]:
        """Indices of the records that have one score."""
        if unit == "group" and source == "requests":
            return self._groups
        return [(index,) for index in range(len(self._records[source]))]

    def _record(self, metric: Metric, source: Source, indices: Sequence[int], states: Sequence[State]) -> RecordScore:
        cases = [one for index in indices for one in self._case_scores(metric, source, index, states)]
        scores: dict[State, float] = {}
        for state in states:
            counting = [(c.case.name, c.scores[state], c.weights[state]) for c in cases if state in c.scores]
            if counting and all((state, source, index) in self._answers for index in indices):
                scores[state] = record_score(metric.within, counting)[0]
        first = self._records[source][indices[0]]
        if source == "groups":
            id, label = first[0].group, ""
        else:
            id, label = getattr(first, "id", None), first.label if isinstance(first, EditRequest) else ""
            id = first.group if len(indices) > 1 else id
        return RecordScore(indices[0] + 1, label if id is None else str(id), scores, tuple(cases))

    def _case_scores(self, metric: Metric, source: Source, index: int, states: Sequence[State]) -> Iterator[CaseScore]:
        scoring = self._scorings[metric.scoring]
        for case, answers, by_state in self._given(metric, source, index, states):
            scores: dict[State, float] = {}
            weights: dict[State, float] = {}
            for state, given in by_state.items():
                score = scoring.score(case, given)
                if score is not None:
                    scores[state] = float(score)
                    weights[state] = 1.0 if scoring.weight is None else float(scoring.weight(case, given))
            yield CaseScore(case, scores, answers, weights)

    def _given(
        self, metric: Metric, source: Source, index: int, states: Sequence[State]
    ) -> Iterator[tuple[Case, dict[str, tuple[Answer, ...]], dict[State, dict[str, tuple[Answer, ...]]]]]:
        """Each case of a record, its answers by state, and what a score of each state is made from."""
        compared = self._scorings[metric.scoring].states
        for place, case in enumerate(self._cases[metric.prompts][index]):
            answers: dict[str, tuple[Answer, ...]] = {}
            for state in STATES:
                if (known := self._answers.get((state, source, index))) is not None:
                    asks = self._asks[metric.prompts, metric.scoring, state == "context"][index][place]
                    if asks is not None:
                        answers[state] = tuple(known[ask] for ask in asks)
            yield (
                case,
                answers,
                {
                    state: {"now": answers[state], **{other: answers[other] for other in compared}}
                    for state in states
                    if state in answers and all(other in answers for other in compared)
                },
            )


def _groups(requests: Sequence[EditRequest]) -> list[tuple[int, ...]]:
    """Indices of the requests of each group, in order; a request without a group is one by itself."""
    groups: dict[Any, list[int]] = {}
    for index, request in enumerate(requests):
        name = request.group
        groups.setdefault(("request", index) if name is None else ("group", name), []).append(index)
    return [tuple(indices) for indices in groups.values()]


def _tuple_of(record: Any) -> tuple[Any, ...]:
    return record if isinstance(record, tuple) else (record,)


def _is_group(requests: Sequence[EditRequest], indices: Sequence[int]) -> bool:
    return requests[indices[0]].group is not None


def _derived(metric: Derived, results: Mapping[str, Result]) -> Result:
    states: dict[State, Measured] = {}
    for state in STATES:
        parts = [results[name].states.get(state) for name in metric.of]
        if any(part is None for part in parts):
            continue
        there = [part for part in parts if part is not None]
        values = [part.value for part in there if part.value is not None]
        value = metric.combine(tuple(values)) * metric.scale if len(values) == len(parts) else None
        records = min((part.records for part in there), default=0)
        states[state] = Measured(value, records, sum(part.prompts for part in there), None)
    return Result(metric, states, None)


def evaluate(
    model: torch.nn.Module,
    tokenizer: Any,
    requests: Iterable[EditRequest | Mapping[str, Any]],
    metrics: str | Iterable[str] = "default",
    *,
    base: torch.nn.Module | None = None,
    patches: Sequence[Patch | str | os.PathLike] = (),
    texts: Sequence[str] = (),
    choices: Sequence[Any] = (),
    judge: Judge | None = None,
    context: Context | str | None = None,
    prompt_format: PromptFormat | None = None,
    target_separator: str = AUTO,
    spec: ArchSpec | None = None,
    average: Average | None = None,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    on_error: OnError = "raise",
    progress: bool = False,
) -> Evaluation:
    """Measure what edits did to a model: each metric before and after.

    Args:
        model: the edited model; with `patches`, the unedited one, which has them for as long as it is measured.
        tokenizer: its tokenizer.
        requests, metrics, texts, choices, judge, context, prompt_format, target_separator, spec, average, seed, folder,
            on_error, progress: see `Evaluator`.
        base: the unedited model; None: there are no values of before, unless `patches` are given.
        patches: patches of the model, or their files, in the order they were made.

    Returns:
        `Evaluation`: of `base`, or the model without its patches, as "pre"; of the edited model as "final"; with
        `context`, of the unedited one with the new facts in front of the prompts as "context".

    Raises:
        RequestError: prompts that cannot be measured; nothing has run.
        PatchError: patches of another model, or that do not follow each other; nothing has run.
        EvaluationError: the model gives no finite probabilities for a prompt, which is named.

    Example:
        >>> editor = Editor(model, tokenizer, "memit", statistics=statistics, hparams={"v_num_grad_steps": 10})
        >>> _ = editor.edit(requests)
        >>> patch = editor.patch()
        >>> editor.restore()
        >>> measured = evaluate(model, tokenizer, requests, "cf.accuracy,ee.token_accuracy", patches=[patch])
        >>> measured.value("cf.accuracy/rewrite", "pre")  # no new answer is there before the edits
        0.0
        >>> measured.value("cf.accuracy/rewrite") > 50
        True
        >>> str(measured).splitlines()[0].split()
        ['metric', 'pre', 'final', '95', '%', 'n']
    """
    if base is not None and len(patches):
        raise InvalidArgumentError("give the unedited model as base, or patches of the model, not both")
    evaluator = Evaluator(
        model,
        tokenizer,
        requests,
        metrics,
        texts=texts,
        choices=choices,
        judge=judge,
        context=context,
        prompt_format=prompt_format,
        target_separator=target_separator,
        spec=spec,
        average=average,
        seed=seed,
        folder=folder,
        on_error=on_error,
        progress=progress,
    )
    prepared = None
    if len(patches):
        loaded = [patch if isinstance(patch, Patch) else Patch.load(patch) for patch in patches]
        prepared = (loaded[0] if len(loaded) == 1 else merge(loaded)).prepare(model)
    unedited = model if prepared is not None else base
    if unedited is not None:
        evaluator.measure("pre", model=unedited)
    if context is not None:
        evaluator.measure("context", model=unedited)
    if prepared is None:
        evaluator.measure("final")
    else:
        applied = prepared.swap_()
        try:
            evaluator.measure("final")
        finally:
            applied.revert_()
    return evaluator.result()
