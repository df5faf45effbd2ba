"""Which part of a response is its answer.

A response may hold several candidates. The one that stands last counts, because it is the one the model settled on;
a box that was never closed (a response cut off) is no candidate. Every function is linear in the length of the text.
"""

import re

from verl.utils.reward_score.latex import has_prose
from verl.utils.reward_score.symbolic import extract

MAX_LINE = 200  # characters of a bare line, and of a sentence, that is read as an answer

BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
BETWEEN_BOXES = re.compile(r"[\s$]*(?:[,;]|(?:[,;]\s*)?(?:\\text\s*\{\s*)?(?:and|or)(?:\s*\})?)[\s$]*")
ANSWER_LINE = re.compile(
    r"^[^\w\n]*(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t]*[*_]*[ \t]*[:：]", re.IGNORECASE | re.MULTILINE
)
ANSWER_PHRASE = re.compile(r"\banswer\b[^.\n]{0,40}?(?:\bis\b|[:=])", re.IGNORECASE)


def boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of every `\\boxed{...}` (or `\\fbox`) that is closed, in the order of their ends; braces
    nest, and escaped ones do not count."""
    found = []
    opened: list[tuple[int, int] | None] = []  # None is a brace of no box
    for token in BRACES.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else None
            if start:
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
    content = text[matches[-1].end() :].lstrip(" \t\n*_").partition("\n")[0]
    return (matches[-1].start(), sentence(content)) if content else None


def sentence(text: str) -> str:
    """The answer in the rest of a sentence: what math-verify extracts if it has prose, else all of it."""
    text = text.strip(" \t*_")[:MAX_LINE]
    return extract(text) or text if has_prose(text) else text


def final_answer(text: str) -> str | None:
    """The answer of a response, None if it gives none: whichever stands last, the last box or the last line
    "Answer: ..."; without these what follows "the answer is"; without this the response itself if it is one line
    without prose, as a bare "42" is."""
    candidates = [candidate for candidate in (last_box(text), last_line(text)) if candidate]
    if candidates:
        return max(candidates)[1]
    phrases = list(ANSWER_PHRASE.finditer(text))
    if phrases:
        return sentence(text[phrases[-1].end() :].partition("\n")[0])
    line = text.strip()
    return line if line and "\n" not in line and len(line) <= MAX_LINE and not has_prose(line) else None
