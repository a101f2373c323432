"""The policy: a base model and its trained weights, the same for every model family.

Tensor names carry their shape: B images, C H W latent channels, height, width.
"""

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from d3po_core.config import ModelConfig
from d3po_core.denoising.ddim import Schedule
from d3po_core.errors import D3POError
from d3po_core.models.asked import Asked, why_not
from d3po_core.models.conditioning import Conditioning, TextReader
from d3po_core.models.families import Embedding, Family
from d3po_core.models.loading import DTYPES
from d3po_core.models.lora import Lora
from d3po_core.models.loss_scale import LossScale
from d3po_core.models.memory import PLANS, Card, MemoryPlan
from d3po_core.models.placement import Placement
from d3po_core.models.text_cache import TextCache
from d3po_core.models.trained import Trained
from d3po_core.models.whole import Whole
from d3po_core.seeds import gaussian
from d3po_core.sizes import Size
from d3po_core.speed.compiling import BatchSizes, compile_regions, compile_whole, pad_rows
from d3po_core.speed.decoder_attention import attend_by_products
from d3po_core.speed.folded_upsampling import fold_upsampling
from d3po_core.speed.fused_layers import (
    constants_held,
    fuse_attention,
    scale_group_norms,
    share_rows_until_text,
    split_gated_layers,
)
from d3po_core.speed.row_limit import RowLimit


class Policy:
    """A diffusion model in training.

    Attributes:
        network: the part that is trained; passes call it.
        weights: the weights that training changes.
        loss_scale: the factor on losses.
        plan: how it shares the GPU's memory.

    Args:
        family: the loaded base model.
        config: its settings.
        seed: seed of the LoRA's initial weights.
        plan: how to share the GPU's memory; by default what ``model.memory`` says, and ``auto`` measures it.
        asked: the sizes and texts that its campaign draws.
    """

    def __init__(
        self, family: Family, config: ModelConfig, seed: int, plan: MemoryPlan | None = None, asked: Asked | None = None
    ) -> None:
        self.config, self.family, self.asked = config, family, asked or Asked()
        if problem := why_not(config, self.asked, family.PIPELINE.__name__, family.guidance):
            raise D3POError(problem)
        self.dtype = DTYPES[config.precision]
        self.accelerator = Accelerator(cpu=config.device == "cpu")
        self.device = self.accelerator.device
        self._schedules: dict[tuple[int, float, Size | None], Schedule] = {}
        self.sizes: BatchSizes | None = None  # set at the end: memory is measured for exact numbers of rows
        pipeline = family.pipeline
        self.network = getattr(pipeline, family.NETWORK)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        for part in (self.network, pipeline.vae):
            _channels_last(part)
        self.network.to(self.device)
        measures = plan is None and config.memory == "auto" and self.device.type == "cuda"
        self.plan = plan or PLANS["small" if measures else "fast" if config.memory == "auto" else config.memory]
        self._place(self.plan.stays)
        self.use(self.plan)
        self._try_once()
        self.weights: Trained = (
            Whole(self.network, family, self.dtype, self.device)
            if config.train == "full"
            else Lora(self.network, family, config, seed)
        )
        self.loss_scale = LossScale(self.dtype, self.weights)
        self._make_fast()
        # Not wrapped for several processes: they sum their gradients once per update (trainer.py).
        self.network.to(self.device)
        if measures:
            from d3po_core.models.fitting import fitted_plan

            fitted_plan(self, Card())
        if self.device.type == "cuda" and config.precision != "no":
            self.sizes = BatchSizes(ratio=2)
        if config.compile:
            self._compile()

    def use(self, plan: MemoryPlan) -> None:
        """Share the GPU's memory by a plan, from the next pass on."""
        if plan.stays != self.plan.stays:
            self._place(plan.stays)
        self.plan = plan
        self.training_rows = RowLimit("training", plan.trained)
        self.sampling_rows = RowLimit("sampling", plan.sampled)
        if plan.recomputes:
            self.network.enable_gradient_checkpointing()
        else:
            self.network.disable_gradient_checkpointing()

    def _place(self, stays: bool) -> None:
        """Put idle parts on the device, or into main memory."""
        place = self.device if stays else torch.device("cpu")
        self._placement = Placement(self.family.pipeline, self.device, moves=not stays)
        for name in ("vae", *self.family.TEXT_PARTS):
            self._placement.move(name, place)
        cache = TextCache(self.family, self._placement, self.device, keep_on=place)
        self._reader = TextReader(self.family, self.asked, cache, self.device)

    def memory_used(self) -> dict[str, Any]:
        """Return the plan with the rows at once that training and sampling were cut to, for records."""
        cut = replace(self.plan, trained=self.training_rows.most, sampled=self.sampling_rows.most)
        return asdict(cut)

    @torch.no_grad()
    def _try_once(self) -> None:
        """Pass one row through every part, so that mismatched configurations fail before any work.

        Raises:
            D3POError: a part fails, or its output does not fit the next part.
        """
        latent_1CHW = gaussian(0, 1, *self.largest_latent).to(self.device)
        t_1 = torch.ones(1, dtype=torch.long, device=self.device)
        part = "text_encoder"
        try:
            embeddings = self._texts(self.encode([""], 1.0))
            part = self.family.NETWORK
            output_1CHW = self.family.predict(self.network, latent_1CHW.to(self.dtype), t_1, embeddings)
            if output_1CHW.shape != latent_1CHW.shape:
                raise ValueError(f"it gives {tuple(output_1CHW.shape)} for a latent of {tuple(latent_1CHW.shape)}")
            part = "vae"
            with self._placement.on_device("vae"):
                self.family.decode(latent_1CHW)
        except (D3POError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # parts raise anything on a wrong configuration
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise D3POError(
                f"model.path {self.config.path!r}: its {part} fails in a first pass ({reason}); is its config.json "
                "that of its weights?"
            ) from None

    def _make_fast(self) -> None:
        """Make passes faster; their results stay the same up to rounding."""
        self._shared_rows = None
        if self.config.precision != "no":
            fuse_attention(self.network)
            split_gated_layers(self.network)
            for part in (self.network, self.family.pipeline.vae.decoder):
                fold_upsampling(part)
            if self.family.READS_TEXT_BY_ATTENTION_ALONE:
                self._shared_rows = share_rows_until_text(self.network)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True

    def _compile(self) -> None:
        """Compile the passes, last of all: code is made for exact numbers of rows."""
        self.sizes = BatchSizes()
        decoder = self.family.pipeline.vae.decoder
        for part in (self.network, decoder):
            scale_group_norms(part)
        attend_by_products(decoder, math.prod(self.largest_latent[1:]))
        compile_regions(self.network, self.family.REGIONS)
        compile_whole(decoder)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent of the network's native size: channels first."""
        return self.family.latent_shape

    def latent_shape_at(self, size: Size | None) -> tuple[int, ...]:
        """Return the shape of one latent of an image of this height and width in pixels; None is the native size."""
        return self.latent_shape if size is None else self.family.latent_shape_at(*size)

    @property
    def largest_latent(self) -> tuple[int, ...]:
        """Shape of the largest latent that the campaign draws, which takes the most memory."""
        return max((self.latent_shape_at(size) for size in self.asked.sizes), key=math.prod)

    def schedule(self, num_steps: int, eta: float, size: Size | None = None) -> Schedule:
        """Return the denoising steps of images of a size, on the model's device.

        They are cached, because a copy waits for all device work.
        """
        key = (num_steps, eta, size)
        if key not in self._schedules:
            made = self.family.schedule(num_steps, eta, self.latent_shape_at(size))
            self._schedules[key] = made.to(self.device)
        return self._schedules[key]

    def encode(self, prompts: list[str], guidance_scale: float) -> Conditioning:
        """Embed prompts; recent ones come from a cache.

        Raises:
            D3POError: guidance is asked of a model that was distilled without any.
        """
        guidance = self.family.guidance
        if guidance == "none" and guidance_scale != 1.0:
            raise D3POError(
                f"sample.guidance_scale is {guidance_scale:g}, and model.path {self.config.path!r} takes no "
                "guidance: it was distilled to draw without; set it to 1"
            )
        return self._reader.conditioning(prompts, guidance_scale)

    def predict(self, latent_BCHW: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the network's output at timesteps t_B in float32, with classifier-free guidance if scale is not 1."""
        if conditioning.parts:
            return self._predict_parts(latent_BCHW, t_B, conditioning)
        rows, embeddings = len(latent_BCHW), self._texts(conditioning)
        if self.sizes is not None:
            size = self._fitting(rows)
            latent_BCHW, t_B = pad_rows(latent_BCHW, size), pad_rows(t_B, size)
        if conditioning.guided:
            latent_BCHW, t_B = torch.cat([latent_BCHW, latent_BCHW]), t_B.repeat(2)
        if self._shared_rows is not None:
            self._shared_rows.come_twice = conditioning.guided
        output = self.family.predict(self.network, latent_BCHW.to(self.dtype), t_B, embeddings).float()
        if not conditioning.guided:
            return output[:rows]
        without_BCHW, with_BCHW = (half[:rows] for half in output.chunk(2))
        return self.family.guide(without_BCHW, with_BCHW, conditioning.guidance_scale)

    def _predict_parts(self, latent_BCHW: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the outputs of rows whose texts have unequal length, one pass for each length."""
        rows_B = torch.cat([rows for rows, _ in conditioning.parts])
        outputs = [self.predict(latent_BCHW[rows], t_B[rows], part) for rows, part in conditioning.parts]
        return torch.cat(outputs)[rows_B.argsort()]

    def _texts(self, conditioning: Conditioning) -> Embedding:
        """Return the embeddings for one pass; with guidance, the negative prompt's rows come first."""
        embeddings = conditioning.embeddings
        if self.sizes is not None:
            size = self._fitting(len(next(iter(embeddings.values()))))
            embeddings = {name: pad_rows(value, size) for name, value in embeddings.items()}
        if conditioning.guided:
            embeddings = {
                name: torch.cat([conditioning.empty[name].expand_as(value), value])
                for name, value in embeddings.items()
            }
        if conditioning.guidance == "told":
            (rows,) = {len(value) for value in embeddings.values()}
            embeddings = embeddings | {"guidance": torch.full((rows,), conditioning.guidance_scale, device=self.device)}
        states = {name: value.to(self.dtype) for name, value in embeddings.items() if value.is_floating_point()}
        return embeddings | states  # masks stay as they are

    def _fitting(self, rows: int) -> int:
        """Return the size to pad a batch to."""
        assert self.sizes is not None
        limit = self.training_rows if torch.is_grad_enabled() else self.sampling_rows
        return self.sizes.fitting(rows, limit.most)

    @contextlib.contextmanager
    def steady(self, conditioning: Conditioning) -> Iterator[None]:
        """Fix conditioning and LoRA, and disable gradients, within this context.

        Values that depend only on these are computed once. This is faster, and bit for bit the same.
        """
        if conditioning.parts:  # each has a text of its own
            with torch.no_grad():
                yield
            return
        with torch.no_grad():
            text_BLK = self._texts(conditioning)[self.family.TEXT_STATES]
            with constants_held(self.network, text_BLK):
                yield

    def decode(self, latent_BCHW: torch.Tensor) -> np.ndarray:
        """Decode final latents to uint8 images ``[B, height, width, 3]``."""
        return self.decode_on_device(latent_BCHW).cpu().numpy()

    @torch.no_grad()
    def decode_on_device(self, latent_BCHW: torch.Tensor) -> torch.Tensor:
        """Decode final latents to uint8 images ``[B, height, width, 3]`` on the device, without waiting for it."""
        # Images are 50 times larger than their latents; small chunks save memory and are as fast.
        rows = self.plan.decoded
        with self._placement.on_device("vae"):
            return torch.cat([self._decode(chunk, rows) for chunk in latent_BCHW.split(rows)])

    def _decode(self, latent_BCHW: torch.Tensor, rows: int) -> torch.Tensor:
        count = len(latent_BCHW)
        latent_BCHW = latent_BCHW.to(self.device, torch.float32)
        if self.sizes is not None:
            latent_BCHW = pad_rows(latent_BCHW, rows)
        image_BCHW = (self.family.decode(latent_BCHW)[:count].float() / 2 + 0.5).clamp(0, 1)
        return (image_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1)

    def base(self) -> AbstractContextManager[None]:
        """Make the policy the base model within this context."""
        return self.weights.base()

    def merged(self) -> AbstractContextManager[None]:
        """Speed up passes without gradient within this context; results are the same up to rounding.

        Used in full precision only: rounding merged weights to half precision would change log_probs more than
        training does.
        """
        plain = self.config.precision == "no" and not self.config.compile
        return self.weights.merged() if plain else contextlib.nullcontext()

    def reset(self) -> None:
        """Reset trained weights and loss scale to their start, where the policy is the base model."""
        self.loss_scale.factor = self.loss_scale.first
        self.weights.reset()


def _channels_last(part: torch.nn.Module) -> None:
    """Lay out a part's weights for convolutions over images; other numbers of dimensions keep their layout."""
    for weight in (*part.parameters(), *part.buffers()):
        if weight.ndim == 4:
            weight.data = weight.data.to(memory_format=torch.channels_last)
