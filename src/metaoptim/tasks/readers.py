"""Files of the user's own, read in the form that a trained model wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metaoptim.tasks.folder import FolderReader
from metaoptim.tasks.table import TableReader


def reader(known: Mapping[str, Any]) -> FolderReader | TableReader:
    """What reads support sets and queries for a model, from what is known of the tasks that it was trained on (`describe`).

    ValueError for tasks that did not come from files.
    """
    options = known.get("options", {})
    match options.get("reads"):
        case "folder":
            return FolderReader(options["size"], options["channels"], options["ways"])
        case "table":
            return TableReader(options)
    raise ValueError(
        f"This run was trained on the tasks `{known.get('family', 'of a source')}`, and files can be read for runs on "
        "from_folder and from_table alone; in Python, Run.adapt takes tensors."
    )
