"""Sizes of images: the grid and its nearest sizes, the settings, and the sizes that groups draw."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.errors import D3POError
from d3po_core.seeds import evaluation_seeds, member_seed
from d3po_core.sizes import Grid

sides = st.integers(1, 5000)
grids = st.builds(Grid, st.just("A"), st.sampled_from([2, 8, 16, 32]), st.one_of(st.none(), st.integers(64, 3000)))


@given(grids, st.tuples(sides, sides))
def test_the_nearest_sizes_fit_and_nothing_that_fits_lies_between(grid: Grid, size: tuple[int, int]) -> None:
    near = grid.nearest(size)
    assert 1 <= len(near) <= 2
    assert all(map(grid.fits, near))
    for place, side in enumerate(size):
        fitting = range(grid.step, (grid.most or 6000) + 1, grid.step)
        closest = min(abs(n - side) for n in fitting)
        assert closest == min(abs(found[place] - side) for found in near)


@given(grids, st.tuples(sides, sides))
def test_a_size_is_refused_if_and_only_if_it_is_not_its_own_nearest(grid: Grid, size: tuple[int, int]) -> None:
    if grid.nearest(size) == [size]:
        grid.check(size, "an image")
        return
    with pytest.raises(D3POError) as refused:
        grid.check(size, "sample.sizes: an image")
    named = {(int(h), int(w)) for h, w in re.findall(r"(\d+) x (\d+)", str(refused.value).partition("nearest")[2])}
    assert named == set(grid.nearest(size))


def test_the_line_names_field_family_and_neighbours() -> None:
    with pytest.raises(D3POError) as refused:
        Grid("StableDiffusion3Pipeline", 16, 3072).check((500, 760), "sample.height and sample.width: an image")
    assert str(refused.value) == (
        "sample.height and sample.width: an image of 500 x 760 pixels does not fit a StableDiffusion3Pipeline; "
        "expected multiples of 16 up to 3072, height x width: nearest are 496 x 752 and 512 x 768"
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"sample": {"height": 64}}, "sample.height is set and sample.width is not; set both, or neither"),
        ({"evaluate": {"width": 64}}, "evaluate.width is set and evaluate.height is not; set both, or neither"),
        ({"sample": {"height": 64, "width": 64, "sizes": [[64, 32]]}}, "sample.sizes is set, and so are"),
        ({"sample": {"sizes": [[64, 32], [64, 32]]}}, "sample.sizes names a size twice"),
        ({"sample": {"negative_prompt": "blurry"}}, "sample.guidance_scale is 1, which turns guidance off"),
        ({"sample": {"sizes": [[64]]}}, r"sample.sizes is \[\[64\]\]; write pairs of height and width, such as"),
        ({"sample": {"sizes": [64, 96]}}, "write pairs of height and width, such as"),
        ({"sample": {"sizes": "64x96"}}, "write pairs of height and width, such as"),
    ],
)
def test_settings_that_disagree_are_one_line(values: dict[str, object], told: str) -> None:
    with pytest.raises(D3POError, match=told) as refused:
        load_config(values, "test")
    assert "\n" not in str(refused.value)


def test_held_out_images_are_as_sampled_or_native_or_their_own() -> None:
    def size(**sections: object) -> tuple[int, int] | None:
        return CampaignConfig.model_validate(sections).held_out_size

    assert size() is None
    assert size(sample={"height": 64, "width": 32}) == (64, 32)
    assert size(sample={"sizes": [[64, 32], [32, 64]]}) is None
    assert size(sample={"sizes": [[64, 32]]}) == (64, 32)
    assert size(sample={"height": 64, "width": 32}, evaluate={"height": 96, "width": 96}) == (96, 96)


def test_a_configuration_without_sizes_keeps_its_digest() -> None:
    """That of version 0.5.0, as fields that came later have their defaults."""
    before = "ac6422f7126d37015fe7ddfbc213a33698db206466b194ae7bfac08f66974918"
    assert CampaignConfig().sha256() == before
    sized = {"height": 64, "width": 64}
    changed: list[dict[str, object]] = [
        {"sample": sized}, {"evaluate": sized}, {"sample": {"sizes": [[64, 32]]}},
        {"sample": {"long_prompts": "error"}}, {"sample": {"negative_prompt": "x", "guidance_scale": 2}},
    ]  # fmt: skip
    digests = {CampaignConfig.model_validate(values).sha256() for values in [{}, *changed]}
    assert len(digests) == 6


def test_groups_draw_sizes_by_the_campaigns_seed_and_keep_their_other_seeds() -> None:
    sizes = ((64, 64), (64, 96), (96, 64))

    def drawn(campaign: int, round_number: int) -> list[tuple[int, int] | None]:
        return [member_seed(campaign, round_number, f"p{i}", 0, 0, True, sizes).size for i in range(300)]

    assert drawn(1, 1) == drawn(1, 1)
    assert drawn(1, 1) != drawn(2, 1)
    assert drawn(1, 1) != drawn(1, 2)
    assert min(Counter(drawn(1, 1)).values()) > 70
    members = [member_seed(1, 1, "p", 0, member, False, sizes) for member in range(20)]
    assert len({member.size for member in members}) == 1
    for member, seed in enumerate(members):
        plain = member_seed(1, 1, "p", 0, member, False)
        assert (seed.initial_seed, seed.noise_seed, plain.size) == (plain.initial_seed, plain.noise_seed, None)
    assert {seed.size for seed in evaluation_seeds(["a", "b"], 3, 1, (64, 32))} == {(64, 32)}
