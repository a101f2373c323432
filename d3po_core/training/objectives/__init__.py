"""Training objectives by their names in ``train.objective``: one file each, found by the file's name.

To add one, write a file here with a subclass of ``Objective``. Its fields are the objective's settings.
"""

import importlib
import pkgutil

from pydantic import ValidationError

from d3po_core.config import CampaignConfig, TrainConfig
from d3po_core.errors import D3POError
from d3po_core.training.objective import Objective


def _found() -> dict[str, type[Objective]]:
    classes: dict[str, type[Objective]] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = importlib.import_module(f"{__name__}.{name}")
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        classes[name] = next(kind for kind in own if isinstance(kind, type) and issubclass(kind, Objective))
    return classes


OBJECTIVES: dict[str, type[Objective]] = _found()

# Fields of ``train`` that only Eq. 14 reads.
OF_D3PO = ("beta", "clip", "clip_range", "log_prob")


def make_objective(config: TrainConfig) -> Objective:
    """Return the configured objective with its settings.

    Raises:
        D3POError: it is unknown, or has no such setting, or a value is out of range; one line.
    """
    name = config.objective
    if name not in OBJECTIVES:
        raise D3POError(f"train.objective is {name!r}; expected one of {', '.join(OBJECTIVES)}")
    try:
        return OBJECTIVES[name].model_validate(config.settings)
    except ValidationError as error:
        known = ", ".join(OBJECTIVES[name].model_fields) or "none"
        told = "; ".join(
            f"train.settings.{'.'.join(map(str, problem['loc']))} is {problem['input']!r}: {problem['msg']}"
            for problem in error.errors()
        )
        raise D3POError(f"{told}; settings of {name}: {known}") from None


def check_objective(config: CampaignConfig) -> None:
    """Check that the objective exists and fits the other settings, before anything is sampled.

    Raises:
        D3POError: it does not; one line.
    """
    train, objective = config.train, make_objective(config.train)
    if train.objective != "d3po":
        changed = [name for name in OF_D3PO if getattr(train, name) != TrainConfig.model_fields[name].default]
        if changed:
            raise D3POError(
                f"train.{changed[0]} is {getattr(train, changed[0])!r} but train.objective is {train.objective!r}, "
                f"which does not read it; leave it out (settings of {train.objective} are in train.settings: "
                f"{', '.join(type(objective).model_fields) or 'none'})"
            )
    if train.reference == "base" and objective.reference != "any":
        told = {"none": "has no reference", "round_start": "learns from the policy that sampled the round"}
        raise D3POError(
            f"train.reference is 'base' but {train.objective} {told[objective.reference]}; set it to 'round_start'"
        )
    trained = config.sample.num_steps
    if train.steps_per_image is not None and train.steps_per_image > trained:
        raise D3POError(
            f"train.steps_per_image is {train.steps_per_image} but an image has {trained} steps (sample.num_steps); "
            "give at most as many"
        )
    if config.sample.dataset and objective.source != "fresh_noise":
        fitting = [name for name, kind in OBJECTIVES.items() if kind.source == "fresh_noise"]
        raise D3POError(
            f"train.objective is {train.objective!r}, which learns from trajectories, and images of sample.dataset "
            f"{config.sample.dataset!r} have none; set it to one of {', '.join(fitting)}"
        )
    if config.judge.rewards == "scores" and config.judge.labeller == "human" and objective.takes() != "pairs":
        raise D3POError(
            f"{train.objective} learns from a number per image, judge.rewards is 'scores', but with judge.labeller "
            "'human' no scorer decides; set judge.rewards to 'win_rate' or 'bradley_terry'"
        )
