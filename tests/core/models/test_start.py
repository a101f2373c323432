"""Going on from a LoRA: against diffusers' own pipeline with that LoRA loaded, or fused into its weights."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from d3po_core.config import ModelConfig
from d3po_core.errors import D3POError
from d3po_core.export.kohya import write_for_others
from d3po_core.export.native_names import write_native
from d3po_core.models.families import FAMILIES, Family
from d3po_core.models.loaded import load_policy
from d3po_core.models.loading import check_model, load_family
from d3po_core.models.lora import Lora
from d3po_core.models.policy import Policy
from d3po_core.models.start import read_start
from d3po_core.models.weights import LORA_FILE
from d3po_core.seeds import gaussian
from tests.core.models.tiny_flow_models import tiny_flow_model
from tests.core.models.tiny_models import tiny_model
from tests.core.sampling.drawing import stir_lora

RANK, ALPHA = 2, 3.0
NAMES = ("sd", "sdxl", "sd3", "flux-dev", "z-image", "sana", "klein")
State = dict[str, torch.Tensor]


class Made:
    """A small model's folder and a LoRA of it, made by diffusers and PEFT alone."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root
        self._loaded: Family | None = None
        self.folder = (tiny_model if name in ("sd", "sdxl", "sd3") else tiny_flow_model)(name, root / name)
        self.kind = type(self.pipeline())
        self.family = FAMILIES[self.kind.__name__]
        self.lora = root / "lora" / LORA_FILE
        pipeline = self.pipeline()
        network = getattr(pipeline, self.family.NETWORK)
        network.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(self.family.LORA_TARGETS)))
        stir(network)
        metadata = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(self.family.LORA_TARGETS)}
        layers = {f"{self.family.NETWORK}_lora_layers": get_peft_model_state_dict(network)}
        layers[f"{self.family.NETWORK}_lora_adapter_metadata"] = metadata
        self.kind.save_lora_weights(self.lora.parent, **layers)

    def pipeline(self) -> Any:
        absent = {"text_encoder_3": None, "tokenizer_3": None} if self.name == "sd3" else {}
        return DiffusionPipeline.from_pretrained(self.folder, **absent)

    def loaded(self) -> Family:
        if self._loaded is None:
            self._loaded = load_family(self.config(None))
        return self._loaded

    def network_again(self) -> Any:
        """The loaded network without LoRA, which is made anew where a test adds one."""
        return copy.deepcopy(getattr(self.loaded().pipeline, self.family.NETWORK))

    def config(self, start: Path | str | None, **settings: Any) -> ModelConfig:
        values = {"path": str(self.folder), "device": "cpu", "lora_rank": RANK, "lora_alpha": ALPHA,
                  "lora_targets": self.family.LORA_TARGETS, "start_from": str(start) if start else None}  # fmt: skip
        return ModelConfig.model_validate({**values, **settings})


def stir(network: torch.nn.Module, size: float = 0.3) -> None:
    for n, (name, weight) in enumerate(sorted(network.named_parameters())):
        if "lora_" in name:
            weight.data = size * gaussian(n, *weight.shape)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    found: dict[str, Made] = {}

    def of(name: str) -> Made:
        if name not in found:
            found[name] = Made(name, tmp_path_factory.mktemp(name))
        return found[name]

    return of


def outputs(policy: Policy, network: Any = None) -> torch.Tensor:
    """Predictions, of another network in the policy's place if one is given."""
    network = network or policy.network
    latent = torch.stack([gaussian(n, *policy.latent_shape) for n in range(2)])
    guidance = 1.0 if policy.family.guidance == "none" else 3.0
    conditioning = policy.encode(["a red circle", "a blue cross"], guidance)
    kept, policy.network = policy.network, network
    try:
        with torch.no_grad():
            return policy.predict(latent, torch.tensor([500, 20]), conditioning)
    finally:
        policy.network = kept


def loaded_by_diffusers(made: Made, place: Path) -> Any:
    pipeline = made.pipeline()
    pipeline.load_lora_weights(place.parent, weight_name=place.name)
    return pipeline


@pytest.mark.parametrize("name", NAMES)
def test_continued_is_diffusers_pipeline_with_the_lora(name: str, made: Callable[[str], Made]) -> None:
    it = made(name)
    policy = load_policy(it.config(it.lora.parent), seed=0)
    theirs = getattr(loaded_by_diffusers(it, it.lora), it.family.NETWORK)
    wanted = outputs(policy, theirs.eval())
    torch.testing.assert_close(outputs(policy), wanted, rtol=1e-4, atol=1e-5)
    plain = outputs(policy, getattr(it.loaded().pipeline, it.family.NETWORK))
    assert (wanted - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sd", "flux-dev", "z-image"])
def test_merged_is_diffusers_fused_lora(name: str, made: Callable[[str], Made]) -> None:
    it = made(name)
    fused = loaded_by_diffusers(it, it.lora)
    fused.fuse_lora()
    fused.unload_lora_weights()
    wanted = getattr(fused, it.family.NETWORK).state_dict()
    family = load_family(it.config(it.lora, start_as="merge"))
    found = getattr(family.pipeline, it.family.NETWORK).state_dict()
    plain = getattr(it.loaded().pipeline, it.family.NETWORK).state_dict()
    assert found.keys() == wanted.keys()
    changed = [key for key in found if not torch.equal(found[key], plain[key])]
    assert len(changed) == sum("lora_A" in key for key in load_file(it.lora))
    for key in found:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-6)


def peft_folder(it: Made, folder: Path) -> Path:
    network = getattr(it.pipeline(), it.family.NETWORK)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(it.family.LORA_TARGETS))
    wrapped = get_peft_model(network, config)
    stir(network)
    wrapped.save_pretrained(folder)
    return folder


def kohya(it: Made, folder: Path) -> Path:
    layers = 1 if it.family.FIRST_AUTHORS_NAMES else None
    folder.mkdir()
    return write_for_others(it.lora, folder, RANK, ALPHA, layers)


def native(it: Made, folder: Path) -> Path:
    folder.mkdir()
    written = write_native(it.lora, folder, RANK, ALPHA, it.kind.__name__)
    assert written is not None
    return written


def renamed(old: str, new: str, alpha: bool = False) -> Callable[[Made, Path], Path]:
    """The file under other programs' names of the same layers."""

    def write(it: Made, folder: Path) -> Path:
        folder.mkdir()
        state = load_file(it.lora)
        found = {name.replace(old, new): value for name, value in state.items()}
        layers = {name.partition(".lora_")[0] for name in found}
        found |= {f"{layer}.alpha": torch.tensor(ALPHA) for layer in layers} if alpha else {}
        metadata = {} if alpha else _metadata(it.lora)
        save_file(found, folder / "other.safetensors", metadata=metadata)
        return folder / "other.safetensors"

    return write


def old_diffusers(it: Made, folder: Path) -> Path:
    """``attn1.processor.to_q_lora.down.weight``, of a LoRA whose alpha is its rank."""
    folder.mkdir()
    found = {}
    for name, value in load_file(it.lora).items():
        layer, _, half = name.removesuffix(".weight").partition(".lora_")
        block, _, projection = layer.removesuffix(".0").rpartition(".")
        half, factor = {"A": ("down", 1.0), "B": ("up", ALPHA / RANK)}[half]
        found[f"{block}.processor.{projection}_lora.{half}.weight"] = factor * value
    save_file(found, folder / LORA_FILE)
    return folder


def _metadata(file: Path) -> dict[str, str]:
    size = int.from_bytes(file.read_bytes()[:8], "little")
    return json.loads(file.read_bytes()[8 : 8 + size])["__metadata__"]


FORMATS: dict[str, tuple[str, Callable[[Made, Path], Path]]] = {
    "PEFT, Stable Diffusion": ("sd", peft_folder),
    "PEFT, FLUX.1": ("flux-dev", peft_folder),
    "kohya, Stable Diffusion": ("sd", kohya),
    "kohya, XL under the first authors' names": ("sdxl", kohya),
    "early diffusers": ("sd", old_diffusers),
    "ComfyUI, Stable Diffusion 3": ("sd3", kohya),
    "sd-scripts, Stable Diffusion 3": ("sd3", native),
    "sd-scripts, FLUX.1": ("flux-dev", native),
    "ComfyUI, FLUX.1": ("flux-dev", kohya),
    "ComfyUI, FLUX.2 klein": ("klein", native),
    "ComfyUI, Qwen-Image": ("qwen", renamed("transformer.", "diffusion_model.", alpha=True)),
    "ComfyUI, Z-Image": ("z-image", renamed("transformer.", "diffusion_model.", alpha=True)),
    "names alone": ("sana", renamed("transformer.transformer_blocks", "transformer_blocks", alpha=True)),
}


@pytest.mark.parametrize("how", FORMATS)
def test_every_format_is_the_same_lora(how: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    """Layer by layer the same product, and the rank of the file that it was written from."""
    name, write = FORMATS[how]
    it = made(name)
    place = write(it, tmp_path / "written")
    check_model(it.config(place))
    (layers,) = read_start(it.config(place), it.loaded()).values()
    state = load_file(it.lora)
    assert len(layers) == len(state) / 2
    for layer, found in layers.items():
        down, up = (state[f"{it.family.NETWORK}.{layer}.lora_{half}.weight"] for half in "AB")
        assert found.down.shape == down.shape
        torch.testing.assert_close(found.scale * found.up @ found.down, ALPHA / RANK * up @ down, rtol=1e-5, atol=1e-6)


def test_another_alpha_draws_the_same(made: Callable[[str], Made]) -> None:
    it = made("sd")
    wanted = outputs(load_policy(it.config(it.lora), seed=0))
    found = outputs(load_policy(it.config(it.lora, lora_alpha=16.0), seed=0))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def with_text(it: Made, folder: Path) -> Path:
    """kohya's file with a LoRA of the text encoder too, and a convolution, as sd-scripts and LoCon write them."""
    file = kohya(it, folder)
    state = load_file(file)
    for layer, wide in (("self_attn_q_proj", 32), ("mlp_fc1", 32)):
        name = f"lora_te_text_model_encoder_layers_1_{layer}"
        state |= {f"{name}.lora_down.weight": gaussian(1, 3, 32), f"{name}.lora_up.weight": gaussian(2, wide, 3)}
        state[f"{name}.alpha"] = torch.tensor(1.5)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    state |= {f"{name}.lora_down.weight": gaussian(3, 4, 16, 3, 3), f"{name}.lora_up.weight": gaussian(4, 16, 4, 1, 1)}
    save_file(state | {f"{name}.alpha": torch.tensor(2.0)}, file)
    return file


def test_text_encoder_and_convolutions_are_merged_too(made: Callable[[str], Made], tmp_path: Path) -> None:
    """The text encoder by the formula: diffusers 0.42 drops the file's queries with flattened text encoders."""
    it = made("sd")
    file = with_text(it, tmp_path / "written")
    family = load_family(it.config(file, start_as="merge"))
    fused, plain = loaded_by_diffusers(it, file), it.pipeline()
    fused.fuse_lora(components=["unet"])
    fused.unload_lora_weights()
    found, wanted = family.pipeline.unet.state_dict(), fused.unet.state_dict()
    assert not torch.equal(*(pipe.unet.down_blocks[0].resnets[0].conv1.weight for pipe in (plain, family.pipeline)))
    for key in found:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-5)
    state, texts = load_file(file), family.pipeline.text_encoder.state_dict()
    for key, before in plain.text_encoder.state_dict().items():
        name = f"lora_te_text_model_{key.removeprefix('text_model.').removesuffix('.weight').replace('.', '_')}"
        change = torch.zeros_like(before)
        if f"{name}.alpha" in state:
            change = 0.5 * state.pop(f"{name}.lora_up.weight") @ state.pop(f"{name}.lora_down.weight")
        torch.testing.assert_close(texts[key], before + change, rtol=1e-5, atol=1e-5)
    assert not any(name.startswith("lora_te") and "alpha" not in name for name in state)
    with pytest.raises(D3POError, match=r"and a LoRA of text_encoder; expected .* or model.start_as to 'merge'"):
        check_model(it.config(file))


def test_merging_in_half_precision_rounds_once(made: Callable[[str], Made]) -> None:
    it = made("sd")
    wanted = load_family(it.config(it.lora, start_as="merge")).pipeline.unet.state_dict()
    found = load_family(it.config(it.lora, start_as="merge", precision="bf16")).pipeline.unet.state_dict()
    plain = it.pipeline().unet.state_dict()
    for key, value in found.items():
        exact = wanted[key] - plain[key] + plain[key].bfloat16().float()
        torch.testing.assert_close(value.float(), exact, rtol=2**-8, atol=1e-6)


def test_the_start_is_the_base_of_a_continued_campaign(made: Callable[[str], Made], tmp_path: Path) -> None:
    it = made("sd")
    policy = load_policy(it.config(it.lora), seed=0)
    start = outputs(policy)
    stir_lora(policy, seed=1, size=0.1)
    moved = outputs(policy)
    assert (moved - start).abs().max() > 1e-3
    with policy.base():
        assert torch.equal(outputs(policy), start)
    assert torch.equal(outputs(policy), moved)
    with policy.merged():
        torch.testing.assert_close(outputs(policy), moved, rtol=1e-4, atol=1e-5)
    policy.weights.save(tmp_path)
    policy.reset()
    assert torch.equal(outputs(policy), start)
    policy.weights.load(tmp_path)
    assert torch.equal(outputs(policy), moved)
    theirs = loaded_by_diffusers(it, tmp_path / LORA_FILE).unet.eval()
    torch.testing.assert_close(outputs(policy, theirs), moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_merged_model_is_the_base(train: str, made: Callable[[str], Made]) -> None:
    it = made("sd")
    policy = load_policy(it.config(it.lora, start_as="merge", train=train, lora_rank=4, lora_alpha=None), seed=0)
    wanted = outputs(load_policy(it.config(it.lora), seed=0))
    torch.testing.assert_close(outputs(policy), wanted, rtol=1e-4, atol=1e-5)
    start = outputs(policy)
    stir_lora(policy, seed=1, size=0.01)
    with policy.base():
        assert torch.equal(outputs(policy), start)


Edit = Callable[[State], State]


def dropped(part: str) -> Edit:
    return lambda state: {name: value for name, value in state.items() if part not in name}


def halved(state: State) -> State:
    return {name: value[:, :16] if "lora_A" in name else value for name, value in state.items()}


REFUSED: dict[str, tuple[Edit, dict[str, Any], str]] = {
    "rank": (lambda s: s, {"lora_rank": 4}, r"has rank 2 on 32 layers .* expected model.lora_rank 4 on 32 .*'merge'"),
    "targets": (lambda s: s, {"lora_targets": ("to_q", "to_k")}, r"on 32 layers \(to_k, to_out.0, to_q, to_v\); exp"),
    "a layer less": (dropped("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q."), {}, "on 31 layers"),
    "half a layer": (dropped("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B"), {},
                     r"the layer unet.down_blocks.0.*attn1.to_q has no lora_up"),
    "unknown layer": (lambda s: {n.replace("attn1.to_q", "attn7.to_q"): v for n, v in s.items()}, {},
                      r"4 of its 32 layers are unknown to model.path, such as unet.down_blocks.0.*attn7.to_q; is it"),
    "unknown kind": (lambda s: s | {"unet.conv_in.lokr_w1": torch.ones(2)}, {}, "1 of its 65 tensors are of no LoRA"),
    "DoRA": (lambda s: s | {"unet.conv_in.dora_scale": torch.ones(2)}, {}, "such as unet.conv_in.dora_scale"),
    "other width": (halved, {}, "which do not fit|is it a LoRA of that model"),
    "nothing": (lambda s: {}, {}, "0 of its 0 tensors are of no LoRA"),
    "not finite": (lambda s: {n: v * float("nan") for n, v in s.items()}, {}, "numbers that are NaN or infinite"),
    "twice": (lambda s: s | {f"base_model.model.{n.removeprefix('unet.')}": v for n, v in s.items()}, {}, "twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_lora_that_does_not_fit_is_one_line(case: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    it, (edit, settings, message) = made("sd"), REFUSED[case]
    file = tmp_path / "lora.safetensors"
    state = {name: value.clone() for name, value in edit(load_file(it.lora)).items()}
    save_file({n: v.contiguous() for n, v in state.items()}, file, metadata=_metadata(it.lora))
    with pytest.raises(D3POError, match=message) as caught:
        check_model(it.config(file, **settings))
    with pytest.raises(D3POError, match=message):
        Lora(it.network_again(), it.loaded(), it.config(file, **settings), seed=0)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    if case not in ("rank", "targets", "a layer less"):
        with pytest.raises(D3POError, match=message):
            check_model(it.config(file, start_as="merge"))


@pytest.mark.parametrize(
    ("name", "other", "start_as"),
    [("sd", "sdxl", "continue"), ("flux-dev", "sd3", "merge"), ("sd3", "sd", "merge"), ("qwen", "flux-dev", "merge")],
)
def test_a_lora_of_another_family_is_one_line(
    name: str, other: str, start_as: str, made: Callable[[str], Made]
) -> None:
    with pytest.raises(D3POError, match=r"is it a LoRA of that model\?|has rank") as caught:
        check_model(made(name).config(made(other).lora, start_as=start_as))
    assert "\n" not in str(caught.value)


def test_places_that_hold_no_lora_are_one_line(made: Callable[[str], Made], tmp_path: Path) -> None:
    it = made("sd")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(it.lora.read_bytes()[:-7])
    (tmp_path / "old.ckpt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "several").mkdir()
    for name in ("a", "b"):
        (tmp_path / "several" / f"{name}.safetensors").write_bytes(it.lora.read_bytes())
    peft_folder(it, tmp_path / "peft")
    dora = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(dora | {"use_dora": True}))
    for place, message in (
        (cut, "is no whole safetensors file"),
        (tmp_path / "old.ckpt", "is a .ckpt file; expected .safetensors"),
        (tmp_path / "empty", "has no .safetensors file; expected pytorch_lora_weights.safetensors"),
        (tmp_path / "several", r"has several files \(a.safetensors, b.safetensors\); name one of them"),
        (tmp_path / "peft", "use_dora is 'True'; expected False"),
        (it.folder, "is a whole network or model, no LoRA; name it as model.path"),
        (tmp_path / "gone", "no such file or folder"),
    ):
        with pytest.raises(D3POError, match=message) as caught:
            check_model(it.config(place))
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("model.start_from ")


def test_the_hubs_cache_is_read(made: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's client lays its cache out: a snapshot by revision, and a file that names the newest."""
    it = made("sd")
    cache = tmp_path / "models--ann--style"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "abc" / LORA_FILE).write_bytes(it.lora.read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    wanted = outputs(load_policy(it.config(it.lora), seed=0))
    for start in ("ann/style", f"ann/style/{LORA_FILE}"):
        assert torch.equal(outputs(load_policy(it.config(start), seed=0)), wanted)
    with pytest.raises(D3POError, match=r"'ann/other': cannot be downloaded .* A folder or file works too"):
        load_policy(it.config("ann/other"), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"start_as": "merge"}, "names no LoRA to merge"), ({"start_from": "x/y", "train": "full"}, "set model.start_as")],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(copy.deepcopy(settings))
