"""The policy: a base model and the LoRA that is trained on it, the same for every family of models.

Tensor names carry their shape: B images, C H W latent channels, height, width.
"""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError

from d3po_core.compiling import BatchSizes, compile_regions, compile_whole, pad_rows
from d3po_core.config import ModelConfig
from d3po_core.ddim import Schedule
from d3po_core.decoder_attention import attend_by_products
from d3po_core.errors import D3POError
from d3po_core.families import Embedding, Family
from d3po_core.folded_upsampling import fold_upsampling
from d3po_core.fused_layers import (
    constants_held,
    fuse_attention,
    scale_group_norms,
    share_rows_until_text,
    split_gated_layers,
)
from d3po_core.loading import DTYPES, check_model, load_family
from d3po_core.row_limit import RowLimit
from d3po_core.seeds import gaussian
from d3po_core.weights import LORA_FILE, sort_metadata

__all__ = ["LORA_FILE", "Conditioning", "Policy", "check_model", "load_policy"]

MOST_EMBEDDINGS = 4096
# Gradients in fp16 vanish below 6e-8: the loss is multiplied before they are taken, and they are divided after. They
# overflow above 65504: then the factor shrinks, for good.
FP16_LOSS_SCALE, SHRINK = 2.0**12, 8.0
# At most so many image-steps are trained on, images sampled and images decoded at once.
TRAINED_ROWS = {"fast": None, "balanced": 16, "small": 2}
SAMPLED_ROWS = {"fast": None, "balanced": 16, "small": 4}
DECODED_ROWS = {"fast": 16, "balanced": 8, "small": 1}


@dataclass(frozen=True)
class Conditioning:
    """What the network is told of B prompts, of the empty prompt, and the guidance scale that joins the two."""

    embeddings: Embedding
    empty: Embedding
    guidance_scale: float

    @property
    def guided(self) -> bool:
        """Whether a pass has two rows an image, one of them for the empty prompt."""
        return self.guidance_scale != 1.0


class Policy:
    """A diffusion model whose LoRA is trained; with the LoRA switched off it is the base model."""

    def __init__(self, family: Family, config: ModelConfig, seed: int) -> None:
        self.config, self.family = config, family
        self.dtype = DTYPES[config.precision]
        self.accelerator = Accelerator(cpu=config.device == "cpu")
        self.device = self.accelerator.device
        self._embeddings: OrderedDict[str, Embedding] = OrderedDict()
        self._schedules: dict[tuple[int, float], Schedule] = {}
        self.loss_scale = self.first_loss_scale
        self.sizes = BatchSizes() if config.compile else None
        self.training_rows = RowLimit("training", TRAINED_ROWS[config.memory])
        self.sampling_rows = RowLimit("sampling", SAMPLED_ROWS[config.memory])
        pipeline = family.pipeline
        self._bare = getattr(pipeline, family.NETWORK)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        for part in (self._bare, pipeline.vae):
            part.to(memory_format=torch.channels_last)
        self._bare.to(self.device)
        for name in () if self._moves_parts else ("vae", *family.TEXT_PARTS):
            self._move(name, self.device)
        self._try_once()
        self._prepare_training(seed)
        self._make_fast()
        # Not wrapped for several processes: they sum their gradients once an update (trainer.py).
        self.network = self._bare.to(self.device)

    @property
    def _moves_parts(self) -> bool:
        return self.config.memory != "fast"

    def _move(self, name: str, device: torch.device | str) -> None:
        part = getattr(self.family.pipeline, name, None)
        if part is not None:
            part.to(device)

    @torch.no_grad()
    def _try_once(self) -> None:
        """Pass one row through every part, so that configurations that do not fit each other are known before any work.

        Raises:
            D3POError: a part fails, or gives something else than the next one needs.
        """
        latent_1CHW = gaussian(0, 1, *self.latent_shape).to(self.device)
        t_1 = torch.ones(1, dtype=torch.long, device=self.device)
        part = "text_encoder"
        try:
            embeddings = {name: value.to(self.dtype) for name, value in self.encode([""], 1.0).embeddings.items()}
            part = self.family.NETWORK
            output_1CHW = self.family.predict(self._bare, latent_1CHW.to(self.dtype), t_1, embeddings)
            if output_1CHW.shape != latent_1CHW.shape:
                raise ValueError(f"it gives {tuple(output_1CHW.shape)} for a latent of {tuple(latent_1CHW.shape)}")
            part = "vae"
            with self._on_device("vae"):
                self.family.decode(latent_1CHW)
        except (D3POError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a part says of a configuration that is not its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise D3POError(
                f"model.path {self.config.path!r}: its {part} fails in a first pass ({reason}); is its config.json "
                "that of its weights?"
            ) from None

    def _prepare_training(self, seed: int) -> None:
        config = self.config
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha or config.lora_rank,
            target_modules=list(config.lora_targets),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self._bare.add_adapter(lora)
            except ValueError as error:
                raise D3POError(f"model.lora_targets {list(config.lora_targets)}: {error}") from None
        for _, parameter in self.trainable_parameters():
            parameter.data = parameter.data.float()
        self._initial_lora = {k: v.clone() for k, v in get_peft_model_state_dict(self._bare).items()}

    def _make_fast(self) -> None:
        """What makes passes faster or smaller and leaves what they compute alone, up to rounding."""
        self._shared_rows = None
        if self.config.precision != "no":
            fuse_attention(self._bare)
            split_gated_layers(self._bare)
            for part in (self._bare, self.family.pipeline.vae.decoder):
                fold_upsampling(part)
            if self.family.READS_TEXT_BY_ATTENTION_ALONE:
                self._shared_rows = share_rows_until_text(self._bare)
        if self.config.memory == "small":
            self._bare.enable_gradient_checkpointing()
            self.family.pipeline.vae.enable_slicing()
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        if self.config.compile:
            decoder = self.family.pipeline.vae.decoder
            for part in (self._bare, decoder):
                scale_group_norms(part)
            attend_by_products(decoder, math.prod(self.latent_shape[1:]))
            compile_regions(self._bare, self.family.REGIONS)
            compile_whole(decoder)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""
        return self.family.latent_shape

    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and values of the LoRA's weights, in a fixed order."""
        return sorted((n, p) for n, p in self._bare.named_parameters() if p.requires_grad)

    def weights_changed(self) -> None:
        """Tell the policy that its trainable parameters have new values: those of a LoRA are used as they are."""

    def schedule(self, num_steps: int, eta: float) -> Schedule:
        """The model's denoising steps, on its device; sent there once: that waits for all that the device has to do."""
        if (num_steps, eta) not in self._schedules:
            self._schedules[num_steps, eta] = self.family.schedule(num_steps, eta).to(self.device)
        return self._schedules[num_steps, eta]

    def encode(self, prompts: list[str], guidance_scale: float) -> Conditioning:
        """Embed prompts; a prompt that was embedded lately does not pass through the text encoder again."""
        distinct = list(dict.fromkeys([*prompts, ""]))
        if any(prompt not in self._embeddings for prompt in distinct):
            self._embed(distinct)
        rows = [self._embeddings[prompt] for prompt in prompts]
        stacked = {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}
        empty = {name: value.to(self.device) for name, value in self._embeddings[""].items()}
        return Conditioning(stacked, empty, guidance_scale)

    @torch.no_grad()
    def _embed(self, prompts: list[str]) -> None:
        """Put embeddings of all these prompts into the memory of embeddings, and forget the oldest."""
        keep_on = self.device if self.config.memory == "fast" else torch.device("cpu")
        with self._on_device(*self.family.TEXT_PARTS):
            # One prompt at a time: a prompt's embedding then cannot depend on which others came with it.
            for prompt in prompts:
                if prompt not in self._embeddings:
                    embedding = self.family.embed(prompt, self.device)
                    self._embeddings[prompt] = {name: value.to(keep_on) for name, value in embedding.items()}
                self._embeddings.move_to_end(prompt)
        while len(self._embeddings) > max(MOST_EMBEDDINGS, len(prompts)):
            self._embeddings.popitem(last=False)

    @contextlib.contextmanager
    def _on_device(self, *parts: str) -> Iterator[None]:
        """Within this context these parts are on the device; afterwards they are off it again, if parts are moved."""
        if not self._moves_parts:
            yield
            return
        try:
            for part in parts:
                self._move(part, self.device)
            yield
        finally:
            for part in parts:
                self._move(part, "cpu")

    def predict(self, latent_BCHW: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The network's output at timesteps t_B, float32, with classifier-free guidance when its scale is not 1."""
        rows, embeddings = len(latent_BCHW), self._texts(conditioning)
        if self.sizes is not None:
            size = self.sizes.fitting(rows)
            latent_BCHW, t_B = pad_rows(latent_BCHW, size), pad_rows(t_B, size)
        if conditioning.guided:
            latent_BCHW, t_B = latent_BCHW.repeat(2, 1, 1, 1), t_B.repeat(2)
        if self._shared_rows is not None:
            self._shared_rows.come_twice = conditioning.guided
        output = self.family.predict(self.network, latent_BCHW.to(self.dtype), t_B, embeddings).float()
        if not conditioning.guided:
            return output[:rows]
        without_BCHW, with_BCHW = (half[:rows] for half in output.chunk(2))
        return without_BCHW + conditioning.guidance_scale * (with_BCHW - without_BCHW)

    def _texts(self, conditioning: Conditioning) -> Embedding:
        """What the network is told in a pass: with guidance the empty prompt's rows come first."""
        embeddings = conditioning.embeddings
        if self.sizes is not None:
            size = self.sizes.fitting(len(next(iter(embeddings.values()))))
            embeddings = {name: pad_rows(value, size) for name, value in embeddings.items()}
        if conditioning.guided:
            embeddings = {
                name: torch.cat([conditioning.empty[name].expand_as(value), value])
                for name, value in embeddings.items()
            }
        return {name: value.to(self.dtype) for name, value in embeddings.items()}

    @contextlib.contextmanager
    def steady(self, conditioning: Conditioning) -> Iterator[None]:
        """Within this context all passes have this conditioning and no gradient, and the LoRA stays as it is.

        What depends on nothing else is then computed once: the same function, bit by bit, and faster.
        """
        text_BLK = self._texts(conditioning)["encoder_hidden_states"]
        with torch.no_grad(), constants_held(self._bare, text_BLK):
            yield

    def decode(self, latent_BCHW: torch.Tensor) -> np.ndarray:
        """Images of final latents: uint8 ``[B, height, width, 3]``."""
        return self.decode_on_device(latent_BCHW).cpu().numpy()

    @torch.no_grad()
    def decode_on_device(self, latent_BCHW: torch.Tensor) -> torch.Tensor:
        """Images of final latents, uint8 ``[B, height, width, 3]``, where they were made: nobody waits for them."""
        # Images are 50 times larger than their latents: few at a time need little memory, and are as fast.
        rows = DECODED_ROWS[self.config.memory]
        with self._on_device("vae"):
            return torch.cat([self._decode(chunk, rows) for chunk in latent_BCHW.split(rows)])

    def _decode(self, latent_BCHW: torch.Tensor, rows: int) -> torch.Tensor:
        count = len(latent_BCHW)
        latent_BCHW = latent_BCHW.to(self.device, torch.float32)
        if self.sizes is not None:
            latent_BCHW = pad_rows(latent_BCHW, rows)
        image_BCHW = (self.family.decode(latent_BCHW)[:count].float() / 2 + 0.5).clamp(0, 1)
        return (image_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1)

    @property
    def first_loss_scale(self) -> float:
        """What an untrained policy multiplies its losses by."""
        return FP16_LOSS_SCALE if self.dtype == torch.float16 else 1.0

    def shrink_loss_scale(self) -> bool:
        """Whether an update's gradient overflowed in fp16 and is to be taken again, now with a smaller loss scale."""
        gradients = [p.grad for _, p in self.trainable_parameters() if p.grad is not None]
        if self.loss_scale <= 1 or bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all()):
            return False
        self.loss_scale /= SHRINK
        return True

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradient, scaled until all of an update's are there: see ``unscale``."""
        (loss * self.loss_scale).backward()

    def unscale(self) -> None:
        """Make the gradient that ``backward`` has gathered the loss's own; once an update."""
        if self.loss_scale != 1.0:
            for _, parameter in self.trainable_parameters():
                if parameter.grad is not None:
                    parameter.grad /= self.loss_scale

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Within this context the LoRA is off: the policy is the base model, at no cost in memory."""
        self._bare.disable_adapters()
        try:
            yield
        finally:
            self._bare.enable_adapters()

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Within this context the LoRA is added into the base weights: the same function, up to rounding, and faster.

        Only in full precision: rounding merged weights to half precision would move log_probs by more than training
        does. The base weights themselves come back afterwards, not a difference that drifts.
        """
        if self.config.precision != "no" or self.config.compile:
            yield
            return
        layers = [m for m in self._bare.modules() if isinstance(m, LoraLayer)]
        originals = [layer.get_base_layer().weight.data for layer in layers]
        try:
            for layer, original in zip(layers, originals, strict=True):
                layer.get_base_layer().weight.data = original + layer.get_delta_weight("default")
            with self.base():
                yield
        finally:
            for layer, original in zip(layers, originals, strict=True):
                layer.get_base_layer().weight.data = original

    def reset_weights(self) -> None:
        """Put the LoRA back to its seeded start, where it changes nothing."""
        self.loss_scale = self.first_loss_scale
        set_peft_model_state_dict(self._bare, self._initial_lora)

    def save_weights(self, folder: Path) -> Path:
        """Write the LoRA as the file that ``pipe.load_lora_weights(folder)`` reads; returns its path."""
        part = self.family.NETWORK
        state = {k: v.contiguous().cpu() for k, v in get_peft_model_state_dict(self._bare).items()}
        metadata = {"r": self.config.lora_rank, "lora_alpha": self.config.lora_alpha or self.config.lora_rank,
                    "target_modules": sorted(self.config.lora_targets)}  # fmt: skip
        layers = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": metadata}
        self.family.PIPELINE.save_lora_weights(folder, weight_name=LORA_FILE, **layers)
        sort_metadata(folder / LORA_FILE)
        return folder / LORA_FILE

    def load_weights(self, folder: Path) -> None:
        """Take the LoRA from a checkpoint folder.

        Raises:
            D3POError: the file is missing, damaged, or of another rank or other layers.
        """
        try:
            found = self.family.PIPELINE.lora_state_dict(folder, weight_name=LORA_FILE, local_files_only=True)
        except (OSError, SafetensorError) as error:
            raise D3POError(
                f"checkpoint {folder}: cannot be read ({error}); restore it or start a new campaign"
            ) from None
        state = found[0] if isinstance(found, tuple) else found
        state = {name.removeprefix(f"{self.family.NETWORK}."): value for name, value in state.items()}
        own = self._initial_lora
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            raise D3POError(
                f"checkpoint {folder}: its LoRA has other layers or another rank than model.lora_* asks for"
            )
        set_peft_model_state_dict(self._bare, state)


def load_policy(config: ModelConfig, seed: int) -> Policy:
    """Load the base model and give it an untrained LoRA, or make all of its network trainable.

    Args:
        config: where the model is and what of it is trained.
        seed: seed of the LoRA's initial weights.

    Raises:
        D3POError: no such model, or it cannot be read; one line that says what to do.
    """
    if config.train == "full":
        from d3po_core.full_policy import FullPolicy

        return FullPolicy(load_family(config), config, seed)
    return Policy(load_family(config), config, seed)
