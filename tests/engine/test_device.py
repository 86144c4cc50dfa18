"""Which device and memory a process may use, as if there were GPUs."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from ldm import model_file
from ldm.engine.device import can_pin
from ldm.errors import UserError
from ldm.model_file import use_device


class Pins(torch.utils.data.Dataset):
    """Its item is whether it was read where memory can be pinned."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> bool:
        return can_pin()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_forked_worker_pins_nothing(monkeypatch: pytest.MonkeyPatch, workers: int):
    assert not can_pin()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    how = {"multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(Pins(), batch_size=None, num_workers=workers, **how)
    assert list(loader) == [workers == 0]


def test_a_gpu_by_its_number_becomes_the_processs_own(monkeypatch: pytest.MonkeyPatch):
    """Triton and CUDA graphs run on the current device, whatever their tensors are on."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    use_device("cpu")
    assert chosen == []
    place = SimpleNamespace(device=torch.device("cuda", 1))
    monkeypatch.setattr(model_file.torch, "empty", lambda size, device: place)
    use_device("cuda:1")
    assert chosen == [torch.device("cuda", 1)]


def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(UserError, match=r"The device nonsense cannot be used.*Try cpu"):
        use_device("nonsense")
