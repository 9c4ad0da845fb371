"""The documentation as a site: `make docs` and the tests build it, with warnings as errors."""

from pathlib import Path

import typer.cli
import typer.main

import hydra_pipe
from hydra_pipe.cli.app import app

project = "hydra-pipe"
author = copyright = "the hydra-pipe authors"  # noqa: A001 - Sphinx's name for it
version = release = hydra_pipe.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = "hydra-pipe"
html_show_sphinx = False
myst_heading_anchors = 4
# a test executes the notebook; here it is shown as it is kept
nb_execution_mode = "off"
autodoc_typehints = "signature"  # the text has shapes and units
python_display_short_literal_types = True
python_maximum_signature_line_length = 100

# The reference is made from the code and from --help, so that nothing can be missing from it.
_REFERENCE = Path(__file__).parent / "reference"
INTEGRATIONS = ("transformers", "lightning")
_PYTHON_HEAD = """# Python

What hydra-pipe offers to Python is in the package `hydra_pipe` itself and in
`hydra_pipe.errors`. The callbacks of [trainers](../trainers.md) and the errors are at the end
of this page. Other names may change at any time.

```python
import hydra_pipe
```

"""


def _directive(name: str) -> str:
    kind = "autoclass" if isinstance(getattr(hydra_pipe, name), type) else "autofunction"
    members = "\n   :members:" if kind == "autoclass" else ""
    return f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: hydra_pipe.{name}{members}\n```\n"


def _callback(package: str) -> str:
    """A trainer's callback; its methods are the trainer's to call."""
    module = f"hydra_pipe.integrations.{package}"
    return (
        f"## HydraCallback of {package}\n\n```{{eval-rst}}\n.. autoclass:: "
        f"{module}.HydraCallback\n```\n"
    )


_ERRORS = """## Errors

Every error is a `HydraError`. [Errors](../errors.md) has what to do about each.

```{eval-rst}
.. automodule:: hydra_pipe.errors
   :members:
```
"""


def _write_reference() -> None:
    _REFERENCE.mkdir(exist_ok=True)
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="hydra-pipe")
    pages = {
        "commands.md": typer.cli.get_docs_for_click(
            obj=command, ctx=context, name="hydra-pipe", title="Commands"
        ),
        "python.md": _PYTHON_HEAD
        + "\n".join([*map(_directive, hydra_pipe.__all__), *map(_callback, INTEGRATIONS), _ERRORS]),
    }
    for name, text in pages.items():
        page = _REFERENCE / name
        if not page.exists() or page.read_text() != text:  # else Sphinx builds it again each time
            page.write_text(text)


_write_reference()
