"""Trains the embedded base model, a small Stable-Diffusion-shaped pipeline of the shapes world, from seeds.

    python data/shapes/train_base_model.py --out data/shapes/model          # one GPU: minutes
    python data/shapes/train_base_model.py --out /tmp/m --scale 0.01        # CPU smoke run

A quarter of the colours and of the shapes in the training captions are wrong on purpose: the model draws well and
obeys badly, which is what alignment by preferences is there to mend. Needs torch, diffusers and transformers only.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from d3po_core.scorers import shapes

MAX_TOKENS = 10
MISLABELLED = 0.25
EMPTY_PROMPTS = 0.12
VAE_STEPS, VAE_BATCH = 6_000, 128
UNET_STEPS, UNET_BATCH = 20_000, 512
LATENT_POOL = 131_072


def main() -> None:
    """Train the autoencoder, then text encoder and UNet; write the pipeline folder; print what it can do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of training steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer(args.out / "tokenizer")
    vae, text_encoder, unet = (part.to(device) for part in build_models(len(tokenizer)))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    train_vae(vae, round(VAE_STEPS * args.scale), device)
    train_unet(unet, text_encoder, vae, tokenizer, scheduler, round(UNET_STEPS * args.scale), device)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16)
    pipeline.save_pretrained(args.out)
    # Half precision is for the disk only: transformers would load the text encoder in the dtype that its file names,
    # diffusers the rest in float32, and the two do not mix.
    text_config = args.out / "text_encoder" / "config.json"
    text_config.write_text(text_config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    report(args.out, device)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges join each word of the shapes world into one token."""
    words = sorted({word for scene in shapes.all_scenes() for word in scene.prompt.split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in words:
        left = word[0]
        for i, letter in enumerate(word[1:], start=1):
            right = letter + "</w>" if i == len(word) - 1 else letter
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            if left not in vocabulary:
                vocabulary.append(left)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS})
    )
    return CLIPTokenizer.from_pretrained(folder)


def build_models(vocabulary_size: int) -> tuple[AutoencoderKL, CLIPTextModel, UNet2DConditionModel]:
    """The three untrained networks, in the shapes of Stable Diffusion 1.x, made small."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=shapes.IMAGE_SIZE,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=vocabulary_size - 2,
            eos_token_id=vocabulary_size - 1,
            pad_token_id=vocabulary_size - 1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=shapes.IMAGE_SIZE // 8,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return vae, text_encoder, unet


def train_loop(
    name: str, steps: int, peak_rate: float, parameters: list[torch.Tensor], loss_of_batch: Callable[[], torch.Tensor]
) -> list[torch.Tensor]:
    """Minimise a loss with AdamW, warm-up and cosine decay; returns the averaged weights.

    On a GPU one whole step is captured in a CUDA graph: the models are so small that launching their kernels from
    Python takes several times longer than running them.
    """
    device = parameters[0].device
    rate = torch.zeros((), device=device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, fused=on_gpu, capturable=on_gpu)
    averaged = [parameter.detach().clone() for parameter in parameters]
    forget = min(1.0, max(0.002, 20 / max(steps, 1)))
    loss_holder = torch.zeros((), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, forget)
            loss_holder.lerp_(loss.detach(), 0.02)

    run = step
    if on_gpu:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    started = time.perf_counter()
    for i in range(steps):
        rate.fill_(peak_rate * min(1, (i + 1) / 200) * 0.5 * (1 + math.cos(math.pi * i / steps)))
        run()
        if (i + 1) % max(1, steps // 10) == 0:
            seconds = time.perf_counter() - started
            print(f"{name} step {i + 1}/{steps} loss {loss_holder.item():.4f} {seconds:.0f} s", flush=True)
    return averaged


def random_scenes(count: int, device: torch.device) -> torch.Tensor:
    """Uniform (shape, colour, background) indices, ``[count, 3]``."""
    sizes = (len(shapes.SHAPES), len(shapes.COLOURS), len(shapes.BACKGROUNDS))
    return torch.stack([torch.randint(size, (count,), device=device) for size in sizes], dim=1)


def draw_scenes(scene_B3: torch.Tensor) -> torch.Tensor:
    """Images of the given scenes in [-1, 1], drawn with torch's default generator."""
    generator = torch.cuda.default_generators[0] if scene_B3.is_cuda else torch.default_generator
    return shapes.draw(*scene_B3.unbind(1), generator=generator) * 2 - 1


def train_vae(vae: AutoencoderKL, steps: int, device: torch.device) -> None:
    """Train the autoencoder on L1 with a small KL term, then set its scaling factor to give unit-variance latents."""
    parameters = list(vae.parameters())

    def loss_of_batch() -> torch.Tensor:
        image = draw_scenes(random_scenes(VAE_BATCH, device))
        posterior = vae.encode(image).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        error = reconstruction.float() - image
        return error.abs().mean() + error.square().mean() + 3e-5 * posterior.kl().float().mean()

    averaged = train_loop("vae", steps, 1.5e-3, parameters, loss_of_batch)
    load_averaged(parameters, averaged)
    with torch.no_grad():
        image = draw_scenes(random_scenes(512, device))
        mean = vae.encode(image).latent_dist.mean
        vae.register_to_config(scaling_factor=round(1 / mean.std().item(), 4))
        error = (vae.decode(mean).sample - image).abs().mean().item()
    print(f"vae: L1 {error:.4f} on [-1, 1], scaling factor {vae.config.scaling_factor}")


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
    steps: int,
    device: torch.device,
) -> None:
    """Train UNet and text encoder together to predict the noise, on captions of which some are wrong."""
    pool = LATENT_POOL if device.type == "cuda" else 2_048
    scene_N3 = random_scenes(pool, device)
    with torch.no_grad():
        latent_NCHW = torch.cat([vae.encode(draw_scenes(chunk)).latent_dist.mean for chunk in scene_N3.split(1024)])
    latent_NCHW *= vae.config.scaling_factor
    prompts = [scene.prompt for scene in shapes.all_scenes()] + [""]
    token_PL = tokenizer(
        prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids.to(device)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    alpha_T = scheduler.alphas_cumprod.to(device)
    colours, grounds = len(shapes.COLOURS), len(shapes.BACKGROUNDS)

    def mislabel(index_B: torch.Tensor, size: int) -> torch.Tensor:
        wrong = torch.rand(index_B.shape, device=device) < MISLABELLED
        other = (index_B + torch.randint(1, size, index_B.shape, device=device)) % size
        return torch.where(wrong, other, index_B)

    def loss_of_batch() -> torch.Tensor:
        pick = torch.randint(pool, (UNET_BATCH,), device=device)
        shape_B, colour_B, ground_B = scene_N3[pick].unbind(1)
        shape_B, colour_B = mislabel(shape_B, len(shapes.SHAPES)), mislabel(colour_B, colours)
        prompt_B = (shape_B * colours + colour_B) * grounds + ground_B
        empty_B = torch.rand(UNET_BATCH, device=device) < EMPTY_PROMPTS
        prompt_B = torch.where(empty_B, len(prompts) - 1, prompt_B)
        clean, noise = latent_NCHW[pick], torch.randn(UNET_BATCH, *latent_NCHW.shape[1:], device=device)
        t_B = torch.randint(len(alpha_T), (UNET_BATCH,), device=device)
        alpha = alpha_T[t_B][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        # The 73 prompts are encoded once and looked up: cheaper than encoding every row of the batch.
        embedding = text_encoder(token_PL).last_hidden_state[prompt_B]
        return (unet(noisy, t_B, embedding).sample.float() - noise).square().mean()

    averaged = train_loop("unet", steps, 1.5e-3, parameters, loss_of_batch)
    load_averaged(parameters, averaged)


def load_averaged(parameters: list[torch.Tensor], averaged: list[torch.Tensor]) -> None:
    """Copy averaged weights into the model."""
    with torch.no_grad():
        for parameter, average in zip(parameters, averaged, strict=True):
            parameter.copy_(average)


def report(folder: Path, device: torch.device) -> None:
    """Print size and obedience of the written pipeline: the share of 504 images drawn right."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [scene.prompt for scene in shapes.all_scenes()] * 7
    print(f"pipeline: {size / 2**20:.2f} MiB")
    for guidance, steps in ((1.0, 10), (1.0, 20), (3.0, 10), (3.0, 20)):
        images = pipeline(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            eta=1.0,
            output_type="pt",
            generator=torch.Generator().manual_seed(1),
        ).images
        right = shapes.drawn_right(images.float(), prompts).float().mean().item()
        print(f"guidance {guidance} steps {steps}: drawn right {right:.3f}")


if __name__ == "__main__":
    main()
