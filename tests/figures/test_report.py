"""The report in a browser: from disk, without a network, by mouse and by keyboard."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from axe_playwright_python.sync_playwright import Axe
from pages import READY, compare_with_view, number, opened, shown, texts, wait
from playwright.sync_api import Browser, Page
from tiny import byte_level, hf_model

import twotower as tt
from twotower.figures import head_table, prompt_view, write_report


@pytest.fixture(scope="module")
def run(llama: tt.Model, prompts: tt.Prompts) -> xr.DataTree:
    return tt.analyze(llama, prompts)


@pytest.fixture(scope="module")
def page_file(run: xr.DataTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(run, tmp_path_factory.mktemp("report") / "run.html")


OPENING: list[float] = []
"""Seconds until the shared page was ready."""


@pytest.fixture(scope="module")
def shared(browser: Browser, page_file: Path) -> Iterator[Page]:
    """The page, opened once."""
    start = time.perf_counter()
    with opened(browser, page_file) as page:
        OPENING.append(time.perf_counter() - start)
        yield page


@pytest.fixture
def page(shared: Page, run: xr.DataTree) -> Page:
    """The shared page with what it shows at first: the strongest head and the first prompt."""
    shared.fill("#search", "")
    shared.select_option("#prompt", "0")
    shared.select_option("#shade", index=0)
    head = tt.in_context_heads(run, 1)[0]
    shared.click(f"#heads tr[data-head='{head}'] button")
    wait(shared, f"location.hash.includes('head={head}&prompt=0')")
    shared.evaluate("scrollTo(0, 0)")
    return shared


def test_it_shows_the_strongest_head_first(shared: Page, run) -> None:
    page = shared
    head = tt.in_context_heads(run, 1)[0]
    assert page.inner_text("#chosen-title") == f"Head {head}"
    table = head_table(run)
    values = [number(x) for x in texts(page, "#chosen-numbers dd")]
    expected = [float(table[name].sel(layer=head.layer, head=head.head)) for name in table]
    np.testing.assert_allclose(values, expected, atol=0.00051)
    numbers = dict(zip(texts(page, ".numbers dt"), texts(page, ".numbers dd"), strict=True))
    assert numbers["prompts"] == "6"
    assert numbers["heads"] == "12"
    accuracy = float(run.predictions.correct.mean())
    assert numbers["accuracy between the labels"] == f"{accuracy:.2f}"


def test_a_click_on_the_map_changes_everything(page: Page, run) -> None:
    before = page.inner_html("#tokens")
    box = page.locator("#map .nsewdrag").bounding_box()
    assert box is not None
    # Three layers from left to right, four heads from below.
    page.mouse.click(box["x"] + box["width"] * 2.5 / 3, box["y"] + box["height"] * 2.5 / 4)
    wait(page, "document.getElementById('chosen-title').textContent == 'Head 2.1'")
    wait(page, "before => document.getElementById('tokens').innerHTML != before", arg=before)
    assert page.locator("tr.chosen").get_attribute("data-head") == "2.1"
    assert "head=2.1" in page.url
    compare_with_view(page, run, (2, 1), 0)


def test_prompts(page: Page, run) -> None:
    options = texts(page, "#prompt option")
    assert len(options) == 6
    for i, text in enumerate(options):
        right = "right" if run.predictions.correct.values[i] else "wrong"
        assert text == f"{i}: {run.qk.query_class.values[i]}, {run.qk.gold.values[i]}, {right}"
    page.click("#next")
    wait(page, "document.getElementById('prompt').value == '1'")
    page.click("#previous")
    page.click("#previous")
    wait(page, "document.getElementById('prompt').value == '5'")
    head = tt.in_context_heads(run, 1)[0]
    wait(page, "location.hash.includes('prompt=5')")
    page.wait_for_timeout(100)
    compare_with_view(page, run, head, 5)


def test_shades(page: Page, run) -> None:
    names = texts(page, "#shade option")
    assert names[:3] == ["attention", "QK score", "content part of the score"]
    page.select_option("#shade", label="OV label logit of bar")
    page.wait_for_selector("#tokens span[style*='--below']")
    head = tt.in_context_heads(run, 1)[0]
    view = prompt_view(run, 0)
    values = view.of(head)["label_logit"][:, view.labels.index("bar")]
    styles = page.locator("#tokens span").evaluate_all("x => x.map(y => y.style.background)")
    for value, style in zip(values, styles, strict=True):
        if abs(value) > 0.001:
            assert ("--below" in style) == (value < 0)


def test_sorting_and_search(page: Page, run) -> None:
    table = head_table(run).to_dataframe().reset_index()
    names = [f"{row.layer}.{row.head}" for row in table.itertuples()]

    def order() -> list[str]:
        return texts(page, "#heads tbody button")

    by_effect = table.sort_values("margin_drop", ascending=False).index
    assert order() == [names[i] for i in by_effect]
    page.click("#heads thead button[data-sort='4']")
    values = [number(x) for x in texts(page, "#heads tbody td:nth-child(7)")]
    assert values == sorted(values, reverse=True)
    np.testing.assert_allclose(values, sorted(table["ov_auc"], reverse=True), atol=0.00051)
    assert page.locator("th[aria-sort='descending']").inner_text().startswith("OV AUC")
    page.click("#heads thead button[data-sort='4']")
    assert texts(page, "#heads tbody td:nth-child(7)") == [shown(x) for x in sorted(values)]
    page.click("#heads thead button[data-sort='-1']")
    assert order() == names
    page.fill("#search", "1.")
    assert order() == [name for name in names if name.startswith("1.")]
    assert page.inner_text("#found") == "4 of 12 heads"
    page.fill("#search", "in-context")
    assert len(order()) == 12
    page.fill("#search", "nothing")
    assert order() == []
    page.fill("#search", "0.2")
    page.click("#heads tbody button")
    assert page.inner_text("#chosen-title") == "Head 0.2"


def test_the_keyboard_alone(page: Page, run) -> None:
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(() => { const x = document.activeElement;"
                "return x.id || x.dataset.sort || x.closest('tr')?.dataset.head"
                " || x.closest('details') && 'details' || x.getAttribute('aria-label'); })()"
            )
        )
    controls = {"theme", "details", "column", "map", "prompt", "shade", "previous", "next"}
    controls |= {"tokens", "search", "0", "4", "Named positions", "Heads"}
    heads = {f"{x}.{y}" for x in range(3) for y in range(4)}
    assert controls | heads <= reached
    page.focus("#map")
    start = tt.in_context_heads(run, 1)[0]
    for key, layer, head in (
        ("ArrowLeft", max(0, start.layer - 1), start.head),
        ("ArrowUp", max(0, start.layer - 1), min(3, start.head + 1)),
    ):
        page.keyboard.press(key)
        assert page.inner_text("#chosen-title") == f"Head {layer}.{head}"
    page.wait_for_timeout(100)
    page.focus("#tokens")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#token-detail").startswith("0 last; attention")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#token-detail").startswith("-1 query")
    page.focus("#search")
    page.keyboard.type("2.3")
    page.focus("#heads tbody button")
    page.keyboard.press("Enter")
    assert page.inner_text("#chosen-title") == "Head 2.3"
    page.focus("#theme")
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize(
    ("width", "theme"),
    [
        (360, "dark"),
        *(
            pytest.param(width, theme, marks=pytest.mark.slow)
            for width, theme in (
                (360, "light"),
                (800, "light"),
                (800, "dark"),
                (1300, "light"),
                (1300, "dark"),
            )
        ),
    ],
)
def test_widths_and_themes(browser: Browser, page_file: Path, width: int, theme: str) -> None:
    """Opened with an address, too, which names head and prompt."""
    with opened(browser, page_file, width, theme, fragment="#head=1.3&prompt=4") as page:
        assert page.inner_text("#chosen-title") == "Head 1.3"
        assert page.input_value("#prompt") == "4"
        looks_well(page, width, theme)


def test_a_wide_page(page: Page) -> None:
    """The shared page, which is light at first."""
    if page.evaluate("document.documentElement.dataset.theme") != "light":
        page.click("#theme")
    page.set_viewport_size({"width": 1300, "height": 800})
    looks_well(page, 1300, "light")
    page.set_viewport_size({"width": 1000, "height": 800})


def looks_well(page: Page, width: int, theme: str) -> None:
    """Nothing is cut off, and axe finds nothing that some readers could not use.

    Shades below zero are looked at where the page is wide, those above it elsewhere.
    """
    if width > 1000:
        page.select_option("#shade", label="OV label logit of bar")
        page.wait_for_selector("#tokens span[style*='--below']")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    for name in ("map", "towers", "scores"):
        box = page.locator(f"#{name}").bounding_box()
        assert box is not None
        assert box["width"] <= width
        assert box["height"] > 200
    found = Axe().run(page)
    broken = [x["id"] for x in found.response["violations"]]
    assert broken == []


def test_it_is_quick_and_small(shared: Page, page_file: Path) -> None:
    assert page_file.stat().st_size < 6e6
    assert OPENING[0] < 15  # 1.5 s on a quiet machine of two cores


def test_an_address_that_names_nothing(page: Page, run) -> None:
    page.evaluate("location.hash = '#head=1.3&prompt=4'")
    wait(page, "document.getElementById('chosen-title').textContent == 'Head 1.3'")
    page.evaluate("location.hash = '#head=99.1&prompt=x'")
    head = tt.in_context_heads(run, 1)[0]
    wait(page, f"document.getElementById('chosen-title').textContent == 'Head {head}'")
    assert page.input_value("#prompt") == "0"


NASTY = [
    "<script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    "</script><script>document.title='run'</script>",
    "<!--<script>",
    "javascript:alert(1) & \"quotes\" 'single' `back`",
    "emoji 🦊👩‍👩‍👧 and é",
    "שלום עולם مرحبا",
    "line\nbreak\tand tab",
    "\u2028 separators \u2029",
    "<b>bold</b> {{ 7 * 7 }} ${7*7} %s",
]


def test_texts_are_texts(browser: Browser, tmp_path: Path) -> None:
    model = tt.load(hf_model("llama"), tokenizer=byte_level())
    model.module.config.max_position_embeddings = 4096
    classes = {"<i>one</i>": NASTY[:5], "two & </title>": NASTY[5:]}
    task = tt.Task("<script>document.title='run'</script>", classes)
    prompts = tt.build_prompts(model, task, shots=2, n=4, seed=0)
    run = tt.analyze(model, prompts)
    run.attrs["model"] = "</script><script>document.title='run'</script>"
    file = write_report(run, tmp_path / "nasty.html")
    with opened(browser, file) as page:
        for number in range(4):
            page.select_option("#prompt", str(number))
            wait(page, f"location.hash.includes('prompt={number}')")
            page.wait_for_timeout(100)
            view = prompt_view(run, number)
            assert view.gold in page.inner_text("#answer")
            assert view.query_class in page.inner_text("#answer")
            written = "".join(texts(page, "#tokens span"))
            assert written.replace("↵", "").replace("→", "") == "".join(
                token for token in view.tokens
            )
        assert page.locator("#tokens img, #tokens b, #tokens script").count() == 0
        assert page.title().startswith("</script><script>")
        scripts = page.evaluate("[...document.scripts].filter(x => !x.type && !x.nonce).length")
        assert scripts == 0


def test_a_script_that_got_in_would_not_run(browser: Browser, page_file: Path, tmp_path) -> None:
    broken = tmp_path / "broken.html"
    bad = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
    broken.write_text(page_file.read_text().replace("</header>", bad + "</header>"))
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(broken.as_uri())
    page.wait_for_selector(READY)
    assert page.title() != "run"
    context.close()


def test_content_is_strict_json(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    content = re.search(r'id="content">(.*?)</script>', text).group(1)  # type: ignore[union-attr]
    json.loads(content, parse_constant=lambda name: pytest.fail(name))
    assert "<" not in content


def test_another_head_leaves_the_prompt_where_it_is(page: Page) -> None:
    box = "document.getElementById('tokens')"
    page.set_viewport_size({"width": 360, "height": 500})
    page.evaluate(f"{box}.style.maxHeight = '40px'")
    page.select_option("#prompt", "1")
    wait(page, f"{box}.dataset.shown == '0.1' && {box}.scrollTop > 0")
    page.evaluate(f"{box}.scrollTop = 7")
    page.fill("#search", "2.2")
    page.click("#heads tbody button")
    page.wait_for_timeout(200)
    assert page.evaluate(f"{box}.scrollTop") == 7
    page.evaluate(f"{box}.style.maxHeight = ''")
    page.set_viewport_size({"width": 1000, "height": 800})


def test_missing_libraries_are_named(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.figures.report.find_spec", lambda name: None)
    with pytest.raises(
        tt.errors.InputError, match=r"needs jinja2 and plotly: .*twotower\[report\]"
    ):
        tt.figures.write_report(run, tmp_path / "report.html")
