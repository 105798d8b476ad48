"""General prompts of a request: unrelated questions with answers, whose distributions an edit should preserve."""

from __future__ import annotations

from kedit_fast.requests.request import EditRequest


def general_prompts(request: EditRequest) -> tuple[tuple[str, str], ...]:
    """(prompt, answer) of the questions of a request's locality probes that have an answer, of several the first.

    Where it has none of these, its neighborhood prompts with the target before the edit.
    """
    questions = [question for probe in request.probes if probe.kind == "locality" for question in probe.questions]
    pairs = [(question.prompt, question.answers[0][0]) for question in questions if question.answers]
    if not pairs and request.target_true is not None:
        pairs = [(prompt, request.target_true) for prompt in request.neighborhood_prompts]
    return tuple(dict.fromkeys(pairs))
