"""The house keeps its order: who imports whom, how long things may be, that all is typed."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "ldm").rglob("*.py"))
ENTRIES = [path for path in [ROOT / "main.py", *sorted((ROOT / "scripts").glob("*.py"))] if path.exists()]

LEAVES = {
    "annotations",
    "errors",
    "files",
    "interpolations",
    "lazy",
    "randomness",
    "contact_sheet",
    "shipped",
}  # may be imported from anywhere
MAY_IMPORT = {  # room -> rooms or modules of ldm, besides the leaves
    "diffusion": set(),
    "models": set(),
    "families": {"config", "models"},
    "checkpoints": {"config", "diffusion", "families", "models"},
    "config": {"targets"},
    "data": set(),
    "storybook": {"data"},
    "precision": {"models"},
    "targets": set(),
    "conditioner": {"families", "models"},
    "cuda_graph": {"models"},
    "denoiser": {"conditioner", "cuda_graph", "diffusion", "families", "models"},
    "model_file": {"checkpoints", "config", "denoiser", "diffusion", "families", "models"},
    "pipeline": {
        "checkpoints",
        "conditioner",
        "denoiser",
        "diffusion",
        "families",
        "model_file",
        "models",
        "precision",
        "sampler_nodes",
    },
    "sampler_nodes": {"config", "diffusion"},
    "evaluation": {
        "checkpoints",
        "data",
        "diffusion",
        "pipeline",
        "precision",
        "sampler_nodes",
        "storybook",
    },
    "reports": {"evaluation"},
    "schema": {"config", "data", "diffusion", "precision", "sampler_nodes", "targets"},
    "optim": {"config", "schema", "targets"},
    "engine": {"checkpoints", "optim", "schema"},
    "training": {
        "checkpoints",
        "conditioner",
        "config",
        "cuda_graph",
        "diffusion",
        "engine",
        "families",
        "models",
        "optim",
        "precision",
        "schema",
    },
    "storybook.training": {
        "checkpoints",
        "config",
        "engine",
        "models",
        "optim",
        "schema",
        "storybook",
        "training",
    },
    "commands": {"checkpoints", "engine", "runs"},
    "runs": {
        "checkpoints",
        "conditioner",
        "config",
        "data",
        "denoiser",
        "diffusion",
        "engine",
        "evaluation",
        "families",
        "model_file",
        "models",
        "optim",
        "pipeline",
        "precision",
        "reports",
        "sampler_nodes",
        "schema",
        "storybook",
        "storybook.training",
        "targets",
        "training",
    },
}
FILE_LINES, FUNCTION_LINES, NETWORK_INIT_LINES = 350, 40, 60
ARGUMENTS, UNCOUNTED = 8, {"self", "cls", "unet", "vae", "text_encoder"}  # the networks are one thing
MANY_ARGUMENTS = {  # "ldm/file.py:function" -> why it takes more; a network's constructor may anyway
    "ldm/data/dreambooth.py:__init__": "the keys of a config's section",
    "ldm/evaluation/photos.py:__init__": "the keys of a config's section",
    "ldm/evaluation/storybook.py:__init__": "the keys of a config's section",
    "ldm/evaluation/vlm.py:__init__": "the keys of a config's section",
    "ldm/reports/sweep_page.py:page": "the parts of a page, by name",
    "ldm/pipeline.py:__call__": "what a notebook sets, by name",
}
LONG_FUNCTIONS = {  # "ldm/file.py:function" -> why it is one idea; 60 lines at most
    "ldm/pipeline.py:__call__": "half of it is its signature, the settings of a sampling",
}


def dotted(path: Path) -> str:
    """ldm/data/priors.py -> ldm.data.priors; a package stands for its __init__."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path) for path in LIBRARY}


def imports(path: Path) -> set[str]:
    """Modules of ldm that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return {name for name in found if name == "ldm" or name.startswith("ldm.")}


def room(module: str) -> str:
    """ldm.data.priors -> data; ldm itself -> ldm. The storybook's trainings are a room of their own."""
    if (module + ".").startswith("ldm.storybook.training."):
        return "storybook.training"
    return (module.split(".") + ["ldm"])[1] if module != "ldm" else "ldm"


def is_kernel(node: ast.FunctionDef) -> bool:
    """Of Triton, whose arguments are pointers and numbers of the device."""
    return bool({"jit", "triton.jit"} & {ast.unparse(decorator) for decorator in node.decorator_list})


def functions() -> list[tuple[Path, ast.FunctionDef]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    trees = [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in LIBRARY]
    return [(path, node) for path, tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.mark.parametrize("path", LIBRARY, ids=dotted)
def test_imports_follow_the_table(path):
    here = room(dotted(path))
    assert here in MAY_IMPORT or here in LEAVES | {"ldm"}, f"{path} stands in no room of the table"
    allowed = MAY_IMPORT.get(here, set()) | LEAVES | {here, "ldm"}
    assert {name for name in imports(path) if room(name) not in allowed} == set()


@pytest.mark.parametrize("path", ENTRIES, ids=dotted)
def test_entries_import_modules_that_exist(path):
    assert imports(path) - {"ldm"} <= MODULES


def test_leaves_import_nothing_but_leaves():
    for path in LIBRARY:
        if room(dotted(path)) in LEAVES:
            assert {room(name) for name in imports(path)} <= LEAVES, path


def test_no_import_cycle():
    TopologicalSorter({dotted(path): imports(path) - {dotted(path)} for path in LIBRARY}).prepare()


@pytest.mark.parametrize("path", LIBRARY, ids=dotted)
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES


def test_functions_stay_short():
    def limit(path: Path, node: ast.FunctionDef) -> int:
        long = node.name == "__init__" or f"{path.relative_to(ROOT)}:{node.name}" in LONG_FUNCTIONS
        return NETWORK_INIT_LINES if long else FUNCTION_LINES

    def length(node: ast.FunctionDef) -> int:
        """A constructor's signature is the schema of its configs: one line per key, which do not count."""
        first = node.body[0].lineno if node.name == "__init__" else node.lineno
        return node.end_lineno - first + 1

    lengths = {(path, node): length(node) for path, node in functions()}
    too_long = {
        f"{path.relative_to(ROOT)}:{node.name}": length
        for (path, node), length in lengths.items()
        if length > limit(path, node)
    }
    assert too_long == {}


def test_functions_take_few_arguments():
    """Those that take many are listed, and no longer than they do."""
    many = set()
    for path, node in functions():
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        count = sum(argument.arg not in UNCOUNTED for argument in arguments)
        network = room(dotted(path)) == "models" and node.name == "__init__"
        if count > ARGUMENTS and not network and not is_kernel(node):
            many.add(f"{path.relative_to(ROOT)}:{node.name}")
    assert many == MANY_ARGUMENTS.keys()


def test_every_function_is_annotated():
    bare = []
    for path, node in functions():
        if is_kernel(node):
            continue
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        arguments += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
        named = [a for a in arguments if a.arg not in ("self", "cls")]
        if any(a.annotation is None for a in named) or (node.returns is None and node.name != "__init__"):
            bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert bare == []


def test_every_module_says_what_it_is():
    silent = [
        path for path in LIBRARY if path.read_text() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_the_library_imports_without_diffusers():
    """Every module of ldm, in a fresh interpreter that has no diffusers."""
    script = f"""
import importlib, sys
sys.modules["diffusers"] = None  # importing it now raises ImportError
for name in {sorted(MODULES - {"ldm.models.group_norm_triton"})!r}:  # Triton is where a GPU is
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_page_of_the_architecture_names_what_is_there():
    """docs/architecture.md: each path that it names exists, and its table is the one above."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`([\w./-]+(?:/|\.\w+))`", page))
    paths -= {"model.safetensors", "report.html", "storybook.training"}
    assert len(paths) > 50 and {path for path in paths if not (ROOT / path).exists()} == set()
    rows = re.findall(r"^\| `([\w.]+)` \| [^|]+ \| ([^|]+) \|$", page, re.MULTILINE)
    assert {room: set(names.split(", ")) - {"nothing"} for room, names in rows} == MAY_IMPORT
    assert LEAVES == set(re.findall(r"`ldm/(\w+)\.py`", page.split("From anywhere")[1].split("##")[0]))


def test_the_table_can_fail(tmp_path):
    """A file that breaks the order is seen: a plain, a nested and an aliased import."""
    path = tmp_path / "wrong.py"
    path.write_text(
        "import ldm.engine.resume\nfrom ldm import config as c\ndef f():\n    from ldm.models.unet import X"
    )
    assert imports(path) == {"ldm.engine.resume", "ldm.config", "ldm.models.unet"}
    assert {room(name) for name in imports(path)} == {"engine", "config", "models"}
