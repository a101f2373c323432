"""Latents as rows of tokens, each a patch of 2 x 2 elements, and the tokens' places: FLUX and Qwen-Image read these.

Tensor names carry their shape: B images, C H W latent channels, height, width; L tokens, K = 4 C.
"""

import torch


def packed(latent_BCHW: torch.Tensor) -> torch.Tensor:
    """Return tokens ``[B, L, K]`` of a latent, row by row."""
    patches = latent_BCHW.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # B C h 2 w 2
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(token_BLK: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the latent ``[B, C, height, width]`` of its tokens; undoes ``packed``."""
    patches = token_BLK.unflatten(1, (height // 2, width // 2)).unflatten(-1, (-1, 2, 2))  # B h w C 2 2
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(-2).flatten(2, 3)


def places(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return the place ``[L, 3]`` of each image token: 0, row, column."""
    rows, columns = (torch.arange(side // 2, device=device, dtype=torch.float32) for side in (height, width))
    return torch.cartesian_prod(torch.zeros(1, device=device), rows, columns)
