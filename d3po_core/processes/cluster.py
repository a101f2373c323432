"""Start a private Ray on this machine, or join a cluster; the only file that changes Ray's settings.

A private Ray listens on the loopback interface alone and ends with this process, also if that is killed.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from d3po_core.config import ComputeConfig
from d3po_core.errors import D3POError
from d3po_core.paths import python_path
from d3po_core.processes.watch import MARK, start_watch

# Without it, Ray takes the machine's outer address even if told 127.0.0.1. With this set to 0, all its servers take the
# loopback interface, as they do on a Mac.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_METRICS_COLLECTION": "1", "RAY_enable_metrics_collection": "0",
    "RAY_grpc_enable_http_proxy": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}  # fmt: skip
EXTRA = "compute.processes above 1, and scoring.gpus, need Ray: pip install 'd3po[cluster]'"

# Of the private Ray, if there is one; it ends when its standard input closes, so also with this process.
_watchers: list["subprocess.Popen[bytes]"] = []


def connect(config: ComputeConfig, gpus: int, cpus: int) -> Any:
    """Start a private Ray with these resources, or join the cluster at ``compute.address``; return the module ray.

    Raises:
        D3POError: Ray is not installed, or the cluster cannot be reached.
    """
    with _environment(QUIET | ({} if config.address else LOOPBACK) | {"PYTHONPATH": python_path()}), _own_signals():
        try:
            import ray
        except ModuleNotFoundError:
            raise D3POError(EXTRA) from None
        if ray.is_initialized():  # the run's workers and scorers share it
            return ray
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it tells of its token at each start
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        if config.address:
            try:
                if config.address != "auto":  # Ray itself would try for minutes
                    host, _, port = config.address.rpartition(":")
                    socket.create_connection((host, int(port)), timeout=10).close()
                ray.init(address=config.address, **options)
            except Exception as error:  # Ray raises several kinds
                reason = " ".join(str(error).split())[:200]
                raise D3POError(
                    f"compute.address is {config.address!r}: no Ray cluster can be reached there ({reason}); expected "
                    "auto on a machine of the cluster, or its head's host:port"
                ) from None
            return ray
        folder = tempfile.mkdtemp(prefix="d3po-ray-")
        watcher = start_watch(folder)
        try:
            with _environment({MARK: folder}):
                ray.init(
                    address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, _temp_dir=folder, **options
                )
        except BaseException:
            watcher.communicate()
            raise
        _watchers.append(watcher)
        return ray


def disconnect(ray: Any) -> None:
    """Leave the cluster; a private Ray ends, and its files go."""
    ray.shutdown()
    while _watchers:
        _watchers.pop().communicate()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes that Ray starts now."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which Ray replaces."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
