"""What stands between a prompt and its target, from the texts alone."""

# ruff: noqa: RUF001 - marks that look alike are what is tested

from __future__ import annotations

import pytest

from kedit_fast.errors import RequestError
from kedit_fast.requests.spacing import separator

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
    ("Translate English to French: cheese =>", "fromage"),  # operators of any length that stand free
    ("cheese ->", "fromage"),
    ("x ==", "y"),
    ("x !=", "y"),
    ("x +=", "1"),
    ("x /=", "2"),
    ("a &&", "b"),
    ("A ||", "B"),
    ("1 <=", "2"),
    ("x ::", "Int"),
    ("cout <<", "x"),
    (">>>", "print"),
    ("He said --", "no"),
    ("He said ---", "no"),
    ("x <", "5"),
    ("6 /", "2"),
    ("7 //", "2"),
    ("5 *", "3"),
    ("2 **", "3"),
    ("(a + b) *", "c"),
    ("area = width *", "height"),
    ("SELECT *", "FROM"),
    ("This is **bold** and *this*", "too"),
    ("Who wrote 红楼梦?", "Cao Xueqin"),  # a name does not decide for the sentence it is in
    ("Who wrote 红楼梦?", '"Cao Xueqin"'),
    ("The capital of 日本", "is Tokyo"),
    ("The capital of 日本:", "Tokyo"),
    ("How do you say 你好 in 中文?", "nihao"),
    ("What is the capital of ประเทศไทย?", "Bangkok"),
    ("Кто написал 红楼梦?", "Цао"),
    ("I read. Who wrote 红楼梦?", "Cao"),
    ("x = a /", "b"),
    ("The first year of 明朝:", "1368"),
    ("The temperature is", "-5 degrees"),  # a sign before a digit
    ("The temperature is", "−5"),
    ("a loss of", "-$5"),
    ("drops by", "-.5"),
    ("Call", "+1"),
    ("about", "~100"),
    ("off by", "±3"),
    ("Answer:", "-5"),
    ("2 - 7 =", "-5"),
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
    ("a->", "b"),
    ("a&&", "b"),
    ("x==", "y"),
    ("x+=", "1"),
    ("::", "std"),
    ("2**", "3"),
    ("(-", "5"),
    ("cd /", "usr"),
    ("#include <", "stdio.h"),
    ("#import <", "Foundation.h"),
    ("vector <", "int>"),
    ("This is **", "bold"),
    ("This is *", "italic"),
    ("5 *", "small* things"),
    ("f(*", "args"),
    ("f(a, **", "kwargs"),
    ("x = *", "p"),
    ("Who wrote 红楼梦?", "曹雪芹"),
    ("红楼梦的作者是", "Cao Xueqin"),
    ("《Harry Potter》的作者是", "Rowling"),
    ("Lord of the Rings的作者是", "Tolkien"),
    ("iPhone是", "Apple"),
    ("Here is what I read. 红楼梦的作者是", "Cao"),  # the last sentence decides, not a context before it
    ("Go on in this way:\n红楼梦的作者是", "Cao"),
    ("'Harry Potter and the Stone'的作者是", "Rowling"),
    ("x=", "-5"),
    ("2", "+2"),
    ("x", "-1"),
    ("self.x", "-1"),
    ("f(x)", "-5"),
    ("foo(", "-5"),
    ("COVID", "-19"),
    ("MiG", "-21"),
    ("温度是", "-5度"),
    ("in", "~/x"),
    ("is", "-b"),
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
