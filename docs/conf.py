"""Builds the pages of this folder: `make docs`."""

from dataclasses import fields, is_dataclass

import hsivi_diffusers

project = "hsivi_diffusers"
copyright = "the authors of hsivi_diffusers"
release = hsivi_diffusers.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["tables.css"]
html_title = f"hsivi_diffusers {release}"
autodoc_typehints = "none"  # they are in the signatures, and the ranges in the text
autodoc_member_order = "bysource"
default_role = "py:obj"
napoleon_google_docstring, napoleon_numpy_docstring = True, False


def edit_docstring(app, what, name, subject, options, lines):
    """Lists the fields of a dataclass of options with their help, and keeps bars as they are."""
    if is_dataclass(subject):
        helped = [each for each in fields(subject) if "help" in each.metadata]
        lines += [f":param {each.name}: {each.metadata['help']}" for each in helped]
    # Else reStructuredText takes a condition, x | y, or a norm, |x|, for a substitution.
    lines[:] = [line if line.lstrip().startswith((">>>", "...")) else line.replace("|", "\\|") for line in lines]


def setup(app):
    """Connects to Sphinx."""
    app.connect("autodoc-process-docstring", edit_docstring)
