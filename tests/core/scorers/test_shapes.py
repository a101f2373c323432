"""The judge of the shapes world: right images pass, each kind of wrong does not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.scorers.shapes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    Scene,
    all_scenes,
    draw,
    drawn_right,
    is_held_out,
    parse_prompt,
)

SCENES = all_scenes()
PROMPTS = [scene.prompt for scene in SCENES]


def drawn(scenes: list[Scene], seed: int) -> torch.Tensor:
    indices = torch.tensor([[scene.shape, scene.colour, scene.background] for scene in scenes]).unbind(1)
    return draw(*indices, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_every_drawn_scene_is_accepted(seed: int) -> None:
    images = drawn(SCENES, seed)
    assert images.shape == (72, 3, IMAGE_SIZE, IMAGE_SIZE)
    wrong = [prompt for prompt, right in zip(PROMPTS, drawn_right(images, PROMPTS), strict=True) if not right]
    assert wrong == []


@pytest.mark.parametrize("seed", range(3))
def test_eight_bit_images_are_judged_as_drawn(seed: int) -> None:
    images = (drawn(SCENES, seed) * 255).round() / 255
    assert drawn_right(images, PROMPTS).all()


@pytest.mark.parametrize("part", ["shape", "colour", "background"])
def test_every_other_value_of_one_word_is_rejected(part: str) -> None:
    images = drawn(SCENES, 0)
    count = {"shape": len(SHAPES), "colour": len(COLOURS), "background": len(BACKGROUNDS)}[part]
    for shift in range(1, count):
        other = [
            Scene(**{**vars(scene), part: (getattr(scene, part) + shift) % count}).prompt for scene in SCENES
        ]  # fmt: skip
        assert not drawn_right(images, other).any()


def four_small(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Two images, each twice at half the size, in one."""
    small = [torch.nn.functional.interpolate(image, scale_factor=0.5, mode="area") for image in (first, second)]
    return torch.cat([torch.cat(small, dim=3), torch.cat(small[::-1], dim=3)], dim=2)


@pytest.mark.parametrize("shift", [1, 2, 5])
def test_objects_of_two_colours_are_rejected(shift: int) -> None:
    others = [Scene(scene.shape, (scene.colour + shift) % len(COLOURS), scene.background) for scene in SCENES]
    assert not drawn_right(four_small(drawn(SCENES, 1), drawn(others, 1)), PROMPTS).any()


def test_several_objects_of_the_prompted_kind_are_rejected() -> None:
    images = drawn(SCENES, 2)
    assert not drawn_right(four_small(images, images), PROMPTS).any()


def test_empty_images_are_rejected() -> None:
    for level in BACKGROUNDS.values():
        assert not drawn_right(torch.full((72, 3, IMAGE_SIZE, IMAGE_SIZE), level), PROMPTS).any()


def test_image_filled_with_the_prompted_colour_is_rejected() -> None:
    for rgb in COLOURS.values():
        assert not drawn_right(torch.tensor(rgb)[None, :, None, None].expand(72, 3, 64, 64), PROMPTS).any()


def test_noise_is_rejected() -> None:
    generator = torch.Generator().manual_seed(0)
    assert not drawn_right(torch.rand(72, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator), PROMPTS).any()


def test_speck_of_the_right_kind_is_too_small() -> None:
    images = torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS["black"])
    images[0, :, 30:37, 30:37] = torch.tensor(COLOURS["red"])[:, None, None]
    assert not drawn_right(images, ["a red square on a black background"]).any()
    images[0, :, 28:38, 28:38] = torch.tensor(COLOURS["red"])[:, None, None]
    assert drawn_right(images, ["a red square on a black background"]).all()


def test_background_that_is_half_another_level_is_rejected() -> None:
    images = drawn(SCENES, 3)
    halves = images.clone()
    halves[:, :, : IMAGE_SIZE // 2] = images.roll(1, 0)[:, :, : IMAGE_SIZE // 2]
    assert not drawn_right(halves, PROMPTS).any()


def test_image_is_judged_alone_as_in_a_batch() -> None:
    images = torch.cat([drawn(SCENES[:8], 4), torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))])
    prompts = PROMPTS[:12]
    together = drawn_right(images, prompts)
    assert together.any()
    assert not together.all()
    for i in range(12):
        assert drawn_right(images[i : i + 1], prompts[i : i + 1]).item() == together[i].item()


def test_scenes_are_the_72_of_the_world() -> None:
    assert len(set(PROMPTS)) == 72
    assert all(parse_prompt(scene.prompt) == scene for scene in SCENES)


@given(st.sampled_from(SCENES), st.sampled_from(("", " ", "\n", "\t ")))
def test_prompt_reads_back_into_its_scene(scene: Scene, space: str) -> None:
    assert parse_prompt(space + scene.prompt + space) == scene


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat",
        "a red circle",
        "a pink circle on a black background",
        "a red star on a black background",
        "a red circle on a blue background",
        "a circle red on a black background",
        "a red circle on a black background, please",
    ],
)
def test_foreign_prompt_error_lists_every_word(prompt: str) -> None:
    with pytest.raises(ValueError, match="not of the shapes world") as caught:
        parse_prompt(prompt)
    assert repr(prompt) in str(caught.value)
    assert all(word in str(caught.value) for word in (*SHAPES, *COLOURS, *BACKGROUNDS))


def test_held_out_scenes_are_a_quarter_and_cover_every_word() -> None:
    held_out = [scene for scene in SCENES if is_held_out(scene)]
    assert len(held_out) == 18
    assert {scene.shape for scene in held_out} == set(range(len(SHAPES)))
    assert {scene.colour for scene in held_out} == set(range(len(COLOURS)))
    assert {scene.background for scene in held_out} == set(range(len(BACKGROUNDS)))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="64 x 64"):
        drawn_right(torch.zeros(1, 3, 32, 32), PROMPTS[:1])
