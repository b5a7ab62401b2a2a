"""The report's plots as inline SVG. Colours are CSS variables of the page, so that they follow its light or dark theme.

matplotlib knows only fixed colours: each plot is drawn in placeholders, which are then replaced by what CSS calls them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

INK, FAINT, GREEN, BLUE, RED = "#010203", "#010204", "#010205", "#010206", "#010207"
_CSS = {INK: "currentColor", FAINT: "var(--line)", GREEN: "var(--green)", BLUE: "var(--blue)", RED: "var(--red)"}

MAX_POINTS = 300
"""Points of a training curve: more cannot be seen at its width, and the page would carry them."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "path.simplify": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}

KINDS = (("behaviour", GREEN, "o", 4), ("positive", BLUE, "^", 4), ("negative", RED, "X", 6.5))
"""What the Thought Space plot shows: tensor, colour, marker and its size in points. Shapes differ too, for
eyes that colours do not reach."""


def training_curves(record: Mapping[str, Any], *, name: str) -> Markup:
    """Loss by step, and the validation metric with its best step, one above the other.

    Args:
        record: the content of a `training.json`.
        name: what was trained; keeps ids of several plots on a page apart.
    """
    steps = _thinned([(entry["step"], entry["loss"]) for entry in record["steps"]])
    monitor = record["monitor"]
    scores = [(entry["step"], entry[monitor]) for entry in record["evaluations"]]
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(3.6, 3.3), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        _line(above, steps, RED, "Training loss")
        _line(below, scores, BLUE, f"Validation {_label(monitor)}", marker="o")
        best = [entry for entry in scores if entry[0] == record["best_step"]]
        for step, score in best:
            below.plot([step], [score], color=BLUE, marker="o", markersize=9, markerfacecolor="none", clip_on=False)
        below.set_xlabel("step")
        return _svg(figure, f"Training of {name}: loss and validation {_label(monitor)} by step")


def thought_space(vectors: Mapping[str, NDArray[np.float32]], when: str, *, seed: int) -> Markup:
    """t-SNE of the Thought Space as in the paper's Figure 3: each behaviour is joined to one rationale of each kind.

    Args:
        vectors: `{before,after}_{behaviour,positive,negative}`: [n, D]; row i of each belongs to the same example.
        when: `before` or `after` training.
        seed: of the projection.
    """
    points = _project(np.concatenate([vectors[f"{when}_{kind}"] for kind, *_ in KINDS]), seed)
    behaviour, positive, negative = np.split(points, 3)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": when}):
        figure = Figure(figsize=(4.4, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_aspect("equal", adjustable="datalim")
        axes.plot(*_edges(behaviour, negative), color=RED, linewidth=0.8, linestyle=":", alpha=0.7)
        axes.plot(*_edges(behaviour, positive), color=BLUE, linewidth=0.6, alpha=0.75)
        # One user's negative is another's positive: drawn first and larger, it stays visible below it.
        for (_, colour, marker, size), place in zip(KINDS[::-1], (negative, positive, behaviour), strict=True):
            axes.plot(*place.T, linestyle="none", marker=marker, markersize=size, color=colour, markeredgewidth=0)
        return _svg(figure, f"Thought Space {when} training, projected by t-SNE")


def _project(vectors: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    """[m, D] → [m, 2]. Perplexity is bounded by what t-SNE's search for neighbours can use of m points."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    perplexity = min(30.0, max(1.0, (len(vectors) - 1) / 3))
    model = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=seed % 2**32)
    # Its threads meet thousands of times and spin while they wait: a busy machine takes minutes for a second's work.
    with threadpool_limits(limits=1):
        return np.asarray(model.fit_transform(vectors), dtype=np.float64)


def _edges(start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
    """Segments as one broken line: [2, 3 n]. A path for each would make the page several times as large."""
    gap = np.full_like(start, np.nan)
    return np.stack([start, end, gap], axis=1).reshape(-1, 2).T


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `MAX_POINTS` points: means of neighbours, at the last step of each.

    >>> _thinned([(step, float(step % 2)) for step in range(1, 601)])[:2]
    [(2, 0.5), (4, 0.5)]
    """
    size = -(-len(points) // MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(group[-1][0], float(np.mean([value for _, value in group]))) for group in groups]


def _line(axes: Axes, points: Sequence[tuple[int, float]], colour: str, title: str, marker: str = "") -> None:
    axes.set_title(title)
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, marker=marker, markersize=3.5)


def _label(metric: str) -> str:
    return metric.upper() if "@" in metric or metric == "mrr" else metric.replace("_", " ")


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as an SVG element that takes its size, font and colours from the page."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A style sheet or an id inside an inline SVG belongs to the whole page. Clips and markers have hashed ids and stay.
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;]*; ", "", text)
    text = re.sub(r'viewBox="([^"]*)"[^>]*', rf'viewBox="\1" role="img" aria-label="{escape(title)}"', text, count=1)
    text = re.sub(r"<svg [^>]*?viewBox", "<svg viewBox", text, count=1)
    for placeholder, css in _CSS.items():
        text = text.replace(placeholder, css)
    return Markup(text)
