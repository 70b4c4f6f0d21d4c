"""The command `reproduce`: measures recipes again, keeps the ledger, and writes the page of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metaoptim.cli.interrupts import quitting
from metaoptim.cli.shared import Data, Device, console, numbers, use

if TYPE_CHECKING:
    from metaoptim.ledger.entry import Entry
    from metaoptim.ledger.reproduce import Job


def reproduce(
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE...]", help="Names of recipes, or TOML files; all that ship if none.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="SEEDS", help="With commas between them, as in 0,1,2; each recipe's own if not given.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the ledger and the runs lie.")] = Path("results"),
    page: Annotated[Path, typer.Option(metavar="FILE", help="The page that is made of the ledger.")] = Path("docs/results.md"),
    only_missing: Annotated[
        bool, typer.Option("--only-missing", help="Leave out what any version of the code has measured.")
    ] = False,
    page_only: Annotated[bool, typer.Option("--page-only", help="Measure nothing; write the page.")] = False,
    device: Device = None,
    data: Data = None,
) -> None:
    """Measure recipes again, judge them, and write the page of results.

    Trains and evaluates each recipe with each seed, compares with what it expects (pass, drift, fail), appends to
    DIR/ledger.jsonl, and writes the page. What was measured with the same recipe, seed and code is not run again, and what was
    interrupted goes on where it stopped. Exit code 1 if a recipe fails, now or in the ledger, or can't be run.
    """
    with quitting():
        from metaoptim.ledger import reproduce as measure
        from metaoptim.ledger import store
        from metaoptim.recipes import recipe as config

    use(data)
    wanted = [] if page_only else list(measure.jobs(recipes or config.names(), numbers(seeds), device))
    with store.alone(out):
        entries = store.read(out)
        todo = measure.missing(wanted, entries, any_code=only_missing)
        for line in measure.namesakes(wanted, entries):
            typer.echo(line)
        if done := len(wanted) - len(todo):
            typer.echo(f"{done} of {len(wanted)} are in the ledger already.")
        before = {entry.key: entry.verdict for entry in entries}
        for entry in measure.judged_anew(wanted, entries, any_code=only_missing):
            store.append(out, entry)
            typer.echo(f"{_verdict(entry)}, judged anew; it was {before[entry.key]}")
        _write(page, out)
        bad = []
        for number, job in enumerate(todo, 1):
            typer.echo(f"{number} of {len(todo)}: {job}")
            bad += [] if _measured(job, out) else [str(job)]
            _write(page, out)
        last = {measure.same(entry.key, only_missing): entry.verdict for entry in store.read(out)}
        bad += [str(job) for job in wanted if last.get(measure.same(job.key, only_missing)) == "fail"]
    typer.echo(f"The ledger is {out / store.FILE}, the page {page}.")
    if bad:
        typer.echo(f"Failed: {'; '.join(bad)}.", err=True)
        raise typer.Exit(1)


def _measured(job: Job, out: Path) -> bool:
    """Runs a job and adds it to the ledger; whether it could be run. What stops one recipe stops no other."""
    from metaoptim.ledger import reproduce as measure
    from metaoptim.ledger import store
    from metaoptim.training import TrainingError

    try:
        entry, result = measure.run(job, out)
    except KeyboardInterrupt as stop:
        where = str(stop).partition(";")[0] or "stopped"
        typer.echo(f"{where}; the same command goes on from there", err=True)
        raise
    except (TrainingError, ValueError, OSError) as error:
        typer.echo(f"error: {job}: {' '.join(str(error).split())}", err=True)
        return False
    store.append(out, entry)
    screen = console()
    screen.print(result.table(screen.width))
    typer.echo(_verdict(entry))
    return True


def _verdict(entry: Entry) -> str:
    """How a measurement was judged, and by what."""
    stated, told = entry.expected, f"{entry.recipe}, seed {entry.seed}: {entry.verdict}"
    if "value" not in stated:
        return told
    if stated.get("metric", entry.metric) != entry.metric:
        return f"{told} ([expected] states {stated['metric']} {stated['value']}, and {entry.metric} was measured)"
    of = f" of seed {stated['seed']}" if stated.get("seed", entry.seed) != entry.seed else ""
    return f"{told} (expected {stated['value']}{of})"


def _write(page: Path, out: Path) -> None:
    from metaoptim.ledger import store
    from metaoptim.ledger.page import page as text
    from metaoptim.runs.store import write_atomic

    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, text(store.read(out)).encode())
