"""Whether a run's loss is the same however its steps are cut up, packed and spread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainworks.checks.configuring import eased, recipe_of, said_eased, shortened, write_run_file
from trainworks.checks.measuring import Difference, Measured, compare
from trainworks.checks.processes import Started, check_ranks, stage
from trainworks.errors import CheckError
from trainworks.schema import Batch, RunConfig

__all__ = ["BOUNDS", "Variant", "selfcheck", "variants"]

BOUNDS: Mapping[str, Difference] = {
    "float32": Difference(loss=1e-6, norm=1e-6, weights=1e-3),
    "bfloat16": Difference(loss=1e-3, norm=1e-2, weights=0.1),
}
"""What rounding may make of it, by precision."""


@dataclass(frozen=True)
class Variant:
    """A way to compute the same steps."""

    name: str
    micro: int
    ranks: int = 1
    layout: str = "packed"


def variants(batch: Batch, ranks: int) -> list[Variant]:
    """Return the other ways to compute a run's steps.

    >>> [variant.name for variant in variants(Batch(per_step=8, micro=8), 2)]
    ['1 at once', '3 at once', '2 processes']
    """
    whole = batch.per_step
    # One that leaves a remainder: the step's last micro-batch is then smaller than the others.
    uneven = next((micro for micro in range(whole // 2, 1, -1) if whole % micro), whole)
    found = [Variant(f"{micro} at once", micro) for micro in sorted({1, uneven, whole} - {batch.micro})]
    if batch.pack != "off":
        found.append(Variant("not packed", whole, layout="unpacked"))
    if ranks > 1:
        found.append(Variant(f"{ranks} processes", max(1, whole // ranks), ranks=ranks))
    return found


def selfcheck(config: RunConfig[Any], *, steps: int = 3, ranks: int = 1) -> Iterator[str]:
    """Take the same steps in several ways, dropout off, and yield the lines of a table of how far they come apart.

    The ways are one sample at once and all, a micro-batch that leaves a remainder, rows that are not packed where the
    run packs them, and `ranks` processes. Raises CheckError at the end when rounding does not explain a difference.
    """
    check_ranks(ranks)
    with TemporaryDirectory(prefix="trainworks-") as name:
        short = eased(shortened(config, Path(name) / "run", steps=steps, save=steps))
        check = _Check(short, recipe_of(config), Path(name))
        expected = check.measure("as configured", config.batch)
        bounds = BOUNDS[expected.precision]
        tried = variants(config.batch, ranks)
        differences = []
        for variant in tried:
            batch = config.batch.model_copy(update={"micro": variant.micro})
            found = check.measure(variant.name, batch, ranks=variant.ranks, layout=variant.layout)
            differences.append(compare(expected, found))
    rows = {variant.name: difference for variant, difference in zip(tried, differences, strict=True)}
    yield from _table(rows, bounds, expected.precision)
    yield from said_eased(config)
    parted = [name for name, difference in rows.items() if not difference.within(bounds)]
    if parted:
        raise CheckError(f"the loss depends on how it is computed: {', '.join(parted)}")
    yield f"equal: {steps} steps in {len(rows) + 1} ways, but for rounding"


@dataclass(frozen=True)
class _Check:
    config: RunConfig[Any]
    recipe: str
    folder: Path

    def measure(self, name: str, batch: Batch, *, ranks: int = 1, layout: str = "packed") -> Measured:
        """Take the steps in one way, in processes of their own."""
        file = write_run_file(self.config.model_copy(update={"batch": batch}), self.folder / "run.yaml")
        result, log = self.folder / "result.safetensors", self.folder / "log.txt"
        arguments = self.recipe, file, str(result), layout
        with (
            stage(name),
            Started("trainworks.checks.measuring_worker", *arguments, ranks=ranks, log=log) as process,
        ):
            process.finish()
        return Measured.read(result)


def _table(rows: Mapping[str, Difference], bounds: Difference, precision: str) -> Iterator[str]:
    edge = max(len(name) for name in (*rows, f"allowed in {precision}"))
    yield f"{'':<{edge}}  {'loss':<8}  {'gradient':<8}  {'weights':<8}"
    for name, apart in (*rows.items(), (f"allowed in {precision}", bounds)):
        verdict = "" if apart is bounds else "equal" if apart.within(bounds) else "NOT EQUAL"
        line = f"{name:<{edge}}  {apart.loss:<8.1e}  {apart.norm:<8.1e}  {apart.weights:<8.1e}  {verdict}"
        yield line.rstrip()
