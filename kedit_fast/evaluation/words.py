"""Scores of texts: entropy of n-grams, tf-idf, overlaps with an answer or a reference. No model, no other package.

Numbers depend on what a word is, so each score says whose words it counts:

- `words`, a tokenizer of our own (the one of `gen.entropy` and `unke.rouge_l`);
- `normalized(text).split()`, SQuAD's (of `wild.*`): lower case, no ASCII punctuation, no articles, spaces collapsed;
- `terms`, scikit-learn's (of `gen.consistency`): lower case, two or more letters, digits or underscores in a row;
- `nltk_words`, NLTK's Penn Treebank rules (of metrics whose ids say nltk), where that package is installed.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise

from kedit_fast.requests.spacing import is_unspaced

HAS_NLTK = find_spec("nltk") is not None
HAS_SKLEARN = find_spec("sklearn") is not None
_ASCII_WORD = re.compile(r"[A-Za-z0-9_]+(?:['-][A-Za-z0-9_]+)*|[^\sA-Za-z0-9_]")
_TERM = re.compile(r"\b\w\w+\b")
_SENTENCE_END = re.compile(r"[.!?;]+[\"'”’)\]]*(?:\s|$)")  # noqa: RUF001 - closing marks as they are written
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_JOINERS = "'’-‐‑"  # noqa: RUF001 - apostrophes and hyphens, which belong to a word that goes on after them


def words(text: str) -> list[str]:
    """The words and the marks of a text, in order, as they are written (after composition to NFC).

    A word is a run of letters, digits, combining marks and underscores; one apostrophe or hyphen between two of them
    belongs to it ("don't", "vice-president"). Every character of a script that has no spaces between words is a word,
    with its marks. Of what is left, white space separates and every other character is a word of its own.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text)
    text = unicodedata.normalize("NFC", text)
    result: list[str] = []
    current = ""
    for index, character in enumerate(text):
        kind = _kind(character)
        following = _kind(text[index + 1]) if index + 1 < len(text) else " "
        if kind == "M" and not current and result and index and is_unspaced(text[index - 1]):
            result[-1] += character
        elif kind in ("W", "M") or (character in _JOINERS and current and following == "W"):
            current += character
        else:
            if current:
                result.append(current)
                current = ""
            if kind != " ":
                result.append(character)
    return [*result, current] if current else result


@lru_cache(maxsize=4096)
def _kind(character: str) -> str:
    """ "W" of letters and digits, "U" of letters of scripts without spaces, "M" of marks, " ", or "" of the rest."""
    category = unicodedata.category(character)
    if character.isspace():
        return " "
    if category[0] == "M":
        return "M"
    if is_unspaced(character):
        return "U"
    return "W" if category[0] in "LN" or category == "Pc" else ""


def terms(text: str) -> list[str]:
    """The words that scikit-learn's vectorizers count by default: two or more word characters, in lower case."""
    return _TERM.findall(text.lower())


def normalized(text: str) -> str:
    """SQuAD's form of an answer: lower case, without ASCII punctuation, articles and double spaces."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def entropy(items: Iterable[object]) -> float:
    """Entropy of the items' frequencies in bits; 0 of no items."""
    counts = Counter(items)
    total = sum(counts.values())
    return -math.fsum(count / total * math.log2(count / total) for count in counts.values()) + 0.0


def ngram_entropy(tokens: Sequence[str]) -> float:
    """(2/3 H2 + 4/3 H3) / 2, with Hn the entropy of the n-grams in bits; 0 of fewer than two tokens.

    Source: `compute_n_gram_entropy` of memit and EasyEdit, of their defaults: the mean of the two weighted entropies.
    """
    pairs = entropy(pairwise(tokens))
    triples = entropy(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return (2 / 3 * pairs + 4 / 3 * triples) / 2


@dataclass(frozen=True)
class TfIdf:
    """Weights of words by the documents of a corpus that have them: idf = ln((1 + n) / (1 + df)) + 1.

    Equivalent to `TfidfVectorizer().fit(corpus)` of scikit-learn: counts times idf, and cosines of these.
    """

    idf: Mapping[str, float]
    """By term; other terms do not count."""

    @classmethod
    def fit(cls, corpus: Iterable[str]) -> TfIdf:
        """The weights of a corpus, given as documents."""
        number, having = 0, Counter()
        for document in corpus:
            number += 1
            having.update(set(terms(document)))
        return cls({term: math.log((1 + number) / (1 + count)) + 1 for term, count in having.items()})

    def vector(self, text: str) -> dict[str, float]:
        """Count times weight of each known term of a text."""
        return {term: count * self.idf[term] for term, count in Counter(terms(text)).items() if term in self.idf}

    def similarity(self, a: str, b: str) -> float | None:
        """Cosine of the vectors of two texts; None where one has no term that the corpus has."""
        first, second = self.vector(a), self.vector(b)
        if not first or not second:
            return None
        product = math.fsum(weight * second[term] for term, weight in first.items() if term in second)
        return product / math.hypot(*first.values()) / math.hypot(*second.values())


class PublishedTfIdf:
    """`TfIdf` by scikit-learn itself.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: the corpus has no terms.
    """

    def __init__(self, corpus: Sequence[str]):
        self.vectorizer = import_module("sklearn.feature_extraction.text").TfidfVectorizer().fit(corpus)

    def similarity(self, a: str, b: str) -> float | None:
        """Cosine of the vectors of two texts; None where one has no term that the corpus has."""
        first, second = self.vectorizer.transform([a, b]).toarray()
        norms = math.hypot(*first), math.hypot(*second)
        return float(first @ second) / norms[0] / norms[1] if all(norms) else None


def spans(tokens: Sequence[str], phrase: Sequence[str]) -> list[tuple[int, int]]:
    """Where a phrase stands in a text, both as tokens: (first, last + 1) of each place; overlapping ones, too."""
    size = len(phrase)
    if not size:
        return []
    return [(i, i + size) for i in range(len(tokens) - size + 1) if list(tokens[i : i + size]) == list(phrase)]


def contains(text: str, answers: Iterable[str], others: Iterable[str] = ()) -> bool:
    """Whether a text says one of `answers`, and none of `others`, in whole words of the normalized texts.

    A name inside of a longer one does not count: a text that says "New York" does not say "York", if both are named.
    """
    tokens = normalized(text).split()
    said = {span for answer in answers for span in spans(tokens, normalized(answer).split())}
    wrong = {span for other in others for span in spans(tokens, normalized(other).split())}
    right = {span for span in said if not any(_inside(span, other) for other in wrong)}
    return bool(right) and all(span in said or any(_inside(span, answer) for answer in said) for span in wrong)


def _inside(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return span != other and other[0] <= span[0] and span[1] <= other[1]


def occurrences(text: str, answers: Iterable[str]) -> int:
    """How many times a text says one of `answers`, in whole words of the normalized texts; places do not overlap."""
    tokens = normalized(text).split()
    places = sorted({span for answer in answers for span in spans(tokens, normalized(answer).split())})
    count, end = 0, 0
    for first, last in sorted(places, key=lambda span: (span[0], -span[1])):
        if first >= end:
            count, end = count + 1, last
    return count


def f1(text: str, answer: str) -> float:
    """SQuAD's F1 of a text and an answer: harmonic mean of the shares of common words, of the normalized texts."""
    got, wanted = normalized(text).split(), normalized(answer).split()
    if not got or not wanted:
        return float(got == wanted)
    common = sum((Counter(got) & Counter(wanted)).values())
    return 2 * common / (len(got) + len(wanted))


def begins_with(text: str, answer: str) -> bool:
    """Whether a text says an answer, spelled exactly so, and then ends its sentence or line, or ends.

    "Paris. It is" says "Paris"; "Paris Saint-Germain" and "in Paris" do not.
    """
    line, answer = text.strip().partition("\n")[0].rstrip(), answer.strip()
    if line in (answer, answer.rstrip(".")):
        return True
    stem = answer.rstrip(".") or answer
    return line.startswith(stem) and _SENTENCE_END.match(line, len(stem)) is not None


@dataclass(frozen=True)
class Overlap:
    """How much of a text and of a reference is common to both."""

    precision: float
    """Share of the text's words."""
    recall: float
    """Share of the reference's words."""

    @property
    def f1(self) -> float:
        """Harmonic mean of both."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def rouge_l(text: str, reference: str) -> Overlap | None:
    """ROUGE-L: the longest common subsequence of words, in lower case and without marks; None of no reference words."""
    got, wanted = ([word.lower() for word in words(part) if _is_word(word)] for part in (text, reference))
    if not wanted:
        return None
    common = _common_subsequence(got, wanted)
    return Overlap(common / len(got) if got else 0.0, common / len(wanted))


def _is_word(word: str) -> bool:
    return any(map(str.isalnum, word))


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by Hyyro's bits: a row of the usual table is one whole number."""
    places: dict[str, int] = {}
    for index, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << index
    everything = row = (1 << len(a)) - 1
    for word in b:
        hit = row & places.get(word, 0)
        row = ((row + hit) | (row - hit)) & everything
    return len(a) - row.bit_count()


def nltk_words(text: str) -> list[str]:
    """NLTK's Penn Treebank words of a text as a whole, by rules alone: a full stop inside of it stays on its word.

    `nltk.word_tokenize` also splits the text into sentences first, for which it needs data (punkt) beside the package.

    Raises:
        ModuleNotFoundError: nltk is not installed.
    """
    return _treebank()(text)


@lru_cache(maxsize=1)
def _treebank() -> Callable[[str], list[str]]:
    return import_module("nltk.tokenize").NLTKWordTokenizer().tokenize
