import io
import random
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

from dit_detection.data.image_reading import (
    DECODING_ERRORS,
    FORMATS,
    MAX_PIXELS,
    UnreadableImageError,
    decode_image,
    open_encoded,
    read_image,
    to_rgb,
    upright_size,
)


def encode(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def colours(width=40, height=30):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_bytes_and_files_are_read_to_the_pixel(tmp_path, image_format):
    image = colours()
    data = encode(image, image_format, **({"lossless": True} if image_format == "WEBP" else {}))
    (tmp_path / "no suffix").write_bytes(data)
    for source in (data, tmp_path / "no suffix", str(tmp_path / "no suffix")):
        assert np.array_equal(read_image(source), image)


def test_every_mode_becomes_rgb():
    real = Image.fromarray(np.array([[-1.0, 0.0, 1.0]], dtype=np.float32))
    assert np.asarray(read_image(encode(real, "TIFF")))[0, :, 1].tolist() == [0, 128, 255]
    endless = Image.fromarray(np.array([[-np.inf, np.nan, np.inf]], dtype=np.float32))
    assert np.asarray(to_rgb(endless))[0, :, 1].tolist() == [0, 128, 255]
    ink = read_image(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"))
    assert ink.mode == "RGB" and ink.getpixel((4, 4))[0] < 40 and min(ink.getpixel((4, 4))[1:]) > 150
    assert read_image(encode(Image.new("RGBA", (3, 2), (9, 8, 7, 0)), "PNG")).getpixel((0, 0)) == (9, 8, 7)
    assert read_image(encode(Image.new("1", (3, 2), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("values", "dtype", "image_format", "expected"),
    [
        ([0, 257, 32896, 65535], np.uint16, "PNG", [0, 1, 128, 255]),
        ([0, 257, 32896, 65535], np.uint16, "TIFF", [0, 1, 128, 255]),
        ([0, 16, 2056, 4095], np.uint16, "PNG", [0, 1, 128, 255]),  # 12 bits, as of X-rays, in a file of 16
        ([0, 16, 2056, 4000], np.uint16, "TIFF", [0, 1, 128, 249]),  # the depth is guessed, nothing is stretched
        ([0, 4, 514, 1023], np.uint16, "PNG", [0, 1, 128, 255]),
        ([0, 64, 8224, 16383], np.uint16, "PNG", [0, 1, 128, 255]),
        ([0, 1, 128, 255], np.uint16, "PNG", [0, 1, 128, 255]),
        ([0, 1, 128, 255], np.int32, "TIFF", [0, 1, 128, 255]),
        ([0, 0, 0, 3], np.uint16, "PNG", [0, 0, 0, 3]),
        ([0, 0, 0, 0], np.uint16, "PNG", [0, 0, 0, 0]),
        ([0, 2**23, 2**24 - 1, 2**24 - 1], np.int32, "TIFF", [0, 128, 255, 255]),
        ([-1024, 0, 1024, 3072], np.int32, "TIFF", [0, 64, 128, 255]),  # of computed tomography: air is -1000
        ([-1024, 0, 1024, 3072], np.int16, "TIFF", [0, 64, 128, 255]),
        ([-7, -7, -7, -7], np.int32, "TIFF", [0, 0, 0, 0]),
    ],
)
def test_more_than_8_bits_are_scaled_by_the_depth_that_is_used(values, dtype, image_format, expected):
    if dtype == np.int16:  # which Pillow reads and does not write
        data = signed_tiff(values)
    else:
        data = encode(Image.fromarray(np.array([values], dtype=dtype)), image_format)
    found = read_image(data)
    assert found.mode == "RGB"
    assert np.asarray(found)[0].tolist() == [[value] * 3 for value in expected]


def test_a_broken_pixel_does_not_darken_an_image():
    values = np.random.default_rng(0).integers(0, 4096, (64, 64), dtype=np.uint16)
    sound = np.float32(read_image(encode(Image.fromarray(values), "PNG")))
    values[3, 4] = 65535
    broken = np.float32(read_image(encode(Image.fromarray(values), "PNG")))
    assert broken[3, 4].tolist() == [255] * 3
    broken[3, 4] = sound[3, 4]
    assert np.array_equal(broken, sound) and 120 < sound.mean() < 135


def signed_tiff(values):
    """A TIFF of one row of signed 16-bit values."""
    width = len(values)
    tags = [
        (256, 3, width), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 1),
        (279, 4, 2 * width), (339, 3, 2),
    ]  # fmt: skip
    pixels = struct.pack(f"<{width}h", *values)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    return header + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_upright_by_its_orientation(image_format):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: what lies at the left of the file belongs at the top
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    found = read_image(encode(image, image_format, exif=exif))
    assert found.size == (20, 40)
    assert found.getpixel((10, 5))[0] > 200 and found.getpixel((10, 35))[2] > 200


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_size_is_that_of_the_upright_image(image_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = {"bytes": encode(colours(), image_format, exif=exif), "path": None}
    size = (30, 40) if orientation > 4 else (40, 30)
    assert upright_size(open_encoded(encoded)) == size
    assert decode_image(encoded, *size).size == size
    assert (
        np.abs(np.asarray(to_rgb(decode_image(encoded, *size))) - np.float32(read_image(encoded["bytes"]))).max() == 0
    )


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_an_animation(image_format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:])
    red, green, blue = read_image(data).getpixel((8, 8))
    assert red > 240 and green < 20 and blue < 20


def png_that_claims(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, body)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def claim(data, offset, layout, *size):
    return data[:offset] + struct.pack(layout, *size) + data[offset + struct.calcsize(layout) :]


GIANTS = {
    "PNG": png_that_claims(10_000, 5_001),
    "BMP": claim(encode(colours(), "BMP"), 18, "<ii", 10_000, 5_001),
    "GIF": claim(encode(colours(), "GIF"), 6, "<HH", 10_000, 5_001),
    "PPM": b"P6 10000 5001 255\n" + bytes(100),
    "bits": encode(Image.new("1", (10_000, 5_001)), "PNG"),
}


@pytest.mark.parametrize("name", GIANTS)
def test_giants_are_refused_by_their_header(name, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(UnreadableImageError, match=r"^has 10000 x 5001 pixels, more than the 50,000,000"):
        read_image(GIANTS[name])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_bound_is_what_the_caller_says():
    assert MAX_PIXELS == 50_000_000
    image = encode(Image.new("1", (100, 50)), "PNG")
    assert read_image(image, max_pixels=5000).size == (100, 50)
    with pytest.raises(UnreadableImageError, match="100 x 50 pixels, more than the 4,999"):
        read_image(image, max_pixels=4999)
    with pytest.raises(UnreadableImageError, match="decompression bomb"):  # Pillow's own
        read_image(png_that_claims(100_000, 2_000), max_pixels=None)


def test_text_that_unpacks_to_gigabytes_is_refused():
    bomb = b"iTXt" + b"a\0\1\0\0\0" + zlib.compress(bytes(10**8))
    chunk = struct.pack(">I", len(bomb) - 4) + bomb + struct.pack(">I", zlib.crc32(bomb))
    data = encode(colours(), "PNG")
    with pytest.raises(UnreadableImageError, match="cannot be read as an image"):
        read_image(data[:33] + chunk + data[33:])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000", "PPM"])
def test_what_is_cut_short_is_refused(image_format, tmp_path):
    data = encode(colours(120, 90), image_format)
    for length in (1, 20, len(data) // 2):
        with pytest.raises(UnreadableImageError) as caught:
            read_image(data[:length])
        assert "0x" not in str(caught.value)  # the address of a buffer tells the sender nothing
        (tmp_path / "image").write_bytes(data[:length])
        with pytest.raises(UnreadableImageError):
            read_image(tmp_path / "image")


def test_what_is_no_image(tmp_path):
    (tmp_path / "empty").touch()
    for source in (b"", tmp_path / "empty"):
        with pytest.raises(UnreadableImageError, match=r"^is empty\."):
            read_image(source)
    for source in (b"hello", b"<svg/>", b"\0" * 5000, bytes(range(256)) * 50):
        with pytest.raises(UnreadableImageError, match=r"^is no image of the formats .*PNG"):
            read_image(source)
    for source in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(UnreadableImageError, match=r"cannot be read as an image: .*(No such file|Is a directory)"):
            read_image(source)


def test_no_image_starts_another_program(monkeypatch, tmp_path):
    """Pillow goes by the content and hands EPS to Ghostscript, whatever the file is called."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it was started"))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    eps = encode(colours(), "EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    (tmp_path / "photo.jpg").write_bytes(eps)
    with pytest.raises(UnreadableImageError):
        read_image(tmp_path / "photo.jpg")
    for encoded in ({"bytes": eps, "path": None}, {"bytes": None, "path": str(tmp_path / "photo.jpg")}):
        with pytest.raises(OSError, match="cannot identify"):
            open_encoded(encoded)
    assert not {"EPS", "PSD", "FITS", "HDF5", "WMF"} & set(FORMATS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("image_format", FORMATS)
def test_damage_at_random_is_an_image_or_an_error(image_format):
    rng = random.Random(image_format)
    data = encode(colours(), image_format)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 2, 8])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            found = read_image(bytes(damaged[: rng.choice([len(damaged), rng.randrange(1, len(damaged))])]))
        except UnreadableImageError as error:
            # What data sets catch must cover what Pillow raises.
            assert isinstance(error.__cause__, DECODING_ERRORS) or "more than the" in str(error)
            outcomes.add("error")
        else:
            assert found.mode == "RGB" and min(found.size) > 0
            outcomes.add("image")
    assert "error" in outcomes


def exif_with(*tags):
    """An EXIF block of these entries: (tag, type, count, value of four bytes)."""
    entries = b"".join(struct.pack("<HHI4s", tag, kind, count, value) for tag, kind, count, value in tags)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    "odd_tag",
    [
        (0x0213, 1, 1, b"\1"),  # YCbCrPositioning as a byte
        (0x0128, 2, 2, b"2\0"),  # ResolutionUnit as text
        (0x011A, 2, 3, b"72\0"),  # XResolution as text
    ],
)
def test_an_odd_tag_beside_the_orientation_does_no_harm(odd_tag):
    sideways = exif_with((0x0112, 3, 1, struct.pack("<H", 6)), odd_tag)
    data = encode(colours(), "JPEG", exif=sideways)
    plain = np.asarray(Image.open(io.BytesIO(data)))
    for found in (read_image(data), decode_image({"bytes": data, "path": None}, 30, 40)):
        assert np.array_equal(found, np.rot90(plain, -1))
        assert found.getexif().get(0x0112, 1) == 1, "who reads it next would turn it again"
