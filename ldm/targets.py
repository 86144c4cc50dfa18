"""Targets: which classes configs may name, and what their signatures take.

Only classes under ALLOWED are imported, so that a config from somebody else cannot run arbitrary code.
"""

import difflib
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ldm.errors import UserError

OPTIONAL = {  # package of optimizers -> the extra that installs it
    "bitsandbytes": "8bit",
    "prodigyopt": "optimizers",
    "schedulefree": "optimizers",
}
ALLOWED = [  # and what `allow` adds
    "ldm.",
    "torch.optim.",
    "pytorch_lightning.",
    "bitsandbytes.optim.",
    "prodigyopt.",
    "schedulefree.",
]
RENAMED = {  # keys of latent-diffusion's configs and of earlier versions -> what they are called here
    "unet_config": "unet",
    "first_stage_config": "vae",
    "cond_stage_config": "text_encoder",
    "first_stage": "vae",
    "cond_stage": "text_encoder",
    "measures": "online_eval",
    "widen": "net2wider",
}


def spoken_name(named: str | Mapping[str, Any]) -> str:
    """A short name, which stays, or the name of a node's class or function: "linear", "Linear"."""
    return named if isinstance(named, str) else str(named["target"]).rpartition(".")[2]


def allow(*packages: str) -> None:
    """Lets nodes of configs name classes of packages or modules, for the rest of the process.

    It is for a person's own code, and asked for by that person: a config, which may be somebody else's,
    cannot. Raises UserError if there is no such package.
    """
    for package in packages:
        is_name = all(map(str.isidentifier, package.split(".")))
        try:
            found = importlib.util.find_spec(package) if is_name else None
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
    return _imported(target, inspect.isclass, "class")


def get_callable(target: str) -> type | Callable[..., Any]:
    """The same of a class or a function."""
    return _imported(target, lambda x: inspect.isclass(x) or inspect.isfunction(x), "class or function")


def _imported(target: str, wanted: Callable[[Any], bool], kind: str) -> Any:
    if not isinstance(target, str) or not _is_allowed(target):
        remedy = f"It may start with {' '.join(ALLOWED)}; add your own code with --allow PACKAGE."
        raise UserError(f"`{target}` is not an allowed target", remedy=remedy)
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise UserError(f"`{target}` is a package, not a {kind}", remedy="Write package.module.Class.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but something that it imports does not
        extra = OPTIONAL.get(str(error.name))
        remedy = f'Install it with `pip install -e ".[{extra}]"`.' if extra else None
        what = f"`{target}` cannot be imported: there is no `{error.name}`"
        raise UserError(what, remedy=remedy) from error
    known = {n: x for n, x in vars(module).items() if wanted(x) and _is_allowed(x.__module__)}
    if name not in known:
        raise UserError(f"`{name}` is not a {kind} of {module_name}", remedy=nearest(name, known))
    return known[name]


def node_target(target: str, wanted: type) -> tuple[Any, dict[str, inspect.Parameter] | None]:
    """The class or function that a node names, and of a function the parameters that the node's params are.

    A function may stand where `wanted` is a protocol of what is called: its params are then bound to it.
    """
    is_called = getattr(wanted, "_is_protocol", False) and "__call__" in vars(wanted)
    kind = get_callable(target) if is_called else get_class(target)
    return kind, _free_parameters(kind, wanted) if inspect.isfunction(kind) else None


def _free_parameters(function: Callable[..., Any], protocol: type) -> dict[str, inspect.Parameter]:
    """The parameters of a function that are not those that a callable protocol's objects are called with.

    Raises UserError for a function that cannot be called so.
    """
    called_with = list(inspect.signature(protocol.__call__).parameters.values())[1:]
    by_name = {p.name for p in called_with if p.kind == p.KEYWORD_ONLY}
    own = inspect.signature(function).parameters
    first = list(own)[: len(called_with) - len(by_name)]
    placed = [
        own[name].kind in (own[name].POSITIONAL_ONLY, own[name].POSITIONAL_OR_KEYWORD) for name in first
    ]
    absent = by_name - own.keys()
    if not all(placed) or len(first) < len(called_with) - len(by_name) or absent:
        wanted = ", ".join(p.name for p in called_with)
        what = f"{function.__name__} is no {protocol.__name__}, which is called with {wanted}"
        raise UserError(what, remedy="Write these parameters, and its own after them by name.")
    return {name: p for name, p in own.items() if name not in (*first, *by_name)}


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


def hints_of(kind: type | Callable[..., Any]) -> dict[str, Any]:
    """Annotations of a function, or of a constructor and of those above that its `**params` go to.

    Without those that use types which only a type checker imports.
    """
    if inspect.isfunction(kind):
        return _resolved(kind)
    found: dict[str, Any] = {}
    for base in reversed([base for base in kind.__mro__ if "__init__" in vars(base)]):
        found |= _resolved(base.__init__)
    return {name: found[name] for name in parameters_of(kind) if name in found}


def _resolved(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:
        return {}


def nearest(name: str, valid: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest valid one, or all of them."""
    by_lower = {str(known).lower(): str(known) for known in valid}
    close = difflib.get_close_matches(RENAMED.get(name, str(name)).lower(), by_lower, n=1)
    known = ", ".join(sorted(by_lower.values())) or "none"
    return f"Did you mean `{by_lower[close[0]]}`?" if close else f"Known: {known}."
