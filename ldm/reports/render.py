"""Jinja templates of this package -> text. What is put into an HTML page is escaped."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).with_name("templates")


def _escapes(name: str | None) -> bool:
    return name is not None and name.endswith(".html")


def render(template: str, **values: Any) -> str:
    """The text of a template; a value that it names and is not given raises an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=_escapes,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)
