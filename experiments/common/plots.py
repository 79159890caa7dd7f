"""Plots that scripts write beside `result.json`: curves and bars, one PNG each."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def save_curves(
    path: pathlib.Path,
    title: str,
    x_name: str,
    y_name: str,
    series: Mapping[str, Sequence[tuple[float | str, float]]],
    *,
    logarithmic: bool = False,
    levels: Mapping[str, float] | None = None,
    ranges: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> None:
    """Writes one line per series through its (x, y) points, or grouped bars where x is text; dashed lines at levels.

    `ranges` are (x, low, high) of a series: a band of its colour.
    """
    bars = any(isinstance(x, str) for points in series.values() for x, _ in points)
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for index, (name, points) in enumerate(series.items()):
        xs, ys = [x for x, _ in points], [y for _, y in points]
        if bars:
            width = 0.8 / len(series)
            axes.bar([place + index * width for place in range(len(xs))], ys, width, label=name)
            axes.set_xticks(
                [place + 0.4 - width / 2 for place in range(len(xs))], [str(x) for x in xs], rotation=45, ha="right"
            )
        else:
            (line,) = axes.plot(xs, ys, marker="o", markersize=3, label=name)
            if ranges and name in ranges:
                places, low, high = zip(*ranges[name], strict=True)
                axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    for index, (name, level) in enumerate((levels or {}).items()):
        axes.axhline(level, linestyle="--", linewidth=1, color=str(0.6 - 0.15 * (index % 4)), label=name)
    if logarithmic:
        axes.set_xscale("log")
    axes.set(title=title, xlabel=x_name, ylabel=y_name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
