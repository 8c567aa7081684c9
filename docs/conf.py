"""How the pages are built: ``sphinx-build -W -b html docs docs/_build/html``; nothing is fetched from the network.

The gallery's scripts are shown as they are.  With DVI_DOCS_RUN=1 they are run, too, and their pictures shown; the demo
takes about a minute.
"""

import os
import re

import dvi

project = "dvi"
author = "The dvi-flows developers"
copyright = author
version = release = dvi.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "examples", "gallery/**.ipynb", "gallery/**.py", "gallery/**.zip"]
suppress_warnings = ["ref.python"]  # a docstring that says "[k, k]" names no attribute k

html_theme = "furo"
html_title = f"dvi {release}"
html_copy_source = False

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

RUN = os.environ.get("DVI_DOCS_RUN") == "1"
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_",
    "plot_gallery": RUN,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
}


def escape_bars(app, what, name, obj, options, lines):
    """The docstrings write norms as |X|, which reStructuredText would read as substitutions."""
    for i, line in enumerate(lines):
        pieces = re.split(r"(``.*?``)", line)
        pieces[::2] = [piece.replace("|", r"\|") for piece in pieces[::2]]
        lines[i] = "".join(pieces)


def setup(app):
    """Connect what stands above."""
    app.connect("autodoc-process-docstring", escape_bars)
