"""The package as it is installed: what a wheel holds, what its commands import, on systems without POSIX."""

import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ldm
from ldm.shipped import find_file

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "ldm").rglob("*.py")
    if path.name not in ("__init__.py", "group_norm_triton.py")  # Triton is where a GPU is
)


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What setup.py tells setuptools."""
    told: dict = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **given: told.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    return told


def test_a_wheel_holds_every_module_config_and_asset(wheel: dict):
    packages = set(wheel["packages"])
    assert {name.rpartition(".")[0] for name in MODULES} <= packages and "tests" not in packages
    held = set()
    for package, patterns in wheel["package_data"].items():
        folder = ROOT / wheel["package_dir"].get(package, package.replace(".", "/"))
        held |= {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    needed = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    needed += [path for path in (ROOT / "ldm/storybook/assets").rglob("*") if path.is_file()]
    needed += list((ROOT / "ldm/reports/templates").iterdir())
    assert len(needed) > 40 and set(needed) <= held


def test_files_that_ship_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a clone, and as in a wheel, whose configs lie in the package; the current folder's own win."""
    monkeypatch.chdir(tmp_path)
    config, photos = "configs/dreambooth.yaml", "ldm/storybook/assets/subjects/dog"
    assert find_file(config) == ROOT / config and find_file(photos) == ROOT / photos
    assert [find_file(name) for name in ("README.md", "configs/x.yaml", "", "logs/a")] == [
        Path(name) for name in ("README.md", "configs/x.yaml", "", "logs/a")
    ]
    package = tmp_path / "site/ldm"
    (package / "configs").mkdir(parents=True)
    (package / "configs/dreambooth.yaml").touch()
    (package / "shipped.py").write_bytes((ROOT / "ldm/shipped.py").read_bytes())
    installed = runpy.run_path(str(package / "shipped.py"))
    assert installed["find_file"](config) == package / config
    assert installed["find_file"]("ldm/shipped.py") == package / "shipped.py"
    (tmp_path / "configs").mkdir()
    (tmp_path / config).touch()
    assert find_file(config) == installed["find_file"](config) == Path(config)


def test_commands_and_the_package_import_nothing_slow():
    """Every command answers --help, in one process that has not imported torch."""
    script = f"""
import contextlib, importlib, io, sys
import ldm
for place in {sorted(SCRIPTS.values())!r}:
    module, _, name = place.partition(":")
    sys.argv = [module, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        getattr(importlib.import_module(module), name)()
    assert "usage: " in said.getvalue(), place
slow = {{"torch", "pytorch_lightning", "transformers", "numpy", "PIL"}} & sys.modules.keys()
assert not slow, slow
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    for path in (ROOT / "scripts").glob("*.py"):
        short = {"generate_priors": "priors", "check_photos": "photos", "make_masks": "masks"}
        name = short.get(path.stem, path.stem)
        assert f"dreambooth-{name}" in SCRIPTS or path.stem in ("benchmark", "soak"), path
    assert set(SCRIPTS) >= {"dreambooth", "dreambooth-sample"}


def test_every_module_imports_without_posix_and_with_mps(tmp_path: Path):
    """No `fcntl`, no `resource`, and torch that says it has MPS: what of Windows and Apple can be tried."""
    script = f"""
import builtins, importlib
import torch
real = builtins.__import__
def absent(name, globals=None, *rest, **more):
    if name in ("fcntl", "resource") and (globals or {{}}).get("__name__", "").startswith("ldm"):
        raise ImportError(name)  # to our modules; libraries have their own ways on other systems
    return real(name, globals, *rest, **more)
builtins.__import__ = absent
torch.backends.mps.is_available = lambda: True
for name in {MODULES!r}:
    importlib.import_module(name)
from ldm.engine import device, locks
from ldm.schema import TrainerOptions
assert not locks.CAN_LOCK and locks.try_lock(None)
device.Path = lambda path: importlib.import_module("pathlib").Path("/nowhere")
assert device.peak_resident_mib() == 0.0
if not torch.cuda.is_available():
    assert device.device_of(TrainerOptions(max_steps=1)).type == device.DEVICE == "mps"
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_public_interface():
    """Names of docs/python.md; all else is an ordinary AttributeError. What they do: the notebook's test."""
    from ldm import Run, Text2Image, UserError, load_config, train

    assert set(ldm.__all__) == {kind.__name__ for kind in (Run, Text2Image, UserError, load_config, train)}
    assert set(ldm.__all__) == ldm.PUBLIC.keys() <= set(dir(ldm))
    with pytest.raises(AttributeError, match="no attribute 'Txt2Image'"):
        ldm.Txt2Image  # noqa: B018
    config = load_config("configs/dreambooth.yaml", overrides={"trainer.max_steps": 7, "evaluation": None})
    assert config.trainer.max_steps == 7 and config.evaluation is None and config.is_dreambooth
    with pytest.raises(UserError, match="No config is given"):
        load_config()
    with pytest.raises(UserError, match="max_steps"):
        load_config("configs/dreambooth.yaml", overrides={"trainer.max_step": 7})
    with pytest.raises(UserError, match="trains no subject"):
        train(load_config("configs/storybook/judge.yaml"))
