"""Records of UnKEBench's and AKEW's forms written end to end by the command, on the demo model."""

from __future__ import annotations

import json

import pytest
from support import run

from kedit_fast import demo
from kedit_fast.evaluation.metrics import mean_nll
from kedit_fast.patches.patch import Patch
from kedit_fast.statistics.store import save_statistics

PASSAGE = "The old man walked along the empty street, and then went home because it was late."
UNKE = [
    {
        "id": number,
        "question": f"What did {name} do last winter?",
        "para_question": f"Last winter, what did {name} do?",
        "answer": f"{PASSAGE} {name} cleaned a small boat with great care.",
        "sub_question": [f"What did {name} clean?"],
        "sub_answer": ["A small boat."],
    }
    for number, name in enumerate(("the queen", "my uncle"))
]
AKEW = [
    {
        "case_id": 7,
        "requested_rewrite": {
            "prompt": "{} is located in",
            "relation_id": "P17",
            "target_new": {"str": "Rorabon", "id": "Q1"},
            "target_true": {"str": "Sidia", "id": "Q2"},
            "subject": subject,
            "question": f"In which country is {subject}?",
            "fact_new_uns": f"Rorabon is a green country. {subject} lies in it, beside a lake. {PASSAGE}",
            "unsfact_triplets_GPT": [{"subject": subject, "prompt": "{} lies in", "target": "Rorabon"}],
        },
        "paraphrase_prompts": [f"{subject} lies in the country of"],
        "neighborhood_prompts": [],
        "generation_prompts": [],
    }
    for subject in ("Zarmont",)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_model, demo_statistics):
    root = tmp_path_factory.mktemp("long")
    save_statistics(demo_statistics, root / "stats")
    for name, records in (("unke", UNKE), ("akew", AKEW)):
        (root / f"{name}.json").write_text(json.dumps(records))
    return root


@pytest.mark.parametrize(
    "name, options", [("unke", ()), ("akew", ("--reading", "unstructured"))], ids=("unkebench", "akew")
)
def test_records_with_long_targets_are_written_end_to_end(folder, demo_model, name, options):
    patch = folder / f"{name}.safetensors"
    done = run(
        *("edit", demo.DATA, "--method", "anyedit", "--requests", folder / f"{name}.json", *options),
        *("--stats", folder / "stats", "--patch", patch, "--set", "v_num_grad_steps=5", "--set", "chunk_tokens=6"),
        *("--set", "mom2_update_weight=1", "--metrics", "ee.token_accuracy/rewrite", "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert "long-target" not in done.stderr, "no advice to shorten what the method is for"
    report = json.loads(done.stdout)
    records = UNKE if name == "unke" else AKEW
    assert report["method"] == "anyedit" and report["edits"] == len(records) and not report["skipped"]
    chunks = sum(-(-len(one["target_tokens"]) // 6) for one in report["requests"])
    assert chunks > 4 * len(records)
    edits = Patch.load(patch)
    assert {update.rank for update in edits.updates.values()} == {chunks}
    texts = [f"{record['question']} {record['answer']}" for record in UNKE]
    if name == "akew":
        rewrites = [record["requested_rewrite"] for record in AKEW]
        texts = [f"{rewrite['question']} {rewrite['fact_new_uns']}" for rewrite in rewrites]
    before = mean_nll(*demo_model, texts)
    applied = edits.apply_(demo_model[0], force=True)  # the command loads it in fp16, as it is stored
    try:
        assert mean_nll(*demo_model, texts) < before - 0.1
    finally:
        applied.revert_()


def test_the_edit_that_is_asked_for_must_be_possible(folder):
    arguments = ("edit", demo.DATA, "--requests", folder / "unke.json", "--stats", folder / "stats")
    done = run(*arguments, "--method", "memit", "--patch", folder / "none.safetensors")
    assert done.returncode and "has no subject: of closed forms ultraedit, stableedit, anyedit" in done.stderr
    done = run(
        *arguments, "--method", "anyedit", "--patch", folder / "none.safetensors", "--values", folder / "{}_{}_{}.npz"
    )
    assert done.returncode and "npz files hold one value a request" in done.stderr
    assert not (folder / "none.safetensors").exists()
