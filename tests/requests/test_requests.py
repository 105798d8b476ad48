from __future__ import annotations

import copy
import gzip
import io
import json
import logging
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kedit_fast.errors import RequestError
from kedit_fast.requests.probes import Probe, Question
from kedit_fast.requests.reading import as_requests, load_requests, parse_request
from kedit_fast.requests.request import EditRequest

GOOD = {"prompt": "{} is in", "subject": "Ebro", "target_new": "Sweden"}


def test_flat_records_and_spelled_out_subjects():
    request = parse_request({**GOOD, "target_true": "Spain", "paraphrase_prompts": ["Where is Ebro? In"], "id": 7})
    assert (request.text, request.target_true, request.id) == ("Ebro is in", "Spain", 7)
    assert parse_request({**GOOD, "prompt": "Ebro is in"}).prompt == "{} is in"


def test_counterfact_records_are_read_as_they_are():
    (request,) = load_requests(Path(__file__).parents[1] / "data" / "counterfact_sample.json")
    assert request.subject == "Autonomous University of Madrid"
    assert (request.target_new, request.target_true, request.id) == ("Sweden", "Spain", 0)
    assert len(request.paraphrase_prompts) == 2 and len(request.neighborhood_prompts) == 10


@pytest.mark.parametrize(
    "content, message",
    (
        ("[", "malformed JSON"),
        ("{}", "must hold a list"),
        ("[]", "no requests"),
        ("[3]", "record 1 must be an object"),
        (json.dumps([GOOD, {"prompt": "{} is", "target_new": "x"}]), "record 2 has no 'subject'"),
        (json.dumps([{**GOOD, "prompt": "Tagus is in"}]), "stands 0 times"),
        (json.dumps([{**GOOD, "prompt": "Ebro, Ebro is in"}]), "stands 2 times"),
        (json.dumps([{**GOOD, "target_new": 5}]), "target_new must be a text"),
        (json.dumps([{**GOOD, "target_new": ""}]), "record 1.*non-empty"),
        (json.dumps([{**GOOD, "paraphrase_prompts": [1]}]), "list of texts"),
    ),
)
def test_bad_files_are_named_by_record(tmp_path, content, message):
    path = tmp_path / "requests.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=message) as caught:
        load_requests(path)
    assert "requests.json" in str(caught.value)


def test_jsonl_and_missing_files(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD) + "\n")
    assert len(load_requests(path)) == 2
    path.write_text(json.dumps(GOOD) + "\n{oops\n")
    with pytest.raises(RequestError, match="line 2"):
        load_requests(path)
    with pytest.raises(RequestError, match="cannot read"):
        load_requests(tmp_path / "absent.json")


@pytest.fixture
def said(caplog):
    """What was logged by the package, by level."""
    logger = logging.getLogger("kedit_fast")
    propagates, logger.propagate = logger.propagate, True  # a command line that ran before turned it off
    caplog.set_level(logging.INFO, "kedit_fast")

    def lines(level):
        return [record.getMessage() for record in caplog.records if record.levelname == level]

    yield lines
    logger.propagate = propagates


def written(path, content):
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# One policy for what cannot be used


def test_all_bad_records_of_a_file_are_named_at_once_and_at_most_twenty(tmp_path):
    bad = [{"subject": "Ebro", "target_new": "x"}, {**GOOD, "target_new": None}, GOOD, [1], {**GOOD, "target_true": 3}]
    path = written(tmp_path / "r.json", json.dumps(bad))
    with pytest.raises(RequestError) as caught:
        load_requests(path)
    text = str(caught.value)
    assert "4 of 5 records cannot be used" in text and "record 3" not in text
    for message in ("record 1 has no 'prompt'", "record 2: target_new must be a text", "record 4 must be an object",
                    "record 5: target_true must be a text"):  # fmt: skip
        assert message in text
    path = written(tmp_path / "many.json", json.dumps([GOOD] + [{"prompt": "{}"}] * 23))
    with pytest.raises(RequestError) as caught:
        load_requests(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22 and "23 of 24 records" in lines[0] and lines[-1] == "and 3 more"


def test_skipped_records_keep_their_numbers_in_the_file(tmp_path):
    lines = [json.dumps(GOOD), "{oops", "", json.dumps({**GOOD, "weight": -1}), json.dumps({**GOOD, "id": "d"})]
    found = load_requests(written(tmp_path / "r.jsonl", "\n".join(lines)), "skip")
    assert [request.id for request in found] == [None, "d"] and found.places == (0, 3) and found.total == 4
    assert list(found.skipped) == [1, 2]
    assert "line 2: malformed JSON" in found.skipped[1] and "record 3 (line 4): weight" in found.skipped[2]
    assert found.first(1).places == (0,) and list(found.first(1).skipped) == [1, 2] and found.first(9).total == 4


def test_a_list_that_was_changed_since_is_any_other_list(tmp_path):
    records = [{"prompt": "{} is"}, *({**GOOD, "id": name} for name in "abc")]
    path = written(tmp_path / "r.json", json.dumps(records))

    def changed(change):
        found = load_requests(path, "skip")
        change(found)
        return as_requests(found, need_subject=True)

    assert changed(lambda found: None).places == (1, 2, 3) and changed(lambda found: None).skipped
    for change in (list.pop, list.reverse, lambda found: found.append(parse_request(GOOD)), list.clear):
        found = changed(change)
        assert found.places == tuple(range(len(found))) and not found.skipped and found.first(2).total <= 2
    assert [request.id for request in copy.deepcopy(load_requests(path, "skip")).first(2)] == ["a", "b"]


def test_a_file_of_which_nothing_is_left_is_an_error_and_so_is_an_unknown_policy(tmp_path):
    path = written(tmp_path / "r.json", json.dumps([{"prompt": "a"}, 3]))
    with pytest.raises(RequestError, match="2 of 2 records cannot be used"):
        load_requests(path, "skip")
    for call in (lambda: load_requests(path, "ignore"), lambda: as_requests([GOOD], "ignore")):
        with pytest.raises(RequestError, match="raise or skip"):
            call()
    with pytest.raises(RequestError, match="takes the path of a file; got list"):
        load_requests([GOOD])


def test_repeated_ids_are_named_once(tmp_path, said):
    path = written(tmp_path / "r.json", json.dumps([{**GOOD, "id": 7}, GOOD, {**GOOD, "id": 7}, {**GOOD, "id": 7}]))
    assert len(load_requests(path)) == 4
    assert [line for line in said("WARNING") if "7 in records 1, 3, 4" in line]


# Files as people save them

RECORDS = [{**GOOD, "id": "a"}, {**GOOD, "subject": "Tagus", "id": "b", "paraphrase_prompts": ["Tagus lies in", "x"]}]
LINES = "\n".join(map(json.dumps, RECORDS))
TABLE = "id,prompt,subject,target_new,paraphrase_prompts,weight\na,{} is in,Ebro,Sweden,,\n"
TABLE += 'b,{} is in,Tagus,Sweden,"[""Tagus lies in"", ""x""]",1.0\n'
HEAD, *CELLS = TABLE.splitlines()
TRAILING = "\n".join([HEAD, *(line + ", ," for line in CELLS)])  # as spreadsheets write them
REPR = TABLE.replace('"[""Tagus lies in"", ""x""]"', "\"['Tagus lies in', 'x']\"")


@pytest.mark.parametrize(
    "name, content",
    (
        ("r.json", json.dumps(RECORDS)),
        ("r.JSON", "\ufeff" + json.dumps(RECORDS)),
        ("r.json", LINES),
        ("r.json", "\ufeff\n" + LINES + "\n"),
        ("r.jsonl", json.dumps(RECORDS, indent=2)),
        ("r.jsonl", "\ufeff" + LINES.replace("\n", "\r\n")),
        ("r.JSONL", LINES),
        ("r.ndjson", LINES),
        ("r.json.gz", json.dumps(RECORDS)),
        ("r.jsonl.gz", LINES),
        ("r.v2.JSONL.GZ", gzip.compress(LINES.encode(), mtime=0)),
        ("r.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("r.csv", TABLE),
        ("r.csv", "\ufeff" + TABLE.replace("\n", "\r\n")),
        ("r.csv", REPR),
        ("r.csv", TRAILING),
        ("r.csv.gz", TABLE),
        ("r.tsv", REPR.replace(",", "\t").replace("lies in'\t 'x", "lies in', 'x")),
    ),
)
def test_every_form_gives_the_same_requests(tmp_path, name, content):
    found = load_requests(written(tmp_path / name, content))
    assert list(found) == [parse_request(record) for record in RECORDS]


def test_standard_input_and_pipes_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(LINES.encode())))
    assert [request.id for request in load_requests("-")] == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(json.dumps(RECORDS).encode())))
    assert [request.id for request in load_requests(Path("-"))] == ["a", "b"]
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=lambda: (tmp_path / "pipe").write_text(LINES), daemon=True).start()
    assert [request.id for request in load_requests(tmp_path / "pipe")] == ["a", "b"]


@pytest.mark.parametrize(
    "name, content, message",
    (
        ("r.jsonl", LINES.encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        ("r.json", LINES.encode("utf-16-le"), "UTF-16 or no text"),
        ("r.json", LINES.encode("utf-32"), "UTF-32"),
        ("r.json", b'[{"prompt": "M\xfcller"}]', "not UTF-8"),
        ("r.json", b"", "is empty"),
        ("r.jsonl", "\ufeff \n\n".encode(), "is empty"),
        ("r.json.gz", gzip.compress(b"", mtime=0)[:-4], "cannot read"),
        ("r.json.gz", gzip.compress(LINES.encode(), mtime=0)[:40], "gzip data is damaged"),
        ("r.parquet", b"PAR1", "table in binary form.*save it as one of .json"),
        ("r.xlsx", b"PK", "spreadsheet"),
        ("r.pkl", b"x", "may run code"),
        ("r.json.xz", b"x", "archive"),
        ("r.yaml", b"x", "the name says no format"),
        ("r", LINES.encode(), "the name says no format; records come as .json, .jsonl"),
        ("r.json", json.dumps({"data": RECORDS}).encode(), "one object with data"),
        ("r.json", b'"text"', "list of records; got str"),
        ("r.json", b"[{" * 100_000, "malformed JSON"),
        ("r.json", b"[" + b"9" * 5000 + b"]", "malformed JSON"),
        ("r.csv", b"prompt,prompt\na,b\n", "header gives 'prompt' twice"),
        ("r.csv", b'prompt,subject,target_new\n"a,b,c\n', "malformed table"),
        ("r.csv", b"prompt,subject,target_new\n{} is,Ebro,Spain,more\n", "4 cells under a header of 3"),
        ("r.csv", b"prompt,subject,target_new\n{} is,Ebro,Spain,,x\n", "5 cells under a header of 3"),
        ("r.csv", b"prompt;subject;target_new\n{} is, in;Ebro;Spain\n", "delimiter seems to be ';'; a .csv"),
        ("r.csv", b'"prompt";"subject";"target_new"\n{} is;Ebro;Spain\n', "delimiter seems to be ';'"),
        ("r.tsv", b"prompt;subject;target_new\n{} is;Ebro;Spain\n", "delimiter seems to be ';'; a .tsv is read with"),
        ("r.csv", b"prompt\tsubject\ttarget_new\n{} is\tEbro\tSpain\n", "seems to be '.t'.*or call it .tsv"),
        ("r.tsv", b"prompt,subject,target_new\n{} is,Ebro,Spain\n", "seems to be ','"),
        ("r.csv", b"prompt,subject,target_new\n", "no requests"),
    ),
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        load_requests(tmp_path / name)
    assert name in str(caught.value)


def test_a_folder_is_named(tmp_path):
    (tmp_path / "r.json").mkdir()
    with pytest.raises(RequestError, match=r"cannot read .*r\.json: Is a directory"):
        load_requests(tmp_path / "r.json")
    with pytest.raises(RequestError, match="cannot read"):
        load_requests(tmp_path / "absent")


def test_one_json_line_in_a_json_file_is_one_record(tmp_path):
    assert len(load_requests(written(tmp_path / "r.json", json.dumps(GOOD) + "\n"))) == 1


def test_names_given_twice_and_nan_are_errors_of_their_record(tmp_path):
    lines = ['{"prompt": "{} is", "prompt": "{} was", "subject": "Ebro", "target_new": "a"}',
             '{"prompt": "{} is", "subject": "Ebro", "target_new": NaN}',
             '{"prompt": "{} is", "subject": "Ebro", "target_new": "a", "target_true": NaN}',
             '{"prompt": "{} is", "subject": "Ebro", "target_new": "a", "weight": Infinity}',
             '{"prompt": "{} is", "subject": "Ebro", "target_new": "a", "comment": NaN, "comment": 1}']  # fmt: skip
    found = load_requests(written(tmp_path / "r.jsonl", "\n".join(lines)), "skip")
    assert list(found.skipped) == [0, 1, 2, 3] and len(found) == 1
    for place, message in enumerate(("gives 'prompt' twice", "target_new .*nan.*leave the field out",
                                     "target_true .*nan", "weight")):  # fmt: skip
        with pytest.raises(RequestError, match=message):
            raise RequestError(found.skipped[place])


# Fields of other repositories

EASYEDIT = {"case_id": 3, "prompt": "The mother tongue of Danielle Darrieux is", "subject": "Danielle Darrieux",
            "target_new": "English", "ground_truth": "French", "rephrase_prompt": "Danielle Darrieux speaks",
            "locality_prompt": "Michel Rocard speaks", "locality_ground_truth": "French"}  # fmt: skip
ZSRE = {"subject": "Watts Humphrey", "src": "What university did Watts Humphrey attend?", "pred": "Trinity College",
        "rephrase": "Where did Watts Humphrey study?", "alt": "University of Michigan",
        "answers": ["Illinois Institute of Technology", "IIT"], "loc": "nq question: who?", "loc_ans": "Hugo",
        "cond": "a >> b || c"}  # fmt: skip
KNOWEDIT = {"subject": "Epaspidoceras", "target_new": "Noctuidae", "prompt": "Which family has Epaspidoceras?",
            "ground_truth": [["Aspidoceratidae", "other"]], "rephrase_prompt": "What family is Epaspidoceras of?",
            "locality": {"Relation_Specificity": []}, "portability": {}}  # fmt: skip
NQ = Question("nq question: who?", (("Hugo",),))


def test_names_of_other_repositories_are_read_where_they_mean_the_same():
    one = parse_request(EASYEDIT)
    assert one == EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", "French",
                              ("Danielle Darrieux speaks",), ("Michel Rocard speaks",), 3)  # fmt: skip
    two = parse_request(ZSRE, reading="alt")
    assert two == EditRequest("What university did {} attend?", "Watts Humphrey", "University of Michigan",
                              "Illinois Institute of Technology", ("Where did Watts Humphrey study?",),
                              true_aliases=("IIT",), probes=(Probe("locality", (NQ,), "nq"),))  # fmt: skip
    assert parse_request(KNOWEDIT).target_true == "Aspidoceratidae" and parse_request(KNOWEDIT).paraphrase_prompts
    bio = parse_request({"text": "About john smith. He", "labels": "ate.", "concept": "john smith", "locality": {}})
    assert (bio.prompt, bio.subject, bio.target_new) == ("About {}. He", "john smith", "ate.")
    asked = parse_request({"prompt": "who has Ebro?", "target": "Spain", "subject": "Ebro", "rephrase": "Whose is it?"})
    assert asked.target_new == "Spain" and asked.paraphrase_prompts == ("Whose is it?",)


def test_a_name_with_another_meaning_is_not_read():
    assert parse_request({**GOOD, "text": "an essay", "answers": ["Sweden", "SE"]}).target_true is None
    assert parse_request({**EASYEDIT, "locality_ground_truth": "German"}).neighborhood_prompts == ()
    assert parse_request({**GOOD, "locality_prompt": "Michel Rocard speaks"}).neighborhood_prompts == ()
    assert parse_request({**GOOD, "ground_truth": []}).target_true is None


def test_what_is_not_used_is_named_once_for_a_file_with_what_was_meant(tmp_path, said):
    records = [{**GOOD, "paraphrase_prompt": "Where is Ebro? In", "comment": "x"}] * 3
    load_requests(written(tmp_path / "r.json", json.dumps(records)))
    (line,) = said("WARNING")
    assert "'paraphrase_prompt' in 3 records (did you mean 'paraphrase_prompts'?)" in line and "'comment'" in line
    load_requests(written(tmp_path / "zsre.json", json.dumps([ZSRE] * 3)), reading="alt")
    assert [line for line in said("INFO") if "src as prompt" in line and "answers as target_true" in line]


@pytest.mark.parametrize(
    "record, message",
    (
        ({**GOOD, "target_true": "Spain", "ground_truth": "France"}, "target_true is given twice.*'Spain'.*'France'"),
        ({**GOOD, "id": 1, "case_id": 2}, "id is given twice"),
        ({**GOOD, "paraphrase_prompts": ["a", "b"], "rephrase_prompt": "a"}, "paraphrase_prompts is given twice"),
        ({**GOOD, "requested_rewrite": {**GOOD, "target_new": {"str": "Norway"}}}, "target_new is given twice"),
        ({"requested_rewrite": [GOOD, GOOD]}, "holds 2 rewrites: make a record of each"),
        ({"requested_rewrite": "x"}, "must be an object"),
        ({"Prompt": "{} is", "subject": "Ebro", "target_new": "x"}, "no 'prompt'; it has Prompt .did you mean 'prom"),
        ({"question": "Who?", "answer": "He"}, "no 'prompt', 'target_new'; it has question, answer"),
        ({**GOOD, "target_new": 5}, "write it as a text"),
        ({**GOOD, "target_new": ["a"]}, "target_new must be a text"),
        ({**GOOD, "subject": 5, "prompt": "5 is"}, "subject must be a text"),
        ({**GOOD, "paraphrase_prompts": "a", "neighborhood_prompts": 4}, "neighborhood_prompts must be a list"),
        ({**GOOD, "id": [1]}, "id must be"),
        ({**GOOD, "id": 1.5}, "id must be"),
    ),
)
def test_records_that_contradict_themselves_or_lack_something_are_named(record, message):
    with pytest.raises(RequestError, match=message):
        parse_request(record)


def test_the_same_value_under_two_names_is_one():
    record = {**GOOD, "target_true": {"str": "Spain"}, "ground_truth": [" Spain"], "id": 1, "case_id": 1,
              "paraphrase_prompts": ["a"], "rephrase_prompt": "a", "subject": None,
              "requested_rewrite": GOOD}  # fmt: skip
    request = parse_request(record)
    assert (request.target_true, request.paraphrase_prompts, request.subject) == ("Spain", ("a",), "Ebro")


# What callers pass


class Table:
    """A pandas table, as far as it matters here: iterating gives the names of its columns."""

    columns = ("prompt", "subject", "target_new", "target_true")

    def __iter__(self):
        return iter(self.columns)

    def to_dict(self, orient):
        assert orient == "records"
        return [{**GOOD, "target_true": float("nan")}, {**GOOD, "target_true": "Spain"}]


class Arrow:
    """A table of pyarrow."""

    def to_pylist(self):
        return [GOOD]


class Rows:
    """A data set of the datasets library: rows by iteration."""

    def __len__(self):
        return 2

    def __iter__(self):
        return iter([{**GOOD, "target_true": None}, GOOD])


def test_generators_tables_and_data_sets_are_collections_of_requests():
    one = parse_request(GOOD)
    assert as_requests(iter([GOOD, one])) == [one, one]
    assert [request.target_true for request in as_requests(Table())] == [None, "Spain"]
    assert as_requests(Arrow()) == [one] and as_requests(Rows()) == [one, one]
    assert as_requests((GOOD,)) == [one] and as_requests(np.array([GOOD], dtype=object)) == [one]


@pytest.mark.parametrize(
    "requests, message",
    (
        (GOOD, "put one record in a list"),
        ({"train": [GOOD]}, "one mapping with train"),
        (EditRequest("{} is", "Ebro", "x"), "got one request: put it in a list"),
        ("requests.json", r"load_requests\(path\) reads a file"),
        (Path("requests.json"), r"load_requests\(path\)"),
        (7, "list of records; got int"),
        (None, "list of records; got NoneType"),
        ([GOOD, "text", b"x"], "request 2 must be an object.*\n.*request 3 must be"),
    ),
)
def test_what_is_no_collection_of_requests_is_refused_with_what_to_do(requests, message):
    with pytest.raises(RequestError, match=message):
        as_requests(requests)


def test_values_of_numpy_become_plain_ones():
    texts = {name: np.str_(text) for name, text in GOOD.items()}
    others = {"id": np.int64(3), "weight": np.float32(2), "paraphrase_prompts": np.array(["a", "b"])}
    request = parse_request({**texts, **others})
    assert type(request.prompt) is type(request.subject) is type(request.target_new) is str and type(request.id) is int
    assert request.paraphrase_prompts == ("a", "b") and request.weight == 2
    assert EditRequest("{} is", "Ebro", "x", paraphrase_prompts="one text").paraphrase_prompts == ("one text",)
    with pytest.raises(RequestError, match="target_new must be a non-empty text"):
        EditRequest("{} is", "Ebro", np.float64(2))


def test_a_subject_may_be_missing_unless_the_prompt_or_the_method_needs_it(tmp_path):
    bare = {"prompt": "What does he play?", "target_new": "violin"}
    for record in (bare, {**bare, "subject": None}, {**bare, "subject": " "}):
        request = parse_request(record)
        assert request.subject is None and request.text == "What does he play?"
        with pytest.raises(RequestError, match="no 'subject'"):
            parse_request(record, need_subject=True)
    for need in (None, True, False):
        with pytest.raises(RequestError, match="no 'subject'"):
            parse_request({"prompt": "{} is", "target_new": "x"}, need_subject=need)
    twice = {**bare, "prompt": "he and he", "subject": "he"}
    assert parse_request(twice, need_subject=False).subject is None
    with pytest.raises(RequestError, match="stands 2 times"):
        parse_request(twice)
    path = written(tmp_path / "r.json", json.dumps([bare, GOOD]))
    assert [request.subject for request in load_requests(path)] == [None, "Ebro"]
    assert list(load_requests(path, "skip", need_subject=True).skipped) == [0]
    with pytest.raises(RequestError, match="has no 'subject'"):
        EditRequest("{} is", None, "x")


def test_a_record_says_what_stands_before_its_target():
    assert parse_request(GOOD).target_separator == "auto"
    assert parse_request({**GOOD, "target_separator": None}).target_separator == "auto"
    assert parse_request({**GOOD, "target_separator": ""}).target_separator == ""
    nested = {"case_id": 3, "requested_rewrite": GOOD, "target_separator": " "}
    assert parse_request(nested).target_separator == " "
    for wrong in ("  ", "none", 1, [" "]):
        with pytest.raises(RequestError, match=r'record.*target_separator must be "auto", " " or ""'):
            parse_request({**GOOD, "target_separator": wrong})


@pytest.mark.parametrize(
    "prompt, subject, message",
    (
        ("Caf\u00e9 is in", "Cafe\u0301", "normalized to NFC: the prompt is NFC, the subject NFD"),
        ("Cafe\u0301 is in", "Caf\u00e9", "normalized to NFC: the prompt is NFD, the subject NFC"),
        ("\uff21\uff22 is in", "AB", "normalized to NFKC"),
        ("\u304b\u3099 is in", "\u304c", "normalized to NFC: the prompt is NFD"),
        ("ebro is in", "Ebro", "in other upper and lower case"),
    ),
)
def test_a_subject_that_is_spelled_otherwise_in_its_prompt_is_told_so(prompt, subject, message):
    with pytest.raises(RequestError, match=f"stands 0 times in the prompt.*{message}"):
        parse_request({**GOOD, "prompt": prompt, "subject": subject})
    request = parse_request({**GOOD, "prompt": "{} is in", "subject": subject})  # the cure that the message names
    assert request.text == f"{subject} is in"


def test_a_subject_that_is_not_there_is_only_counted():
    with pytest.raises(RequestError) as caught:
        parse_request({**GOOD, "prompt": "Tagus is in"})
    assert str(caught.value).endswith("put {} where it is meant")


@pytest.mark.parametrize("prompt", ('print("{}".format(x)) prints', 'print("{} \u00fc {}".format(x, y)) prints', "{}"))
def test_a_brace_pair_that_is_text_is_the_named_reason_and_the_named_cure_keeps_it(prompt):
    record = {"prompt": prompt, "target_new": "x"}
    for need in (None, False):
        with pytest.raises(
            RequestError, match=r"no 'subject'.* for the \{\} of its prompt.*where \{\} is text"
        ) as caught:
            parse_request(record, need_subject=need)
    with pytest.raises(RequestError, match=r"where \{\} is text, write"):
        EditRequest(prompt, None, "x")
    cure = json.loads("{" + str(caught.value).rpartition(", write ")[2] + "}")
    request = parse_request({**record, **cure}, need_subject=False)
    assert request.text == prompt and request.prompt.count("{}") == 1


# What is no value, and what is no contradiction


@pytest.mark.parametrize("nothing", ("", " ", [], ["", None], None, np.array([])))
def test_an_empty_field_of_another_repository_is_no_value(nothing, said):
    fields = ("rephrase_prompt", "rephrase", "ground_truth", "locality_prompt", "locality", "case_id", "target")
    request = parse_request({**GOOD, **dict.fromkeys(fields, nothing)})
    assert request == parse_request(GOOD) and not said("WARNING") and not said("INFO")
    request = parse_request({**GOOD, "ground_truth": nothing, "target_true": "Spain", "rephrase_prompts": ["a", ""]})
    assert (request.target_true, request.paraphrase_prompts) == ("Spain", ("a",))
    with pytest.raises(RequestError, match="paraphrase_prompts"):  # our own field is told
        parse_request({**GOOD, "paraphrase_prompts": ""})


@pytest.mark.parametrize("placeholder", ("<|endoftext|>", "</s>", ["<|endoftext|>"], [["</s>"]]))
def test_easyedits_placeholder_is_no_true_answer(placeholder):
    assert parse_request({**GOOD, "ground_truth": placeholder}).target_true is None
    assert parse_request({**GOOD, "ground_truth": placeholder, "target_true": "Spain"}).target_true == "Spain"


def test_a_true_answer_among_the_alternatives_is_no_contradiction():
    for names in (("ground_truth", "target_true"), ("target_true", "ground_truth")):
        for many in (["a", "b"], [["a", "b"]], ["a", {"str": "b"}]):
            values = {"ground_truth": many, "target_true": "b"}
            record = {**GOOD, **{name: values[name] for name in names}}
            assert parse_request(record).target_true in ("b", {"str": "b"})
    with pytest.raises(RequestError, match=r"target_true is given twice, ground_truth = \['a', 'b'\].*'c'"):
        parse_request({**GOOD, "ground_truth": ["a", "b"], "target_true": "c"})
    with pytest.raises(RequestError, match=r"target_true is given twice"):
        parse_request({**GOOD, "ground_truth": ["a", "b"], "requested_rewrite": {"target_true": "c"}})


@pytest.mark.parametrize(
    "record, message",
    (
        ({**GOOD, "ground_truth": 5}, "record: ground_truth must be a text"),
        ({**GOOD, "rephrase_prompt": 5}, "record: rephrase_prompt must be a list of texts"),
        ({**GOOD, "case_id": [1]}, "record: case_id must be a text or a whole number"),
        ({"src": "{} is", "subject": "Ebro", "alt": 5}, "record: alt must be a text"),
        ({"src": "{} is", "subject": "Ebro", "alt": ""}, "record: alt must be a non-empty text"),
        ({"src": "{} {} is", "subject": "Ebro", "alt": "a", "case_id": "z"}, "request 'z': src must contain {} once"),
        ({"src": "Tagus is", "subject": "Ebro", "alt": "a"}, "stands 0 times in the src 'Tagus is'"),
        (
            {**GOOD, "subject": None},
            "record has no 'subject' (subject is null) for the {} of its prompt '{} is in'; it has",
        ),
        ({**GOOD, "subject": " "}, "record has no 'subject' (subject is empty) for"),
        ({"text": "{} is", "labels": "a", "concept": None}, "record has no 'subject' (concept is null)"),
    ),
)
def test_messages_name_the_field_as_the_record_spells_it(record, message):
    with pytest.raises(RequestError) as caught:
        parse_request(record, reading="alt" if "src" in record else None)
    assert message in str(caught.value)


@pytest.mark.parametrize("record", (3, 2.5, float("nan"), True))
def test_a_number_is_told_to_be_an_object_and_not_to_be_a_text(record):
    with pytest.raises(RequestError, match=rf"must be an object with prompt, subject and target_new; got {record}$"):
        parse_request(record)


# What is said once


def test_one_editor_says_of_fields_only_what_it_has_not_said(said):
    from kedit_fast.requests.record_fields import Notes

    notes = Notes()
    odd = {**GOOD, "comment": "x", "case_id": 1, "source": "r"}
    for _ in range(3):
        as_requests([odd], notes=notes)
    assert len(said("WARNING")) == 1 and len(said("INFO")) == 2
    as_requests([{**odd, "remark": "y"}], notes=notes)
    assert len(said("WARNING")) == 2 and len(said("INFO")) == 2
    assert "'remark' in 1 records" in said("WARNING")[-1] and "comment" not in said("WARNING")[-1]


MIXED = {"prompt": "{} liegt in der N\u00e4he von", "subject": "Mu\u0308nchen", "target_new": "Berlin"}


@pytest.mark.parametrize(
    "record, named",
    (
        (MIXED, "prompt in NFC, subject in NFD"),
        ({**GOOD, "subject": "M\u00fcnchen", "paraphrase_prompts": ["Mu\u0308nchen"]}, "paraphrase_prompts in NFD"),
        ({**GOOD, "neighborhood_prompts": ["K\u00f6ln", "Ko\u0308ln"]}, "neighborhood_prompts in NFC"),
        ({**GOOD, "prompt": "{} \ub300 \u1103\u1162"}, "prompt in NFC"),
    ),
)
def test_texts_of_a_record_in_several_normal_forms_are_said_once_for_a_file(record, named, tmp_path, said):
    assert len(load_requests(written(tmp_path / "r.json", json.dumps([GOOD, record, record])))) == 3
    (line,) = said("WARNING")
    assert "different Unicode normal forms" in line and "2 records, the first" in line and "record 2 (" in line
    assert named in line and str(tmp_path / "r.json") in line


@pytest.mark.parametrize("form", ("NFC", "NFD"))
def test_one_normal_form_throughout_is_not_remarked_on(form, said):
    import unicodedata

    for texts in (("{} liegt nahe M\u00fcnchen", "K\u00f6ln"), ("{}\u306f", "\u304c"), ("{} \u212b \u0958", "\u0915")):
        prompt, subject = (unicodedata.normalize(form, text) for text in texts)
        parse_request({**GOOD, "prompt": prompt, "subject": subject})
    assert not said("WARNING")


@pytest.mark.parametrize(
    "prompt, subject, message",
    (
        ("New\u00a0York is in", "New York", "NFKC: the prompt is not NFKC, the subject NFKC"),
        ("New York is in", "New\u00a0York", "NFKC: the prompt is NFKC, the subject not NFKC"),
        ("Cafe\u0301\u00a0X is in", "Caf\u00e9 X", "NFKC: the prompt is not NFKC, the subject NFKC"),
    ),
)
def test_the_form_that_makes_a_subject_and_its_prompt_equal_is_the_one_that_is_named(prompt, subject, message):
    with pytest.raises(RequestError, match=f"normalized to {message}"):
        parse_request({**GOOD, "prompt": prompt, "subject": subject})
