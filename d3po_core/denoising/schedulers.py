"""What a folder's scheduler means for the chain of DDIM steps that is trained, whatever class it is.

A scheduler's file says two things: which noise the network was trained with (betas, what it predicts, how many
timesteps), and how its own class walks from noise to image. The first always counts. Of the second only what DDIM can
do counts: which timesteps, clipping, and the last step's target. Everything else is refused, never left out.

``DDIMScheduler.from_config`` is no way to get there: it fills what another class does not have with DDIM's own
defaults, ``clip_sample=True`` among them.
"""

from collections.abc import Mapping
from typing import Any

from diffusers import DDIMScheduler

from d3po_core.errors import D3POError

# By class: whether its last step goes all the way to the clean image, where its file does not say.
_ENDS_CLEAN = {
    "DDIMScheduler": True, "DDIMParallelScheduler": True, "PNDMScheduler": False, "DDPMScheduler": True,
    "DDPMParallelScheduler": True, "EulerDiscreteScheduler": True, "EulerAncestralDiscreteScheduler": True,
    "HeunDiscreteScheduler": True, "LMSDiscreteScheduler": True, "KDPM2DiscreteScheduler": True,
    "KDPM2AncestralDiscreteScheduler": True, "DPMSolverMultistepScheduler": True, "DPMSolverSinglestepScheduler": True,
    "DPMSolverSDEScheduler": True, "DEISMultistepScheduler": True, "UniPCMultistepScheduler": True,
}  # fmt: skip
# Fields that ask for what the chain cannot do, and the value that asks for nothing.
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
    """The DDIM chain that a scheduler's configuration means.

    Args:
        config: of any scheduler of a model with a UNet, with its class's name and its class's defaults.
        prediction_type: what the network predicts, when it is known better than the file does.
        zero_snr: whether its last timestep is pure noise, likewise.

    Raises:
        D3POError: the scheduler asks for steps that are no such chain; one line that names the field.
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
    """Values that ask for the fixed variance, which eta decides here, or for nothing at all."""
    return field == "variance_type" and value in ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
