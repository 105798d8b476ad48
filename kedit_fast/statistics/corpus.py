"""What text statistics are made of: documents in a fixed order, tokenised in windows ahead of their use.

A window is a run of documents whose sequences are sorted by length and batched together. Windows follow from the
documents alone, so a pass can go on from any batch, and the processes of a job take turns at them: their batches are
those of a single process.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import queue
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.models.forward import unknown_token
from kedit_fast.support import process_group

TokenWeights = Callable[[list[int]], Sequence[float]]
T = TypeVar("T")
START = hashlib.sha256(b"kedit_fast corpus").hexdigest()
BATCHES_A_WINDOW = 8  # about: more waste less on padding, fewer share better among processes
LEAST_WINDOW = 1 << 17  # characters
CHARACTERS_A_TOKEN = 4  # about
LONG = 16  # times the characters of a window that its documents may really have
PADDING, ENOUGH = 0.1, 0.125  # shares of a batch: of padding, from which on a batch of so many tokens is closed
PROBE = 64
_END = object()


@dataclass(frozen=True)
class Corpus:
    """Documents, and how much of them counts.

    Args:
        texts: documents, each one sequence. A list, a file of `open_texts` or another sequence; or an iterable, which
            is read once and in its own order.
        max_tokens: stop after this many tokens, inside a document if need be; None for all.
        max_samples: stop after this many documents (memit's `sample_size`); None for all.
        max_length: documents are cut to this many tokens.
        seed: of a random order of the documents; None for their own. Needs a sequence.
        token_weights: a function from a document's token ids to as many weights, finite and not negative: the moment is
            then sum w k k^T / sum w. None counts every token once. Its name stands in the files, with a hash of what
            it gives for the ids 0 to 63.
    """

    texts: Iterable[str]
    max_tokens: int | None = None
    max_samples: int | None = None
    max_length: int = 1024
    seed: int | None = None
    token_weights: TokenWeights | None = None

    def __post_init__(self):
        for name in ("max_tokens", "max_samples", "max_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InvalidArgumentError(f"{name} must be a positive integer; got {value!r}")
        if isinstance(self.texts, str | bytes | os.PathLike):
            raise InvalidArgumentError(
                "texts must be a sequence of documents, not one string or path: "
                "kedit_fast.statistics.sources.open_texts reads a file"
            )
        if self.seed is not None and not isinstance(self.texts, Sequence):
            raise InvalidArgumentError("a seeded order needs a sequence of documents, not an iterator")

    @property
    def repeatable(self) -> bool:
        """Whether the documents can be read more than once."""
        return iter(self.texts) is not self.texts

    def about(self) -> dict[str, str]:
        """What was asked for, by name, as it stands in the files: "" for a number that was not given."""
        name, weights = "", self.token_weights
        if weights is not None:
            probe = [float(weight) for weight in weights(list(range(PROBE)))]
            name = getattr(weights, "__qualname__", type(weights).__qualname__)
            name += f" {hashlib.sha256(repr(probe).encode()).hexdigest()[:16]}"
        numbers = {n: getattr(self, n) for n in ("max_tokens", "max_samples", "max_length", "seed")}
        return {**{n: "" if v is None else str(v) for n, v in numbers.items()}, "token_weights": name}

    def documents(self) -> Iterator[str]:
        """All documents in order."""
        if self.seed is None:
            yield from self.texts
            return
        assert isinstance(self.texts, Sequence)
        order = list(range(len(self.texts)))
        random.Random(self.seed).shuffle(order)
        for index in order:
            yield self.texts[index]


@dataclass(frozen=True)
class Position:
    """A place in a corpus between two batches."""

    windows: int = 0  # before this one
    documents: int = 0  # in them
    tokens: int = 0  # in them, of a single process
    digest: str = START  # of their text
    batches: int = 0  # of the window that are done
    until: str = ""  # digest of the text at the end of the window, if any are

    def as_dict(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


@dataclass(frozen=True)
class Window:
    """Documents that are batched together."""

    before: Position
    after: Position
    sequences: list[list[int]]  # token ids of its documents, empty ones left out; none in another process's window


class Reader:
    """Windows of a corpus, for one process of a job.

    Args:
        tokenizer: special tokens it adds by itself count.
        corpus: the documents.
        batch_tokens: of a batch; a window holds several.
        max_length: tokens that the model takes at most.
        vocabulary: how many tokens the model knows; None asks nothing.
    """

    def __init__(
        self, tokenizer: Any, corpus: Corpus, batch_tokens: int, max_length: int, vocabulary: int | None = None
    ):
        self.tokenizer, self.corpus, self.vocabulary = tokenizer, corpus, vocabulary
        self.max_length = min(corpus.max_length, max_length)
        self._rank, self._world = process_group.world()
        self._characters = max(LEAST_WINDOW, BATCHES_A_WINDOW * CHARACTERS_A_TOKEN * batch_tokens)
        self._documents = corpus.max_samples
        self._last: int | None = None  # tokens of the last of so many documents; None for all

    def prepare(self) -> None:
        """Before the first window: with a budget of tokens, the processes of a job find out together where it ends.

        Every process tokenises its share of the text once more for that.
        """
        if self._world > 1 and self.corpus.max_tokens is not None and self._last is None:
            self._find_end(self.corpus.max_tokens)

    def windows(self, start: Position | None = None) -> Iterator[Window]:
        """Windows from a place on.

        Raises:
            StatisticsError: the documents before `start` are not those it was made from, one is not text, or one has
                a token that the model does not know.
        """
        start = start or Position()
        position = replace(start, batches=0, until="")
        documents = self.corpus.documents()
        if self.digest(position.documents, documents) != position.digest:
            raise _other_text(position.documents)
        budget = self.corpus.max_tokens if self._world == 1 else None
        ended = False
        while not ended and (budget is None or position.tokens < budget):
            texts, ended = self._next(documents, position.documents)
            used, sequences = len(texts), []
            if position.windows % self._world == self._rank:
                sequences = self._tokenised(texts, position.documents)
                if budget is not None:
                    used = _cut(sequences, budget - position.tokens)
                elif used and self._last is not None and position.documents + used == self._documents:
                    del sequences[-1][self._last :]
            digest = position.digest
            for text in texts[:used]:
                digest = _chained(digest, text)
            tokens = position.tokens + sum(map(len, sequences))
            after = Position(position.windows + 1, position.documents + used, tokens, digest)
            if start.until not in ("", digest) and position.windows == start.windows:
                raise _other_text(after.documents)
            if used:
                yield Window(position, after, [ids for ids in sequences if ids])
                position = after

    def digest(self, count: int, documents: Iterator[str] | None = None) -> str:
        """Of the text of the first `count` documents, "" when there are not so many."""
        documents = self.corpus.documents() if documents is None else documents
        digest = START
        for number in range(count):
            text = next(documents, _END)
            if text is _END:
                return ""
            digest = _chained(digest, _checked(text, number))
        return digest

    def ends_at(self, documents: int, tokens: int) -> bool:
        """Whether what is asked for ends after so many documents and tokens."""
        corpus = self.corpus
        if documents == corpus.max_samples or tokens == corpus.max_tokens:
            return True
        if isinstance(corpus.texts, Sequence):
            return len(corpus.texts) == documents
        return next(itertools.islice(corpus.documents(), documents, None), _END) is _END

    def _next(self, documents: Iterator[str], begin: int) -> tuple[list[str], bool]:
        """The documents of the window that begins at number `begin`, and whether they are the last."""
        texts: list[str] = []
        counted = held = 0
        longest = CHARACTERS_A_TOKEN * self.max_length
        while counted < self._characters and held < LONG * self._characters:
            if self._documents is not None and begin + len(texts) >= self._documents:
                return texts, True
            text = next(documents, _END)
            if text is _END:
                return texts, True
            texts.append(_checked(text, begin + len(texts)))
            counted += min(len(text), longest) + 1
            held += len(text)
        return texts, begin + len(texts) == self._documents

    def _tokenised(self, texts: list[str], begin: int) -> list[list[int]]:
        """Token ids of the documents from number `begin` on."""
        if not texts:
            return []
        found = [list(ids) for ids in self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]]
        for number, ids in enumerate(found, begin):
            if why := unknown_token(self.tokenizer, ids, self.vocabulary):
                raise StatisticsError(f"document {number}: {why}")
        return found

    def _find_end(self, budget: int) -> None:
        """Which document the budget ends in, and where: the processes count a window each, and tell each other."""
        if not self.corpus.repeatable:
            raise StatisticsError("max_tokens with several processes reads documents twice: give a list or a file")
        documents, begin, total, ended = self.corpus.documents(), 0, 0, False
        while not ended:
            mine: list[int] = []
            for turn in range(self._world):
                texts, ended = self._next(documents, begin)
                begin += len(texts)
                if turn == self._rank:
                    mine = [len(ids) for ids in self._tokenised(texts, begin - len(texts))]
                if turn == 0:
                    number = begin - len(texts)
                if ended:
                    break
            for count in (count for counts in process_group.gather(mine) for count in counts):
                number += 1
                if total + count >= budget:
                    self._documents, self._last = number, budget - total
                    return
                total += count


def _checked(text: Any, number: int) -> str:
    if not isinstance(text, str):
        raise StatisticsError(f"document {number} is a {type(text).__name__}, not text")
    return text


def _other_text(documents: int) -> StatisticsError:
    return StatisticsError(f"the text is not the one that was begun with: its first {documents:,} documents differ")


def _cut(sequences: list[list[int]], budget: int) -> int:
    """Shorten what goes beyond a budget of tokens; how many sequences are reached."""
    for i, ids in enumerate(sequences):
        if len(ids) >= budget:
            del ids[budget:]
            for later in sequences[i + 1 :]:
                later.clear()
            return i + 1
        budget -= len(ids)
    return len(sequences)


def _chained(digest: str, text: str) -> str:
    return hashlib.sha256(bytes.fromhex(digest) + text.encode("utf-8", "surrogatepass")).hexdigest()


def batches(sequences: list[list[int]], batch_tokens: int) -> Iterator[list[list[int]]]:
    """Sequences by length, longest first: as many together as `batch_tokens` holds once padded.

    A batch that is large enough is closed earlier where padding would become more than a tenth of it.
    """
    rows: list[list[int]] = []
    real = 0
    for sequence in sorted(sequences, key=len, reverse=True):
        padded = len(rows[0]) * (len(rows) + 1) if rows else 0
        wasteful = padded - real - len(sequence) > PADDING * padded and real >= ENOUGH * batch_tokens
        if rows and (padded > batch_tokens or wasteful):
            yield rows
            rows, real = [], 0
        rows.append(sequence)
        real += len(sequence)
    if rows:
        yield rows


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made by a thread while the one before is used; errors are raised here."""
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=1)
    unwanted = threading.Event()

    def put(item: tuple[bool, Any]) -> bool:
        while not unwanted.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=make, name="kedit_fast tokeniser", daemon=True)
    thread.start()
    try:
        while True:
            more, item = made.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        unwanted.set()
        thread.join(timeout=1.0)  # a source that waits for something does not keep the program waiting
