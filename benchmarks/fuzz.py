"""Hostile input: every reader of files is given damaged and forged ones, in a process of its own.

    python -m benchmarks.fuzz --minutes 30 --out results/fuzz.json

Targets: .svae files of formats 1 to 3 (whole, truncated, smaller versions), archives, folders of models
(config.json, safetensors), checkpoints, recipes, and the uploads of the page (picture files and .svae).
Inputs come from the golden files of the tests and from small pictures. Most are damaged (bits, bytes,
blocks, ends); the others are forged with knowledge of the format: headers, indices, parts, JSON and YAML
trees and chunks of PNG files are changed, and their checksums are made to fit.

What counts as a finding; its input is kept in a folder beside OUT:

    crash       the process died
    hang        a case took over 10 s
    memory      it wanted over 1 GB more than before
    exception   another error than the readers' own, which the commands print as one line
    accepted    a damaged file of a picture was decoded to another picture; forged files may be any picture,
                of the size that their header states

Case i of a target is the same in every run of the same seed.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import multiprocessing as mp
import os
import re
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
import yaml
from PIL import Image, PngImagePlugin

from selfvae import hub
from selfvae.cli import settings, training
from selfvae.cli.parsing import parse
from selfvae.codec import Archive, Codec, CodecError, container, format3, read_header
from selfvae.data.pictures import from_image
from selfvae.distributed import make_fabric
from selfvae.files import write_atomic
from selfvae.presets import from_config
from selfvae.training.checkpoint import CHECKPOINT, check_same_model, read_checkpoint
from selfvae.training.config import TrainConfig
from selfvae.training.loop import prepare
from selfvae.web import work

LONGEST = 10.0  # seconds of a case
MOST = 2**30  # bytes that a case may take beyond what the process has
ALLOWED = (ValueError, OSError, ImportError, FloatingPointError)  # which commands print as one line
_ROOT = Path(__file__).parents[1]
_GOLDEN = _ROOT / "tests/golden"
_UPLOAD = 1 << 20  # pixels that the page takes here

Rng = np.random.Generator


class AcceptedError(Exception):
    """A damaged file was decoded to another picture."""


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        corpus: Valid inputs.
        read: Reads an input, given the one it was made from and whether it is forged.
        forge: Changes a valid input with knowledge of its format; None: only damage.
    """

    corpus: list[bytes]
    read: Callable[[bytes, bytes, bool, Rng], object]
    forge: Callable[[bytes, Rng], bytes] | None = None


# --- changes -----------------------------------------------------------------------------------------


def damage(data: bytes, others: list[bytes], rng: Rng) -> bytes:
    """Flip bits, replace, remove, insert, repeat or splice bytes, or cut the end off."""
    out = bytearray(data)
    for _ in range(1 if rng.random() < 0.7 else int(rng.integers(2, 6))):
        at = int(rng.integers(len(out) + 1))
        n = int(min(len(out) - at, 2 ** rng.integers(0, 9)))
        kind = rng.integers(7)
        if kind == 0 and out:
            at = int(rng.integers(len(out)))
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at : at + n] = rng.bytes(n)
        elif kind == 2:
            del out[at : at + n]
        elif kind == 3:
            out[at:at] = rng.bytes(int(2 ** rng.integers(0, 6)))
        elif kind == 4:
            out[at:at] = out[at : at + n]
        elif kind == 5:
            out[at : at + n] = bytes([int(rng.choice([0, 255, 127, 128]))]) * n
        else:
            other = others[int(rng.integers(len(others)))]
            start = int(rng.integers(len(other) + 1))
            out[at : at + n] = other[start : start + n]
    if rng.random() < 0.1:
        del out[int(rng.integers(len(out) + 1)) :]
    return bytes(out)


_ODD: list[Any] = [
    None, True, -1, 0, 1, 2, 3, 255, 256, 65_537, 10**9, 10**18, 10**400, 0.5, -0.0, 1e308, math.inf,
    math.nan, "", "x", "../../x", "\0", "é" * 300, [], [1], [[]], {}, {"a": 1}, "selfvae", "quincunx",
]  # fmt: skip


def changed_tree(tree: Any, rng: Rng) -> Any:
    """A copy of a tree of dictionaries and lists with one to three entries changed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(int(rng.integers(1, 4))):
        places: list[tuple[Any, Any]] = []
        stack = [tree]
        while stack:
            node = stack.pop()
            items = node.items() if isinstance(node, dict) else enumerate(node)
            for key, value in items:
                places.append((node, key))
                if isinstance(value, dict | list):
                    stack.append(value)
        if not places:
            return _odd(rng)
        node, key = places[int(rng.integers(len(places)))]
        kind = rng.integers(6)
        if kind == 0:
            del node[key]
        elif kind == 1:
            other, where = places[int(rng.integers(len(places)))]
            found = other.get(where) if isinstance(other, dict) else other[where : where + 1]
            node[key] = json.loads(json.dumps(found))
        elif kind == 2 and isinstance(node, dict):
            node[str(_odd(rng))] = node.pop(key)
        elif kind == 3 and isinstance(node[key], int | float):
            node[key] = node[key] * int(rng.choice([-1, 2, 10, 1000, 10**6])) + int(rng.integers(-1, 2))
        else:
            node[key] = _odd(rng)
    return tree


def _odd(rng: Rng) -> Any:
    if rng.random() < 0.02:
        deep: Any = 0
        for _ in range(400):
            deep = [deep]
        return deep
    return _ODD[int(rng.integers(len(_ODD)))]


# --- .svae and .svaes --------------------------------------------------------------------------------


def _models() -> Any:
    """The models of the golden files, which the tests know."""
    sys.path.insert(0, str(_ROOT / "tests/codec"))
    import codec_models

    return codec_models


def svae(version: int) -> Target:
    """Files of one picture."""
    models = _models()
    codecs: dict[bytes, Codec] = {}
    corpus = []
    for file in sorted((_GOLDEN / str(version)).glob("*.svae")):
        data = file.read_bytes()
        if len(data) > 30_000 or (version == 3 and file.stem not in models.GOLDEN_3):
            continue
        if version == 3:
            codec = models.integer_codec(models.GOLDEN_3[file.stem][0])
        else:
            codec = models.golden_codec(file.stem)
        codecs[read_header(data).fingerprint] = codecs[data] = codec
        corpus.append(data)
    right = {data: codecs[data].decompress(data) for data in corpus}

    def read(data: bytes, origin: bytes, forged: bool, rng: Rng) -> object:
        codec = codecs.get(data[5:13], codecs[origin])
        if rng.random() < 0.2:
            return codec.decompress(data, partial=True)
        if rng.random() < 0.1:
            return codec.decompress(data, f"y{rng.integers(6)}")
        x = codec.decompress(data)
        if forged:
            header = read_header(data)
            if tuple(x.shape[1:]) != (header.channels, header.height, header.width):
                raise AcceptedError(f"{tuple(x.shape)} for {header}")
        elif not torch.equal(x, right[origin]):
            raise AcceptedError(f"{tuple(x.shape)}, values changed")
        return x

    return Target(corpus, read, _forged_3 if version == 3 else _forged_2)


def _forged_3(data: bytes, rng: Rng) -> bytes:
    header, parts = format3.read(data)
    kind = rng.integers(3)
    if kind == 0:  # any header, with its checksum
        head = damage(data[: header.size - 4], [data], rng)
        return head + struct.pack("<I", zlib.crc32(head)) + data[header.size :]
    for _ in range(int(rng.integers(1, 3))):
        i = int(rng.integers(len(parts))) if parts else 0
        part = parts[i]
        own = damage(part.data, [p.data for p in parts] + [data], rng)
        if kind == 1:
            parts[i] = format3.PicturePart(part.kind, own, part.level)
        else:
            level = int(rng.choice([0, 1, 2, 7, 60, 2**40]))
            parts[i] = format3.PicturePart(format3.Kind(int(rng.integers(1, 6))), own, level)
        if rng.random() < 0.2:
            parts.insert(int(rng.integers(len(parts) + 1)), parts[int(rng.integers(len(parts)))])
        if rng.random() < 0.2:
            del parts[int(rng.integers(len(parts)))]
        if not parts:
            break
    sizes = {key: _size(getattr(header, key), rng) for key in ("height", "width", "num_values", "channels")}
    try:
        return format3.write(replace(header, **sizes) if rng.random() < 0.5 else header, parts)
    except (CodecError, ValueError, struct.error):  # what it describes cannot be written
        return damage(data, [data], rng)


def _size(n: int, rng: Rng) -> int:
    return int(rng.choice([n, n, n, 0, 1, n + 1, 2 * n, 255, 4_000, 2**24, 2**31]))


def _forged_2(data: bytes, rng: Rng) -> bytes:
    header = read_header(data)
    assert isinstance(header, container.Header)
    payload = damage(data[header.size :], [data], rng)
    parts = list(header.parts)
    if rng.random() < 0.5 and parts:
        i = int(rng.integers(len(parts)))
        part = parts[i]
        words = int(rng.choice([part.words, part.words + 1, 0, 2**20, 2**40]))
        parts[i] = container.Part(part.name, int(rng.choice([part.side, 0, 7, 2**30])), words, part.crc)
    sizes = {key: _size(getattr(header, key), rng) for key in ("height", "width")}
    forged = replace(header, parts=tuple(parts), **(sizes if rng.random() < 0.5 else {}))
    return forged.to_bytes(payload) + payload


def svaes() -> Target:
    """Archives."""
    models = _models()
    codecs, corpus = {}, []
    for name, (which, *_) in models.GOLDEN_ARCHIVES.items():
        data = (_GOLDEN / f"3/{name}.svaes").read_bytes()
        codecs[data] = models.integer_codec(which)
        corpus.append(data)
    small = [(f"{i}.png", models.golden_picture((3, 4, 5)).roll(i, 3)) for i in range(5)]
    from selfvae.codec import pack

    data = pack(models.cached_codec("halve"), small, block=2)  # of format 2
    codecs[data] = models.cached_codec("halve")
    corpus.append(data)
    right = {
        data: [x for _, x in zip(range(4), Archive(codecs[data], data), strict=False)] for data in corpus
    }

    def read(data: bytes, origin: bytes, forged: bool, rng: Rng) -> object:
        archive = Archive(codecs[origin], data)
        found = list(itertools.islice(archive, 4))
        if not forged:
            for (name, x), (expected, y) in zip(found, right[origin], strict=True):
                if name != expected or not torch.equal(x, y):
                    raise AcceptedError(f"{name}, {tuple(x.shape)}")
        return found

    return Target(corpus, read, _forged_archive)


def _forged_archive(data: bytes, rng: Rng) -> bytes:
    size = int.from_bytes(data[13:17], "little")
    index = json.loads(zlib.decompress(data[21 : 21 + size]))
    blocks = data[21 + size :]
    if rng.random() < 0.5:
        index = changed_tree(index, rng)
    else:
        blocks, at = damage(blocks, [data], rng), 0
        for entry in index["blocks"]:
            entry[2] = zlib.crc32(blocks[at : at + entry[1]])
            at += entry[1]
    packed = zlib.compress(json.dumps(index).encode())
    head = struct.pack("<II", len(packed), zlib.crc32(packed, zlib.crc32(data[:13])))
    return data[:13] + head + packed + blocks


# --- models, checkpoints, recipes --------------------------------------------------------------------


def _forged_tensors(data: bytes, rng: Rng) -> bytes:
    """A safetensors file with another header."""
    size = int.from_bytes(data[:8], "little")
    header = changed_tree(json.loads(data[8 : 8 + size]), rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def model_config(folder: Path) -> Target:
    """config.json in a model's folder."""
    corpus = [
        (path / "config.json").read_bytes()
        for path in (_GOLDEN / "3/model", _GOLDEN / "checkpoints/1/adamax", *hub.bundled().values())
    ]
    weights = (_GOLDEN / "3/model/model.safetensors").read_bytes()

    def read(data: bytes, origin: bytes, forged: bool, rng: Rng) -> object:
        (folder / "config.json").write_bytes(data)
        (folder / "model.safetensors").write_bytes(weights)
        return hub.load(folder)

    def forge(data: bytes, rng: Rng) -> bytes:
        return json.dumps(changed_tree(json.loads(data), rng)).encode()

    return Target(corpus, read, forge)


def model_weights(folder: Path) -> Target:
    """model.safetensors in a model's folder."""
    source = _GOLDEN / "3/model"
    again = folder / "bytes"
    hub.save(hub.load(source), again)  # with weights as bytes
    config = (again / "config.json").read_bytes()
    corpus = [(path / "model.safetensors").read_bytes() for path in (source, again)]

    def read(data: bytes, origin: bytes, forged: bool, rng: Rng) -> object:
        (folder / "config.json").write_bytes(config)
        (folder / "model.safetensors").write_bytes(data)
        return hub.load(folder)

    return Target(corpus, read, _forged_tensors)


def checkpoint(folder: Path) -> Target:
    """checkpoint.safetensors in a run's folder."""
    source = _GOLDEN / "checkpoints/1/adamax"
    model = hub.load(source)
    config = TrainConfig(optimizer="adamax", precision="32-true")
    _, state = prepare(from_config(model.config), make_fabric(), config)
    state.restore(read_checkpoint(source))
    state.save(folder, config)  # with a checksum
    own = (folder / CHECKPOINT).read_bytes()
    corpus = [(source / CHECKPOINT).read_bytes(), own]
    before = hub.unique_state_dict(state.ema)
    right = {name: value.clone() for name, value in before.items()}

    def read(data: bytes, origin: bytes, forged: bool, rng: Rng) -> object:
        (folder / CHECKPOINT).write_bytes(data)
        found = read_checkpoint(folder)
        check_same_model(found, model.config)
        state.restore(found)
        if not forged and origin == own:
            for name, value in hub.unique_state_dict(state.ema).items():
                if not torch.equal(value, right[name]):
                    raise AcceptedError(f"{name} changed")
        return state

    (folder / "checkpoint-previous.safetensors").unlink(missing_ok=True)
    return Target(corpus, read, _forged_tensors)


def recipe(folder: Path) -> Target:
    """YAML files of flags."""
    corpus = [file.read_bytes() for file in sorted((_ROOT / "recipes").rglob("*.yaml"))[::5]]
    corpus.append(b"a: &a [x, x, x, x]\nb: &b [*a, *a, *a]\noptions: [*b, *b, *b, *b]\nsteps: 3\n")
    file = folder / "recipe.yaml"

    def read(data: bytes, origin: bytes, forged: bool, rng: Rng) -> object:
        if b"import" in data or b"config" in data:  # what a recipe imports is its author's code
            return None
        file.write_bytes(data)
        words = settings.expand("train", ["--config", str(file), "--out", "runs/x"])
        try:
            return parse(training.train, "train", words)
        except SystemExit:  # --help
            return None

    def forge(data: bytes, rng: Rng) -> bytes:
        return yaml.safe_dump(changed_tree(yaml.safe_load(data), rng)).encode()

    return Target(corpus, read, forge)


# --- uploads -----------------------------------------------------------------------------------------


def _picture_files() -> list[bytes]:
    """Small pictures in all formats that the page takes, with metadata."""
    x = np.arange(24 * 20 * 3, dtype=np.uint32).reshape(20, 24, 3) * 7 % 251
    rgb = Image.fromarray(x.astype(np.uint8))
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a")
    text.add_itxt("Description", "é" * 40, zip=True)
    exif = Image.Exif()
    exif[274] = 6
    exif[306] = "2026:01:01 00:00:00"
    found = []
    for picture, kind, options in (
        (rgb, "PNG", {"pnginfo": text, "exif": exif, "icc_profile": bytes(200)}),
        (rgb.convert("P"), "PNG", {"transparency": 3}),
        (rgb.convert("LA"), "PNG", {}),
        (rgb.convert("I;16"), "PNG", {}),
        (rgb, "JPEG", {"exif": exif, "icc_profile": bytes(200), "comment": b"x"}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "JPEG", {"progressive": True}),
        (rgb, "WEBP", {"lossless": True, "exif": exif, "xmp": b"<x/>"}),
        (rgb.convert("RGBA"), "WEBP", {}),
        (rgb, "BMP", {}),
        (rgb.convert("P"), "GIF", {"save_all": True, "append_images": [rgb.convert("P").rotate(90)]}),
        (rgb, "TIFF", {"compression": "tiff_lzw", "exif": exif}),
        (rgb.convert("1"), "TIFF", {"compression": "group4"}),
        (rgb.convert("L"), "TIFF", {"compression": "jpeg"}),
        (rgb, "PPM", {}),
    ):
        out = io.BytesIO()
        picture.save(out, kind, **options)
        found.append(out.getvalue())
    return found


def uploads() -> Target:
    """Picture files that the page is given."""

    def read(data: bytes, origin: bytes, forged: bool, rng: Rng) -> object:
        exact = bool(rng.random() < 0.5)
        picture = work.read(data, _UPLOAD, exact=exact, alpha=exact)
        if picture.pixels.shape[2] * picture.pixels.shape[3] > _UPLOAD:
            raise AcceptedError(f"{tuple(picture.pixels.shape)} for {_UPLOAD} pixels")
        picture.metadata.to_bytes()
        return picture

    return Target(_picture_files(), read, _forged_picture)


def _forged_picture(data: bytes, rng: Rng) -> bytes:
    """A PNG file with chunks changed and checksums that fit; numbers near the beginning of others."""
    if not data.startswith(b"\x89PNG"):
        at = int(rng.integers(min(len(data), 64)))
        number = int(rng.choice([0, 1, 255, 65_535, 2**24, 2**31 - 1, 2**32 - 1]))
        packed = struct.pack(str(rng.choice(["<I", ">I"])), number)
        return data[:at] + packed + data[at + 4 :]
    chunks, at = [], 8
    while at < len(data):
        n = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + n]))
        at += n + 12
    for _ in range(int(rng.integers(1, 3))):
        i = int(rng.integers(len(chunks)))
        name, body = chunks[i]
        kind = rng.integers(4)
        if kind == 0:
            chunks[i] = (chunks[int(rng.integers(len(chunks)))][0], body)
        elif kind == 1:
            chunks.insert(i, (name, damage(body, [data], rng)))
        elif kind == 2 and len(chunks) > 1:
            del chunks[i]
        else:
            chunks[i] = (name, damage(body, [data], rng))
    out = data[:8]
    for name, body in chunks:
        out += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return out


def packed_uploads() -> Target:
    """.svae files that the page is given, shown from a prefix."""
    models = _models()
    names = [name for name, (which, _) in models.GOLDEN_3.items() if which == "quincunx"]
    corpus = [(_GOLDEN / f"3/{name}.svae").read_bytes() for name in names]
    codec = models.integer_codec("quincunx")

    def read(data: bytes, origin: bytes, forged: bool, rng: Rng) -> object:
        file = work.open_packed(codec, data, _UPLOAD)
        picture, _ = work.prefix(codec, file, float(rng.random()))
        return from_image(picture.convert("RGB"))

    return Target(corpus, read, _forged_3)


# --- the run -----------------------------------------------------------------------------------------


def targets(folder: Path) -> dict[str, Target]:
    """All readers by name; `folder` is for what they read from files."""

    def own(name: str) -> Path:
        (folder / name).mkdir(parents=True, exist_ok=True)
        return folder / name

    return {
        "svae 1": svae(1), "svae 2": svae(2), "svae 3": svae(3), "svaes": svaes(),
        "config.json": model_config(own("config")), "safetensors": model_weights(own("weights")),
        "checkpoint": checkpoint(own("checkpoint")), "recipe": recipe(own("recipe")),
        "uploaded picture": uploads(), "uploaded svae": packed_uploads(),
    }  # fmt: skip


def case(target: Target, number: int, i: int, seed: int) -> tuple[bytes, bytes, bool, Rng]:
    """Input i of a target: the changed data, what they were made from, whether they are forged."""
    rng = np.random.default_rng([seed, number, i])
    origin = target.corpus[int(rng.integers(len(target.corpus)))]
    forged = target.forge is not None and bool(rng.random() < 0.5)
    if forged and target.forge is not None:
        return target.forge(origin, rng), origin, True, rng
    return damage(origin, target.corpus, rng), origin, False, rng


class Worker:
    """Runs cases in a process of its own, which may crash, hang or be killed."""

    def __init__(self, name: str, number: int, target: Target, seed: int) -> None:
        self.name, self.number, self.target, self.seed = name, number, target, seed
        context = mp.get_context("fork")
        self.at, self.began = context.Value("q", 0, lock=False), context.Value("d", 0, lock=False)
        self.context = context
        self.counts: Counter[str] = Counter()
        self.findings: list[dict[str, Any]] = []
        self.slowest = 0.0

    def run(self, seconds: float, cases: int) -> None:
        """Work until the time or the number of cases is spent."""
        ends = time.monotonic() + seconds
        while self.at.value < cases and time.monotonic() < ends:
            ours, theirs = self.context.Pipe(False)
            self.began.value = time.monotonic()
            process = self.context.Process(target=self._work, args=(theirs, ends, cases), daemon=True)
            process.start()
            theirs.close()
            hung = self._watch(process, ours)
            if process.is_alive():
                process.kill()
            process.join()
            if hung or process.exitcode != 0:
                kind = "hang" if hung else "crash"
                self._found(kind, f"exit status {process.exitcode}", self.at.value)
                self.at.value += 1

    def _watch(self, process: Any, pipe: Any) -> bool:
        """Collect what the process reports; whether a case hangs."""
        while True:
            while pipe.poll(0.2):
                try:
                    kind, told, i, slowest = pipe.recv()
                except EOFError:
                    process.join(LONGEST)
                    return False
                if kind == "counts":
                    self.counts.update(told)
                    self.slowest = max(self.slowest, slowest)
                else:
                    self._found(kind, told, i)
            if time.monotonic() - self.began.value > LONGEST:
                return True

    def _found(self, kind: str, told: str, i: int) -> None:
        self.counts[kind] += 1
        for finding in self.findings:
            if (finding["kind"], finding["what"]) == (kind, told):
                finding["times"] += 1
                return
        finding = {"kind": kind, "target": self.name, "case": i, "what": told, "times": 1}
        self.findings.append(finding)

    def _work(self, pipe: Any, ends: float, cases: int) -> None:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say of broken files
        sys.setrecursionlimit(2000)
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + MOST
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        counts: Counter[str] = Counter()
        slowest, told = 0.0, time.monotonic()
        while self.at.value < cases and time.monotonic() < ends:
            i = self.at.value
            self.began.value = time.monotonic()
            kind, what = self._one(i)
            slowest = max(slowest, time.monotonic() - self.began.value)
            if kind in ("refused", "read"):
                counts[kind] += 1
            else:
                pipe.send((kind, what, i, 0.0))
            self.at.value = i + 1
            if time.monotonic() - told > 1:
                pipe.send(("counts", counts, i, slowest))
                counts, told = Counter(), time.monotonic()
        pipe.send(("counts", counts, 0, slowest))
        pipe.close()

    def _one(self, i: int) -> tuple[str, str]:
        data, origin, forged, rng = case(self.target, self.number, i, self.seed)
        try:
            self.target.read(data, origin, forged, rng)
        except AcceptedError as error:
            return "accepted", re.sub(r"\d+", "N", str(error))[:100]
        except ALLOWED as error:
            return ("refused", "") if str(error) else ("exception", f"{_where(error)} without a message")
        except MemoryError as error:
            return "memory", _where(error)
        except RuntimeError as error:
            return "memory" if "allocate memory" in str(error) else "exception", _where(error)
        except Exception as error:
            return "exception", _where(error)
        return "read", ""


def _where(error: BaseException) -> str:
    """The kind of an error, and the line of the package it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/selfvae/" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
    return f"{type(error).__name__} at {place}: {re.sub(r'[0-9]+', 'N', str(error))[:80]}"


def run(out: Path, minutes: float = 30.0, cases: int = 10**9, seed: int = 0) -> dict[str, Any]:
    """Fuzz all readers, for an equal share of the time each.

    Args:
        out: the JSON file for the results; inputs of findings go to a folder of its name.
        minutes: In all.
        cases: At most so many per reader.
        seed: Of all random choices.
    """
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = _UPLOAD // 2  # as a server would: decoding takes time in proportion to pixels
    result: dict[str, Any] = {"seed": seed, "targets": {}, "findings": []}
    with tempfile.TemporaryDirectory() as folder:
        readers = targets(Path(folder))
        began = time.monotonic()
        for number, (name, target) in enumerate(readers.items()):
            left = 60 * minutes - (time.monotonic() - began)
            worker, start = Worker(name, number, target, seed), time.monotonic()
            worker.run(left / (len(readers) - number), cases)
            total = sum(worker.counts.values())
            result["targets"][name] = {
                "cases": total, **dict(sorted(worker.counts.items())),
                "seconds": round(time.monotonic() - start, 1), "slowest_s": round(worker.slowest, 3),
            }  # fmt: skip
            result["findings"] += worker.findings
            print(name, result["targets"][name], flush=True)
            for finding in worker.findings:
                data = case(target, number, finding["case"], seed)[0]
                kept = f"{name.replace(' ', '-')}-{finding['case']}.bin"
                write_atomic(out.with_suffix("") / kept, data)
                print(" ", finding, flush=True)
            result["cases"] = sum(t["cases"] for t in result["targets"].values())
            write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())
    return result


def main(out: Path, minutes: float = 30.0, cases: int = 10**9, seed: int = 0) -> int:
    """Fuzz all readers of files; the exit status is 1 if there are findings.

    Args:
        out: JSON file for the results; the inputs of findings go to a folder of its name beside it.
        minutes: in all.
        cases: at most so many per reader.
        seed: of all random choices.
    """
    return 1 if run(out, minutes, cases, seed)["findings"] else 0


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main))
