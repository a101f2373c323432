"""An example of your own scorer: `d3po run round --campaign red --set judge.scorers=[my_scorer:redness]`."""

import numpy as np


def redness(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Return how much redder each image is than it is green or blue.

    Args:
        images: uint8 ``[B, height, width, 3]``, RGB.
        prompts: the prompt of each image.

    Returns:
        B finite numbers; higher is better.
    """
    colours = images.mean(axis=(1, 2)) / 255
    return colours[:, 0] - colours[:, 1:].mean(axis=1)
