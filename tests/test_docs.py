"""The Python of README.md and docs/ runs as written, and the README shows what it prints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import random_llama

import twotower as tt

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
LINK = re.compile(r"\]\(([^)#:]+)(?:#([^)]*))?\)")

SHALLOW = "docs/any-question.md"
"""A page that names no heads: the small model has fewer layers for it."""


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module", params=["random", pytest.param("demo", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    """The model that is loaded: a small one that has the heads of the pages, or the demo model."""
    return request.param


@pytest.fixture(scope="module")
def names(kind: str, demo_tokenizer) -> Iterator[dict[str, Any]]:
    """What the README's example defines; other pages continue it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        if kind == "random":
            model, shallow = (random_llama(demo_tokenizer, layers, heads=8) for layers in (24, 9))
            patch.setattr(tt, "load", {"smollm2-135m": model, SHALLOW: shallow}.__getitem__)
        yield {}


@pytest.mark.demo_model
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, kind: str, names, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    own = names if page == "README.md" else dict(names)
    if page == SHALLOW and kind == "random":
        monkeypatch.setattr(tt, "load", lambda name, load=tt.load: load(SHALLOW))
    elif "fit" in names and page != "README.md":  # the same on a few of the prompts
        few = 4 if page == "docs/reading-results.md" else 2  # it shows prompt 3
        own |= {half: names[half][:few] for half in ("fit", "test")}
        own["effects"] = tt.head_effects(names["model"], own["fit"])
    for number, block in enumerate(blocks(page)):
        # From a file, since nnsight reads the source of what it traces.
        path = tmp_path / f"block{number}.py"
        path.write_text(block, encoding="utf-8")
        exec(compile(block, str(path), "exec"), own)
    printed = capsys.readouterr().out
    if page == "README.md":
        text = (ROOT / page).read_text(encoding="utf-8")
        shown = re.search(r"```python\n.*?```\n\n```\n(.*?)```", text, re.DOTALL)
        assert shown is not None
        if kind == "demo":
            assert printed == shown.group(1)
        else:
            numbers = re.compile(r"\d+")
            found, expected = (numbers.sub("0", x) for x in (printed, shown.group(1)))
            assert found == expected


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.replace(" ", "-") for text in kept}


@pytest.mark.parametrize("page", [*PAGES, "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        path = (ROOT / page).parent / target
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"
