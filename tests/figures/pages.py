"""Opening a report in a browser, and comparing what it shows with the dataset."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from playwright.sync_api import Browser, Page

from twotower.figures import prompt_view

READY = "body[data-ready=yes]"


@contextmanager
def opened(
    browser: Browser,
    file: Path,
    width: int = 1000,
    theme: str = "light",
    ready: bool = True,
    fragment: str = "",
) -> Iterator[Page]:
    """The page, opened from disk with the network off; any message of the console fails."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=theme, offline=True
    )
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: said.append(asked.url) if "http" in asked.url[:4] else None)
    page.goto(file.as_uri() + fragment)
    if ready:
        page.wait_for_selector(READY)
    yield page
    assert said == []
    context.close()


def texts(page: Page, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def shown(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def compare_with_view(page: Page, run: xr.DataTree, head: tuple[int, int], prompt: int) -> None:
    """Every number of the chosen head and prompt is the dataset's."""
    view = prompt_view(run, prompt)
    own = view.of(head)
    spans = page.locator("#tokens span")
    assert spans.count() == len(view.tokens)
    for i in range(len(view.tokens)):
        title = spans.nth(i).get_attribute("title") or ""
        found = dict(
            re.findall(r"(attention|score|content|position|OV foo|OV bar) ([−\d.]+)", title)
        )
        expected = {
            "attention": own["attention"][i],
            "score": own["score"][i],
            "content": own["score_content"][i],
            "position": own["score_position"][i],
            "OV foo": own["label_logit"][i, view.labels.index("foo")],
            "OV bar": own["label_logit"][i, view.labels.index("bar")],
        }
        assert set(found) == set(expected)
        for name, text in found.items():
            step = 10.0 ** -len(text.partition(".")[2])
            assert number(text) == pytest.approx(expected[name], abs=1.01 * step), (i, name)
    shades = [
        float(re.search(r"rgba\(var\(--above\), ([\d.e-]+)\)", x).group(1))  # type: ignore[union-attr]
        for x in (spans.nth(i).get_attribute("style") or "" for i in range(len(view.tokens)))
    ]
    attention = own["attention"]
    np.testing.assert_allclose(shades, 0.85 * attention / attention.max(), atol=0.003)
    labels = [
        i for i in range(len(view.tokens)) if "named" in (spans.nth(i).get_attribute("class") or "")
    ]
    assert labels == view.named.tolist()
    rows = page.locator("#positions tbody tr")
    assert rows.count() == len(labels)
    for row, i in enumerate(labels):
        cells = rows.nth(row).locator("td").all_text_contents()
        assert cells[:3] == [str(view.positions[i]), view.label_texts[i], view.classes[i]]
        assert number(cells[3]) == pytest.approx(attention[i], abs=0.00051)


def wait(page: Page, expression: str, arg: Any = None) -> None:
    """Until an expression is true. Playwright's own waiting is eval, which the page forbids."""
    for _ in range(200):
        if page.evaluate(expression, arg):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never became true: {expression}")
