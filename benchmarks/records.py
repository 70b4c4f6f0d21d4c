"""Makes the trials that come with the library: the ledger's measurements, and the features of their task families.

    METAOPTIM_DATA=DIR python benchmarks/records.py [--ledger results] [--out src/metaoptim/design/records]

No training: it takes what results/ledger.jsonl holds of the recipes as they are now, and looks at some episodes of each family.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from shared import CONSOLE

from metaoptim.design import trials as stored
from metaoptim.design.history import history, save_features
from metaoptim.ledger import store
from metaoptim.ledger.records import trials
from metaoptim.recipes import recipe as config

ROOT = Path(__file__).parents[1]


def main(args: list[str] | None = None) -> None:
    """Writes both files anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", type=Path, default=ROOT / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "metaoptim" / "design" / "records")
    given = parser.parse_args(args)
    found = trials(store.read(given.ledger), {name: config.load(name) for name in config.names()})
    (given.out / stored.FILE).unlink(missing_ok=True)
    for trial in found:
        stored.append(given.out, trial)
    (given.out / f".{stored.FILE}.lock").unlink(missing_ok=True)
    known: dict[str, dict[str, float]] = {}
    told = history(found, known)
    save_features(given.out, known)
    CONSOLE.print(f"{told}; left out: {dict(told.left_out)}")


if __name__ == "__main__":
    main()
