"""Rounding with side information: a decoder rounds as the encoder did."""

import numpy as np
import pytest

from selfvae.codec import CodecError
from selfvae.codec.container import varint
from selfvae.codec.float64.quantization import SideInformation


def test_rounding_near_a_border_follows_the_note() -> None:
    values = np.array([0.2, 0.5, 1.5 - 1e-9, -0.5 + 1e-9, 7.4999, 1e6 + 0.5])
    side = SideInformation()
    whole = side.quantize(values)
    assert whole.tolist() == [0, 1, 1, 0, 7, 1000001]
    for shift in (-1e-7, 1e-7):
        assert SideInformation(side.tobytes()).quantize(values + shift).tolist() == whole.tolist()
    assert SideInformation(b"").quantize(values - 1e-7).tolist() != whole.tolist()
    plain = SideInformation()
    plain.quantize(np.array([0.2, 0.3]))
    assert plain.tobytes() == b""
    again = SideInformation(side.tobytes() + varint(2 * 90))
    again.quantize(values)
    with pytest.raises(CodecError, match="corrects a value that does not exist"):
        again.check_used()
    with pytest.raises(CodecError, match="corrects a value twice"):
        SideInformation(varint(4) + varint(0))
    with pytest.raises(CodecError, match="corrects a value that needs no correction"):
        SideInformation(varint(0)).quantize(values)  # the first
    with pytest.raises(CodecError, match="not finite"):
        plain.quantize(np.array([np.nan]))
