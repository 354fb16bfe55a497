"""A drawing of rectangles and lines of text, as SVG or as PNG.

Owns both ways of writing it. Must not know what it shows. Lengths are in pixels; y grows downwards.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from qcowfs.errors import UsageError

_SCALE = 2
"""Pixels of a PNG for each pixel of the drawing, for sharp screens."""


@dataclass(frozen=True)
class Box:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class Text:
    """A line of text, whose baseline starts at a place, ends there or has its middle there."""

    x: float
    y: float
    text: str
    size: int = 13
    colour: str = "#1f2933"
    anchor: str = "start"
    bold: bool = False


@dataclass
class Drawing:
    """Shapes on a white ground, painted in their order."""

    width: int
    height: int
    title: str
    shapes: list[Box | Text] = field(default_factory=list)

    def svg(self) -> bytes:
        """The drawing as a document that every browser shows."""
        width, height = self.width, self.height
        lines = [
            '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"',
            f'  width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
            f"<title>{escape(self.title)}</title>",
            f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>',
            *(_svg_box(shape) if isinstance(shape, Box) else _svg_text(shape) for shape in self.shapes),
            "</svg>\n",
        ]
        return "\n".join(lines).encode()

    def png(self) -> bytes:
        """The drawing as pixels. Raises `UsageError` where Pillow is not installed."""
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError:
            raise UsageError(
                "PNG pictures need Pillow: pip install 'qcowfs[pictures]'; a picture.svg needs nothing"
            ) from None
        image = Image.new("RGB", (self.width * _SCALE, self.height * _SCALE), "#ffffff")
        pen = ImageDraw.Draw(image)
        anchors = {"start": "ls", "middle": "ms", "end": "rs"}
        for shape in self.shapes:
            x, y = round(shape.x * _SCALE), round(shape.y * _SCALE)
            if isinstance(shape, Box):
                right = round((shape.x + shape.width) * _SCALE) - 1
                bottom = round((shape.y + shape.height) * _SCALE) - 1
                if right >= x and bottom >= y:
                    pen.rectangle((x, y, right, bottom), fill=shape.colour)
            else:
                font = ImageFont.load_default(shape.size * _SCALE)
                stroke = 1 if shape.bold else 0
                pen.text((x, y), shape.text, shape.colour, font, anchors[shape.anchor], stroke_width=stroke)
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        return file.getvalue()


def _svg_box(box: Box) -> str:
    return (
        f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" '
        f'fill="{box.colour}"/>'
    )


def _svg_text(text: Text) -> str:
    weight = ' font-weight="bold"' if text.bold else ""
    return (
        f'<text x="{text.x:g}" y="{text.y:g}" font-size="{text.size}" fill="{text.colour}" '
        f'text-anchor="{text.anchor}"{weight}>{escape(text.text)}</text>'
    )
