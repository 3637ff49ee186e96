"""Configuration of the site. `python docs/build.py` builds it; CONTRIBUTING.md says what is where."""

from __future__ import annotations

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]
# Notebooks that are executed find their lessons by this, in a kernel of their own.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "notebooks"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

import cce_numba

project = "cce_numba"
author = "the authors of cce_numba"
copyright = "the authors of cce_numba, Apache-2.0"
version = release = cce_numba.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_copybutton",
    "extensions.choices",
    "extensions.docstrings",
    "extensions.formulas",
    "extensions.lessons",
    "extensions.records",
]
exclude_patterns = ["_build", "extensions"]
nitpicky = False
# No intersphinx: a build asks nothing of the network. A page that did, when it is read, would fail a test in tests/docs.
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# The notebooks' committed outputs are shown: the test suite runs all notebooks, and checks that these are in step with their
# sources. CCE_DOCS_EXECUTE=1 (`docs/build.py --execute`) runs them here, and keeps what came out until a notebook changes.
nb_execution_mode = "cache" if os.environ.get("CCE_DOCS_EXECUTE") == "1" else "off"
nb_execution_cache_path = str(DOCS / "_build" / "executed")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_render_markdown_format = "myst"

default_role = "code"  # docstrings write code in single backticks
add_module_names = False
autodoc_typehints = "none"  # docstrings say what arguments are
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": False}
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "furo"
html_title = f"cce_numba {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = True
html_copy_source = True
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f6feb", "color-brand-content": "#1f6feb"},
    "dark_css_variables": {"color-brand-primary": "#58a6ff", "color-brand-content": "#58a6ff"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
suppress_warnings = ["misc.highlighting_failure"]
