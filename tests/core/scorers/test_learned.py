"""Learned scorers against direct computations on the same small random weights, and weights that must be refused."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv2d, gelu, layer_norm, linear
from transformers import BertTokenizer, CLIPModel, CLIPTokenizer

from d3po_core.config import ScoringConfig
from d3po_core.errors import D3POError
from d3po_core.scorers import finding as scorers
from d3po_core.scorers import models
from d3po_core.scorers.finding import MODELS, Scorer, load_scorer, use_device
from tests.core.scorers.small_scorers import FEATURES, SIDE, TOKENS, clip_folder, image_reward_folder, random_head

# Neither square nor of the model's size: preparing them is a part of what is compared.
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 40, 52, 3), dtype=np.uint8)
PROMPTS = ["a red circle on a gray background", "a blue cross", "a red circle on a gray background", "", "a blue cross"]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def scorer(name: str, folder: Path, batch_size: int = 32) -> Scorer:
    return load_scorer(name, ScoringConfig(models={name: str(folder)}, batch_size=batch_size), "cpu")


def refusal(name: str, folder: Path | str) -> str:
    with pytest.raises(D3POError) as caught:
        scorer(name, Path(folder))(IMAGES, PROMPTS)
    assert f"scorer '{name}'" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prepared(images: np.ndarray) -> torch.Tensor:
    """Shorter side to the model's with PIL's bicubic, the middle cut out, CLIP's mean and deviation."""
    rows = []
    for image in images:
        height, width = image.shape[:2]
        scale = SIDE / min(height, width)
        small = Image.fromarray(image).resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        left, top = (small.width - SIDE) // 2, (small.height - SIDE) // 2
        cut = np.asarray(small.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32) / 255
        rows.append((cut - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)


@torch.no_grad()
def cosines(model: CLIPModel, folder: Path) -> np.ndarray:
    """Cosines from CLIP's own logits, image by image, each with its prompt alone."""
    tokenizer, found = CLIPTokenizer.from_pretrained(folder), []
    for pixels, prompt in zip(prepared(IMAGES), PROMPTS, strict=True):
        tokens = tokenizer([prompt], truncation=True, max_length=TOKENS, return_tensors="pt")
        logits = model(input_ids=tokens.input_ids, pixel_values=pixels[None]).logits_per_image
        found.append(logits.item() / math.exp(model.logit_scale.item()))
    return np.array(found)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPModel]:
    folder = tmp_path_factory.mktemp("clip")
    return folder, clip_folder(folder)


@pytest.mark.parametrize(("name", "factor"), [("clip_score", 100), ("pickscore", math.exp(2.5)), ("hpsv2", 1)])
def test_similarity_is_a_factor_times_the_cosine(name: str, factor: float, clip: tuple[Path, CLIPModel]) -> None:
    folder, model = clip
    expected = factor * cosines(model, folder)
    assert np.ptp(expected) > 0.05 * factor  # images are told apart
    assert scorer(name, folder)(IMAGES, PROMPTS) == pytest.approx(expected, rel=1e-4, abs=1e-5 * factor)


def test_prompt_that_is_too_long_is_cut(clip: tuple[Path, CLIPModel]) -> None:
    long = "a red circle on a gray background " * 9
    score = scorer("clip_score", clip[0])
    assert score(IMAGES, [long] * 5) == pytest.approx(score(IMAGES, [long + "and a blue cross"] * 5), abs=1e-4)


class Block(torch.nn.Module):
    """A residual block as open_clip names it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = torch.nn.Sequential()
        self.mlp.add_module("c_fc", torch.nn.Linear(width, inner))
        self.mlp.add_module("gelu", torch.nn.GELU())
        self.mlp.add_module("c_proj", torch.nn.Linear(inner, width))

    def forward(self, x_BSF: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.ln_1(x_BSF)
        x_BSF = x_BSF + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x_BSF + self.mlp(self.ln_2(x_BSF))


class Tower(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resblocks = torch.nn.ModuleList([Block(16, 24), Block(16, 24)])

    def forward(self, x_BSF: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x_BSF = block(x_BSF, mask)
        return x_BSF


class Eye(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 8, 8, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.randn(16))
        self.positional_embedding = torch.nn.Parameter(torch.randn(17, 16))
        self.ln_pre, self.ln_post, self.transformer = torch.nn.LayerNorm(16), torch.nn.LayerNorm(16), Tower()
        self.proj = torch.nn.Parameter(torch.randn(16, FEATURES))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(torch.nn.Module):
    """CLIP written with torch's own layers under open_clip's names."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.transformer = Eye(), Tower()
        self.token_embedding, self.ln_final = torch.nn.Embedding(116, 16), torch.nn.LayerNorm(16)
        self.positional_embedding = torch.nn.Parameter(torch.randn(TOKENS, 16))
        self.text_projection = torch.nn.Parameter(torch.randn(16, FEATURES))
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.6))

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), -math.inf).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], mask)
        return self.ln_final(x)[:, -1] @ self.text_projection  # the last token is the end of the text


def test_hpsv2_reads_the_names_that_its_authors_publish(tmp_path: Path) -> None:
    clip_folder(tmp_path, hidden_act="gelu")
    torch.manual_seed(4)
    model = OpenClip()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    tokenizer, expected = CLIPTokenizer.from_pretrained(tmp_path), []
    with torch.no_grad():
        for pixels, prompt in zip(prepared(IMAGES), PROMPTS, strict=True):
            ids = tokenizer([prompt], truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
            expected.append(torch.cosine_similarity(model.visual(pixels[None]), model.read(ids)).item())
    assert np.ptp(expected) > 0.1
    assert scorer("hpsv2", tmp_path)(IMAGES, PROMPTS) == pytest.approx(expected, abs=1e-5)


def with_head(folder: Path, width: int = FEATURES) -> dict[str, torch.Tensor]:
    head = random_head(width)
    save_file(head, folder / "head.safetensors")
    return head


def test_aesthetic_is_the_linear_head_on_the_normalized_embedding(tmp_path: Path) -> None:
    model, head = clip_folder(tmp_path), with_head(tmp_path)
    with torch.no_grad():
        embedding = model.get_image_features(prepared(IMAGES)).pooler_output.double().numpy()
    numbers = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    for n in (0, 2, 4):
        numbers = numbers @ head[f"layers.{n}.weight"].double().numpy().T + head[f"layers.{n}.bias"].double().numpy()
    score = scorer("aesthetic", tmp_path)
    assert score(IMAGES, PROMPTS) == pytest.approx(numbers[:, 0], rel=1e-4, abs=1e-4)
    assert score(IMAGES, PROMPTS[::-1]).tolist() == score(IMAGES, PROMPTS).tolist()


def image_reward(state: dict[str, torch.Tensor], pixels: torch.Tensor, ids: torch.Tensor) -> float:
    """ImageReward written out after the paper's code, on one image and an unpadded prompt."""

    def weights(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], *weights(name), eps=eps)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = [torch.chunk(x, 2, dim=-1) for x in (q, k, v)]
        mixed = [torch.softmax(a @ b.T / math.sqrt(a.shape[-1]), -1) @ c for a, b, c in zip(*heads, strict=True)]
        return torch.cat(mixed, -1)

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    patches = conv2d(pixels[None], *weights(f"{eye}.patch_embed.proj"), stride=8)[0].flatten(1).T
    x = torch.cat([state[f"{eye}.cls_token"][0], patches]) + state[f"{eye}.pos_embed"][0]
    for n in range(2):
        block = f"{eye}.blocks.{n}"
        q, k, v = linear(norm(x, f"{block}.norm1", 1e-6), *weights(f"{block}.attn.qkv")).chunk(3, -1)
        x = x + linear(attend(q, k, v), *weights(f"{block}.attn.proj"))
        inner = gelu(linear(norm(x, f"{block}.norm2", 1e-6), *weights(f"{block}.mlp.fc1")))
        x = x + linear(inner, *weights(f"{block}.mlp.fc2"))
    seen = norm(x, f"{eye}.norm", 1e-6)

    words = state[f"{text}.embeddings.word_embeddings.weight"][ids]
    places = state[f"{text}.embeddings.position_embeddings.weight"][: len(ids)]
    y = norm(words + places, f"{text}.embeddings.LayerNorm", 1e-12)
    for n in range(2):
        layer = f"{text}.encoder.layer.{n}"
        for kind, other in (("attention", None), ("crossattention", seen)):
            source = y if other is None else other
            q, k, v = (
                linear(z, *weights(f"{layer}.{kind}.self.{part}"))
                for z, part in ((y, "query"), (source, "key"), (source, "value"))
            )
            mixed = linear(attend(q, k, v), *weights(f"{layer}.{kind}.output.dense"))
            y = norm(y + mixed, f"{layer}.{kind}.output.LayerNorm", 1e-12)
        inner = gelu(linear(y, *weights(f"{layer}.intermediate.dense")))
        y = norm(y + linear(inner, *weights(f"{layer}.output.dense")), f"{layer}.output.LayerNorm", 1e-12)
    number = y[0]
    for n in (0, 2, 4):
        number = linear(number, *weights(f"mlp.layers.{n}"))
    return (number.item() - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_equals_its_authors_model_written_out(tmp_path: Path) -> None:
    state = image_reward_folder(tmp_path)
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    expected = [
        image_reward(state, pixels, tokenizer(prompt, return_tensors="pt").input_ids[0])
        for pixels, prompt in zip(prepared(IMAGES), PROMPTS, strict=True)
    ]
    assert np.ptp(expected) > 0.1
    assert scorer("image_reward", tmp_path)(IMAGES, PROMPTS) == pytest.approx(expected, abs=1e-4)


def test_image_reward_without_its_own_configuration_has_the_published_sizes() -> None:
    from transformers import BlipConfig

    from d3po_core.scorers.image_reward import PUBLISHED

    config = BlipConfig(**PUBLISHED)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1024, 24)
    assert (config.text_config.hidden_size, config.text_config.encoder_hidden_size) == (768, 1024)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("scorers")
    clip_folder(root / "clip")
    with_head(root / "clip")
    image_reward_folder(root / "image_reward")
    return lambda name: root / ("image_reward" if name == "image_reward" else "clip")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_scores_do_not_depend_on_the_batch(name: str, folders: Callable[[str], Path]) -> None:
    together = scorer(name, folders(name))(IMAGES, PROMPTS)
    assert together.dtype == np.float64
    assert scorer(name, folders(name), batch_size=2)(IMAGES, PROMPTS) == pytest.approx(together, rel=1e-4, abs=1e-4)
    backwards = scorer(name, folders(name))(IMAGES[::-1], PROMPTS[::-1])
    assert backwards[::-1] == pytest.approx(together, rel=1e-4, abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", sorted(MODELS))
def test_half_precision_on_a_gpu_is_close_to_single_on_the_cpu(name: str, folders: Callable[[str], Path]) -> None:
    scoring = ScoringConfig(models={name: str(folders(name))})
    on_cpu = scorer(name, folders(name))(IMAGES, PROMPTS)
    on_gpu = load_scorer(name, scoring, "cuda")(IMAGES, PROMPTS)
    assert np.abs(on_gpu - on_cpu).max() < 0.05 * np.ptp(on_cpu)


def test_weights_are_read_once_and_not_before_they_are_needed(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read = models._read
    monkeypatch.setattr(models, "_read", lambda name, *rest, **more: reads.append(name) or read(name, *rest, **more))  # type: ignore
    first = scorer("clip_score", folders("clip_score"), batch_size=3)
    assert reads == []
    second = scorer("clip_score", folders("clip_score"), batch_size=3)
    assert first(IMAGES, PROMPTS).tolist() == second(IMAGES, PROMPTS).tolist()
    assert reads == ["clip_score"]


def test_memory_that_runs_out_halves_the_batch(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Judge(torch.nn.Module):
        def forward(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
            sizes.append(len(images))
            if len(images) > 2:
                raise torch.OutOfMemoryError
            return torch.arange(len(images))

    monkeypatch.setattr(models, "_read", lambda *_, **__: Judge())
    score = scorer("clip_score", folders("clip_score"), batch_size=4)
    assert score(IMAGES, PROMPTS).tolist() == [0, 1, 0, 1, 0]
    assert sizes == [4, 2, 2, 1]


class Moves:
    """A GPU there is none of: notes where models were last sent, and leaves them where they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place: dict[int, str] = {}
        self.while_scoring: list[str] = []
        to, score = torch.nn.Module.to, models.ModelScorer._score

        def noted(module: torch.nn.Module, *target: object) -> torch.nn.Module:
            if isinstance(target[0], torch.dtype):
                return to(module, *target)
            self.place |= {id(part): str(target[0]) for part in module.modules()}
            return module

        def watched(scorer: models.ModelScorer, judge: torch.nn.Module, *rest: object) -> np.ndarray:
            self.while_scoring.append(self.of(judge))
            return score(scorer, judge, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(torch.nn.Module, "to", noted)
        monkeypatch.setattr(models.ModelScorer, "_score", watched)
        monkeypatch.setattr(models, "device_type", lambda device: "cuda")

    def of(self, judge: torch.nn.Module) -> str:
        """Where a model and everything with weights in it is."""
        holders = [part for part in judge.modules() if list(part.parameters(recurse=False))]
        (place,) = {self.place.get(id(part), "cpu") for part in holders}
        return place


@pytest.mark.parametrize("name", sorted(MODELS))
def test_learned_scorers_leave_the_gpu_when_idle_unless_memory_is_fast(
    name: str, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorers, "_model", models.ModelScorer)
    judges: list[torch.nn.Module] = []
    read = models._read
    monkeypatch.setattr(models, "_read", lambda *given, **more: judges.append(read(*given, **more)) or judges[-1])  # type: ignore
    moves, scores = Moves(monkeypatch), []
    for memory in ("fast", "balanced", "medium", "small", "auto"):
        score = load_scorer(name, ScoringConfig(models={name: str(folders(name))}), "cuda", memory)
        scores.append([score(IMAGES, PROMPTS).tolist() for _ in range(2)])
        assert moves.while_scoring[-2:] == ["cuda", "cuda"]
        assert moves.of(judges[-1]) == ("cuda" if memory == "fast" else "cpu")
        with pytest.raises(D3POError, match="failed"):
            score(IMAGES[:, 0], PROMPTS)  # rows of pixels are no images
        assert moves.of(judges[-1]) == ("cuda" if memory == "fast" else "cpu")
    assert scores[0] == scores[1] == scores[2]
    assert scores[0][0] == scores[0][1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", sorted(MODELS))
def test_idle_scorers_take_no_memory_of_the_gpu(name: str, folders: Callable[[str], Path]) -> None:
    scoring = ScoringConfig(models={name: str(folders(name))}, batch_size=5)
    stays, leaves = (load_scorer(name, scoring, "cuda", memory) for memory in ("fast", "small"))
    expected = stays(IMAGES, PROMPTS)
    before = torch.cuda.memory_allocated()
    assert leaves(IMAGES, PROMPTS).tolist() == expected.tolist()
    assert torch.cuda.memory_allocated() == before


def test_only_learned_scorers_occupy_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    scoring = ScoringConfig(models={"pickscore": "http://127.0.0.1:9/score"})
    assert use_device(["brightness", "pickscore"], scoring, "auto") == "cpu"
    assert use_device(["brightness", "clip_score"], scoring, "auto") == "cuda"
    assert use_device(["clip_score"], scoring, "cpu") == "cpu"


# What is refused.


def test_weights_that_would_run_code_are_not_read(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    message = refusal("clip_score", tmp_path)
    assert "holds pytorch_model.bin" in message
    assert "save_file(torch.load(file, weights_only=True), 'model.safetensors')" in message


def test_missing_weights_are_never_drawn_at_random(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors")
    assert "1 weights are missing or of another size, such as visual_projection.weight" in refusal(
        "pickscore", tmp_path
    )


def test_head_of_another_model_is_refused(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    with_head(tmp_path, width=FEATURES + 1)
    assert f"its head takes {FEATURES + 1} numbers and gives 1; expected {FEATURES} and 1" in refusal(
        "aesthetic", tmp_path
    )


def test_clip_without_a_head_is_no_aesthetic_scorer(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    assert "has no head: weights named layers.0.weight" in refusal("aesthetic", tmp_path)


def test_weights_of_another_kind_of_model_are_refused(tmp_path: Path) -> None:
    image_reward_folder(tmp_path)
    clip_folder(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").replace(tmp_path / "model.safetensors")
    assert "weights are missing or of another size, such as" in refusal("image_reward", tmp_path)


def test_broken_file_of_weights_is_a_one_line_error(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "cannot be loaded" in refusal("hpsv2", tmp_path)


@pytest.mark.parametrize("where", ["no/such/folder/here", "./nowhere", "/nowhere"])
def test_folder_that_is_not_there_is_a_one_line_error(where: str) -> None:
    with pytest.raises(D3POError, match="no such folder"):
        load_scorer("clip_score", ScoringConfig(models={"clip_score": where}))


def test_hub_that_cannot_be_reached_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in sorted(set(MODELS) - {"image_reward"}):
        with pytest.raises(D3POError, match=MODELS[name].default) as caught:
            load_scorer(name)
        assert "\n" not in str(caught.value)


def test_image_reward_has_no_weights_unless_told() -> None:
    with pytest.raises(D3POError, match=r"set scoring\.models\.image_reward to a folder"):
        load_scorer("image_reward")


def test_only_learned_scorers_take_weights() -> None:
    with pytest.raises(D3POError, match=r"only aesthetic, clip_score, .* have weights: expected an http"):
        load_scorer("taste", ScoringConfig(models={"taste": "my/weights"}))
    for where in ("my/weights", "http://127.0.0.1:9/score"):
        with pytest.raises(D3POError, match="brightness is built in and takes neither weights nor a server"):
            load_scorer("brightness", ScoringConfig(models={"brightness": where}))
