"""The plan of a run: what its rounds do, how long they take and what they need, before anything is loaded."""

import os
from dataclasses import dataclass

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.machine.gpus import Gpu, find_driver, torch_build, why_no_gpu
from d3po_core.models.written import free_bytes
from d3po_core.planning.downloads import download_bytes, files_of, missing_downloads
from d3po_core.planning.model_facts import ModelFacts, disk_bytes, facts_of
from d3po_core.planning.preflight import check_prompts, problems
from d3po_core.planning.rates import measured_rate
from d3po_core.planning.timing import Timing, estimate
from d3po_core.planning.work import Work, round_work
from d3po_core.sizes import Size
from d3po_core.store.goals import rounds_ahead
from d3po_core.store.stages import stage_path


@dataclass(frozen=True)
class Plan:
    """A run's plan; None for what is unknown.

    Attributes:
        campaign: the campaign's name.
        folder: its folder.
        rounds: the rounds that the run will finish; 0 is the base, which is only evaluated.
        finished_stages: stages of the first of them that an earlier run finished.
        prompts: number of training prompts.
        held_out_prompts: number of held-out prompts in use.
        scorers: what judges the images.
        sizes: the sizes of which each group has one; None is the native size of a model that is not here.
        held_out_size: the size of the held-out images, likewise.
        work: counts of a round after round 0.
        timing: seconds of a round.
        gpu: the GPU that torch will use; None for the CPU.
        cores: CPU cores of this machine.
        peak_gb: peak GPU memory in a measurement of such a model in such a mode.
        disk_bytes: bytes that a round writes, at most.
        free_bytes: free bytes where the campaign lies.
        downloads: hub id of what must be downloaded -> bytes.
        problems: what would stop the run, one line each.
    """

    campaign: str
    folder: str
    rounds: list[int]
    finished_stages: list[str]
    prompts: int
    held_out_prompts: int
    scorers: list[str]
    sizes: list[Size | None]
    held_out_size: Size | None
    work: Work
    timing: Timing
    gpu: Gpu | None
    cores: int
    peak_gb: float | None
    disk_bytes: int
    free_bytes: int
    downloads: dict[str, int | None]
    problems: list[str]

    @property
    def seconds(self) -> float | None:
        """Return the seconds of the whole run, None if unknown; finished stages are not subtracted."""
        per_round, base = self.timing.seconds, self.timing.base_seconds
        later = [number for number in self.rounds if number]
        if (later and per_round is None) or (len(later) < len(self.rounds) and base is None):
            return None
        return len(later) * (per_round or 0) + (len(self.rounds) - len(later)) * (base or 0) + self.timing.once


def make_plan(config: CampaignConfig, rounds: int) -> Plan:
    """Return the plan of a run that is asked for this many rounds; what would stop it is in ``problems``."""
    found = list(problems(config))
    downloads, refused = _downloads(config)
    training, held_out = _or_empty(config)
    facts, folder = _facts(config), config.folder
    work = round_work(config, len(held_out))
    ahead = rounds_ahead(folder, rounds)
    gpu = _gpu(config)
    gpu_bytes = gpu.total_bytes if gpu else None
    rate = measured_rate(config, facts, gpu_bytes)
    return Plan(
        campaign=config.campaign,
        folder=str(folder),
        rounds=ahead,
        finished_stages=[name for name in work.stages if ahead and stage_path(folder, ahead[0], name).exists()],
        prompts=len(training),
        held_out_prompts=len(held_out),
        scorers=list(config.judge.scorers) if config.judge.labeller != "human" else [],
        sizes=[size or facts.native for size in config.sample.image_sizes],
        held_out_size=config.held_out_size or facts.native,
        work=work,
        timing=estimate(config, work, facts, gpu_bytes),
        gpu=gpu,
        cores=os.cpu_count() or 1,
        peak_gb=rate.peak_gb if rate else None,
        disk_bytes=disk_bytes(config, facts),
        free_bytes=free_bytes(config),
        downloads=downloads,
        problems=list(dict.fromkeys(str(problem) for problem in [*found, *refused])),
    )


def _or_empty(config: CampaignConfig) -> tuple[list[str], list[str]]:
    try:
        return check_prompts(config)
    except D3POError:  # it is among the problems
        return [], []


def _facts(config: CampaignConfig) -> ModelFacts:
    try:
        return facts_of(config.model)
    except D3POError:
        return ModelFacts()


def _gpu(config: CampaignConfig) -> Gpu | None:
    driver = find_driver()
    if config.model.device == "cpu" or why_no_gpu(driver, torch_build()) or not driver or not driver.gpus:
        return None
    return driver.gpus[0]


def _downloads(config: CampaignConfig) -> tuple[dict[str, int | None], list[D3POError]]:
    """Return the bytes of each download, and the errors of those that the hub did not answer for."""
    found: dict[str, int | None] = {}
    refused = []
    for download in missing_downloads(config):
        found[download.hub_id] = None
        try:
            found[download.hub_id] = download_bytes(download, files_of(download)) or None
        except D3POError as error:
            refused.append(error)
    return found, refused
