"""The parts of an answer in normal form: lists, sets, tuples, intervals, unions, matrices, and `name = value`."""

import re
from dataclasses import dataclass

BRACKET = re.compile(r"\\begin(?![A-Za-z])|\\end(?![A-Za-z])|\\[{}]|\\.|[()\[\]{}]", re.DOTALL)
STEPS = {**dict.fromkeys(["(", "[", "{", "\\{", "\\begin"], 1), **dict.fromkeys([")", "]", "}", "\\}", "\\end"], -1)}
OPENINGS = {"(": (")", "]"), "[": (")", "]"), "\\{": ("\\}",)}  # and what closes them
MATRIX = re.compile(r"\\begin\{([pbBv]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", re.DOTALL)
NAME = re.compile(r"(?:\\text\{[^{}]*\}|\\?[A-Za-z]|_\{\w+\}|_\w|[()' ,])+")
SYMBOL = re.compile(r"\\?[A-Za-z]+(?:_\{\w+\}|_\w)?")
INEQUALITY = re.compile(r"[<>]|\\(?:leq|geq|ne)(?![A-Za-z])")
SET = re.compile(r"\\(?:setminus|cap|mathbb)(?![A-Za-z])")
EQUALS = re.compile(r"=|\\(?:approx|in)(?![A-Za-z])")
APPROX = re.compile(r"\\approx(?![A-Za-z])")
COMMA = re.compile("[,;]")
CUP = re.compile(r"\\cup(?![A-Za-z])")
ROW = re.compile(r"\\\\(?:\[[^\[\]]*\])?")
CELL = re.compile("&")
LEADING_PLUS = re.compile(r"(^|[(\[{,=])\s*\+")


def closing(text: str, start: int) -> int | None:
    """Where the bracket that opens at `start` is closed, by a bracket of any kind, as in `[1, 2)`; None if nowhere."""
    level = 0
    for token in BRACKET.finditer(text, start):
        level += STEPS.get(token[0], 0)
        if level <= 0:
            return token.start()
    return None


def depth(text: str) -> int:
    """How deep brackets nest."""
    level = deepest = 0
    for token in BRACKET.finditer(text):
        level = max(level + STEPS.get(token[0], 0), 0)
        deepest = max(deepest, level)
    return deepest


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts between separators that are in no bracket, without the space around them."""
    parts, level, start = [], 0, 0
    brackets = {token.start(): STEPS.get(token[0], 0) for token in BRACKET.finditer(text)}
    separators = {match.start(): match.end() for match in separator.finditer(text)}
    for position in sorted(brackets.keys() | separators.keys()):
        level += brackets.get(position, 0)
        if level == 0 and position in separators and position >= start:
            parts.append(text[start:position].strip())
            start = separators[position]
    return [*parts, text[start:].strip()]


@dataclass(frozen=True)
class Collection:
    """Several answers. `kind` is "list" (without brackets), "set" or "union", whose order means nothing, or "()", "[]",
    "(]", "[)" or a matrix with the lengths of its rows, whose order does."""

    kind: str
    elements: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        return self.kind not in ("list", "set", "union")

    @property
    def matrix(self) -> bool:
        return self.kind.startswith(("matrix", "determinant"))


def collection(text: str) -> Collection | None:
    """The collection that a text in normal form is, None if it is none; brackets around one answer make one of one."""
    matrix = MATRIX.fullmatch(text)
    if matrix:
        rows = [split(row, CELL) for row in split(matrix[2], ROW) if row]
        kind = "determinant" if matrix[1] == "vmatrix" else "matrix"
        if kind == "matrix" and len(rows) > 1 and all(len(row) == 1 for row in rows):
            return Collection("()", tuple(row[0] for row in rows))  # a column is the point with its coordinates
        return Collection(f"{kind} {[len(row) for row in rows]}", tuple(cell for row in rows for cell in row))
    parts = split(text, CUP)
    if len(parts) > 1:
        return Collection("union", tuple(parts))
    parts = split(text, COMMA)
    if len(parts) > 1 or "\\pm" in text:
        return Collection("list", _both_signs(parts))
    opening = BRACKET.match(text)
    end = closing(text, 0) if opening and opening[0] in OPENINGS else None
    if opening is None or end is None or text[end:] not in OPENINGS[opening[0]]:
        return None
    parts = split(text[opening.end() : end], COMMA)
    kind = "set" if opening[0] == "\\{" else opening[0] + text[end]
    return Collection(kind, _both_signs(parts) if kind == "set" else tuple(parts))


def _both_signs(parts: list[str]) -> tuple[str, ...]:
    """Every part with `\\pm` as two, in the second of which `\\pm` is minus and `\\mp` plus."""
    both = []
    for part in parts:
        both.append(LEADING_PLUS.sub(r"\1", part.replace("\\pm", "+").replace("\\mp", "-")))
        if "\\pm" in part:
            both.append(LEADING_PLUS.sub(r"\1", part.replace("\\pm", "-").replace("\\mp", "+")))
    return tuple(both)


def exact(text: str) -> str:
    """Of an approximation the part before the sign, unless this is a name, because it is the exact one."""
    first, *rest = split(text, APPROX)
    return first if rest and not NAME.fullmatch(first) else text


def relation(text: str) -> tuple[str, str]:
    """First and last part of `a = b`, `a = ... = b` or `x \\in b`, a name first, as x in `5 = x`; the first is empty if
    there is no such sign."""
    first, *rest = split(text, EQUALS)
    if not rest:
        return "", text
    return (rest[-1], first) if NAME.fullmatch(rest[-1]) and not NAME.fullmatch(first) else (first, rest[-1])
