"""Figures hold the data they were given: artists are read back, pixels are not."""

import base64
import struct
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgb
from scipy import stats

from smslib import plotting


def text_of(ticks):
    return [tick.get_text() for tick in ticks]


def legend_of(ax):
    return text_of(ax.get_legend().get_texts())


# ---------------------------------------------------------------- style


def test_methods_have_the_books_order_and_colours():
    methods = ["vae", "beta-vae", "ivae", "svae", "svae+"]
    assert list(plotting.LOOKS)[:5] == methods
    colours = [plotting.look(name).colour for name in (*methods, "oracle")]
    assert colours == ["#999999", "#009E73", "#E69F00", "#56B4E9", "#0072B2", "#000000"]
    assert plotting.look("shuffled").colour == plotting.look("control").colour == "#D55E00"


def test_methods_differ_in_more_than_colour():
    looks = list(plotting.LOOKS.values())[:-1]
    assert len({look.marker for look in looks}) == len(looks)
    assert plotting.look("new").label == "new"


def settings():
    """Matplotlib's settings but the backend, which resolves itself when it is read."""
    return {key: mpl.rcParams[key] for key in mpl.rcParams if key != "backend"}


def test_drawing_leaves_matplotlibs_settings_and_pyplot_alone():
    before = settings()
    plotting.panels()
    assert settings() == before
    with plotting.style():
        assert mpl.rcParams["axes.spines.top"] is False
    assert settings() == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_panels_have_the_size_asked_for():
    figure, axes = plotting.panels(3, n_rows=2, width=plotting.DOUBLE, height=4.0)
    assert figure.get_size_inches().tolist() == [7, 4]
    assert axes.shape == (6,)
    assert axes[1].get_position().x0 > axes[0].get_position().x0
    assert axes[3].get_position().y0 < axes[0].get_position().y0


# ---------------------------------------------------------------- figures


def test_scores_show_every_run_mean_interval_and_paper():
    runs = {"svae+": [0.9, 0.92, 0.94], "vae": np.array([0.5]), "ours": [0.7, 0.8]}
    paper = {"svae+": 0.88, "svae": 0.72}
    ax = plotting.scores(runs, label="MCC", paper=paper)
    assert text_of(ax.get_xticklabels()) == ["VAE", "sVAE", "sVAE+", "ours"]
    assert ax.get_ylabel() == "MCC"
    dots = [drawn.get_offsets() for drawn in ax.collections if isinstance(drawn, PathCollection)]
    heights = sorted(tuple(np.round(offsets[:, 1], 6)) for offsets in dots)
    assert heights == [(0.5,), (0.7, 0.8), (0.88, 0.72), (0.9, 0.92, 0.94)]
    (svae_plus,) = [offsets for offsets in dots if len(offsets) == 3]
    assert np.round(svae_plus[:, 0]).tolist() == [2, 2, 2]
    (published,) = [points for points in ax.collections if points.get_label() == "paper"]
    assert np.round(published.get_offsets()[:, 0]).tolist() == [2, 1]
    assert to_rgb(published.get_facecolor()[0]) == (1, 1, 1)
    bars = {round(bar[0].get_xdata()[0]): bar for bar in ax.containers}
    assert bars[2][0].get_ydata() == pytest.approx([0.92])
    (segment,) = bars[2][2][0].get_segments()
    interval = stats.t.interval(0.95, 2, 0.92, stats.sem(runs["svae+"]))
    assert segment[:, 1] == pytest.approx(interval)
    (segment,) = bars[0][2][0].get_segments()
    assert segment[:, 1] == pytest.approx([0.5, 0.5])


def test_scores_without_paper_have_no_legend():
    assert plotting.scores({"vae": [1.0]}, label="R²").get_legend() is None


def test_scores_show_the_published_spread():
    paper = {"vae": (0.4, 0.1), "svae+": 0.9}
    ax = plotting.scores({"vae": [0.5]}, label="MCC", paper=paper)
    (published,) = [points for points in ax.collections if points.get_label() == "paper"]
    assert published.get_offsets()[:, 1].tolist() == [0.4, 0.9]
    (whiskers,) = [drawn for drawn in ax.collections if isinstance(drawn, LineCollection)][-1:]
    heights = [segment[:, 1].tolist() for segment in whiskers.get_segments()]
    assert heights == [pytest.approx([0.3, 0.5]), [0.9, 0.9]]


def test_levels_are_named_lines():
    ax = plotting.scores({"vae": [0.5]}, label="MCC")
    before = len(ax.lines)
    plotting.levels({"oracle": 0.9, "floor": 0.4}, ax=ax)
    assert [line.get_ydata()[0] for line in ax.lines[before:]] == [0.9, 0.4]
    assert [line.get_color() for line in ax.lines[before:]] == ["#000000", "#666666"]
    assert [(text.get_text(), text.xy[1]) for text in ax.texts] == [
        ("oracle", 0.9),
        ("floor", 0.4),
    ]


def test_dots_of_one_method_do_not_hide_each_other():
    ax = plotting.scores({"vae": np.ones(8)}, label="MCC")
    places = ax.collections[0].get_offsets()[:, 0]
    assert np.diff(np.sort(places)).min() > 0.01
    assert np.abs(places).max() < 0.3


def test_graph_shows_probabilities_and_true_edges():
    probability = np.array([[0.1, 0.9], [0.6, 0.0], [1.0, 0.2]])
    truth = np.array([[0, 1], [0, 0], [1, 0]])
    ax = plotting.graph(probability, truth=truth, targets=["a", "b", "c"])
    np.testing.assert_array_equal(ax.images[0].get_array(), probability)
    assert ax.images[0].get_clim() == (0, 1)
    assert ax.collections[0].get_offsets().tolist() == [[1, 0], [0, 2]]
    assert text_of(ax.get_yticklabels()) == ["a", "b", "c"]
    assert legend_of(ax) == ["true edge"]
    assert ax.figure.axes[1].get_ylabel() == "edge probability"


def test_graph_takes_booleans_without_truth_or_names():
    ax = plotting.graph(np.eye(3, dtype=bool))
    np.testing.assert_array_equal(ax.images[0].get_array(), np.eye(3))
    assert ax.get_ylabel() == "target"
    assert all(tick == round(tick) for tick in ax.get_xticks())
    assert ax.get_legend() is None


def test_history_shows_curves_and_the_best_epoch():
    curves = {"training": [-3.0, -2.0, -1.5], "validation": np.array([-3.1, -2.2])}
    ax = plotting.history(curves, best_epoch=1)
    assert [line.get_ydata()[0] for line in ax.lines[:2]] == [-3.0, -3.1]
    assert ax.lines[1].get_xdata().tolist() == [0, 1]
    assert ax.lines[2].get_xdata() == [1, 1]
    assert legend_of(ax) == ["training", "validation", "best epoch"]
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()
    assert ax.get_ylabel() == "ELBO (nats per cell)"
    assert len(plotting.history(curves).lines) == 2


def test_matching_puts_partners_on_the_diagonal():
    table = np.array([[0.1, -0.9, 0.2], [0.8, 0.0, 0.3]])
    ax = plotting.matching(table, rows=np.arange(2), cols=np.array([1, 0]))
    np.testing.assert_array_equal(ax.images[0].get_array(), table[:, [1, 0, 2]])
    assert ax.images[0].get_clim() == (-1, 1)
    assert [patch.get_xy() for patch in ax.patches] == [(-0.5, -0.5), (0.5, 0.5)]
    assert text_of(ax.get_xticklabels()) == ["1", "0", "2"]


def test_strip_shows_every_value_first_group_on_top():
    ax = plotting.strip({"JAK2": [0.9, 1.0], "NT": np.array([0.1])}, label="gate", threshold=0.5)
    values = [points.get_offsets()[:, 0].tolist() for points in ax.collections]
    assert values == [[0.9, 1.0], [0.1]]
    heights = [np.round(points.get_offsets()[:, 1]).tolist() for points in ax.collections]
    assert heights == [[0, 0], [1]]
    assert text_of(ax.get_yticklabels()) == ["JAK2", "NT"]
    assert ax.yaxis_inverted()
    assert ax.lines[0].get_xdata() == [0.5, 0.5]
    assert len(plotting.strip({"a": [1.0]}, label="").lines) == 0


def test_a_linked_strip_joins_the_dots_of_each_run_and_no_gap():
    groups = {"a": [1.0, 2.0], "b": [3.0, np.nan], "c": [5.0, 6.0]}
    ax = plotting.strip(groups, label="", linked=True)
    assert [line.get_xdata().tolist()[::2] for line in ax.lines] == [[1.0, 5.0], [2.0, 6.0]]
    assert ax.lines[0].get_xdata()[1] == 3.0
    assert np.isnan(ax.lines[1].get_xdata()[1])
    dots = [dots.get_offsets().data for dots in ax.collections]
    for run, line in enumerate(ax.lines):
        np.testing.assert_array_equal(line.get_ydata(), [group[run][1] for group in dots])


def test_a_linked_strip_wants_the_same_runs_in_each_group():
    with pytest.raises(ValueError, match=r"have \[1, 2\] values; expected the same runs"):
        plotting.strip({"a": [1.0], "b": [1.0, 2.0]}, label="", linked=True)


def test_heatmap_writes_every_number_and_leaves_gaps_empty():
    ax = plotting.heatmap(np.array([[0.0, 1.0], [np.nan, 0.5]]), rows=(40, 60), columns=("a", "b"))
    written = {text.get_position(): (text.get_text(), text.get_color()) for text in ax.texts}
    assert written == {
        (0, 0): ("0.00", "black"),
        (1, 0): ("1.00", "white"),
        (1, 1): ("0.50", "black"),
    }
    assert text_of(ax.get_yticklabels()) == ["40", "60"]


def test_trend_shows_every_run_and_the_published_values():
    ax = plotting.trend(
        {"svae+": {"b": [0.2, 0.4], "a": [0.1]}, "ivae": {}},
        settings=("a", "b", "c"),
        labels=("setting", "MCC"),
        paper={"svae+": {"c": 0.9}, "new": {"a": 0.5}},
    )
    dots = np.concatenate([points.get_offsets() for points in ax.collections])
    assert sorted(dots[:, 1]) == [0.1, 0.2, 0.4]
    assert np.round(sorted(dots[:, 0])).tolist() == [0, 1, 1]
    lines = [line for line in ax.lines if len(line.get_xdata())]
    means, published, other = (line.get_ydata().tolist() for line in lines)
    assert (means, published, other) == ([0.1, pytest.approx(0.3)], [0.9], [0.5])
    assert to_rgb(lines[1].get_color()) == to_rgb(plotting.look("svae+").colour)
    assert legend_of(ax) == ["sVAE+", "new, paper", "paper"]
    assert text_of(ax.get_xticklabels()) == ["a", "b", "c"]


def test_ledger_shows_what_remains():
    ax = plotting.ledger({"all": 20_729, "one guide": 16_000}, label="cells")
    assert [bar.get_width() for bar in ax.patches] == [20_729, 16_000]
    assert text_of(ax.texts) == ["20,729", "16,000"]
    assert text_of(ax.get_yticklabels()) == ["all", "one guide"]
    assert ax.get_xlabel() == "cells"
    assert ax.yaxis_inverted()


def test_scatter_shows_points_by_group():
    x, y = np.arange(4.0), np.arange(4.0) ** 2
    ax = plotting.scatter(x, y, groups=["b", "a", "b", "b"], labels=("true", "estimated"))
    assert legend_of(ax) == ["b", "a"]
    assert ax.collections[0].get_offsets().tolist() == [[0, 0], [2, 4], [3, 9]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("true", "estimated")
    single = plotting.scatter(x, y)
    assert single.get_legend() is None
    assert len(single.collections[0].get_offsets()) == 4


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: plotting.scores({"vae": [1.0]}, label="", ax=ax),
        lambda ax: plotting.graph(np.eye(2), ax=ax),
        lambda ax: plotting.history({"a": [1.0, 2.0]}, ax=ax),
        lambda ax: plotting.matching(np.eye(2), rows=np.arange(2), cols=np.arange(2), ax=ax),
        lambda ax: plotting.strip({"a": [1.0]}, label="", ax=ax),
        lambda ax: plotting.ledger({"a": 1}, ax=ax),
        lambda ax: plotting.scatter(np.ones(2), np.ones(2), ax=ax),
    ],
)
def test_figures_draw_on_the_axes_given(draw):
    _, axes = plotting.panels(2)
    assert draw(axes[1]) is axes[1]
    assert not axes[0].has_data()
    assert axes[1].has_data()


# ---------------------------------------------------------------- show


def test_show_displays_a_picture_with_its_text(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *args, **kw: shown.append((args, kw)))
    alt = "Dot plot of MCC by method, highest for sVAE+."
    ax = plotting.scores({"vae": [1.0]}, label="MCC")
    plotting.show(ax, alt=alt)
    plotting.show(ax.figure, alt=alt)
    for (data,), options in shown:
        assert options == {"metadata": {"image/png": {"alt": alt}}, "raw": True}
        assert data["text/plain"] == alt
        png = base64.b64decode(data["image/png"])
        assert struct.unpack(">II", png[16:24]) == (510, 360)  # 3.4 x 2.4 in at 150 dpi
    assert len(shown) == 2
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("alt", ["", "A plot.", "x" * 251])
def test_alternative_texts_have_a_length(alt):
    with pytest.raises(ValueError, match=rf"alt has {len(alt)} characters; expected 20 to 250"):
        plotting.show(plotting.panels()[0], alt=alt)


def test_too_many_groups_or_curves():
    message = r"8 {}; expected at most 7, as many as there are distinguishable looks"
    with pytest.raises(ValueError, match=message.format("groups")):
        plotting.scatter(np.ones(8), np.ones(8), groups=list("abcdefgh"))
    with pytest.raises(ValueError, match=message.format("curves")):
        plotting.history(dict.fromkeys("abcdefgh", [1.0]))


# ---------------------------------------------------------------- functions, densities, shifts


def test_curves_show_functions_told_apart_without_colour():
    x = np.array([0.0, 1.0, 3.0])
    ax = plotting.curves(x, {"square": x**2, "cube": x**3}, labels=("x", "y"))
    square, cube = ax.get_lines()
    assert square.get_xydata().tolist() == [[0, 0], [1, 1], [3, 9]]
    assert cube.get_ydata().tolist() == [0, 1, 27]
    assert square.get_linestyle() != cube.get_linestyle()
    assert legend_of(ax) == ["square", "cube"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "y")


def test_densities_have_area_one():
    groups = {"few": [0.0, 1.0, 1.0, 2.0], "many": np.linspace(5, 9, 100)}
    ax = plotting.densities(groups, label="UMIs", n_bins=4)
    for polygon in ax.patches:
        x, y = polygon.get_xy().T
        area = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
        assert area == pytest.approx(1)
    assert legend_of(ax) == ["few", "many"]
    assert ax.get_xlabel() == "UMIs"


def test_shifts_are_white_at_zero():
    shift = np.array([[0.0, -2.0, 1.0], [0.0, 0.0, 3.0]])
    ax = plotting.shifts(shift)
    (image,) = ax.get_images()
    assert np.asarray(image.get_array()).tolist() == shift.T.tolist()
    assert image.get_clim() == (-3, 3)
    assert min(image.cmap(image.norm(0.0))[:3]) > 0.95


def test_shifts_and_programs_may_be_tables():
    table = pd.DataFrame([[0.0, -2.0], [1.0, 3.0]], index=["A", "B"])
    for ax in (plotting.shifts(table), plotting.programs(table, genes=["g", "h"])):
        (image,) = ax.get_images()
        np.testing.assert_array_equal(image.get_array(), table.to_numpy().T)


@pytest.mark.parametrize(
    ("draw", "what"),
    [
        (lambda many: plotting.curves(np.arange(2), many), "8 curves"),
        (lambda many: plotting.densities(many, label=""), "8 groups"),
        (lambda many: plotting.stacked({"a": dict.fromkeys(many, 1.0)}, label=""), "8 parts"),
    ],
)
def test_too_many_functions_or_densities(draw, what):
    with pytest.raises(ValueError, match=what):
        draw({str(name): [0.0, 1.0] for name in range(8)})


# ---------------------------------------------------------------- wholes and their parts


def test_parts_stand_end_to_end():
    table = {"first": {"kept": 3.0, "lost": 1.0}, "second": {"lost": 2.0}}
    ax = plotting.stacked(table, label="cells")
    bars = [[(b.get_x(), b.get_width(), b.get_y() + 0.4) for b in c] for c in ax.containers]
    assert bars == [[(0, 3, 0), (0, 0, 1)], [(3, 1, 0), (0, 2, 1)]]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["first", "second"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top
    assert legend_of(ax) == ["kept", "lost"]
    assert ax.get_xlabel() == "cells"


def test_a_part_that_the_first_whole_lacks_is_refused():
    with pytest.raises(ValueError, match=r"parts \['lost'\] are not in the first .* \['kept'\]"):
        plotting.stacked({"a": {"kept": 1.0}, "b": {"kept": 1.0, "lost": 2.0}}, label="cells")


# ---------------------------------------------------------------- clouds


def test_a_cloud_colours_its_points_and_marks_their_sign():
    points, value = np.arange(6.0).reshape(3, 2), np.array([-2.0, 1.0, 0.5])
    ax = plotting.cloud(points, value=value, labels=("a", "b"))
    below, above = ax.collections
    assert below.get_offsets().tolist() == [[0, 1]]
    assert above.get_offsets().tolist() == [[2, 3], [4, 5]]
    assert above.get_array().tolist() == [1, 0.5]
    assert below.get_clim() == above.get_clim() == (-2, 2)
    assert len(below.get_paths()[0]) != len(above.get_paths()[0])
    assert ax.get_aspect() == 1
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "b")
