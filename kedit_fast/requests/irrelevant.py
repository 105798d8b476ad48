"""Unrelated texts beside the edits: a small corpus of invented sentences, and a check that texts are unrelated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kedit_fast.errors import RequestError
from kedit_fast.requests.request import EditRequest
from kedit_fast.support.messages import comma_list

SENTENCES = (
    "The kettle on the stove began to whistle shortly before seven.",
    "A gray cat slept on the warm hood of the parked car.",
    "She folded the letter twice and put it into her coat pocket.",
    "Rain had been falling on the tin roof since the afternoon.",
    "He counted the coins again, but the sum was still too small.",
    "The children built a dam of stones across the shallow stream.",
    "Two loaves of bread were left to cool beside the open window.",
    "Nobody at the meeting could remember who had asked for it.",
    "The old bicycle needs a new chain and a better lamp.",
    "After lunch they walked along the canal until it got dark.",
    "Water boils at a lower temperature high up in the mountains.",
    "The shop on the corner sells paper, ink and cheap umbrellas.",
    "My neighbor waters her tomatoes early every summer morning.",
    "A wooden bridge led from the garden to the empty boathouse.",
    "The last train had already left when we reached the platform.",
    "How many chairs do we need for the guests this evening?",
    "The clock in the hall is ten minutes slow.",
    "Please close the gate so that the sheep stay in the field.",
    "It took three men to carry the piano up the narrow stairs.",
    "The soup tastes better with a little more salt and pepper.",
    "They painted the kitchen yellow and the doors white.",
    "What is the easiest way to get a stain out of wool?",
    "The wind turned the pages of the book on the bench.",
    "A young owl called from the barn during the night.",
    "The teacher wrote the date on the board and opened a window.",
    "Most of the apples had fallen before anyone came to pick them.",
    "He tied the boat to the post and carried the fish home.",
    "Snow lay on the path, and only a fox had crossed it.",
    "The tailor measured the sleeve a second time before he cut.",
    "When is the best time of year to plant garlic?",
    "Her brother repairs watches in a room above the bakery.",
    "The map showed a road that was never built.",
)
"""Plain sentences about nobody in particular."""


def irrelevant_texts(texts: Iterable[str] | None) -> tuple[str, ...]:
    """The caller's unrelated texts, or the bundled sentences for None.

    Raises:
        RequestError: none is left, or one is empty or no text.
    """
    if isinstance(texts, str):
        raise RequestError("irrelevant texts are a list of texts, not one text")
    chosen = SENTENCES if texts is None else tuple(texts)
    if bad := [i for i, text in enumerate(chosen) if not isinstance(text, str) or not text.strip()]:
        raise RequestError(f"irrelevant texts {comma_list(bad)} (counted from 0) are empty or no text")
    if not chosen:
        raise RequestError("there are no irrelevant texts: give some, or None for the bundled sentences")
    return chosen


def require_unrelated(texts: Sequence[str], requests: Sequence[EditRequest]) -> None:
    """Raise RequestError where a text names a subject of the requests or contains one of their prompts.

    A text about an edited subject would be trained to be answered as before, against its own edit.
    """
    lowered = [f" {' '.join(text.casefold().split())} " for text in texts]
    for request in requests:
        for part in filter(None, (request.subject, request.text)):
            wanted = " ".join(part.casefold().split())
            for text, plain in zip(texts, lowered, strict=True):
                if wanted and _stands_in(wanted, plain):
                    raise RequestError(f"the irrelevant text {text!r} names {part!r}, which is edited: take it out")


def unrelated_texts(texts: Iterable[str], requests: Sequence[EditRequest]) -> list[str]:
    """The texts that name no subject of the requests and contain none of their prompts."""
    usable = []
    for text in texts:
        try:
            require_unrelated([text], requests)
        except RequestError:
            continue
        usable.append(text)
    return usable


def _stands_in(wanted: str, text: str) -> bool:
    """Whether a text contains another as whole words."""
    at = text.find(wanted)
    while at >= 0:
        if not (text[at - 1].isalnum() or text[at + len(wanted)].isalnum()):
            return True
        at = text.find(wanted, at + 1)
    return False
