"""Draws the Grafana dashboards as pictures, from a system that really runs: `python docker/grafana/draw.py`.

A Grafana server is not needed: panels are laid out and drawn from the dashboards' own JSON, their lines by uPlot, the
library of Grafana's time series panel, and every query of theirs is asked of a Prometheus. With `--data` the recording
is kept, or drawn again where there is one already.
"""

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

sys.path.append(str(Path(__file__).parents[2]))  # tests and bench belong to no package that is installed

from dashboard import BOARDS, OUTPUT
from pictures.asking import asked
from pictures.recording import SCRAPE_CONFIG, Span, record

from tests.prometheus_server import running

PAGE = Path(__file__).parent / "pictures" / "page.html"
PICTURES = Path(__file__).parents[2] / "docs" / "img"
CHROMIUM = "/usr/bin/chromium"
_WIDTH_PX, _COLORS = 1500, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder for the recording; a temporary one without it")
    parser.add_argument("--out", type=Path, default=PICTURES)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fewstep-pictures-") as temporary:
        folder = given.data or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "span.json").exists():
            record(folder)
        draw(folder, given.out)


def draw(folder: Path, out: Path) -> None:
    """One PNG for each dashboard."""
    span = Span.of(folder)
    with running(folder, {}, SCRAPE_CONFIG) as prometheus, sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        for board in BOARDS:
            told = asked(json.loads((OUTPUT / f"{board.uid}.json").read_text()), prometheus.url, span)
            page = browser.new_page(viewport={"width": _WIDTH_PX, "height": 400}, timezone_id="UTC")
            (out / f"{board.uid}.png").write_bytes(small(picture(page, told)))
        browser.close()


def picture(page: Page, told: Mapping[str, Any]) -> bytes:
    """
    Raises:
        SystemExit: a panel has nothing to show, or the page could not be drawn.
    """
    silent = [
        panel["title"] for panel, one in zip(told["board"]["panels"], told["panels"], strict=True) if not one["series"]
    ]
    if silent:
        raise SystemExit(f"{told['board']['title']}: no data in {', '.join(silent)}")
    page.goto(PAGE.as_uri())
    page.evaluate("told => draw(told)", told)
    return page.screenshot(full_page=True)


def small(png: bytes) -> bytes:
    """The same with a palette: lines and text need few colors."""
    made = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(_COLORS, dither=Image.Dither.NONE).save(
        made, "PNG", optimize=True
    )
    return made.getvalue()


if __name__ == "__main__":
    main()
