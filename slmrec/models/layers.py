"""Layer types that a checkpoint may hold besides those of its decoder family."""

from functools import cache

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor, nn

from slmrec.machine import has_vnni


def quantize_rows(values: Float[Tensor, "... width"]) -> tuple[Int8[Tensor, "... width"], Float[Tensor, "... 1"]]:
    """Round each row to -127..127 by a scale of its own: symmetric, no zero point; a zero row keeps scale 0.

    A row's result depends on that row alone, so a user's activations do not depend on who shares the batch.

    >>> quantized, scale = quantize_rows(torch.tensor([[-127.0, 63.4, 0.0]]))
    >>> quantized.tolist(), scale.tolist()
    ([[-127, 63, 0]], [[1.0]])
    """
    scale = values.abs().amax(dim=-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return (values * inverse).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """Linear layer with int8 weights per output channel and int8 activations per token.

    Products of 8-bit integers are summed exactly in int32; the two scales are applied once, to the sums.
    Inference only: no gradient passes the rounding.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Int8Linear":
        """Quantize the weights of a trained layer."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        quantized, scale = quantize_rows(linear.weight.detach().float())
        layer.weight.copy_(quantized)
        layer.scale.copy_(scale[:, 0])
        if layer.bias is not None:
            layer.bias.copy_(linear.bias.detach())
        return layer

    def forward(self, inputs: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """Inputs @ weight.T + bias, in 8 bits."""
        quantized, scale = quantize_rows(inputs.float())
        rows = quantized.reshape(-1, self.in_features)
        sums = int8_product(rows, self.weight)
        outputs = sums.reshape(*inputs.shape[:-1], self.out_features).float() * scale * self.scale
        return outputs if self.bias is None else outputs + self.bias


class Int8WeightLinear(nn.Module):
    """Linear layer with int8 weights per output channel, computing in fp32.

    What LLM.int8 checkpoints become outside PyTorch: their very integers, and no rounding of activations.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None

    def forward(self, inputs: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """Inputs @ (weight * scale).T + bias."""
        return nn.functional.linear(inputs, self.weight.float() * self.scale[:, None], self.bias)


EXACT_INPUTS = 2**24 // 127**2
"""So many products of 8-bit integers a sum in fp32 takes exactly, whatever their order."""
CUDA_ROWS, CUDA_STEP = 17, 8
"""Fewest rows that CUDA's product of 8-bit integers takes, and what its other sizes are multiples of."""


def int8_product(
    left: Int8[Tensor, "rows inputs"], right: Int8[Tensor, "outputs inputs"]
) -> Int32[Tensor, "rows outs"]:
    """Products of 8-bit integers, left @ right.T, summed exactly.

    Without instructions for it PyTorch multiplies 8-bit integers one by one, some thirty times as slowly as fp32 does,
    which is as exact on few enough at once.
    """
    if left.is_cuda:
        return torch._int_mm(for_cuda(left, CUDA_ROWS), for_cuda(right).t())[: len(left), : len(right)]
    if multiplies_8_bits() and left.shape[1] > 1:  # PyTorch 2.13 leaves sums of a single product unwritten
        return torch._int_mm(left, right.t())
    pairs = zip(torch.split(left, EXACT_INPUTS, dim=1), torch.split(right, EXACT_INPUTS, dim=1), strict=True)
    parts = [(some.float() @ others.float().t()).int() for some, others in pairs]
    return torch.stack(parts).sum(dim=0, dtype=torch.int32) if len(parts) > 1 else parts[0]


@cache
def multiplies_8_bits() -> bool:
    """Whether this processor has instructions for sums of 8-bit products."""
    return has_vnni()


def for_cuda(values: Int8[Tensor, "rows width"], least_rows: int = 0) -> Int8[Tensor, "padded_rows padded_width"]:
    """Zeros behind rows and columns, so that CUDA's product takes them: both in eights, or so many rows at least."""
    rows, width = values.shape
    more = max(0, least_rows - rows) if least_rows else -rows % CUDA_STEP
    return nn.functional.pad(values, (0, -width % CUDA_STEP, 0, more)) if more or width % CUDA_STEP else values
