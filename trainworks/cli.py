"""The `trainworks` command: what is done before and after a run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from trainworks.command import guarded, quieten_libraries, say
from trainworks.config import json_schema, load
from trainworks.errors import ConfigError
from trainworks.record import read_outcome, read_record
from trainworks.schema import RunConfig
from trainworks.shipped import configs_folder
from trainworks.yaml_document import Document, read_text

__all__ = ["app", "main", "run_schema"]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Pretrain, fine-tune, evaluate and publish Hugging Face models. "
    "Training itself: accelerate launch -m pretrain|finetune CONFIG",
)


@app.command("configs")
def _configs(
    copy: Annotated[Path | None, typer.Option(help="Copy them all into this folder.")] = None,
) -> None:
    """List the hardware and run files that come with Trainworks, or copy them."""
    folder = configs_folder()
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.yaml"))
    if copy is None:
        for path in files:
            print(f"{path!s:<40} {_first_line(folder / path)}")
        return
    raise typer.Exit(guarded(lambda: _copy(folder, copy)))


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def _copy(folder: Path, target: Path) -> int:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; name a new folder, for nothing is overwritten")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; name a new folder, for nothing is overwritten")
    with _writing(target):
        shutil.copytree(folder, target, dirs_exist_ok=True)
    print(f"copied to {target}")
    return 0


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}") from error


@app.command("schema")
def _schema(
    write: Annotated[Path | None, typer.Option(help="Write it to this file instead of printing it.")] = None,
) -> None:
    """Print the JSON schema of run files, with which an editor completes and checks them."""
    text = json.dumps(run_schema(), indent=1) + "\n"
    if write is None:
        print(text, end="")
        return
    raise typer.Exit(guarded(lambda: _save(text, write)))


def _save(text: str, target: Path) -> int:
    with _writing(target):
        target.write_text(text, encoding="utf-8")
    return 0


def run_schema() -> dict[str, object]:
    """Return one JSON schema for both kinds of run file."""
    import finetune
    import pretrain

    parts = {"pretrain": json_schema(pretrain.Config), "finetune": json_schema(finetune.Config)}
    definitions: dict[str, object] = {}
    for name, part in parts.items():
        definitions |= part.pop("$defs", {})
        definitions[name] = {key: value for key, value in part.items() if key != "$schema"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in parts],
        "$defs": definitions,
    }


_RunFile = Annotated[Path, typer.Argument(help="The run file (YAML).")]


@app.command("preview")
def _preview(
    config: _RunFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as task.learn=last.", metavar="KEY=VALUE")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows of each source to show.")] = 3,
    images: Annotated[Path, typer.Option(help="Folder for pictures of rows that are images.")] = Path("preview"),
) -> None:
    """Show what a run would train on: rows as tokens, those that are learned in colour, and a table by source; or
    images, as the model sees them, in PNG files."""

    def show() -> int:
        settings = _run_config(config, overrides or [])
        from trainworks.preview import Preview

        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        preview = Preview.of(settings, rows=rows)
        say(preview.text(colour=colour), sys.stdout)
        for file in preview.save(images) if preview.grids else ():
            say(str(file), sys.stdout)
        return 0

    raise typer.Exit(guarded(show))


def _run_config(path: Path, overrides: list[str]) -> RunConfig[Any]:
    """Read a run file of either kind: only a pretraining run can begin without a model."""
    import finetune
    import pretrain

    document = Document()
    document.read(read_text(path), str(path))
    from_scratch = "architecture" in (document.section(("model",)) or ())
    return load(path, overrides, model=pretrain.Config if from_scratch else finetune.Config)


@app.command("prepare")
def _prepare(
    config: _RunFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as data.clean.workers=4.", metavar="KEY=VALUE")
    ] = None,
) -> None:
    """Clean and tokenize a run's rows ahead of it; the same command goes on where one was killed."""

    def prepare() -> int:
        settings = _run_config(config, overrides or [])
        from trainworks.preparing import prepare_ahead

        say(str(prepare_ahead(settings)), sys.stdout)
        return 0

    raise typer.Exit(guarded(prepare))


@app.command("tokenizer")
def _tokenizer(
    config: Annotated[Path, typer.Argument(help="A pretraining run file (YAML).")],
    folder: Annotated[Path, typer.Argument(help="A new folder for the tokenizer.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the run file.", metavar="KEY=VALUE")] = None,
) -> None:
    """Train a run's tokenizer on its training text, and write it to a folder."""

    def train() -> int:
        from pretrain.config import Config

        if folder.exists():
            raise ConfigError(f"{folder} is there already; name a new folder, for nothing is overwritten")
        settings = load(config, overrides or [], model=Config)
        from pretrain.recipe import train_tokenizer

        tokenizer = train_tokenizer(settings)
        with _writing(folder):
            tokenizer.save_pretrained(folder)
        print(f"{len(tokenizer):,} tokens: {folder}")
        return 0

    raise typer.Exit(guarded(train))


@app.command("verify-resume")
def _verify_resume(
    config: _RunFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as deterministic=true.", metavar="KEY=VALUE")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps before the first checkpoint; as many follow it.")] = 8,
    ranks: Annotated[int, typer.Option(min=1, help="Also move the run to so many processes, and back.")] = 1,
) -> None:
    """Prove that a run of this file, killed and gone on with, equals one that nothing disturbed."""

    def verify() -> int:
        settings = _run_config(config, overrides or [])
        from trainworks.checks.resumption import verify_resume

        quieten_libraries()
        for line in verify_resume(settings, steps=steps, ranks=ranks):
            say(line, sys.stdout)
        return 0

    raise typer.Exit(guarded(verify))


@app.command("selfcheck")
def _selfcheck(
    config: _RunFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as batch.per_step=8.", metavar="KEY=VALUE")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to take in each way.")] = 3,
    ranks: Annotated[int, typer.Option(min=1, help="Also compare with so many processes.")] = 1,
) -> None:
    """Prove that the loss of this file is the same for every micro-batch, packed or not, on one process or several."""

    def check() -> int:
        settings = _run_config(config, overrides or [])
        from trainworks.checks.invariance import selfcheck

        for line in selfcheck(settings, steps=steps, ranks=ranks):
            say(line, sys.stdout)
        return 0

    raise typer.Exit(guarded(check))


@app.command("chat")
def _chat(
    model: Annotated[str, typer.Argument(help="A run's folder, a model's or an adapter's, or a Hub name.")],
    once: Annotated[str | None, typer.Option(help="Answer this question alone.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 takes the likeliest token; without it, as the model's own file says.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Where sampling begins.")] = 0,
) -> None:
    """Talk to a model: in a terminal, or with a question on each line of a pipe."""

    def converse() -> int:
        from trainworks.chat import open_chat, talk

        quieten_libraries()
        try:
            talk(open_chat(model, seed=seed, system=system, max_tokens=max_tokens, temperature=temperature), once)
        except BrokenPipeError:  # whoever read the answers has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

    raise typer.Exit(guarded(converse))


@app.command("merge")
def _merge(
    output: Annotated[Path, typer.Argument(help="A new folder for the model.")],
    adapters: Annotated[list[str], typer.Argument(help="LoRA adapters of one base.", metavar="FOLDER[=WEIGHT]")],
) -> None:
    """Work several adapters, each times its weight (1 unless said), into the base model that they share."""

    def merge() -> int:
        from trainworks.exporting.merging import merge_adapters

        quieten_libraries()
        say(str(merge_adapters(dict(map(_weighted, adapters)), output)), sys.stdout)
        return 0

    raise typer.Exit(guarded(merge))


def _weighted(adapter: str) -> tuple[str, float]:
    folder, sign, weight = adapter.rpartition("=")
    try:
        return (folder, float(weight)) if sign else (adapter, 1.0)
    except ValueError:
        raise ConfigError(f"{adapter}: expected FOLDER or FOLDER=WEIGHT, the weight a number") from None


@app.command("card")
def _card(run: Annotated[Path, typer.Argument(help="A run's output folder.")]) -> None:
    """Build a run's model card again, from its record alone."""

    def build() -> int:
        import model_cards

        say(str(model_cards.build(read_record(run)).save(_model_of(run))), sys.stdout)
        return 0

    raise typer.Exit(guarded(build))


@app.command("publish")
def _publish(
    run: Annotated[Path, typer.Argument(help="A run's output folder.")],
    repo: Annotated[str | None, typer.Option(help="owner/name on the Hub; by default what the run file says.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Upload nothing; list every file with its size and hash.")
    ] = False,
) -> None:
    """Upload a run's model with its card to the Hub."""

    def upload() -> int:
        import model_cards

        record = read_record(run)
        hub = record.config.get("hub") or {}
        name = repo or hub.get("repo")
        if name is None:
            raise ConfigError("no repository: give --repo owner/name, or hub.repo in the run file")
        private = not public and hub.get("private", True)
        card = model_cards.build(record)
        done = model_cards.publish(_model_of(run), card, repo=name, private=private, dry_run=dry_run)
        say(str(done), sys.stdout)
        return 0

    raise typer.Exit(guarded(upload))


def _model_of(run: Path) -> Path:
    """Return the folder of a run's model; ConfigError when it is a link to another place, where a card would be
    written."""
    if not (run / "model").resolve().is_relative_to(run.resolve()):
        raise ConfigError(f"{run / 'model'} is a link that leads out of the run's folder; put a copy in its place")
    return run / "model"


@app.command("outcome")
def _outcome(run: Annotated[Path, typer.Argument(help="A run's output folder.")]) -> None:
    """Exit with the code the run's last process ended with, which launchers flatten to 0 or 1."""

    def read() -> int:
        value = read_outcome(run)
        say(value.reason)
        return value.code

    raise typer.Exit(guarded(read))


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
