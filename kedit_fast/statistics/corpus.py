"""The text of statistics: documents in a fixed order, tokenized in windows ahead of their use.

A window is a run of documents whose sequences are sorted by length and batched together. Windows depend on the
documents alone. So a pass can resume at any batch, and the processes of a job, which take turns at windows, have the
same batches as a single process.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import queue
import random
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from enum import Enum, auto
from typing import Any, TypeVar

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.models.forward import unknown_token
from kedit_fast.statistics.token_weights import NamedWeights, TokenWeights, check_weights, describe
from kedit_fast.support import process_group

T = TypeVar("T")
S = TypeVar("S", bound=Sized)
START = hashlib.sha256(b"kedit_fast corpus").hexdigest()
"""The digest of no text."""
BATCHES_A_WINDOW = 8
"""About so many: more batches waste less on padding, fewer are shared more evenly by processes."""
LEAST_WINDOW = 1 << 17  # characters
CHARACTERS_A_TOKEN = 4  # an estimate
LONG = 16
"""Times the nominal characters of a window that its documents may have in all: long ones are cut after reading."""
PADDING = 0.1
"""Share of padding above which a large enough batch is closed."""
ENOUGH = 0.125
"""Share of `batch_tokens` from which on a batch is large enough for that."""


class _End(Enum):
    """What no document is: comes after the last one."""

    OF_CORPUS = auto()


@dataclass(frozen=True)
class Corpus:
    """Documents, and how much of them counts.

    Example:
        >>> corpus = Corpus(texts, max_tokens=2_000, seed=0)
        >>> collected = collect_into("stats", model, tokenizer, corpus, layers=[0])
        >>> collected.tokens
        2000
    """

    texts: Iterable[str]
    """Documents, each one sequence: a list, a file of `open_texts` or another sequence; or an iterable, which is read
    once and in its own order."""
    max_tokens: int | None = None
    """Stop after this many tokens, inside a document if necessary; None for all."""
    max_samples: int | None = None
    """Stop after this many documents (memit's `sample_size`); None for all."""
    max_length: int = 1024
    """Documents are cut to this many tokens."""
    seed: int | None = None
    """Of a random order of the documents, which needs a sequence; None for their own order."""
    token_weights: TokenWeights | NamedWeights | None = None
    """From a document's token ids to as many weights, finite and not negative: the moment is sum w k k^T / sum w. None
    and "uniform" count every token once; "teacher-confidence" takes the model's largest probability of a next token at
    each. The files record the name, and of a function also a hash of its weights for the ids 0 to 63."""

    def __post_init__(self):
        for name in ("max_tokens", "max_samples", "max_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InvalidArgumentError(f"{name} must be a positive integer; got {value!r}")
        check_weights(self.token_weights)
        if isinstance(self.texts, str | bytes | os.PathLike):
            raise InvalidArgumentError(
                "texts must be a sequence of documents, not one string or path: "
                "kedit_fast.statistics.sources.open_texts reads a file"
            )
        if self.seed is not None and not isinstance(self.texts, Sequence):
            raise InvalidArgumentError("a seeded order needs a sequence of documents, not an iterator")

    @property
    def repeatable(self) -> bool:
        """Whether the documents can be read again."""
        return iter(self.texts) is not self.texts

    def about(self) -> dict[str, str]:
        """The settings by name, as the files record them; "" for one that is None."""
        values = {name: getattr(self, name) for name in ("max_tokens", "max_samples", "max_length", "seed")}
        settings = {name: "" if value is None else str(value) for name, value in values.items()}
        return {**settings, "token_weights": describe(self.token_weights)}

    def documents(self) -> Iterator[str]:
        """All documents, in the order of `seed`."""
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

    windows: int = 0
    """Complete windows before it."""
    documents: int = 0
    """Documents in these windows."""
    tokens: int = 0
    """Tokens in these windows that this process has counted."""
    digest: str = START
    """Chained SHA-256 of the text of these windows."""
    batches: int = 0
    """Batches of the next window that are done."""
    until: str = ""
    """The digest at the end of that window, if some of its batches are done."""

    def as_dict(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


@dataclass(frozen=True)
class Document:
    """The tokens of a document that count."""

    number: int
    """Its place in the corpus, zero-based."""
    ids: list[int]
    """Token ids, at least one."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Window:
    """Documents that are batched together."""

    before: Position
    after: Position
    documents: list[Document]
    """Those that are not empty; none in a window of another process."""


class Reader:
    """Reads the windows of a corpus, for one process of a job.

    Args:
        tokenizer: special tokens that it adds by itself count.
        corpus: the documents.
        batch_tokens: tokens of a batch; a window has several batches.
        max_length: longest sequence that the model takes.
        vocabulary: number of the model's embeddings, for a check of tokens; None for no check.
        share: which part of the windows this process takes, of how many; None for its rank, of all processes.
    """

    def __init__(
        self,
        tokenizer: Any,
        corpus: Corpus,
        batch_tokens: int,
        max_length: int,
        vocabulary: int | None = None,
        share: tuple[int, int] | None = None,
    ):
        self.tokenizer, self.corpus, self.vocabulary = tokenizer, corpus, vocabulary
        self.max_length = min(corpus.max_length, max_length)
        self._rank, self._world = share or process_group.world()
        self._characters = max(LEAST_WINDOW, BATCHES_A_WINDOW * CHARACTERS_A_TOKEN * batch_tokens)
        self._documents = corpus.max_samples  # how many to read; None for all
        self._last_tokens: int | None = None  # of the last of them; None for all

    def prepare(self) -> None:
        """Find out, before the first window, in which document `max_tokens` is reached.

        Needed with several processes alone. Each tokenizes its share of the text once more for that.
        """
        if self._world > 1 and self.corpus.max_tokens is not None and self._last_tokens is None:
            self._find_end(self.corpus.max_tokens)

    def windows(self, start: Position | None = None) -> Iterator[Window]:
        """Windows from a position on.

        Raises:
            StatisticsError: the text before `start` is not the text that the position was reached with, a document is
                not text, or it has a token without an embedding.
        """
        start = start or Position()
        position = replace(start, batches=0, until="")
        documents = self.corpus.documents()
        if self.digest(position.documents, documents) != position.digest:
            raise _changed_text(position.documents)
        budget = self.corpus.max_tokens if self._world == 1 else None
        ended = False
        while not ended and (budget is None or position.tokens < budget):
            texts, ended = self._next(documents, position.documents)
            used, sequences = len(texts), []
            if position.windows % self._world == self._rank:
                sequences = self._tokenized(texts, position.documents)
                if budget is not None:
                    used = _cut(sequences, budget - position.tokens)
                elif used and self._last_tokens is not None and position.documents + used == self._documents:
                    del sequences[-1][self._last_tokens :]
            digest = position.digest
            for text in texts[:used]:
                digest = _chained(digest, text)
            tokens = position.tokens + sum(map(len, sequences))
            after = Position(position.windows + 1, position.documents + used, tokens, digest)
            if start.until not in ("", digest) and position.windows == start.windows:
                raise _changed_text(after.documents)
            if used:
                numbered = enumerate(sequences, position.documents)
                yield Window(position, after, [Document(number, ids) for number, ids in numbered if ids])
                position = after

    def digest(self, count: int, documents: Iterator[str] | None = None) -> str:
        """The chained SHA-256 of the first `count` documents, "" when there are fewer.

        Args:
            count: documents to read.
            documents: an iterator to read them from; None reads the corpus from its beginning.
        """
        documents = self.corpus.documents() if documents is None else documents
        digest = START
        for number in range(count):
            text = next(documents, _End.OF_CORPUS)
            if text is _End.OF_CORPUS:
                return ""
            digest = _chained(digest, _checked(text, number))
        return digest

    def ends_at(self, documents: int, tokens: int) -> bool:
        """Whether the part of the corpus that counts ends after this many documents and tokens."""
        corpus = self.corpus
        if documents == corpus.max_samples or tokens == corpus.max_tokens:
            return True
        if isinstance(corpus.texts, Sequence):
            return len(corpus.texts) == documents
        return next(itertools.islice(corpus.documents(), documents, None), _End.OF_CORPUS) is _End.OF_CORPUS

    def _next(self, documents: Iterator[str], begin: int) -> tuple[list[str], bool]:
        """The documents of the window that begins with document `begin`, and whether they are the last."""
        texts: list[str] = []
        counted = in_memory = 0  # characters: up to where documents are cut, and all
        longest = CHARACTERS_A_TOKEN * self.max_length
        while counted < self._characters and in_memory < LONG * self._characters:
            if self._documents is not None and begin + len(texts) >= self._documents:
                return texts, True
            text = next(documents, _End.OF_CORPUS)
            if text is _End.OF_CORPUS:
                return texts, True
            texts.append(_checked(text, begin + len(texts)))
            counted += min(len(text), longest) + 1
            in_memory += len(text)
        return texts, begin + len(texts) == self._documents

    def _tokenized(self, texts: list[str], begin: int) -> list[list[int]]:
        """Token ids of documents, of which the first has the number `begin`."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        sequences = [list(ids) for ids in encoded]
        for number, ids in enumerate(sequences, begin):
            if problem := unknown_token(self.tokenizer, ids, self.vocabulary):
                raise StatisticsError(f"document {number}: {problem}")
        return sequences

    def _find_end(self, budget: int) -> None:
        """Find the document in which `budget` tokens are reached: each process counts the tokens of its windows."""
        if not self.corpus.repeatable:
            raise StatisticsError("max_tokens with several processes reads documents twice: give a list or a file")
        documents, begin, total, ended = self.corpus.documents(), 0, 0, False
        while not ended:
            lengths: list[int] = []  # of the documents in this process's window
            number = begin  # of documents before the windows of this round
            for turn in range(self._world):
                texts, ended = self._next(documents, begin)
                if turn == self._rank:
                    lengths = [len(ids) for ids in self._tokenized(texts, begin)]
                begin += len(texts)
                if ended:
                    break
            for length in (length for lengths in process_group.gather(lengths) for length in lengths):
                number += 1
                if total + length >= budget:
                    self._documents, self._last_tokens = number, budget - total
                    return
                total += length


def _checked(text: Any, number: int) -> str:
    if not isinstance(text, str):
        raise StatisticsError(f"document {number} is a {type(text).__name__}, not text")
    return text


def _changed_text(documents: int) -> StatisticsError:
    return StatisticsError(f"the text is not the one that was begun with: its first {documents:,} documents differ")


def _cut(sequences: list[list[int]], budget: int) -> int:
    """Cut sequences to a budget of tokens in all; returns how many of them have tokens left or come before such."""
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


def batches(sequences: list[S], batch_tokens: int) -> Iterator[list[S]]:
    """Batches of sequences of similar length, longest first; padded, each has at most `batch_tokens` tokens.

    A large enough batch ends earlier if more than a tenth of it would become padding.
    """
    rows: list[S] = []
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


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items, each made by a thread while the one before is used; its errors are raised here."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=1)
    unwanted = threading.Event()

    def put(item: tuple[bool, Any]) -> bool:
        while not unwanted.is_set():
            try:
                ready.put(item, timeout=0.1)
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

    thread = threading.Thread(target=make, name="kedit_fast tokenizer", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        unwanted.set()
        thread.join(timeout=1.0)  # a source that waits for something does not keep the program waiting
