"""What a round does, in numbers: images, pairs, updates, held-out images."""

import math
from dataclasses import dataclass

from d3po_core.config import CampaignConfig, TrainConfig

BASE_STAGES = ("evaluate", "guard", "publish")  # round 0
STAGES = ("sample", "judge", "derive", "train", *BASE_STAGES)
STAGES_WITH_PEOPLE = ("sample", "judge", "label", "derive", "train", *BASE_STAGES)


@dataclass(frozen=True)
class Work:
    """A round's counts. Pairs and updates are the most that can be: ties teach nothing, and leave groups out.

    Attributes:
        groups: groups of images that are sampled, each of one prompt.
        imported: groups of a data set; each counts as a pair.
        images: images that are sampled.
        pairs_judged: pairs of images that are compared; as many end as a pair or a tie if programs judge.
        pairs: pairs to train on, at most.
        updates: optimizer steps, at most.
        held_out_images: images that the checkpoint is evaluated on.
        stages: the stages in order.
    """

    groups: int
    imported: int
    images: int
    pairs_judged: int
    pairs: int
    updates: int
    held_out_images: int
    stages: tuple[str, ...]

    @property
    def trained_images(self) -> int:
        """Return the images that training passes over."""
        return self.images + 2 * self.imported


def round_work(config: CampaignConfig, held_out_prompts: int) -> Work:
    """Return what a round after round 0 does; ``held_out_prompts`` is how many its file has."""
    sample = config.sample
    compared = sample.sampled_groups * math.comb(sample.group_size, 2)
    used = compared if config.judge.pairs == "all" else sample.sampled_groups
    return Work(
        groups=sample.sampled_groups,
        imported=sample.imported_groups,
        images=sample.images_per_round,
        pairs_judged=compared,
        pairs=used + sample.imported_groups,
        updates=count_updates(sample.groups_per_round, config.train),
        held_out_images=min(held_out_prompts, config.evaluate.max_prompts) * config.evaluate.images_per_prompt,
        stages=STAGES if config.judge.labeller == "proxy" else STAGES_WITH_PEOPLE,
    )


def count_updates(groups: int, config: TrainConfig) -> int:
    """Return the number of optimizer steps on this many groups that have a pair."""
    if config.updates_per_round == "one_per_group":
        return groups * config.epochs
    return min(groups, config.updates_per_round // config.epochs) * config.epochs
