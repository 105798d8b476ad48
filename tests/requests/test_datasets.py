"""Data sets: the form of a file is recognized, read by its published meaning, and its known faults are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kedit_fast.errors import RequestError
from kedit_fast.requests.datasets.registry import DATA_SETS
from kedit_fast.requests.probes import Probe, Question
from kedit_fast.requests.reading import RequestList, as_requests, load_requests, parse_request
from kedit_fast.requests.request import FIELDS, EditRequest
from kedit_fast.requests.sampling import first_cases, sampled
from kedit_fast.requests.writing import save_requests

DATA = Path(__file__).parents[1] / "data"
FLAT = {"prompt": "{} is in", "subject": "Ebro", "target_new": "Sweden"}


def sample(name):
    return json.loads((DATA / f"{name}_sample.json").read_text(encoding="utf-8"))


def written(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.fixture
def warned(caplog, monkeypatch):
    """The warnings of the package."""
    monkeypatch.setattr("kedit_fast.requests.reading._log.propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


# The form of a file


def test_a_form_is_recognized_and_each_is_named_once():
    assert list(DATA_SETS)[-1] == "flat" and all(name == one.name for name, one in DATA_SETS.items())
    for name in ("easyedit", "zsre", "lre", "counterfact", "wikibigedit"):
        file = DATA / f"{name}_sample.json"
        form = "easyedit" if name == "wikibigedit" else name  # the sample is in EasyEdit's form
        assert load_requests(file, reading="alt" if name == "zsre" else None).form == form
    assert load_requests(DATA / "qaedit_sample.json", "skip").form == "easyedit"


def test_a_file_of_two_forms_is_refused_naming_the_first_record_of_the_second(tmp_path):
    counterfact, (zsre, *_) = sample("counterfact"), sample("zsre")
    bad = {"subject": "Ebro"}
    for records, place, forms in (
        ([*counterfact, *counterfact, zsre], 3, ("zsre", "counterfact")),
        ([zsre, bad, FLAT], 3, ("flat", "zsre")),
        ([FLAT, sample("easyedit")[0], *counterfact], 3, ("counterfact", "easyedit")),
        (
            [{**FLAT, "locality_prompt": "a", "locality_ground_truth": "b"}, {**FLAT, "portability": {}}],
            2,
            ("knowedit",),
        ),
    ):
        with pytest.raises(
            RequestError, match=rf"record {place} has the form '{forms[0]}'.*make a file of each"
        ) as caught:
            load_requests(written(tmp_path / "r.json", records), "skip", reading="alt")
        assert "record 1" in str(caught.value) and all(repr(form) in str(caught.value) for form in forms)
    with pytest.raises(RequestError, match="request 2 has the form 'counterfact'"):
        as_requests([FLAT, *counterfact], "skip")


def test_records_without_what_tells_a_form_belong_to_it_where_others_have_it(tmp_path):
    plain = {key: value for key, value in sample("easyedit")[0].items() if key in FIELDS}
    read = load_requests(written(tmp_path / "r.json", [plain, sample("easyedit")[1]]))
    assert read.form == "easyedit" and len(read) == 2


def test_a_form_that_is_asked_for_is_the_one_that_is_read(tmp_path):
    file = written(tmp_path / "r.json", [FLAT])
    assert load_requests(file, form="easyedit").form == "easyedit"
    with pytest.raises(RequestError, match="record 1 has no 'src', 'alt'; it has prompt, subject"):
        load_requests(file, form="zsre", reading="alt")
    with pytest.raises(RequestError, match=r"form = 'zsRE': choose one of .*zsre"):
        load_requests(file, form="zsRE")
    with pytest.raises(RequestError, match="reading = 'alt': the form 'flat' is read in one way"):
        load_requests(file, reading="alt")


def test_a_missing_field_is_named_with_its_record(tmp_path):
    records = sample("zsre")
    del records[1]["alt"], records[2]["src"]
    records[3]["answers"] = []
    file = written(tmp_path / "r.json", records)
    with pytest.raises(RequestError, match=r"record 2 has no 'alt'.*\n.*record 3 has no 'src'"):
        load_requests(file, reading="alt")
    read = load_requests(file, "skip", reading="answers")
    assert list(read.skipped) == [2, 3] and "record 4: answers holds no text" in read.skipped[3]


# Our own form


def test_our_own_form_has_every_field_and_is_read_back_as_the_same_requests(tmp_path):
    probe = Probe("multi_hop", (Question("Who?", (("A", "a"), ("B",))), Question("x")), "hops", "any", (Question("y"),))
    full = EditRequest(
        "{} is", "Ebro", "x", "y", ("p",), ("n",), 3, 2.0, " ", ("X",), ("Y",), "P17", "case", ("g",), (probe,)
    )
    for name in ("r.json", "r.jsonl"):
        save_requests([full, EditRequest("What?", None, "x")], tmp_path / name)
        assert list(load_requests(tmp_path / name)) == [full, EditRequest("What?", None, "x")]
    assert set(full.as_record()) == set(FIELDS)
    cells = tmp_path / "r.csv"
    cells.write_text('prompt,subject,target_new,probes,group\n{} is,Ebro,x,"[{""kind"": ""tied"", ""questions"": '
                     '[{""prompt"": ""q""}]}]",7\n')  # fmt: skip
    (read,) = load_requests(cells)
    assert read.probes == (Probe("tied", (Question("q"),)),) and read.group == "7"
    for name, message in (("r.csv", r"written as \.json, \.jsonl"), ("r.json.gz", "written as")):
        with pytest.raises(RequestError, match=message):
            save_requests([full], tmp_path / name)
    with pytest.raises(RequestError, match="no requests"):
        save_requests([], tmp_path / "empty.json")
    assert not (tmp_path / "empty.json").exists()


@pytest.mark.parametrize(
    "field, value, message",
    (
        ("probes", [{"kind": "hop", "questions": []}], "a probe's kind is one of paraphrase.*got 'hop'"),
        ("probes", [{"kind": "tied", "questions": []}], "'tied' has no questions"),
        ("probes", [{"kind": "tied"}], "a probe has no 'questions'"),
        ("probes", [{"kind": "tied", "questions": [{"prompt": "a"}], "Name": ""}], "no field 'Name': it has kind"),
        ("probes", [{"kind": "tied", "questions": [{"prompt": " "}]}], "prompt of a question must be a non-empty text"),
        ("probes", [{"kind": "tied", "questions": [{"prompt": "a", "answers": "b"}]}], "list of lists of alternatives"),
        ("probes", [{"kind": "tied", "questions": [{"prompt": "a", "answers": ["b"]}]}], "list of lists"),
        ("probes", [{"kind": "tied", "questions": [{"prompt": "a", "answers": [[]]}]}], "a group without alternatives"),
        ("probes", [{"kind": "tied", "questions": [{"prompt": "a", "answers": [[""]]}]}], "an answer of 'a' must be"),
        ("probes", [{"kind": "tied", "questions": "a"}], "questions must be a list"),
        ("probes", "tied", "probes must be a list"),
        ("target_aliases", [""], "target_aliases holds an empty text"),
        ("true_aliases", 3, "true_aliases must be a list of texts"),
        ("relation", 17, "relation must be a text or None"),
        ("group", [1], "group must be a text or a whole number"),
        ("generation_prompts", ["\ud800"], "not valid Unicode"),
    ),
)
def test_a_field_that_is_wrong_is_named(field, value, message):
    with pytest.raises(RequestError, match=f"request 2: .*{message}"):
        as_requests([FLAT, {**FLAT, field: value}])


# CounterFact, and what EasyEdit makes of it


def test_counterfact_has_its_relation_and_prompts_to_continue():
    (request,) = load_requests(DATA / "counterfact_sample.json")
    assert (request.relation, request.id, len(request.generation_prompts)) == ("P17", 0, 3)
    assert request.probes == () and len(request.neighborhood_prompts) == 10
    (record,) = sample("counterfact")
    hop = {"Recalled Relation": "(a, is, b)", "New Question": "Which continent?", "New Answer": "Europe"}
    (request,) = as_requests([{**record, "portability": hop}])
    assert request.probes == (Probe("portability", (Question("Which continent?", (("Europe",),)),), "Reasoning"),)
    record["requested_rewrite"] = [record["requested_rewrite"]] * 2
    with pytest.raises(RequestError, match="holds 2 rewrites: make a record of each"):
        as_requests([record])


def test_criteria_as_easyedits_editors_pass_them_on():
    record = {"prompt": "{} is the capital of", "subject": "Rome", "target_new": "Spain", "ground_truth": "Italy"}
    criteria = {"a": {"prompt": ["Rome is", "Oslo is"], "ground_truth": ["old", "cold"]}, "b": {"prompt": None}}
    beside = {"c": {"prompt": "Turin is in", "ground_truth": "Italy"}}
    (request,) = as_requests([record | {"portability": criteria, "locality": beside, "loc_prompt": "x"}])
    two = Question("Rome is", (("old",),)), Question("Oslo is", (("cold",),))
    one = Question("Turin is in", (("Italy",),))
    assert request.probes == (Probe("portability", two, "a"), Probe("locality", (one,), "c"))
    criteria["a"]["ground_truth"].pop()
    with pytest.raises(RequestError, match=r"portability, a: 2 prompts need as many in ground_truth; got \['old'\]"):
        as_requests([record | {"portability": criteria}])


def test_easyedits_form_has_a_neighbor_or_a_probe_by_its_answer_and_names_contradictions(warned):
    first, _, one, other = load_requests(DATA / "easyedit_sample.json")
    assert first.prompt == "The mother tongue of {} is" and first.probes == ()
    assert (
        first.neighborhood_prompts == ("Michel Rocard is a native speaker of",) and len(first.paraphrase_prompts) == 1
    )
    assert (one.prompt, one.subject) == (other.prompt, other.subject)
    (line,) = warned()
    assert "facts with several new answers, of which a batch can hold one: 1, as" in line
    assert "'Shanghai' (record 3) and 'Hamburg' (record 4)" in line
    (wiki,) = load_requests(DATA / "wikibigedit_sample.json")
    assert wiki.target_true is None and wiki.neighborhood_prompts == () and wiki.probes[0].kind == "locality"


def test_qaedits_oddities_are_named_by_record(warned):
    read = load_requests(DATA / "qaedit_sample.json", "skip")
    assert list(read.skipped) == [3] and "'Ernie' stands 2 times" in read.skipped[3]
    assert [request.target_new for request in read] == ["Wilt Chamberlain *", "Wilt Chamberlain *", "24,303.04"]
    assert read[0].probes[0].questions[0].answers == (("Michael",),) and len(read[0].probes[0].questions) == 2
    lines = "\n".join(warned())
    assert "ends in a star after a space, which is taken as it is: records 1, 2" in lines
    assert "spaces around a text, which are taken away: record 3" in lines and "1104 in records 1, 2" in lines


def test_wikibigedits_own_form():
    record = {"subject": "Ebro", "update": "Where is Ebro?", "ans": "Sweden", "rephrase": "Ebro is where?", "tag": "x",
              "personas": "Arr, where be Ebro?", "mhop": "Who rules there?", "mhop_ans": "Carl", "loc": "a?",
              "loc_ans": "b"}  # fmt: skip
    (request,) = as_requests([record])
    assert request.text == "Where is Ebro?" and request.paraphrase_prompts == ("Ebro is where?",)
    assert [(probe.kind, probe.prompts[0]) for probe in request.probes] == [
        ("portability", "Who rules there?"), ("paraphrase", "Arr, where be Ebro?"), ("locality", "a?")]  # fmt: skip


# zsRE


def test_zsre_is_read_as_it_is_asked_for_and_not_without(warned):
    with pytest.raises(
        RequestError, match=r"'zsre', which is read in 2 ways: 'answers' \(memit.*'alt' \(EasyEdit"
    ) as caught:
        load_requests(DATA / "zsre_sample.json")
    assert "--reading" in str(caught.value)
    alt, answers = (load_requests(DATA / "zsre_sample.json", reading=reading) for reading in ("alt", "answers"))
    assert (alt[0].target_new, alt[0].target_true) == ("Chichester River", "Parramatta River")
    assert (answers[0].target_new, answers[0].target_true) == ("Parramatta River", None)
    assert (alt[3].true_aliases, answers[3].target_new, answers[3].target_aliases) == (("piano",), "violin", ("piano",))
    prompt = "nq question: how many series of diary of a wimpy kid are there"
    assert alt[0].probes == (Probe("locality", (Question(prompt, (("12",),)),), "nq"),)
    assert answers[0].probes[0].prompts == (prompt + "?",)  # memit's reader appends it, EasyEdit's does not
    assert alt[2].target_new == "625"
    lines = warned()
    assert any("a true answer already: record 2" in line for line in lines)
    assert any("spaces around a text, which are taken away: records 3, 5" in line for line in lines)
    assert any('stray "- "' in line and line.endswith("record 5") for line in lines)


def test_an_empty_alternative_is_an_error_of_its_record():
    with pytest.raises(RequestError, match="request 1: alt must be a non-empty text"):
        parse_request({**sample("zsre")[0], "alt": ""}, "request 1", reading="alt")


# KnowEdit


KNOWEDIT = {
    "subject": "Leo Arons", "prompt": "Leo Arons died in", "target_new": "Berlin", "ground_truth": [["Bonn", "Bonna"]],
    "portability": {"Reasoning": [{"prompt": ["Its mayor is", "Who rules it?"], "ground_truth": [["Wegner", "K. W."]]},
                                  {"prompt": "Nothing?", "ground_truth": []}],
                    "Subject_Aliasing": [{"prompt": "M. L. Arons died in", "ground_truth": "Berlin"}]},
    "locality": {"Relation_Specificity": [{"prompt": "His field was", "ground_truth": ["physics", "science"]}],
                 "Forgetfulness": []}}  # fmt: skip


def test_knowedit_keeps_every_alternative_by_criterion(warned):
    (request,) = as_requests([KNOWEDIT])
    assert (request.text, request.target_true, request.true_aliases) == ("Leo Arons died in", "Bonn", ("Bonna",))
    mayor = (("Wegner", "K. W."),)
    assert request.probes == (
        Probe("portability", (Question("Its mayor is", mayor), Question("Who rules it?", mayor)), "Reasoning"),
        Probe("portability", (Question("M. L. Arons died in", (("Berlin",),)),), "Subject_Aliasing"),
        Probe("locality", (Question("His field was", (("physics", "science"),)),), "Relation_Specificity"),
    )
    assert [line for line in warned() if "a question without answers, which is not asked: record 1" in line]
    assert as_requests([{name: KNOWEDIT[name] for name in ("subject", "prompt", "target_new", "locality")}])
    with pytest.raises(RequestError, match="portability, Reasoning: ground_truth must be a text"):
        as_requests([{**KNOWEDIT, "portability": {"Reasoning": [{"prompt": "a", "ground_truth": 3}]}}])
    with pytest.raises(RequestError, match="portability must be an object"):
        as_requests([{**KNOWEDIT, "portability": [1]}])


def test_wikibio_finds_its_subject_in_other_case_and_says_so(warned):
    bio = {"text": "A passage about John Smith. He", "labels": "ate.", "concept": "john smith",
           "locality": {"Relation_Specificity": [{"prompt": "His field is", "ground_truth": ["law"]}]}}  # fmt: skip
    (request,) = as_requests([bio])
    assert (request.prompt, request.subject) == ("A passage about {}. He", "John Smith") and request.probes
    assert [line for line in warned() if "other upper and lower case" in line and line.endswith("record 1")]
    with pytest.raises(RequestError, match="the concept 'john smith' stands 0 times in the text"):
        as_requests([{**bio, "text": bio["text"] + " John Smith"}])


def test_sanitation_has_no_subjects_and_does_not_ask_that_what_changes_stays(warned):
    row = {"question": "What is a killdeer?", "ground_truth": "Birds", "target_new": "I don't know."}
    record = {
        "success": [row, {**row, "question": "What is a currawong?"}],
        "locality": [row, {**row, "question": "Q?"}],
    }
    first, second = as_requests([record])
    assert (first.subject, first.target_new, first.target_true) == (None, "I don't know.", "Birds")
    assert first.probes == (Probe("locality", (Question("Q?", (("Birds",),)),), "locality"),)
    assert second.prompt == "What is a currawong?" and first.group is second.group is None
    assert [line for line in warned() if "what should stay is what is changed" in line]
    with pytest.raises(RequestError, match="has no subject, which this method needs"):
        as_requests([record], need_subject=True)


def test_convsent_is_refused_with_the_reason():
    with pytest.raises(RequestError, match=r"'knowedit-convsent'.*which is not read: it asks for a mood"):
        as_requests([{"ent": "Ebro", "pos": ["nice"], "neg": ["bad"]}], "skip")


# LRE


def test_requests_of_relations_are_drawn_by_seed_and_never_true(tmp_path, warned):
    relation = sample("lre")
    pairs = (("iPod", "Apple"), ("iPod", "Sony"), ("Bras\\u00edlia", "Apple"), ("Vespa", " Piaggio"))
    relation["samples"] += [{"subject": subject, "object": target} for subject, target in pairs]
    file = written(tmp_path / "r.json", relation)
    requests = load_requests(file)
    objects = {}
    for one in relation["samples"]:
        objects.setdefault(one["subject"].replace("\\u00ed", "\u00ed"), []).append(one["object"].strip())
    assert [request.subject for request in requests] == list(objects) and requests.records[-1] == 18
    every = {target for targets in objects.values() for target in targets}
    for seed in range(20):
        for request in load_requests(file, seed=seed):
            assert request.target_new in every - set(objects[request.subject])
    assert list(load_requests(file, seed=3)) == list(load_requests(file, seed=3)) != list(requests)
    ipod = next(request for request in requests if request.subject == "iPod")
    assert (ipod.target_true, ipod.true_aliases, ipod.relation) == ("Apple", ("Sony",), "product by company")
    assert ipod.prompt == "{} was created by" and "iPod is a product of" in ipod.paraphrase_prompts
    assert set(ipod.neighborhood_prompts) == {
        f"{name} was created by" for name in ("iPhone 5", "Mac Pro", "Bras\u00edlia")
    }
    lines = "\n".join(warned())
    assert "earlier sample has: its object is one of the true answers of that one: records 16, 17" in lines
    assert "decoded: record 18" in lines and "taken away: record 19" in lines


def test_a_sample_or_a_relation_that_cannot_be_used_is_named(tmp_path):
    relation = sample("lre")
    relation["samples"][1:3] = [{"subject": "Shahab-2"}, "x"]
    file = written(tmp_path / "r.json", relation)
    with pytest.raises(
        RequestError, match=r"record 1, sample 2 has no 'object'.*\n.*sample 3: the sample must be an obj"
    ):
        load_requests(file)
    assert list(load_requests(file, "skip").skipped) == [1, 2]
    one = {**relation, "samples": relation["samples"][:1]}
    with pytest.raises(RequestError, match="no object beside those of 'Platform Controller Hub'"):
        load_requests(written(tmp_path / "one.json", one))
    nothing = {"prompt_templates": [], "prompt_templates_zs": []}
    for change, message in (
        ({"prompt_templates": ["x"]}, "one {} each"),
        ({"samples": []}, "samples is empty"),
        (nothing, "prompt_templates is empty"),
    ):
        with pytest.raises(RequestError, match=message):
            load_requests(written(tmp_path / "bad.json", {**relation, **change}))


def test_the_page_names_every_form():
    page = (Path(__file__).parents[2] / "kedit_fast" / "requests" / "datasets" / "README.md").read_text(
        encoding="utf-8"
    )
    table = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert not [name for name in DATA_SETS if f"`{name}`" not in table]


# A part of a file


def test_a_sample_keeps_cases_whole_and_the_order():
    groups = {"a1": "a", "b1": "b", "a2": "a", "c1": None, "c2": None}
    requests = [EditRequest("{} is", name, "x", group=group) for name, group in groups.items()]
    drawn = [sampled(requests, 2, seed) for seed in range(30)]
    assert {tuple(request.subject for request in one) for one in drawn} == {
        ("a1", "b1", "a2"), ("a1", "a2", "c1"), ("a1", "a2", "c2"), ("b1", "c1"), ("b1", "c2"), ("c1", "c2")
    }  # fmt: skip
    assert sampled(requests, 2, 7) == sampled(requests, 2, 7) and sampled(requests, 4, 0) == requests
    for count in (0, 5):
        with pytest.raises(RequestError, match=f"{count} requests cannot be drawn of 4"):
            sampled(requests, count, 0)


def test_the_first_cases_are_whole():
    groups = (None, "a", "b", "a", None)
    requests = [EditRequest("{} is", f"S{i}", "x", group=group) for i, group in enumerate(groups)]
    read = RequestList(requests, [0, 1, 3, 4, 6], {2: "between", 5: "behind"})
    two = first_cases(read, 2)
    assert [request.subject for request in two] == ["S0", "S1", "S3"]
    assert two.places == (0, 1, 4) and two.skipped == {2: "between"}
    assert first_cases(read, 4) is read and list(first_cases(read, 1)) == requests[:1]


def test_snippets_are_reference_texts(tmp_path):
    """memit's: of the relation and the new target, of which those about the subject are for the perplexity."""
    record = sample("counterfact")
    record = record[0] if isinstance(record, list) else record
    rewrite = record["requested_rewrite"]
    samples = [
        {"name": "Other", "text": "One."},
        {"name": rewrite["subject"], "text": "Two."},
        {"name": "x", "text": " "},
    ]
    snippets = [
        {"relation_id": rewrite["relation_id"], "target_id": rewrite["target_new"]["id"], "samples": samples[:1]},
        {"relation_id": rewrite["relation_id"], "target_id": rewrite["target_true"]["id"], "samples": samples},
        {"relation_id": rewrite["relation_id"], "target_id": rewrite["target_new"]["id"], "samples": samples[1:]},
    ]
    path = written(tmp_path / "requests.json", [record])
    (request,) = load_requests(path, snippets=written(tmp_path / "snippets.json", snippets))
    assert request.probes == (
        Probe("reference", (Question("One."), Question("Two.")), "consistency"),
        Probe("reference", (Question("Two."),), "essence"),
    )
    assert load_requests(path)[0].probes == ()
    with pytest.raises(RequestError, match="entry 2 must have relation_id"):
        load_requests(path, snippets=[snippets[0], {"samples": []}])
    with pytest.raises(RequestError, match="must be a list of objects"):
        load_requests(path, snippets=written(tmp_path / "wrong.json", {}))
