"""Chance that can be asked for at any place: bits that are a pure function of a key and a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["chances", "mixed"]

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mixed(value: int) -> int:
    """Return 64 bits that look like chance: SplitMix64 (Steele et al. 2014, doi:10.1145/2714064.2660195)."""
    value = (value + _STEP) & (2**64 - 1)
    value = (value ^ value >> 30) * _FIRST & (2**64 - 1)
    value = (value ^ value >> 27) * _SECOND & (2**64 - 1)
    return value ^ value >> 31


def chances(places: Tensor, key: int | Tensor) -> Tensor:
    """Return 64 bits for each of some places, whole numbers of any shape, which are used up; the key is one of 64 bits,
    or one for each place. SplitMix64 again."""
    value = places.mul_(_signed(_STEP)).add_(_signed(key) if isinstance(key, int) else key)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        value.bitwise_xor_(_shifted(value, shift)).mul_(_signed(factor))
    return value.bitwise_xor_(_shifted(value, 31))


def _signed(value: int) -> int:
    """Return 64 bits as torch counts them."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shifted(value: Tensor, bits: int) -> Tensor:
    shifted: Tensor = (value >> bits) & (2 ** (64 - bits) - 1)
    return shifted
