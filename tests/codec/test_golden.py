"""Golden files, and decoding on machines whose floating-point results differ."""

import copy
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codec_models import (
    GOLDEN,
    GOLDEN_3,
    GOLDEN_ARCHIVES,
    GOLDEN_FILES,
    GOLDEN_METADATA,
    VERSION_1,
    fixed,
    gaussian,
    golden_album_3,
    golden_album_4,
    golden_checksums,
    golden_codec,
    golden_picture,
    integer_codec,
    saved_golden,
    snapped,
    write_golden_3,
)
from torch import Tensor

from selfvae import hub
from selfvae.codec import (
    Archive,
    Codec,
    CodecError,
    format3,
    pack,
    read_header,
    read_metadata,
)
from selfvae.codec.archive import _read_index
from selfvae.codec.chains import ChainCodec, Fit
from selfvae.codec.float64 import quantization
from selfvae.data.metadata import Metadata
from selfvae.nn.flows import Coupling


class Noisy:
    """Context in which noise of at most `size` is added to the outputs of all networks."""

    def __init__(self, codec: Codec, size: float) -> None:
        self.codec, self.size = codec, size

    def __enter__(self) -> None:
        def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
            return output + self.size * (2 * torch.rand_like(output) - 1)

        nets = [net for level in self.codec.model.levels for net in (level.encoder, level.decoder) if net]
        for level in self.codec.model.levels[:-1]:
            nets += [level.prior_net] if level.has_latent else []
        nets += [m.net for m in self.codec.model.modules() if isinstance(m, Coupling)]
        self.hooks = [net.register_forward_hook(add) for net in nets]

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


_PLAIN_CPU = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}


# grid steps per unit of a network's output, at most: a mean without prediction moves by half of 255 grey
# levels, in steps of 1/32
STEPS = 127.5 * 32


@pytest.mark.parametrize("margin", [quantization.MARGIN, pytest.param(0.01, marks=pytest.mark.slow)])
def test_noise_below_the_margin_changes_nothing(
    picture: Tensor, margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the true margin, and with one so wide that the side information covers hundreds of values."""
    monkeypatch.setattr(quantization, "MARGIN", margin)
    codec = Codec(fixed())
    data = codec.compress(picture)
    noted = sum(part.side for part in read_header(data).parts)
    assert noted > 500 or margin == quantization.MARGIN
    for seed in range(3):
        torch.manual_seed(seed)
        with Noisy(codec, 0.9 * margin / STEPS):
            assert torch.equal(codec.decompress(data), picture)
    with Noisy(codec, 0.01), pytest.raises(CodecError, match="does not come back as it was"):
        codec.decompress(data)


@pytest.mark.slow
@pytest.mark.parametrize("margin", [quantization.MARGIN, 0.01])
def test_noise_in_the_networks_of_latents(
    picture: Tensor, margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "MARGIN", margin)
    for model in (
        gaussian(),
        gaussian("selfvae-mean-3lvl", "mog-local"),
        gaussian(posterior="uniform", prior="logistic"),
    ):
        codec = Codec(model)
        data, album = codec.compress(picture), [(str(i), picture) for i in range(4)]
        archive = pack(codec, album)
        for seed in range(2):
            torch.manual_seed(seed)
            with Noisy(codec, 0.1 * margin / STEPS):  # latents that are computed move with it
                assert torch.equal(codec.decompress(data), picture)
                assert all(torch.equal(x, picture) for _, x in Archive(codec, archive))
        with Noisy(codec, 0.1), pytest.raises(CodecError):
            codec.decompress(data)


# run in a process without the usual vector instructions: values that are rounded, and golden files
_SCRIPT = """
import sys
sys.path.insert(0, "tests/codec")
import numpy as np, torch
from codec_models import VERSION_1, golden_picture, snapped
from test_golden import test_golden_archives, test_golden_files
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
x = golden_picture((3, 32, 32))
np.savez(sys.argv[1], none=snapped(x, "none"), all=snapped(x, "all"))
for name in ("colour", "latents", "flow", "flow-plain", "mixture", "mixture-whole", "quincunx"):
    test_golden_files(2, name)
test_golden_archives(2, "drawn", "flow", 10)
print("ok")
"""


@pytest.fixture(scope="module")
def plain_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The finished process, and the file of its values."""
    file = tmp_path_factory.mktemp("plain") / "values.npz"
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(file)],
        env=_PLAIN_CPU, cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    return done, file


@pytest.mark.slow
@pytest.mark.parametrize("latents", ["none", "all"])
def test_the_margin_is_a_thousand_times_what_computers_differ_by(
    plain_cpu: tuple[subprocess.CompletedProcess[str], Path], latents: str
) -> None:
    """1 and 2 threads, with and without oneDNN, and a process without the usual vector instructions."""
    x = golden_picture((3, 32, 32))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = snapped(x, latents)
        torch.set_num_threads(2)
        others = [snapped(x, latents)]
        with torch.backends.mkldnn.flags(enabled=False):
            others.append(snapped(x, latents))
    finally:
        torch.set_num_threads(threads)
    done, file = plain_cpu
    assert file.exists(), done.stderr
    others.append(np.load(file)[latents])
    differences = [np.abs(one - other).max() for other in others]
    assert differences[-1] > 0  # else the process computed exactly the same and nothing was tested
    assert 1000 * max(differences) < quantization.MARGIN


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reads_what_a_cpu_wrote_and_the_other_way(picture: Tensor) -> None:
    mixtures = (
        gaussian("vae", "mog-local"),
        gaussian("selfvae-mean-3lvl", "mog-local"),
        gaussian("selfvae-mean-3lvl", "normal"),
    )
    for model in (fixed(), gaussian(), gaussian("vae"), *mixtures):
        here, there = Codec(model), Codec(copy.deepcopy(model).cuda())
        for a, b in ((here, there), (there, here)):
            assert torch.equal(a.decompress(b.compress(picture)), picture)
            album = [(str(i), picture) for i in range(3)]
            assert all(torch.equal(x, picture) for _, x in Archive(a, pack(b, album)))


@pytest.mark.parametrize(
    ("version", "name"),
    [*((1, name) for name in GOLDEN_FILES if name in VERSION_1), *((2, name) for name in GOLDEN_FILES)],
)
def test_golden_files(version: int, name: str) -> None:
    data = (GOLDEN / f"{version}/{name}.svae").read_bytes()
    assert read_header(data).version == version
    x = golden_codec(name).decompress(data)
    assert [list(x.shape), zlib.crc32(x.numpy().tobytes())] == golden_checksums()[name]


def test_every_golden_file_is_read() -> None:
    for version, names in ((1, VERSION_1), (2, set(GOLDEN_FILES))):
        assert {file.stem for file in (GOLDEN / str(version)).glob("*.svae")} == names
        archives = {file.stem for file in (GOLDEN / str(version)).glob("*.svaes")}
        assert archives == {file for v, file, *_ in ARCHIVES if v == version}


@pytest.mark.parametrize("name", [name for name in GOLDEN_FILES if name != "wide"])
def test_the_encoder_writes_the_golden_files(name: str) -> None:
    """Byte for byte, on processors like the one that wrote them."""
    x = golden_picture(GOLDEN_FILES[name][1])
    data = golden_codec(name).compress(x, verify=False)
    assert data == (GOLDEN / f"2/{name}.svae").read_bytes()


ARCHIVES = [
    (1, "all", "colour", 600),
    (2, "all", "colour", 600),
    (2, "drawn", "flow", 10),
    (2, "residual-drawn", "residual-flow", 10),
]


@pytest.mark.parametrize(("version", "file", "model", "n"), ARCHIVES)
def test_golden_archives(version: int, file: str, model: str, n: int) -> None:
    archive = Archive(golden_codec(model), (GOLDEN / f"{version}/{file}.svaes").read_bytes())
    sums = [[name, zlib.crc32(x.numpy().tobytes())] for name, x in archive]
    assert sums == golden_checksums()["archive"][:n] and len(sums) == n


@pytest.mark.slow
def test_golden_files_with_other_instructions(
    plain_cpu: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    """In a process without the usual vector instructions."""
    assert plain_cpu[0].stdout.strip() == "ok", plain_cpu[0].stderr


# --- format 3: integer models -------------------------------------------------------------------------


def _checksums_3() -> dict[str, Any]:
    return json.loads((GOLDEN / "3/checksums.json").read_text())


@pytest.mark.parametrize("name", GOLDEN_3)
def test_golden_files_of_format_3(name: str) -> None:
    data, codec = (GOLDEN / f"3/{name}.svae").read_bytes(), integer_codec(GOLDEN_3[name][0])
    header = read_header(data)
    assert header.version == 3 and header.fingerprint == (
        bytes(8) if name == "stored" else codec.fingerprint
    )
    x = codec.decompress(data)
    assert [list(x.shape), zlib.crc32(x.numpy().tobytes())] == _checksums_3()[name]
    assert read_metadata(data) == (GOLDEN_METADATA if x.shape[1] % 2 == 0 else Metadata())


@pytest.mark.parametrize("name", [name for name in GOLDEN_3 if name != "stored"])
def test_the_encoder_writes_what_the_golden_files_of_format_3_hold(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte; alpha may differ, whose bytes depend on the versions of libwebp and zlib."""
    two = format3.read((GOLDEN / f"3/{name}.svae").read_bytes())[1]
    corrections = b"".join(part.data for part in two if part.kind == format3.Kind.CORRECTIONS)

    def fit(self: ChainCodec, x: Tensor, track: Any) -> Fit:
        """The corrections of the file: those that encoders find may change."""
        size = x.shape[2], x.shape[3]
        return Fit(corrections, self.adaptations(corrections, size), self._images(x, size), {})

    monkeypatch.setattr(ChainCodec, "fit", fit)
    one = format3.read(write_golden_3(name))[1]
    own, golden = ([part for part in parts if part.kind == format3.Kind.LEVEL] for parts in (one, two))
    assert own == golden and len(own) >= 1
    assert [(p.kind, p.level) for p in one] == [(p.kind, p.level) for p in two]


@pytest.mark.parametrize("name", GOLDEN_ARCHIVES)
def test_golden_archives_of_format_3(name: str) -> None:
    which, channels, n = GOLDEN_ARCHIVES[name]
    data, album = (GOLDEN / f"3/{name}.svaes").read_bytes(), golden_album_3(channels, n)
    for (own, x), (name, back) in zip(album, Archive(integer_codec(which), data), strict=True):
        assert own == name and torch.equal(x, back)
    again = pack(integer_codec(which), album, block=8)
    index = [21 + int.from_bytes(file[13:17], "little") for file in (data, again)]
    assert data[index[0] :] == again[index[1] :]  # the index is compressed by zlib


def test_a_golden_archive_of_format_4(monkeypatch: pytest.MonkeyPatch) -> None:
    data, album = (GOLDEN / "4/shared.svaes").read_bytes(), golden_album_4()
    archive = Archive(integer_codec(), data)
    assert data[4] == 4 and archive._shared
    for (own, x), (name, back) in zip(album, archive, strict=True):
        assert own == name and torch.equal(x, back)
    # corrections that encoders find may change; the last block is a picture with its own
    corrections = _read_index(integer_codec(), data)[3]
    monkeypatch.setattr(ChainCodec, "fit_together", lambda self, batches: corrections)
    again = Archive(integer_codec(), pack(integer_codec(), album, block=8, verify=False))
    assert again._data[:-1] == archive._data[:-1] and len(archive._data) == 4


def test_a_saved_integer_model_is_read() -> None:
    model = hub.load(GOLDEN / "3/model")
    assert [hub.fingerprint(model).hex(), model.answer] == _checksums_3()["model"]
    assert hub.fingerprint(saved_golden()) == hub.fingerprint(model)
    assert hub.known_answer(model) == model.answer


def test_every_golden_file_of_format_3_is_read() -> None:
    assert {file.stem for file in (GOLDEN / "3").glob("*.svae")} == set(GOLDEN_3)
    assert {file.stem for file in (GOLDEN / "3").glob("*.svaes")} == set(GOLDEN_ARCHIVES)
