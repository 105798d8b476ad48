"""What stands between a prompt and its target, from the texts alone."""

# ruff: noqa: RUF001 - marks that look alike are what is tested

from __future__ import annotations

import pytest

from kedit_fast.editing.spacing import separator
from kedit_fast.errors import RequestError

SPACE = (
    ("Miles Davis plays the", "violin"),
    ("The capital of China is", "北京"),  # the prompt's script separates words
    ("대한민국의 수도는", "서울"),  # Korean does
    ("हिन्दी की", "राजधानी"),  # ends with a combining vowel sign
    ("عاصمة مصر هي", "القاهرة"),
    ("cafe\u0301", "is"),
    ("In 1990", "France"),
    ("The answer is:", "Paris"),
    ("Paris (France)", "is"),
    ("In Tokyo (東京)", "is"),  # what a bracket encloses is not the sentence's script
    ("the book 《三体》", "was"),
    ('The book "Dune"', "is"),
    ("The book “Dune”", "is"),
    ("Er las „Faust“", "gern"),
    ("Il lit « Faust »", "souvent"),
    ("He said 'hello'", "and"),
    ("The boys'", "room"),
    ("Paris -", "France"),
    ("Москва –", "столица"),
    ("I love ❤️", "pizza"),
    ("It costs 5 €", "more"),
    ("50%", "of"),
    ("C++", "language"),
    ("2 + 2 =", "4"),
    ("**Answer:**", "Paris"),
    ("[/INST]", "Paris"),  # as plain text: what Llama 2's template does
    ("She said", '"hello"'),
    ("She said", "“hello”"),
    ("She said", "'hello'"),
    ("It costs", "$5"),
    ("Preguntó", "¿Qué?"),
    ("run", "`ls`"),
)
NOTHING = (
    ("中国的首都是", "北京"),
    ("中国的首都是", "Beijing"),  # the prompt's script decides
    ("日本の首都は", "東京"),
    ("ノート", "です"),
    ("เมืองหลวงของไทยคือ", "กรุงเทพ"),
    ("ນະຄອນຫຼວງແມ່ນ", "ວຽງຈັນ"),
    ("រាជធានី", "ភ្នំពេញ"),
    ("မြို့တော်", "ရန်ကုန်"),
    ("རྒྱལ་ས་", "ལྷ་ས"),
    ("\U00020000", "x"),
    ("\U00031400", "x"),  # an ideograph that is newer than Python's tables
    ("ａｂｃ", "d"),
    ("他出生于1990", "年"),
    ("他出生于", "1990"),
    ("答案是：", "Paris"),
    ("答案是:", "Paris"),
    ("Question：", "Paris"),  # wide punctuation brings its own space
    ("东京（Tokyo）", "是"),
    ("我喜欢《三体》", "这本书"),
    ("我喜欢Python", "语言"),  # a mixed word
    ("我说“", "你好"),
    ("我说“你好”", "了"),
    ("我爱🍕", "披萨"),
    ("", "violin"),
    ("x = ", "y"),
    ("The answer is:\n", "Paris"),
    ("is", " Paris"),
    ("is", "\nParis"),
    ("os", ".path"),
    ("print", "(y)"),
    ("a", "[0]"),
    ("Paris", ", France"),
    ("Paris", "，法国"),
    ("Paris", "'s streets"),
    ("the", "🍕"),
    ("e", "\u0301a"),
    ("foo(", "y"),
    ("He said “", "hello"),
    ('He said "', "hello"),
    ('He said "hello', '" and'),
    ("Er las »", "Faust"),
    ("l'", "eau"),
    ("d’", "Italie"),
    ("O'", "Brien"),
    ("well-", "known"),
    ("he said—", "no"),
    ("and/", "or"),
    ("https://example.com/", "a"),
    ("C:\\", "Users"),
    ("snake_", "case"),
    ("user@", "example"),
    ("std::", "vector"),
    ("ptr->", "next"),
    ("2+2=", "4"),
    ("3.", "14"),
    ("It costs $", "5"),
    ("**", "bold"),
    ("#", "tag"),
)


@pytest.mark.parametrize("prompt, target", SPACE)
def test_words_are_separated_where_the_script_does(prompt, target):
    assert separator(prompt, target) == " "


@pytest.mark.parametrize("prompt, target", NOTHING)
def test_nothing_is_added_where_a_writer_adds_nothing(prompt, target):
    assert separator(prompt, target) == ""


def test_what_is_asked_for_is_done_but_white_space_is_not_doubled():
    assert separator("中国的首都是", "北京", " ") == " "
    assert separator("Ebro is", "Spain", "") == ""
    assert separator("Ebro is ", "Spain", " ") == "" == separator("Ebro is", " Spain", " ")
    for wrong in ("  ", "space", None, True):
        with pytest.raises(RequestError, match='must be "auto", " " or ""; got'):
            separator("Ebro is", "Spain", wrong)


def test_no_code_adds_a_space_to_a_target_by_itself():
    from pathlib import Path

    import kedit_fast

    root = Path(kedit_fast.__file__).parent
    files = [path for path in root.rglob("*.py") if path.name != "easyedit_rows.py"]  # it repeats EasyEdit's rows
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert not [line for line in lines if '" " +' in line and ("target" in line or "object" in line)]
