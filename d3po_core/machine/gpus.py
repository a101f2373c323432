"""Find the GPUs that torch can use here, from NVIDIA's driver and torch's own file of versions.

Importing torch would take seconds, and torch does not say why it finds no GPU.
"""

import ctypes
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

DRIVER_LIBRARY = "libcuda.so.1"
PCI_DEVICES = Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"  # a vendor, and the class of graphics and 3D controllers


@dataclass(frozen=True)
class Gpu:
    """A GPU that the driver shows to this process."""

    name: str
    total_bytes: int


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: the newest CUDA that it runs, and the GPUs that it shows to this process."""

    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch: its version, and the CUDA or ROCm that it was built for."""

    version: str
    cuda: str | None
    rocm: str | None


@dataclass(frozen=True)
class Missing:
    """Why torch can use no GPU here, and what to do; ``broken`` if the machine has one."""

    why: str
    remedy: str
    broken: bool


def find_driver() -> Driver | None:
    """Return NVIDIA's driver, or None if there is none; ``CUDA_VISIBLE_DEVICES`` hides GPUs from it."""
    try:
        library = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return None
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    cuda = (number.value // 1000, number.value % 1000 // 10)
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(number)):
        return Driver(cuda, ())
    return Driver(cuda, tuple(_gpu(library, index) for index in range(number.value)))


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    device, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(100)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return Gpu(name.value.decode(errors="replace"), size.value)


def torch_build() -> TorchBuild | None:
    """Return the installed torch's build, read without importing it; None if torch is not installed."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = (Path(found.origin).parent / "version.py").read_text()
    values = dict(re.findall(r"^(__version__|cuda|hip)\b[^=]*= *'([^']*)'", text, re.M))
    return TorchBuild(values.get("__version__", "unknown"), values.get("cuda"), values.get("hip"))


def has_nvidia_card() -> bool:
    """Return whether a graphics card of NVIDIA is on the bus, with or without a driver."""
    return any(
        _word(device / "vendor") == NVIDIA and _word(device / "class").startswith(DISPLAY)
        for device in PCI_DEVICES.glob("*")
    )


def _word(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def why_no_gpu(driver: Driver | None, build: TorchBuild | None) -> Missing | None:
    """Return why torch can use no GPU; None if it can, or if this cannot be told (a build for ROCm).

    Args:
        driver: from ``find_driver``.
        build: from ``torch_build``.
    """
    if build is None:
        return Missing("torch is not installed", "install d3po with its dependencies", broken=False)
    if build.rocm:
        return None
    if driver is None:
        if has_nvidia_card():
            return Missing("an NVIDIA card is there, but not its driver", "install NVIDIA's driver", broken=True)
        return Missing("no NVIDIA driver", "use a machine with an NVIDIA GPU", broken=False)
    if not driver.gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            why = f"the driver shows no GPU; CUDA_VISIBLE_DEVICES is {hidden!r}"
            return Missing(why, "unset CUDA_VISIBLE_DEVICES", broken=True)
        return Missing("the driver shows no GPU", "look at what `nvidia-smi` says", broken=True)
    newest = ".".join(map(str, driver.cuda))
    if build.cuda is None:
        why = f"torch {build.version} is built without CUDA, and this machine has an {driver.gpus[0].name}"
        return Missing(why, f"install a torch built for CUDA {newest} or older", broken=True)
    if int(build.cuda.partition(".")[0]) > driver.cuda[0]:
        why = f"torch {build.version} is built for CUDA {build.cuda}, and the driver runs at most {newest}"
        return Missing(why, f"update NVIDIA's driver, or install a torch built for CUDA {driver.cuda[0]}", broken=True)
    return None
