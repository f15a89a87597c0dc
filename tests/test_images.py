"""Image files as they are found: orientation, bit depth, sizes, damage. Truth is what the files are written from."""

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("timm")
pytest.importorskip("pytorch_lightning")
from dcn_plugin.finetune.images import UnreadableImage, read_image  # noqa: E402

# What EXIF's orientation says of where the stored rows and columns belong, by numpy's own words.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
    8: np.rot90,
}
CORNERS = np.zeros((16, 24, 3), np.uint8)
CORNERS[:8, :8], CORNERS[:8, 16:], CORNERS[8:, :8] = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def encoded(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def oriented(orientation: int, kind: str) -> io.BytesIO:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = dict(quality=100, subsampling=0) if kind == "JPEG" else dict(lossless=True) if kind == "WEBP" else {}
    return encoded(Image.fromarray(CORNERS), kind, exif=exif, **lossless)


def tiff(values: np.ndarray, bits: int, *, sample_format=1, photometric=1, span=None, colours=1) -> io.BytesIO:
    """A little-endian TIFF of one strip, written by hand; `span` is SMinSampleValue and SMaxSampleValue."""
    if bits == 12:
        pairs = values.astype(np.uint32).reshape(-1, 2)
        data = b"".join(int(pair).to_bytes(3, "big") for pair in pairs[:, 0] << 12 | pairs[:, 1])
    else:
        data = values.astype("_uif"[sample_format] + str(bits // 8)).tobytes()
    height, width = values.shape[0], values.shape[1] // colours
    photometric = 2 if colours == 3 else photometric
    tags = [(256, "I", [width]), (257, "I", [height]), (258, "H", [bits] * colours), (259, "H", [1])]
    tags += [(262, "H", [photometric]), (273, "I", [0]), (277, "H", [colours]), (278, "I", [height])]
    tags += [(279, "I", [len(data)]), (339, "H", [sample_format] * colours)]
    if span is not None:
        tags += [(340, "f", [span[0]]), (341, "f", [span[1]])]
    end = 8 + 2 + 12 * len(tags) + 4  # what does not fit into an entry comes after them, then the pixels
    entries, beyond = b"", b""
    for tag, kind, content in tags:
        packed = struct.pack(f"<{len(content)}{kind}", *content)
        if tag == 273:
            packed = struct.pack("<I", end + 16)
        if len(packed) > 4:
            packed, beyond = struct.pack("<I", end + len(beyond)), beyond + packed + bytes(8 - len(packed))
        entries += struct.pack("<HHI", tag, {"H": 3, "I": 4, "f": 11}[kind], len(content)) + packed.ljust(4, b"\0")
    return io.BytesIO(
        b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + beyond.ljust(16, b"\0") + data
    )


# -- orientation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_image_stands_upright(orientation, kind):
    image = read_image(oriented(orientation, kind))
    assert image.getexif().get(0x0112, 1) == 1
    got = np.asarray(image, np.int16)
    want = UPRIGHT[orientation](CORNERS).astype(np.int16)
    assert got.shape == want.shape and abs(got - want).max() <= (6 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_annotated_size_decides_whether_an_image_is_turned(orientation, kind):
    upright = UPRIGHT[orientation](CORNERS)
    turned = read_image(oriented(orientation, kind), size=upright.shape[1::-1])
    assert np.array_equal(turned, upright)
    # Where only the stored pixels have the size of the annotation, it was made for those.
    stored = read_image(oriented(orientation, kind), size=(24, 16))
    assert np.array_equal(stored, upright if orientation <= 4 else CORNERS)


def test_a_size_that_no_turn_gives_names_both(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(oriented(6, "PNG").getvalue())
    words = f"image {path}: expected 48x32 pixels .* got 24x16, turned by its EXIF orientation 16x24"
    with pytest.raises(ValueError, match=words) as caught:
        read_image(path, size=(48, 32))
    assert not isinstance(caught.value, UnreadableImage)
    with pytest.raises(ValueError, match=r"expected 16x24 pixels \(width x height\) as annotated, got 24x16$"):
        read_image(oriented(1, "PNG"), size=(16, 24))


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_damaged_exif_data_leaves_the_pixels_alone(exif):
    assert np.array_equal(read_image(encoded(Image.fromarray(CORNERS), "PNG", exif=exif)), CORNERS)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    assert np.array_equal(read_image(oriented(orientation, "PNG")), CORNERS)


# -- bit depth --------------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(4, 12)
EIGHT = np.round(RAMP / 257).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_of_grey_are_scaled(kind):
    options = dict(irreversible=False) if kind == "JPEG2000" else {}
    ramp = RAMP.astype(np.int32) if kind == "PPM" else RAMP  # which not every Pillow writes from 16 bits
    for mode, want in (("L", EIGHT), ("RGB", np.repeat(EIGHT[..., None], 3, axis=2))):
        assert np.array_equal(read_image(encoded(Image.fromarray(ramp), kind, **options), mode), want)


def test_a_pgm_is_scaled_by_its_own_largest_value():
    values = np.array([[0, 250, 500, 999]])
    file = io.BytesIO(b"P5 4 1 999\n" + values.astype(">u2").tobytes())
    assert np.asarray(read_image(file, "L")).tolist() == [[0, 64, 128, 255]]


def test_tiff_values_are_scaled_by_bits_and_range():
    def read(*arguments, **options):
        return np.asarray(read_image(tiff(*arguments, **options), "L")).tolist()

    assert read(np.array([[0, 1000, 2000, 4095]]), 12) == [[0, 62, 125, 255]]
    assert read(np.array([[0, 1000, 2000, 4095]]), 16) == [[0, 4, 8, 16]]
    assert read(np.array([[0, 1000, 2000, 4095]]), 16, span=(0, 4095)) == [[0, 62, 125, 255]]
    assert read(np.array([[0, 16384, 65535]]), 16, photometric=0) == [[255, 191, 0]]  # white is zero
    assert read(np.array([[0, 2**31, 2**32 - 1]]), 32) == [[0, 128, 255]]
    assert read(np.array([[-1000, 0, 1000, 3000]]), 16, sample_format=2, span=(-1000, 1000)) == [[0, 128, 255, 255]]
    assert read(np.array([[-1.0, 0.0, 0.5, 1.0]]), 32, sample_format=3, span=(-1.0, 1.0)) == [[0, 128, 191, 255]]


@pytest.mark.parametrize("file, words", [
    (lambda: tiff(np.array([[0.0, 0.5, 1.0]]), 32, sample_format=3), "floating-point values are black and white"),
    (lambda: tiff(np.array([[-5, 7]]), 16, sample_format=2), "integer values are black and white.*SMinSampleValue"),
    (lambda: tiff(np.array([[-5, 7]]), 32, sample_format=2), "integer values are black and white"),
    (lambda: tiff(np.array([[1.0, np.nan]]), 32, sample_format=3, span=(0, 1)), "got nan to nan"),
    (lambda: tiff(np.array([[1.0, 2.0]]), 32, sample_format=3, span=(3, 3)), "between black 3 and white 3"),
    (lambda: encoded(Image.fromarray(np.ones((2, 2), np.float32)), "PPM"), "floating-point values are black and .*e$"),
    (lambda: encoded(Image.fromarray(np.ones((2, 2), np.float32)), "SPIDER"), "floating-point values are black"),
])  # fmt: skip
def test_values_without_a_range_are_refused_by_name(file, words):
    with pytest.raises(UnreadableImage, match=f"unreadable image photo: .*{words}"):
        read_image(file(), where="photo")


def test_a_range_that_pillow_cannot_keep_in_colour_is_refused():
    colours = np.arange(0, 6 * 1000, 1000).reshape(1, 6)
    assert np.asarray(read_image(tiff(colours, 16, colours=3))).tolist() == [[[0, 3, 7], [11, 15, 19]]]
    assert np.asarray(read_image(tiff(colours, 16, colours=3, span=(0, 65535)))).tolist() == [[[0, 3, 7], [11, 15, 19]]]
    with pytest.raises(UnreadableImage, match=r"\[0.0, 8191.0\], and Pillow reads only the upper 8 of its 16 bits"):
        read_image(tiff(colours, 16, colours=3, span=(0, 8191)))


def test_sixteen_bits_of_colour_keep_their_upper_eight():
    # Pillow writes none, so: a PNG by hand, of one row without a filter.
    import zlib

    rgb = np.array([[[0, 300, 65535], [65280, 32768, 255]]], ">u2")
    row = zlib.compress(b"\0" + rgb.tobytes())
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)), (b"IDAT", row), (b"IEND", b"")):
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    assert np.asarray(read_image(io.BytesIO(file))).tolist() == [[[0, 1, 255], [255, 128, 0]]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_of_eight_bits_are_converted_as_by_pillow(mode):
    file = encoded(
        Image.fromarray(CORNERS).convert("RGB").convert(mode), "TIFF" if mode == "CMYK" else "PNG"
    )
    truth = Image.open(io.BytesIO(file.getvalue()))
    assert truth.mode == mode
    assert np.array_equal(read_image(file), truth.convert("RGB"))
    assert np.array_equal(read_image(file, "L"), truth.convert("L"))


# -- damage -----------------------------------------------------------------------------------------------------------


def test_an_image_beyond_pillows_limit_is_named(tmp_path, monkeypatch):
    path = tmp_path / "map.png"
    Image.new("1", (64, 64)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(UnreadableImage, match="unreadable image .*map.png: .*4096 pixels.* exceeds limit"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # read, with a warning
    with pytest.warns(Image.DecompressionBombWarning, match="map.png has 4096 pixels"):
        assert read_image(path).size == (64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImage, match="map.png: .*4096 pixels"):
            read_image(path)


@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), EOFError(), struct.error("short"), MemoryError(), KeyError(3)]
)
def test_whatever_a_plug_in_raises_is_named(tmp_path, monkeypatch, error):
    class Plugin:
        def load(self):
            raise error

    path = tmp_path / "a.jpg"
    Image.fromarray(CORNERS).save(path)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", Plugin.load)
    with pytest.raises(UnreadableImage, match="unreadable image .*a.jpg: ([a-z3]+|EOFError|MemoryError)$") as caught:
        read_image(path)
    assert caught.value.__cause__ is error


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UnreadableImage, match="unreadable image .*nowhere.png: .*No such file"):
        read_image(tmp_path / "nowhere.png")


def test_a_file_of_the_caller_stays_open():
    file = encoded(Image.fromarray(CORNERS), "PNG")
    assert np.array_equal(read_image(file), CORNERS) and not file.closed
