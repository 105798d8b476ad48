"""An edited model runs under lm-evaluation-harness as it is: the example of the page of evaluation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kedit_fast import Editor, demo

PAGE = Path(__file__).parents[2] / "kedit_fast" / "evaluation" / "README.md"


def test_the_example_of_the_page_sees_the_edits(demo_model, demo_statistics, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    model, tokenizer = demo_model
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    requests = demo.requests(4)
    facts = [{"question": r.text, "choices": [r.target_true, r.target_new], "answer": 1} for r in requests]
    Path("facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    code = re.search(r"```text\n(import lm_eval\n.*?)print\((.*)\)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)

    def accuracy() -> float:
        here = {"model": model, "tokenizer": tokenizer}
        exec(code[1], here)
        return eval(code[2], here)["edited_facts"]["acc,none"]

    assert accuracy() == 0
    editor = Editor(model, tokenizer, "memit", statistics=demo_statistics, hparams={"v_num_grad_steps": 15})
    editor.edit(requests)
    try:
        assert accuracy() > 0.5
    finally:
        editor.restore()
