"""The sections of a card's page, in reading order: functions from the record to markdown, empty with nothing to say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from model_cards.curve import is_worth_drawing
from model_cards.limits import find_limits, verdict
from model_cards.markdown import block, count, hide_folders, link, number, plain, table, text
from model_cards.metadata import base_on_hub, dataset_on_hub, last_part, metric_name
from model_cards.snippets import usage
from trainworks.record import Comparison, DataFacts, Estimate, EvalReport, RunRecord, Sample, SplitFacts, StageFacts

__all__ = ["CURVE_FILE", "SECTIONS", "picture_file"]

CURVE_FILE = "curve.png"


def _estimate(value: Estimate) -> str:
    """Return `0.884 [0.861, 0.905]`, or the value alone where no interval could be computed."""
    if not (math.isfinite(value.low) and math.isfinite(value.high)):
        return number(value.value)
    return f"{number(value.value)} [{number(value.low)}, {number(value.high)}]"


def _about(record: RunRecord) -> str:
    said = record.config.get("about")
    return text(said) if said else ""


def _unfinished(record: RunRecord) -> str:
    if record.status == "complete":
        return ""
    reached = f"at step {record.step:,} of {record.steps_total:,}"
    return f"**This run is not complete**: its status is {record.status}, {reached}."


def _result(record: RunRecord) -> str:
    final = record.final
    if final is None:
        return _unfinished(record)
    found = ", ".join(f"**{text(metric_name(name))} {_estimate(value)}**" for name, value in final.metrics.items())
    where = (
        f"on {text(final.split)} ({count(final.num_examples, 'example')}, after {count(final.step, 'optimizer step')})"
    )
    parts = [_unfinished(record), f"{found} {where}; 95% intervals in brackets." if found else "", _goal(record)]
    return "\n\n".join(part for part in [*parts, _comparisons(record)] if part)


def _goal(record: RunRecord) -> str:
    goal = record.goal
    if goal is None:
        return ""
    wanted = goal.wanted.replace(">=", "≥").replace("<=", "≤")
    met = "was met" if goal.met else "was **not** met"
    return f"The goal, {text(metric_name(goal.metric))} {text(wanted)}, {met}: {number(goal.value)}."


def _comparisons(record: RunRecord) -> str:
    rows = [_comparison(record, comparison) for comparison in record.comparisons]
    if not rows:
        return ""
    head = ["Against", "Metric", "Baseline", "This model", "Difference", "n", "Reading"]
    return f"Compared example by example, with the paired interval of the difference:\n\n{table(head, rows)}"


def _comparison(record: RunRecord, comparison: Comparison) -> list[str]:
    final, difference = record.final, comparison.difference
    named = [r for r in record.reports if r.is_baseline and r.name == comparison.baseline]
    baseline = next((report for report in named if final and report.split == final.split), None)
    measured = [report.metrics.get(comparison.metric) if report else None for report in (baseline, final)]
    values = [_estimate(value) if value else "" for value in measured]
    name = text(metric_name(comparison.metric))
    reading = [_estimate(difference), f"{difference.n:,}", verdict(comparison)]
    return [text(comparison.baseline), name, *values, *reading]


def _evaluation(record: RunRecord) -> str:
    if not record.reports:
        return ""
    names = list(dict.fromkeys(name for report in record.reports for name in report.metrics))
    head = ["Measured", "Split", "Step", "n", *(text(_directed(record, name)) for name in names)]
    rows = [_report(report, names, newest=report is record.final) for report in record.reports]
    parts = ["## Evaluation", "Values with 95% intervals; n is the number of examples.", table(head, rows)]
    return "\n\n".join([*parts, *_slices(record, names)])


def _slices(record: RunRecord, names: Sequence[str]) -> list[str]:
    """Return the final model's table by source, where there are several."""
    slices = record.final.slices if record.final else {}
    if not slices:
        return []
    rows = [
        [
            text(source),
            f"{max(value.n for value in metrics.values()):,}",
            *(_estimate(metrics[name]) if name in metrics else "" for name in names),
        ]
        for source, metrics in slices.items()
        if metrics
    ]
    return [
        "The trained model on the rows of each source:",
        table(["Source", "n", *(text(_directed(record, name)) for name in names)], rows),
    ]


def _directed(record: RunRecord, name: str) -> str:
    measured = next(report.metrics[name] for report in record.reports if name in report.metrics)
    return f"{metric_name(name)} ({'higher' if measured.higher_is_better else 'lower'} is better)"


def _report(report: EvalReport, names: Sequence[str], *, newest: bool) -> list[str]:
    name = f"**{text(report.name)}**" if newest else text(report.name)
    name += " (baseline)" if report.is_baseline else ""
    values = [_estimate(report.metrics[metric]) if metric in report.metrics else "" for metric in names]
    return [name, text(report.split), f"{report.step:,}", f"{report.num_examples:,}", *values]


def _samples(record: RunRecord) -> str:
    final = record.final
    if final is None or not final.samples:
        return ""
    before = {
        sample.prompt: sample
        for report in record.reports
        if report.is_baseline
        for sample in report.samples
        if sample.prompt
    }
    shown = [_sample(index, sample, before.get(sample.prompt)) for index, sample in enumerate(final.samples, start=1)]
    return "## Worked examples\n\n" + "\n\n".join(shown)


def _sample(index: int, sample: Sample, before: Sample | None) -> str:
    parts = {"Given": sample.prompt, "Wanted": sample.reference, "Said": sample.output}
    if before:
        parts["Said before training"] = before.output
    blocks = [f"{name}:\n\n{block(value)}" for name, value in parts.items() if value.strip()]
    picture = [f"![Left: what is wanted. Right: what the model said]({picture_file(index)})"] if sample.jpeg() else []
    return "\n\n".join([f"**Example {index}**", *picture, *blocks])


def picture_file(index: int) -> str:
    """Return the name of the picture of a worked example, by its number from 1."""
    return f"example-{index}.jpg"


def _data(record: RunRecord) -> str:
    facts = record.data
    apart = [part for name, each in facts.parts.items() for part in (f"### {text(name)}", *_source(each))]
    whole = [_splits(facts.splits), _classes(facts.splits)] if apart else _source(facts)
    return "\n\n".join(["## Training data", *(part for part in (*whole, *apart) if part)])


def _source(facts: DataFacts) -> list[str]:
    on_hub = dataset_on_hub(facts)
    where = link(on_hub, f"https://huggingface.co/datasets/{on_hub}") if on_hub else text(last_part(facts.source))
    kind = "Hub data set" if on_hub else "not on the Hub"
    lines = {
        "Source": f"{where} ({kind}{f', subset {text(facts.subset)}' if facts.subset else ''})",
        "Commit": text(facts.revision) if facts.revision else "",
        "Fingerprint": f"SHA-256 {text(facts.fingerprint)}",
        "Licence": text(facts.license) if facts.license else "not recorded by the source",
    }
    return [_facts(lines), _splits(facts.splits), _cleaning(facts.cleaning), _classes(facts.splits)]


def _cleaning(stages: Sequence[StageFacts]) -> str:
    rows = [[text(stage.name), f"{stage.rows_in:,}", f"{stage.rows_out:,}", *_told(stage)] for stage in stages]
    return table(["Cleaning of train", "Rows in", "Rows out", "Left out", "Counted"], rows) if rows else ""


def _told(stage: StageFacts) -> list[str]:
    return [
        ", ".join(f"{text(name)} {number:,}" for name, number in part.items()) for part in (stage.removed, stage.found)
    ]


def _splits(splits: Sequence[SplitFacts]) -> str:
    head = ["Split", "Rows read", "Samples", "Tokens", "Counted by the loss", "Left out"]
    return table(head, [_split(split) for split in splits]) if splits else ""


def _split(split: SplitFacts) -> list[str]:
    dropped = ", ".join(f"{number:,} {text(reason)}" for reason, number in split.dropped.items() if number)
    sizes = [f"{size:,}" if size else "" for size in (split.tokens, split.counted)]
    return [text(split.name), f"{split.rows:,}", f"{split.samples:,}", *sizes, dropped]


def _classes(splits: Sequence[SplitFacts]) -> str:
    labelled = [split for split in splits if split.labels]
    if not labelled:
        return ""
    names = list(dict.fromkeys(name for split in labelled for name in split.labels))
    rows = [[text(name), *(f"{split.labels.get(name, 0):,}" for split in labelled)] for name in names]
    return table(["Class", *(text(split.name) for split in labelled)], rows)


def _training(record: RunRecord) -> str:
    model, base = record.model, base_on_hub(record)
    share = 100 * model.num_trainable / max(model.num_parameters, 1)
    origin = link(base, f"https://huggingface.co/{base}") if base else text(last_part(model.name)) if model.name else ""
    pinned = f" at commit {text(model.revision)}" if base and model.revision else " (a local folder)"
    lines = {
        "Began from": f"{origin}{pinned}" if origin else "new weights",
        "Licence of these": text(model.license) if model.license else "",
        "Architecture": text(model.architecture),
        "Tuning": text(model.tuning),
        "Trained": f"{model.num_trainable:,} of {model.num_parameters:,} parameters ({share:.3g}%)",
        "Steps": f"{record.step:,} of {record.steps_total:,}, each of {count(record.per_step, 'sample')}",
        "Packed": str(record.packing) if record.packing else "",
        "Seen": _seen(record),
        "Precision": f"weights {text(model.dtype)}, arithmetic {_arithmetic(record)}",
        "Resumed at step": ", ".join(f"{step:,}" for step in record.resumed_at),
    }
    notes = "\n".join(f"- {text(note)}" for note in record.notes)
    curve = f"![Loss over optimizer steps]({CURVE_FILE})" if is_worth_drawing(record) else ""
    parts = [_facts(lines), curve, _hyperparameters(record.config), f"Notes:\n\n{notes}" if notes else ""]
    return "\n\n".join(["## Training", *(part for part in parts if part)])


def _seen(record: RunRecord) -> str:
    seen = [f"{number(record.epochs)} epoch{'' if record.epochs == 1 else 's'}", count(record.samples, "sample")]
    return ", ".join([*seen, count(record.tokens, "token")] if record.tokens else seen)


def _arithmetic(record: RunRecord) -> str:
    mixed = record.environment.mixed_precision
    return "as the weights" if mixed == "no" else f"{text(mixed)} (mixed precision)"


def _hyperparameters(config: Mapping[str, Any]) -> str:
    shown = ("task", "tuning", "batch", "budget", "optim", "seed", "deterministic")
    rows = [[text(key), text(value)] for part in shown for key, value in _flat(part, config.get(part))]
    return table(["Setting", "Value"], rows) if rows else ""


def _flat(key: str, value: Any) -> list[tuple[str, str]]:
    """List the settings that were made: `optim.lr` and its value; what was left unset or empty is not there."""
    if isinstance(value, Mapping):
        return [pair for name, inner in value.items() for pair in _flat(f"{key}.{name}", inner)]
    if isinstance(value, list | tuple):
        value = ", ".join(str(item) for item in value)
    return [] if value is None or value == "" else [(key, str(value))]


def _cost(record: RunRecord) -> str:
    spent = record.cost
    memory, mfu, energy = spent.peak_memory_bytes, spent.mfu, spent.energy_joules
    speeds = [(spent.tokens_per_second, "tokens/s"), (spent.samples_per_second, "samples/s")]
    source = text(spent.energy_source)
    unmeasured = source if source.startswith("not measured") else f"not measured: {source}"
    lines = {
        "Time": f"{_duration(spent.seconds)}, of which {_duration(spent.train_seconds)} training"
        if spent.seconds
        else "",
        "Speed": ", ".join(f"{number(speed)} {unit}" for speed, unit in speeds if speed),
        "Model FLOPs utilisation": f"{100 * mfu:.3g}% of the device's peak" if mfu else "",
        "Peak memory": f"{memory / 2**30:.3g} GiB on the fullest process" if memory else "",
        "Energy": unmeasured if energy is None else f"{energy / 3.6e6:.4g} kWh ({number(energy)} J; {source})",
    }
    return f"## Cost\n\n{_facts(lines)}" if spent.seconds else ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _environment(record: RunRecord) -> str:
    machine = record.environment
    dirty = " with uncommitted changes" if machine.git_dirty else ""
    lines = {
        "Hardware": f"{text(machine.device)}, {machine.world_size} process{'' if machine.world_size == 1 else 'es'}",
        "Distribution": text(machine.distributed) if machine.world_size > 1 else "",
        "Software": text(", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        "Python": text(f"{machine.python} on {machine.platform}"),
        "Code": f"git commit {text(machine.git_commit)}{dirty}" if machine.git_commit else "",
        "Ran": text(f"{record.started} to {record.finished}" if record.finished else record.started),
    }
    return f"## Environment\n\n{_facts(lines)}"


def _limitations(record: RunRecord) -> str:
    found = find_limits(record)
    return "## Limits\n\n" + "\n".join(f"- {sentence}" for sentence in found) if found else ""


def _reproduce(record: RunRecord) -> str:
    recorded = f"{link('run.json', 'run.json')} holds the resolved configuration, every evaluation and the whole curve."
    return f"## Reproduce\n\n{block(hide_folders(record.command))}\n\n{recorded}" if plain(record.command) else ""


def _facts(lines: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in lines.items() if value)


SECTIONS: tuple[Callable[[RunRecord], str], ...] = (
    _about,
    _result,
    usage,
    _evaluation,
    _samples,
    _limitations,
    _data,
    _training,
    _cost,
    _environment,
    _reproduce,
)
