"""Archives of many pictures in one file: an index, and blocks that are decoded independently.

Format 4 for integer models, format 2 for others (format 1 also coded the padding beyond the borders;
format 3, of integer models, had no corrections):

    magic "SVAS", version (1 byte), fingerprint of the model (8 bytes)
    length of the index, CRC-32 of the preceding 13 bytes and the index (4 bytes each)
    the index: JSON, compressed by deflate
    the blocks

The index holds name, height, width, channels and checksum of each picture, and number of pictures, length
and checksum of each block; in format 4 also the corrections (`codec.adaptation`) that all pictures share,
but for large ones, which have their own. Neighbouring pictures of one size are computed together. With
integer models each such group is a stream, after its length; in format 2 a block is one ANS stack, after
its side information. Reading one picture decodes its block up to that picture.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import itertools
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfvae.codec.adaptation import Adaptation
from selfvae.codec.ans import ANSCoder
from selfvae.codec.container import CHANGED, PADDED, TOGETHER, CodecError, Reader, check_start, varint
from selfvae.codec.progressive import Codec
from selfvae.distributed import distributed_map
from selfvae.progress import Track, no_progress

__all__ = ["Archive", "Entry", "pack", "read_fingerprint"]

MAGIC, VERSION = b"SVAS", 4
_SHARING = 4  # the first format with corrections
_FITTED = 1 << 18  # pixels to which an archive's corrections are fitted
_READ = 1 << 22  # pixels that are read to find these, where most pictures are large
_INDEX = 1 << 24  # the largest length of an index, bytes

Named = tuple[str, Tensor]
Unread = tuple[str, Callable[[], Tensor]]


class Entry(NamedTuple):
    """A picture in the index: name, size in pixels, channels, and checksum of the pixels."""

    name: str
    height: int
    width: int
    channels: int
    crc: int


class _Block(NamedTuple):
    """A block in the index: number of pictures, length in bytes, and checksum."""

    pictures: int
    size: int
    crc: int


def _groups(codec: Codec, entries: Sequence[Entry]) -> list[list[int]]:
    """Group the pictures of a block that are computed together: neighbours of one size.

    With bits-back coding a group is at most as large as all groups after it, which are on the stack before
    it and provide the bits for its latents.

    Returns:
        Indices of the pictures of each group.
    """
    groups: list[list[int]] = []
    after = 0
    for _, same in itertools.groupby(reversed(range(len(entries))), lambda i: entries[i][1:4]):
        members = list(same)[::-1]
        first = entries[members[0]]
        pixels = math.prod(codec.padded(first.height, first.width))
        most = max(1, TOGETHER // pixels)
        if codec.gaussian:
            end = len(members)
            while end:
                start = max(0, end - min(most, max(1, after // pixels)))
                groups.append(members[start:end])
                end, after = start, after + (end - start) * pixels
        else:
            groups += [members[i : i + most] for i in range(0, len(members), most)][::-1]
    return groups[::-1]


def _check_names(names: Sequence[str]) -> None:
    """Check that the names are different relative paths that stay inside a folder on every system.

    Raises:
        CodecError: They are not.
    """
    for name in names:
        parts = PurePosixPath(name).parts
        plain = PurePosixPath(name).as_posix() == name != "."
        if not plain or ".." in parts or name.startswith("/") or set(name) & set("\\:\0"):
            raise CodecError(f"a picture's name must be a path inside the archive; got {name!r}")
    if len(set(names)) < len(names):
        raise CodecError("every picture in an archive needs a name of its own")


def pack(
    codec: Codec,
    pictures: Iterable[Named | Unread],
    *,
    block: int = 64,
    verify: bool = True,
    track: Track = no_progress,
) -> bytes:
    """Compress pictures to an archive. Several processes share the work.

    Args:
        codec: Of the model to use.
        pictures: Name and pixels, uint8 (1, C, H, W), of each, in the order of the archive. In place of
            the pixels a function that reads them: then only one block's are in memory at a time.
        block: Pictures per block: larger blocks are smaller in all, smaller ones faster to read one from.
        verify: Decode the archive and compare.
        track: Receives the blocks and the name of the activity, and yields the blocks, to show progress.

    Returns:
        The archive.

    Raises:
        TypeError: A picture is not uint8.
        ValueError: A picture does not fit the model, a name is not allowed, or there are too many.
        CodecError: A decoded picture differs from the original.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1 picture; got {block}")
    named = list(pictures)
    names = [name for name, _ in named]
    _check_names(names)
    starts = range(0, len(named), block)
    corrections = b"" if codec.chain is None else _fit(codec, named)
    shared = {} if codec.chain is None else codec.chain.adaptations(corrections)
    _check_index(json.dumps([Entry(name, 0, 0, 0, 0) for name in names]), len(named))

    def pack_part(start: int) -> _Packed:
        part = [(name, _pixels(x)) for name, x in named[start : start + block]]
        entries = [_entry(codec, name, x) for name, x in part]
        hashes = [_sha256(x) for _, x in part]
        return _Packed(entries, hashes, _pack_block(codec, entries, [x for _, x in part], shared))

    parts = distributed_map(pack_part, starts, track, "compressing")
    index: dict[str, Any] = {
        "levels": codec.model.spec.num_values,
        "pictures": [entry for part in parts for entry in part.entries],
        "blocks": [_Block(len(part.entries), len(part.data), zlib.crc32(part.data)) for part in parts],
    }
    if corrections:
        index["corrections"] = base64.b64encode(corrections).decode()
    written = json.dumps(index, separators=(",", ":"))
    _check_index(written, len(named))
    packed = zlib.compress(written.encode(), 9)
    head = MAGIC + bytes([codec.format if codec.chain is None else VERSION]) + codec.fingerprint
    data = b"".join(
        [
            head,
            struct.pack("<II", len(packed), zlib.crc32(packed, zlib.crc32(head))),
            packed,
            *(part.data for part in parts),
        ]
    )
    if verify:
        archive = Archive(codec, data)

        def check(number: int) -> None:
            for true, (name, back) in zip(parts[number].hashes, archive.block(number), strict=True):
                if _sha256(back) != true:
                    raise CodecError(f"{name} came back changed: please report this, with the picture")

        distributed_map(check, range(len(starts)), track, "checking")
    return data


def _pixels(x: Tensor | Callable[[], Tensor]) -> Tensor:
    return x if isinstance(x, Tensor) else x()


def _fit(codec: Codec, named: Sequence[Named | Unread]) -> bytes:
    """Fit the corrections of an archive to some of its small pictures, the same in every process."""
    assert codec.chain is not None
    found: dict[tuple[int, ...], list[Tensor]] = {}
    fitted = read = 0
    for i in sorted(range(len(named)), key=lambda i: i * 2654435761 % 2**32):  # irregularly spread
        name, x = named[i][0], _pixels(named[i][1])
        _entry(codec, name, x)  # checks it
        pixels = x.shape[2] * x.shape[3]
        read += pixels
        if 2 * pixels <= TOGETHER:
            found.setdefault(tuple(x.shape[1:]), []).append(x)
            fitted += pixels
        if fitted >= _FITTED or read >= _READ:
            break
    return codec.chain.fit_together(torch.cat(alike) for alike in found.values())


class _Packed(NamedTuple):
    """A block that was packed: its pictures' entries and SHA-256 sums, and its bytes."""

    entries: list[Entry]
    hashes: list[bytes]
    data: bytes


def _sha256(x: Tensor) -> bytes:
    return hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).digest()


def _check_index(written: str, pictures: int) -> None:
    """Check that an index of that text can be read."""
    if len(written) > _INDEX:
        raise ValueError(f"{pictures} pictures, or their names, are too many for one archive: pack several")


def _entry(codec: Codec, name: str, x: Tensor) -> Entry:
    """Return a picture's entry in the index.

    Raises:
        TypeError, ValueError: It cannot be packed.
    """
    try:
        codec.check(x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    if x.shape[1] not in (1, codec.model.spec.channels):
        raise ValueError(f"{name}: archives hold no alpha; got {x.shape[1]} channels")
    return Entry(
        name, x.shape[2], x.shape[3], x.shape[1], zlib.crc32(x.cpu().contiguous().numpy().tobytes())
    )


@torch.no_grad()
def _pack_block(
    codec: Codec, entries: Sequence[Entry], pictures: Sequence[Tensor], shared: Mapping[int, Adaptation]
) -> bytes:
    if codec.chain is not None:
        streams = [
            codec.chain.encode_batch(torch.cat([pictures[i] for i in members]), shared)
            for members in _groups(codec, entries)
        ]
        return b"".join(varint(len(stream)) + stream for stream in streams)
    stack, side = ANSCoder(), list[bytes]()
    for members in reversed(_groups(codec, entries)):
        written = codec.push(torch.cat([pictures[i] for i in members]), stack)
        recorded = (written[name].side for name in codec.names)
        side.append(b"".join(varint(len(data)) + data for data in recorded))
    return b"".join(reversed(side)) + stack.words()[::-1].astype("<u4").tobytes()


class Archive:
    """Reads an archive: `len`, `entries`, a picture by name or number, and iteration over all of them.

    Args:
        codec: Of the model that wrote it.
        data: The file.

    Raises:
        CodecError: The file is damaged, truncated, or written with another model.
    """

    def __init__(self, codec: Codec, data: bytes) -> None:
        self.codec = codec
        version = check_start(data, MAGIC, VERSION, ".svaes archive")
        self._padded = version <= PADDED
        self.entries, self.blocks, num_values, corrections, at = _read_index(codec, data)
        spec = codec.model.spec
        if (
            (version >= 3) != (codec.chain is not None)
            or num_values != spec.num_values
            or any(e.channels not in (1, spec.channels) for e in self.entries)
        ):
            raise CodecError("the index does not fit the model that it names: the file is damaged")
        self._shared: Mapping[int, Adaptation] | None = None
        if codec.chain is not None and version >= _SHARING:
            self._shared = codec.chain.adaptations(corrections)
        for size in {(entry.height, entry.width) for entry in self.entries}:
            codec.check_size(*size)
        self._numbers = {entry.name: i for i, entry in enumerate(self.entries)}
        self._data = [memoryview(data)[a:b] for a, b in itertools.pairwise(
            itertools.accumulate((b.size for b in self.blocks), initial=at)
        )]  # fmt: skip
        self._first = list(itertools.accumulate((b.pictures for b in self.blocks), initial=0))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, which: str | int) -> Tensor:
        """Decode one picture, uint8 (1, C, H, W), by name or number.

        Raises:
            KeyError: No picture has that name.
            IndexError: The number is out of range.
            CodecError: The block is damaged.
        """
        if isinstance(which, str):
            if which not in self._numbers:
                raise KeyError(f"no picture {which!r} in the archive")
            which = self._numbers[which]
        if not 0 <= which < len(self):
            raise IndexError(f"the archive holds {len(self)} pictures; got number {which}")
        number = bisect.bisect_right(self._first, which) - 1
        inside = which - self._first[number]
        return next(itertools.islice(self.block(number), inside, None))[1]

    def __iter__(self) -> Iterator[Named]:
        for number in range(len(self.blocks)):
            yield from self.block(number)

    @torch.no_grad()
    def block(self, number: int) -> Iterator[Named]:
        """Iterate over the pictures of one of the `blocks`, each decoded when it is requested."""
        data = bytes(self._data[number])
        if zlib.crc32(data) != self.blocks[number].crc:
            raise CodecError(f"block {number} of the archive is damaged: its checksum does not fit")
        entries = self.entries[self._first[number] : self._first[number + 1]]
        reader, groups = Reader(data, f"block {number}"), _groups(self.codec, entries)
        chain = self.codec.chain
        if chain is not None:
            for members in groups:
                first, stream = entries[members[0]], reader.take(reader.varint())
                x = chain.decode_batch(stream, len(members), (first.height, first.width), self._shared)
                yield from self._named(entries, members, x)
            return
        side = [[reader.take(reader.varint()) for _ in self.codec.names] for _ in groups]
        if (len(data) - reader.at) % 4:
            raise CodecError(f"block {number} of the archive is damaged: it ends inside a word")
        stack = ANSCoder(np.frombuffer(data, "<u4", offset=reader.at)[::-1].astype(np.uint32))
        for members, recorded in zip(groups, side, strict=True):
            first = entries[members[0]]
            size = first.height, first.width
            x = self.codec.pop(len(members), size, stack, recorded, padded=self._padded)
            yield from self._named(entries, members, x)

    @staticmethod
    def _named(entries: Sequence[Entry], members: Sequence[int], x: Tensor) -> Iterator[Named]:
        """Yield the pictures of a group, checked."""
        for i, picture in zip(members, x.split(1), strict=True):
            picture = picture[:, : entries[i].channels].contiguous()
            if zlib.crc32(picture.numpy().tobytes()) != entries[i].crc:
                raise CodecError(f"{entries[i].name} {CHANGED}")
            yield entries[i].name, picture


def read_fingerprint(data: bytes) -> bytes:
    """Read the fingerprint of the model that wrote an archive; the data may end anywhere after it.

    Raises:
        CodecError: The file is cut short, or of another kind.
    """
    check_start(data, MAGIC, VERSION, ".svaes archive")
    if len(data) < 13:
        raise CodecError(f"the file ends inside its header: {len(data)} bytes are there")
    return data[5:13]


def _read_index(codec: Codec, data: bytes) -> tuple[list[Entry], list[_Block], int, bytes, int]:
    """Return pictures, blocks, number of values, corrections, and the position of the first block."""
    if len(data) < 21:
        raise CodecError(f"the file ends inside its header: {len(data)} bytes are there")
    size, crc = struct.unpack("<II", data[13:21])
    packed = data[21 : 21 + size]
    if len(packed) < size or zlib.crc32(packed, zlib.crc32(data[:13])) != crc:
        raise CodecError("the archive is damaged: its index is not whole")
    codec.check_model(data[5:13])
    try:
        inflate = zlib.decompressobj()
        index = json.loads(inflate.decompress(packed, _INDEX))
        entries = [Entry(str(name), *map(int, rest)) for name, *rest in index["pictures"]]
        blocks = [_Block(*map(int, block)) for block in index["blocks"]]
        num_values = int(index["levels"])
        corrections = base64.b64decode(index.get("corrections", ""), validate=True)
    except (zlib.error, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise CodecError(f"the archive's index makes no sense: {error}") from None
    _check_names([entry.name for entry in entries])
    for entry in entries:
        if entry.height < 1 or entry.width < 1 or not 1 <= entry.channels <= 4:
            raise CodecError(f"the archive's index makes no sense: {entry}")
    whole = 21 + size + sum(block.size for block in blocks)
    if (
        sum(block.pictures for block in blocks) != len(entries)
        or min((min(b) for b in blocks), default=0) < 0
    ):
        raise CodecError("the archive's index makes no sense: its blocks do not hold its pictures")
    if len(data) != whole:
        raise CodecError(f"the archive must be {whole} bytes long; {len(data)} are there: it is damaged")
    return entries, blocks, num_values, corrections, 21 + size
