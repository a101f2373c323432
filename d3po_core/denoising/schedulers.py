"""Turn a folder's scheduler, of any class, into the chain of DDIM steps that is trained.

A scheduler's file describes the noise that the network was trained with (betas, prediction type, number of timesteps)
and its own path from noise to image. We always use the first. From the second we use only what DDIM can do: timesteps,
clipping, and the last step's target. We refuse everything else and never silently drop it.

``DDIMScheduler.from_config`` does not work here: it fills fields that another class lacks with DDIM's defaults, such as
``clip_sample=True``.
"""

from collections.abc import Mapping
from typing import Any

from diffusers import DDIMScheduler

from d3po_core.errors import D3POError

# By class: does the last step reach the clean image? Used if the file does not say.
_ENDS_CLEAN = {
    "DDIMScheduler": True, "DDIMParallelScheduler": True, "PNDMScheduler": False, "DDPMScheduler": True,
    "DDPMParallelScheduler": True, "EulerDiscreteScheduler": True, "EulerAncestralDiscreteScheduler": True,
    "HeunDiscreteScheduler": True, "LMSDiscreteScheduler": True, "KDPM2DiscreteScheduler": True,
    "KDPM2AncestralDiscreteScheduler": True, "DPMSolverMultistepScheduler": True, "DPMSolverSinglestepScheduler": True,
    "DPMSolverSDEScheduler": True, "DEISMultistepScheduler": True, "UniPCMultistepScheduler": True,
}  # fmt: skip
# Fields for features that the chain lacks, each with the value that turns the feature off.
_MUST_BE = {
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_flow_sigmas": False,
    "use_lu_lambdas": False, "thresholding": False, "use_dynamic_shifting": False, "sigma_min": None, "sigma_max": None,
    "variance_type": None, "timestep_type": "discrete", "interpolation_type": "linear",
}  # fmt: skip
_COPIED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
           "timestep_spacing", "steps_offset", "rescale_betas_zero_snr", "clip_sample",
           "clip_sample_range")  # fmt: skip
_PREDICTIONS = ("epsilon", "v_prediction", "sample")


def chain_of(
    config: Mapping[str, Any], prediction_type: str | None = None, zero_snr: bool | None = None
) -> DDIMScheduler:
    """Return the DDIM chain for a scheduler's configuration.

    Args:
        config: that of any UNet model's scheduler, with its class's name and defaults.
        prediction_type: the network's prediction type; overrides ``config``.
        zero_snr: whether the last timestep is pure noise; overrides ``config``.

    Raises:
        D3POError: the scheduler's steps do not form such a chain; one line that names the field.
    """
    name = str(config.get("_class_name"))
    if name not in _ENDS_CLEAN:
        distilled = " (a distilled model needs its own few steps)" if name in ("LCMScheduler", "TCDScheduler") else ""
        raise D3POError(
            f"scheduler {name}: its steps cannot be trained{distilled}; expected a model for DDIM, DDPM, PNDM, Euler, "
            "Heun, LMS, KDPM2, DPM-Solver, DEIS or UniPC"
        )
    wrong = _refusals(name, config)
    if wrong:
        raise D3POError(f"scheduler {name}: {'; '.join(wrong)} (scheduler/scheduler_config.json)")
    values = {field: config[field] for field in _COPIED if field in config and config[field] is not None}
    values.setdefault("clip_sample", False)
    values |= {"prediction_type": prediction_type} if prediction_type else {}
    values |= {"rescale_betas_zero_snr": zero_snr} if zero_snr is not None else {}
    if values.get("rescale_betas_zero_snr") and values.get("prediction_type") == "epsilon":
        raise D3POError(
            f"scheduler {name}: prediction_type epsilon with rescale_betas_zero_snr, where the first step divides by "
            "nothing; expected v_prediction or sample"
        )
    return DDIMScheduler(**values, set_alpha_to_one=_ends_clean(name, config))


def _ends_clean(name: str, config: Mapping[str, Any]) -> bool:
    if config.get("set_alpha_to_one") is not None:
        return bool(config["set_alpha_to_one"])
    return _ENDS_CLEAN[name] and config.get("final_sigmas_type", "zero") != "sigma_min"


def _refusals(name: str, config: Mapping[str, Any]) -> list[str]:
    wrong = [
        f"{field} is {config[field]!r}, which the trained steps cannot follow; expected {wanted!r}"
        for field, wanted in _MUST_BE.items()
        if field in config and config[field] != wanted and not _harmless(field, config[field])
    ]
    if (found := config.get("prediction_type", "epsilon")) not in _PREDICTIONS:
        wrong.append(f"prediction_type is {found!r}; expected one of {', '.join(_PREDICTIONS)}")
    if (found := config.get("timestep_spacing", "leading")) not in ("leading", "trailing", "linspace"):
        wrong.append(f"timestep_spacing is {found!r}; expected leading, trailing or linspace")
    if name.startswith("Euler") and config.get("timestep_spacing") == "trailing":
        wrong.append(
            "timestep_spacing is 'trailing', as distilled (Turbo, Lightning) models have it, which need their own few "
            "steps; if this one is not distilled, make it 'leading'"
        )
    for field, kind in (("num_train_timesteps", int), ("steps_offset", int), ("clip_sample", bool)):
        if field in config and type(config[field]) is not kind:
            wrong.append(f"{field} is {config[field]!r}; expected {kind.__name__}")
    betas, trained = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    if betas is not None and not (isinstance(betas, list) and len(betas) == trained):
        found = f"{len(betas)} numbers" if isinstance(betas, list) else repr(betas)
        wrong.append(f"trained_betas holds {found}; expected one for each of {trained} timesteps")
    return wrong


def _harmless(field: str, value: Any) -> bool:
    """Return whether a value asks for nothing, or for the fixed variance, which eta decides here."""
    return field == "variance_type" and value in ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
