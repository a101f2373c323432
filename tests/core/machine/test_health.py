"""The doctor's checks of the machine, with versions, disks and drivers of the test's own."""

import importlib.metadata
import shutil
from pathlib import Path

import pytest

from d3po_core.machine import health
from d3po_core.machine.gpus import Driver, Gpu, TorchBuild
from d3po_core.machine.health import (
    check_disk,
    check_gpu_memory,
    check_hub_cache,
    check_libraries,
    check_pins,
    check_python,
    check_torch,
)

H100 = Driver((13, 0), (Gpu("NVIDIA H100", 80_000_000_000),))


def machine(monkeypatch: pytest.MonkeyPatch, driver: Driver | None, cuda: str | None) -> None:
    monkeypatch.setattr(health, "find_driver", lambda: driver)
    monkeypatch.setattr(health, "torch_build", lambda: TorchBuild("2.13.0", cuda, None))


def test_torch_for_the_cpu_fails_only_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, H100, None)
    assert check_torch().state == "fail"
    assert "NVIDIA H100" in check_torch().found
    machine(monkeypatch, None, None)
    assert check_torch().state == "warn"
    machine(monkeypatch, H100, "13.0")
    assert (check_torch().state, check_torch().remedy) == ("ok", "")


def test_a_driver_too_old_for_torch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, Driver((12, 4), H100.gpus), "13.0")
    check = check_torch()
    assert check.state == "fail"
    assert "12.4" in check.found


@pytest.mark.parametrize(("free", "state"), [(60_000_000_000, "ok"), (1_000_000_000, "warn")])
def test_gpu_memory_that_others_hold_is_told(free: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    machine(monkeypatch, H100, "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, 80_000_000_000))
    check = check_gpu_memory()
    assert check.state == state
    assert f"{free / 1e9:.1f} of 80.0 GB free" in check.found


@pytest.mark.parametrize(
    ("version", "state", "said"),
    [("0.150.0", "ok", ""), ("0.151.0", "fail", "breaks Prefect 3.8's server"), ("0.200", "fail", "breaks")],
)
def test_a_library_known_to_break_another_fails(
    version: str, state: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "fastapi" else real(name))
    check = check_libraries()
    assert check.state == state
    assert said in check.found
    assert state == "ok" or "fastapi<0.151" in check.remedy


def test_versions_other_than_the_tested_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version("pillow")
    pins = tmp_path / "constraints.txt"
    monkeypatch.setattr(health, "CONSTRAINTS", pins)
    pins.write_text(f"# a set\npillow=={installed}\nnot-installed-here==1.0\n")
    assert check_pins().state == "ok"
    pins.write_text(f"pillow==0.1\ntyper=={importlib.metadata.version('typer')}\n")
    assert (check_pins().state, check_pins().found) == ("warn", f"pillow {installed} (tested: 0.1)")


@pytest.mark.parametrize(("free", "state"), [(50_000_000_000, "ok"), (2_000_000_000, "warn")])
def test_a_disk_that_fills_is_told(free: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "not yet"))
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert check_disk().state == state
    assert not (tmp_path / "not yet").exists()


def test_a_file_in_place_of_the_data_folder_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "file"))
    assert health.check_disk().state == "fail"


def test_the_hubs_cache_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "x").write_bytes(b"0" * 200_000_000)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    assert (check_hub_cache().state, check_hub_cache().found) == ("ok", f"{tmp_path}: 0.2 GB of models")
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    assert check_hub_cache().state == "warn"


def test_this_python_is_supported() -> None:
    assert check_python().state != "fail"
