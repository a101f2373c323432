"""Weights as people have them: networks alone in one file, shards, variants, and weights stored in 8 bits."""

import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_model
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from d3po_core.config import ModelConfig
from d3po_core.errors import D3POError
from d3po_core.models.loading import check_model, load_family, storage_notes
from tests.core.models.native_files import native_state
from tests.core.models.single_files import under, unet_state, vae_state
from tests.core.models.tiny_flow_models import tiny_flow_model
from tests.core.models.tiny_models import tiny_model

State = dict[str, torch.Tensor]
WEIGHTS = "diffusion_pytorch_model.safetensors"
MERGED = "model.diffusion_model."


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = (tiny_model if name in ("sd", "sdxl", "sd3") else tiny_flow_model)(name, root / name)
        return made[name]

    return folder


@pytest.fixture
def flux_of_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers takes FLUX's published width for granted; here it reads that of the small model."""
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    read = entry["checkpoint_mapping_fn"]
    code = read.__code__.replace(co_consts=tuple(32 if c == 3072 else c for c in read.__code__.co_consts))
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", types.FunctionType(code, read.__globals__))


def loaded(path: Path, described_by: Path | str | None = None, **settings: Any) -> Any:
    place = str(described_by) if described_by else None
    return load_family(ModelConfig(path=str(path), single_file_config=place, device="cpu", **settings)).pipeline


def expect_same(module: Any, folder: Path, part: str) -> None:
    wanted = getattr(DiffusionPipeline.from_pretrained(folder), part).state_dict()
    found = module.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def native(name: str, folder: Path) -> State:
    kind = "flux" if name.startswith("flux") else name
    return native_state(kind, load_file(folder / "transformer" / WEIGHTS), blocks=2)


def write(state: State, path: Path, **metadata: str) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata={"format": "pt", **metadata})
    return path


@pytest.mark.usefixtures("flux_of_any_width")
@pytest.mark.parametrize(
    ("name", "prefix"),
    [("flux-dev", MERGED), ("flux-schnell", ""), ("sd35", MERGED), ("qwen", MERGED), ("z-image", ""), ("klein", MERGED),
     ("sana", "")],
)  # fmt: skip
def test_a_transformer_alone_goes_into_the_folders_pipeline(
    name: str, prefix: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(name)
    file = write(under(prefix, native(name, folder)), tmp_path / "alone.safetensors")
    pipeline = loaded(file, folder)
    expect_same(pipeline.transformer, folder, "transformer")
    expect_same(pipeline.vae, folder, "vae")
    expect_same(pipeline.text_encoder, folder, "text_encoder")


def test_a_unet_alone_goes_into_the_folders_pipeline(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """In the first authors' names, and as diffusers writes its folder's file."""
    folder = folder_of("sdxl")
    unet = DiffusionPipeline.from_pretrained(folder).unet
    file = write(under(MERGED, unet_state(unet)), tmp_path / "alone.safetensors")
    for path in (file, folder / "unet" / WEIGHTS):
        expect_same(loaded(path, folder).unet, folder, "unet")


def test_what_a_file_lacks_comes_from_the_hubs_cache(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub's client lays its cache out: a snapshot by revision, and a file that names the newest."""
    folder, cache = folder_of("z-image"), tmp_path / "models--ann--model"
    shutil.copytree(folder, cache / "snapshots" / "abc")
    (cache / "snapshots" / "abc" / "transformer" / WEIGHTS).unlink()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    for name, value in (("HF_HUB_CACHE", str(tmp_path)), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(constants, name, value)
    file = write(native("z-image", folder), tmp_path / "alone.safetensors")
    pipeline = loaded(file, "ann/model")
    for part in ("transformer", "vae", "text_encoder"):
        expect_same(getattr(pipeline, part), folder, part)


def test_a_whole_merged_flux_file_needs_no_weights_from_the_folder(
    folder_of: Callable[[str], Path], tmp_path: Path, flux_of_any_width: None
) -> None:
    """As ComfyUI merges them: the network, the VAE in the first authors' names, CLIP and T5 in transformers'."""
    folder = folder_of("flux-dev")
    described = shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    clip = {f"text_model.{n.removeprefix('text_model.')}": v for n, v in pipeline.text_encoder.state_dict().items()}
    state = under(MERGED, native("flux-dev", folder)) | under("vae.", vae_state(pipeline.vae.state_dict()))
    state |= under("text_encoders.clip_l.transformer.", clip)
    t5 = {name: value for name, value in pipeline.text_encoder_2.state_dict().items() if "embed_tokens" not in name}
    state |= under("text_encoders.t5xxl.transformer.", t5)
    file = write(state, tmp_path / "merged.safetensors")
    found = loaded(file, described)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        expect_same(getattr(found, part), folder, part)
    del state["text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight"]
    with pytest.raises(D3POError, match=r"weights are missing.*is it a whole model"):
        loaded(write(state, tmp_path / "cut.safetensors"), described)
    rest = {name: value for name, value in state.items() if not name.startswith("text_encoders.t5xxl.")}
    with pytest.raises(D3POError, match=r"text_encoder_2 is missing in the file, and text_encoder_2/\*.safetensors in"):
        check_model(
            ModelConfig(path=str(write(rest, tmp_path / "no_t5.safetensors")), single_file_config=str(described))
        )


def test_files_that_do_not_fit_are_one_line(
    folder_of: Callable[[str], Path], tmp_path: Path, flux_of_any_width: None
) -> None:
    state = native("flux-dev", folder_of("flux-dev"))
    whole = write(state, tmp_path / "dev.safetensors")
    cut = write({n: v for n, v in state.items() if n != "txt_in.bias"}, tmp_path / "cut.safetensors")
    text = write(
        native("qwen", folder_of("qwen")) | {"text_encoders.qwen25_7b.x.weight": torch.ones(2)},
        tmp_path / "with_text.safetensors",
    )
    for file, name, message in (
        (whole, "flux-schnell", r"has \d+ more numbers than a FluxTransformer2DModel of that configuration"),
        (whole, "sd35", "cannot be loaded"),
        (cut, "flux-dev", "cannot be loaded"),
        (text, "qwen", "holds a text encoder that cannot be read from there; take a file of the transformer alone"),
    ):
        with pytest.raises(D3POError, match=message) as caught:
            loaded(file, folder_of(name))
        assert "\n" not in str(caught.value)
        assert str(file) in str(caught.value)


def in_8_bits(state: State, scale: float | None, kind: torch.dtype = torch.float8_e4m3fn) -> tuple[State, State]:
    """Weights of two dimensions stored in 8 bits, beside the numbers that they stand for."""
    stored, meant = State(), State()
    for name, value in state.items():
        if value.ndim != 2 or not name.endswith("weight"):
            stored[name] = meant[name] = value
            continue
        stored[name] = (value / (scale or 1.0)).to(kind)
        meant[name] = stored[name].float() * (scale or 1.0)
        assert 0 < (meant[name] - value).abs().max() < 0.13 * value.abs().max() or not value.any()
    return stored, meant


def layers_in(stored: State) -> list[str]:
    return [n.removesuffix(".weight") for n, v in stored.items() if v.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]


def mark(kind: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


FORMATS: dict[str, Callable[[str], State]] = {
    "scale_weight": lambda layer: {
        f"{layer}.scale_weight": torch.tensor([0.02]), f"{layer}.scale_input": torch.tensor([7.0])
    },
    "weight_scale": lambda layer: {
        f"{layer}.weight_scale": torch.tensor(0.02), f"{layer}.comfy_quant": mark("float8_e4m3fn")
    },
}  # fmt: skip


@pytest.mark.parametrize("how", FORMATS)
def test_scales_of_8_bits_are_applied(how: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """In a transformer alone (Z-Image, whose layers the reader splits), computed in bf16 and in single precision."""
    folder = folder_of("z-image")
    stored, meant = in_8_bits(native("z-image", folder), scale=0.02)
    scales: State = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)} if how == "scale_weight" else {}
    for layer in layers_in(stored):
        scales |= FORMATS[how](layer)
    assert len(scales) > 20
    file = write(under(MERGED, stored | scales), tmp_path / "model.safetensors")
    plain = write(under(MERGED, meant), tmp_path / "meant.safetensors")
    wanted = loaded(plain, folder).transformer.state_dict()
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        found = loaded(file, folder, precision=precision).transformer.state_dict()
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert found[name].dtype == dtype
            assert torch.equal(found[name], wanted[name].to(dtype)), name
    config = ModelConfig(path=str(file), single_file_config=str(folder), precision="bf16")
    assert storage_notes(config) == [
        f"model.path {str(file)!r}: model.safetensors is stored as float8_e4m3fn with scales and computed in bf16"
    ]


def stored_again(folder: Path, part: str, file: str, scale: float | None, kind: torch.dtype) -> State:
    state = load_file(folder / part / file)
    stored, meant = in_8_bits(state, scale, kind)
    if scale:
        stored |= {f"{layer}.weight_scale": torch.tensor(scale) for layer in layers_in(stored)}
    write(stored, folder / part / file)
    return meant


@pytest.mark.parametrize(
    ("name", "part", "file", "scale"),
    [
        ("flux-dev", "transformer", WEIGHTS, None), ("sd", "unet", WEIGHTS, 0.03),
        ("flux-dev", "text_encoder_2", "model.safetensors", 0.03),
        ("qwen", "text_encoder", "model.safetensors", None),
    ],
)  # fmt: skip
def test_a_folders_part_in_8_bits_is_what_it_stands_for(
    name: str, part: str, file: str, scale: float | None, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folder_of(name), tmp_path / name)
    kind = torch.float8_e4m3fn if scale else torch.float8_e5m2
    expected = DiffusionPipeline.from_pretrained(folder)
    meant = stored_again(folder, part, file, scale, kind)
    before = getattr(expected, part).state_dict()
    pipeline = loaded(folder)
    found = getattr(pipeline, part).state_dict()
    assert found.keys() == before.keys()
    tight = {name: value for name, value in found.items() if name in meant}
    assert len(tight) >= len(meant) - 1 or part.startswith("text_encoder")
    assert all(torch.equal(value, meant[name]) for name, value in tight.items())
    for weight, value in found.items():  # also those that the file names otherwise
        assert (value - before[weight]).abs().max() <= 0.13 * before[weight].abs().max(), weight
    assert any(not torch.equal(found[weight], before[weight]) for weight in found)
    (note,) = storage_notes(ModelConfig(path=str(folder)))
    assert f"{part} is stored as float8_" in note
    assert note.endswith("computed in single precision")


WRONG: dict[str, tuple[Callable[[str], State], str]] = {
    "no weight": (lambda layer: {"elsewhere.weight_scale": torch.tensor(1.0)}, "elsewhere.weight, which is missing"),
    "shape": (lambda layer: {f"{layer}.weight_scale": torch.ones(1, 3)}, r"has the shape \(1, 3\) for a weight of"),
    "not finite": (lambda layer: {f"{layer}.weight_scale": torch.tensor(float("nan"))}, "or is not finite"),
    "other format": (lambda layer: {f"{layer}.comfy_quant": mark("nvfp4")}, "marks .* as 'nvfp4'; expected float8"),
    "integers": (lambda layer: {f"{layer}.weight": torch.ones(4, 4, dtype=torch.uint8)}, "stores .* as U8; expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_scales_that_do_not_fit_are_one_line(case: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("qwen")
    stored, _ = in_8_bits(native("qwen", folder), scale=0.02)
    more, message = WRONG[case]
    file = write(under(MERGED, stored | more("transformer_blocks.0.attn.to_q")), tmp_path / "model.safetensors")
    with pytest.raises(D3POError, match=message) as caught:
        loaded(file, folder)
    assert "\n" not in str(caught.value)


@pytest.fixture
def sharded(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """As the hub has large models: the network and a text encoder in shards, in a variant."""
    pipeline = DiffusionPipeline.from_pretrained(folder_of("sd35"))
    pipeline.transformer.save_pretrained(tmp_path / "sd35" / "transformer", max_shard_size="60KB", variant="fp16")
    shutil.copytree(
        folder_of("sd35"), tmp_path / "sd35", dirs_exist_ok=True,
        ignore=lambda folder, names: [n for n in names if folder.endswith("transformer") and n.endswith("tensors")],
    )  # fmt: skip
    for part in ("vae", "text_encoder", "text_encoder_2"):
        (weights,) = (tmp_path / "sd35" / part).glob("*.safetensors")
        weights.rename(weights.with_name(f"{weights.stem}.fp16.safetensors"))
    pipeline.text_encoder_3.save_pretrained(tmp_path / "sd35" / "text_encoder_3", max_shard_size="20KB")
    (tmp_path / "sd35" / "text_encoder_3" / "model.safetensors").unlink(missing_ok=True)
    return tmp_path / "sd35"


def test_shards_and_variants_load_as_the_whole(sharded: Path, folder_of: Callable[[str], Path]) -> None:
    assert len(list((sharded / "transformer").glob("*.fp16-0000*.safetensors"))) > 1
    assert len(list((sharded / "text_encoder_3").glob("*-0000*.safetensors"))) > 1
    pipeline = loaded(sharded, variant="fp16")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        expect_same(getattr(pipeline, part), folder_of("sd35"), part)


@pytest.mark.parametrize(
    ("part", "gone", "message"),
    [
        (
            "transformer",
            "*-00002-of-*",
            r"transformer/diffusion_pytorch_model.fp16-00002-of-\d+.* is missing",
        ),
        ("text_encoder_3", "*-00001-of-*", r"text_encoder_3/model-00001-of-\d+.safetensors is missing, a shard that"),
        ("transformer", "*.index.*", "has shards such as .* but no .*index.json"),
        ("text_encoder", "*.safetensors", "text_encoder/.*fp16.*safetensors is missing"),
    ],
)
def test_a_missing_shard_or_variant_is_one_line(part: str, gone: str, message: str, sharded: Path) -> None:
    for path in (sharded / part).glob(gone):
        path.unlink()
    with pytest.raises(D3POError, match=message) as caught:
        check_model(ModelConfig(path=str(sharded), variant="fp16"))
    assert "\n" not in str(caught.value)


def test_a_shard_without_its_tensors_is_one_line(sharded: Path) -> None:
    shard = next((sharded / "transformer").glob("*-00001-of-*"))
    state = load_file(shard)
    name = sorted(state)[0]
    write({n: v for n, v in state.items() if n != name}, shard)
    with pytest.raises(D3POError, match=f"lacks 1 tensors that .* places in it, such as {name}"):
        check_model(ModelConfig(path=str(sharded), variant="fp16"))
