"""A tiny Stable Diffusion XL as files, and as the networks and config of short trainings."""

from pathlib import Path

import pytest

from ldm.commands import convert
from tests.families import tiny_sdxl
from tests.short_runs import Job


@pytest.fixture(scope="session")
def xl_folder(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers saves it."""
    folder = tmp_path_factory.mktemp("sdxl") / "diffusers"
    return tiny_sdxl.saved(tiny_sdxl.pipeline(tiny_tokenizer), folder, tiny_tokenizer)


@pytest.fixture(scope="session")
def xl_file(xl_folder: Path) -> Path:
    """The same in one file."""
    return convert.main(convert.parse([str(xl_folder), str(xl_folder.with_name("xl.safetensors"))]))


@pytest.fixture
def xl_job(xl_file: Path, subject_folder: Path) -> Job:
    """A short training of it: random crops of photos of several sizes."""
    config, networks = tiny_sdxl.model_section(xl_file), tiny_sdxl.networks(xl_file)
    weights = {name: network.state_dict() for name, network in networks.items()}
    return Job(config, weights, subject_folder, data={"crop": "random"})
