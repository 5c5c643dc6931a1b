"""Figures, by what they draw: places, sizes, marks, words."""

from __future__ import annotations

import io
from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest
import xarray as xr

import twotower as tt
from twotower import figures
from twotower.figures.texts import printable
from twotower.statistics import bootstrap_mean

matplotlib.use("Agg")

from matplotlib import pyplot as plt


@pytest.fixture(scope="module")
def run(llama: tt.Model, prompts: tt.Prompts) -> xr.DataTree:
    return tt.analyze(llama, prompts)


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def words(ax: plt.Axes) -> list[str]:
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_head_map(run: xr.DataTree) -> None:
    for by, centre in (
        ("margin_drop", 0.0),
        ("label_logit", 0.0),
        ("qk_auc", 0.5),
        ("ov_auc", 0.5),
    ):
        ax = figures.head_map(run, by=by, heads=[(2, 1), (0, 3)])
        values = figures.head_table(run)[by]
        mesh = ax.collections[0]
        np.testing.assert_allclose(mesh.get_array(), values.T)
        low, high = mesh.get_clim()
        assert (low + high) / 2 == pytest.approx(centre)
        assert high - centre == pytest.approx(float(np.abs(values - centre).max()))
        assert ax.collections[1].get_offsets().tolist() == [[2, 1], [0, 3]]
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "head")
        bar = ax.figure.axes[-1]
        assert bar.get_ylabel() == values.attrs["long_name"].partition(",")[0]
    assert words(figures.head_map(run)) == ["marked heads (12)"]


def test_two_towers(run: xr.DataTree) -> None:
    ax = figures.two_towers(run, heads=[(1, 2)])
    rest, marked = ax.collections[:2]
    qk, ov = run.scores.qk_auc.values, run.scores.ov_auc.values
    np.testing.assert_allclose(marked.get_offsets(), [[qk[1, 2], ov[1, 2]]])
    mask = np.ones((3, 4), dtype=bool)
    mask[1, 2] = False
    np.testing.assert_allclose(rest.get_offsets(), np.stack([qk[mask], ov[mask]], axis=1))
    effect = np.abs(run.effects.margin_drop.mean("prompt").values)
    order = np.argsort(effect[mask])
    assert (np.diff(rest.get_sizes()[order]) >= 0).all()
    assert [text.get_text() for text in ax.texts] == ["1.2"]
    assert words(ax) == ["heads", "marked heads (1)"]


def test_effect_by_layer(run: xr.DataTree) -> None:
    ax = figures.effect_by_layer(run)
    drop = run.effects.margin_drop
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_allclose(heights, drop.mean("prompt").sum("head").values, rtol=1e-5)
    points = next(line for line in ax.lines if line.get_label() == "largest head")
    np.testing.assert_allclose(
        points.get_ydata(), drop.mean("prompt").max("head").values, rtol=1e-5
    )
    low = ax.collections[0].get_segments()[1][0][1]
    expected = bootstrap_mean(drop.sum("head").values[:, 1])
    assert low == pytest.approx(expected.low, rel=1e-4)


def test_attention(run: xr.DataTree) -> None:
    ax = figures.attention(run, (2, 1), 3)
    view = figures.prompt_view(run, 3)
    heights = {round(bar.get_x() + 0.45): bar.get_height() for bar in ax.patches}
    np.testing.assert_allclose(
        [heights[i] for i in range(len(view.tokens))], view.of((2, 1))["attention"]
    )
    assert set(words(ax)) == {"other", "label, the query's class", "label, another class", "query"}
    names = [text.get_text() for text in ax.get_xticklabels()]
    assert names == [printable(token) for token in view.tokens]
    bold = [i for i, t in enumerate(ax.get_xticklabels()) if t.get_fontweight() == "bold"]
    assert bold == view.named.tolist()
    assert "2.1" in ax.get_title()


@pytest.mark.parametrize("weighted", [False, True])
def test_label_logits(run: xr.DataTree, weighted: bool) -> None:
    ax = figures.label_logits(run, (1, 0), 2, weighted=weighted)
    view = figures.prompt_view(run, 2)
    values = view.of((1, 0))["label_logit"]
    if weighted:
        values = values * view.of((1, 0))["attention"][:, None]
    thin = [line for line in ax.lines if line.get_linewidth() == 0.6]
    assert len(thin) == 2
    for number, line in enumerate(thin):
        np.testing.assert_allclose(line.get_ydata(), values[:, number])
    filled = next(line for line in ax.lines if line.get_label() == "foo, where it stands")
    own = [i for i in view.named if view.label_texts[i] == "foo"]
    assert filled.get_xdata().tolist() == own
    assert ("weighted" in ax.get_ylabel()) == weighted


def test_knocked_out(llama: tt.Model, prompts: tt.Prompts) -> None:
    found = {
        k: tt.predict(
            llama, prompts, [tt.KnockOut([(2, h) for h in range(k)], positions="all")] if k else []
        )
        for k in (4, 0, 2)
    }
    for measure in ("correct", "top1_correct"):
        ax = figures.knocked_out({"some": found}, measure=measure)
        line = ax.lines[0]
        assert line.get_xdata().tolist() == [0, 2, 4]
        means = [float(found[k][measure].mean()) for k in (0, 2, 4)]
        np.testing.assert_allclose(line.get_ydata(), means)
        chance = [x for x in ax.lines if x.get_label() == "chance"]
        assert len(chance) == (measure == "correct")
        assert all(x.get_ydata()[0] == 0.5 for x in chance)


def test_bias_curves(llama: tt.Model) -> None:
    from tiny import TWO

    curves: dict[str, dict[float, xr.Dataset]] = {"before": {}, "after": {}}
    for ratio in (3, 2):
        prompts = tt.build_prompts(llama, TWO, shots={"foo": ratio, "bar": 1}, n=4, seed=1)
        edits = [tt.KnockOut([(1, 1)], positions="all")]
        for name, edit in (("before", []), ("after", edits)):
            answers = tt.predict(llama, prompts, edit)
            curves[name][ratio] = tt.label_bias(answers, tt.majority_label(prompts))
    ax = figures.bias_curves(curves)
    assert words(ax) == ["before", "after"]
    for line, curve in zip(ax.lines, curves.values(), strict=False):
        assert line.get_xdata().tolist() == [2, 3]
        means = [float(curve[ratio].logit_bias.mean()) for ratio in (2, 3)]
        np.testing.assert_allclose(line.get_ydata(), means, rtol=1e-5)
    assert figures.bias_curves(curves, kind="count_bias", xlabel="x").get_xlabel() == "x"


def test_given_axes_and_every_format(run: xr.DataTree) -> None:
    _, (left, right) = plt.subplots(1, 2)
    assert run.tt.figure.head_map(ax=left) is left
    assert run.tt.figure.two_towers(ax=right) is right
    for draw in (
        run.tt.figure.effect_by_layer,
        lambda: run.tt.figure.attention((0, 0), 1),
        lambda: run.tt.figure.label_logits((0, 0), 1),
        run.effects.tt.figure.head_map,
    ):
        draw()
    first, *others = plt.get_fignums()
    forms = {"svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}
    for number, form in [*((first, form) for form in forms), *((x, "png") for x in others)]:
        content = io.BytesIO()
        plt.figure(number).savefig(content, format=form)
        assert content.getvalue().startswith(forms[form])


def test_settings_are_left_as_they_were(run: xr.DataTree) -> None:
    before = dict(plt.rcParams)
    figures.head_map(run)
    assert dict(plt.rcParams) == before


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a\u21b5b"),
        ("\t", "\u2192"),
        ("$x^2$", r"\$x^2\$"),
        ("\x07", "\u25af"),
        ("猫", "\u25af"),
        ("שלום", "שלום"),
    ],
)
def test_texts_that_matplotlib_can_draw(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_wrong_arguments(run: xr.DataTree) -> None:
    part = run.copy()
    for name in ("effects", "attribution"):
        del part[name]
    part["scores"] = part["scores"].to_dataset().drop_vars("margin_drop")
    for draw, found in (
        (lambda: figures.head_map(part), "by='margin_drop' is not in the run; it has qk_auc"),
        (lambda: figures.head_map(run, by="auc"), "by='auc'"),
        (lambda: figures.two_towers(run.effects), "by='qk_auc' is not in the run"),
        (lambda: figures.effect_by_layer(part), "margin_drop"),
        (lambda: figures.attention(run, (7, 0)), r"no head 7\.0"),
        (lambda: figures.attention(run.ov, (0, 0)), "holds no attentions"),
        (lambda: figures.label_logits(run.qk, (0, 0)), "holds no label logits"),
        (lambda: figures.knocked_out({}), "curves must map"),
        (lambda: figures.knocked_out({"a": {0: run}}), "not what predict returns"),
        (lambda: figures.knocked_out({"a": {0: run}}, measure="x"), "measure='x'"),
        (lambda: figures.bias_curves({"a": {}}), "curves must map"),
        (lambda: figures.bias_curves({"a": {1: run.qk.to_dataset()}}), "not what label_bias"),
        (lambda: figures.bias_curves({"a": {1: run}}, kind="x"), "kind='x'"),
    ):
        with pytest.raises(tt.errors.InputError, match=found):
            draw()
    assert plt.get_fignums() == []  # no empty figure is left


def test_no_head_is_marked(run: xr.DataTree) -> None:
    plain = tt.figures.head_map(run, heads=[])
    assert plain.get_legend() is None
    assert len(tt.figures.head_map(run, heads=[(0, 1)]).get_legend().texts) == 1
    towers = tt.figures.two_towers(run, heads=[])
    assert [text.get_text() for text in towers.get_legend().texts] == ["heads"]
    assert not towers.texts


def test_effects_by_layer_of_one_prompt_have_no_intervals(
    llama: tt.Model, prompts: tt.Prompts
) -> None:
    one = tt.analyze(llama, prompts[:1], measures=["effects"])
    axes = tt.figures.effect_by_layer(one)
    assert len(axes.patches) == llama.n_layers
    heights = [bar.get_height() for bar in axes.patches]
    np.testing.assert_allclose(heights, one.effects.margin_drop[0].sum("head"), rtol=1e-5)
