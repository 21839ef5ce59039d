"""Builds the site: sphinx-build -W docs docs/_build (pip install '.[docs]')."""

from perturbdiff._version import __version__

project = "PerturbDiff"
copyright = "PerturbDiff authors, MIT license"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # a test executes the notebooks, and they are committed with what they print

default_role = "code"  # docstrings write `name`
autodoc_typehints = "none"  # docstrings give shapes and units instead
autodoc_class_signature = "separated"
napoleon_google_docstring = False
napoleon_use_ivar = True

html_theme = "sphinx_book_theme"
html_title = "PerturbDiff"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}  # one search field
