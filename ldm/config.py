"""YAML files and `key=value` overrides -> one checked config -> objects.

Every object is a node `{target: dotted.Class, params: {...}}` (the convention of latent-diffusion), and the
signature of the class is its schema: `check` compares names and types with it and builds nothing. Targets are
limited to ALLOWED, so that a config from somebody else cannot run arbitrary code.
"""

import copy
import difflib
import importlib
import inspect
import typing
from collections import abc
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import UserError
from ldm.files import atomic_write

ALLOWED = ("ldm.", "torch.optim.", "pytorch_lightning.")
FROM_CODE = {"params", "optimizer"}  # what optimizers and schedules get from code: no config can hold it
LISTS = (list, tuple, abc.Sequence, abc.Collection, abc.Iterable)
DICTS = (dict, abc.Mapping, abc.MutableMapping)


class Problem(NamedTuple):
    """One thing wrong at the dotted `key` of a config."""

    key: str
    what: str
    remedy: str = ""


def load_config(paths: Sequence[str | Path], dotlist: Sequence[str] = ()) -> DictConfig:
    """Merge YAML files left to right, then `a.b=value` items (`a.0=x` sets an entry of a list)."""
    config = OmegaConf.create({})
    for path in paths:
        config = OmegaConf.merge(config, _read(Path(path)))
    for item in dotlist:
        key, equals, value = item.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise UserError(f"`{item}` is not an override", remedy="Write it as `key.sub=value`.")
        try:
            OmegaConf.update(
                config, key.strip(), OmegaConf.from_dotlist([f"value={value}"])._get_node("value")
            )
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"The override `{item}` cannot be applied: {_first_line(error)}") from error
    return config


def save_config(config: DictConfig, path: str | Path) -> Path:
    """Write YAML whole or not at all; loading it gives the same config back."""
    with atomic_write(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    return Path(path)


def get_class(target: str) -> type:
    """The class that a dotted name stands for, if it is defined under one of the ALLOWED prefixes."""
    if not isinstance(target, str) or not target.startswith(ALLOWED):
        raise UserError(f"the target {target!r} is not allowed", remedy=f"Allowed are {' '.join(ALLOWED)}")
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise UserError(f"the target {target} names no module: there is no `{error.name}`") from error
    found = getattr(module, name, None)
    if not inspect.isclass(found) or not found.__module__.startswith(ALLOWED):
        classes = [
            n for n, c in vars(module).items() if inspect.isclass(c) and c.__module__.startswith(ALLOWED)
        ]
        raise UserError(f"there is no class `{name}` in {module_name}", remedy=_nearest(name, classes))
    return found


def instantiate(node: DictConfig | Mapping[str, Any], **from_code: Any) -> Any:
    """Build `{target, params}`, `from_code` added; nodes inside params stay plain dicts for the receiver."""
    plain = to_plain(node)
    return get_class(plain.get("target"))(**{**(plain.get("params") or {}), **from_code})


def to_plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Plain dicts, lists and scalars, with every `${...}` resolved."""
    try:
        if OmegaConf.is_config(config):
            return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        return copy.deepcopy(dict(config))
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
    """Raise one UserError that names all that does not fit: its key, its file and the nearest valid name.

    `schema` maps the allowed top-level keys to annotations, `{"model": dict, "seed": int, "trainer": Trainer}`;
    a class stands for a mapping of its constructor's parameters. `from_code` are dotted keys that code
    supplies ("data.params.seed"). `paths` and `dotlist` say what the config was loaded from.
    """
    plain = to_plain(config)
    problems = [Problem(key, "is missing") for key in required if key not in plain]
    for key, value in plain.items():
        if key not in schema:
            problems.append(Problem(key, "is not a section of the config", _nearest(key, schema)))
        elif inspect.isclass(schema[key]) and schema[key].__module__ != "builtins":
            problems += _check_params(schema[key], value, key)
        else:
            problems += _check_value(value, schema[key], key)
    lines = [f"\n- {_sentence(p, paths, dotlist)}" for p in problems if p.key not in from_code]
    if lines:
        raise UserError("The config does not fit", remedy="".join(lines))


def _check_node(node: dict[str, Any], key: str) -> Iterator[Problem]:
    for name in node.keys() - {"target", "params"}:
        yield Problem(
            f"{key}.{name}", "stands beside `target`", "Constructor arguments belong under `params`."
        )
    try:
        yield from _check_params(get_class(node["target"]), node.get("params") or {}, f"{key}.params")
    except UserError as error:
        yield Problem(f"{key}.target", f"cannot be built: {error.what}", error.remedy or "")


def _check_params(kind: type, params: Any, key: str) -> Iterator[Problem]:
    """Names and types of `params` against the signature of `kind`."""
    if not isinstance(params, dict):
        yield Problem(key, f"must be a mapping of the parameters of {kind.__name__}, not {params!r}")
        return
    signature = inspect.signature(kind).parameters.values()
    hints = _hints(kind)
    known = {p.name: p for p in signature if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in signature)
    for name, value in params.items():
        if name in known or takes_any:
            yield from _check_value(value, hints.get(name, Any), f"{key}.{name}")
        else:
            yield Problem(f"{key}.{name}", f"is not a parameter of {kind.__name__}", _nearest(name, known))
    for name in known.keys() - params.keys() - FROM_CODE:
        if known[name].default is inspect.Parameter.empty:
            yield Problem(f"{key}.{name}", f"is missing: {kind.__name__} needs it")


def _hints(kind: type) -> dict[str, Any]:
    """Annotations of the constructor; none where they name types that only a type checker imports."""
    try:
        return typing.get_type_hints(kind.__init__)
    except NameError:
        return {}


def _check_value(value: Any, annotation: Any, key: str) -> Iterator[Problem]:
    if not _fits(value, annotation):
        wanted = getattr(annotation, "__name__", None) if inspect.isclass(annotation) else annotation
        yield Problem(key, f"must be {wanted}, not {value!r} ({type(value).__name__})")
    if isinstance(value, dict) and "target" in value:
        yield from _check_node(value, key)
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _check_value(inner, Any, f"{key}.{name}")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value fits a parameter's annotation: an int fits float, a bool does not fit int."""
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
    exact = {float: (int, float), None: (NoneType,), object: (type(value),)}.get(kind, (kind,))
    return type(value) in exact or kind is Any or not inspect.isclass(kind) and kind is not None


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


def _sentence(problem: Problem, paths: Sequence[str | Path], dotlist: Sequence[str]) -> str:
    """The problem in words, with the last file (or the override) that sets its key."""
    key = problem.key
    origins = [str(path) for path in paths if OmegaConf.select(_read(Path(path)), key) is not None]
    origins += [f"override {item}" for item in dotlist if f"{item.partition('=')[0]}.".startswith(f"{key}.")]
    where = f" ({origins[-1]})" if origins else ""
    return f"`{key}`{where} {problem.what}. {problem.remedy}".rstrip()


def _nearest(name: str, valid: Iterable[str]) -> str:
    """The remedy for a mistyped name."""
    by_lower = {str(known).lower(): str(known) for known in valid}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return (
        f"Did you mean `{by_lower[close[0]]}`?"
        if close
        else f"Known are: {', '.join(sorted(by_lower.values()))}."
    )


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
