"""What the record does not show: sentences for the card's readers, each derived from a fact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from model_cards.markdown import count, number, text
from model_cards.metadata import base_on_hub, is_adapter, last_part, metric_name
from trainworks.record import Comparison, RunRecord

__all__ = ["find_limits", "verdict"]

_SMALL = 1000
_LOPSIDED = 0.8
_MUCH_DROPPED = 0.01


def verdict(comparison: Comparison) -> str:
    """Return `better`, `worse` or `no clear difference`, by whether the paired 95% interval leaves zero out."""
    difference = comparison.difference
    if not difference.low * difference.high > 0:
        return "no clear difference"
    return "better" if (difference.low > 0) == difference.higher_is_better else "worse"


def find_limits(record: RunRecord) -> list[str]:
    """Return the sentences, escaped, as markdown."""
    return [sentence for find in _FINDERS for sentence in find(record)]


def _evaluation(record: RunRecord) -> Iterator[str]:
    final = record.final
    if final is None:
        yield "Nothing was evaluated: nothing is known about the quality of these weights."
        return
    if not any(report.is_baseline for report in record.reports):
        yield "No baseline was measured, so nothing says how much of the result is owed to the training."
    if final.num_examples < _SMALL:
        yield f"The evaluation is small ({count(final.num_examples, 'example')}); {_widths(record)}"


def _widths(record: RunRecord) -> str:
    measured = record.final.metrics if record.final else {}
    reach = {name: (value.high - value.low) / 2 for name, value in measured.items()}
    shown = [f"{text(metric_name(name))} ± {number(half)}" for name, half in reach.items() if math.isfinite(half)]
    return f"the intervals reach about {', '.join(shown)}." if shown else "no interval could be computed from it."


def _comparisons(record: RunRecord) -> Iterator[str]:
    for comparison in record.comparisons:
        metric, baseline = text(metric_name(comparison.metric)), text(comparison.baseline)
        reading = verdict(comparison)
        if reading == "worse":
            yield f"In {metric} the model is worse than the baseline “{baseline}”."
        if reading == "no clear difference":
            yield (
                f"In {metric} the model cannot be told apart from the baseline “{baseline}”: the paired interval of "
                "their difference contains zero."
            )


def _past_its_best(record: RunRecord) -> Iterator[str]:
    final = record.final
    if final is None:
        return
    earlier = [r for r in record.reports if not r.is_baseline and r.split == final.split and r.step < final.step]
    for name, last in final.metrics.items():
        sign = 1 if last.higher_is_better else -1
        values = [(sign * r.metrics[name].value, r) for r in earlier if name in r.metrics]
        best, report = max(values, key=lambda pair: pair[0], default=(-math.inf, final))
        if best > sign * last.value:
            found = number(report.metrics[name].value)
            yield (
                f"The {text(metric_name(name))} was better at step {report.step:,} ({found}) than at the end "
                f"({number(last.value)})."
            )


def _one_seed(record: RunRecord) -> Iterator[str]:
    if record.final is not None:
        seed = text(record.config.get("seed", 0))
        yield (
            f"One run with one seed ({seed}): the intervals cover the choice of evaluation examples, not what another "
            "seed would change."
        )


def _data(record: RunRecord) -> Iterator[str]:
    configured = record.config.get("data") or {}
    if record.final is not None and configured.get("validation", "named") is None:
        yield "The evaluation rows were held out of the training source; other text or data was not tried."
    for split in record.data.splits:
        lost = sum(split.dropped.values())
        if split.rows and split.dropped and split.samples < split.rows and lost / split.rows > _MUCH_DROPPED:
            yield f"Of the split {text(split.name)}, {lost:,} rows or tokens were left out; the data section says why."
        name, largest = max(split.labels.items(), key=lambda pair: pair[1], default=("", 0))
        share = largest / max(sum(split.labels.values()), 1)
        if share > _LOPSIDED:
            held = f"{text(name)} holds {100 * share:.3g}% of what is labelled"
            yield f"The classes of {text(split.name)} are lopsided: {held}."


def _code(record: RunRecord) -> Iterator[str]:
    if record.environment.git_dirty:
        yield "The code had uncommitted changes, so its commit does not describe it fully."


def _base(record: RunRecord) -> Iterator[str]:
    name = record.model.name
    if is_adapter(record) and name and not base_on_hub(record):
        yield f"The adapter needs its base model, a local folder named {text(last_part(name))} that is not on the Hub."


def _unfinished(record: RunRecord) -> Iterator[str]:
    if record.step < record.steps_total:
        yield f"Training stopped at step {record.step:,} of {record.steps_total:,}."


_FINDERS: tuple[Callable[[RunRecord], Iterator[str]], ...] = (
    _evaluation,
    _comparisons,
    _past_its_best,
    _one_seed,
    _data,
    _base,
    _unfinished,
    _code,
)
