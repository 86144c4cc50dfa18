"""Targets: which classes configs may name, and what their signatures take.

Only classes under ALLOWED are imported, so that a config from somebody else cannot run arbitrary code.
"""

import difflib
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Iterable
from typing import Any

from ldm.errors import UserError

ALLOWED = ["ldm.", "torch.optim.", "pytorch_lightning.", "bitsandbytes.optim."]  # and what `allow` adds
RENAMED = {  # keys of latent-diffusion's configs and of earlier versions -> what they are called here
    "unet_config": "unet",
    "first_stage_config": "vae",
    "cond_stage_config": "text_encoder",
    "first_stage": "vae",
    "cond_stage": "text_encoder",
    "measures": "online_eval",
    "widen": "net2wider",
}


def allow(package: str) -> None:
    """Lets nodes of configs name classes of a package or module, for the rest of the process.

    It is for a person's own code, and asked for by that person: a config, which may be somebody else's,
    cannot. Raises UserError if there is no such package.
    """
    try:
        found = importlib.util.find_spec(package) if all(map(str.isidentifier, package.split("."))) else None
    except ImportError:
        found = None
    if found is None:
        remedy = "Put the folder that it lies in on PYTHONPATH."
        raise UserError(f"There is no package `{package}`", where="--allow", remedy=remedy)
    if f"{package}." not in ALLOWED:
        ALLOWED.append(f"{package}.")


def _is_allowed(name: str) -> bool:
    return f"{name}.".startswith(tuple(ALLOWED))


def get_class(target: str) -> type:
    """Imports the class of a dotted name. Raises UserError unless it is defined under an ALLOWED prefix."""
    if not isinstance(target, str) or not _is_allowed(target):
        remedy = f"It may start with {' '.join(ALLOWED)}; add your own code with --allow PACKAGE."
        raise UserError(f"`{target}` is not an allowed target", remedy=remedy)
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but something that it imports does not
        raise UserError(f"`{target}` cannot be imported: there is no `{error.name}`") from error
    classes = {n: c for n, c in vars(module).items() if inspect.isclass(c) and _is_allowed(c.__module__)}
    if name not in classes:
        raise UserError(f"`{name}` is not a class of {module_name}", remedy=nearest(name, classes))
    return classes[name]


def parameters_of(kind: type) -> dict[str, inspect.Parameter]:
    """The constructor's parameters; where it passes `**params` on, those of the class above too."""
    found = dict(inspect.signature(kind).parameters)
    for base in kind.__mro__[1:]:
        if not any(p.kind == p.VAR_KEYWORD for p in found.values()):
            break
        if "__init__" in vars(base) and base is not object:
            above = list(inspect.signature(base).parameters.values())
            found = {name: p for name, p in found.items() if p.kind != p.VAR_KEYWORD}
            found = {p.name: p for p in above} | found
    return found


def hints_of(kind: type) -> dict[str, Any]:
    """Annotations of the constructor, and of those above that its `**params` go to.

    Without those that use types which only a type checker imports.
    """
    found: dict[str, Any] = {}
    for base in reversed([base for base in kind.__mro__ if "__init__" in vars(base)]):
        try:
            found |= typing.get_type_hints(base.__init__, include_extras=True)
        except NameError:
            continue
    return {name: found[name] for name in parameters_of(kind) if name in found}


def nearest(name: str, valid: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest valid one, or all of them."""
    by_lower = {str(known).lower(): str(known) for known in valid}
    close = difflib.get_close_matches(RENAMED.get(name, str(name)).lower(), by_lower, n=1)
    known = ", ".join(sorted(by_lower.values())) or "none"
    return f"Did you mean `{by_lower[close[0]]}`?" if close else f"Known: {known}."
