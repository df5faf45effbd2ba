"""One spelling of an answer for what LaTeX, Unicode and plain text write in many ways."""

import re
import unicodedata
from fractions import Fraction

from verl.utils.reward_score.structure import closing

BARE_COMMANDS = (
    "arcsin|arccos|arctan|arccot|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt"
    "|pi|infty|alpha|beta|gamma|theta|lambda"
)
SYMBOLS = {
    **dict.fromkeys("−–—‐‑‒", "-"),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("°∘", r"^\circ "),
    **dict.fromkeys("“”„", '"'),
    "×": r"\times ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "√": r"\sqrt",
    "±": r"\pm ",
    "≤": r"\leq ",
    "≥": r"\geq ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    **dict.fromkeys("。٫", "."),
    "٬": ",",
    "’": "'",
}
TRANSLATION = str.maketrans(SYMBOLS)
SCRIPTS = {"<super>": "^", "<sub>": "_"}
WHOLE = r"(?<![A-Za-z\\])(?:{})(?![A-Za-z])"  # a word that is no part of a longer one and no command
END = r"(?![A-Za-z])"  # of a command

REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\s+", " "),  # first: the patterns below take long over many spaces
        # delimiters, boxes, sizes, spacing
        (r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1"),
        (r"\\[()]|(?<!\\)\\[\[\]]|(?<!\\)\$", " "),
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)" + END + r"\s*\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|mathstrut)" + END, " "),
        (
            r"\\(?:bf|it|rm|sf|tt|em|bfseries|normalsize|large|Large|LARGE|huge|Huge)"
            + END
            + r"|\\[hv]?phantom\s*\{[^{}]*\}",
            " ",
        ),
        (r"\\langle" + END, "("),
        (r"\\rangle" + END, ")"),
        (r"\\!", ""),
        (r"(?<=\d)(?:\\,|\{,\})(?=\d{3}(?!\d))", ","),
        (r"(?<=\d)\{,\}(?=\d)", "."),
        (r"(?<!\\)\\[,;:> ]|~|\\(?:q?quad|thinspace|enspace)" + END, " "),
        # one name for each command
        (r"\\[dtc]frac" + END, r"\\frac"),
        (r"\\[dt]binom" + END, r"\\binom"),
        (r"\\math(?:rm|it)\s*\{\s*([ei])\s*\}", r"\1"),
        (r"\\(?:mathbf|boldsymbol|bm|mathit|ensuremath)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|sf)|mbox|hbox|operatorname\*?)\s*\{", r"\\text{"),
        (r"\\(?:le|leqslant)" + END + "|<=", r"\\leq "),
        (r"\\(?:ge|geqslant)" + END + "|>=", r"\\geq "),
        (r"\\lt" + END, "<"),
        (r"\\gt" + END, ">"),
        (r"\\neq" + END + "|!=", r"\\ne "),
        (r"\\varnothing" + END + r"|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\[lc]dots" + END, r"\\dots"),
        (r"\\lbrace" + END, r"\\{"),
        (r"\\rbrace" + END, r"\\}"),
        (r"\\(mathbb|pmod)\s*(\w)", r"\\\1{\2}"),
        # words
        (r"\\%", "%"),
        (r"\s*(?:\\text\{\s*(?:%|per ?cent(?:age)?)\s*\}|" + WHOLE.format("per ?cent(?:age)?") + ")", "%"),
        (r"\s*,?\s*(?:\\text\{\s*(?:and|or)\s*\}|" + WHOLE.format("and|or") + r")\s*", ", "),
        (r"(?<=\d)\s*\^?\s*\{?\s*(?:\\text\{)?\s*(?:st|nd|rd|th)\s*\}?\s*\}?$", ""),
        (r"\^\s*\{?\s*\\(?:circ|degree)" + END + r"\s*\}?|\\degree" + END, r"\\text{degree}"),
        (r"\\text\{\s*(?:([-+]?\d[^{}]*))?\}", r"\1 "),
        (WHOLE.format("infinity|inf"), r"\\infty "),
        ("(" + WHOLE.format(BARE_COMMANDS) + ")", r"\\\1"),
        # arguments
        (r"\*\*", "^"),
        (r"\^\s*(-\d+|\d{2,})", r"^{\1}"),
        (r"_\s*(\d+|[A-Za-z])", r"_{\1}"),
        (r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\w)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}"),
        (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
        (r"(\\frac|\\sqrt|\})\s+\{", r"\1{"),
        (r"(^|[(\[,=])\s*\+", r"\1"),
        (r"^\s*(?:=|\\(?:approx|sim)" + END + ")", ""),
        (r"^(\s*-?\d+)\s*\(?\\?(?:pmod|bmod|mod)\s*\{?\s*\d+\s*\}?\)?\s*$", r"\1"),
        (r"\s+", " "),
    ]
]
TRAILING = re.compile(r"(?:(?<!\\)[\s.,;:]|\\\\|\\(?=$))+$")
PLAIN_ARGUMENT = re.compile(r"(?:\^|\\sqrt)\s*(?=\()")
LETTERS = re.compile(r"\\?[A-Za-z]+")
NO_PROSE = re.compile(BARE_COMMANDS + "|and|infinity")


def normal_form(text: str) -> str:
    """One spelling: ASCII digits, signs and commands; no delimiters, boxes, sizes or spacing commands; `\\text{}` for
    every upright font; `\\text{degree}` and `%`; braces around the arguments of fractions, roots and exponents."""
    text = text if text.isascii() else _ascii(text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = TRAILING.sub("", _brace_arguments(text).strip().strip("*")).strip()
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _ascii(text: str) -> str:
    out, script = [], ""
    for char in re.sub("√([0-9]+|[A-Za-z])", r"\\sqrt{\1}", text):
        tag = unicodedata.decomposition(char).partition(" ")[0]
        mark = SCRIPTS.get(tag, "")
        if mark != script:
            out.append("}" * bool(script) + f"{mark}{{" * bool(mark))
            script = mark
        if tag == "<fraction>":
            value = Fraction(unicodedata.numeric(char)).limit_denominator(10)
            out.append(f" \\frac{{{value.numerator}}}{{{value.denominator}}}")
        elif unicodedata.category(char) == "Nd":
            out.append(str(unicodedata.digit(char)))
        elif unicodedata.category(char) != "Cf":  # an invisible character
            out.append(char)
    return unicodedata.normalize("NFKC", "".join(out) + "}" * bool(script)).translate(TRANSLATION)


def _brace_arguments(text: str) -> str:
    """`x^(a)` and `\\sqrt(a)`, as plain text writes them, as `x^{a}` and `\\sqrt{a}`."""
    start = 0
    while match := PLAIN_ARGUMENT.search(text, start):
        start = match.end()
        end = closing(text, start)
        if end is not None and text[end] == ")":
            text = f"{text[:start].rstrip()}{{{text[start + 1 : end]}}}{text[end + 1 :]}"
    return text


def has_prose(text: str) -> bool:
    """Whether the text has words: three letters or more with a vowel, which no command and no name of a function is."""
    return any(
        len(word) > 2 and re.search("[aeiouAEIOU]", word) and not word.startswith("\\") and not NO_PROSE.fullmatch(word)
        for word in LETTERS.findall(text)
    )
