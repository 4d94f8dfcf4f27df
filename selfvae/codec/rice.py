"""Whole numbers as bits, for few numbers of unknown size: a Golomb-Rice code that adapts.

A number n becomes u = 2n, or -2n - 1 below 0. The code of u has u >> k zeros, a one, and the last k bits
of u. k is the number of binary digits of m >> 5, where m is 16 times a running mean of the u before: after
each number it grows by u - (m >> 4).

Source: Rice 1979; Weinberger, Seroussi, Sapiro 2000 (LOCO-I) adapt k to the numbers before.
"""

from __future__ import annotations

from collections.abc import Iterable

from selfvae.codec.container import CodecError

__all__ = ["RiceReader", "rice_bits", "to_bytes"]


def _next(mean: int, u: int) -> int:
    return mean + u - (mean >> 4)


def rice_bits(values: Iterable[int], mean: int) -> str:
    """Return the code of values, as a string of 0 and 1.

    Args:
        values: Numbers.
        mean: Expected u.
    """
    mean, codes = mean << 4, []
    for value in values:
        u = 2 * value if value >= 0 else -2 * value - 1
        k = (mean >> 5).bit_length()
        codes.append("0" * (u >> k) + "1" + (f"{u & (1 << k) - 1:0{k}b}" if k else ""))
        mean = _next(mean, u)
    return "".join(codes)


def to_bytes(bits: str) -> bytes:
    """Return a string of 0 and 1 as bytes, filled up with zeros."""
    n = -(-len(bits) // 8)
    return int(bits.ljust(8 * n, "0") or "0", 2).to_bytes(n, "big")


class RiceReader:
    """Reads numbers one after the other.

    Args:
        data: What `to_bytes` returned for one or more codes, one after the other.
    """

    def __init__(self, data: bytes) -> None:
        self._bits, self._at = f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}" if data else "", 0

    def take(self, n: int, mean: int, largest: int) -> list[int]:
        """Return the next n numbers.

        Args:
            n: How many.
            mean: As for `rice_bits`.
            largest: Absolute value that none exceeds.

        Raises:
            CodecError: The data end before, or a number is larger: they are damaged.
        """
        mean, values = mean << 4, []
        for _ in range(n):
            k = (mean >> 5).bit_length()
            one = self._bits.find("1", self._at)
            end = one + 1 + k
            u = (one - self._at << k) + int("0" + self._bits[one + 1 : end], 2)
            if one < 0 or end > len(self._bits) or u > 2 * largest:
                raise CodecError("the file is damaged: numbers in it cannot be read")
            values.append(-(u + 1 >> 1) if u & 1 else u >> 1)
            mean, self._at = _next(mean, u), end
        return values

    def end(self) -> None:
        """Check that nothing but filling is left.

        Raises:
            CodecError: There is more.
        """
        left = self._bits[self._at :]
        if len(left) > 7 or "1" in left:
            raise CodecError("the file is damaged: bits follow the numbers in it")
