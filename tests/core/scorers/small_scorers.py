"""Folders of small learned scorers with random weights, in the format of the large ones."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import BertTokenizer, BlipConfig, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from d3po_core.paths import PROJECT_ROOT

SIDE, FEATURES, TOKENS = 32, 8, 10
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
HEAD = (7, 5, 1)


def clip_config(**changes: Any) -> CLIPConfig:
    text = {"vocab_size": 116, "max_position_embeddings": TOKENS, "bos_token_id": 114, "eos_token_id": 115}
    shape = {"projection_dim": FEATURES, **SIZES, **changes}
    vision = {**shape, "image_size": SIDE, "patch_size": 8}
    return CLIPConfig(text_config={**shape, **text}, vision_config=vision, projection_dim=FEATURES)


def clip_folder(folder: Path, seed: int = 0, **changes: Any) -> CLIPModel:
    """A small CLIP, with the tokenizer of the shapes world, as save_pretrained writes it."""
    torch.manual_seed(seed)
    model = CLIPModel(clip_config(**changes)).eval()
    for name, parameter in model.named_parameters():
        if name != "logit_scale":  # large, so that images and prompts are far apart
            parameter.data = torch.randn_like(parameter) / (parameter.shape[-1] ** 0.5)
    model.logit_scale.data.fill_(2.5)
    model.save_pretrained(folder)
    prepare = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    prepare.save_pretrained(folder)
    for path in (PROJECT_ROOT / "data/shapes/model/tokenizer").iterdir():
        shutil.copy(path, folder)
    return model


def random_head(width: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Linear layers under the published names, which leave numbers out where dropout was."""
    torch.manual_seed(seed)
    head = {}
    for number, size in zip((0, 2, 4), HEAD, strict=True):
        head |= {f"layers.{number}.weight": torch.randn(size, width), f"layers.{number}.bias": torch.randn(size)}
        width = size
    return head


def image_reward_folder(folder: Path, seed: int = 2) -> dict[str, torch.Tensor]:
    """A small ImageReward whose weights have its authors' names; returns the weights."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    wide, narrow, inner, patches = 16, 12, 24, (SIDE // 8) ** 2
    linear = {
        **{f"visual_encoder.blocks.{n}.attn.qkv": (3 * wide, wide) for n in range(2)},
        **{f"visual_encoder.blocks.{n}.attn.proj": (wide, wide) for n in range(2)},
        **{f"visual_encoder.blocks.{n}.mlp.fc1": (inner, wide) for n in range(2)},
        **{f"visual_encoder.blocks.{n}.mlp.fc2": (wide, inner) for n in range(2)},
        "vision_proj": (4, wide), "text_proj": (4, narrow),
    }  # fmt: skip
    norms = {
        f"visual_encoder.{name}": wide for name in ("norm", *(f"blocks.{n}.norm{k}" for n in (0, 1) for k in (1, 2)))
    }
    norms["text_encoder.embeddings.LayerNorm"] = narrow
    for n in range(2):
        layer = f"text_encoder.encoder.layer.{n}"
        for kind, seen in (("attention", narrow), ("crossattention", wide)):
            linear[f"{layer}.{kind}.self.query"] = (narrow, narrow)
            linear |= {f"{layer}.{kind}.self.{part}": (narrow, seen) for part in ("key", "value")}
            linear[f"{layer}.{kind}.output.dense"] = (narrow, narrow)
            norms[f"{layer}.{kind}.output.LayerNorm"] = narrow
        linear |= {f"{layer}.intermediate.dense": (inner, narrow), f"{layer}.output.dense": (narrow, inner)}
        norms[f"{layer}.output.LayerNorm"] = narrow
    tensors = {
        "visual_encoder.cls_token": torch.randn(1, 1, wide),
        "visual_encoder.pos_embed": torch.randn(1, patches + 1, wide),
        "visual_encoder.patch_embed.proj.weight": torch.randn(wide, 3, 8, 8) / 14,
        "visual_encoder.patch_embed.proj.bias": torch.randn(wide),
        "text_encoder.embeddings.word_embeddings.weight": torch.randn(40, narrow),
        "text_encoder.embeddings.position_embeddings.weight": torch.randn(48, narrow),
        "text_encoder.embeddings.position_ids": torch.arange(48)[None],
    }
    for name, (rows, columns) in linear.items():
        tensors |= {f"{name}.weight": torch.randn(rows, columns) / columns**0.5, f"{name}.bias": torch.randn(rows) / 4}
    for name, size in norms.items():
        tensors |= {f"{name}.weight": 1 + torch.randn(size) / 4, f"{name}.bias": torch.randn(size) / 4}
    state = {f"blip.{name}": tensor for name, tensor in tensors.items()}
    state |= {f"mlp.{name}": tensor for name, tensor in random_head(narrow).items()}
    save_file(state, folder / "model.safetensors")
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": inner}
    BlipConfig(
        vision_config={**shape, "hidden_size": wide, "image_size": SIDE, "patch_size": 8, "layer_norm_eps": 1e-6},
        text_config={**shape, "hidden_size": narrow, "vocab_size": 40, "max_position_embeddings": 48},
    ).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "cross", "on", "gray"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return state
