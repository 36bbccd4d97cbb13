"""What `python -m pretrain` and `python -m finetune` do with a run file, from reading it to the exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from trainworks.config import dump, load
from trainworks.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED, ToolkitError
from trainworks.output import is_complete, write_outcome
from trainworks.parallel.layout import asked
from trainworks.parallel.verdict import Report
from trainworks.parallel.watchdog import Watchdog, exit_status
from trainworks.record import Outcome, RunRecord
from trainworks.redaction import redacted, redacted_tracebacks
from trainworks.schema import RunConfig
from trainworks.stopping import Stopped, follow_launcher

if TYPE_CHECKING:
    from trainworks.run import Run

__all__ = ["guarded", "quieten_libraries", "run_command", "run_process", "say"]

Prepare = Callable[[Any], "Run"]


def run_command(package: str, model: type[RunConfig[Any]], recipe: Callable[[], Prepare]) -> typer.Typer:
    """Return the command line of a recipe; `recipe` imports it, which takes seconds, and is called once the run file is
    sound."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.command(help=f"Run a {package} configuration: accelerate launch -m {package} CONFIG [KEY=VALUE ...]")
    def main(
        config: Annotated[Path, typer.Argument(help="The run file (YAML).")],
        overrides: Annotated[
            list[str] | None, typer.Argument(help="Changes to it, as optim.lr=1e-4.", metavar="KEY=VALUE")
        ] = None,
        print_config: Annotated[
            bool, typer.Option("--print-config", help="Print the whole configuration and end.")
        ] = False,
    ) -> None:
        raise typer.Exit(guarded(lambda: _command(config, overrides or [], print_config, model, recipe)))

    return app


def run_process(app: typer.Typer) -> NoReturn:
    """Run a command line as all that this process is for.

    The process ends without winding its interpreter up: threads of torch and gloo that are still there may abort it
    then (torch 2.13), and the exit code would be lost.
    """
    code = EXIT_OK
    try:
        app()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _command(
    path: Path, overrides: list[str], print_config: bool, model: type[RunConfig[Any]], recipe: Callable[[], Prepare]
) -> int:
    config = load(path, overrides, model=model)
    if print_config:
        say(dump(config), sys.stdout)
        return EXIT_OK
    if is_complete(config):
        say(f"{config.output}: this run is complete; name another output folder to train again")
        return EXIT_OK
    return _recorded(config, lambda: _watched(lambda: _run(config, recipe)))


def _run(config: RunConfig[Any], recipe: Callable[[], Prepare]) -> Outcome:
    """Train, export, and write the card; upload when the run file asks for it."""
    follow_launcher()
    asked(config.layout)  # before anything heavy is imported, though the start of every process asks again
    prepare = recipe()
    import model_cards
    from trainworks.exporting import export
    from trainworks.training import fit

    quieten_libraries()
    if config.hub is not None and config.hub.push and _is_main():
        model_cards.check_access(config.hub.repo)
    run = prepare(config)
    say(_opening(run))
    record = fit(run)
    if record.status != "complete":
        _heed_no_more()
    folder = export(run) if record.status == "complete" else None
    run.world.leave()
    if folder is None:
        return _stopped(config, record)
    if _is_main():
        _publish(config, record, folder)
    return Outcome(code=EXIT_OK, reason=_ending(record))


def _stopped(config: RunConfig[Any], record: RunRecord) -> Outcome:
    """Say where the run stopped, and from where it goes on: on a full disk that may be an earlier step."""
    from trainworks.checkpoint import checkpoints

    saved = max((checkpoint.step for checkpoint in checkpoints(Path(config.output))), default=0)
    what = "saved" if saved == record.step else f"not saved since step {saved}, for the disk is full"
    return Outcome(
        code=EXIT_INTERRUPTED if record.status == "interrupted" else EXIT_PREEMPTED,
        reason=f"{record.status} after step {record.step} of {record.steps_total}, {what}; the same command goes on",
    )


def quieten_libraries() -> None:
    """Leave out what libraries say that nobody can act on."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    # bitsandbytes 0.50 names an optional package at import; peft 0.21 asks transformers 5.23 for a renamed property.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def _publish(config: RunConfig[Any], record: RunRecord, folder: Path) -> None:
    import model_cards

    card = model_cards.build(record)
    card.save(folder)
    record.write(folder)
    say(_examples(record) + f"weights, record and card: {folder}")
    if config.hub is not None and config.hub.push:
        say(str(model_cards.publish(folder, card, repo=config.hub.repo, private=config.hub.private)))


_IDLE = 0.03
"""Share of the processes' time from which it is said that they have nothing to do."""


def _opening(run: Run) -> str:
    facts, data, plan = run.record.model, run.record.data, run.plan
    count, machine = f"{facts.num_parameters:,} parameters, {facts.num_trainable:,} trained", run.record.environment
    splits = ", ".join(f"{split.name} {split.samples:,} samples of {split.rows:,} rows" for split in data.splits)
    left_out = "; ".join(
        f"{split.name}: {reason} {count:,}" for split in data.splits for reason, count in split.dropped.items()
    )
    packed = [] if run.record.packing is None else [f"packed   {run.record.packing}"]
    ranks, idle = run.world.ranks, plan.idle(run.world.ranks)
    waste = f" ({100 * idle:.0f}% idle: {plan.per_step} is no multiple of {ranks})" if idle > _IDLE else ""
    goes_on = f", going on from step {run.progress.step}" if run.progress.step else ""
    return "\n".join(
        [
            f"model    {facts.architecture}, {count} ({facts.tuning})",
            f"data     {data.source}: {splits}" + (f" ({left_out})" if left_out else ""),
            *([f"rows     {stated}"] if (stated := run.task.stated()) else []),
            *(f"         rows that were left out are listed in {listing}" for listing in data.listings),
            *packed,
            *(f"note     {note}" for note in run.record.notes),
            f"steps    {plan.num_steps:,} of {plan.per_step} samples, {ranks} x {run.micro} at once{waste}{goes_on}",
            f"machine  {machine.world_size} x {machine.device}, precision {machine.mixed_precision}"
            + (f", {run.world.layout}" if machine.layout else ""),
            f"output   {run.folder}",
        ]
    )


def _examples(record: RunRecord) -> str:
    """Return one worked example: what the model said before training, where that was measured, and what it says now."""
    shown = {report.name: report.samples[0] for report in record.reports if report.samples}
    final = shown.get("final")
    if final is None:
        return ""
    lines = {"given": final.prompt, "wanted": final.reference}
    lines |= {"before": shown["untuned"].output} if "untuned" in shown else {}
    lines |= {"after": final.output}
    return "".join(f"{name:<9}{' '.join(text.split())}\n" for name, text in lines.items())


def _ending(record: RunRecord) -> str:
    if record.goal is None:
        return "complete"
    met = "met" if record.goal.met else "not met"
    return f"complete; goal {record.goal.metric} {record.goal.wanted} {met} ({record.goal.value:.4g})"


def _recorded(config: RunConfig[Any], action: Callable[[], Outcome]) -> int:
    """Do it, and write how it ended to `outcome.json` before the process ends: launchers keep only 0 or 1 of an exit
    code."""
    folder = Path(config.output)
    if _is_main():  # the outcome of an earlier process must not pass for this one's, should it be killed
        (folder / "outcome.json").unlink(missing_ok=True)
    try:
        outcome = action()
    except ToolkitError as error:
        _write(folder, Outcome(code=error.exit_code, reason=str(error)))
        raise
    except KeyboardInterrupt:
        _write(
            folder,
            Outcome(code=EXIT_INTERRUPTED, reason="interrupted; the same command goes on from the last checkpoint"),
        )
        raise
    except Stopped:
        outcome = Outcome(code=EXIT_PREEMPTED, reason="asked to stop outside training; the same command goes on")
    except BaseException as error:
        _write(folder, Outcome(code=1, reason=_told(error)))
        raise
    _write(folder, outcome)
    say(outcome.reason)
    return exit_status(outcome.code)


def _watched(action: Callable[[], Outcome]) -> Outcome:
    """Do it as one of several ranks: when it fails by another's doing, the process ends here, and that one is named."""
    try:
        return action()
    except BaseException as error:
        if Watchdog.current is not None:
            _heed_no_more()
            report = _report(error)
            verdict = Watchdog.current.failed(report, error.__traceback__)
            if verdict is not None and not isinstance(error, ToolkitError):
                error.add_note(f"on {verdict.reason.removesuffix(f': {report.text}')}")
        raise


def _heed_no_more() -> None:
    """Pass over signals from now on: a launcher sends more of them on the way, and how the run ends is decided."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _report(error: BaseException) -> Report:
    from torch.distributed import DistError

    match error:
        case Stopped():
            return Report("stop", EXIT_PREEMPTED, "asked to stop outside training; the same command goes on")
        case KeyboardInterrupt():
            return Report("stop", EXIT_INTERRUPTED, "interrupted; the same command goes on from the last checkpoint")
        case ToolkitError():
            return Report("error", error.exit_code, redacted(str(error)))
    broke = isinstance(error, DistError) or any(sign in str(error) for sign in _BROKEN)
    return Report("complaint" if broke else "error", 1, _told(error))


_BROKEN = ("gloo/transport", "pair closure")
"""What gloo's errors hold, which have no type of their own (torch 2.13)."""


def _told(error: BaseException) -> str:
    return redacted("; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))


def _write(folder: Path, outcome: Outcome) -> None:
    """Write `outcome.json` from the main process."""
    if not _is_main():
        return
    try:
        write_outcome(folder, outcome)
    except (OSError, ToolkitError) as error:  # a full disk, or a record that cannot be read
        say(f"how the run ended could not be written down: {error}")


def guarded(action: Callable[[], int]) -> int:
    """Return the exit code, turning what a user can mend into one message without a traceback; no message quotes a
    secret, nor does the traceback of what nobody foresaw."""
    try:
        with redacted_tracebacks():
            return action()
    except ToolkitError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str, stream: Any = None) -> None:
    """Print once, from the main process, without secrets."""
    if _is_main():
        print(redacted(text), file=stream or sys.stderr, flush=True)
