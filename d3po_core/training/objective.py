"""The interface of an objective: what it learns from, what it sees, and what it returns.

Tensor names carry their shape: R rows (one image at one step), P pairs of rows, U units of the loss (pairs or rows).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict

from d3po_core.config import TrainConfig

Labels = Literal["pairs", "numbers", "good_bad"]
Source = Literal["trajectory", "fresh_noise", "own_noise"]
Reference = Literal["any", "round_start", "none"]

EMPTY = torch.empty(0)


@dataclass(frozen=True)
class Rows:
    """A micro-batch of whole groups, each at one step, on the policy's device; unused tensors are empty.

    Attributes:
        step_R: index of each row's denoising step.
        cell_R: which group at which step the row belongs to, from 0.
        winner_P, loser_P: rows of each pair's images; weight_P: in (0, 1]; step_P: the pair's step.
        number_R: the image's advantage in its group, or 1 for good and -1 for bad.
        output_RCHW: the network's output, with gradient.
        base_RCHW: the base model's output, if ``needs_base``.
        target_RCHW: the output that leads to the image's x_0 (final images only).
        reference_RCHW: the reference's output (final images only).
        log_prob_R, mean_RCHW: of the stored step, with gradient (trajectories only).
        reference_log_prob_R, sampled_log_prob_R: under the reference, and under the sampler.
        sampled_mean_RCHW: the sampler's mean.
        step_weight_R: ``train.timestep_weighting``, times C*H*W if log_probs are sums.
        sigma_R: the step's standard deviation.
        kl_scale_R: the step's KL is this times the mean squared difference of two outputs.
        x0_scale_R: size of the change of x_0 per change of the output.
        noise_share_R: share of noise in x_t: noise / (signal + noise); a flow's t.
        kl_R: KL from the sampler's step, nats per element, without gradient; empty if unknown.
        update_mean: mean of ``statistic`` over the whole update, a number.
    """

    step_R: torch.Tensor
    cell_R: torch.Tensor
    winner_P: torch.Tensor
    loser_P: torch.Tensor
    weight_P: torch.Tensor
    step_P: torch.Tensor
    number_R: torch.Tensor = EMPTY
    output_RCHW: torch.Tensor = EMPTY
    base_RCHW: torch.Tensor = EMPTY
    target_RCHW: torch.Tensor = EMPTY
    reference_RCHW: torch.Tensor = EMPTY
    log_prob_R: torch.Tensor = EMPTY
    mean_RCHW: torch.Tensor = EMPTY
    reference_log_prob_R: torch.Tensor = EMPTY
    sampled_log_prob_R: torch.Tensor = EMPTY
    sampled_mean_RCHW: torch.Tensor = EMPTY
    step_weight_R: torch.Tensor = EMPTY
    sigma_R: torch.Tensor = EMPTY
    kl_scale_R: torch.Tensor = EMPTY
    x0_scale_R: torch.Tensor = EMPTY
    noise_share_R: torch.Tensor = EMPTY
    kl_R: torch.Tensor = EMPTY
    update_mean: torch.Tensor = EMPTY

    @cached_property
    def error_R(self) -> torch.Tensor:
        """Mean squared error of the output."""
        return squares(self.output_RCHW - self.target_RCHW)

    @cached_property
    def reference_error_R(self) -> torch.Tensor:
        """Mean squared error of the reference's output."""
        return squares(self.reference_RCHW - self.target_RCHW)

    @cached_property
    def rise_R(self) -> torch.Tensor:
        """How much larger the error is than the reference's."""
        return self.error_R - self.reference_error_R


@dataclass(frozen=True)
class Losses:
    """What an objective returns; only ``loss_U`` has a gradient.

    Attributes:
        loss_U: loss of each pair, or of each row if the objective does not learn from pairs.
        reward_R: how much the policy favours the row: a log-ratio, or how far its error fell below the reference's.
        factor_U: share of the gradient that is at work: sigmoid(-u) of logistic losses, 0 where a clip stops it.
        clipped_U: share of clipped ratios.
    """

    loss_U: torch.Tensor
    reward_R: torch.Tensor
    factor_U: torch.Tensor
    clipped_U: torch.Tensor

    @classmethod
    def plain(cls, loss_U: torch.Tensor, reward_R: torch.Tensor, factor_U: torch.Tensor | None = None) -> "Losses":
        """Return losses without a clip; without a factor, the whole gradient is at work."""
        factor = torch.ones_like(loss_U) if factor_U is None else factor_U
        return cls(loss_U, reward_R.detach(), factor.detach(), torch.zeros_like(loss_U.detach()))


class Objective(BaseModel):
    """An objective with its settings, which are its fields; its file's name is its name.

    Attributes:
        labels: pairs of images, a number per image, or good and bad images.
        source: the network's input: the stored x_t of a trajectory, with its step (``trajectory``) or with the noise
            that leads there from x_0 (``own_noise``), or the final image with fresh noise.
        guided: whether it trains the guided prediction, as sampled, or the conditional one alone.
        reference: ``any`` (``train.reference`` chooses), ``round_start`` (always the sampler), ``none``.
        shares_noise: whether all images of a group get the same noise at a step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    labels: ClassVar[Labels] = "pairs"
    source: ClassVar[Source] = "fresh_noise"
    guided: ClassVar[bool] = False
    reference: ClassVar[Reference] = "any"
    shares_noise: ClassVar[bool] = False

    def takes(self) -> Labels:
        """Return the labels that it learns from, with these settings."""
        return self.labels

    def needs_base(self) -> bool:
        """Return whether it needs the base model's outputs, besides those of its reference."""
        return False

    def needs_mean(self) -> bool:
        """Return whether it needs the mean of ``statistic`` over an update, which costs another pass."""
        return False

    def statistic(self, rows: Rows) -> torch.Tensor:
        """Return one number per unit, without gradient, whose mean over the update the loss needs."""
        raise NotImplementedError

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return the loss of every unit."""
        raise NotImplementedError


def squares(difference_RCHW: torch.Tensor) -> torch.Tensor:
    """Return the mean square over C, H, W, ``[R]``."""
    return (difference_RCHW**2).flatten(1).mean(dim=1)


def of_cell(value_R: torch.Tensor, cell_R: torch.Tensor) -> torch.Tensor:
    """Return for each row the mean over the rows of its group at its step, ``[R]``."""
    count = int(cell_R.max()) + 1 if len(cell_R) else 0
    sum_G, size_G = (value_R.new_zeros(count).index_add(0, cell_R, x) for x in (value_R, torch.ones_like(value_R)))
    return (sum_G / size_G)[cell_R]
