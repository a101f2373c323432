"""One cluster of several nodes on the loopback interface, and what a run meets there; prints JSON. Not a test itself.

It runs as a process of its own: ``ray.cluster_utils`` and a private Ray do not mix.
"""

import faulthandler
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.errors import D3POError, RankError
from d3po_core.processes import engine
from d3po_core.processes.cluster import LOOPBACK, QUIET
from tests.tasks.node_checks import check_full_stores, check_models
from tests.tasks.rank_ends import SIZE, SQUARES

# The nodes take their disks for full, so that nothing goes there from a full store.
os.environ |= {**LOOPBACK, **QUIET, "RAY_local_fs_capacity_threshold": "0.01"}
STORE = 80_000_000


def config(folder: Path, address: str, **compute: Any) -> CampaignConfig:
    values = {"processes": 2, "address": address, "start_seconds": 60, **compute}
    return load_config({"runs_dir": str(folder), "model": {"device": "cpu"}, "compute": values}, "test")


def refused(job: Any, with_config: CampaignConfig, number: int) -> list[str]:
    try:
        engine.run_job(job, with_config, number, lambda count: None)
    except (D3POError, RankError) as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def main(folder: Path) -> None:
    from ray.cluster_utils import Cluster

    found: dict[str, Any] = {}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    first = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    alone = config(folder, cluster.address, start_seconds=20)
    found["smaller, sampling"] = [result[0] for result in engine.run_job(SQUARES, alone, 0, lambda count: None)]
    found["smaller, training"] = engine.run_job(SIZE, alone, 0, lambda count: None)
    engine.end_processes()
    found["too small"] = refused(SIZE, config(folder, cluster.address, min_processes=2, start_seconds=3), 0)
    engine.end_processes()

    usual, nodes = config(folder, cluster.address), [first]
    told: list[int] = []

    def change(count: int) -> None:  # after the first item: a node more; after the third: the first node goes
        told.append(count)
        if len(told) == 1:
            nodes.append(cluster.add_node(num_cpus=1, object_store_memory=STORE))
        if len(told) == 4:
            threading.Thread(target=cluster.remove_node, args=(nodes[0],)).start()

    engine.run_job(SQUARES, usual, 0, lambda count: None)
    results = engine.run_job(SQUARES, usual, 20, change)
    found["changed, sampling"] = [result[0] for result in results]
    found["changed, told"] = len(told)
    found["changed, workers"] = len({result[1] for result in results})

    nodes.append(cluster.add_node(num_cpus=1, object_store_memory=STORE))

    def lose(count: int) -> None:
        if len(nodes) == 3:
            threading.Thread(target=cluster.remove_node, args=(nodes.pop(),)).start()

    found["lost, training"] = engine.run_job(SIZE, usual, 30, lose)
    engine.end_processes()

    found |= check_full_stores(usual, refused)
    found |= check_models(folder, usual.compute.model_dump(), refused)

    fake = folder / "site" / "diffusers-0.0.1.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.0.1\n")
    path = f"{fake.parent}{os.pathsep}{os.environ['PYTHONPATH']}"
    cluster.add_node(num_cpus=1, object_store_memory=STORE, env_vars={"PYTHONPATH": path})
    found["versions"] = refused(SQUARES, config(folder, cluster.address), 10)
    engine.end_processes()
    found["nobody"] = refused(SQUARES, config(folder, "127.0.0.1:1"), 0)
    print(json.dumps(found), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(250, exit=True)
    main(Path(sys.argv[1]))
