"""Configs: YAML files and `key=value` overrides, their validation, and objects built from them.

Every object is a node `{target: dotted.Class, params: {...}}` (the convention of latent-diffusion), and the
signature of the class is its schema: `check` compares names and types with it without building anything.
Targets are limited to ALLOWED, so that a config from somebody else cannot run arbitrary code.
"""

import copy
import difflib
import importlib
import inspect
import typing
from collections import abc
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import UserError
from ldm.files import atomic_write

ALLOWED = ("ldm.", "torch.optim.", "pytorch_lightning.")
FROM_CODE = {"params", "optimizer"}  # arguments that code passes to optimizers and schedules
RENAMED = {  # keys of latent-diffusion's configs and of earlier versions -> what they are called here
    "unet_config": "unet",
    "first_stage_config": "vae",
    "cond_stage_config": "text_encoder",
    "first_stage": "vae",
    "cond_stage": "text_encoder",
    "l2_pull": "l2_sp_weight",
    "step_in_backward": "fused_backward",
    "new_word": "learned_token",
    "measures": "online_eval",
    "widen": "net2wider",
}
LISTS = (list, tuple, abc.Sequence, abc.Collection, abc.Iterable)
DICTS = (dict, abc.Mapping, abc.MutableMapping)


def load_config(paths: Sequence[str | Path], dotlist: Sequence[str] = ()) -> DictConfig:
    """Merges YAML files from left to right, then `a.b=value` overrides (`a.0=x` sets an entry of a list)."""
    config = OmegaConf.create({})
    for path in paths:
        config = OmegaConf.merge(config, _read(Path(path)))
    for item in dotlist:
        key, equals, value = item.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise UserError(f"`{item}` is not an override", remedy="Write it as `key.sub=value`.")
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
            OmegaConf.update(config, key.strip(), parsed["value"])
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"The override `{item}` cannot be applied: {_first_line(error)}") from error
    to_plain(config)  # raises for a missing value or an interpolation that does not resolve
    return config


def save_config(config: DictConfig, path: str | Path) -> Path:
    """Writes the config as YAML, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    return Path(path)


def get_class(target: str) -> type:
    """Imports the class of a dotted name. Raises UserError unless it is defined under an ALLOWED prefix."""
    if not isinstance(target, str) or not target.startswith(ALLOWED):
        raise UserError(
            f"`{target}` is not an allowed target", remedy=f"It may start with {' '.join(ALLOWED)}"
        )
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but something that it imports does not
        raise UserError(f"`{target}` cannot be imported: there is no `{error.name}`") from error
    classes = {
        n: c for n, c in vars(module).items() if inspect.isclass(c) and c.__module__.startswith(ALLOWED)
    }
    if name not in classes:
        raise UserError(f"`{name}` is not a class of {module_name}", remedy=_nearest(name, classes))
    return classes[name]


def instantiate(node: DictConfig | Mapping[str, Any], **from_code: Any) -> Any:
    """Builds the object of a node `{target, params}`, with `from_code` as further arguments.

    Nodes inside params are passed on as dicts, for the class to build.
    """
    plain = to_plain(node)
    return get_class(plain.get("target"))(**{**(plain.get("params") or {}), **from_code})


def to_plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The config as dicts, lists and scalars, with every `${...}` resolved."""
    if not OmegaConf.is_config(config):
        return copy.deepcopy(dict(config))
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"`{error.full_key}` cannot be resolved: {_first_line(error)}") from error


def check(
    config: DictConfig | Mapping[str, Any],
    schema: Mapping[str, Any],
    *,
    required: Collection[str] = (),
    from_code: Collection[str] = (),
    paths: Sequence[str | Path] = (),
    dotlist: Sequence[str] = (),
) -> None:
    """Validates a config. Raises one UserError with every error: its key, its file, the nearest valid name.

    schema: allowed top-level keys and their annotations, `{"model": dict, "trainer": Trainer}`; a class that
    is not a built-in stands for a mapping of its constructor's parameters. required: keys that must be there.
    from_code: dotted keys that code supplies ("data.params.seed"). paths, dotlist: the sources of the config.
    """
    plain = to_plain(config)
    found = [UserError("A section is missing", where=key) for key in required if key not in plain]
    for key, value in ((str(key), value) for key, value in plain.items()):
        if key not in schema:
            found.append(UserError(f"`{key}` is not a section", where=key, remedy=_nearest(key, schema)))
        elif inspect.isclass(schema[key]) and schema[key].__module__ not in ("builtins", "typing"):
            found += _check_params(schema[key], value, key)
        else:
            found += _check_value(value, schema[key], key)
    found = [error for error in found if error.where not in from_code]
    for error in found:
        error.where = ", ".join([error.where, *_origins(error.where, paths, dotlist)[-1:]])
    if found:
        earlier = "".join(f"{UserError(e.what, where=e.where, remedy=e.remedy)}\n" for e in found[:-1])
        raise UserError(earlier + found[-1].what, where=found[-1].where, remedy=found[-1].remedy)


def _check_node(node: dict[str, Any], key: str) -> Iterator[UserError]:
    """Errors in a node `{target, params}`. The `where` of each is its dotted key, here and below."""
    for name in node.keys() - {"target", "params"}:
        yield UserError(f"`{name}` is beside `target`", where=f"{key}.{name}", remedy="Move it to `params`.")
    try:
        kind = get_class(node["target"])
    except UserError as error:
        yield UserError(error.what, where=f"{key}.target", remedy=error.remedy)
    else:
        yield from _check_params(kind, node.get("params") or {}, f"{key}.params")


def _check_params(kind: type, params: Any, key: str) -> Iterator[UserError]:
    """Errors in `params`: names and types that do not fit the signature of `kind`."""
    if not isinstance(params, dict):
        yield UserError(f"{params!r} is not a mapping of the parameters of {kind.__name__}", where=key)
        return
    signature, hints = inspect.signature(kind).parameters.values(), _hints(kind)
    known = {p.name: p for p in signature if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in signature)
    for name, value in params.items():
        where = f"{key}.{name}"
        if name in known or takes_any:
            yield from _check_value(value, hints.get(name, Any), where)
        else:
            what = f"`{name}` is not a parameter of {kind.__name__}"
            yield UserError(what, where=where, remedy=_nearest(name, known))
    for name in known.keys() - params.keys() - FROM_CODE:
        if known[name].default is inspect.Parameter.empty:
            yield UserError(f"{kind.__name__} needs `{name}`", where=f"{key}.{name}")


def _hints(kind: type) -> dict[str, Any]:
    """Annotations of the constructor; none if they use types that only a type checker imports."""
    try:
        return typing.get_type_hints(kind.__init__)
    except NameError:
        return {}


def _check_value(value: Any, annotation: Any, key: str) -> Iterator[UserError]:
    """Errors in a value: its type, and the nodes anywhere inside it."""
    if not _fits(value, annotation):
        wanted = annotation.__name__ if type(annotation) is type else str(annotation)
        yield UserError(f"{value!r} ({type(value).__name__}) should be {wanted}", where=key)
    if isinstance(value, dict) and "target" in value:
        yield from _check_node(value, key)
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _check_value(inner, Any, f"{key}.{name}")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value fits an annotation: an int fits float, a bool does not fit int."""
    kind, inner = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind in (Union, UnionType):
        return any(_fits(value, option) for option in inner)
    if kind is Literal:
        return any(value == option and type(value) is type(option) for option in inner)
    if kind is tuple and isinstance(value, list) and inner and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if kind in LISTS and isinstance(value, list):
        return not inner or all(_fits(item, inner[0]) for item in value)
    if kind in DICTS and isinstance(value, dict):
        return not inner or all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    exact = {float: (int, float), object: (type(value),)}.get(kind, (kind,))
    return type(value) in exact or kind is Any or not inspect.isclass(kind)


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        names = [str(other) for other in path.parent.glob("*.y*ml")]
        raise UserError("There is no such config file", where=path, remedy=_nearest(str(path), names))
    try:
        config = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        line = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else path
        raise UserError(f"The YAML cannot be read: {error.problem}", where=line) from error
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"The config cannot be read: {_first_line(error)}", where=path) from error
    if not isinstance(config, DictConfig):
        raise UserError("The config must be a mapping of sections", where=path)
    return config


def _origins(key: str, paths: Sequence[str | Path], dotlist: Sequence[str]) -> list[str]:
    """The files, then the overrides, that set a dotted key or else the node around it."""
    origins = [str(path) for path in paths if _sets(_read(Path(path)), key)]
    origins += [item for item in dotlist if f"{item.partition('=')[0].strip()}.".startswith(f"{key}.")]
    around = key.rpartition(".")[0]
    return origins if origins or not around else _origins(around, paths, dotlist)


def _sets(config: DictConfig, key: str) -> bool:
    nothing = object()
    return OmegaConf.select(config, key, default=nothing, throw_on_resolution_failure=False) is not nothing


def _nearest(name: str, valid: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest valid one, or all of them."""
    by_lower = {str(known).lower(): str(known) for known in valid}
    close = difflib.get_close_matches(RENAMED.get(name, str(name)).lower(), by_lower, n=1)
    known = ", ".join(sorted(by_lower.values())) or "none"
    return f"Did you mean `{by_lower[close[0]]}`?" if close else f"Known: {known}."


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
