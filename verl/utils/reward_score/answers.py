"""Which part of a response is its answer.

A response may hold several candidates. The one that stands last counts, because it is the one the model settled on;
a box that was never closed (a response cut off) is no candidate. Every function is linear in the length of the text.
"""

import re

from verl.utils.reward_score.latex import has_prose
from verl.utils.reward_score.symbolic import extract

MAX_LINES = 8  # after "Answer:", in which an answer is looked for
MAX_LINE = 200  # characters of a bare line, and of a sentence, that is read as an answer

BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
BETWEEN_BOXES = re.compile(r"[\s$]*(?:[,;]|(?:[,;]\s*)?(?:\\text\s*\{\s*)?(?:and|or)(?:\s*\})?)[\s$]*")
ANSWER_LINE = re.compile(
    r"^[^\w\n]*(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t]*[*_]*[ \t]*[:：]", re.IGNORECASE | re.MULTILINE
)
# A sentence of one line to the end of the text, but for a hope that it is right; a question is no answer.
# What is repeated is never given back: with spaces without end that would take the square of their number.
LAST_SENTENCE = re.compile(r"((?:[^\n.!?]|[.!?](?=\S))*+)[.!]?+(?:\s++I hope [^\n]*+)?+\s*+")
SEVERAL = re.compile(r"\b(?:either|or)\b", re.IGNORECASE)  # what is not decided
MARKUP = re.compile(r"\\[\[\]()]|[\s$*_`]")
ANSWER_PHRASE = re.compile(r"\banswer\b[^.\n]{0,40}?(?:\bis\b|[:=])", re.IGNORECASE)


def boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of every `\\boxed{...}` (or `\\fbox`) that is closed and holds something, in the order of
    their ends; braces nest, and escaped ones do not count."""
    found = []
    opened: list[tuple[int, int] | None] = []  # None is a brace of no box
    for token in BRACES.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else None
            if start and text[start[1] : token.start()].strip():
                found.append((start[0], token.end(), text[start[1] : token.start()]))
        elif token[0] == "{":
            opened.append(None)
        elif "box" in token[0]:
            opened.append((token.start(), token.end()))
    return found


def last_box(text: str) -> tuple[int, str] | None:
    """Start and content of the last box. Boxes with nothing but a comma, semicolon, "and" or "or" between them are one
    answer, a list."""
    found = boxes(text)
    if not found:
        return None
    start, _, content = found.pop()
    contents = [content]
    for earlier, end, content in reversed(found):
        if end > start or not BETWEEN_BOXES.fullmatch(text, end, start):
            break
        start = earlier
        contents.insert(0, content)
    return start, ", ".join(dict.fromkeys(contents))


def last_line(text: str) -> tuple[int, str] | None:
    """Start and content of the last "Answer: ..." that begins a line; the content may stand on the next line."""
    matches = list(ANSWER_LINE.finditer(text))
    if not matches:
        return None
    lines = text[matches[-1].end() :].split("\n", MAX_LINES)[:MAX_LINES]
    content = next((line for line in lines if MARKUP.sub("", line)), "")
    return (matches[-1].start(), sentence(content)) if content else None


def sentence(text: str) -> str:
    """The answer in the rest of a sentence: what math-verify extracts if it has prose, else all of it."""
    text = text.lstrip(" \t*_`:").rstrip(" \t*_`.")[:MAX_LINE]
    if not has_prose(text) or SEVERAL.search(text):
        return text
    return extract(text) or text


def final_answer(text: str) -> str | None:
    """The answer of a response, None if it gives none: whichever stands last, the last box or the last line
    "Answer: ..."; without these what follows "the answer is", if the response ends with this sentence; without this the
    response itself if it is one line without prose, as a bare "42" is. A thought that was cut off answers nothing."""
    candidates = [candidate for candidate in (last_box(text), last_line(text)) if candidate]
    if candidates:
        return max(candidates)[1]
    if "<think>" in text and "</think>" not in text:
        return None
    phrases = list(ANSWER_PHRASE.finditer(text))
    if phrases:
        end = LAST_SENTENCE.fullmatch(text, phrases[-1].end())
        return sentence(end[1]) if end else None
    line = text.strip()
    return line if line and "\n" not in line and len(line) <= MAX_LINE and not has_prose(line) else None
