"""The bundled model and its world."""

from __future__ import annotations

import os

from kedit_fast import demo
from kedit_fast.demo import world


def test_the_world_is_as_large_as_it_says():
    here = world.world()
    assert 1000 <= sum(map(len, here.subjects.values())) <= 1500
    assert len(here.relations) >= 10 and 3000 <= len(here.facts) <= 5000
    assert all(20 <= len(relation.objects) <= 60 for relation in here.relations)
    assert all(len(relation.phrasings) >= 5 and len(set(relation.objects)) == len(relation.objects)
               for relation in here.relations)  # fmt: skip


def test_requests_ask_for_another_object_in_phrasings_no_training_text_has(demo_model):
    requests = demo.requests()
    facts = {(f.subject, f.object): f for f in world.world().facts}
    assert len(requests) >= 500 and len({r.subject for r in requests}) == len(requests)
    trained = {s.text for d in world.documents(1, 2000) for s in d}
    for request in requests:
        fact = facts[request.subject, request.target_true]
        assert request.target_new != request.target_true and request.target_new in fact.relation.objects
        assert len(request.paraphrase_prompts) == 2 and len(request.neighborhood_prompts) >= 3
        assert not any(f"{p} {fact.object}." in trained for p in request.paraphrase_prompts)


def test_subjects_are_several_tokens(demo_model):
    _, tokenizer = demo_model
    lengths = [len(tokenizer(" " + r.subject, add_special_tokens=False)["input_ids"]) for r in demo.requests()]
    assert min(lengths) >= 2 and sum(lengths) / len(lengths) > 3


def test_the_model_knows_its_facts(demo_model):
    from kedit_fast.demo.train import recall

    model, tokenizer = demo_model
    assert recall(model, tokenizer, held_out=False, count=400) >= 0.95
    assert recall(model, tokenizer, held_out=True, count=200) >= 0.9


def test_the_bundle_is_small():
    assert sum(os.path.getsize(p) for p in demo.DATA.iterdir()) <= 12e6


def test_the_bundled_requests_are_those_the_generator_makes():
    assert [r.subject for r in demo.requests()] == [r["subject"] for r in world.requests()]
