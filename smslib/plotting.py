"""The book's figures: arrays in, Axes out.

Nothing here fits, scores or shows by itself; `show` displays a finished figure with its
alternative text. Colours are Okabe and Ito's, fixed for each method, never the only distinction.
Figures are made without pyplot, so that drawing leaves no global state behind.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int, Real, Shaped
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DOUBLE",
    "LOOKS",
    "SINGLE",
    "Look",
    "cloud",
    "curves",
    "densities",
    "graph",
    "heatmap",
    "history",
    "ledger",
    "levels",
    "look",
    "matching",
    "panels",
    "programs",
    "scatter",
    "scores",
    "shifts",
    "show",
    "stacked",
    "strip",
    "style",
    "trend",
]

SINGLE, DOUBLE = 3.4, 7.0  # widths in inches
DPI = 150
SHORTEST_ALT, LONGEST_ALT = 20, 250


class Look(NamedTuple):
    """How a method appears in every figure."""

    label: str
    colour: str
    marker: str


LOOKS: Mapping[str, Look] = MappingProxyType(
    {
        "vae": Look("VAE", "#999999", "o"),
        "beta-vae": Look("β-VAE", "#009E73", "v"),
        "ivae": Look("iVAE", "#E69F00", "s"),
        "svae": Look("sVAE", "#56B4E9", "^"),
        "svae+": Look("sVAE+", "#0072B2", "P"),
        "cpa-vae": Look("CPA-VAE", "#8A6D00", "<"),
        "sams-vae": Look("SAMS-VAE", "#CC79A7", "D"),
        "pca": Look("PCA", "#882255", "p"),
        "lda": Look("LDA", "#555555", "d"),
        "oracle": Look("oracle", "#000000", "*"),
        "shuffled": Look("shuffled", "#D55E00", "X"),
        "control": Look("control", "#D55E00", "X"),
    }
)
OTHER = Look("", "#CC79A7", "D")
_PALETTE = ("svae+", "ivae", "beta-vae", "shuffled", "svae", "vae", "oracle")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))
_STYLE = {
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.use": True,
}


def look(method: str) -> Look:
    """Return the look of a method; an unknown name gets a neutral one and keeps its name."""
    return LOOKS.get(method, OTHER._replace(label=method))


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw the block in the book's style (also a decorator); matplotlib's settings come back."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield


@style()
def panels(
    n_columns: int = 1, *, n_rows: int = 1, width: float = SINGLE, height: float = 2.4
) -> tuple[Figure, np.ndarray]:
    """Make an empty figure in the book's style.

    Parameters
    ----------
    n_columns, n_rows : int
    width, height : float
        Inches, of the whole figure: `SINGLE` or `DOUBLE` wide.

    Returns
    -------
    figure : Figure
    axes : array of Axes, (n_rows * n_columns,)
        Row by row.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    return figure, axes.ravel()


@style()
def scores(
    values: Mapping[str, ArrayLike],
    *,
    label: str,
    paper: Mapping[str, float | tuple[float, float]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a dot per run, with mean and 95 % interval, for each method.

    Parameters
    ----------
    values : dict
        Method (a key of `LOOKS`, or any name) to one score per run. The known methods come first,
        in the book's order.
    label : str
        The score and its unit.
    paper : dict, optional
        Method to published value, or to its mean and standard deviation: an open diamond, with a
        bar of one standard deviation to either side.
    ax : Axes, optional

    Returns
    -------
    Axes
        Methods along x. The interval is Student's, over runs; a single run has none.
    """
    ax = _axes(ax)
    methods = _ordered([*values, *(paper or {})])
    for place, method in enumerate(methods):
        _column(ax, place, look(method), np.asarray(values.get(method, ()), dtype=float))
    if paper:
        _diamonds(ax, [methods.index(method) + 0.25 for method in paper], paper.values())
    ax.set_xticks(range(len(methods)), [look(method).label for method in methods])
    ax.set_xlim(-0.6, len(methods) - 0.4)
    ax.set_ylabel(label)
    ax.grid(visible=False, axis="x")
    return ax


@style()
def graph(
    estimated: Shaped[np.ndarray, "target latent"],
    *,
    truth: Shaped[np.ndarray, "target latent"] | None = None,
    targets: Sequence[str] | None = None,
    label: str = "edge probability",
    ax: Axes | None = None,
) -> Axes:
    """Draw edge probabilities as a heatmap, the true edges as rings.

    Parameters
    ----------
    estimated : array, (n_targets, n_latent)
        Probabilities or booleans, columns already in the order of the true latents.
    truth : array, (n_targets, n_latent), optional
        Non-zero at true edges.
    targets : sequence of str, optional
        Names of the rows.
    label : str
        Of the colour bar.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = _axes(ax)
    image = ax.imshow(
        np.asarray(estimated, dtype=float), vmin=0, vmax=1, cmap="Blues", aspect="auto"
    )
    ax.figure.colorbar(image, ax=ax, label=label, shrink=0.7)
    if truth is not None:
        rows, columns = np.nonzero(truth)
        size = float(np.clip(1200 / len(truth), 5, 40))
        ring = {"facecolors": "none", "edgecolors": LOOKS["shuffled"].colour, "linewidths": 0.8}
        ax.scatter(columns, rows, s=size, label="true edge", **ring)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, handletextpad=0.1)
    if targets is not None:
        ax.set_yticks(range(len(targets)), targets)
    ax.set(xlabel="latent", ylabel="" if targets is not None else "target")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(visible=False)
    return ax


@style()
def heatmap(
    values: Real[np.ndarray, "row column"],
    *,
    rows: Sequence[object],
    columns: Sequence[object],
    ax: Axes | None = None,
) -> Axes:
    """Draw a table of numbers as colours, with every number written into its cell.

    Parameters
    ----------
    values : array, (n_rows, n_columns)
        NaN is left empty.
    rows, columns : sequence
        Their names.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = _axes(ax)
    values = np.asarray(values, dtype=float)
    image = ax.imshow(values, cmap="Blues", aspect="auto")
    for place, value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = image.norm(value) > 0.6
            text = {"ha": "center", "va": "center", "color": "white" if dark else "black"}
            ax.text(place[1], place[0], f"{value:.2f}", fontsize=7.5, **text)
    ax.set_xticks(range(len(columns)), [str(name) for name in columns])
    ax.set_yticks(range(len(rows)), [str(name) for name in rows])
    ax.grid(visible=False)
    return ax


@style()
def history(
    curves: Mapping[str, ArrayLike],
    *,
    label: str = "ELBO (nats per cell)",
    best_epoch: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw training curves over epochs.

    Parameters
    ----------
    curves : dict
        At most seven names, each with one value per epoch, from epoch 0.
    label : str
        The quantity and its unit.
    best_epoch : int, optional
        Marked by a dotted line.
    ax : Axes, optional

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If there are more curves than distinguishable lines.
    """
    ax = _axes(ax)
    _lines(ax, {name: (np.arange(len(values)), values) for name, values in curves.items()})
    if best_epoch is not None:
        ax.axvline(best_epoch, color="#666666", linestyle=":", linewidth=1, label="best epoch")
    ax.set(xlabel="epoch", ylabel=label)
    ax.legend(loc="best")
    return ax


@style()
def matching(
    correlation: Real[np.ndarray, "latent code"],
    *,
    rows: Int[np.ndarray, " matched"],
    cols: Int[np.ndarray, " matched"],
    ax: Axes | None = None,
) -> Axes:
    """Draw the correlation of true with estimated latents, the matched pairs outlined.

    Parameters
    ----------
    correlation : array, (n_latent, n_code)
        Signed.
    rows, cols : array of int, (n_matched,)
        Matched pairs; the estimated latents are drawn in this order, the unmatched ones last.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    from matplotlib.patches import Rectangle

    ax = _axes(ax)
    order = [*cols, *np.setdiff1d(np.arange(correlation.shape[1]), cols)]
    image = ax.imshow(correlation[:, order], vmin=-1, vmax=1, cmap="RdBu_r", aspect="equal")
    ax.figure.colorbar(image, ax=ax, label="correlation", shrink=0.8)
    for place, row in enumerate(rows):
        ax.add_patch(Rectangle((place - 0.5, row - 0.5), 1, 1, fill=False, linewidth=0.8))
    ax.set_xticks(range(len(order)), [str(index) for index in order], fontsize=6)
    ax.set(xlabel="estimated latent, in matched order", ylabel="true latent")
    ax.grid(visible=False)
    return ax


@style()
def strip(
    groups: Mapping[str, ArrayLike],
    *,
    label: str,
    threshold: float | None = None,
    linked: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw every value of each group as a dot on a line of its own.

    Parameters
    ----------
    groups : dict
        Name to values; the first group is drawn on top.
    label : str
        The quantity and its unit.
    threshold : float, optional
        Marked by a dotted line.
    linked : bool
        Join the dots of a run from group to group: values at the same place belong to the same
        run, NaN where a group lacks it, and no line crosses such a gap.
    ax : Axes, optional

    Returns
    -------
    Axes
        Values along x.

    Raises
    ------
    ValueError
        If linked groups differ in length.
    """
    ax = _axes(ax)
    if linked:
        _link(ax, groups)
    for place, values in enumerate(groups.values()):
        heights = place + 0.5 * _spread(len(values))
        ax.scatter(values, heights, s=14, alpha=0.7, color=LOOKS["svae+"].colour, linewidths=0)
    if threshold is not None:
        ax.axvline(threshold, color="#666666", linestyle=":", linewidth=1)
    ax.set_yticks(range(len(groups)), list(groups))
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_xlabel(label)
    ax.grid(visible=False, axis="y")
    return ax


@style()
def ledger(steps: Mapping[str, int], *, label: str = "cells", ax: Axes | None = None) -> Axes:
    """Draw how many remain after each step, top to bottom, with the numbers.

    Parameters
    ----------
    steps : dict
        Step to how many remain.
    label : str
        What is counted.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = _axes(ax)
    bars = ax.barh(range(len(steps)), list(steps.values()), color=LOOKS["svae"].colour, height=0.6)
    ax.bar_label(bars, labels=[f"{count:,}" for count in steps.values()], padding=3, fontsize=8)
    ax.set_yticks(range(len(steps)), list(steps))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.2 * max(steps.values()))
    ax.xaxis.get_major_locator().set_params(nbins=4)
    ax.set_xlabel(label)
    ax.grid(visible=False, axis="y")
    return ax


@style()
def scatter(
    x: Real[np.ndarray, " point"],
    y: Real[np.ndarray, " point"],
    *,
    groups: ArrayLike | None = None,
    labels: tuple[str, str] = ("", ""),
    ax: Axes | None = None,
) -> Axes:
    """Draw points, one colour and marker per group.

    Parameters
    ----------
    x, y : array, (n_points,)
    groups : sequence of str, (n_points,), optional
        At most seven different names, drawn in order of appearance.
    labels : tuple of str
        Of the x and y axis.
    ax : Axes, optional

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If there are more groups than distinguishable colours.
    """
    ax = _axes(ax)
    members = np.asarray([""] * len(x) if groups is None else groups)
    names = list(dict.fromkeys(members.tolist()))
    _check_distinguishable(len(names), "groups")
    for name, key in zip(names, _PALETTE, strict=False):
        mine = members == name
        kind = {"color": LOOKS[key].colour, "marker": LOOKS[key].marker}
        kind |= {"s": 8, "alpha": 0.6, "linewidths": 0}
        ax.scatter(np.asarray(x)[mine], np.asarray(y)[mine], label=name, **kind)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    if groups is not None:
        ax.legend(loc="best", markerscale=1.8, handletextpad=0.1)
    return ax


@style()
def levels(values: Mapping[str, float], *, ax: Axes) -> Axes:
    """Draw reference values, such as a floor and a ceiling, as named horizontal lines.

    Parameters
    ----------
    values : dict
        Name to value.
    ax : Axes
        With the scores that the lines belong to.

    Returns
    -------
    Axes
    """
    for name, value in values.items():
        colour = look(name).colour if name in LOOKS else "#666666"
        ax.axhline(value, color=colour, linestyle="--", linewidth=1, zorder=1)
        place = {"xytext": (-2, 2), "textcoords": "offset points", "ha": "right"}
        place |= {"xycoords": ("axes fraction", "data")}
        ax.annotate(name, (1, value), color=colour, fontsize=7.5, **place)
    return ax


@style()
def curves(
    x: Real[np.ndarray, " point"],
    lines: Mapping[str, ArrayLike],
    *,
    labels: tuple[str, str] = ("", ""),
    ax: Axes | None = None,
) -> Axes:
    """Draw functions of one variable, each with a colour and a dash of its own.

    Parameters
    ----------
    x : array, (n_points,)
    lines : dict
        At most seven names, each with one value per point.
    labels : tuple of str
        Of the x and y axis.
    ax : Axes, optional

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If there are more curves than distinguishable lines.
    """
    ax = _axes(ax)
    _lines(ax, {name: (x, values) for name, values in lines.items()})
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.legend(loc="best")
    return ax


@style()
def trend(
    values: Mapping[str, Mapping[str, ArrayLike]],
    *,
    settings: Sequence[str],
    labels: tuple[str, str],
    paper: Mapping[str, Mapping[str, float]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how the scores of each method change from setting to setting.

    Parameters
    ----------
    values : dict
        Method (as in `scores`) to setting to one score per run. Settings may be missing.
    settings : sequence of str
        In their order along x.
    labels : tuple of str
        Of the x axis, and the score with its unit.
    paper : dict, optional
        Method to setting to published value: open diamonds in the colour of the method, joined by
        a dotted line; a method without runs is named in the legend by these.
    ax : Axes, optional

    Returns
    -------
    Axes
        A dot per run, a line through the means.
    """
    ax = _axes(ax)
    methods = _ordered([*values, *(paper or {})])
    for shift, method in zip(_side_by_side(len(methods)), methods, strict=True):
        drawn = look(method)
        _trend_line(ax, values.get(method, {}), settings, shift, drawn)
        known = [name for name in settings if name in (paper or {}).get(method, {})]
        places = [settings.index(name) + shift for name in known]
        line = {"marker": "D", "mfc": "white", "ms": 4.5, "linestyle": ":", "linewidth": 0.9}
        if known and not any(np.size(runs) for runs in values.get(method, {}).values()):
            line["label"] = f"{drawn.label}, paper"  # it has no line of its own in the legend
        ax.plot(places, [paper[method][name] for name in known], color=drawn.colour, **line)
    if paper:
        ax.plot([], [], "D:", color="#666666", mfc="white", ms=4.5, lw=0.9, label="paper")
    ax.set_xticks(range(len(settings)), settings)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.grid(visible=False, axis="x")
    ax.legend(loc="best")
    return ax


@style()
def densities(
    groups: Mapping[str, ArrayLike], *, label: str, n_bins: int = 60, ax: Axes | None = None
) -> Axes:
    """Draw a histogram of each group, of area one.

    Parameters
    ----------
    groups : dict
        At most seven names, each with its values.
    label : str
        The quantity and its unit.
    n_bins : int
        Of each group.
    ax : Axes, optional

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If there are more groups than distinguishable colours.
    """
    ax = _axes(ax)
    _check_distinguishable(len(groups), "groups")
    for (name, values), key in zip(groups.items(), _PALETTE, strict=False):
        kind = {"alpha": 0.35, "color": LOOKS[key].colour, "histtype": "stepfilled"}
        _, _, (area,) = ax.hist(np.asarray(values), bins=n_bins, density=True, label=name, **kind)
        area.set_edgecolor((*area.get_facecolor()[:3], 1.0))
    ax.set(xlabel=label, ylabel="density")
    ax.legend(loc="best")
    return ax


@style()
def shifts(shift: ArrayLike, *, ax: Axes | None = None) -> Axes:
    """Draw signed shifts as a heatmap, zero in white.

    Parameters
    ----------
    shift : array or DataFrame, (n_targets, n_latent)
        Prior standard deviations.
    ax : Axes, optional

    Returns
    -------
    Axes
        Targets along x, latents along y.
    """
    ax = _axes(ax)
    shift = np.asarray(shift)
    largest = float(np.abs(shift).max())
    image = ax.imshow(shift.T, vmin=-largest, vmax=largest, cmap="RdBu_r", aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="shift (prior s.d.)")
    ax.set(xlabel="target", ylabel="latent")
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.grid(visible=False)
    return ax


@style()
def programs(
    weights: ArrayLike,
    *,
    genes: Sequence[str],
    latents: Sequence[object] | None = None,
    label: str = "log rate per prior s.d.",
    ax: Axes | None = None,
) -> Axes:
    """Draw what latents do to some genes as a heatmap, zero in white.

    Parameters
    ----------
    weights : array or DataFrame, (n_latent, n_genes)
        Of the genes to be shown, such as the strongest of each latent.
    genes : sequence of str, length n_genes
    latents : sequence, length n_latent, optional
        Their names; numbers by default.
    label : str
        Of the colour bar: what the weights are, and their unit.
    ax : Axes, optional

    Returns
    -------
    Axes
        Genes top to bottom, latents along x.
    """
    ax = _axes(ax)
    weights = np.asarray(weights, dtype=float)
    largest = float(np.abs(weights).max()) or 1.0
    colours = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r", "aspect": "auto"}
    image = ax.imshow(weights.T, **colours)
    ax.figure.colorbar(image, ax=ax, label=label)
    names = range(len(weights)) if latents is None else latents
    ax.set_xticks(range(len(weights)), [str(name) for name in names])
    ax.set_yticks(range(len(genes)), genes, fontsize=7)
    ax.set_xlabel("latent")
    ax.grid(visible=False)
    return ax


@style()
def stacked(
    table: Mapping[str, Mapping[str, float]], *, label: str, ax: Axes | None = None
) -> Axes:
    """Draw what wholes are made of: one horizontal bar each, its parts one after the other.

    Parameters
    ----------
    table : dict of dict
        Name of a whole, drawn from the top, to the size of each of at most seven parts, which are
        those of the first; a part that a whole lacks is 0.
    label : str
        The quantity and its unit.
    ax : Axes, optional

    Returns
    -------
    Axes
        Sizes along x, with a legend of the parts above.

    Raises
    ------
    ValueError
        If there are more parts than distinguishable colours, or parts that the first lacks.
    """
    ax = _axes(ax)
    parts = list(next(iter(table.values())))
    _check_distinguishable(len(parts), "parts")
    unknown = sorted({part for whole in table.values() for part in whole} - set(parts))
    if unknown:
        raise ValueError(f"parts {unknown} are not in the first whole, which has {parts}")
    left = np.zeros(len(table))
    for part, key in zip(parts, _PALETTE, strict=False):
        size = np.array([float(whole.get(part, 0.0)) for whole in table.values()])
        ax.barh(range(len(table)), size, 0.8, left=left, color=LOOKS[key].colour, label=part)
        left += size
    ax.set_yticks(range(len(table)), list(table))
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set_xlabel(label)
    ax.grid(visible=False, axis="y")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts), fontsize=7)
    return ax


@style()
def cloud(
    points: Real[np.ndarray, "point 2"],
    *,
    value: Real[np.ndarray, " point"],
    labels: tuple[str, str] = ("", ""),
    ax: Axes | None = None,
) -> Axes:
    """Draw points in a plane, each in the colour of a signed value of its own.

    Parameters
    ----------
    points : array, (n_points, 2)
    value : array, (n_points,)
        Colour, zero in the middle; points below zero are squares, the others circles.
    labels : tuple of str
        Of the x and y axis.
    ax : Axes, optional

    Returns
    -------
    Axes
        With a common unit along both axes.
    """
    ax = _axes(ax)
    largest = float(np.abs(value).max())
    kind = {"vmin": -largest, "vmax": largest, "cmap": "coolwarm", "s": 11, "linewidths": 0}
    for marker, mine in (("s", value < 0), ("o", value >= 0)):
        ax.scatter(*points[mine].T, c=value[mine], marker=marker, **kind)
    ax.set(xlabel=labels[0], ylabel=labels[1], aspect="equal")
    return ax


def show(figure: Figure | Axes, *, alt: str) -> None:
    """Display a figure in a notebook, together with its alternative text.

    Parameters
    ----------
    figure : Figure or Axes
    alt : str
        One or two sentences, 20 to 250 characters: kind of chart, axes, main pattern. It travels
        in the output's metadata (``image/png``, ``alt``) and is the output's plain text.

    Raises
    ------
    ValueError
        If the text is too short to describe or too long to listen to.
    """
    from IPython.display import display

    if not SHORTEST_ALT <= len(alt) <= LONGEST_ALT:
        raise ValueError(
            f"alt has {len(alt)} characters; expected {SHORTEST_ALT} to {LONGEST_ALT}: the kind "
            "of chart, its axes and the main pattern"
        )
    image = io.BytesIO()
    with style():
        getattr(figure, "figure", figure).savefig(image, format="png", dpi=DPI)
    data = {"image/png": base64.b64encode(image.getvalue()).decode(), "text/plain": alt}
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)


def _axes(ax: Axes | None) -> Axes:
    """Return the axes given, or those of a new figure."""
    return panels()[1][0] if ax is None else ax


def _lines(ax: Axes, lines: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> None:
    """Draw named lines, each with a colour and a dash of its own."""
    _check_distinguishable(len(lines), "curves")
    for (name, (x, values)), key, dash in zip(lines.items(), _PALETTE, _DASHES, strict=False):
        ax.plot(x, values, label=name, color=LOOKS[key].colour, linestyle=dash)


def _link(ax: Axes, groups: Mapping[str, ArrayLike]) -> None:
    """Join the values at the same place of neighbouring groups, where both have one."""
    if len(lengths := {len(values) for values in groups.values()}) > 1:
        raise ValueError(
            f"linked groups have {sorted(lengths)} values; expected the same runs in each, NaN "
            "where one is missing"
        )
    for run, offset in enumerate(_spread(lengths.pop())):
        values = np.array([group[run] for group in groups.values()], dtype=float)
        heights = np.arange(len(values)) + 0.5 * offset
        ax.plot(values, heights, color="#666666", linewidth=0.6, alpha=0.6)


def _check_distinguishable(n: int, what: str) -> None:
    if n > len(_PALETTE):
        raise ValueError(
            f"{n} {what}; expected at most {len(_PALETTE)}, as many as there are distinguishable "
            "looks: join some, or use several panels"
        )


def _ordered(methods: Sequence[str]) -> list[str]:
    """Put known methods in the book's order, the others after them as they come."""
    unique = list(dict.fromkeys(methods))
    known = list(LOOKS)
    return sorted(unique, key=lambda name: known.index(name) if name in LOOKS else len(known))


def _column(ax: Axes, place: int, drawn: Look, values: np.ndarray) -> None:
    """Draw the runs of one method, and their mean and interval."""
    if not len(values):
        return
    kind = {"color": drawn.colour, "marker": drawn.marker, "linewidths": 0}
    ax.scatter(place - 0.18 + 0.2 * _spread(len(values)), values, s=18, alpha=0.75, **kind)
    mean, half_width = values.mean(), _half_width(values)
    bar = {"color": "black", "capsize": 3, "elinewidth": 1, "zorder": 3}
    ax.errorbar([place], [mean], yerr=[half_width], marker="_", markersize=11, **bar)


def _trend_line(
    ax: Axes, runs: Mapping[str, ArrayLike], settings: Sequence[str], shift: float, drawn: Look
) -> None:
    """Draw one method's runs at every setting, and a line through their means."""
    known = [name for name in settings if np.size(runs.get(name, ()))]
    places = [settings.index(name) + shift for name in known]
    means = [np.mean(runs[name]) for name in known]
    ax.plot(places, means, color=drawn.colour, label=drawn.label if known else None)
    for place, name in zip(places, known, strict=True):
        dots = np.atleast_1d(np.asarray(runs[name], dtype=float))
        kind = {"color": drawn.colour, "marker": drawn.marker, "linewidths": 0, "zorder": 3}
        ax.scatter(np.full(len(dots), place), dots, s=20, alpha=0.8, **kind)


def _side_by_side(n: int) -> np.ndarray:
    """Return small offsets along x, so that methods do not hide each other."""
    return 0.06 * (np.arange(n) - (n - 1) / 2)


def _diamonds(
    ax: Axes, places: Sequence[float], published: Iterable[float | tuple[float, float]]
) -> None:
    """Draw published values, with their standard deviations where they are given."""
    means, spreads = np.array([(*np.atleast_1d(value), 0.0)[:2] for value in published]).T
    ax.vlines(places, means - spreads, means + spreads, colors="black", linewidth=0.9)
    diamond = {"marker": "D", "facecolors": "white", "edgecolors": "black", "linewidths": 0.9}
    ax.scatter(places, means, s=24, label="paper", zorder=3, **diamond)
    # Without a frame the diamond of the legend reads as a value.
    frame = {"frameon": True, "fancybox": False, "edgecolor": "#bbbbbb"}
    ax.legend(loc="best", handletextpad=0.2, **frame)


def _half_width(values: np.ndarray, level: float = 0.95) -> float:
    """Return half the width of Student's interval of the mean; 0 for a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return 0.0
    return float(t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def _spread(n: int) -> np.ndarray:
    """Return evenly mixed offsets in [-0.5, 0.5], the same at every call (the golden ratio's)."""
    return (np.arange(n) * (5**0.5 - 1) / 2 + 0.5) % 1 - 0.5
