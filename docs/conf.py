"""Builds the pages of this folder: `make docs`."""

import re
from dataclasses import fields, is_dataclass

import hsivi_diffusers

project = "hsivi_diffusers"
copyright = "the authors of hsivi_diffusers"
release = hsivi_diffusers.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
copybutton_exclude = ".linenos, .gp, .go"  # prompts of shells and of Python, and what they print
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["tables.css"]
html_title = f"hsivi_diffusers {release}"
templates_path = ["_templates"]
exclude_patterns = ["_templates"]
autosummary_imported_members = True
# The members that a page of the API has; those of other classes are all that have a docstring.
autosummary_context = {
    "members": {
        "HSIVIConfig": "check, settings",
        "HSIVINoiseScale": "forward",
        "HSIVIPipeline": "__call__, from_pretrained, from_pipe, save_pretrained",
        "StudentCritic": "forward",
        "StudentLayers": "forward",
    }
}
autodoc_typehints = "none"  # they are in the signatures, and the ranges in the text
autodoc_member_order = "bysource"
default_role = "py:obj"
napoleon_google_docstring, napoleon_numpy_docstring = True, False


def edit_docstring(app, what, name, subject, options, lines):
    """Lists the fields of a dataclass of options with their help, and keeps bars and stars as they are."""
    if is_dataclass(subject):
        helped = [each for each in fields(subject) if "help" in each.metadata]
        lines += [f":param {each.name}: {each.metadata['help']}" for each in helped]
    # Else reStructuredText takes a condition, x | y, or a norm, |x|, for a substitution, and (B, *shape) for emphasis.
    for place, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[place] = re.sub(r"\||(?<=[ (])\*(?=\w)", r"\\\g<0>", line)


def setup(app):
    """Connects to Sphinx."""
    app.connect("autodoc-process-docstring", edit_docstring)
