"""The site: the Markdown pages of docs/ as they stand, notebooks, and a reference made of docstrings. `make docs` builds it.

The source folder is the repository's root, so that the links which work on a forge work on the site as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import reference
import tree
from notebooks import NotebookParser
from sphinx.application import Sphinx

from metaoptim import __version__

project, copyright, author = "metaoptim", "the metaoptim authors, Apache 2.0", "The metaoptim authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = tree.ROOT
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**"]
exclude_patterns = [".*", "build", "dist", "runs", "results", "src", "tests", "benchmarks"]

myst_heading_anchors = 4
myst_links_external_new_tab = True

default_role = "literal"  # docstrings have single backticks, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_use_type_comments = False
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Types in signatures are those of torch, or private to a room, and no other site is asked about them.
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]

html_theme = "furo"
html_title = "metaoptim"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_extra_path = ["front"]
html_copy_source = False
html_show_sphinx = False


def setup(app: Sphinx) -> None:
    """Hooks: notebooks as pages, navigation from the pages' own lists, and pages of the reference."""
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    app.connect("config-inited", reference.write_pages)
    app.connect("source-read", tree.add_navigation)
    app.connect("autodoc-process-docstring", reference.as_restructured_text, priority=100)  # before napoleon
    app.connect("autodoc-skip-member", reference.skip)
