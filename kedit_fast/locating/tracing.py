"""Causal tracing: which states, restored into a run with noise at the subject, bring the model's answer back.

Noise at the embeddings of a prompt's subject makes the model forget what it says of it. Then the output of one block,
or of the MLPs or attentions of a window of layers, at one token is put back to what it was without noise, and the
probability of the answer is read: one number for each token and layer. What the published loop does in a pass of all
tokens for each cell is done here for all cells together (`models.restoring`), with the same noise, so the numbers are
the same.

Source: Meng et al. 2022, arXiv 2202.05262, section 2; their experiments/causal_trace.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy
import torch

from kedit_fast.errors import EvaluationError, InvalidArgumentError
from kedit_fast.locating.traced_prompts import (
    Expected,
    TracedPrompt,
    as_expected,
    prompts_of,
    token_text,
    usable_prompts,
)
from kedit_fast.models.forward import (
    Site,
    capture,
    evaluating,
    hidden_of,
    last_states,
    pad,
    unknown_token,
    with_hidden,
)
from kedit_fast.models.head import sample_rows
from kedit_fast.models.patching import output_hooks
from kedit_fast.models.restoring import (
    NoisyRuns,
    Restoration,
    RestoredKind,
    Units,
    record_runs,
    require_sites,
    way_of,
)
from kedit_fast.models.view import ModelView, view_without_memory
from kedit_fast.requests.problems import OnError, check_on_error
from kedit_fast.requests.prompts import PromptFormat
from kedit_fast.requests.request import EditRequest
from kedit_fast.support.intervals import bootstrap_columns
from kedit_fast.support.torch_state import plain_torch

KINDS: tuple[RestoredKind, ...] = get_args(RestoredKind)
WINDOW, SAMPLES, SEED, FACTOR = 10, 10, 1, 3.0
"""As published: layers of a window of MLPs or attentions, samples of noise, their seed, standard deviations."""
BATCH_TOKENS = 4096
"""Tokens that one pass runs in a block, where a prompt does not need more."""
GROUPS = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
"""What averages group tokens as; each token is in one group."""


@dataclass(frozen=True)
class Trace:
    """The probability of a prompt's answer with noise at the subject and one state restored, for each cell."""

    kind: RestoredKind
    """Which outputs are restored: of a block, or of MLPs or attentions."""
    window: int
    """Restored layers around the cell's own: [layer - window // 2, layer + ceil(window / 2)), cut at the ends."""
    site: str
    """The restored modules by their path, and where their output goes."""
    probabilities: torch.Tensor
    """[T, L] float64, mean over the samples of noise, by token and layer; on the CPU."""
    low: float
    """The answer's probability with noise and nothing restored."""
    high: float
    """The answer's probability without noise."""
    subject: tuple[int, int]
    """Index of the subject's first token, and of the one after its last."""
    tokens: tuple[str, ...]
    """[T] the prompt's tokens as text."""
    answer: int
    """The token whose probability is read."""
    answer_text: str
    """The answer as text."""
    label: str
    """How messages and pictures call the prompt."""
    noise: float
    """Standard deviation of the noise at each entry of an embedding."""

    @property
    def effects(self) -> torch.Tensor:
        """[T, L] indirect effects: the probability with the cell restored minus the one with nothing restored."""
        return self.probabilities - self.low

    @property
    def total_effect(self) -> float:
        """What the noise takes away: the probability without noise minus the one with it."""
        return self.high - self.low


@dataclass(frozen=True)
class AverageEffects:
    """Indirect effects, averaged over prompts by token group and layer."""

    kind: RestoredKind
    """Which outputs are restored."""
    window: int
    """Restored layers around each; see `Trace.window`."""
    site: str
    """The restored modules; see `Trace.site`."""
    groups: tuple[str, ...]
    """[G] names of the token groups; see `GROUPS`."""
    mean: torch.Tensor
    """[G, L] float64; NaN where no prompt has such a token."""
    low: torch.Tensor
    """[G, L] lower end of the 95 % interval: a bootstrap over prompts."""
    high: torch.Tensor
    """[G, L] upper end."""
    counts: tuple[int, ...]
    """[G] prompts that have such a token."""
    total: tuple[float, float, float]
    """Mean of the total effect, and its interval."""
    count: int
    """Prompts."""


@dataclass(frozen=True)
class LikelyLayers:
    """The layers that averages speak for."""

    layers: tuple[int, ...]
    """Adjacent layers around the peak; empty where the peak's interval reaches 0."""
    peak: int
    """The layer of the largest mean effect."""
    kind: RestoredKind
    """Which outputs were restored."""
    group: str
    """At which tokens."""
    effect: float
    """The mean effect there."""
    interval: tuple[float, float]
    """Its 95 % interval."""


def subject_noise(
    model: Any, tokenizer: Any, subjects: Iterable[str], factor: float = FACTOR, spec: Any = None
) -> float:
    """`factor` standard deviations of all entries of the embeddings of all tokens of subjects, each tokenized alone.

    Special tokens that the tokenizer adds to a text count, too, and a subject that is named twice counts twice.

    Args:
        model: a causal language model, or its ModelView.
        tokenizer: of the model.
        subjects: texts.
        factor: how many standard deviations.
        spec: the module names of an architecture that is not listed.

    Raises:
        InvalidArgumentError: no subject, one entry of an embedding, or embeddings that are not finite.

    Source: collect_embedding_std in the released causal_trace.py.
    """
    view = model if isinstance(model, ModelView) else ModelView(model, spec)
    rows = [list(tokenizer(subject)["input_ids"]) for subject in subjects]
    ids = [token for row in rows for token in row]
    if not ids:
        raise InvalidArgumentError("there are no subjects to take a noise level from: pass `noise` as a number")
    if problem := unknown_token(tokenizer, ids, view.vocabulary):
        raise InvalidArgumentError(problem)
    return _noise_level(view, ids, factor)


@plain_torch()
@torch.no_grad()
def _noise_level(view: ModelView, ids: Sequence[int], factor: float) -> float:
    with evaluating(view):
        embedded = view.model.get_input_embeddings()(torch.tensor([list(ids)], device=view.device)).double()
    level = factor * float(embedded.std())
    if not math.isfinite(level) or level <= 0:
        raise InvalidArgumentError(
            f"the embeddings of the subjects give a noise level of {level}: pass `noise` as a positive number"
        )
    return level


@plain_torch()
@torch.no_grad()
def trace(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest | TracedPrompt],
    *,
    kinds: Sequence[RestoredKind] = KINDS,
    window: int = WINDOW,
    samples: int = SAMPLES,
    noise: float | None = None,
    seed: int = SEED,
    expect: Expected = "any",
    spec: Any = None,
    prompt_format: PromptFormat | None = None,
    on_error: OnError = "raise",
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], Any] | None = None,
) -> list[Trace]:
    """Trace prompts: p(answer) with noise at the subject and each state restored in turn, [T, L] for each kind.

    The noise of every prompt is `noise` times numpy's RandomState(seed).randn(samples, tokens of the subject, d), the
    same in all cells: it depends on no other prompt.

    Args:
        model: a causal language model of transformers, or its ModelView; as it was when the call ends.
        tokenizer: of the model; None for prompts that are token ids already (`noise` is to be given then).
        requests: edit requests with a subject, or prompts from `traced_prompts`.
        kinds: what to restore: outputs of a "block", or of "mlp" or "attention" modules of a window of layers.
        window: layers of a window; a block is restored alone.
        samples: of noise.
        noise: standard deviation at each entry of an embedding; None for `subject_noise` of the requests' subjects.
        seed: of the noise.
        expect: "true" or "new" for requests whose model answers with the first token of that target alone.
        spec: the module names of an architecture that is not listed.
        prompt_format: from a prompt to the text that the model reads.
        on_error: "raise" where a request cannot be traced or is not answered as expected, or "skip".
        batch_tokens: tokens that run together in a block: memory against speed.
        progress: called with the number of prompts that are done since the last call.

    Returns:
        a Trace for each prompt and kind, in the order of the prompts.

    Raises:
        RequestError: naming each request that cannot be traced: see `traced_prompts`; or whose answer the model does
            not give.
        InvalidArgumentError: an unknown kind, a window, number of samples or noise that is not positive and finite.
        UnsupportedModelError: outputs of a kind that cannot be seen in each layer, or a memory attached to the model.
        EvaluationError: a prompt for which the model gives no finite probability.

    Cost: a pass over samples + 1 rows; then each block once for all cells of the layers below it, from the restored
        token on; and the head at samples rows a cell. The published loop runs samples + 1 whole rows and the head at
        all of their tokens for each cell.

    Example:
        >>> import kedit_fast.demo as demo
        >>> model, tokenizer = demo.load()
        >>> first, = trace(model, tokenizer, demo.requests(1), kinds=("block",))
        >>> first.answer_text, round(first.high, 2), tuple(first.probabilities.shape)
        (' c', 0.99, (8, 6))
        >>> bool(first.effects[first.subject[1] - 1, 0] > 0.5)  # the first block at the subject's last token
        True
    """
    _check_arguments(kinds, window, samples, noise, seed, expect, batch_tokens)
    check_on_error(on_error)
    view = view_without_memory(model, spec)
    require_sites(view, kinds)
    prompts: list[TracedPrompt | str] = prompts_of(tokenizer, requests, prompt_format, view.max_length, view.vocabulary)
    if expect != "any":
        answers = _model_answers(view, [prompt for prompt in prompts if isinstance(prompt, TracedPrompt)], batch_tokens)
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, TracedPrompt):
                prompts[i] = as_expected(tokenizer, requests[i], i, prompt, next(answers), expect, prompt_format)
    usable = [prompt for prompt in usable_prompts(prompts, on_error) if prompt is not None]
    if noise is None and usable:
        noise = _level_of(view, tokenizer, requests, prompts)
    traces: dict[int, list[Trace]] = {}
    settings = _Settings(tuple(kinds), window, samples, noise or 0.0, seed, batch_tokens)
    with evaluating(view):
        way_of(view)  # tried before anything is measured
        for group in _groups(usable, settings, view.num_layers):
            results = _traced(view, tokenizer, [usable[i] for i in group], settings)
            traces |= dict(zip(group, results, strict=True))
            if progress is not None:
                progress(len(group))
    return [one for i in range(len(usable)) for one in traces[i]]


def average_effects(traces: Sequence[Trace], seed: int = 0) -> AverageEffects:
    """Indirect effects of traces of one kind, averaged over prompts by token group and layer, with intervals.

    A prompt's tokens of one group are averaged first, so each prompt counts once. The subject's tokens are its first,
    middle and last one; a subject of one token has a last one alone, of two no middle. Of the tokens behind it, the
    prompt's last one is "last token", the one next to the subject "first subsequent token". Tokens before the subject
    are in no group: their effect is 0.

    Args:
        traces: of one kind and window, and of models with as many layers.
        seed: of the bootstrap over prompts.

    Raises:
        InvalidArgumentError: no traces, or of several kinds, windows or numbers of layers.

    Example:
        >>> import kedit_fast.demo as demo
        >>> averages = average_effects(trace(*demo.load(), demo.requests(4), kinds=("mlp",), window=2))
        >>> averages.groups[2], averages.count, tuple(averages.mean.shape)
        ('last subject token', 4, (6, 6))
        >>> likely_layers(averages).layers
        (0, 1)
    """
    if not traces:
        raise InvalidArgumentError("there are no traces to average")
    shapes = {(one.kind, one.window, one.probabilities.shape[1], one.site) for one in traces}
    if len(shapes) > 1:
        named = "; ".join(f"{kind}, window {window}, {layers} layers" for kind, window, layers, _ in sorted(shapes))
        raise InvalidArgumentError(f"traces of one kind, window and model are averaged together; got {named}")
    layers = traces[0].probabilities.shape[1]
    values = torch.full((len(traces), len(GROUPS), layers), float("nan"), dtype=torch.float64)
    for i, one in enumerate(traces):
        for g, places in enumerate(_token_groups(len(one.tokens), one.subject)):
            if places:
                values[i, g] = one.effects[places].mean(0)
    low, high = bootstrap_columns(values, seed)
    totals = torch.tensor([one.total_effect for one in traces], dtype=torch.float64)
    ends = bootstrap_columns(totals, seed)
    return AverageEffects(
        kind=traces[0].kind,
        window=traces[0].window,
        site=traces[0].site,
        groups=GROUPS,
        mean=values.nanmean(0),
        low=low,
        high=high,
        counts=tuple(int(n) for n in (~values[:, :, 0].isnan()).sum(0)),
        total=(float(totals.mean()), float(ends[0]), float(ends[1])),
        count=len(traces),
    )


def likely_layers(averages: AverageEffects, group: str = "last subject token") -> LikelyLayers:
    """The layers that averages speak for: the peak at a token group, and neighbors that cannot be told from it.

    These are the adjacent layers around the layer of the largest mean whose interval ends at or above the lower end of
    the peak's. No layer is named where the peak's interval reaches 0. For edits of MLPs, pass averages of the kind
    "mlp"; a wide window smooths them, so a layer of it is the middle of the layers that were restored together.

    Raises:
        InvalidArgumentError: an unknown group, or one that no prompt has.

    Example:
        >>> import kedit_fast.demo as demo
        >>> averages = average_effects(trace(*demo.load(), demo.requests(4), kinds=("mlp",), window=1))
        >>> likely = likely_layers(averages)
        >>> likely.peak in likely.layers
        True
    """
    if group not in averages.groups:
        raise InvalidArgumentError(f"unknown token group {group!r}: choose one of {', '.join(averages.groups)}")
    g = averages.groups.index(group)
    if not averages.counts[g]:
        raise InvalidArgumentError(f"no prompt has a token of the group {group!r}")
    mean, low, high = (part[g].tolist() for part in (averages.mean, averages.low, averages.high))
    peak = max(range(len(mean)), key=mean.__getitem__)
    begin, end = peak, peak + 1
    while begin > 0 and high[begin - 1] >= low[peak]:
        begin -= 1
    while end < len(mean) and high[end] >= low[peak]:
        end += 1
    layers = tuple(range(begin, end)) if low[peak] > 0 else ()
    return LikelyLayers(layers, peak, averages.kind, group, mean[peak], (low[peak], high[peak]))


# Requests ------------------------------------------------------------------------------------------------------------


def _check_arguments(
    kinds: Sequence[str], window: int, samples: int, noise: float | None, seed: int, expect: str, batch_tokens: int
) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if isinstance(kinds, str) or not kinds or unknown or len(set(kinds)) < len(kinds):
        raise InvalidArgumentError(f"kinds must be some of {', '.join(KINDS)}, each once; got {kinds!r}")
    for name, number, least in (("window", window, 1), ("samples", samples, 1), ("batch_tokens", batch_tokens, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise InvalidArgumentError(f"{name} must be a whole number of at least {least}; got {number!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InvalidArgumentError(f"seed must be a whole number from 0 to 2**32 - 1; got {seed!r}")
    if noise is not None and not (isinstance(noise, int | float) and math.isfinite(noise) and noise > 0):
        raise InvalidArgumentError(f"noise must be a positive, finite number or None; got {noise!r}")
    if expect not in get_args(Expected):
        raise InvalidArgumentError(f"expect = {expect!r}: choose any, true or new")


def _model_answers(view: ModelView, prompts: Sequence[TracedPrompt], batch_tokens: int) -> Iterator[int]:
    """The most probable token behind each prompt."""
    answers: list[int] = []
    with evaluating(view):
        for part in _parts([len(prompt.ids) for prompt in prompts], batch_tokens):
            batch = pad([prompts[i].ids for i in part], view.device)
            states = last_states(view, batch)
            ends = torch.tensor([len(prompts[i].ids) - 1 for i in part], device=states.device)
            states = states[torch.arange(len(part), device=states.device), ends].to(view.head.device)
            zeros = torch.zeros(len(part), dtype=torch.int64, device=states.device)
            top = view.head.target_log_probs(states, zeros, return_top1=True).top1
            assert top is not None
            answers += top.tolist()
    return iter(answers)


def _parts(sizes: Sequence[int], most: int) -> Iterable[list[int]]:
    """Consecutive indices whose sizes add up to `most` at most, or single ones."""
    part, total = [], 0
    for i, size in enumerate(sizes):
        if part and total + size > most:
            yield part
            part, total = [], 0
        part.append(i)
        total += size
    if part:
        yield part


def _level_of(
    view: ModelView, tokenizer: Any, requests: Sequence[EditRequest | TracedPrompt], prompts: Sequence[Any]
) -> float:
    """The noise level of the subjects of all prompts that can be traced."""
    ids: list[int] = []
    for request, prompt in zip(requests, prompts, strict=True):
        if isinstance(prompt, str):
            continue
        if isinstance(request, TracedPrompt):
            ids += prompt.ids[prompt.subject[0] : prompt.subject[1]]
        else:
            ids += tokenizer(request.subject)["input_ids"]
    return _noise_level(view, ids, FACTOR)


# Passes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """Arguments of `trace`."""

    kinds: tuple[RestoredKind, ...]
    """What to restore."""
    window: int
    """Layers of a window."""
    samples: int
    """Of noise."""
    noise: float
    """Standard deviation of the noise."""
    seed: int
    """Of the noise."""
    batch_tokens: int
    """Tokens that run together in a block."""


@dataclass(frozen=True)
class _Cells:
    """Which restoration each layer's cells of a kind are."""

    restorations: tuple[Restoration, ...]
    """All kinds', none twice."""
    of_layer: dict[RestoredKind, tuple[int | None, ...]]
    """By kind and layer, the index of a restoration; None for the last block, of which the result is known."""


def _cells(settings: _Settings, layers: int) -> _Cells:
    places: dict[Restoration, int] = {}
    of_layer: dict[RestoredKind, tuple[int | None, ...]] = {}
    for kind in settings.kinds:
        indices: list[int | None] = []
        for layer in range(layers):
            first, end = layer, layer + 1
            if kind != "block":
                first = max(0, layer - settings.window // 2)
                end = min(layers, layer + (settings.window + 1) // 2)
            elif layer == layers - 1:
                indices.append(None)
                continue
            indices.append(places.setdefault(Restoration(kind, first, end), len(places)))
        of_layer[kind] = tuple(indices)
    return _Cells(tuple(places), of_layer)


def _groups(prompts: Sequence[TracedPrompt], settings: _Settings, layers: int) -> Iterable[list[int]]:
    """Prompts of about one length that run together."""
    rows = settings.samples * max(1, len(_cells(settings, layers).restorations))
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    tails = [len(prompts[i].ids) - prompts[i].subject[0] for i in order]
    sizes = [rows * tail * (tail + 1) // 2 for tail in tails]
    return ([order[k] for k in part] for part in _parts(sizes, settings.batch_tokens))


def _noise(prompt: TracedPrompt, width: int, settings: _Settings) -> torch.Tensor:
    """[samples, tokens of the subject, width] float64, the published draws."""
    begin, end = prompt.subject
    drawn = numpy.random.RandomState(settings.seed).randn(settings.samples, end - begin, width)
    return settings.noise * torch.from_numpy(drawn)


def _traced(view: ModelView, tokenizer: Any, prompts: Sequence[TracedPrompt], settings: _Settings) -> list[list[Trace]]:
    """The traces of prompts that run together: of each prompt one a kind."""
    embedding = view.model.get_input_embeddings()
    width = embedding(torch.tensor([[prompts[0].ids[0]]], device=view.device)).shape[-1]
    cells = _cells(settings, view.num_layers)
    runs = record_runs(
        view,
        [prompt.ids for prompt in prompts],
        [prompt.subject for prompt in prompts],
        [_noise(prompt, width, settings) for prompt in prompts],
        settings.kinds,
    )
    answers, ends = _ends(view, runs, prompts)
    low, high = ends[:, 1:].mean(1), ends[:, 0]
    # By restoration, prompt and position; before the subject nothing differs from the noisy run.
    length = runs.ids.shape[1]
    restored = low[None, :, None].repeat(len(cells.restorations), 1, length)
    _restore_all(view, runs, prompts, cells.restorations, answers, restored, settings.batch_tokens)
    traces = []
    for p, prompt in enumerate(prompts):
        count = len(prompt.ids)
        of_prompt = []
        for kind in settings.kinds:
            columns = []
            for index in cells.of_layer[kind]:
                if index is None:  # the last block: the answer's own token has the clean run's states, others none
                    column = low[p].repeat(count)
                    column[-1] = high[p]
                else:
                    column = restored[index, p, :count]
                columns.append(column)
            of_prompt.append(
                Trace(
                    kind=kind,
                    window=1 if kind == "block" else settings.window,
                    site=view.once(_sites)[kind],
                    probabilities=torch.stack(columns, 1),
                    low=float(low[p]),
                    high=float(high[p]),
                    subject=prompt.subject,
                    tokens=tuple(token_text(tokenizer, token) for token in prompt.ids),
                    answer=int(answers[p]),
                    answer_text=token_text(tokenizer, int(answers[p])),
                    label=prompt.label,
                    noise=settings.noise,
                )
            )
            _require_finite(of_prompt[-1])
        traces.append(of_prompt)
    return traces


def _ends(view: ModelView, runs: NoisyRuns, prompts: Sequence[TracedPrompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """The answers [P]; and their probabilities [P, S + 1] float64 without and with noise. Both on the CPU."""
    states = runs.last.to(view.head.device)
    given = torch.tensor([0 if prompt.answer is None else prompt.answer for prompt in prompts], device=states.device)
    top = view.head.target_log_probs(states[:, 0].contiguous(), given, return_top1=True).top1
    assert top is not None
    is_given = torch.tensor([prompt.answer is not None for prompt in prompts], device=states.device)
    answers = torch.where(is_given, given, top)
    copies = states.shape[1]
    log_probs = view.head.target_log_probs(states.flatten(0, 1), answers.repeat_interleave(copies)).log_prob
    return answers.cpu(), log_probs.double().exp().view(-1, copies).cpu()


def _restore_all(
    view: ModelView,
    runs: NoisyRuns,
    prompts: Sequence[TracedPrompt],
    restorations: Sequence[Restoration],
    answers: torch.Tensor,
    restored: torch.Tensor,
    batch_tokens: int,
) -> None:
    """Write the mean probabilities with restored states into `restored` [Q, P, T] from each subject on."""
    if not restorations:
        return
    every = [
        (p, t, s)
        for p, prompt in enumerate(prompts)
        for t in range(prompt.subject[0], len(prompt.ids))
        for s in range(runs.samples)
    ]
    units = Units(*torch.tensor(every).T)
    device = runs.lengths.device
    tokens = runs.unit_tokens(units.position.to(device), units.prompt.to(device)).tolist()
    results = []
    for part in _parts([size * len(restorations) for size in tokens], batch_tokens):
        chosen = units[part[0] : part[-1] + 1]
        states = runs.restore(restorations, chosen).to(view.head.device)
        targets = answers[chosen.prompt].repeat(len(restorations)).to(states.device)
        log_probs = view.head.target_log_probs(states.flatten(0, 1), targets).log_prob
        results.append(log_probs.double().exp().view(len(restorations), -1))
    means = torch.cat(results, 1).cpu().unflatten(1, (-1, runs.samples)).mean(2)
    places = units.prompt[:: runs.samples], units.position[:: runs.samples]
    restored[:, places[0], places[1]] = means


def _require_finite(one: Trace) -> None:
    if not (bool(torch.isfinite(one.probabilities).all()) and math.isfinite(one.low) and math.isfinite(one.high)):
        raise EvaluationError(
            f"the model gives no finite probability of {one.answer_text!r} behind {one.label!r}: its weights or states "
            "are not finite"
        )


def _token_groups(count: int, subject: tuple[int, int]) -> list[list[int]]:
    """The tokens of each of `GROUPS`."""
    begin, end = subject
    last = [count - 1] if end < count else []
    behind = [place for place in range(end, count - 1)]
    first = [begin] if end - begin > 1 else []
    return [first, list(range(begin + 1, end - 1)), [end - 1], behind[:1], behind[1:], last]


def _sites(view: ModelView) -> dict[RestoredKind, str]:
    """What is restored, by kind, in words: the modules' path, and where their output goes."""
    spec = view.spec
    norm = ", before the norm or multiplier between it and the residual stream" if spec.post_norm else ""
    beside = ", computed beside the attention from the same states" if _is_parallel(view) else ""
    return {
        "block": f"{spec.blocks}.*",
        "mlp": f"{spec.blocks}.*.{spec.mlp}{norm}{beside}",
        "attention": f"{spec.blocks}.*.{spec.attention}{norm}",
    }


def _is_parallel(view: ModelView) -> bool:
    """Whether a block's MLP reads the states that enter the block, not what its attention adds to them."""
    if not view.spec.attention or not view.editable:
        return False
    layer = view.editable[0]
    site = Site(layer, "mlp")
    batch = pad([sample_rows(view.model.config, view.vocabulary)[0][:2]], view.device)
    with evaluating(view):
        before = capture(view, batch, [site])[0][site]
        with output_hooks([(view.attention(layer), _with_other_sign)]):
            after = capture(view, batch, [site])[0][site]
    return torch.equal(before, after)


def _with_other_sign(module: torch.nn.Module, args: tuple, output: Any) -> Any:
    return with_hidden(output, -hidden_of(output))
