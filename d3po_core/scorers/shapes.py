"""The shapes world: drawn images of prompts such as ``a red circle on a black background``, and its judge.

The embedded base model is trained on this world, so a program can decide whether an image shows its prompt; no learned
scorer is needed.

Tensor names carry their shape: B images, C = 3 channels (RGB), H = W = 64 pixels, K palette entries, S shapes.
"""

import functools
import itertools
import math
import re
from dataclasses import dataclass

import torch

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.65, 0.15, 0.80),
    "cyan": (0.10, 0.80, 0.90),
}
BACKGROUNDS = {"black": 0.08, "gray": 0.50, "white": 0.92}

MIN_IOU = 0.75
MIN_OBJECT_PIXELS = 60
MAX_FOREIGN_COLOUR = 0.15
MIN_BACKGROUND_SHARE = 0.80

_PATTERN = re.compile(r"a (\w+) (\w+) on a (\w+) background")
# Half-extents per unit of radius, chosen so that the four shapes cover similar areas.
_SQUARE_HALF = 0.88
_CROSS_HALF_WIDTH = 0.36
_AREA_PER_RADIUS2 = {
    "circle": math.pi,
    "square": (2 * _SQUARE_HALF) ** 2,
    "triangle": 3 * math.sqrt(3) / 4 * 1.25**2,
    "cross": 8 * _CROSS_HALF_WIDTH - 4 * _CROSS_HALF_WIDTH**2,
}


@dataclass(frozen=True)
class Scene:
    """The content of a prompt; each field is an index into SHAPES, COLOURS or BACKGROUNDS."""

    shape: int
    colour: int
    background: int

    @property
    def prompt(self) -> str:
        """Return the sentence that describes this scene."""
        colour, background = list(COLOURS)[self.colour], list(BACKGROUNDS)[self.background]
        return f"a {colour} {SHAPES[self.shape]} on a {background} background"


def all_scenes() -> list[Scene]:
    """Return every scene of the world (4 shapes x 6 colours x 3 backgrounds = 72), in a fixed order."""
    sizes = (range(len(SHAPES)), range(len(COLOURS)), range(len(BACKGROUNDS)))
    return [Scene(*indices) for indices in itertools.product(*sizes)]


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene is held out for evaluation: a quarter of them, covering every word."""
    return (scene.shape + scene.colour + scene.background) % 4 == 0


def parse_prompt(prompt: str) -> Scene:
    """Parse a prompt of this world into its scene.

    Raises:
        ValueError: the prompt is not a sentence of this world; the message lists its words.
    """
    match = _PATTERN.fullmatch(prompt.strip())
    words = match.groups() if match else ()
    if len(words) != 3 or words[0] not in COLOURS or words[1] not in SHAPES or words[2] not in BACKGROUNDS:
        raise ValueError(
            f"prompt {prompt!r} is not of the shapes world; expected 'a COLOUR SHAPE on a BACKGROUND background' "
            f"with COLOUR in {', '.join(COLOURS)}; SHAPE in {', '.join(SHAPES)}; "
            f"BACKGROUND in {', '.join(BACKGROUNDS)}"
        )
    colour, shape, background = words
    return Scene(SHAPES.index(shape), list(COLOURS).index(colour), list(BACKGROUNDS).index(background))


@functools.cache
def _palette(device: torch.device) -> torch.Tensor:
    grays = [(level,) * 3 for level in BACKGROUNDS.values()]
    return torch.tensor([*COLOURS.values(), *grays], device=device)


def _pixel_grid(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    axis = torch.arange(IMAGE_SIZE, device=device, dtype=torch.float32) + 0.5
    y_HW, x_HW = torch.meshgrid(axis, axis, indexing="ij")
    return x_HW, y_HW


def signed_distance(centre_B2: torch.Tensor, radius_SB: torch.Tensor) -> torch.Tensor:
    """Return every pixel's distance to the outline of each of the S shapes, negative inside.

    Args:
        centre_B2: (x, y) centre of each object, in pixels.
        radius_SB: size of each object as shape S, in pixels.

    Returns:
        ``[S, B, H, W]``, in pixels (exact for the circle, a lower bound outside the others' corners).
    """
    x_HW, y_HW = _pixel_grid(centre_B2.device)
    dx_BHW = x_HW - centre_B2[:, 0, None, None]
    dy_BHW = y_HW - centre_B2[:, 1, None, None]
    ax_BHW, ay_BHW = dx_BHW.abs(), dy_BHW.abs()
    circle_r, square_r, triangle_r, cross_r = radius_SB[..., None, None].unbind(0)
    circle = (dx_BHW**2 + dy_BHW**2).sqrt() - circle_r
    square = torch.maximum(ax_BHW, ay_BHW) - _SQUARE_HALF * square_r
    inradius = 0.5 * 1.25 * triangle_r
    triangle = torch.maximum(dy_BHW, ax_BHW * math.sqrt(3) / 2 - dy_BHW * 0.5) - inradius
    bar = _CROSS_HALF_WIDTH * cross_r
    cross = torch.minimum(torch.maximum(ax_BHW - cross_r, ay_BHW - bar), torch.maximum(ax_BHW - bar, ay_BHW - cross_r))
    return torch.stack([circle, square, triangle, cross])


def draw(
    shape_B: torch.Tensor, colour_B: torch.Tensor, background_B: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Draw one image per scene, with random place, size and background texture.

    Returns:
        ``[B, 3, 64, 64]`` in [0, 1], on the device of the indices.
    """
    device, count = shape_B.device, shape_B.shape[0]

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=device, generator=generator) * (high - low) + low

    radius_B = uniform(13.0, 19.0, count)
    reach_B = 1.15 * radius_B
    centre_B2 = reach_B[:, None] + uniform(0, 1, count, 2) * (IMAGE_SIZE - 2 * reach_B[:, None])
    distance_SBHW = signed_distance(centre_B2, radius_B.expand(len(SHAPES), -1))
    distance_BHW = distance_SBHW[shape_B, torch.arange(count, device=device)]
    cover_B1HW = (0.5 - distance_BHW).clamp(0, 1)[:, None]

    x_HW, y_HW = _pixel_grid(device)
    angle_B, phase_B = uniform(0, math.pi, count), uniform(0, 2 * math.pi, count)
    frequency_B = 2 * math.pi / uniform(6, 14, count)
    along_BHW = angle_B.cos()[:, None, None] * x_HW + angle_B.sin()[:, None, None] * y_HW
    stripes_BHW = 0.06 * (along_BHW * frequency_B[:, None, None] + phase_B[:, None, None]).sin()
    palette_K3 = _palette(device)
    levels = palette_K3[len(COLOURS) :, 0]
    ground_B1HW = (levels[background_B][:, None, None] + stripes_BHW)[:, None]
    image_BCHW = cover_B1HW * palette_K3[colour_B][:, :, None, None] + (1 - cover_B1HW) * ground_B1HW
    return image_BCHW.clamp(0, 1)


def drawn_right(image_BCHW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Decide for each image whether it shows its prompt: shape, colour and background.

    An image is right if its largest patch of pure colour meets four conditions. It has the prompted colour. It overlaps
    the ideal prompted shape of the same centre and area, with an intersection over union above 0.75 and above every
    other shape's. Other colours stay below 15 % of it. And 80 % of the rest has the prompted background level.

    Args:
        image_BCHW: ``[B, 3, 64, 64]`` in [0, 1].
        prompts: B prompts of this world.

    Returns:
        bool ``[B]``.

    Raises:
        ValueError: a prompt is not of this world, or the images are not 64 x 64.
    """
    if image_BCHW.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"prompt_alignment judges 64 x 64 RGB images of the shapes world; found {list(image_BCHW.shape)}"
        )
    scenes = [parse_prompt(prompt) for prompt in prompts]
    device, count = image_BCHW.device, image_BCHW.shape[0]
    palette_K3 = _palette(device)
    pixels_BP3 = image_BCHW.float().flatten(2).transpose(1, 2)
    nearest_BHW = torch.cdist(pixels_BP3, palette_K3.expand(count, -1, -1)).argmin(-1).view(-1, *image_BCHW.shape[2:])
    area_BK = torch.stack([(nearest_BHW == k).sum((1, 2)) for k in range(len(palette_K3))], dim=1)

    colour_area_B, colour_B = area_BK[:, : len(COLOURS)].max(dim=1)
    foreign_B = area_BK[:, : len(COLOURS)].sum(1) - colour_area_B
    mask_BHW = nearest_BHW == colour_B[:, None, None]
    iou_SB = _iou_with_ideal_shapes(mask_BHW)
    iou_B, shape_B = iou_SB.max(dim=0)

    # Two pixels around the object blend object and background, so they count as neither.
    near_BHW = torch.nn.functional.max_pool2d(mask_BHW[:, None].float(), 5, 1, 2)[:, 0] > 0
    ground_area_B = (~near_BHW).sum((1, 2)).clamp(min=1)
    wanted = torch.tensor([[s.shape, s.colour, s.background] for s in scenes], device=device)
    ground_B = wanted[:, 2] + len(COLOURS)
    ground_share_B = ((nearest_BHW == ground_B[:, None, None]) & ~near_BHW).sum((1, 2)) / ground_area_B
    return (
        (colour_area_B >= MIN_OBJECT_PIXELS)
        & (foreign_B <= MAX_FOREIGN_COLOUR * colour_area_B)
        & (colour_B == wanted[:, 1])
        & (shape_B == wanted[:, 0])
        & (iou_B > MIN_IOU)
        & (ground_share_B >= MIN_BACKGROUND_SHARE)
    )


def _iou_with_ideal_shapes(mask_BHW: torch.Tensor) -> torch.Tensor:
    """Return each mask's overlap ``[S, B]`` with the four ideal shapes of its own centre and area."""
    x_HW, y_HW = _pixel_grid(mask_BHW.device)
    area_B = mask_BHW.sum((1, 2)).clamp(min=1).float()
    centre_B2 = torch.stack([(mask_BHW * x_HW).sum((1, 2)), (mask_BHW * y_HW).sum((1, 2))], dim=1) / area_B[:, None]
    per_radius2_S = torch.tensor([_AREA_PER_RADIUS2[shape] for shape in SHAPES], device=mask_BHW.device)
    radius_SB = (area_B / per_radius2_S[:, None]).sqrt()
    ideal_SBHW = signed_distance(centre_B2, radius_SB) < 0
    union_SB = (ideal_SBHW | mask_BHW).sum((2, 3))
    return (ideal_SBHW & mask_BHW).sum((2, 3)) / union_SB
