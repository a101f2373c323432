"""Checks that take a second or two, before anything heavy is imported or started."""

from collections.abc import Iterator

from d3po_core.config import CampaignConfig, TrainConfig
from d3po_core.devices import check_processes
from d3po_core.errors import D3POError
from d3po_core.machine.gpus import find_driver, torch_build, why_no_gpu
from d3po_core.models.asked import asked_by, why_not
from d3po_core.models.places import check_path, start_place
from d3po_core.models.written import require_space
from d3po_core.planning.downloads import files_of, missing_downloads
from d3po_core.planning.model_facts import ModelFacts, disk_bytes, facts_of
from d3po_core.sampling.prompts import check_held_out, load_prompts
from d3po_core.scorers.finding import check_scorer, check_scoring_gpus, check_sizes_scored
from d3po_core.store.campaign import CAMPAIGN_FILE, check_fits, rules_of

# On two CPU cores, a network of this size takes minutes per image.
LARGE_NETWORK = 400_000_000


def problems(config: CampaignConfig) -> Iterator[D3POError]:
    """Find what would stop a run, one error for each check that fails; the hub is not asked (``check_hub``)."""
    for check in (
        check_campaign_fits,
        check_prompts,
        check_scorers,
        check_learning,
        check_data_set,
        check_model_path,
        check_sizes,
        check_texts,
        check_disk,
        check_gpu,
        check_processes,
    ):
        try:
            check(config)
        except D3POError as error:
            yield error


def check_campaign_fits(config: CampaignConfig) -> None:
    """Check that the settings fit a campaign that has started already; D3POError if they do not."""
    if not (config.folder / CAMPAIGN_FILE).exists():
        return
    if "eta" not in config.sample.model_fields_set:  # then it is the model's own, known only once diffusers is loaded
        eta = rules_of(config.folder).sample.eta
        config = config.model_copy(update={"sample": config.sample.model_copy(update={"eta": eta})})
    check_fits(config)


def check_prompts(config: CampaignConfig) -> tuple[list[str], list[str]]:
    """Return the training prompts and the held-out prompts in use.

    Raises:
        D3POError: a file is missing or wrong, or both hold the same prompt.
    """
    training = load_prompts(config.sample.prompts, config.sample.prompt_column, "sample.prompts")
    held_out = load_prompts(config.evaluate.prompts, config.evaluate.prompt_column, "evaluate.prompts")
    check_held_out(training, held_out)
    return training, held_out[: config.evaluate.max_prompts]


def check_scorers(config: CampaignConfig) -> None:
    """Check that every scorer is known or can be imported, and gets the sizes it judges; D3POError if not."""
    for name in dict.fromkeys((*config.judge.scorers, *config.evaluation_scorers)):
        check_scorer(name, config.scoring)
    check_sizes_scored(config)
    check_scoring_gpus(config)


def check_learning(config: CampaignConfig) -> None:
    """Check that the objective exists and fits the other settings; D3POError if not."""
    usual = config.train == TrainConfig() and config.judge.rewards == "auto" and not config.sample.dataset
    if usual:  # needs no check, and torch a second to import
        return
    from d3po_core.training.objectives import check_objective

    check_objective(config)


def check_data_set(config: CampaignConfig) -> None:
    """Check that the data set of ``sample.dataset`` fits the campaign; D3POError if not."""
    if config.sample.dataset is None:  # torch takes a second to import
        return
    from d3po_core.datasets.checks import check_dataset

    check_dataset(config, load_prompts(config.evaluate.prompts, config.evaluate.prompt_column, "evaluate.prompts"))


def check_model_path(config: CampaignConfig) -> None:
    """Check that the model is a folder, a file or a hub id, and that its description can be read; D3POError if not.

    So too the LoRA to go on from.
    """
    check_path(config.model)
    start_place(config.model)
    facts_of(config.model)


def check_sizes(config: CampaignConfig) -> None:
    """Check that the model draws the sizes that are asked for; D3POError if it does not."""
    grid = facts_of(config.model).grid
    if grid is None:
        return
    sample, evaluate = config.sample, config.evaluate
    name = "sample.sizes: an image" if sample.sizes else "sample.height and sample.width: an image"
    for size in sample.image_sizes:
        if size:
            grid.check(size, name)
    if evaluate.height and evaluate.width:
        grid.check((evaluate.height, evaluate.width), "evaluate.height and evaluate.width: an image")


def check_texts(config: CampaignConfig) -> None:
    """Check that the model reads long prompts, and is led away from texts, as asked; D3POError if it cannot."""
    facts = facts_of(config.model)
    if problem := why_not(config.model, asked_by(config), facts.family, facts.guidance):
        raise D3POError(problem)


def check_disk(config: CampaignConfig) -> None:
    """Check that the disk has room for a round; D3POError if not."""
    require_space(config, disk_bytes(config, facts_of(config.model)))


def check_hub(config: CampaignConfig) -> None:
    """Check that the hub answers if a model must be downloaded; D3POError if it does not."""
    for download in missing_downloads(config):
        files_of(download)


def check_gpu(config: CampaignConfig) -> None:
    """Refuse a configuration meant for a GPU on a machine where torch can use none.

    Raises:
        D3POError: the device is ``cuda``, or it is ``auto`` and the settings or the model's size ask for a GPU.
    """
    if config.model.device == "cpu":
        return
    asks = gpu_settings(config, facts_of(config.model))
    missing = why_no_gpu(find_driver(), torch_build()) if asks else None
    if missing is None:
        return
    if config.model.device == "cuda":
        raise D3POError(f"model.device is 'cuda', and there is no GPU to use: {missing.why}; {missing.remedy}, or use "
                        "'auto' or 'cpu'")  # fmt: skip
    raise D3POError(
        f"these settings are meant for a GPU ({', '.join(asks)}), and there is none to use: {missing.why}; "
        f"{missing.remedy}, or run on the CPU all the same, which may take days: --set model.device=cpu"
    )


def gpu_settings(config: CampaignConfig, facts: ModelFacts) -> list[str]:
    """Return what in a configuration asks for a GPU, in words; empty if a CPU will do."""
    model = config.model
    asks = {
        "model.device cuda": model.device == "cuda",
        f"model.precision {model.precision}": model.precision != "no",
        "model.compile": model.compile,
        f"a network of {(facts.network_bytes or 0) / 1e9:.1f} GB": (facts.network_bytes or 0) > LARGE_NETWORK,
    }
    return [what for what, asked in asks.items() if asked]
