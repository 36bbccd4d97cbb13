"""The picture of a run: its loss over optimizer steps, with every evaluation and the baselines it has to beat."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import IO, TYPE_CHECKING, Any

from trainworks.record import EvalReport, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "is_worth_drawing"]

_TRAIN, _EVALUATED, _BASELINE = "#3b6fb6", "#c2410c", "#52525b"


def is_worth_drawing(record: RunRecord) -> bool:
    """Say whether there are at least two finite logged steps, without which there is no curve."""
    return sum(math.isfinite(point.loss) for point in record.curve) >= 2


def draw(record: RunRecord, path: str | Path | IO[bytes]) -> None:
    """Write the loss curve as a PNG of 1600 x 900 pixels, readable at half that width.

    Training loss is drawn thin as logged and bold as a running mean; evaluations carry their 95% interval; a
    baseline is a dashed line where its loss was measured on the split of the last evaluation.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _training(axes, record)
    _evaluations(axes, record)
    _baselines(axes, record)
    _decorate(axes)
    figure.savefig(path, format="png")


def _training(axes: Axes, record: RunRecord) -> None:
    points = [point for point in record.curve if math.isfinite(point.loss)]
    steps, losses = [point.step for point in points], [point.loss for point in points]
    if len(points) < 20:
        axes.plot(steps, losses, color=_TRAIN, linewidth=2, marker="o", markersize=3, label="training")
        return
    axes.plot(steps, losses, color=_TRAIN, linewidth=0.8, alpha=0.35)
    axes.plot(steps, _smooth(losses), color=_TRAIN, linewidth=2, label="training (running mean)")


def _smooth(values: list[float]) -> list[float]:
    """Return the mean of a window around each value; it looks both ways, so that a falling curve is not drawn late."""
    widest = max(2, len(values) // 30)
    reaches = [min(widest, index, len(values) - 1 - index) for index in range(len(values))]
    return [fmean(values[index - reach : index + reach + 1]) for index, reach in enumerate(reaches)]


def _with_loss(record: RunRecord, *, baseline: bool) -> list[EvalReport]:
    final = record.final
    split = final.split if final else None
    chosen = [report for report in record.reports if report.is_baseline == baseline and report.split == split]
    return [report for report in chosen if "loss" in report.metrics and math.isfinite(report.metrics["loss"].value)]


def _evaluations(axes: Axes, record: RunRecord) -> None:
    # `best` and `final` may repeat a step; the last report of a step is the one to show.
    reports = {report.step: report for report in _with_loss(record, baseline=False)}
    if not reports:
        return
    losses = [report.metrics["loss"] for report in reports.values()]
    below = [_reach(estimate.value - estimate.low) for estimate in losses]
    above = [_reach(estimate.high - estimate.value) for estimate in losses]
    split = next(iter(reports.values())).split
    axes.errorbar(
        list(reports),
        [estimate.value for estimate in losses],
        yerr=[below, above],
        color=_EVALUATED,
        marker="o",
        markersize=5,
        linewidth=1.2,
        capsize=3,
        zorder=3,
        label=_literal(f"{split} (95% interval)"),
    )


def _reach(distance: float) -> float:
    return distance if math.isfinite(distance) and distance > 0 else 0.0


def _baselines(axes: Axes, record: RunRecord) -> None:
    for index, report in enumerate(_with_loss(record, baseline=True)):
        loss = report.metrics["loss"].value
        axes.axhline(loss, color=_BASELINE, linestyle="--", linewidth=1.2)
        label = _literal(f"{report.name}: {loss:.3g}")
        style: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": 9, "color": _BASELINE}
        place = (1 - 0.3 * (index % 3), loss)  # side by side, for baselines may lie close together
        axes.annotate(label, place, (-4, 2), xycoords=("axes fraction", "data"), textcoords="offset points", **style)


def _literal(value: str) -> str:
    """Keep a name from being read as a formula, and from filling the picture."""
    return value[:60].replace("$", r"\$")


def _decorate(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("optimizer step", fontsize=11)
    axes.set_ylabel("loss (nats per token or label)", fontsize=11)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(color="#e4e4e7", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.1)
    axes.legend(frameon=False, fontsize=10, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
