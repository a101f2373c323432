"""The factor that keeps half-precision gradients from vanishing.

Gradients in fp16 vanish below 6e-8, so the loss is multiplied before the backward pass and the gradients are divided
afterwards. They overflow above 65504; the factor then shrinks for good.
"""

import torch

from d3po_core.models.trained import Trained

FP16_LOSS_SCALE, SHRINK = 2.0**12, 8.0


class LossScale:
    """The factor on losses; 1 unless passes are in fp16.

    Attributes:
        first: the factor of an untrained policy.
        factor: the current factor.
    """

    def __init__(self, dtype: torch.dtype, weights: Trained) -> None:
        self._weights = weights
        self.first = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0
        self.factor = self.first

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's scaled gradient; call ``unscale`` after an update's last one."""
        (loss * self.factor).backward()

    def unscale(self) -> None:
        """Divide the accumulated gradient by the factor; call once per update."""
        if self.factor != 1.0:
            for _, parameter in self._weights.parameters():
                if parameter.grad is not None:
                    parameter.grad /= self.factor

    def shrink(self) -> bool:
        """Lower the factor if an update's gradient overflowed; return whether to compute it again."""
        gradients = [p.grad for _, p in self._weights.parameters() if p.grad is not None]
        if self.factor <= 1 or bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all()):
            return False
        self.factor /= SHRINK
        return True
