"""The report in a browser: from disk, without a network, by mouse and by keyboard."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page
from tiny import TWO, byte_level, hf_model

import twotower as tt
from twotower.figures import head_table, prompt_view, write_report
from twotower.figures.report_data import comparison

READY = "body[data-ready=yes]"


@pytest.fixture(scope="module")
def run(llama: tt.Model, prompts: tt.Prompts) -> xr.DataTree:
    return tt.analyze(llama, prompts)


@pytest.fixture(scope="module")
def page_file(run: xr.DataTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(run, tmp_path_factory.mktemp("report") / "run.html")


@contextmanager
def opened(
    browser: Browser, file: Path, width: int = 1000, theme: str = "light", ready: bool = True
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
    page.goto(file.as_uri())
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


def test_it_shows_the_strongest_head_first(browser: Browser, page_file: Path, run) -> None:
    with opened(browser, page_file) as page:
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


def test_a_click_on_the_map_changes_everything(browser: Browser, page_file: Path, run) -> None:
    with opened(browser, page_file) as page:
        before = page.inner_html("#tokens")
        box = page.locator("#map .nsewdrag").bounding_box()
        assert box is not None
        # Three layers from left to right, four heads from below.
        page.mouse.click(box["x"] + box["width"] * 2.5 / 3, box["y"] + box["height"] * 2.5 / 4)
        page.wait_for_function("document.getElementById('chosen-title').textContent == 'Head 2.1'")
        page.wait_for_function(
            "before => document.getElementById('tokens').innerHTML != before", arg=before
        )
        assert page.locator("tr.chosen").get_attribute("data-head") == "2.1"
        assert "head=2.1" in page.url
        compare_with_view(page, run, (2, 1), 0)


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
        i for i in range(len(view.tokens)) if "label" in (spans.nth(i).get_attribute("class") or "")
    ]
    assert labels == view.label_positions.tolist()
    rows = page.locator("#positions tbody tr")
    assert rows.count() == len(labels)
    for row, i in enumerate(labels):
        cells = rows.nth(row).locator("td").all_text_contents()
        assert cells[:3] == [str(view.positions[i]), view.label_texts[i], view.classes[i]]
        assert number(cells[3]) == pytest.approx(attention[i], abs=0.00051)


def test_prompts(browser: Browser, page_file: Path, run) -> None:
    with opened(browser, page_file) as page:
        options = texts(page, "#prompt option")
        assert len(options) == 6
        for i, text in enumerate(options):
            right = "right" if run.predictions.correct.values[i] else "wrong"
            assert text == f"{i}: {run.qk.query_class.values[i]}, {run.qk.gold.values[i]}, {right}"
        page.click("#next")
        page.wait_for_function("document.getElementById('prompt').value == '1'")
        page.click("#previous")
        page.click("#previous")
        page.wait_for_function("document.getElementById('prompt').value == '5'")
        head = tt.in_context_heads(run, 1)[0]
        page.wait_for_function("location.hash.includes('prompt=5')")
        page.wait_for_timeout(100)
        compare_with_view(page, run, head, 5)


def test_shades(browser: Browser, page_file: Path, run) -> None:
    with opened(browser, page_file) as page:
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


def test_sorting_and_search(browser: Browser, page_file: Path, run) -> None:
    table = head_table(run).to_dataframe().reset_index()
    names = [f"{row.layer}.{row.head}" for row in table.itertuples()]
    with opened(browser, page_file) as page:

        def order() -> list[str]:
            return texts(page, "#heads tbody button")

        by_effect = table.sort_values("margin_drop", ascending=False).index
        assert order() == [names[i] for i in by_effect]
        page.click("#heads thead button[data-sort='4']")
        values = [number(x) for x in texts(page, "#heads tbody td:nth-child(6)")]
        assert values == sorted(values, reverse=True)
        np.testing.assert_allclose(values, sorted(table["ov_auc"], reverse=True), atol=0.00051)
        assert page.locator("th[aria-sort='descending']").inner_text().startswith("OV AUC")
        page.click("#heads thead button[data-sort='4']")
        assert texts(page, "#heads tbody td:nth-child(6)") == [shown(x) for x in sorted(values)]
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


def test_the_keyboard_alone(browser: Browser, page_file: Path, run) -> None:
    with opened(browser, page_file) as page:
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
        controls |= {"tokens", "search", "0", "4", "Label positions", "Heads"}
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


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1300])
def test_widths_and_themes(browser: Browser, page_file: Path, width: int, theme: str) -> None:
    with opened(browser, page_file, width, theme) as page:
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


def test_it_is_quick_and_small(browser: Browser, page_file: Path) -> None:
    assert page_file.stat().st_size < 6e6
    with opened(browser, page_file, ready=False) as page:
        start = time.perf_counter()
        page.reload()
        page.wait_for_selector(READY)
        assert time.perf_counter() - start < 6  # 1.5 s on a quiet machine of two cores


def test_an_address_names_head_and_prompt(browser: Browser, page_file: Path, tmp_path) -> None:
    with opened(browser, page_file, ready=False) as page:
        page.goto(page_file.as_uri() + "#head=1.3&prompt=4")
        page.reload()
        page.wait_for_selector(READY)
        assert page.inner_text("#chosen-title") == "Head 1.3"
        assert page.input_value("#prompt") == "4"
        page.goto(page_file.as_uri() + "#head=99.1&prompt=x")
        page.reload()
        page.wait_for_selector(READY)
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
            page.wait_for_function(f"location.hash.includes('prompt={number}')")
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


def test_long_prompts(browser: Browser, tmp_path: Path) -> None:
    module = hf_model("llama-grouped")
    module.config.max_position_embeddings = 8192
    model = tt.load(module, tokenizer=byte_level())
    long = {c: [f"{t} " * 100 for t in texts_] for c, texts_ in TWO.texts.items()}
    prompts = tt.build_prompts(model, tt.Task("long", long), shots=5, n=2, seed=0)
    assert prompts.n_positions > 4000
    run = tt.analyze(model, prompts, measures=("predictions", "qk", "ov"), batch_size=1)
    file = write_report(run, tmp_path / "long.html")
    assert file.stat().st_size < 6e6
    with opened(browser, file) as page:
        assert page.locator("#tokens span").count() == len(prompt_view(run, 0).tokens)
        assert page.locator("#positions tbody tr").count() == 10
        assert "effect" not in "".join(texts(page, "#heads thead th"))


def test_large_runs_are_thinned_and_say_so(browser: Browser, run, tmp_path: Path) -> None:
    many = xr.DataTree.from_dict(
        {
            "/": run.to_dataset(),
            **{
                name: xr.concat([node.to_dataset(inherit=False)] * 40, "prompt").assign_coords(
                    prompt=np.arange(240)
                )
                if "prompt" in node.dims
                else node.to_dataset(inherit=False)
                for name, node in run.children.items()
            },
        }
    )
    file = write_report(many, tmp_path / "many.html", most_bytes=2_500_000)
    assert file.stat().st_size <= 2_500_000
    with opened(browser, file) as page:
        note = page.inner_text(".note")
        held = int(re.search(r"(\d+) of 240 prompts", note).group(1))  # type: ignore[union-attr]
        assert page.locator("#prompt option").count() == held < 240
    wide = run.copy()
    noise = np.random.default_rng(0)
    for name, variables in (("qk", ("score", "score_content")), ("ov", ("label_logit",))):
        dataset = wide[name].to_dataset(inherit=False).copy()
        big = {x: dataset[x].isel(position=np.full(3000, -2)).copy() for x in dataset.data_vars}
        for variable in variables:
            big[variable].values[:] = noise.normal(size=big[variable].shape)
        wide[name] = xr.Dataset(big, attrs=dataset.attrs).assign_coords(
            position=np.arange(-2999, 1)
        )
    del wide["prompts"]
    file = write_report(wide, tmp_path / "wide.html", most_bytes=2_500_000)
    with opened(browser, file) as page:
        notes = " ".join(texts(page, ".note"))
        kept = int(re.search(r"for (\d+) of 12 heads, the strongest", notes).group(1))  # type: ignore[union-attr]
        assert 0 < kept < 12
        strongest = [str(h) for h in tt.in_context_heads(run, 12)]
        assert page.inner_text("#chosen-title") == f"Head {strongest[0]}"
        assert page.locator("#tokens span[style]").count() > 0
        page.fill("#search", strongest[-1])
        page.click("#heads tbody button")
        page.wait_for_function(
            "document.getElementById('answer').textContent.includes('holds no positions')"
        )


def test_two_runs(browser: Browser, run, llama: tt.Model, tmp_path: Path) -> None:
    prompts = tt.build_prompts(llama, TWO, shots=3, n=4, seed=8)
    other = tt.analyze(llama, prompts)
    file = write_report(run, tmp_path / "two.html", other, names=("first", "second"))
    a, b = head_table(run), head_table(other)
    with opened(browser, file) as page:
        rows = page.locator("#comparison tr").all_inner_texts()
        from scipy.stats import spearmanr

        rank = spearmanr(a.margin_drop.values.ravel(), b.margin_drop.values.ravel()).statistic
        top = [set(tt.in_context_heads(x, 4)) for x in (run, other)]
        shared = len(top[0] & top[1])
        assert rows[1].split("\t") == ["effect on margin", shown(rank), f"{shared} of 4"]
        assert texts(page, ".note") == ["The two runs are of different prompts, seeds."]
        assert texts(page, "#which option") == ["first", "second", "first less second"]
        page.click("#heads thead button[data-sort='-1']")
        cells = page.locator("#heads tbody tr").nth(5).locator("td").all_text_contents()
        expected = [
            x for name in a for x in (float(a[name].values[1, 1]), float(b[name].values[1, 1]))
        ]
        np.testing.assert_allclose([number(x) for x in cells[:10]], expected, atol=0.00051)
        page.select_option("#which", "difference")
        z = page.evaluate("document.getElementById('map').data[0].z[2][1]")
        assert z == pytest.approx(float((a - b).margin_drop.values[1, 2]), abs=1e-5)
        page.select_option("#prompt-run", "1")
        page.wait_for_timeout(100)
        assert len(texts(page, "#prompt option")) == 4
        head = page.inner_text("#chosen-title").removeprefix("Head ").split(".")
        compare_with_view(page, other, (int(head[0]), int(head[1])), 0)


def without(*groups: str) -> Callable[[xr.DataTree], xr.DataTree]:
    def change(run: xr.DataTree) -> xr.DataTree:
        found = run.copy()
        for group in groups:
            del found[group]
        return found

    return change


def partly(run: xr.DataTree) -> xr.DataTree:
    found = run.copy()
    marks = np.array([True, False, True, False, False, False])
    for name in ("predictions", "effects", "attribution", "qk", "ov"):
        found[name] = found[name].to_dataset().assign_coords(measured=("prompt", marks))
    del found["scores"]
    return found


def empty(run: xr.DataTree) -> xr.DataTree:
    found = partly(run)
    for name in ("predictions", "effects", "attribution", "qk", "ov"):
        nothing = ("prompt", np.zeros(6, dtype=bool))
        found[name] = found[name].to_dataset().assign_coords(measured=nothing)
    return found


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        (without("qk"), ["This run holds no QK scores and attention."]),
        (without("ov"), ["This run holds no OV label logits."]),
        (
            without("qk", "ov"),
            ["This run holds no QK scores and attention.", "This run holds no OV label logits."],
        ),
        (without("prompts"), []),
        (without("predictions", "attribution"), []),
        (partly, ["2 of 6 prompts are measured so far."]),
        (empty, ["0 of 6 prompts are measured so far."]),
    ],
)
def test_runs_that_lack_something(browser: Browser, run, tmp_path: Path, change, notes) -> None:
    file = write_report(change(run), tmp_path / "run.html")
    with opened(browser, file) as page:
        assert texts(page, ".note") == notes


def test_a_run_of_predictions_alone(browser: Browser, run, tmp_path: Path) -> None:
    file = write_report(run.predictions, tmp_path / "run.html")
    with opened(browser, file, ready=False) as page:
        assert "This run holds no numbers of heads." in texts(page, ".note")
        assert not page.is_visible("#map")


def test_a_single_head(browser: Browser, tmp_path: Path) -> None:
    module = hf_model("gpt2")
    module.config.n_layer = module.config.n_head = 1
    model = tt.load(type(module)(module.config).eval(), tokenizer=byte_level())
    run = tt.analyze(model, tt.build_prompts(model, TWO, shots=2, n=3))
    file = write_report(run, tmp_path / "one.html")
    with opened(browser, file) as page:
        assert page.inner_text("#chosen-title") == "Head 0.0"
        assert page.inner_text("#found") == "1 of 1 heads"
        compare_with_view(page, run, (0, 0), 0)


def test_what_cannot_be_written(run, llama: tt.Model, tmp_path: Path) -> None:
    module = hf_model("gpt2")
    module.config.n_layer = 2
    small = tt.load(type(module)(module.config).eval(), tokenizer=byte_level())
    other = tt.head_effects(small, tt.build_prompts(small, TWO, shots=1, n=2))
    target = tmp_path / "run.html"
    for ask, words in (
        (lambda: write_report(run, target, other), "3 x 4 and 2 x 4 heads"),
        (lambda: write_report(run, tmp_path), "is a folder"),
        (lambda: write_report(run, tmp_path / "no" / "run.html"), "folder is not there"),
        (lambda: write_report(run, target, prompts=[0, 9]), "prompt 9 is not in the run"),
        (lambda: write_report(run, target, most_bytes=100), "most_bytes=100"),
        (lambda: write_report("run.zarr", target), "is no run"),
        (lambda: write_report(None, target), "is no run"),
        (lambda: write_report(run, target, run, names=("one",)), "must be 2 texts"),
        (lambda: write_report(run, target, prompts=3), "must be a list of numbers"),
        (lambda: write_report(run, 5), "must be a path"),
        (lambda: write_report(run, target, run.predictions), "has no numbers of heads"),
        (lambda: write_report(run.tt.head(1, 1), target), "no dim"),
    ):
        with pytest.raises(tt.InputError, match=words):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_whole_or_not_there(run, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "run.html"
    write_report(run, target)
    before = target.read_bytes()

    def full(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(tt.InputError, match="No space left on device"):
        write_report(run, target)
    assert target.read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == ["run.html"]


def test_content_is_strict_json(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    content = re.search(r'id="content">(.*?)</script>', text).group(1)  # type: ignore[union-attr]
    json.loads(content, parse_constant=lambda name: pytest.fail(name))
    assert "<" not in content


def test_an_address_names_the_run(browser: Browser, run, llama: tt.Model, tmp_path: Path) -> None:
    other = tt.analyze(llama, tt.build_prompts(llama, TWO, shots=3, n=4, seed=8))
    file = write_report(run, tmp_path / "two.html", other)
    with opened(browser, file) as page:
        page.select_option("#prompt-run", "1")
        page.select_option("#prompt", "2")
        page.wait_for_function("location.hash.includes('prompt=2&run=1')")
        page.reload()
        page.wait_for_selector(READY)
        assert page.input_value("#prompt-run") == "1"
        assert page.input_value("#prompt") == "2"
        page.evaluate("location.hash = '#head=2.2&prompt=1&run=0'")
        page.wait_for_function("document.getElementById('chosen-title').textContent == 'Head 2.2'")
        assert page.input_value("#prompt-run") == "0"


def test_a_first_run_without_effects(browser: Browser, run, tmp_path: Path) -> None:
    file = write_report(
        without("attribution")(scores_alone(run)), tmp_path / "two.html", run, names=("a", "b")
    )
    with opened(browser, file) as page:
        assert page.locator("#column option:checked").inner_text() == "QK AUC"
        assert page.is_visible("#map")
        page.select_option("#column", label="effect on margin")
        assert page.inner_text("#map-note") == "There is no such number in a."
        assert not page.is_visible("#map")


def scores_alone(run: xr.DataTree) -> xr.DataTree:
    found = without("effects")(run)
    found["scores"] = found["scores"].to_dataset().drop_vars("margin_drop")
    return found


def test_long_names_and_many_labels(browser: Browser, llama: tt.Model, tmp_path: Path) -> None:
    every = [text for one in TWO.texts.values() for text in one]
    long = "of a very long name " * 4
    classes = {f"class {long}{i}": every[5 * i : 5 * i + 5] for i in range(4)}
    labels = ("foo", "bar", "map", "key")
    prompts = tt.build_prompts(llama, tt.Task("long", classes), labels, shots=1, n=2, seed=0)
    run = tt.analyze(llama, prompts)
    file = write_report(run, tmp_path / "long.html", run, names=("a" * 90, "<i>b</i> & c"))
    for width in (360, 800):
        with opened(browser, file, width) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            title = page.locator("#towers .ytitle").text_content()
            assert title == "<i>b</i> & c"


def test_another_head_leaves_the_prompt_where_it_is(browser: Browser, tmp_path: Path) -> None:
    model = tt.load(hf_model("llama-grouped"), tokenizer=byte_level())
    prompts = tt.build_prompts(model, TWO, shots=9, n=2, seed=0)
    file = write_report(tt.analyze(model, prompts), tmp_path / "run.html")
    with opened(browser, file, 360) as page:
        page.set_viewport_size({"width": 360, "height": 500})
        box = "document.getElementById('tokens')"
        page.evaluate(f"{box}.style.maxHeight = '100px'")
        page.select_option("#prompt", "1")
        page.wait_for_function(f"{box}.dataset.shown == '0.1' && {box}.scrollTop > 0")
        page.evaluate(f"{box}.scrollTop = 7")
        page.fill("#search", "2.2")
        page.click("#heads tbody button")
        page.wait_for_timeout(200)
        assert page.evaluate(f"{box}.scrollTop") == 7


def test_the_report_compares_what_is_stored_not_what_is_shown(run) -> None:
    table = head_table(run)
    small = table * 1e-9
    found = {row["name"]: row for row in comparison(table, small)}
    assert found["margin_drop"]["correlation"] == pytest.approx(1)
