"""OmegaConf's interpolations, `${...}`, in the texts of a config: found, and kept from being any."""

import re
from typing import Any


def calls_resolver(text: str) -> bool:
    """Whether a value calls a resolver of OmegaConf, `${name:...}`, anywhere in its interpolations."""
    depth = 0
    for part in re.findall(r"\\*\$\{|\}|:", text):
        if part.endswith("${"):
            depth += len(part) % 2 == 0  # after an odd number of backslashes it is text
        elif part == "}":
            depth = max(0, depth - 1)
        elif depth:
            return True
    return False


def escaped(value: Any) -> Any:
    """Texts in a value as OmegaConf takes them to mean just these: every `${` is preceded by a backslash."""
    if isinstance(value, list):
        return [escaped(item) for item in value]
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
