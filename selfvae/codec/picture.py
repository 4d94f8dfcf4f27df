"""Pictures of any kind <-> files of format 3: colours by a model or as WebP, with alpha and metadata.

A file is never larger than a lossless WebP file of the same pixels by more than 64 bytes, metadata aside.
For this WebP is written as well, which takes 20 to 50 s of CPU time per megapixel of a photograph; `encode`
has an option against it.
The model enters as two functions:

    code_levels(x), x uint8 (1, C, H, W), C = 1 or 3 -> corrections, or b"", and [(k, bytes), ...], from the
        coarsest level to 0
    decode_levels(header, corrections, [(k, bytes), ...], upto) -> y[upto], uint8 (1, c, h, w)
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from selfvae.codec import container, format3
from selfvae.codec.container import CHANGED, CodecError, Header, check_size
from selfvae.codec.fallback import (
    decode_pixels,
    encode_alpha,
    encode_pixels,
    estimated_webp_size,
    webp_size,
)
from selfvae.codec.format3 import (
    NO_MODEL,
    VERSION,
    Kind,
    PictureHeader,
    PicturePart,
    read,
    version_of,
    write,
)
from selfvae.data.metadata import Metadata

__all__ = ["CodeLevels", "DecodeLevels", "Levels", "decode", "encode", "read_header", "read_metadata"]

Levels = list[tuple[int, bytes]]
CodeLevels = Callable[[Tensor], tuple[bytes, Levels]]
DecodeLevels = Callable[[PictureHeader, bytes, Levels, int], Tensor]


def encode(
    x: Tensor,
    metadata: Metadata | None = None,
    code_levels: CodeLevels | None = None,
    fingerprint: bytes = NO_MODEL,
    *,
    num_values: int = 256,
    decode_levels: DecodeLevels | None = None,
    thorough: bool = True,
) -> bytes:
    """Encode a picture: with the model, or as WebP if that is smaller.

    Args:
        x: uint8 (1, C, H, W): grey, grey and alpha, RGB, or RGB and alpha.
        metadata: Stored with it.
        code_levels: Codes grey or RGB with the model; without, the file contains WebP.
        fingerprint: Of the model, 8 bytes.
        num_values: Values per channel.
        decode_levels: Decodes them; if given, a file written with the model is decoded and compared. (Alpha
            and WebP are in any case.)
        thorough: Always write the smallest WebP file that is known how to make. If false, quickly written
            ones are compared first, and the model's file is taken if it is clearly smaller than these; the
            bound of 64 bytes then rests on the experience in `_clearly_smaller`.

    Returns:
        The file.

    Raises:
        TypeError: x is not uint8.
        ValueError: x has another shape or larger values, or the metadata are too long.
        CodecError: x has too many pixels, or the decoded file differs from it.
    """
    _check_picture(x, num_values)
    x = x.cpu().contiguous()
    header = PictureHeader(NO_MODEL, x.shape[1], num_values, x.shape[2], x.shape[3])
    first = [PicturePart(Kind.METADATA, metadata.to_bytes())] if metadata else []
    coded, smaller = None, False
    if code_levels is not None:
        beside = not thorough and torch.get_num_threads() > 1
        with ThreadPoolExecutor(1) as pool:
            webp = pool.submit(estimated_webp_size, x) if beside else None
            coded = _coded(x, header, first, code_levels, fingerprint)
        if not thorough:
            expected = webp.result() if webp else estimated_webp_size(x)
            smaller = _clearly_smaller(len(coded), x, expected)
    if coded is not None and smaller:
        data = coded
    else:
        data = write(header, [*first, PicturePart(Kind.PIXELS, encode_pixels(x))])
        if coded is not None and len(coded) < len(data):
            data = coded
    check = data is not coded or decode_levels is not None
    if check:
        again, kept = decode(data, decode_levels)
        if not torch.equal(again, x) or kept != (metadata or Metadata()):
            raise CodecError("the picture came back changed: please report this, with the picture")
    return data


def _clearly_smaller(size: int, x: Tensor, expected: int) -> bool:
    """Whether no WebP file of a picture can be expected to have `size` bytes or fewer.

    expected: `estimated_webp_size` of x.

    Of 42 photographs and enlarged ones and 12 drawings and pages the smallest file was at most 6% below the
    one of effort 1, of drawings with alpha 28%. Where the file of effort 0 had over 2.5 bits per sub-pixel,
    it was at most 9% below that one (14% of 110 small pieces of photographs), and 3% below the one of
    effort 1. What a quarter of the rows let expect of effort 0 was at most 7% too much for 125 photographs
    (`estimated_webp_size`).
    """
    if _is_noisy(expected, x) and size < 0.87 * expected:
        return True
    noisy = _is_noisy(first := webp_size(x, effort=0), x)
    if noisy and size < 0.9 * first:
        return True
    has_alpha = x.shape[1] in (2, 4)
    return size < (0.65 if has_alpha else 0.96 if noisy else 0.9) * webp_size(x, effort=1)


def _is_noisy(size: int, x: Tensor) -> bool:
    return 8 * size > 2.5 * x.numel()


def _check_picture(x: Tensor, num_values: int) -> None:
    if x.dtype != torch.uint8:
        raise TypeError(f"expected uint8; got {x.dtype}")
    if x.ndim != 4 or x.shape[0] != 1 or not 1 <= x.shape[1] <= 4 or 0 in x.shape:
        raise ValueError(f"expected one picture uint8 (1, C, H, W), C = 1 to 4; got {tuple(x.shape)}")
    check_size(x.shape[2], x.shape[3])
    if num_values < 256 and int(x.max()) >= num_values:
        raise ValueError(f"expected values 0 to {num_values - 1}; the picture holds {int(x.max())}")


def _coded(
    x: Tensor, header: PictureHeader, first: list[PicturePart], code_levels: CodeLevels, fingerprint: bytes
) -> bytes:
    """The file with the colours coded by the model."""
    colours = x[:, :-1] if header.has_alpha else x
    corrections, levels = code_levels(colours.contiguous())
    parts = [PicturePart(Kind.CORRECTIONS, corrections)] if corrections else []
    parts += [PicturePart(Kind.LEVEL, data, k) for k, data in levels]
    if header.has_alpha:
        alpha = encode_alpha(x[:, -1:])
        if not torch.equal(decode_pixels(alpha, 1, header.height, header.width), x[:, -1:]):
            raise CodecError("alpha came back changed: please report this, with the picture")
        parts[-1:-1] = [PicturePart(Kind.ALPHA, alpha)]
    h = header
    return write(PictureHeader(fingerprint, h.channels, h.num_values, h.height, h.width), [*first, *parts])


def decode(
    data: bytes,
    decode_levels: DecodeLevels | None = None,
    upto: int = 0,
    *,
    partial: bool = False,
    coarser: Callable[[Tensor, int], Tensor] | None = None,
) -> tuple[Tensor, Metadata]:
    """Decode a file.

    Args:
        data: The file.
        decode_levels: Decodes the parts written with the model, of which it gets those up to `upto`; of a
            truncated file those that are complete, at least one. It checks the fingerprint in the header.
        upto: 0 for the picture, k for the coarser image y[k].
        partial: Accept a truncated file. Alpha that has not arrived is left out.
        coarser: Computes y[k] from a picture, uint8 (1, C, H, W), for files whose pixels are WebP.

    Returns:
        The picture, uint8 (1, C, H, W), C = 1 to 4; for a coarser image, alpha at the pixels that
        subsampling keeps. The metadata.

    Raises:
        CodecError: The file is damaged or truncated, needs a model, or has no such level.
    """
    header, parts = read(data, partial)
    found = {part.kind: part.data for part in parts if part.kind != Kind.LEVEL}
    metadata = _metadata(found.get(Kind.METADATA))
    if any(part.kind == Kind.PIXELS for part in header.parts):
        return _stored(header, found.get(Kind.PIXELS), upto, coarser), metadata
    held = [part.level for part in header.parts if part.kind == Kind.LEVEL]
    if upto < held[0] and upto not in held:
        raise CodecError(f"the file holds {', '.join(f'y{k}' for k in held)}; got 'y{upto}'")
    first = min(upto, held[0])  # the first part may hold several levels, down to the one it completes
    levels = [(p.level, p.data) for p in parts if p.kind == Kind.LEVEL and p.level >= first]
    if not levels:
        raise CodecError("the file is cut short before the end of its coarsest part")
    if decode_levels is None:
        raise CodecError(f"the file needs the model {header.fingerprint.hex()}: decode it with that")
    y = decode_levels(header, found.get(Kind.CORRECTIONS, b""), levels, upto).cpu()
    if upto == 0 and y.shape != (1, header.channels - header.has_alpha, header.height, header.width):
        raise CodecError(f"y0 {CHANGED}")
    if Kind.ALPHA not in found:
        return y, metadata
    alpha = decode_pixels(found[Kind.ALPHA], 1, header.height, header.width)
    return torch.cat([y, _subsampled(alpha, y.shape[2], y.shape[3])], 1), metadata


def _stored(
    header: PictureHeader,
    data: bytes | None,
    upto: int,
    coarser: Callable[[Tensor, int], Tensor] | None,
) -> Tensor:
    """The picture of a file whose pixels are WebP or PNG."""
    if data is None:
        raise CodecError("the file is cut short, and nothing can be shown: it stores its pixels as WebP")
    if upto and coarser is None:
        raise CodecError(f"the file stores its pixels as WebP, without smaller versions; got 'y{upto}'")
    x = decode_pixels(data, header.channels, header.height, header.width)
    if not upto or coarser is None:
        return x
    y = coarser(x[:, :-1] if header.has_alpha else x, upto)
    return torch.cat([y, _subsampled(x[:, -1:], y.shape[2], y.shape[3])], 1) if header.has_alpha else y


def _subsampled(alpha: Tensor, height: int, width: int) -> Tensor:
    """Every n-th row and column of alpha, n a power of 2 if that gives the size."""

    def kept(size: int, wanted: int) -> Tensor:
        step = 1
        while -(-size // step) > wanted:
            step *= 2
        if -(-size // step) == wanted:
            return torch.arange(0, size, step)
        return torch.arange(wanted) * size // wanted

    return alpha[:, :, kept(alpha.shape[2], height)][..., kept(alpha.shape[3], width)]


def _metadata(data: bytes | None) -> Metadata:
    try:
        return Metadata() if data is None else Metadata.from_bytes(data)
    except ValueError as error:
        raise CodecError(str(error)) from None


def read_header(data: bytes) -> Header | PictureHeader:
    """Read the header of a .svae file of any format; the data may end anywhere after it.

    Raises:
        CodecError: The header is damaged or truncated, or the file is of another kind.
    """
    return container.read_header(data) if version_of(data) < VERSION else format3.read_header(data)


def read_metadata(data: bytes) -> Metadata:
    """Read the metadata in a .svae file of any format; files of formats 1 and 2 hold none.

    Raises:
        CodecError: The file is damaged.
    """
    if version_of(data) < VERSION:
        return Metadata()
    parts = read(data, partial=True)[1]
    return _metadata(next((p.data for p in parts if p.kind == Kind.METADATA), None))
