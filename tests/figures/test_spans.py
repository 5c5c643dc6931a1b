"""Spans that the user names stand in every view of a prompt, as label positions do."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import xarray as xr
from pages import opened, shown, texts
from playwright.sync_api import Browser
from rich.console import Console

import twotower as tt
from twotower import figures
from twotower.figures.report import write_report
from twotower.figures.terminal import coloured, show_prompt

matplotlib.use("Agg")

TEXTS = ["the cat saw the dog and the", "a bird met a fish and a"]
SPANS = [{"who": "cat", "whom": "dog"}, {"who": "bird", "whom": "fish"}]


@pytest.fixture(scope="module")
def asked(llama: tt.Model) -> xr.DataTree:
    prompts = tt.contrast(llama, TEXTS, [" foo", " bar"], [" bar", " foo"], SPANS)
    return tt.analyze(llama, prompts)


def test_in_figures(asked: xr.DataTree) -> None:
    view = figures.prompt_view(asked, 1)
    assert {view.roles[i] for i in view.named} == {"who", "whom"}
    ax = figures.attention(asked, (1, 2), 1)
    heights = {
        container.get_label(): [bar.get_height() for bar in container]
        for container in ax.containers
    }
    own = view.of((1, 2))
    for role in ("who", "whom"):
        np.testing.assert_allclose(heights[role], own["attention"][view.roles == role])
    bold = [i for i, t in enumerate(ax.get_xticklabels()) if t.get_fontweight() == "bold"]
    assert bold == view.named.tolist()
    assert "(' bar' is right)" in ax.get_title()
    ax = figures.label_logits(asked, (1, 2), 1)
    marked = {line.get_label(): line for line in ax.lines}
    for number, name in enumerate(("right, ' bar'", "wrong, ' foo'")):
        assert marked[name].get_xdata().tolist() == view.named.tolist()
        np.testing.assert_allclose(marked[name].get_ydata(), own["label_logit"][view.named, number])
    assert "hollow" not in ax.get_title()


def test_in_a_terminal(asked: xr.DataTree) -> None:
    view = figures.prompt_view(asked, 0)
    console = Console(file=io.StringIO(), markup=False, width=200)
    show_prompt(asked, (1, 2), 0, console)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Named positions" in out
    attention = view.of((1, 2))["attention"]
    rows = [line for line in out.splitlines() if line.strip().startswith("-")]
    order = sorted(view.named, key=lambda i: -attention[i])
    assert len(rows) == len(order)
    for row, i in zip(rows, order, strict=True):
        assert row.split()[:2] == [str(view.positions[i]), view.roles[i]]
        assert f"{view.name_of(i)}  " in row
        assert f" {attention[i]:.3f} " in row
    underlined = [x for x in coloured(view, (1, 2)).spans if "underline" in str(x.style)]
    assert len(underlined) == len(view.named)


def test_without_any_name(llama: tt.Model) -> None:
    run = tt.analyze(llama, tt.contrast(llama, TEXTS, [" foo", " bar"]), measures=["qk"])
    console = Console(file=io.StringIO(), markup=False, width=200)
    show_prompt(run, (1, 2), 0, console)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "positions" not in out
    assert figures.attention(run, (1, 2), 1).get_legend() is not None


def test_in_the_report(browser: Browser, asked: xr.DataTree, tmp_path: Path) -> None:
    view = figures.prompt_view(asked, 0)
    with opened(browser, write_report(asked, tmp_path / "spans.html"), 900) as page:
        assert "Underlined: who, whom." in (page.locator("#legend").text_content() or "")
        assert "class" not in texts(page, "#positions th")
        name = page.locator("#chosen-title").text_content() or ""
        layer, head = map(int, name.removeprefix("Head ").split("."))
        attention = view.of((layer, head))["attention"]
        found = texts(page, "#positions tbody td")
        width = len(texts(page, "#positions th"))
        for row, i in enumerate(view.named):
            cells = found[row * width : row * width + 3]
            assert cells == [str(view.positions[i]), view.name_of(i), shown(attention[i])]
        assert len(texts(page, "#tokens .named")) == len(view.named)
        assert not texts(page, "#tokens .other")


def test_kinds_in_the_report(
    browser: Browser, llama: tt.Model, asked: xr.DataTree, tmp_path: Path
) -> None:
    kinds = tt.head_kinds(llama, n=2, length=4)
    kinds["kind"][1, 2] = "induction, writer"
    run = asked.copy()
    run["kinds"] = kinds
    page_of_it = write_report(run, tmp_path / "kinds.html")
    with opened(browser, page_of_it, fragment="#head=1.2") as page:
        assert page.locator("#chosen-title").text_content() == "Head 1.2: induction, writer"
        assert texts(page, "#heads th")[1] == "kinds"
        page.fill("#search", "induction")
        expected = int(kinds["kind"].astype(str).str.contains("induction").sum())
        names = texts(page, "#heads tbody th")
        assert len(names) == expected
        assert "1.2" in names
