"""Fertility: births per woman against the year, a task for each country (World Bank)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from metaoptim.tasks.table import TableTasks, from_table

FILE = "fertility_worldbank.csv"
SOURCE = "https://data.worldbank.org/indicator/SP.DYN.TFRT.IN"


def fertility(shots: int = 5, queries: int = 10, train_shots: int | None = None, root: str | None = None) -> TableTasks:
    """Few-shot regression on real data: a country's births per woman from the year, x [T, S, 1], y [T, S, 1].

    Countries are the tasks, divided 60 / 20 / 20 % by seed 0. Year and fertility have mean 0 and variance 1 over the training
    countries, so that 1 is the squared error of always predicting the mean. The table `fertility_worldbank.csv` (or .csv.gz,
    columns country, year and fertility) comes from `root`, else from the folder that METAOPTIM_DATA names, or its subfolder
    `regression`; there is no download. ValueError or OSError if it is not there.

    Args:
        shots: Support years per country.
        queries: Query years per country.
        train_shots: Support years per country in the split `train`, if different.
        root: The folder with the table.
    """
    table = str(_table(root))
    tasks = from_table(table, "country", "fertility", shots, queries, features=["year"], train_shots=train_shots)
    return replace(tasks, name="fertility")


def _table(root: str | None) -> Path:
    named = root or os.environ.get("METAOPTIM_DATA")
    places = [Path(named).expanduser() / part for part in ("", "regression")] if named else []
    for file in (place / f"{FILE}{ending}" for place in places for ending in ("", ".gz")):
        if file.is_file():
            return file
    where = f"{'root' if root else 'METAOPTIM_DATA'} names the folder {named}" if named else "no folder is named"
    raise ValueError(
        f"There is no {FILE} (or .gz): {where}; put the data of {SOURCE} into a table country,year,fertility of that name, and "
        "name its folder with --data DIR, METAOPTIM_DATA or root=."
    )
