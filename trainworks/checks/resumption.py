"""Whether a run that is killed and gone on with equals the one that nothing disturbed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainworks.checkpoint import checkpoints
from trainworks.checks.comparing import compare_curves, compare_tensors, largest_difference, tensor_files
from trainworks.checks.configuring import eased, recipe_of, said_eased, shortened, write_run_file
from trainworks.checks.measuring import drops_out
from trainworks.checks.processes import Started, check_ranks, on_gpu, stage
from trainworks.errors import CheckError
from trainworks.record import RunRecord, read_record
from trainworks.schema import RunConfig
from trainworks.tracking import read_curve

__all__ = ["verify_resume"]

TOLERANCE = 1e-6
"""How far losses may be apart, relative, when the number of processes changed."""
_TRIES = 3


def verify_resume(config: RunConfig[Any], *, steps: int = 8, ranks: int = 1) -> Iterator[str]:
    """Train twice `steps` steps undisturbed, and again, killed twice on the way; yield a line for what was found equal.

    The first kill comes after the checkpoint of step `steps` was written, the second inside the saving of the last.
    With more than one of `ranks`, a run is also moved from one process to that many and back.
    Raises CheckError, which says where they part. All is written to a temporary folder (TMPDIR says where).
    """
    check_ranks(ranks)
    with TemporaryDirectory(prefix="trainworks-") as name:
        folder = Path(name)
        short = shortened(config, folder / "run", steps=2 * steps, save=steps)
        if ranks > 1:
            yield from said_eased(config)
            short = eased(short)
        check = _Check(recipe_of(config), write_run_file(short, folder / "run.yaml"), folder, steps)
        check.train()
        yield from check.resume_bit_for_bit(deterministic=config.deterministic)
        if ranks > 1:
            exact = not _draws(short)
            for before, after in ((1, ranks), (ranks, 1)):
                yield check.move(before, after, exact=exact)


@dataclass(frozen=True)
class _Check:
    """A run's recipe and file. Every run is made in the same folder, by the same command, and then put elsewhere."""

    recipe: str
    file: str
    folder: Path
    steps: int

    @property
    def _run(self) -> Path:
        return self.folder / "run"

    @property
    def _undisturbed(self) -> Path:
        return self.folder / "undisturbed"

    def train(self) -> None:
        """Make the run that is compared with."""
        with stage(f"undisturbed: {2 * self.steps} steps"):
            self._finish(ranks=1)
        self._run.rename(self._undisturbed)

    def resume_bit_for_bit(self, *, deterministic: bool) -> Iterator[str]:
        """Kill a run twice, let it go on each time, and yield what is equal."""
        self._begin_and_kill(ranks=1)
        last = 2 * self.steps
        with stage(f"gone on with, killed inside the saving of step {last}"), self._start(ranks=1) as process:
            process.kill_when(lambda: any((self._run / "checkpoints").glob(f".step-{last:08d}*")))
        hit = self._saved() < last
        with stage("gone on with" if hit else f"(step {last} was saved too quickly to be hit) gone on with"):
            self._finish(ranks=1)
        expected, found = read_record(self._undisturbed), self._resumed()
        hint = "; on a GPU, bit for bit takes deterministic=true" if on_gpu() and not deterministic else ""
        if parting := compare_curves(expected.curve, found.curve):
            raise CheckError(f"a resumed run parts from the undisturbed one at {parting}{hint}")
        number, parting = compare_tensors(self._undisturbed, self._run, self._files())
        if parting:
            raise CheckError(f"a resumed run parts from the undisturbed one: {parting}{hint}")
        yield f"equal: {len(found.curve)} losses and {number} tensors, bit for bit"
        shutil.rmtree(self._run)

    def move(self, before: int, after: int, *, exact: bool) -> str:
        """Go on with a killed run on another number of processes, and return what is equal."""
        self._begin_and_kill(ranks=before)
        with stage(f"gone on with on {_processes(after)}"):
            self._finish(ranks=after)
        expected, found = read_record(self._undisturbed), self._resumed()
        what = f"moved from {before} to {_processes(after)}"
        measured = ("loss",) if exact else ()
        if parting := compare_curves(expected.curve, found.curve, tolerance=TOLERANCE, measured=measured):
            raise CheckError(f"a run {what} parts from the undisturbed one at {parting}")
        shutil.rmtree(self._run)
        if not exact:
            return (
                f"{what}: dropout draws other numbers there; {len(found.curve)} steps took as many samples and tokens"
            )
        apart = largest_difference(expected.curve, found.curve)
        return f"{what}: {len(found.curve)} losses within {apart:.1e}"

    def _start(self, *, ranks: int) -> Started:
        return Started(self.recipe, self.file, ranks=ranks, log=self.folder / "log.txt")

    def _finish(self, *, ranks: int) -> None:
        with self._start(ranks=ranks) as process:
            process.finish()

    def _begin_and_kill(self, *, ranks: int) -> None:
        """Kill a new run some steps after its first checkpoint and before the next."""
        logged = self.steps + self.steps // 2
        with stage(f"{_processes(ranks)}, killed after step {logged}"):
            for _ in range(_TRIES):
                with self._start(ranks=ranks) as process:
                    process.kill_when(self._reached(logged))
                if self._saved() == self.steps:
                    return
                shutil.rmtree(self._run)
        raise CheckError("the run was over before it could be killed; ask for more --steps")

    def _reached(self, step: int) -> Callable[[], bool]:
        def reached() -> bool:
            return self._saved() >= self.steps and len(read_curve(self._run, until=step)) == step

        return reached

    def _saved(self) -> int:
        """Return the step of the newest whole checkpoint, 0 for none."""
        return max((checkpoint.step for checkpoint in checkpoints(self._run)), default=0)

    def _resumed(self) -> RunRecord:
        record = read_record(self._run)
        if record.resumed_at[:1] != (self.steps,):
            raise CheckError(f"the run did not go on from the checkpoint of step {self.steps}: {record.notes}")
        return record

    def _files(self) -> list[Path]:
        """Return the files of the last checkpoint and of the exported weights, as the undisturbed run wrote them."""
        last = checkpoints(self._undisturbed)[0].path
        files = tensor_files(last, self._undisturbed / "model", self._undisturbed / "merged")
        return [file.relative_to(self._undisturbed) for file in files]


def _processes(number: int) -> str:
    return f"{number} process{'' if number == 1 else 'es'}"


def _draws(config: RunConfig[Any]) -> bool:
    """Tell whether a run's model drops out, from its outline, which has no weights."""
    from pretrain.recipe import processor_of
    from trainworks.models import outline
    from trainworks.samples import equipped, read_rows
    from trainworks.tuning import rehearse

    sources = read_rows(config)
    task = sources[0].task
    model = outline(config.model, task.auto_class, task.head(), equipped(sources, processor_of(config, sources)))
    rehearse(config.tuning, model, auto_class=task.auto_class)
    return drops_out(model)
