"""Why torch can use no GPU: every kind of machine, with a small library in place of NVIDIA's driver."""

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from d3po_core.machine import gpus
from d3po_core.machine.gpus import Driver, Gpu, TorchBuild, find_driver, torch_build, why_no_gpu
from d3po_core.paths import PROJECT_ROOT

CARD = Gpu("NVIDIA H100", 80_000_000_000)
CUDA13, CUDA12, CPU = (TorchBuild("2.13.0", cuda, None) for cuda in ("13.0", "12.6", None))


class FakeLibrary:
    """Answers as libcuda does: a status, and results through pointers."""

    def __init__(self, version: int, cards: list[tuple[str, int]], init: int = 0) -> None:
        self.version, self.cards, self.init = version, cards, init

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = len(self.cards)
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, out: Any, length: int, device: Any) -> int:
        out.value = self.cards[device.value][0].encode()
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, device: Any) -> int:
        out._obj.value = self.cards[device.value][1]
        return 0


def test_the_driver_tells_its_cuda_and_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [("NVIDIA H100", 80_000_000_000), ("NVIDIA RTX 4090", 25_000_000_000)]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary(12040, cards))
    assert find_driver() == Driver((12, 4), (Gpu(*cards[0]), Gpu(*cards[1])))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary(13000, cards, init=100))  # CUDA_ERROR_NO_DEVICE
    assert find_driver() == Driver((13, 0), ())


def test_a_machine_without_the_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "DRIVER_LIBRARY", "libnothing-of-this-name.so.1")
    assert find_driver() is None


def test_the_build_is_what_torch_itself_says() -> None:
    build = torch_build()
    assert build == TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip)


@pytest.mark.parametrize(
    ("driver", "build", "why", "remedy"),
    [
        (None, CUDA13, "no NVIDIA driver", "use a machine with"),
        (None, CPU, "no NVIDIA driver", "use a machine with"),
        (Driver((13, 0), ()), CUDA13, "shows no GPU", "nvidia-smi"),
        (Driver((13, 0), (CARD,)), CPU, "built without CUDA", "built for CUDA 13.0 or older"),
        (Driver((12, 4), (CARD,)), CUDA13, "built for CUDA 13.0, and the driver runs at most 12.4", "update"),
        (Driver((13, 0), (CARD,)), None, "torch is not installed", "install"),
    ],
)
def test_each_reason_is_told_with_its_remedy(
    driver: Driver | None, build: TorchBuild | None, why: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "PCI_DEVICES", Path("/nowhere"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    missing = why_no_gpu(driver, build)
    assert missing is not None
    assert why in missing.why
    assert remedy in missing.remedy


# A driver runs programs built for its own CUDA, older ones, and newer minor versions of the same major one.
@pytest.mark.parametrize(
    ("cuda", "build"),
    [((13, 0), CUDA13), ((13, 0), CUDA12), ((12, 4), CUDA12), ((12, 8), TorchBuild("2.13.0", None, "7.0"))],
)
def test_a_gpu_that_can_be_used_is_no_problem(cuda: tuple[int, int], build: TorchBuild) -> None:
    assert why_no_gpu(Driver(cuda, (CARD,)), build) is None


def test_a_card_without_a_driver_and_a_hidden_one_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "vendor").write_text("0x10de\n")
    (tmp_path / "0000:01:00.0" / "class").write_text("0x030200\n")
    monkeypatch.setattr(gpus, "PCI_DEVICES", tmp_path)
    missing = why_no_gpu(None, CUDA13)
    assert missing is not None
    assert missing.broken
    assert "not its driver" in missing.why
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = why_no_gpu(Driver((13, 0), ()), CUDA13)
    assert hidden is not None
    assert hidden.remedy == "unset CUDA_VISIBLE_DEVICES"


def test_nothing_heavy_is_imported_to_plan() -> None:
    script = (
        "import sys; from d3po_core.planning.plan import make_plan; from d3po_core.config import CampaignConfig; "
        "make_plan(CampaignConfig(campaign='not-there'), 1); "
        "print(sorted({'torch', 'diffusers', 'transformers', 'prefect', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
