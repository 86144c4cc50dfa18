"""Configs: YAML files and `key=value` overrides, their validation, and objects built from them.

Every object is a node `{target: dotted.Class, params: {...}}` (the convention of latent-diffusion), and the
signature of the class is its schema: `check` compares names, types and ranges with it without building
anything. Targets are limited (`ldm.targets`), so that a config from somebody else cannot run arbitrary code;
`${key}` names another key, and OmegaConf's resolvers (`${oc.env:...}`) are refused for the same reason.
"""

import copy
import functools
import inspect
import math
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.annotations import Node, fits, named, node_kind, section_in_list, section_kind
from ldm.errors import UserError
from ldm.files import atomic_write
from ldm.interpolations import calls_resolver, escaped
from ldm.shipped import CONFIGS, find_file
from ldm.targets import get_callable, get_class, hints_of, nearest, node_target, parameters_of

INCLUDE = "include"  # of a file: others that it is merged over
FROM_CODE = {"params", "optimizer"}  # arguments that code passes to optimizers and schedules


def load_config(
    paths: Sequence[str | Path],
    dotlist: Sequence[str] = (),
    *,
    literals: Mapping[str, Any] | None = None,
) -> DictConfig:
    """Merges YAML files from left to right, then values as they are, then `a.b=value` overrides.

    A file may begin with `include: [others]`, over which it is merged. `a.0=x` sets an entry of a list. A
    node that gets the target of an unrelated class loses the params that it had. literals: dotted key -> a
    value that is not read as YAML.
    """
    try:
        return _merged(paths, dotlist, literals or {})
    except RecursionError as error:
        raise UserError("The config is nested too deeply", where=", ".join(map(str, paths))) from error


def _merged(paths: Sequence[str | Path], dotlist: Sequence[str], literals: Mapping[str, Any]) -> DictConfig:
    config = OmegaConf.create({})
    for path in paths:
        for update in _read(Path(path)).values():
            config = OmegaConf.merge(_without_old_params(config, update), update)
    together = OmegaConf.create()
    for key, value in literals.items():
        OmegaConf.update(together, key, escaped(value))
    config = _without_old_params(config, together)  # before any is set: their order says nothing
    for key, value in literals.items():
        OmegaConf.update(config, key, escaped(value))
    for item in dotlist:
        key, equals, value = item.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise UserError(f"`{item}` is not an override", remedy="Write it as `key.sub=value`.")
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
            update = OmegaConf.create()
            OmegaConf.update(update, key.strip(), parsed["value"])
            config = _without_old_params(config, update)
            OmegaConf.update(config, key.strip(), parsed["value"])
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"The override `{item}` cannot be applied: {_first_line(error)}") from error
    to_container(config)  # raises for a missing value or an interpolation that does not resolve
    return config


def _without_old_params(config: DictConfig, update: DictConfig) -> DictConfig:
    """The config without the params of nodes whose target becomes a class that is not derived from theirs."""
    merged = OmegaConf.to_container(config, resolve=False)

    def clean(old: Any, new: Any) -> bool:
        """Takes off what has to go, and says whether anything had to."""
        if not isinstance(old, dict) or not isinstance(new, dict):
            return False
        changes = "target" in old and new.get("target", old["target"]) != old["target"]
        taken = changes and not _is_derived(new["target"], old["target"]) and old.pop("params", None)
        return any([taken, *(clean(old[name], new[name]) for name in new.keys() & old.keys())])

    if clean(merged, OmegaConf.to_container(update, resolve=False)):
        return OmegaConf.create(merged)
    return config  # as it is: making one anew takes most of the time of reading


def _is_derived(target: Any, other: Any) -> bool:
    """Whether a target names a class that is derived from another; true of what `check` will refuse."""
    try:
        kinds = get_callable(target), get_callable(other)
    except UserError:
        return True
    return all(map(inspect.isclass, kinds)) and issubclass(*kinds)


def save_config(config: DictConfig, path: str | Path) -> Path:
    """Writes the config as YAML, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    return Path(path)


def instantiate(node: DictConfig | Mapping[str, Any], **from_code: Any) -> Any:
    """Builds the object of a node `{target, params}`, with `from_code` as further arguments.

    Nodes inside params are passed on as dicts, for the class to build.
    """
    own = to_container(node)
    kind = get_class(own.get("target"))
    return kind(**{**_built(kind, own.get("params") or {}), **from_code})


def bound(node: DictConfig | Mapping[str, Any]) -> Any:
    """What a node is called as: the object of its class, or its function with the params as arguments."""
    own = to_container(node)
    function = get_callable(own.get("target"))
    if inspect.isclass(function):
        return instantiate(own)
    return functools.partial(function, **_built(function, own.get("params") or {}))


def _built(kind: Callable[..., Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The params of a class, where a mapping stands for the class that annotates it as that object."""
    hints = hints_of(kind)
    return {name: _object(hints.get(name, Any), value) for name, value in params.items()}


def _object(annotation: Any, value: Any) -> Any:
    """A value of a parameter: an object for the mapping, or the list of mappings, of its class's params."""
    if (section := section_kind(annotation)) and isinstance(value, dict):
        return section(**_built(section, value))
    if (section := section_in_list(annotation)) and isinstance(value, list):
        return [section(**_built(section, item)) for item in value]
    return value


def param_of(node: Node, name: str) -> Any:
    """The value of a node's parameter: the given one, else the default in the signature of its class."""
    params = node.get("params") or {}
    if name in params:
        return params[name]
    return parameters_of(get_class(node["target"]))[name].default


def takes(node: Node, name: str) -> bool:
    """Whether the class of a node has a parameter of this name."""
    return name in parameters_of(get_class(node["target"]))


def with_params(node: Node, params: Mapping[str, Any]) -> Node:
    """The node with some params replaced."""
    return {**node, "params": {**(node.get("params") or {}), **params}}


def to_container(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The config as dicts, lists and scalars, with every `${...}` resolved."""
    if not OmegaConf.is_config(config):
        return copy.deepcopy(dict(config))
    for key, value in _leaves(OmegaConf.to_container(config, resolve=False)):
        if isinstance(value, str) and calls_resolver(value):
            what = f"`{key}` cannot be resolved: {value} calls a resolver, and only `${{key}}` is allowed"
            raise UserError(what, where=key, remedy="Write the value itself.")
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
    sections = to_container(config)
    found = [UserError("A section is missing", where=key) for key in required if key not in sections]
    for key, value in ((str(key), value) for key, value in sections.items()):
        if key not in schema:
            found.append(UserError(f"`{key}` is not a section", where=key, remedy=nearest(key, schema)))
        elif _has_signature(schema[key]):
            found += _check_params(schema[key], value, key)
        else:
            found += _check_value(value, schema[key], key)
    found = [error for error in found if error.where not in from_code]
    for error in found:
        error.where = ", ".join([error.where, *_origins(error.where, paths, dotlist)[-1:]])
    if found:
        earlier = "".join(f"{UserError(e.what, where=e.where, remedy=e.remedy)}\n" for e in found[:-1])
        raise UserError(earlier + found[-1].what, where=found[-1].where, remedy=found[-1].remedy)


def _has_signature(annotation: Any) -> bool:
    """Whether a section is a mapping of the parameters of a class."""
    is_class = inspect.isclass(annotation) and not typing.is_typeddict(annotation)
    return is_class and annotation.__module__ not in ("builtins", "typing")


def _check_node(node: dict[str, Any], key: str, wanted: type = object) -> Iterator[UserError]:
    """Errors in a node `{target, params}`. The `where` of each is its dotted key, here and below."""
    for name in node.keys() - {"target", "params"}:
        yield UserError(f"`{name}` is beside `target`", where=f"{key}.{name}", remedy="Move it to `params`.")
    try:
        kind, free = node_target(node["target"], wanted)
    except UserError as error:
        yield UserError(error.what, where=f"{key}.target", remedy=error.remedy)
        return
    if inspect.isclass(kind) and not issubclass(kind, wanted):
        what = f"{kind.__name__} is no {wanted.__name__}"
        yield UserError(what, where=f"{key}.target", remedy=f"Name a {wanted.__name__}.")
    yield from _check_params(kind, node.get("params") or {}, f"{key}.params", free)


def _check_params(
    kind: Callable[..., Any], params: Any, key: str, free: Mapping[str, inspect.Parameter] | None = None
) -> Iterator[UserError]:
    """Errors in `params`: names and types that do not fit the signature of `kind`, or its `free` part."""
    if not isinstance(params, dict):
        yield UserError(f"{params!r} is not a mapping of the parameters of {kind.__name__}", where=key)
        return
    signature, hints = inspect.signature(kind).parameters.values(), hints_of(kind)
    signature = signature if free is None else free.values()
    known = {p.name: p for p in signature if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in signature)
    refused: Mapping[str, str] = getattr(kind, "REFUSED", {})  # name -> why it is no parameter here
    moved: Mapping[str, str] = getattr(kind, "MOVED", {})  # name -> what is written instead, beside it
    for name, value in params.items():
        where = f"{key}.{name}"
        if name in moved:
            remedy = f"Write `{key}.{moved[name]}`."
            yield UserError(f"`{name}` has moved", where=where, remedy=remedy)
        elif name in known or takes_any:
            yield from _check_value(value, hints.get(name, Any), where)
        elif name in refused:
            yield UserError(f"`{name}` cannot be set: {refused[name]}", where=where, remedy="Take it off.")
        else:
            what = f"`{name}` is not a parameter of {kind.__name__}"
            yield UserError(what, where=where, remedy=nearest(name, known))
    for name in known.keys() - params.keys() - FROM_CODE:
        if known[name].default is inspect.Parameter.empty:
            yield UserError(f"{kind.__name__} needs `{name}`", where=f"{key}.{name}")


def _check_value(value: Any, annotation: Any, key: str) -> Iterator[UserError]:
    """Errors in a value: its type, its range, and the nodes anywhere inside it."""
    section = section_kind(annotation)
    if section is not None and isinstance(value, dict):
        yield from _check_params(section, value, key)
        return
    section = section_in_list(annotation)
    if section is not None and isinstance(value, list):
        for k, item in enumerate(value):
            yield from _check_params(section, item, f"{key}.{k}")
        return
    if not fits(value, annotation):
        yield UserError(f"{value!r} ({type(value).__name__}) should be {named(annotation)}", where=key)
    elif isinstance(value, float) and not math.isfinite(value):
        yield UserError(f"{value} is no number to compute with", where=key)
    wanted = node_kind(annotation)
    if isinstance(value, dict) and ("target" in value or wanted is not None):
        if "target" in value:
            yield from _check_node(value, key, wanted or object)
        else:
            yield UserError(f"`{key}` has no `target`", where=f"{key}.target", remedy="Name its class there.")
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _check_value(inner, Any, f"{key}.{name}")


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in dicts and lists that is neither."""
    if not isinstance(node, dict | list):
        yield key, node
        return
    for name, inner in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))


def _read(path: Path, including: Sequence[Path] = ()) -> dict[Path, DictConfig]:
    """A file and those that it includes, in the order in which they are merged: itself last.

    An included name is one beside the file or, if nothing is there, in the configs that ship.
    """
    path = find_file(path)
    own = _load(path)
    names = OmegaConf.to_container(own).get(INCLUDE, [])
    if not fits(names, str | list[str]):
        raise UserError(f"`{INCLUDE}` should be a list of files", where=path)
    if path.resolve() in including:
        raise UserError("The config includes itself", where=path, remedy=f"Take `{INCLUDE}` off.")
    files: dict[Path, DictConfig] = {}
    for name in [names] if isinstance(names, str) else names:
        beside = path.parent / name
        found = _read(beside if beside.exists() else CONFIGS / name, (*including, path.resolve()))
        files = {file: content for file, content in files.items() if file not in found} | found
    own.pop(INCLUDE, None)
    return files | {path: own}


def _load(path: Path) -> DictConfig:
    if not path.is_file():
        names = [str(other) for other in path.parent.glob("*.y*ml")]
        raise UserError("There is no such config file", where=path, remedy=nearest(str(path), names))
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
    contents = [item for path in paths for item in _read(Path(path)).items()]
    origins = [str(path) for path, content in contents if _sets(content, key)]
    origins += [item for item in dotlist if f"{item.partition('=')[0].strip()}.".startswith(f"{key}.")]
    around = key.rpartition(".")[0]
    return origins if origins or not around else _origins(around, paths, dotlist)


def _sets(config: DictConfig, key: str) -> bool:
    nothing = object()
    return OmegaConf.select(config, key, default=nothing, throw_on_resolution_failure=False) is not nothing


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
