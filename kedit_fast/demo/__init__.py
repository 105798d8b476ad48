"""The bundled demo model: a small Llama that knows 4,600 invented facts, its tokenizer, requests and corpus.

`python -m kedit_fast.demo.train` made it; `kedit-fast demo` edits it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kedit_fast.support.torch_state import plain_torch

DATA = Path(__file__).parent / "data"
HELD_OUT_SEED = 90210
"""Of held-out sentences; the text for statistics has another one."""


@plain_torch()
def load() -> tuple[Any, Any]:
    """The demo model in float32, and its tokenizer."""
    import torch

    from kedit_fast.models.loading import load_model

    return load_model(DATA, dtype=torch.float32)


def requests(count: int | None = None) -> list[Any]:
    """The first `count` of the 600 bundled counterfactual requests (all for None)."""
    from kedit_fast.requests.reading import load_requests

    return load_requests(DATA / "requests.jsonl")[:count]


def corpus(documents: int = 1500) -> list[str]:
    """Text for statistics: documents of about 40 tokens."""
    from kedit_fast.demo import world

    return world.corpus(documents)


def held_out(subjects: Sequence[str], sentences: int = 400) -> list[str]:
    """Sentences of the demo's world about other subjects than these; they are in no text for statistics."""
    from kedit_fast.demo import world

    excluded = set(subjects)
    drawn = (document[0] for document in world.documents(HELD_OUT_SEED, 20 * sentences, 1))
    return [s.text for s in drawn if s.subject not in excluded][:sentences]
