"""The HTML reports: whole, alone, and readable on a wide and on a narrow screen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastvit_cli import drawing
from fastvit_cli import pages as report_pages
from test_layers import ROOT

from repcompiler import compile
from repcompiler.report import RegionNode

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
QUICK = ("--backend", "eager", "--seconds", "0")
# A frame can be narrower than the narrowest window that a browser opens.
FRAME = """<title>none</title>
<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  const wide = [...page.querySelectorAll("*")].filter(part =>
    part.scrollWidth > part.clientWidth && /auto|scroll/.test(
      frame.contentWindow.getComputedStyle(part).overflowX));
  const unreached = wide.filter(part => part.tabIndex < 0 || !part.ariaLabel);
  document.title = [page.documentElement.scrollWidth, frame.contentWindow.innerWidth,
    page.querySelectorAll("svg").length, wide.length, unreached.length].join(" ");
}}</script>"""


class Page(HTMLParser):
    """What a page refers to outside itself, and its texts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [v or "" for k, v in attrs if k in ("src", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def pages(fastvit, net, folder) -> dict[str, str]:
    """The two reports of one small model."""
    fused = fastvit("fuse", net, "--report", "fuse.html", "--report", "fuse.json")
    profiled = fastvit("profile", net, *QUICK, "--html", "profile.html")
    assert (fused.code, profiled.code) == (0, 0), fused.err + profiled.err
    return {n: (folder / f"{n}.html").read_text() for n in ("fuse", "profile")}


def test_pages_are_whole_and_refer_to_nothing_outside(pages):
    for source in pages.values():
        page = Page(source)
        assert page.outside == []
        assert not re.search(r"url\(|@import|https?://", source)
        assert "prefers-color-scheme: dark" in source
        assert {"h1", "main", "table"} <= set(page.tags)


def test_the_fusion_page_shows_each_region_with_what_replaced_it(pages, folder):
    page = Page(pages["fuse"])
    report = json.loads((folder / "fuse.json").read_text())
    assert report["regions"]
    for region in report["regions"]:
        assert region["name"] in page.text
        assert [node["op"] for node in region["graph"] if node["role"] == "removed"]
    assert page.tags.count("svg") == 2 * len(report["regions"])


def test_the_fusion_page_shows_time_and_error_of_each_region(pages, folder):
    report = json.loads((folder / "fuse.json").read_text())
    text = " ".join(Page(pages["fuse"]).text.split())
    assert "Time and error by region" in text
    for region in report["regions"]:
        times = region["milliseconds"]
        assert times["before"] > 0
        assert times["after"] > 0
        assert f"{times['before']:.3g}" in text
        assert f"{region['exactness']:.1e}" in text
    saved = sum(
        r["milliseconds"]["before"] - r["milliseconds"]["after"]
        for r in report["regions"]
    )
    assert f"All regions together take {saved:.3g} ms less" in text


def test_a_page_takes_the_model_through_the_stages_once(
    fastvit, net, folder, monkeypatch
):
    ran: list[str] = []
    real = compile.run_capture
    with monkeypatch.context() as patch:
        patch.setattr(
            compile, "run_capture", lambda *a, **k: ran.append("") or real(*a, **k)
        )
        words = ("--report", "f.html", "--certificate", "c.json", "-o", "f.safetensors")
        assert fastvit("fuse", net, *words).code == 0
    assert len(ran) == 1
    words = ("check", net, "f.safetensors", "--certificate", "c.json")
    assert fastvit(*words).code == 0


def test_a_report_without_a_page_times_nothing(fastvit, net, folder):
    assert fastvit("fuse", net, "--report", "fuse.json").code == 0
    report = json.loads((folder / "fuse.json").read_text())
    assert all("milliseconds" not in region for region in report["regions"])


def test_the_page_of_a_model_that_is_fused_in_parts_has_no_times(fastvit, folder, asks):
    assert fastvit("fuse", asks, "--report", "fuse.html").code == 0
    assert "ms less" not in (folder / "fuse.html").read_text()


@pytest.mark.parametrize(
    ("error", "length"), [(None, 0), (0.0, 0), (1e-18, 0), (1e-13, 50), (1.0, 100)]
)
def test_bars_of_errors_go_by_powers_of_ten(error, length):
    assert report_pages._error_bar(error) == pytest.approx(length, abs=0.01)


def test_the_profile_page_has_each_measurement_and_the_advice(pages):
    text = Page(pages["profile"]).text
    assert "train, eager" in text
    assert "fused, eager" in text
    assert "on this device use the" in " ".join(text.split())


def test_a_profile_page_needs_its_suffix(fastvit, net):
    result = fastvit("profile", net, "--html", "page.txt")
    assert result.code == 2
    assert "another suffix" in result.error


@pytest.mark.skipif(BROWSER is None, reason="no chromium here to lay the pages out")
@pytest.mark.parametrize("width", [1280, 400])
def test_no_page_is_wider_than_its_window(pages, folder, width):
    for name, source in pages.items():
        place = folder / f"{name}-framed.html"
        place.write_text(FRAME.format(width=width, page=html.escape(source)))
        found = laid_out(place)
        assert found[0] <= found[1] == width, name
        assert found[2] == source.count("<svg")
        # What is cut off on a narrow screen can be reached and scrolled by keyboard.
        assert found[3] > 0 or width > 400, name
        assert found[4] == 0, name


def laid_out(page: Path) -> list[int]:
    """What `FRAME` counts, as the browser has it.

    Width of the content and of the window, drawings, parts that scroll sideways, and
    those of them that the Tab key does not reach or that have no name.
    """
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu"),
        *("--disable-background-networking", f"--user-data-dir={page.parent}/profile"),
        *("--window-size=1400,900", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    title = re.search(r"<title>([\d ]+)</title>", done.stdout)
    assert title is not None, done.stderr[-500:]
    return [int(number) for number in title[1].split()]


def test_branches_stand_side_by_side_and_every_line_leads_down():
    nodes = (
        RegionNode("x", "placeholder", (), "source"),
        RegionNode("a", "conv2d", (0,), "removed"),
        RegionNode("b", "conv2d", (0,), "removed"),
        RegionNode("sum", "add", (1, 2), "removed"),
    )
    drawn = drawing.layers(nodes)
    assert drawn.boxes[1]["y"] == drawn.boxes[2]["y"]
    assert drawn.boxes[1]["x"] + drawing.BOX[0] < drawn.boxes[2]["x"]
    assert len(drawn.lines) == 4
    assert all(top < bottom for _, top, _, bottom in drawn.lines)
    after = drawing.column(nodes, ("net.conv",))
    assert [box["role"] for box in after.boxes] == ["source", "added"]


def test_a_wheel_holds_the_templates():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r"package-data\]\s+fastvit_cli = \[\"templates/\*\.html\"\]", text)
    assert {path.suffix for path in (ROOT / "cli/templates").iterdir()} == {".html"}
