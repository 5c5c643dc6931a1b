"""Reports of runs of every kind: large, partly measured, of one head; of two runs; refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from pages import READY, compare_with_view, number, opened, shown, texts, wait
from playwright.sync_api import Browser
from surface import under
from tiny import TWO, byte_level, hf_model

import twotower as tt
from twotower.figures import head_table, prompt_view, write_report
from twotower.figures.report_data import comparison
from twotower.testing import Planting


@pytest.fixture(scope="module")
def run(llama: tt.Model, prompts: tt.Prompts) -> xr.DataTree:
    return tt.analyze(llama, prompts)


@pytest.mark.parametrize("words", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_long_prompts(browser: Browser, tmp_path: Path, words: int) -> None:
    module = hf_model("llama-grouped")
    module.config.max_position_embeddings = 8192
    model = tt.load(module, tokenizer=byte_level())
    long = {c: [f"{t} " * words for t in texts_] for c, texts_ in TWO.texts.items()}
    prompts = tt.build_prompts(model, tt.Task("long", long), shots=5, n=1, seed=0)
    assert prompts.n_positions > 40 * words
    run = under(tt.analyze, model, prompts, measures=("predictions", "qk", "ov"), batch_size=1)
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
        big = {x: dataset[x].isel(position=np.full(1500, -2)).copy() for x in dataset.data_vars}
        for variable in variables:
            big[variable].values[:] = noise.normal(size=big[variable].shape)
        wide[name] = xr.Dataset(big, attrs=dataset.attrs).assign_coords(
            position=np.arange(-1499, 1)
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
        wait(page, "document.getElementById('answer').textContent.includes('holds no positions')")


@pytest.fixture(scope="module")
def other(llama: tt.Model) -> xr.DataTree:
    """A run of other prompts."""
    return tt.analyze(llama, tt.build_prompts(llama, TWO, shots=3, n=4, seed=8))


def test_two_runs(browser: Browser, run, other, tmp_path: Path) -> None:
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
        np.testing.assert_allclose(
            [number(x) for x in cells[1 : len(expected) + 1]], expected, atol=0.00051
        )
        page.select_option("#which", "difference")
        z = page.evaluate("document.getElementById('map').data[0].z[2][1]")
        assert z == pytest.approx(float((a - b).margin_drop.values[1, 2]), abs=1e-5)
        page.select_option("#prompt-run", "1")
        page.wait_for_timeout(100)
        assert len(texts(page, "#prompt option")) == 4
        head = page.inner_text("#chosen-title").removeprefix("Head ").split(".")
        compare_with_view(page, other, (int(head[0]), int(head[1])), 0)
        # The address names the run, too.
        page.select_option("#prompt", "2")
        wait(page, "location.hash.includes('prompt=2&run=1')")
        page.reload()
        page.wait_for_selector(READY)
        assert page.input_value("#prompt-run") == "1"
        assert page.input_value("#prompt") == "2"
        page.evaluate("location.hash = '#head=2.2&prompt=1&run=0'")
        wait(page, "document.getElementById('chosen-title').textContent == 'Head 2.2'")
        assert page.input_value("#prompt-run") == "0"


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


LACKING = (
    (without("qk"), ["This run holds no QK scores and attention."]),
    (without("ov"), ["This run holds no OV label logits."]),
    (
        without("qk", "ov"),
        ["This run holds no QK scores and attention.", "This run holds no OV label logits."],
    ),
    (without("prompts"), []),
    (without("predictions", "attribution"), []),
    (without("prompts", "predictions", "attribution"), []),
    (partly, ["2 of 6 prompts are measured so far."]),
    (empty, ["0 of 6 prompts are measured so far."]),
)

IN_SHORT = (2, 5, 7)
"""Which of `LACKING` `make test` opens in the browser: what lacks most."""


@pytest.mark.parametrize(("change", "notes"), LACKING)
def test_what_a_run_lacks_is_said(run, tmp_path: Path, change, notes) -> None:
    file = write_report(change(run), tmp_path / "run.html")
    page = file.read_text(encoding="utf-8").partition("</noscript>")[2]
    assert re.findall(r'<p class="note">(.*?)</p>', page) == notes


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        pytest.param(*one, marks=() if i in IN_SHORT else pytest.mark.slow)
        for i, one in enumerate(LACKING)
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
        (lambda: write_report("run.zarr", target), "is not a run"),
        (lambda: write_report(None, target), "is not a run"),
        (lambda: write_report(run, target, run, names=("one",)), "must be 2 texts"),
        (lambda: write_report(run, target, prompts=3), "must be a list of numbers"),
        (lambda: write_report(run, 5), "must be a path"),
        (lambda: write_report(run, target, run.predictions), "has no numbers of heads"),
        (lambda: write_report(run.tt.head(1, 1), target), "no dim"),
    ):
        with pytest.raises(tt.errors.InputError, match=words):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_whole_or_not_there(run, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "run.html"
    write_report(run, target)
    before = target.read_bytes()

    def full(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(tt.errors.InputError, match="No space left on device"):
        write_report(run, target)
    assert target.read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == ["run.html"]


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
    with opened(browser, file, 360) as page:
        for width in (360, 800):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            title = page.locator("#towers .ytitle").text_content()
            assert title == "<i>b</i> & c"


def test_the_report_compares_what_is_stored_not_what_is_shown(run) -> None:
    table = head_table(run)
    small = table * 1e-9
    found = {row["name"]: row for row in comparison(table, small)}
    assert found["margin_drop"]["correlation"] == pytest.approx(1)


@pytest.mark.parametrize("several", [False, True])
def test_answers_of_each_prompt(browser: Browser, llama: tt.Model, tmp_path: Path, several) -> None:
    """A prompt's own answers are shown as texts; those of several tokens have no logits."""
    outputs = ["foo", "bar", "map", "key bar" if several else "key"]
    pairs = tt.PairTask("sounds", list(zip(["cat", "dog", "owl", "cow"], outputs, strict=True)))
    prompts = tt.build_prompts(llama, pairs, shots=2, n=2)
    run = tt.analyze(llama, prompts, measures=("predictions", "qk", "ov"))
    file = write_report(run, tmp_path / "pairs.html")
    with opened(browser, file) as page:
        said = page.locator("#answer").text_content() or ""
        right, wrong = (f'"{text}"' for text in prompts.answers.text[0])
        assert said.startswith(f"{right} is right. The model says")
        kind = "logprob" if several else "logit"
        values = run["predictions"][kind].isel(prompt=0).values
        words = "log-probabilities" if several else "logits"
        expected = f"{words}: right {right} {shown(values[0], 2)}, wrong {wrong} "
        assert expected + shown(values[1], 2) in said
        assert texts(page, "#prompt option")[1].startswith(f'1: "{prompts.answers.text[1, 0]}"')


CLICK = """(name) => {
    const plot = document.getElementById("circuit"), { text, customdata } = plot.data[0];
    const point = { curveNumber: 0, customdata: customdata[text.indexOf(name)] };
    plot.emit("plotly_click", { points: [point] });
}"""
"""A click on a node, as Plotly tells of it."""


def test_circuit(browser: Browser, tmp_path: Path) -> None:
    """The circuit is stored in the run; a click on one of its heads chooses the head."""
    planting = Planting()
    model = planting.load()
    prompts = planting.prompts(model, n=4, shots=2)
    run = tt.analyze(model, prompts, measures=("predictions", "effects"))
    run["circuit"] = tt.circuit(model, prompts, depth=1)
    found = tt.open(tt.save(run, tmp_path / "run.zarr")).load()
    file = write_report(found, tmp_path / "circuit.html")
    gather, match = str(planting.gather), str(planting.match[0])
    with opened(browser, file) as page:
        rows = [row.split("\t") for row in page.locator("#edges tbody tr").all_inner_texts()]
        edges = found["circuit"]
        shown_edges = {tuple(row[:5]): number(row[5]) for row in rows}
        names = ("source_name", "source_at", "target_name", "target_at", "tower")
        for i in range(edges.sizes["edge"]):
            key = tuple(str(edges[name].values[i]) for name in names)
            mean = float(edges["mean_effect"][i])
            assert shown_edges.pop(key) == pytest.approx(mean, abs=6e-4 + 1e-4 * abs(mean))
        assert not shown_edges
        sizes = [abs(number(row[5])) for row in rows]
        assert sizes == sorted(sizes, reverse=True)
        named = {(row[0], row[2], row[4]) for row in rows}
        assert {(gather, match, "q"), (gather, match, "k"), (match, "answer", "answer")} <= named
        assert page.locator("#circuit .textpoint").count() >= 3
        page.locator(f"#circuit .textpoint:has-text('{gather}')").first.wait_for()
        page.evaluate(CLICK, gather)
        assert page.inner_text("#chosen-title") == f"Head {gather}"
        chosen = page.locator("#edges tbody tr.same").count()
        assert chosen == sum(gather in (row[0], row[2]) for row in rows) > 0
