"""The 16-bit floating-point formats in which DALL·E stores Adam's moments (App. D), as codes in int16 tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FIELD = 0x7F800000
"""Exponent bits of an fp32 number. Its significand has 23 bits, its bias is 127."""


@dataclass(frozen=True)
class FloatFormat:
    """A 16-bit floating-point format with subnormal numbers, and the top exponent kept for Inf and NaN, as in IEEE 754.

    From the highest bit down a code has a sign (if any), an exponent e and a significand f; its value is
    ±2^(e − bias) · (1 + f / 2^significand_bits), and ±2^(1 − bias) · f / 2^significand_bits where e is 0. Codes travel as
    int16, of which only the bits matter: PyTorch does little with uint16.

    `encode` and `decode` are chains of whole-tensor integer and float operations, without look-ups, branches or waiting for
    a GPU. Each temporary takes 4 bytes per element, three live at a time: callers with much to convert go in chunks. No
    operation makes or takes an fp32 subnormal that matters, so flushing those to zero changes nothing.
    """

    name: str
    """Bits of sign, exponent and significand, as the paper writes them."""
    signed: bool
    exponent_bits: int
    significand_bits: int
    bias: int
    """What is taken off an exponent."""

    def __post_init__(self) -> None:
        if self.signed + self.exponent_bits + self.significand_bits != 16:
            raise ValueError(f"format {self.name}: the bits of sign, exponent and significand must add up to 16")
        if not (2 <= self.exponent_bits <= 6 and 0 <= self.bias <= 2**self.exponent_bits - 3):
            raise ValueError(f"format {self.name}: needs 2 to 6 exponent bits, and a bias that fp32 has room for")

    @property
    def infinity(self) -> int:
        """Code of +Inf; NaNs follow it."""
        return (2**self.exponent_bits - 1) << self.significand_bits

    @property
    def max(self) -> float:
        """Largest finite value."""
        return (2 - 2.0**-self.significand_bits) * 2.0 ** (2**self.exponent_bits - 2 - self.bias)

    @property
    def tiny(self) -> float:
        """Smallest normal value; from here to `max` rounding errs by at most 2^-(significand_bits + 1), relatively."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """Smallest value above 0; below `tiny` rounding errs by at most half of it."""
        return self.tiny * 2.0**-self.significand_bits

    @torch.no_grad()
    def encode(
        self,
        values: Tensor,
        *,
        generator: torch.Generator | None = None,
        saturate: bool = True,
        out: Tensor | None = None,
    ) -> Tensor:
        """Codes of `values`.

        Args:
            values: fp32 of any shape. In a format without sign −0 becomes 0, and negative values, which are the caller's
                error, become NaN, except that those within half of `smallest` of 0 may become 0. Inf stays Inf, and NaN
                stays NaN (its payload does not).
            generator: None rounds to the nearest value, ties to even. Given one, on the device of `values`, each is rounded
                at random to one of the two neighbours, so that the expected result is the value itself: exactly above
                `tiny`, and up to 2^-13 of `smallest` below it. What the format can hold does not move.
            saturate: what becomes of finite values that round beyond `max`: `max`, as storage wants it, which must not turn
                a finite moment into Inf; or Inf, as IEEE has it.
            out: int16 of the same shape, to write to.

        Returns:
            int16 of the shape of `values`.
        """
        if values.dtype != torch.float32:
            raise TypeError(f"format {self.name} encodes float32, found {values.dtype}")
        size = values.abs() if self.signed else values.clone()
        if generator is None:
            codes, infinity = self._round_to_nearest(size)
        else:
            codes, infinity = self._round_at_random(size, generator)
        # In `codes`, Inf is at `infinity` and NaNs are above, or below 0; finite values beyond `max` lie in between. Negative
        # values in a format without sign lie below 0, or, where an integer overflowed, above `infinity`.
        last = self.infinity - saturate
        lowest = infinity - saturate
        beyond = codes.clamp(lowest, infinity + 1)
        codes.clamp_(max=last).add_(beyond)
        codes.sub_(lowest)
        if not self.signed or generator is not None:
            torch.bitwise_right_shift(codes, 31, out=beyond)
            codes.bitwise_or_(beyond)  # what lies below 0 gets every bit set: a NaN
        if self.signed:
            torch.bitwise_right_shift(values.view(torch.int32), 31, out=beyond)
            codes.add_(beyond, alpha=2**15)
        return codes.to(torch.int16) if out is None else out.copy_(codes)

    def _round_to_nearest(self, size: Tensor) -> tuple[Tensor, int]:
        """Codes of absolute values as int32, going on beyond `infinity`, and which of them is that of Inf.

        Uses up `size`. The addition below rounds: a number of the binade 2^E, added to 2^(E + 23 − significand_bits), keeps
        as many bits below its first as the format does, and they are the last bits of the sum. Below `tiny` the number
        that is added stays the same, which is what makes subnormal numbers evenly spaced.
        """
        lost = 23 - self.significand_bits
        first, top = 128 - self.bias, 127 - self.bias + 2**self.exponent_bits
        binade = size.view(torch.int32).clamp(first << 23, top << 23).bitwise_and_(_FIELD)
        rounded = torch.add(binade.view(torch.float32), size, alpha=2.0**-lost, out=size).view(torch.int32)
        # Minus the number that was added, plus the exponent of `size` in its place in the code.
        binade.bitwise_right_shift_(lost)
        rounded.sub_(binade, alpha=2**lost - 1).sub_(first << self.significand_bits)
        return rounded, ((255 - top) << 23) + self.infinity

    def _round_at_random(self, size: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        """The same, rounded up as often as a number is near to its upper neighbour."""
        lost = 23 - self.significand_bits
        # Subnormal numbers become those of one more binade below, so that all have as many bits to lose. Halves, because the
        # greatest fp32 numbers, rounded up, would become Inf.
        size.mul_(0.5)
        shifted = torch.maximum(size, torch.rsub(size, self.tiny / 4, alpha=-0.5), out=size).view(torch.int32)
        # Four numbers from each 64-bit one, whose highest bit is not random, and is masked away.
        noise = torch.empty(-(-size.numel() // 4), dtype=torch.int64, device=size.device).random_(generator=generator)
        noise = noise.view(torch.int16)[: size.numel()].view(size.shape).bitwise_and_(2**lost - 1)
        shifted.add_(noise).bitwise_right_shift_(lost).sub_((126 - self.bias) << self.significand_bits)
        return shifted, (129 + self.bias) << self.significand_bits

    @torch.no_grad()
    def decode(self, codes: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Values of `codes`, exactly.

        Args:
            codes: int16 of any shape.
            out: fp32 of the same shape, to write to.

        Returns:
            fp32 of the shape of `codes`.
        """
        if codes.dtype != torch.int16:
            raise TypeError(f"format {self.name} decodes int16, found {codes.dtype}")
        # Under ones in the bits that fp32 has in front of the exponent, Inf and NaN become fp32's, and nothing is subnormal.
        front = 256 - 2**self.exponent_bits
        bits = codes.to(torch.int32).bitwise_left_shift_(23 - self.significand_bits).bitwise_or_(front << 23)
        values = bits.view(torch.float32).abs_().mul_(2.0 ** (127 - self.bias - front))
        # In the lowest binade, which stands for subnormal numbers, this line lies below the identity; above it, over it.
        values = torch.minimum(values, torch.rsub(values, -self.tiny, alpha=-2.0), out=values if out is None else out)
        return torch.copysign(values, codes, out=values) if self.signed else values


FLOAT_1_6_9 = FloatFormat("1-6-9", signed=True, exponent_bits=6, significand_bits=9, bias=59)
"""Adam's running mean. Up to 15.984 (the paper: slightly under 16, whence the bias), normal from 2^-58, down to 2^-67."""

FLOAT_0_6_10 = FloatFormat("0-6-10", signed=False, exponent_bits=6, significand_bits=10, bias=60)
"""Adam's running variance. Up to 7.996, normal from 2^-59, down to 2^-69.

The paper does not state the bias. This one gives the smallest range that holds 5, to which the paper clips the variance:
each step up would take a binade away from small variances, which is where a 6-bit exponent ends too early.
"""
