"""Proxy scorers: numbers against closed forms and PIL, and what a user's own scorer may do wrong."""

import io
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d3po_core.errors import D3POError
from d3po_core.scorers.finding import BUILT_IN, load_scorer
from d3po_core.scorers.shapes import all_scenes, draw

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
PROMPTS = ["a red circle on a gray background"] * 5


def test_jpeg_sizes_equal_pil_in_kilobytes() -> None:
    expected = []
    for image in IMAGES:
        with io.BytesIO() as buffer:
            Image.fromarray(image, "RGB").save(buffer, "JPEG", quality=95)
            expected.append(len(buffer.getvalue()) / 1000)
    assert load_scorer("jpeg_incompressibility")(IMAGES, PROMPTS).tolist() == expected
    assert load_scorer("jpeg_compressibility")(IMAGES, PROMPTS).tolist() == [-size for size in expected]


def test_flat_image_is_more_compressible_than_noise() -> None:
    flat = np.full((1, 64, 64, 3), 90, dtype=np.uint8)
    score = load_scorer("jpeg_compressibility")
    assert score(flat, PROMPTS[:1])[0] > score(IMAGES[:1], PROMPTS[:1])[0]


@pytest.mark.parametrize(
    ("colour", "luma"),
    [
        ((0, 0, 0), 0.0),
        ((255, 255, 255), 1.0),
        ((255, 0, 0), 0.299),
        ((0, 255, 0), 0.587),
        ((0, 0, 255), 0.114),
        ((51, 102, 204), 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.8),
    ],
)
def test_brightness_is_luma_in_closed_form(colour: tuple[int, int, int], luma: float) -> None:
    images = np.empty((2, 8, 8, 3), dtype=np.uint8)
    images[:] = colour
    images[1, :4] = 0
    assert load_scorer("brightness")(images, PROMPTS[:2]) == pytest.approx([luma, luma / 2], abs=1e-12)


@pytest.mark.parametrize("name", ["brightness", "jpeg_compressibility"])
def test_equal_images_score_equally_to_the_last_bit(name: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for count in range(2, 40):
        assert len(np.unique(load_scorer(name)(np.stack([image] * count), ["a thing"] * count))) == 1


def test_prompt_alignment_is_one_for_the_drawn_scene_and_zero_for_another() -> None:
    scenes = all_scenes()[:6]
    indices = torch.tensor([[scene.shape, scene.colour, scene.background] for scene in scenes]).unbind(1)
    drawn = draw(*indices, torch.Generator().manual_seed(0))
    images = (drawn * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    prompts = [scene.prompt for scene in scenes]
    score = load_scorer("prompt_alignment")
    assert score(images, prompts).tolist() == [1.0] * 6
    assert score(images, prompts[::-1]).tolist() == [0.0] * 6


def test_prompt_alignment_explains_a_prompt_of_another_world() -> None:
    with pytest.raises(D3POError, match="'prompt_alignment': prompt 'a cat' is not of the shapes world"):
        load_scorer("prompt_alignment")(IMAGES, ["a cat"] * 5)


def test_prompt_alignment_explains_images_of_another_size() -> None:
    with pytest.raises(D3POError, match="judges 64 x 64"):
        load_scorer("prompt_alignment")(IMAGES[:, :32], PROMPTS)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_scores_do_not_depend_on_the_batch(name: str) -> None:
    together = load_scorer(name)(IMAGES, PROMPTS)
    alone = [load_scorer(name)(IMAGES[i : i + 1], PROMPTS[:1])[0] for i in range(5)]
    assert together == pytest.approx(alone, rel=1e-12)
    assert together.dtype == np.float64


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a module of the user's on the import path, as a file on PYTHONPATH would be."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))

    return write


def test_user_scorer_is_called_with_images_and_prompts(write_module: Callable[[str, str], None]) -> None:
    write_module(
        "my_scorer_works",
        """
        def redness(images, prompts):
            assert images.dtype.name == "uint8" and len(images) == len(prompts)
            return [int(image[..., 0].sum()) + len(prompt) for image, prompt in zip(images, prompts)]
        """,
    )
    expected = IMAGES[..., 0].astype(int).sum(axis=(1, 2)) + len(PROMPTS[0])
    assert load_scorer("my_scorer_works:redness")(IMAGES, PROMPTS).tolist() == expected.tolist()


def test_user_scorer_may_live_in_a_package(write_module: Callable[[str, str], None], tmp_path: Path) -> None:
    (tmp_path / "my_scorer_package").mkdir()
    (tmp_path / "my_scorer_package" / "__init__.py").touch()
    write_module("my_scorer_package/inner", "def zero(images, prompts): return [0] * len(images)")
    assert load_scorer("my_scorer_package.inner:zero")(IMAGES, PROMPTS).tolist() == [0.0] * 5


FAULTY = """
import numpy as np
number = 3
def too_few(images, prompts): return [1.0]
def a_matrix(images, prompts): return np.ones((len(images), 2))
def not_a_number(images, prompts): return [1, 2, float("nan"), 4, 5]
def infinite(images, prompts): return [1, 2, 3, 4, -float("inf")]
def words(images, prompts): return ["good"] * len(images)
def raises(images, prompts): raise KeyError("weights")
def wrong_arguments(images): return [0] * len(images)
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("number", "is a int; expected a function"),
        ("absent", "cannot be imported"),
        ("too_few", r"returned shape \[1\]; expected one number for each of 5"),
        ("a_matrix", r"returned shape \[5, 2\]"),
        ("not_a_number", "returned nan for image 2"),
        ("infinite", "returned -inf for image 4"),
        ("words", "failed: ValueError"),
        ("raises", "failed: KeyError: 'weights'"),
        ("wrong_arguments", "failed: TypeError"),
    ],
)
def test_faulty_user_scorer_is_named_in_one_line(
    write_module: Callable[[str, str], None], function: str, message: str
) -> None:
    write_module("my_scorer_faulty", FAULTY)
    name = f"my_scorer_faulty:{function}"
    with pytest.raises(D3POError, match=message) as caught:
        load_scorer(name)(IMAGES, PROMPTS)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_module_anywhere:f", ":f", "my.relative..dots:f", "json:"])
def test_scorer_that_cannot_be_imported_is_a_one_line_error(name: str) -> None:
    with pytest.raises(D3POError, match="cannot be imported") as caught:
        load_scorer(name)
    assert "\n" not in str(caught.value)


def test_module_that_breaks_while_it_is_imported_is_a_one_line_error(write_module: Callable[[str, str], None]) -> None:
    write_module("my_scorer_broken", "def score(images, prompts)\n    return 1")
    with pytest.raises(D3POError, match="my_scorer_broken:score") as caught:
        load_scorer("my_scorer_broken:score")
    assert "\n" not in str(caught.value)


def test_unknown_scorer_error_lists_the_known_ones() -> None:
    with pytest.raises(D3POError) as caught:
        load_scorer("jpeg")
    assert all(name in str(caught.value) for name in BUILT_IN)
    assert "package.module:function" in str(caught.value)
