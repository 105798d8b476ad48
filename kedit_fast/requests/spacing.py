"""What stands between a prompt and its target: one rule for values, gradients, keys, metrics and completions.

"auto" decides from the two texts: a space if the prompt's script separates words by spaces and the target begins a
word. There is no space

- where the prompt is empty or ends with white space, or the target begins with white space;
- after scripts that do not separate words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan and others; Korean
  does), whatever the target's script. The prompt's last letter decides; digits, punctuation, marks, and what a bracket
  or a quotation encloses are skipped. Nor is there one before such a script if the prompt's last word has letters of
  one ("我喜欢Python"). A name in such a script at the end of words that spaces separate ("Who wrote 红楼梦?") does not
  decide for a target of another script;
- where the prompt ends in the middle of a word or expression: an opening bracket or quotation mark, wide punctuation,
  a slash, a hyphen or operator of any length that touches what is before it ("a->", but not "cheese ->"), stars that
  open emphasis, an elided word's apostrophe ("l'"), a currency sign;
- before a target that begins with anything but a letter or digit: `.path`, `(y)`, `, too`, an emoji, a combining mark.
  There are exceptions. An opening quotation mark, an inverted question mark, and a currency sign before a digit count
  as part of the word after them. So does a sign before a digit ("-5 degrees") after a word of prose, after a label, or
  after an operator that stands free. A bracket does not: `(y)` may follow code, and whoever continues prose with a
  bracket asks for " ".
"""

# ruff: noqa: RUF001 - marks that look alike are what this module tells apart

from __future__ import annotations

import re
import unicodedata
from typing import Literal, get_args

from kedit_fast.errors import RequestError

Separator = Literal["auto", " ", ""]
AUTO = "auto"
# Beginnings of Unicode's names of letters in scripts that are written without spaces between words.
_UNSPACED = (
    "CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH", "IDEOGRAPHIC", "HIRAGANA", "HENTAIGANA", "KATAKANA",
    "HALFWIDTH KATAKANA", "FULLWIDTH LATIN", "BOPOMOFO", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "TAI ",
    "NEW TAI LUE", "JAVANESE", "BALINESE", "BUGINESE", "CHAM ", "YI ", "NUSHU", "TANGUT",
)  # fmt: skip
_IDEOGRAPHS = range(0x20000, 0x40000)  # planes of ideographs, also of those newer than Python's tables
_OPENERS = {
    ")": "(", "]": "[", "}": "{", "”": "“", "’": "‘", "»": "«", "›": "‹", '"': '"', "`": "`", "）": "（", "］": "［",
    "」": "「", "』": "『", "》": "《", "〉": "〈", "】": "【", "〕": "〔",
}  # fmt: skip
_LOW_OPENERS = {"“": "„", "‘": "‚", "«": "»", "‹": "›"}  # mark -> the mark that it closes, where it does not open
_OPERATORS = "=<>|^&!+*/%~?:"  # what operators are made of, beside dashes
_SIGNS = "-−+~±∓≈"  # what may stand before a number
_CONTRACTION = re.compile(r"['’](?:s|t|re|ve|ll|d|m)\b", re.IGNORECASE)


def check_separator(requested: object) -> str:
    """The `Separator` itself; raises RequestError if it is none."""
    if not isinstance(requested, str) or requested not in get_args(Separator):
        raise RequestError(f'target_separator must be "auto", " " or ""; got {requested!r}')
    return requested


def separator(prompt: str, target: str, requested: str = AUTO) -> str:
    """What stands between `prompt` and `target`: " " or "".

    Args:
        prompt: the text before the target, as the model reads it.
        target: the text that continues it.
        requested: "auto" for the rule above; " " for a space unless there is white space already; "" for nothing.

    Raises:
        RequestError: `requested` is something else.
    """
    check_separator(requested)
    if prompt[-1:].isspace() or target[:1].isspace():
        return ""
    if requested != AUTO:
        return requested
    prompt, target = _without_marks(prompt), target.lstrip("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff")
    if not prompt or not _begins_word(prompt, target) or _inside_word(prompt, target) or _unspaced(prompt, target):
        return ""
    return " "


def _without_marks(text: str) -> str:
    """A text without the combining marks and invisible characters at its end."""
    while text and unicodedata.category(text[-1]) in ("Mn", "Mc", "Me", "Cf"):
        text = text[:-1]
    return text


def _begins_word(prompt: str, target: str) -> bool:
    """Whether a target begins with a letter or digit, or with a mark that belongs to the word after it."""
    first, rest = target[:1], target[1:]
    if not first:
        return False
    if _is_letter(first) or unicodedata.category(first)[0] == "N":
        return True
    if first in ('"', "`"):
        return prompt.count(first) % 2 == 0 and _begins_word("", rest)
    if first in ("'", "’"):  # a contraction or what closes a quotation, unless it is closed itself
        closed = re.search(r"\S['’](?!\w)", rest)
        return closed is not None and not _CONTRACTION.match(target) and _begins_word("", rest)
    if first == "»":
        return "«" in rest and _begins_word("", rest)
    if unicodedata.category(first) == "Pi" or first in "„‚¿¡":
        return _begins_word("", rest)
    if first in _SIGNS:
        number = re.match(r"\.?\d", rest) or (unicodedata.category(rest[:1] or " ") == "Sc" and rest[1:2].isdigit())
        return bool(number) and _takes_sign(prompt, first)
    return unicodedata.category(first) == "Sc" and unicodedata.category(rest[:1] or " ")[0] == "N"


def _takes_sign(prompt: str, sign: str) -> bool:
    """Whether a signed number after a prompt is a word of its own.

    It is after a word of prose, a label ("Answer:") and an operator that stands free. It is not after a number, a
    variable or other code; nor is "-" after a name, which it may continue ("COVID-19").
    """
    word = prompt.split()[-1] if prompt else ""
    core = word.strip("*:,;.!?…")
    if not any(map(str.isalnum, core)):
        return unicodedata.category(word[-1:] or " ") != "Pe"
    letters = sum(map(_is_letter, core))
    if letters < 2 or not all(map(_in_prose, core)):
        return False
    return sign != "-" or core == core.lower() or not word.endswith(core)


def _in_prose(character: str) -> bool:
    return _is_letter(character) or unicodedata.category(character) in ("Mn", "Mc", "Pd") or character in "'’"


def _inside_word(prompt: str, target: str) -> bool:
    """Whether the end of a prompt, which is not white space, attaches the next word to itself."""
    last, before = prompt[-1], prompt[-2:-1]
    kind = unicodedata.category(last)
    left = _before_operator(prompt)
    touching = bool(left) and not left[-1].isspace()
    digits = before.isdigit() and target[:1].isdigit()
    if kind[0] in "LN":
        return False
    if last in "'’":
        return _apostrophe_joins(prompt)
    if last in '"`' or kind in ("Pi", "Pf"):
        return _opens_quotation(prompt)
    if last == "/" and left[-1:].isspace():  # 6 / 2, 7 // 2 and what follows a comment's sign, but cd /usr
        return before != "/" and not _ends_in_operand(left.rstrip())
    if kind in ("Ps", "Pc") or last in "¿¡@~\\/∕⁄":
        return True
    if unicodedata.east_asian_width(last) in "WF" and kind != "So":
        return kind != "Pe"
    if last == "#":
        return not before.isalnum()
    if kind == "Sc":
        return not prompt[:-1].rstrip()[-1:].isdigit()
    if last == "*":
        power = "*" not in left and left[-1:].isdigit() and target[:1].isdigit()
        return power or _opens_emphasis(prompt, target)
    if last in ".+":
        return digits
    if last == ":":
        return before == ":" and (touching or not left)
    if last == "<" and not touching and re.search(r"(?:^|\n)\s*#\s*(?:include|include_next|import)\s*<$", prompt):
        return True
    if last == "<" and not touching and before != "<" and re.match(r"[^\s<>]+>", target):  # a tag
        return True
    return touching and (kind == "Pd" or last in "=<>|^&")


def _before_operator(prompt: str) -> str:
    """A prompt without the operators and dashes at its end."""
    end = len(prompt)
    while end and (prompt[end - 1] in _OPERATORS or unicodedata.category(prompt[end - 1]) == "Pd"):
        end -= 1
    return prompt[:end]


def _ends_in_operand(text: str) -> bool:
    """Whether a text without white space at its end ends in a number, a variable of one letter or a closing bracket."""
    return re.search(r"\d$|[)\]}]$|\b[^\W_]$", text) is not None


def _opens_emphasis(prompt: str, target: str) -> bool:
    """Of a prompt that ends with stars: whether they belong to what follows, as in "**bold" and "f(*args".

    Stars at the beginning of a word do, unless they multiply. They are taken to multiply, if the target has no stars
    that close them: "**" between numbers or variables, and "*" after a number, a variable, a closing bracket, or what
    is not a sentence (SELECT *).
    """
    left = prompt.rstrip("*")
    text = left.rstrip()
    if not text or unicodedata.category(left[-1]) in ("Ps", "Pi"):
        return True
    if not left[-1].isspace():
        return False
    stars = len(prompt) - len(left)
    if "\n" in left[len(text) :] or re.match(rf"[^\s*](?:[^*]*[^\s*])?\*{{{stars}}}", target):
        return True
    word = text.split()[-1]
    operand = _ends_in_operand(text)
    if stars > 1:
        return not (operand and (target[:1].isdigit() or re.match(r"\w\b", target)))
    if operand or not word[-1].isalpha():
        return not operand
    return len(text.split()) > 1 and not word.isupper() and not re.search(r"[=;(){}\[\]]", text)


def _apostrophe_joins(prompt: str) -> bool:
    """Of a prompt that ends with an apostrophe: whether it opens a quotation or elides a vowel, as in "l'"."""
    text = prompt[:-1]
    if not text or text[-1].isspace() or unicodedata.category(text[-1]) in ("Ps", "Pi"):
        return True
    word = re.search(r"[^\W\d_]*$", text)
    assert word is not None
    opened = re.search(r"(?:^|[\s(\[{])['‘][^'‘’]*$", text)
    possessive = len(word[0]) > 2 and word[0][-1] in "sSxXzZ"  # the boys'
    return bool(word[0]) and not opened and not possessive


def _opens_quotation(prompt: str) -> bool:
    """Of a prompt that ends with a quotation mark: whether it opens one."""
    last, text = prompt[-1], prompt[:-1]
    if last in '"`':
        return text.count(last) % 2 == 0
    if last in _LOW_OPENERS:  # „so“ and »so«
        return text.count(_LOW_OPENERS[last]) <= text.count(last)
    opener = _OPENERS.get(last, "")
    open_already = bool(opener) and text.count(opener) > text.count(last)
    return not open_already and last in "»›" and (not text or text[-1].isspace())


def _unspaced(prompt: str, target: str) -> bool:
    """Whether no space follows because of the prompt's script, or of the target's where the last word mixes scripts."""
    first = next((c for c in target if _is_letter(c) or c.isdigit()), "")
    if is_unspaced(_last_letter(prompt)):
        return is_unspaced(first) or not _ends_in_foreign_name(prompt)
    first = next(filter(_is_letter, target), "")
    return is_unspaced(first) and any(map(is_unspaced, prompt.split()[-1]))


def _ends_in_foreign_name(prompt: str) -> bool:
    """Of a prompt whose last letter is of an unspaced script: whether its last sentence is in a spaced script.

    It is if, outside of brackets and quotations, it has at least two words in spaced scripts and more of them than
    words with unspaced letters, and if its last unspaced letters do not continue a spaced word, as they do in
    "Harry Potter的作者是".
    """
    for closer, opener in _OPENERS.items():
        prompt = re.sub(f"{re.escape(opener)}[^{re.escape(closer)}]*{re.escape(closer)}", " ", prompt)
    prompt = re.sub(r"(?<!\w)'[^']+'", " ", prompt)
    prompt = re.split(r"[.!?]\s+(?=.*\w)|[。！？\n](?=.*\w)", prompt, flags=re.DOTALL)[-1]
    letters = [i for i, character in enumerate(prompt) if is_unspaced(character)]
    if not letters:
        return False
    end = letters[-1]
    while end and (is_unspaced(prompt[end]) or unicodedata.category(prompt[end])[0] == "M"):
        end -= 1
    unspaced = [any(map(is_unspaced, word)) for word in prompt.split() if any(map(_is_letter, word))]
    spaced = unspaced.count(False)
    return not prompt[end].isalnum() and spaced > max(1, unspaced.count(True))


def _last_letter(text: str) -> str:
    """The last letter of a text outside of brackets and quotations; inside if there is none before them; else ""."""
    while text:
        opener = _OPENERS.get(text[-1])
        begin = -1 if opener is None else text.rfind(opener, 0, len(text) - 1)
        if begin > 0 and any(map(_is_letter, text[:begin])):
            text = text[:begin]
        elif _is_letter(text[-1]):
            return text[-1]
        else:
            text = text[:-1]
    return ""


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] == "L" or ord(character) in _IDEOGRAPHS


def is_unspaced(character: str) -> bool:
    """Whether a character is of a script that is written without spaces between words; not of no character."""
    if not character:
        return False
    return ord(character) in _IDEOGRAPHS or unicodedata.name(character, "").startswith(_UNSPACED)
