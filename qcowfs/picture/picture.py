"""The picture of a disk: strips from its beginning to its end, coloured by what lies there.

Owns colours, words and places. Must not know where the figures come from or how shapes become a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from qcowfs.picture.drawing import Box, Drawing, Text
from qcowfs.picture.survey import KINDS, Survey
from qcowfs.text import human

COLOURS = {
    "data": "#2f6db5", "shared": "#8656ad", "compressed": "#1f9e89", "backing": "#eda63a",
    "zero": "#bccad9", "unallocated": "#eef2f6", "damaged": "#d7263d",
}  # fmt: skip
LABELS = {
    "data": "data of its own",
    "shared": "data shared with snapshots",
    "compressed": "compressed data",
    "backing": "data from the backing file",
    "zero": "zeros that take no space",
    "unallocated": "nothing yet, reads as zeros",
    "damaged": "damaged, cannot be read",
}
ROWS, COLUMNS = 24, 1040
_LEFT, _TOP, _STRIP, _PITCH = 104, 132, 17, 26
_GREY = "#5f6c7b"
_HEAT = ("#e8a49b", "#d9685b", "#b2362a", "#6b120b")
_STEPS = 4
"""Heights at which shares within a strip are drawn; a share below half a step is not seen."""


@dataclass(frozen=True)
class Caption:
    """What is written above the strips: the disk's name, and what it is."""

    name: str
    details: str


def draw(survey: Survey, caption: Caption) -> Drawing:
    """The picture of a disk that was surveyed in `ROWS * COLUMNS` parts."""
    height = _TOP + ROWS * _PITCH + 40 + 26 * ((len(KINDS) + 2) // 2) + 12
    drawing = Drawing(_LEFT + COLUMNS + 36, height, f"Where the data of {caption.name} lies")
    drawing.shapes += [
        Text(_LEFT, 40, caption.name, 22, bold=True),
        Text(_LEFT, 64, caption.details, 13, _GREY),
    ]
    _draw_totals(drawing, survey)
    for row in range(ROWS):
        _draw_row(drawing, survey, row)
    _draw_legend(drawing, survey)
    return drawing


def _draw_totals(drawing: Drawing, survey: Survey) -> None:
    """One bar for the whole disk."""
    drawing.shapes.append(Text(_LEFT - 10, 95, "in all", 11, _GREY, "end"))
    x = float(_LEFT)
    for kind in KINDS:
        width = COLUMNS * survey.totals[kind] / max(1, survey.size)
        drawing.shapes.append(Box(x, 82, width, 18, COLOURS[kind]))
        x += width


def _draw_row(drawing: Drawing, survey: Survey, row: int) -> None:
    """One strip, with its place on the disk to the left and its fragmentation below."""
    first = row * COLUMNS
    y = _TOP + row * _PITCH
    label = human(first * survey.part_size)
    drawing.shapes.append(Text(_LEFT - 10, y + 13, label, 11, _GREY, "end"))
    parts = survey.parts[:, first : first + COLUMNS]
    shares = np.round(np.cumsum(parts, axis=0) / max(survey.part_size, 1e-9) * _STEPS).astype(int)
    shares = np.vstack((np.zeros((1, COLUMNS), int), np.minimum(shares, _STEPS)))
    for kind, (low, high) in enumerate(pairwise(shares)):
        for start, end in _equal(low * (_STEPS + 1) + high):
            if high[start] > low[start]:
                unit = _STRIP / _STEPS
                height = (high[start] - low[start]) * unit
                top = y + _STRIP - high[start] * unit
                drawing.shapes.append(Box(_LEFT + start, top, end - start, height, COLOURS[KINDS[kind]]))
    heat = _heat(survey.breaks[first : first + COLUMNS])
    for start, end in _equal(heat):
        if heat[start]:
            colour = _HEAT[heat[start] - 1]
            drawing.shapes.append(Box(_LEFT + start, y + _STRIP + 1, end - start, 4, colour))


def _heat(breaks: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 for none, then 1, 2, up to 8, and more of them in a part."""
    return np.digitize(breaks, (1, 2, 3, 9))


def _equal(values: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Where runs of equal values start and end."""
    edges = np.flatnonzero(np.diff(values)) + 1
    bounds = [0, *edges.tolist(), len(values)]
    return list(pairwise(bounds))


def _draw_legend(drawing: Drawing, survey: Survey) -> None:
    """What the colours mean and how much there is of each."""
    top = _TOP + ROWS * _PITCH + 34
    for index, kind in enumerate(KINDS):
        x, y = _LEFT + index % 2 * (COLUMNS // 2), top + index // 2 * 26
        total = survey.totals[kind]
        percent = f"{100 * total / max(1, survey.size):.1f} %"
        note = f" in {human(survey.stored)}" if kind == "compressed" and total else ""
        drawing.shapes += [
            Box(x, y - 12, 16, 16, "#c9d2db"),
            Box(x + 1, y - 11, 14, 14, COLOURS[kind]),
            Text(x + 26, y + 1, LABELS[kind]),
            Text(x + 350, y + 1, human(total) + note, anchor="end"),
            Text(x + 430, y + 1, percent, colour=_GREY, anchor="end"),
        ]
    x, y = _LEFT + COLUMNS // 2, top + len(KINDS) // 2 * 26
    for step, colour in enumerate(_HEAT):
        drawing.shapes.append(Box(x + 4 * step, y - 6, 4, 6, colour))
    mean = human(_own(survey) / survey.fragments) if survey.fragments else "-"
    text = f"fragmentation: {survey.fragments} runs in the file, {mean} on average"
    drawing.shapes.append(Text(x + 26, y + 1, text))


def _own(survey: Survey) -> int:
    return survey.totals["data"] + survey.totals["shared"]


# -- without a window

LETTERS = {
    "data": "#", "shared": "S", "compressed": "c", "backing": "b", "zero": "0", "unallocated": ".",
    "damaged": "!",
}  # fmt: skip


def draw_text(survey: Survey, caption: Caption, columns: int, *, coloured: bool) -> list[str]:
    """Lines for a terminal: each sign stands for one part of the survey, by what it holds most of.

    Damage shows however little of it there is.
    """
    main = np.argmax(survey.parts, axis=0)
    main[survey.parts[KINDS.index("damaged")] > 0] = KINDS.index("damaged")
    lines = [caption.name, caption.details, ""]
    for first in range(0, len(main), columns):
        signs = "".join(_sign(KINDS[kind], coloured=coloured) for kind in main[first : first + columns])
        lines.append(f"{human(first * survey.part_size):>9} {signs}")
    lines.append("")
    for kind in KINDS:
        if survey.totals[kind]:
            percent = f"{100 * survey.totals[kind] / max(1, survey.size):.1f} %"
            note = f", stored in {human(survey.stored)}" if kind == "compressed" else ""
            sign = _sign(kind, coloured=coloured)
            lines.append(f"{sign} {LABELS[kind]:<28} {human(survey.totals[kind]):>9} {percent:>8}{note}")
    lines.append(f"  {survey.fragments} runs in the file")
    return lines


def _sign(kind: str, *, coloured: bool) -> str:
    if not coloured:
        return LETTERS[kind]
    red, green, blue = (int(COLOURS[kind][n : n + 2], 16) for n in (1, 3, 5))
    return f"\x1b[38;2;{red};{green};{blue}m█\x1b[0m"
