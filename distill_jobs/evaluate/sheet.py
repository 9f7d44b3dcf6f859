"""A captioned contact sheet: one row per generator, one column per caption, the same seeds down each column."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from distill_jobs.evaluate.pixels import Pixels, levels

_CELL_PX, _GAP_PX, _LABEL_PX = 112, 6, 104
_FONT_PX, _LINE_PX = 11, 13
_COLUMN_CHARACTERS, _LABEL_CHARACTERS = 19, 17
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def sheet(rows: Sequence[tuple[str, Pixels]], captions: Sequence[str]) -> bytes:
    """PNG of labelled rows of pictures [len(captions), 3, H, W], under their captions."""
    texts = [textwrap.wrap(caption, _COLUMN_CHARACTERS) for caption in captions]
    header_px = max((len(lines) for lines in texts), default=0) * _LINE_PX + 2 * _GAP_PX
    step_px = _CELL_PX + _GAP_PX
    size = (_LABEL_PX + step_px * len(captions), header_px + step_px * len(rows))
    paper = Image.new("RGB", size, _PAPER)
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(_FONT_PX)
    for column, lines in enumerate(texts):
        pen.multiline_text((_LABEL_PX + column * step_px, _GAP_PX), "\n".join(lines), fill=_INK, font=font, spacing=2)
    for row, (label, pictures) in enumerate(rows):
        top = header_px + row * step_px
        text = "\n".join(textwrap.wrap(label, _LABEL_CHARACTERS))
        pen.multiline_text((_GAP_PX, top + _CELL_PX // 3), text, fill=_INK, font=font, spacing=2)
        for column, picture in enumerate(levels(pictures)[: len(captions)]):
            paper.paste(_cell(picture), (_LABEL_PX + column * step_px, top))
    buffer = io.BytesIO()
    paper.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _cell(picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
    return image.resize((_CELL_PX, _CELL_PX), Image.Resampling.LANCZOS)
