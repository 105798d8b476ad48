from __future__ import annotations

import gzip
import itertools
import json
import os
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import TEXT, make_tokenizer

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.statistics.corpus import START, Corpus, Position, Reader, ahead, batches
from kedit_fast.statistics.sources import open_texts
from kedit_fast.support import process_group

DOCUMENTS = [f"{text} Number {i}." * (1 + i % 7) for i, text in enumerate(TEXT * 30)]


def reader(texts=DOCUMENTS, batch_tokens=16, max_length=64, **numbers):
    made = Reader(make_tokenizer(), Corpus(texts, **numbers), batch_tokens, max_length)
    made._characters = 2000  # windows of a few documents
    return made


def ids(texts, max_length=64):
    return make_tokenizer()(list(texts), truncation=True, max_length=max_length)["input_ids"]


def in_windows(made, start=None):
    return [document.ids for window in made.windows(start) for document in window.documents]


def test_every_document_comes_once_and_in_order():
    made = reader()
    windows = list(made.windows())
    assert len(windows) > 5
    assert in_windows(made) == ids(DOCUMENTS)
    assert windows[-1].after.documents == len(DOCUMENTS)
    assert windows[-1].after.tokens == sum(map(len, ids(DOCUMENTS)))
    assert all(a.after == b.before for a, b in itertools.pairwise(windows))


@pytest.mark.parametrize("budget", (1, 2, 63, 64, 65, 500, 10**9))
def test_a_budget_of_tokens_ends_inside_a_document(budget):
    whole = [i for row in ids(DOCUMENTS) for i in row]
    made = reader(max_tokens=budget)
    assert [i for row in in_windows(made) for i in row] == whole[:budget]
    assert list(made.windows())[-1].after.tokens == min(budget, len(whole))


def test_samples_and_length_limit_documents():
    assert in_windows(reader(max_samples=13)) == ids(DOCUMENTS[:13])
    assert in_windows(reader(max_length=5)) == ids(DOCUMENTS, 5)
    assert list(reader(max_samples=13).windows())[-1].after.documents == 13


def test_a_seed_gives_one_order_that_is_not_the_documents_own():
    a, b = in_windows(reader(seed=1)), in_windows(reader(seed=1))
    assert a == b and a != ids(DOCUMENTS) and sorted(a) == sorted(ids(DOCUMENTS))
    assert in_windows(reader(seed=2)) != a
    with pytest.raises(InvalidArgumentError, match="sequence"):
        Corpus(iter(DOCUMENTS), seed=1)


def test_a_place_is_found_again_and_other_text_is_refused():
    made = reader()
    windows = list(made.windows())
    place = windows[3].before
    again = list(made.windows(place))
    assert [w.documents for w in again] == [w.documents for w in windows[3:]]
    assert again[-1].after == windows[-1].after
    other = list(DOCUMENTS)
    other[place.documents - 1] += "!"
    with pytest.raises(StatisticsError, match="not the one that was begun with"):
        list(reader(other).windows(place))
    with pytest.raises(StatisticsError, match="not the one that was begun with"):
        list(reader(DOCUMENTS[:1]).windows(place))
    inside = Position(0, 0, 0, START, 1, windows[0].after.digest)  # in the first window
    assert in_windows(reader(), inside) == ids(DOCUMENTS)
    with pytest.raises(StatisticsError, match="not the one that was begun with"):
        list(reader(["Another one.", *DOCUMENTS]).windows(inside))
    later = [*DOCUMENTS[: place.documents], "Something else."]
    assert in_windows(reader(later), place) == ids(["Something else."])


def test_an_iterator_can_be_read_once():
    assert in_windows(reader(iter(DOCUMENTS))) == ids(DOCUMENTS)
    assert Corpus(DOCUMENTS).repeatable and not Corpus(iter(DOCUMENTS)).repeatable


def test_empty_documents_count_as_documents_alone():
    windows = list(reader(["", "A word.", ""]).windows())
    assert [document.ids for w in windows for document in w.documents] == ids(["A word."])
    assert windows[-1].after.documents == 3 and list(reader([]).windows()) == []


def test_windows_end_at_long_documents_too():
    made = reader(["word " * 8_000] * 6, max_length=8)
    assert len(list(made.windows())) == 6 and len(in_windows(made)) == 6


def test_what_is_not_text_is_named():
    with pytest.raises(StatisticsError, match="document 1 is a NoneType"):
        list(reader(["a", None, "b"]).windows())
    for bad in (3.5, True, "3"):
        with pytest.raises(InvalidArgumentError, match="max_tokens must be a positive integer"):
            Corpus(["a"], max_tokens=bad)
    with pytest.raises(StatisticsError, match="document 1 is a int"):
        list(reader(["a", 3]).windows())
    for path in (Path("text.txt"), b"text.txt"):
        with pytest.raises(InvalidArgumentError, match="open_texts reads a file"):
            Corpus(path)
    with pytest.raises(InvalidArgumentError, match="one string"):
        Corpus("a text")
    with pytest.raises(InvalidArgumentError, match="max_tokens"):
        Corpus(["a"], max_tokens=0)


@pytest.mark.parametrize("budget", (None, 1, 500, 2000, 10**9))
@pytest.mark.parametrize("world", (2, 3))
def test_processes_share_the_windows_of_one(monkeypatch, world, budget):
    """Without a process group: every rank's reader, its counts exchanged by hand, round by round."""
    tokenizer = make_tokenizer()
    alone, counted = reader(max_tokens=budget), list(counts_by_round(world))
    parts = []
    for rank in range(world):
        monkeypatch.setattr(process_group, "world", lambda rank=rank: (rank, world))
        made = Reader.__new__(Reader)
        made.tokenizer, made.corpus, made.max_length, made.vocabulary = tokenizer, Corpus(DOCUMENTS, budget), 64, None
        made._rank, made._world, made._characters, made._documents, made._last_tokens = rank, world, 2000, None, None
        if budget is not None:
            rounds = iter(counted)
            monkeypatch.setattr(process_group, "gather", lambda mine, rounds=rounds: next(rounds))
            made._find_end(budget)
        parts.append(list(made.windows()))
        assert list(made.windows(parts[-1][-1].after)) == []  # a share that had ended, gone on with
    monkeypatch.undo()
    for number, window in enumerate(alone.windows()):
        for rank, part in enumerate(parts):
            assert part[number].documents == (window.documents if number % world == rank else [])
            assert part[number].after.digest == window.after.digest
    assert all(len(part) == number + 1 for part in parts)


def counts_by_round(world):
    lengths = [[len(d) for d in w.documents] for w in reader().windows()]
    for begin in range(0, len(lengths), world):
        found = lengths[begin : begin + world]
        yield found + [[]] * (world - len(found))


def test_batches_hold_the_budget_and_lose_nothing():
    sequences = ids(DOCUMENTS)
    found = list(batches(sequences, 100))
    assert sorted(row for rows in found for row in rows) == sorted(sequences)
    assert all(len(rows) == 1 or len(rows) * max(map(len, rows)) <= 100 for rows in found)
    assert all(len(a[-1]) >= len(b[0]) for a, b in itertools.pairwise(found))


def test_items_are_made_ahead_by_a_thread_that_ends():
    begun = threading.active_count()
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    source = ahead(items())
    assert next(source) == 0
    for _ in range(200):
        if len(made) > 1:
            break
        threading.Event().wait(0.01)
    assert len(made) > 1  # before it was asked for
    source.close()
    assert threading.active_count() == begun and len(made) < 10
    assert list(ahead(items())) == list(range(100))

    def failing():
        yield 1
        raise StatisticsError("line 2")

    with pytest.raises(StatisticsError, match="line 2"):
        list(ahead(failing()))
    assert threading.active_count() == begun


def test_text_files_are_read_line_by_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "One.\r\n\n  \n\u00a0\nZwei ü.\nlast".encode())  # a byte order mark, blanks
    texts = open_texts(path)
    assert list(texts) == ["One.", "Zwei ü.", "last"] and len(texts) == 3 and texts[-1] == "last"
    assert texts[1:] == ["Zwei ü.", "last"]
    lines = [json.dumps({"body": t}) for t in ("A\nB", "C")]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    assert list(open_texts(tmp_path / "a.jsonl", "body")) == ["A\nB", "C"]


def test_a_pipe_is_read_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=lambda: (tmp_path / "pipe").write_text("One.\nTwo."), daemon=True).start()
    assert list(open_texts(tmp_path / "pipe")) == ["One.", "Two."]


SMALL = ["One.", "Zwei ü.", "three"]
RECORDS = [{"text": text} for text in SMALL]
LINES = "\n".join(json.dumps(record) for record in RECORDS)


@pytest.mark.parametrize(
    "name, content",
    (
        ("a.txt", "\ufeff" + "\n".join(SMALL)),
        ("a.txt.gz", "\n\n".join(SMALL)),
        ("a", "\n".join(SMALL)),
        ("a.jsonl", "\ufeff" + LINES),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.jsonl.gz", LINES),
        ("a.json", json.dumps(RECORDS)),
        ("a.json", "\ufeff\n " + json.dumps(RECORDS, indent=1)),
        ("a.json", json.dumps(SMALL)),
        ("a.json", LINES),
        ("a.jsonl", json.dumps(RECORDS)),
        ("a.json.gz", json.dumps(RECORDS)),
        ("a.csv", "id,text\n1,One.\n2,Zwei ü.\n3,three\n"),
        ("a.tsv.gz", "id\ttext\n1\tOne.\n2\tZwei ü.\n3\tthree\n"),
    ),
)
def test_every_form_of_a_text_gives_the_same_documents(tmp_path, name, content):
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    texts = open_texts(tmp_path / name)
    assert list(texts) == SMALL and len(texts) == 3 and texts[1:] == SMALL[1:] and texts[-1] == "three"


@pytest.mark.parametrize(
    "name, content",
    (
        ("a.csv", "text,id\n,1\nOne.,2\n,3\n"),
        ("a.csv", "id,text\n1,\n2,One.\n3\n"),
        ("a.csv", "id,text\n1,,\n2,One.,\n3,,\n"),
        ("a.tsv", "id\ttext\n1\t\n2\tOne.\n3\t\n"),
        ("a.json", '[{"text": ""}, {"text": "One."}, {"text": ""}]'),
    ),
)
def test_an_empty_text_is_an_empty_document_in_tables_as_in_json(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert list(open_texts(tmp_path / name)) == ["", "One.", ""]


@pytest.mark.parametrize(
    "name, data, message",
    (
        ("a.txt", "One.".encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        ("a.jsonl", LINES.encode("utf-16-le"), "UTF-16 or no text"),
        ("a.txt.gz", gzip.compress(b"One." * 100, mtime=0)[:20], "gzip data is damaged"),
        ("a.json.gz", gzip.compress(b"[1]", mtime=0)[:12], "cannot read"),
        ("a.parquet", b"PAR1", "table in binary form.*datasets:NAME"),
        ("a.txt.zip", b"PK", "archive"),
        ("a.json", b'[{"text": "a"}, {"body": "b"}]', "record 2: no text in field 'text'.*--field"),
        ("a.csv", b"id,body\n1,b\n", "record 1 .line 2.: no text in field 'text'"),
        ("a.csv", b"id;text\n1;b\n", "the delimiter seems to be ';'"),
        ("a.csv", b"id,text\n1,\n2,\n", "no text"),
        ("a.json", b"[]", "holds no text"),
        ("a.json", b'["", " "]', "holds no text"),
        ("a.json", b"[oops", "malformed JSON"),
    ),
)
def test_texts_that_cannot_be_read_say_why(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(StatisticsError, match=message) as caught:
        open_texts(tmp_path / name)
    assert name in str(caught.value)


def test_a_text_may_hold_a_nul_and_a_folder_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\nwith a \0 in it\n")
    assert list(open_texts(tmp_path / "a.txt")) == ["One.", "with a \0 in it"]
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(StatisticsError, match=r"cannot read .*a.jsonl: Is a directory"):
        open_texts(tmp_path / "a.jsonl")


def test_bad_files_are_named_with_the_line(tmp_path):
    with pytest.raises(StatisticsError, match=r"cannot read .*absent"):
        open_texts(tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(StatisticsError, match="holds no text"):
        open_texts(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"good\n\nM\xfcller\n")
    with pytest.raises(StatisticsError, match=r"latin.txt, line 3 is not UTF-8"):
        list(open_texts(tmp_path / "latin.txt"))
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": 3}\n{broken\n')
    texts = open_texts(tmp_path / "b.jsonl")
    with pytest.raises(StatisticsError, match=r"line 2: no text in field 'text'"):
        texts[1]
    with pytest.raises(StatisticsError, match=r"line 3: malformed JSON"):
        texts[2]


def test_a_data_set_by_its_name(monkeypatch, tmp_path):
    with pytest.raises(StatisticsError, match=r"pip install 'kedit-fast\[datasets\]'"):
        monkeypatch.setitem(sys.modules, "datasets", None)
        open_texts("datasets:wikitext")
    asked = []

    class Rows(list):
        column_names = ("title", "text")

        def __getitem__(self, index):
            rows = super().__getitem__(index)
            return {"text": [r["text"] for r in rows]} if isinstance(index, slice) else rows

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        if path == "none":
            raise FileNotFoundError("no such data set\nmore")
        return Rows({"title": "t", "text": text} for text in TEXT)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    texts = open_texts("datasets:wikimedia/wikipedia:20231101.en:train[:4]")
    assert list(texts) == TEXT and texts[2] == TEXT[2] and texts[:2] == TEXT[:2] and len(texts) == len(TEXT)
    open_texts("datasets:folder", "title")
    assert asked == [("wikimedia/wikipedia", "20231101.en", "train[:4]"), ("folder", None, "train")]
    with pytest.raises(StatisticsError, match="no field 'body', only title, text"):
        open_texts("datasets:folder", "body")
    with pytest.raises(StatisticsError, match="cannot load the data set none: no such data set"):
        open_texts("datasets:none")


def test_the_first_place_is_before_everything():
    assert Position() == Position(0, 0, 0, START, 0, "")
