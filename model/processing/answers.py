"""Judgement of text answers: exact match, and closed questions answered by yes, no or an option."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Sequence
from itertools import islice

import regex

SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー]"
"""Characters of scripts that are compared one by one: most of them set no blanks between words."""

CLOSED_TYPES = frozenset(("closed", "yes/no"))
"""Values of ``answer_type`` (lower case) that ask for ``closed_correct``; all others ask for ``exact_match``."""

LETTERS = rf"(?:(?!{SPACELESS})\p{{L}}\p{{M}}*)+"
"""A run of letters of any other script, with the marks that belong to them."""

_TAG = regex.compile(r"<think>.*?</think>|</?\p{L}[\w|]*\s*/?>|<\|\w+\|>", regex.DOTALL)
_LATEX = regex.compile(r"\\(?:boxed|text\w*|mathrm|mathbf)\s*\{((?:[^{}]|\\\}){0,200})\}")
_RAISED = regex.compile(r"(?<=\d)(?=[⁰¹²³⁴-⁹⁻])")
_FRACTION = regex.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")
_FORMAT = regex.compile(r"\p{Cf}+")
_EMPHASIS = regex.compile(
    r"(\*\*|__)(?=\S)(.{1,500}?)(?<=\S)\1(?!\*)|(?<![\w*])\*(?=[^\s*])([^*]{1,500})\*(?![\w*])", regex.DOTALL
)
_MINUS = regex.compile(r"−\s*(?=[\d.])|\bminus\s+(?=\d)", regex.IGNORECASE)  # it may stand apart from its number
_SAME_SIGN = (
    (regex.compile(r"\+/-|\+-(?=\s*\d)"), "±"),
    (regex.compile(r"\*\*|-+>"), " "),
    (regex.compile(r"\s*\(([+-])\)"), r"\1"),  # HER2 (+)
)
_CHARACTERS = str.maketrans(
    {"’": "'", "‘": "'", "⁄": "/", "∕": "/", "∼": "~", "∗": "*", "×": "x"}
    | dict.fromkeys("‐‑‒–−", "-")
    | dict.fromkeys("≥≧⩾", ">=")
    | dict.fromkeys("≤≦⩽", "<=")
)
_ARTICLE = regex.compile(  # hepatitis A and type A are names
    r"\b(?:[Tt]he|THE|[Aa]n|AN|a(?<!\b(?:type|class|group|grade|hepatitis|influenza|vitamin)\s+a)"
    r"|A(?<=^A|[.!?:;\n]\s*A))\s+(?=\p{L})"
)
_TOKEN = regex.compile(
    rf"""
    {LETTERS}(?:'{LETTERS})* | {SPACELESS}\p{{M}}*
    | (?P<number>(?:(?<![^\s(\[{{<>=~≈±^:;,/])[+-])?
      (?:\d{{1,3}}(?:,\d{{3}})+(?![\d,])(?:\.\d+)? | \d+(?:\.\d+)* | \.\d+)
      (?:e[+-]?\d+(?!\p{{L}}))?)
    | [<>]=? | !=  | \^(?=-?\d)
    | [-/:](?<=\d\s?.)(?=\s?\.?\d)                          # ranges, fractions, ratios: 5-10, 4/5, 3:1
    | -(?<=[\w)]-)(?=[\s,;.)/\]]|$)                           # HER2-, but not pre- and post-
      (?!(?<=\p{{Ll}}{{3}}-)\s+(?:and|or|to)\b)
    | -(?<=\w\s-)(?=[,;.)\]]|$) | -(?=ve\b)
    | \*(?<=\w\*)(?!\w)                                      # T2*
    | [\p{{Sm}}♂♀°%‰--=<>|*^→]
    """,
    regex.VERBOSE | regex.IGNORECASE | regex.VERSION1,
)


def exact_match(answer: str, reference: str) -> bool:
    """Whether two answers are the same words, numbers and signs in the same order.

    Case, punctuation, Markdown, tags, full-width forms and the articles a, an, the do not count. Numbers count by
    value with their sign, comparison operator, decimals and unit; so do the plus, minus and star behind a name (HER2-,
    T2*) and symbols such as %, ° and ↑. Chinese, Japanese, Korean and Thai are compared by characters, without blanks.
    """
    said, wanted = _plain(answer), _plain(reference)
    tokens = _tokens(said), _tokens(wanted)
    if tokens[0] == tokens[1]:
        return bool(tokens[0]) or said.split() == wanted.split()
    bare = _ARTICLE.sub("", said), _ARTICLE.sub("", wanted)
    return bare != (said, wanted) and _tokens(bare[0]) == _tokens(bare[1])


def closed_correct(answer: str, reference: str, options: Sequence[str] = ()) -> bool:
    """Whether a closed question is answered right.

    - A reference that begins with yes or no (是, 否, 有, 无, はい, 예 …) needs the same verdict at the start of the
      answer or after “the answer is”. An answer that gives both, or neither, is wrong; “there is no …” is a no.
    - A reference that is an option (``B``, ``B. CT``, ``(B) CT``, or one of ``options``) needs its letter, its text, or
      both if they agree. Two letters are wrong, and an article is no letter.
    - Any other needs the same words, numbers and signs (``exact_match``).

    Args:
        answer: what the model wrote.
        reference: the right answer.
        options: texts of the options in order, with or without their letters, where they are known.
    """
    option = _option(reference, options)
    if option is not None:
        return _chooses(answer, *option)
    wanted = _polarity(_plain(reference))
    if wanted is not None:
        return _verdict(answer) == wanted
    return any(exact_match(part, reference) for part in (answer, *_conclusion(_plain(answer))))


def options_of(question: str) -> list[str]:
    """Texts of the options that a question letters from A on; none where it does not letter at least two in order."""
    found = _LISTED.findall(question)
    lettered = len(found) > 1 and [letter for letter, _ in found] == list(string.ascii_uppercase[: len(found)])
    return [text for _, text in found] if lettered else []


def _plain(text: str) -> str:
    """The text with one spelling of each sign, without markup; its case is kept."""
    text = _LATEX.sub(r" \1 ", _TAG.sub(" ", text))
    text = unicodedata.normalize("NFKC", _FRACTION.sub(" ", _RAISED.sub("^", text)))
    text = _MINUS.sub("-", _EMPHASIS.sub(r"\2\3", _FORMAT.sub("", text))).translate(_CHARACTERS)
    for pattern, sign in _SAME_SIGN:
        text = pattern.sub(sign, text)
    return text.strip()


def _tokens(plain: str) -> list[str]:
    return [_by_value(m[0]) if m["number"] else m[0].casefold() for m in _TOKEN.finditer(plain)]


def _by_value(number: str) -> str:
    """One spelling of equal numbers: 1,000 and 1000, .5 and 0.50, +2 and 2."""
    sign, digits = ("-", number[1:]) if number[0] == "-" else ("", number.lstrip("+"))
    digits = digits.replace(",", "").casefold()
    if digits.count(".") == 1 and "e" not in digits:
        digits = digits.rstrip("0").rstrip(".")
    digits = digits.lstrip("0")
    return sign + (digits if digits[:1].isdigit() else f"0{digits}")


# --- yes and no -----------------------------------------------------------------------------------------------------

_CONCLUSION = regex.compile(
    r"\b(?:(?:answer|option|choice)(?:\s+to\b[^.:?!\n]{0,80}?)?\s*(?:(?:is|would\s+be|should\s+be|must\s+be)\b(?!n't)|[:=])"
    r"|(?:ans|response|output|assistant|conclusion)\s*[:=]|I(?:'d|'ll|\s+would|\s+will)?\s+(?:choose|pick|select|go\s+with))"
    r"|(?:答案|答え|答|정답|답)(?:是|为|為|は|은)?\s*:?|选项?|選項?",
    regex.IGNORECASE,
)
_LEAD = r"^[\W_]*(?:(?:well|so|therefore|thus|hence|okay|ok)\b[\W_]+)?"
_APART = r"(?=[\W_]|$)"
_YES = regex.compile(
    _LEAD
    + r"(?:yes\b(?!-\w)|是(?!否|不)|有(?![没沒无無限可时時])|(?:对|對|存在|はい|ある|あります|예|네|ใช่|มี)"
    + _APART
    + ")",
    regex.IGNORECASE,
)
_NO = regex.compile(
    _LEAD + r"(?:no\b(?!-\w|\.?\s*\d|\s+(?:idea|answer|information|conclusion|doubt|question)\b)"
    r"|there\s+(?:is|are|was|were)\s+no\b(?!\s+(?:doubt|question|way|information)\b)"
    r"|否|不是|不对|不對|不存在|没有|沒有|无(?!法)|未见|未見"
    r"|(?:没|沒|無|無し|なし|いいえ|ない|ありません|아니요|아니오|아니|없음|ไม่ใช่|ไม่มี|ไม่)" + _APART + ")",
    regex.IGNORECASE,
)
_BACK = r"^[\W_]*(?:(?:or|and|maybe|perhaps|possibly|probably|或者?|还是|還是)[\W_]*)*"
_TAKEN_BACK = {  # right behind the verdict or at the start of a later sentence
    True: regex.compile(
        rf"{_BACK}(?:no\b\s*(?:[^\w\s]|$)|没有|沒有|不是|否|无|無|아니|いいえ)"
        r"|^\s*(?:[/|&]|[\W_]*(?:or|maybe)\b)\s*no\b|[.!?\n]\s*no\s*(?:[,.!?]|$)",
        regex.IGNORECASE,
    ),
    False: regex.compile(rf"{_BACK}(?:yes\b|(?:是|有|예|はい)[\W_]*$)|[.!?\n]\s*yes\s*(?:[,.!?]|$)", regex.IGNORECASE),
}
_UNSURE = regex.compile(
    r"^[\W_]*+(?:(?:but|or|though|however)\b[\W_]*+)?(?:(?:i|it|this|that|we|one)\b\W?\s*(?:am|is|was|m|s|be)?\b\s*)?"
    r"(?:maybe|perhaps|possibly|probably|unsure|unclear|uncertain|(?:do(?:es)?\s*n[o']t|not)\s+(?:sure|certain|clear|know)"
    r"|(?:can\s?not|can't|could\s+not|unable\s+to|impossible\s+to|hard\s+to|difficult\s+to)\s+(?:be\s+)?"
    r"(?:tell|told|say|said|know|known|determined?|decided?|judged?|answer(?:ed)?)|不确定|不確定|不清楚|不知道)[\W_]*$",
    regex.IGNORECASE,
)


def _polarity(plain: str) -> bool | None:
    """Whether a text begins with yes (True) or no (False); None for any other."""
    for side, pattern in ((False, _NO), (True, _YES)):
        found = pattern.match(plain)
        if found:
            rest = plain[found.end() :]
            hedged = _TAKEN_BACK[side].search(rest) or _UNSURE.match(rest)
            return None if hedged else side
    return None


def _verdict(answer: str) -> bool | None:
    """The yes (True) or no (False) that an answer gives at its start or as its conclusion; None where they differ."""
    plain = _plain(answer)
    found = {_polarity(part) for part in (plain, *_conclusion(plain))}
    said = found - {None}
    return said.pop() if len(said) == 1 else None


def _conclusion(plain: str) -> list[str]:
    """What stands behind the last “the answer is” of a text, if there is one."""
    ends = [found.end() for found in _CONCLUSION.finditer(plain)]
    return [plain[ends[-1] :]] if ends else []


# --- options --------------------------------------------------------------------------------------------------------

_LISTED = regex.compile(r"(?:^|[\s;,])\(?([A-J])[).:]\s*(.+?)[\s;,]*(?=[\s;,]\(?[A-J][).:]|$)", regex.DOTALL)
_LABEL = regex.compile(r"[\W_]*([A-J])(?:[).:\]、]+\s*(.*)|\s*)$", regex.DOTALL | regex.IGNORECASE)
_LETTER = regex.compile(r"[\W_]*([A-Z])[\W_]*$", regex.IGNORECASE)
_CHOICE = regex.compile(
    r"[\W_]*(?:(?:option|choice|answer|letter)\b[\W_]*)?(?P<letter>[A-Z])"
    r"(?P<end>[\W_]*$|\s*(?:[).:\]、。]+|,|\(|\s-+\s|—)\s*|\s+(?=because\b|since\b)"
    r"|\s+is\s+(?:the\s+)?(?:(?:most\s+likely|best|right|correct)\s*)+(?:answer|option|choice)?[\W_]*$)?(?P<rest>.*)$",
    regex.DOTALL | regex.IGNORECASE,
)
_SIGNED = regex.compile(r"[A-Z]\s?[+-][\W_]*$", regex.IGNORECASE)  # a blood group
_SECOND_LETTER = regex.compile(
    r"(?:(?:and|or|maybe)\b|[&/,])?[\W_]*\b[A-Z](?:[).:\]、]|,|[\W_]*$|\s+(?:and|or)\b)", regex.IGNORECASE
)
_REASON = regex.compile(r"(?:because|since)\b", regex.IGNORECASE)
_SENTENCE = regex.compile(r"[.;\n]\s|\s\(")


def _option(reference: str, options: Sequence[str]) -> tuple[str, str] | None:
    """Letter (upper case) and text of the option that the reference names; None where it is no option."""
    plain = _plain(reference)
    if options:
        named = [_LABEL.match(_plain(option)) for option in options]
        whole = all(named) and len({found[1].upper() for found in named if found}) == len(named)
        pairs = [
            (found[1].upper(), found[2] or "") if whole and found else (letter, option)
            for letter, option, found in zip(string.ascii_uppercase, options, named, strict=False)
        ]
        for letter, text in pairs:
            if exact_match(reference, text) or exact_match(reference, f"{letter}. {text}"):
                return letter, text
        alone = _LETTER.match(plain)
        for letter, text in pairs:
            if alone and alone[1].upper() == letter:
                return letter, text
    found = _LABEL.match(plain) or _LETTER.match(plain)
    if found is None or _SIGNED.search(plain):
        return None
    return found[1].upper(), (found[2] or "" if found.re is _LABEL else "")


def _chooses(answer: str, letter: str, text: str) -> bool:
    plain = _plain(answer)
    parts = [plain, *_conclusion(plain)]
    if text and any(_same(part, text) for part in parts):
        return True
    found = [judged for part in parts if (judged := _names(part, letter, text)) is not None]
    return bool(found) and all(found)


def _names(part: str, letter: str, text: str) -> bool | None:
    """Whether a text that begins with an option's letter means this option; None where it begins with no letter."""
    found = _CHOICE.match(part)
    if found is None or _SIGNED.match(part.strip()):
        return None
    rest = found["rest"].strip()
    if found["end"] is None:  # "B CT": a letter only with the text that belongs to it; "A mass" has an article
        apart = rest != found["rest"] and found["letter"].upper() == letter
        return True if text and apart and _same(rest, text) else None
    if found["letter"].upper() != letter:
        return False
    if not rest or _REASON.match(rest):
        return True
    if not text:
        return not _SECOND_LETTER.match(rest)
    ends = (stop.start() for stop in islice(_SENTENCE.finditer(rest), 3))  # the text, then perhaps an explanation
    return any(_same(rest[:end], text) for end in (*ends, len(rest)))


def _same(part: str, text: str) -> bool:
    wanted = _polarity(_plain(text)) if len(_tokens(_plain(text))) == 1 else None
    return exact_match(part, text) if wanted is None else _verdict(part) == wanted
