"""Scorers: programs that judge images in place of people.

A scorer is a function ``(images, prompts) -> scores``:

    images    uint8 array ``[B, height, width, 3]``, RGB
    prompts   list of B strings
    scores    B finite numbers, higher is better

The name in the configuration selects one of four kinds (docs/scorers.md):

    proxies   ``brightness``, ``jpeg_compressibility``, ...: no weights
    learned   ``aesthetic``, ``clip_score``, ``pickscore``, ``hpsv2``, ``image_reward``: weights by hub id or folder
    remote    any name that ``scoring.models`` maps to an http(s) URL
    your own  ``package.module:function``
"""

import functools
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable

import numpy as np

from d3po_core.config import CampaignConfig, ScoringConfig, is_url
from d3po_core.devices import device_type
from d3po_core.errors import D3POError
from d3po_core.paths import PROJECT_ROOT, find_project
from d3po_core.scorers.models import MODELS, ModelScorer, source_of
from d3po_core.scorers.proxies import brightness, jpeg_compressibility, jpeg_incompressibility, prompt_alignment
from d3po_core.sizes import Size, in_words
from d3po_core.urls import filled_in, inline_secret, masked

__all__ = [
    "BUILT_IN", "MODELS", "Scorer", "brightness", "check_scorer", "check_scoring_gpus", "check_sizes_scored",
    "jpeg_compressibility", "jpeg_incompressibility", "load_scorer", "prompt_alignment", "use_device",
]  # fmt: skip

# Libraries and this package: an error in them is told by the user's line that called them.
_NOT_THE_USERS = (*(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
                  str(PROJECT_ROOT / "d3po_core"))  # fmt: skip

Scorer = Callable[[np.ndarray, list[str]], np.ndarray]

BUILT_IN: dict[str, Scorer] = {
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
    "brightness": brightness,
    "prompt_alignment": prompt_alignment,
}

# Scorers that judge images of one size only, height and width in pixels.
ONE_SIZE: dict[str, Size] = {"prompt_alignment": (64, 64)}


def load_scorer(name: str, scoring: ScoringConfig | None = None, device: str = "auto", memory: str = "fast") -> Scorer:
    """Find a scorer by name; its results are checked at every call.

    A learned scorer's files are found here, and downloaded from the hub if needed. Its weights are read at the first
    call and kept for the life of the process.

    Args:
        name: as in ``judge.scorers``.
        scoring: locations of models and servers; defaults if not given.
        device: where learned scorers run: ``auto``, ``cpu`` or ``cuda``.
        memory: as ``model.memory``: unless ``fast``, a learned scorer leaves the device after each call.

    Raises:
        D3POError: no such scorer, or its model's files are missing or unsafe to read.
    """
    scoring = scoring or ScoringConfig()
    check_scorer(name, scoring)
    where = scoring.models.get(name)
    if name in BUILT_IN:
        return _checked(name, BUILT_IN[name])
    if where is not None and is_url(where):
        return _checked(name, _remote(name, where, scoring.batch_size, scoring.timeout_seconds, scoring.tries))
    if name in MODELS:
        where = where or MODELS[name].default
        return _checked(name, _model(name, where, device, scoring.batch_size, memory != "fast"))
    return _checked(name, _imported(name))


def check_scorer(name: str, scoring: ScoringConfig) -> None:
    """Check that a scorer can be found; its weights are neither read nor downloaded, and no server is called.

    Raises:
        D3POError: no such scorer, no such folder, or an address that holds a secret.
    """
    where = scoring.models.get(name)
    if name in BUILT_IN and where is not None:
        raise D3POError(
            f"scoring.models.{name} is {where!r}, but {name} is built in and takes neither weights nor a server"
        )
    if where is not None and is_url(where):
        _check_address(name, where)
    elif name in MODELS:
        source_of(name, where or MODELS[name].default)
    elif where is not None:
        raise D3POError(
            f"scoring.models.{name} is {where!r}; only {', '.join(MODELS)} have weights: expected an http(s) URL"
        )
    elif name not in BUILT_IN:
        _imported(name)


def check_sizes_scored(config: CampaignConfig) -> None:
    """Check that scorers that judge one size only get images of it; D3POError if they do not."""
    drawn = {"judge.scorers": config.sample.image_sizes, "the scorers of evaluation": (config.held_out_size,)}
    names = {"judge.scorers": config.judge.scorers, "the scorers of evaluation": config.evaluation_scorers}
    for where, sizes in drawn.items():
        for name in names[where]:
            only = ONE_SIZE.get(name)
            wrong = [size for size in sizes if only and size not in (None, only)]
            if only and wrong:
                raise D3POError(
                    f"{where} has {name}, which judges images of {in_words(only)} pixels only, and gets images of "
                    f"{in_words(wrong[0])}; take another scorer, or leave the size out"
                )


def check_scoring_gpus(config: CampaignConfig) -> None:
    """Check that GPUs kept for scorers have something to do.

    Raises:
        D3POError: no scorer of the judge would run there.
    """
    here = [name for name in config.judge.scorers if name in MODELS and not is_url(config.scoring.models.get(name, ""))]
    if config.scoring.gpus and not here:
        raise D3POError(
            f"scoring.gpus is {config.scoring.gpus} but judge.scorers ({', '.join(config.judge.scorers) or 'none'}) "
            f"names no learned scorer that runs here; expected one of {', '.join(MODELS)}, or scoring.gpus 0"
        )


def use_device(names: Iterable[str], scoring: ScoringConfig, device: str) -> str:
    """Return the device type, ``cuda`` or ``cpu``, that these scorers occupy."""
    learned = any(name in MODELS and not is_url(scoring.models.get(name, "")) for name in names)
    return device_type(device) if learned else "cpu"


# Cached for the life of the process, so that weights are read once and connections stay open.
_model = functools.cache(ModelScorer)


def _check_address(name: str, url: str) -> None:
    if secret := inline_secret(url):
        raise D3POError(
            f"scoring.models.{name} is {masked(url)!r}, which holds {secret}: it would be written into the campaign, "
            "the report, MLflow and Prefect; put it in the environment and its name in the address, such as "
            "https://${SCORER_LOGIN}@host/score or https://host/score?api_key=${SCORER_KEY}"
        )
    filled_in(url, f"scoring.models.{name}")  # report missing variables now, not after sampling


@functools.cache
def _remote(name: str, url: str, batch_size: int, timeout_seconds: float, tries: int) -> Scorer:
    from d3po_core.scorers.remote import RemoteScorer

    return RemoteScorer(name, url, batch_size, timeout_seconds, tries)


def _imported(name: str) -> Scorer:
    module_name, separator, function_name = name.partition(":")
    if not separator:
        raise D3POError(
            f"scorer {name!r} is not known; expected one of {', '.join([*BUILT_IN, *MODELS])}, "
            "package.module:function, or a name that scoring.models maps to an http(s) URL"
        )
    project = str(find_project() or "")
    if project and project not in sys.path:
        sys.path.append(project)  # last, so that no file of the project stands in for an installed module
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # importing the user's module may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise D3POError(
            f"scorer {name!r} cannot be imported ({reason}{_place(error)}); "
            "is it in the project folder or on PYTHONPATH?"
        ) from error
    if not callable(function):
        raise D3POError(
            f"scorer {name!r} is a {type(function).__name__}; expected a function (images, prompts) -> scores"
        )
    return function


def _place(error: Exception) -> str:
    """Return ``, in FILE line N`` of the innermost frame in a user's own file; empty if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(("<", *_NOT_THE_USERS))]
    return f", in {own[-1].filename} line {own[-1].lineno}" if own else ""


def _checked(name: str, scorer: Scorer) -> Scorer:
    def score(images: np.ndarray, prompts: list[str]) -> np.ndarray:
        try:
            scores = np.asarray(scorer(images, prompts), dtype=np.float64)
        except D3POError:
            raise
        except Exception as error:
            raise D3POError(f"scorer {name!r} failed: {type(error).__name__}: {error}{_place(error)}") from error
        if scores.shape != (len(images),):
            raise D3POError(
                f"scorer {name!r} returned shape {list(scores.shape)}; expected one number for each of {len(images)}"
            )
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise D3POError(f"scorer {name!r} returned {scores[bad]} for image {bad}; expected finite numbers")
        return scores

    return score


def load_scorers(config: CampaignConfig, names: Iterable[str]) -> dict[str, Scorer]:
    """Return the campaign's scorers by name, each loaded once.

    Raises:
        D3POError: a scorer is missing.
    """
    model = config.model
    return {name: load_scorer(name, config.scoring, model.device, model.memory) for name in names}
