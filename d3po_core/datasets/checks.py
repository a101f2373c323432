"""Check that a campaign can train on a data set, before anything is computed."""

from d3po_core.config import CampaignConfig
from d3po_core.datasets.stored import one_size, open_dataset, vae_sha256
from d3po_core.errors import D3POError
from d3po_core.sampling.prompts import prompts_among
from d3po_core.sizes import Size, in_words
from d3po_core.training.objectives import make_objective


def check_dataset(config: CampaignConfig, held_out: list[str]) -> None:
    """Check that the data set of ``sample.dataset``, if any, fits the campaign.

    Args:
        config: the campaign's configuration.
        held_out: the held-out prompts.

    Raises:
        D3POError: it is not there, another VAE encoded it, people judge the campaign, a scorer has its name, its labels
            do not fit the objective, or it holds a held-out prompt; one line.
    """
    if config.sample.dataset is None:
        return
    dataset = open_dataset(config.sample.dataset)
    if config.judge.labeller != "proxy":
        raise D3POError(
            f"sample.dataset is {config.sample.dataset!r} and judge.labeller is {config.judge.labeller!r}, but people "
            "do not judge rounds that hold images of a data set; set judge.labeller to 'proxy', or leave the data set "
            "out"
        )
    if dataset.name in config.judge.scorers:
        raise D3POError(
            f"sample.dataset {config.sample.dataset!r} has the name of a scorer of judge.scorers, and judgements are "
            "told apart by these names; import it under another --name"
        )
    objective, kinds = make_objective(config.train), dataset.facts["groups"].keys()
    if objective.takes() == "numbers" and config.judge.rewards == "scores" and kinds != {"score"}:
        raise D3POError(
            f"{config.train.objective} learns from a number per image, judge.rewards is 'scores', and the data set "
            f"{dataset.name!r} has none for its groups of kind {', '.join(sorted(kinds - {'score'}))}; set "
            "judge.rewards to 'auto'"
        )
    vae = vae_sha256(config.model)
    if vae is not None and vae != dataset.facts["vae_sha256"]:
        raise D3POError(
            f"sample.dataset {config.sample.dataset!r} was encoded by the VAE of {dataset.facts['model']!r}, which is "
            f"not that of model.path {config.model.path!r}; import it for this model under another --name"
        )
    size, encoded = one_size(config), dataset.facts.get("size")
    encoded = (encoded[0], encoded[1]) if encoded else None
    if size != encoded:
        raise D3POError(
            f"sample.dataset {config.sample.dataset!r} was encoded at {_pixels(encoded)}, and the campaign draws "
            f"{_pixels(size)} (sample.height, sample.width); set them to the data set's, or import it for this size "
            "under another --name"
        )
    if both := prompts_among(dataset.prompts(), held_out):
        raise D3POError(
            f"{len(both)} prompts of the data set {dataset.name!r} are in evaluate.prompts ({both[0]!r} first); "
            "evaluate on others, or the held-out score says nothing"
        )


def _pixels(size: Size | None) -> str:
    return f"{in_words(size)} pixels" if size else "the network's native size"
