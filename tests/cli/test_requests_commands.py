"""`kedit-fast requests`: show, convert, sample; --form and --reading wherever requests are read."""

from __future__ import annotations

import json
from pathlib import Path

from support import run

from kedit_fast import load_requests

DATA = Path(__file__).parents[1] / "data"
ZSRE = DATA / "zsre_sample.json"


def test_show_says_what_a_file_holds():
    done = run("requests", "show", ZSRE, "--reading", "alt", "-n", "2")
    assert done.returncode == 0 and "zsre (zsRE as MEND cut it" in done.stdout and "read by alt" in done.stdout
    assert "Chichester River" in done.stdout and "625 Xenia" not in done.stdout and "nq" in done.stdout
    told = json.loads(run("requests", "show", ZSRE, "--reading", "answers", "-n", "1", "--json").stdout)
    assert (told["form"], told["counts"]["requests"], told["counts"]["with_the_true_answer"]) == ("zsre", 5, 0)
    assert told["probes"] == [{"kind": "locality", "name": "nq", "requests": 5, "questions": 5}]
    assert [request["target_new"] for request in told["requests"]] == ["Parramatta River"] and told["skipped"] == []


def test_a_file_that_cannot_be_read_so_ends_with_the_reason():
    done = run("requests", "show", ZSRE)
    assert done.returncode == 1 and done.stdout == "" and "'answers'" in done.stderr and "--reading" in done.stderr
    done = run("requests", "show", DATA / "qaedit_sample.json")
    assert done.returncode == 1 and "1 of 4 records cannot be used" in done.stderr and "record 4" in done.stderr
    done = run("requests", "show", DATA / "qaedit_sample.json", "--on-error", "skip", "--json")
    assert done.returncode == 0 and [one["record"] for one in json.loads(done.stdout)["skipped"]] == [4]
    assert run("requests", "show", ZSRE, "--form", "nothing").returncode == 2
    done = run("plan", DATA, "--edits", 10, "--reading", "alt")
    assert done.returncode == 2 and "how --requests is read" in done.stderr
    model = DATA  # not read: the requests are looked at first
    for command in (("edit", model, "--out", "new"), ("suggest", model)):
        done = run(*command, "--requests", ZSRE)
        assert done.returncode == 1 and "--reading" in done.stderr, done.stderr
        done = run(*command, "--requests", ZSRE, "--reading", "alt", "--form", "flat")
        assert done.returncode == 1 and "the form 'flat' is read in one way" in done.stderr


def test_convert_writes_our_own_records_once(tmp_path):
    out = tmp_path / "own.jsonl"
    done = run("requests", "convert", ZSRE, "--reading", "alt", "--out", out, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["requests"] == 5
    assert load_requests(out).form == "flat" and list(load_requests(out)) == list(load_requests(ZSRE, reading="alt"))
    written = out.read_bytes()
    done = run("requests", "convert", ZSRE, "--reading", "answers", "--out", out)
    assert done.returncode == 1 and "--overwrite" in done.stderr and out.read_bytes() == written
    assert run("requests", "convert", ZSRE, "--out", out, "--overwrite").returncode == 1 and out.read_bytes() == written
    done = run("requests", "convert", ZSRE, "--reading", "answers", "--out", out, "--overwrite")
    assert done.returncode == 0 and load_requests(out)[0].target_true is None
    assert "written as .json" in run("requests", "convert", ZSRE, "--out", tmp_path / "own.csv").stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.jsonl"]


def test_sample_draws_by_seed(tmp_path):
    drawn = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.json"
        done = run("requests", "sample", DATA / "lre_sample.json", "-n", "3", "--seed", seed, "--out", out)
        assert done.returncode == 0 and "3 of 15 requests" in done.stdout
        drawn[name] = out.read_text()
    assert drawn["a"] == drawn["b"] != drawn["c"]
    done = run("requests", "sample", DATA / "lre_sample.json", "-n", "16", "--out", tmp_path / "d.json")
    assert done.returncode == 1 and "16 requests cannot be drawn of 15" in done.stderr
