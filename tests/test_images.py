"""Every kind of image gives the same pixels, those of torchvision's Resize and CenterCrop; what is wrong is refused."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varlik import images
from varlik.models.config import Preprocessing

SMALL = Preprocessing(resize=18, crop=16)
SMALL_GREY = Preprocessing(resize=18, crop=16, channels=1)
LEVEL = 2 / 255  # one 8-bit level, where black is -1 and white 1


def as_is(side: int, channels: int = 3) -> Preprocessing:
    return Preprocessing(resize=side, crop=side, channels=channels)


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise of hard contrast, so that Lanczos overshoots and every slip of a pixel shows."""
    noise = np.random.default_rng(seed).normal(128, 120, (height, width, channels))
    return noise.clip(0, 255).astype(np.uint8)


def expected(array: np.ndarray, resize: int, crop: int) -> torch.Tensor:
    """torchvision's Resize(resize, LANCZOS), CenterCrop(crop), ToTensor, then 2x - 1; `array` is uint8."""
    image = Image.fromarray(array)
    width, height = image.size
    if width <= height:
        width, height = resize, int(resize * height / width)
    else:
        width, height = int(resize * width / height), resize
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    top, left = int(round((height - crop) / 2.0)), int(round((width - crop) / 2.0))  # noqa: RUF046
    pixels = np.asarray(image)[top : top + crop, left : left + crop]
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    unit = torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(torch.float32).div(255)
    return unit.add(unit).add(-1)


def exact(array: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8 in [-1, 1], nothing resized."""
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1).div(255).mul(2).sub(1)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def png_16_bit(values: np.ndarray) -> bytes:
    """A 16-bit greyscale PNG, written by hand so that no writer can be wrong in the same way as the reader."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- Sizes ---


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (53, 37),  # 18 * 53 / 37 = 25.8: cut off to 25; offset 4.5: rounds to 4
        (37, 53),
        (54, 36),  # 27; offset 5.5: rounds to 6
        (36, 54),
        (40, 40),
        (18, 29),  # one side fits already
        (7, 11),  # upscaled
        (3, 200),
    ],
)
@pytest.mark.parametrize("preprocessing", [SMALL, SMALL_GREY], ids=["rgb", "grey"])
def test_resize_and_cut_are_those_of_torchvision(height, width, preprocessing):
    array = picture(height, width, preprocessing.channels)
    array = array[..., 0] if preprocessing.channels == 1 else array
    result = images.load(array, preprocessing)
    assert result.shape == (preprocessing.channels, 16, 16)
    assert torch.equal(result, expected(array, 18, 16))


def test_result_is_float32_contiguous_and_on_the_cpu():
    result = images.load_many(picture(30, 40), SMALL)
    assert result.dtype == torch.float32
    assert result.device.type == "cpu"
    assert result.is_contiguous()
    assert not result.requires_grad


@pytest.mark.parametrize("kind", ["array", "tensor", "PIL", "float", "uint16"])
def test_an_image_that_fits_is_not_touched_and_gets_a_black_border(kind):
    array = picture(28, 28, 1)[..., 0]
    given = {
        "array": array,
        "tensor": torch.from_numpy(array),
        "PIL": Image.fromarray(array),
        "float": array.astype(np.float32) / 255,
        "uint16": array.astype(np.uint16) * 257,
    }[kind]
    result = images.load(given, Preprocessing(resize=28, crop=28, padding=2, channels=1))
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[2:30, 2:30] = True
    assert result.shape == (1, 32, 32)
    assert torch.equal(result[0, 2:30, 2:30], exact(array[..., None])[0])
    assert (result[0, ~inside] == -1).all()


def test_black_and_white_are_minus_one_and_one():
    for black, white in ((0, 255), (0.0, 1.0)):
        kind = np.uint8 if white == 255 else np.float64
        assert (images.load(np.full((20, 31, 3), black, kind), SMALL) == -1).all()
        assert (images.load(np.full((20, 31, 3), white, kind), SMALL) == 1).all()


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000)])
def test_a_sliver_is_resized_without_gigabytes(size):
    preprocessing = Preprocessing(resize=288, crop=256)
    grey = np.linspace(0, 255, 5000).astype(np.uint8).reshape(size)
    result = images.load(grey, preprocessing)
    assert result.shape == (3, 256, 256)
    # The cut shows the middle of the long side, which is mid-grey.
    assert result.abs().max() < 2 * LEVEL


@pytest.mark.parametrize("size", [(90, 30), (30, 90), (37, 53), (53, 37)])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_the_way_for_slivers_gives_the_same_picture(monkeypatch, size, kind):
    array = picture(*size)
    array = array if kind is np.uint8 else array.astype(np.float32) / 255
    whole = images.load(array, SMALL)
    monkeypatch.setattr(images, "_LARGEST", 0)
    assert (images.load(array, SMALL) - whole).abs().max() <= LEVEL * 1.001


# --- Kinds ---


@pytest.mark.parametrize("preprocessing", [SMALL, SMALL_GREY], ids=["rgb", "grey"])
def test_a_picture_is_the_same_however_it_comes(tmp_path, preprocessing):
    array = picture(41, 57)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    path = save(Image.fromarray(array), tmp_path / "x.png")
    luma = np.asarray(Image.fromarray(array).convert("L"))
    reference = expected(array if preprocessing.channels == 3 else luma, 18, 16)
    for given in (path, str(path), Image.open(path), Image.fromarray(array), array, tensor, tensor.contiguous()):
        assert torch.equal(images.load(given, preprocessing), reference)
    for given in (array[:, ::-1][:, ::-1], np.asfortranarray(array)):
        assert torch.equal(images.load(given, preprocessing), reference)


@pytest.mark.parametrize("preprocessing", [SMALL, SMALL_GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_floats_agree_to_a_level(preprocessing, dtype):
    array = picture(41, 57)
    tensor = torch.from_numpy(array).permute(2, 0, 1).double().div(255).to(getattr(torch, dtype))
    # 8 bits are rounded after each of the two passes; bfloat16 has 8 bits itself.
    tolerance = LEVEL * (1 if dtype != "bfloat16" else 2)
    reference = images.load(array, preprocessing)
    assert (images.load(tensor, preprocessing) - reference).abs().max() <= tolerance
    if dtype != "bfloat16":
        same = images.load(tensor.permute(1, 2, 0).numpy(), preprocessing)
        assert torch.equal(same, images.load(tensor, preprocessing))


def test_floats_and_uint16_keep_more_than_8_bits():
    ramp = np.linspace(0.5, 0.52, 40 * 40).reshape(40, 40)
    for given in (ramp, torch.from_numpy(ramp), (ramp * 65535).astype(np.uint16)):
        assert images.load(given, SMALL_GREY).unique().numel() > 100
    assert images.load((ramp * 255).astype(np.uint8), SMALL_GREY).unique().numel() < 10


def test_uint16_means_65535_in_arrays_and_tensors():
    array = picture(41, 57)
    wide = array.astype(np.uint16) * 257
    tensor = torch.from_numpy(wide).permute(2, 0, 1)
    for given in (wide, wide.astype(">u2"), tensor):
        assert (images.load(given, SMALL) - images.load(array, SMALL)).abs().max() <= LEVEL


@pytest.mark.parametrize("channels", [1, 3])
def test_channel_counts_of_arrays_and_tensors(channels):
    preprocessing = as_is(16, channels)
    grey, rgba = picture(16, 16, 1), picture(16, 16, 4)
    repeated = exact(grey).expand(channels, -1, -1)
    for given in (grey, grey[..., 0], torch.from_numpy(grey).permute(2, 0, 1), torch.from_numpy(grey[..., 0])):
        assert torch.equal(images.load(given, preprocessing), repeated)
    without_alpha = images.load(rgba[..., :3], preprocessing)
    assert torch.equal(images.load(rgba, preprocessing), without_alpha)
    assert torch.equal(images.load(torch.from_numpy(rgba).permute(2, 0, 1), preprocessing), without_alpha)


def test_luma_of_rgb():
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    luma = torch.tensor([[[76, 150], [29, 255]]]) / 255 * 2 - 1
    assert torch.allclose(images.load(colours, as_is(2, 1)), luma)
    assert (images.load(colours / 255, as_is(2, 1)) - luma).abs().max() <= LEVEL / 2 * 1.01
    assert images.load(colours / 255, as_is(2, 1)).max() == 1


@pytest.mark.parametrize("preprocessing", [as_is(16), as_is(16, 1)], ids=["rgb", "grey"])
def test_alpha_is_dropped_as_convert_does(tmp_path, preprocessing):
    rgba = picture(16, 16, 4)
    reference = images.load(rgba[..., :3], preprocessing)
    path = save(Image.fromarray(rgba), tmp_path / "x.png")
    for given in (path, Image.fromarray(rgba)):
        assert torch.equal(images.load(given, preprocessing), reference)
    grey = Image.fromarray(rgba[..., 0])
    with_alpha = Image.merge("LA", (grey, Image.fromarray(rgba[..., 3])))
    assert torch.equal(images.load(with_alpha, preprocessing), images.load(grey, preprocessing))


def test_palette_with_and_without_transparency(tmp_path):
    palette = Image.fromarray(picture(16, 16)).quantize(8)
    reference = exact(np.asarray(palette.convert("RGB")))
    plain = save(palette, tmp_path / "plain.png")
    clear = save(palette, tmp_path / "clear.png", transparency=bytes([0, 128, 255, 255, 255, 255, 255, 255]))
    opened = Image.open(clear)
    assert isinstance(opened.info["transparency"], bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PIL warns of palettes with several alphas: not our caller's business
        for given in (plain, clear, opened, palette):
            assert torch.equal(images.load(given, as_is(16)), reference)
    assert "transparency" in opened.info  # the caller's image is not changed


def test_modes_1_and_cmyk_and_animations(tmp_path):
    bits = Image.fromarray(picture(16, 16)).convert("1")
    reference = exact(np.asarray(bits.convert("L"))[..., None])
    assert torch.equal(images.load(bits, as_is(16, 1)), reference)
    assert set(reference.unique().tolist()) == {-1.0, 1.0}

    smooth = np.zeros((16, 16, 3), np.uint8)
    smooth[..., 0], smooth[..., 1] = np.arange(16) * 15, 40
    cmyk = save(Image.fromarray(smooth).convert("CMYK"), tmp_path / "x.jpg", quality=95)
    with Image.open(cmyk) as opened:
        assert opened.mode == "CMYK"
    assert (
        images.load(cmyk, as_is(16)) - exact(smooth)
    ).abs().max() < 12 * LEVEL  # JPEG loses, inversion would lose all

    first, second = Image.new("L", (16, 16), 10), Image.new("L", (16, 16), 200)
    gif = save(first, tmp_path / "x.gif", save_all=True, append_images=[second])
    assert torch.equal(images.load(gif, as_is(16, 1)), images.load(first, as_is(16, 1)))


def test_16_bit_files(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(np.uint16)
    path = tmp_path / "x.png"
    path.write_bytes(png_16_bit(values))
    tiff = save(Image.fromarray(values), tmp_path / "x.tiff")
    exactly = torch.from_numpy(values.astype(np.float64) / 65535 * 2 - 1).float()
    older = Image.fromarray(values.astype(np.int32))
    assert older.mode == "I"
    for given in (path, tiff, Image.open(path), older, values):
        for channels in (1, 3):
            result = images.load(given, as_is(16, channels))
            assert torch.allclose(result, exactly.expand(channels, -1, -1), atol=1e-6)
    upright = Image.open(path)
    upright.getexif()[0x0112] = 6
    assert torch.allclose(images.load(upright, as_is(16, 1))[0], exactly.rot90(-1), atol=1e-6)


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
        (9, lambda a: a),
    ],
)
def test_exif_orientation(tmp_path, orientation, undo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(picture(20, 33))
    jpeg = save(image, tmp_path / "x.jpg", exif=exif, quality=90)
    png = save(image, tmp_path / "x.png", exif=exif)
    for path in (jpeg, png):
        with Image.open(path) as opened:
            reference = expected(np.ascontiguousarray(undo(np.asarray(opened))), 18, 16)
            assert torch.equal(images.load(opened, SMALL), reference)
            assert opened.getexif()[0x0112] == orientation  # the caller's image is not changed
        assert torch.equal(images.load(path, SMALL), reference)


@pytest.mark.parametrize("block", [b"Exif\0\0not TIFF at all", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, on the block
def test_a_damaged_exif_block_does_not_matter(tmp_path, block):
    image = Image.fromarray(picture(16, 16))
    path = save(image, tmp_path / "x.png", exif=block)
    assert torch.equal(images.load(path, as_is(16)), exact(picture(16, 16)))


def test_orientation_counts_though_the_rest_of_the_block_cannot_be_written_anew(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 3
    path = save(Image.fromarray(picture(16, 16)), tmp_path / "x.png", exif=exif)

    def fail(*_: object) -> bytes:
        raise struct.error("a tag of the wrong type")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    assert torch.equal(images.load(path, as_is(16)), exact(picture(16, 16)[::-1, ::-1].copy()))


@pytest.mark.gpu
def test_cuda_tensors_come_to_the_cpu():
    tensor = torch.from_numpy(picture(41, 57)).permute(2, 0, 1)
    assert torch.equal(images.load(tensor.cuda(), SMALL), images.load(tensor, SMALL))
    assert torch.equal(images.load_many(tensor[None].cuda(), SMALL), images.load_many(tensor, SMALL))


def test_the_given_pixels_are_not_changed():
    array = picture(16, 16).astype(np.float32) / 255
    before = array.copy()
    array.setflags(write=False)
    images.load(array, as_is(16)).fill_(7)
    assert np.array_equal(array, before)


# --- Many ---


def test_one_image_a_list_and_a_batch_are_the_same():
    arrays = np.stack([picture(41, 57, seed=seed) for seed in range(3)])
    alone = torch.stack([images.load(array, SMALL) for array in arrays])
    assert not torch.equal(alone[0], alone[1])
    for given in (arrays, list(arrays), tuple(arrays), torch.from_numpy(arrays).permute(0, 3, 1, 2)):
        assert torch.equal(images.load_many(given, SMALL), alone)
    assert torch.equal(images.load_many(arrays[0], SMALL), alone[:1])
    assert torch.equal(images.load_many(Image.fromarray(arrays[0]), SMALL), alone[:1])


def test_greyscale_batches():
    greys = picture(18, 18, 5).transpose(2, 0, 1)[..., None]  # (B, H, W, 1)
    alone = torch.stack([images.load(grey[..., 0], SMALL_GREY) for grey in greys])
    assert torch.equal(images.load_many(greys, SMALL_GREY), alone)
    assert torch.equal(images.load_many(torch.from_numpy(greys.copy()).permute(0, 3, 1, 2), SMALL_GREY), alone)


def test_a_list_may_mix_kinds_and_sizes(tmp_path):
    array, other = picture(41, 57), picture(30, 20, 1, seed=1)
    path = save(Image.fromarray(array), tmp_path / "x.png")
    mixed = [path, str(path), Image.fromarray(array), array, torch.from_numpy(array).permute(2, 0, 1), other]
    result = images.load_many(mixed, SMALL)
    assert result.shape == (6, 3, 16, 16)
    for i in range(5):
        assert torch.equal(result[i], images.load(array, SMALL))
    assert torch.equal(result[5], images.load(other, SMALL))


@pytest.mark.parametrize(
    ("empty", "found"),
    [
        ([], "an empty list"),
        ((), "an empty tuple"),
        (torch.zeros(0, 3, 8, 8), r"an empty batch of shape \(0, 3, 8, 8\)"),
        (np.zeros((0, 8, 8, 3)), r"an empty batch of shape \(0, 8, 8, 3\)"),
    ],
)
def test_no_images(empty, found):
    with pytest.raises(ValueError, match=f"^images: expected at least one image, got {found}$"):
        images.load_many(empty, SMALL)


# --- Refusals ---


def test_errors_name_the_position_and_the_path(tmp_path):
    good = picture(20, 20)
    bad = tmp_path / "x.png"
    bad.write_text("not a picture")
    with pytest.raises(ValueError) as raised:
        images.load_many([good, good, good, bad], SMALL)
    assert str(raised.value) == f"images[3] ({str(bad)!r}): not a readable image file"
    with pytest.raises(ValueError) as raised:
        images.load(bad, SMALL)
    assert str(raised.value) == f"image ({str(bad)!r}): not a readable image file"
    with pytest.raises(ValueError, match=r"^images: expected float pixels"):
        images.load_many(np.full((8, 8), 2.0), SMALL)
    with pytest.raises(ValueError, match=r"^images\[1\]: expected float pixels"):
        images.load_many(np.stack([np.zeros((8, 8, 3)), np.full((8, 8, 3), 2.0)]), SMALL)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
@pytest.mark.parametrize("kept", [0.5, 0.02])
def test_truncated_files(tmp_path, form, kept):
    whole = io.BytesIO()
    Image.fromarray(picture(64, 64)).save(whole, form)
    path = tmp_path / "cut.bin"
    path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * kept)])
    with pytest.raises(ValueError) as raised:
        images.load_many([path], SMALL)
    assert str(raised.value).startswith(f"images[0] ({str(path)!r}): not a readable image file")


def test_a_pil_image_that_cannot_be_decoded(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(picture(64, 64)).save(whole, "PNG")
    with pytest.raises(ValueError, match=r"^images\[0\]: not a readable image file"):
        images.load_many([Image.open(io.BytesIO(whole.getvalue()[:2000]))], SMALL)
    closed = Image.open(io.BytesIO(whole.getvalue()))
    closed.close()
    with pytest.raises(ValueError, match=r"^image: not a readable image file"):
        images.load(closed, SMALL)


def test_missing_files_folders_empty_files_and_odd_names(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        images.load_many([picture(9, 9), tmp_path / "none.png"], SMALL)
    assert str(raised.value) == f"images[1] ({str(tmp_path / 'none.png')!r}): no such file"
    with pytest.raises(ValueError, match=r"^image \(.*\): expected an image file, got a folder$"):
        images.load(tmp_path, SMALL)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match=r"empty\.jpg'\): not a readable image file"):
        images.load(tmp_path / "empty.jpg", SMALL)
    with pytest.raises(ValueError, match=r"^image \('a\\x00b'\): not a readable image file"):
        images.load("a\0b", SMALL)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_files_that_may_not_be_read(tmp_path):
    path = save(Image.fromarray(picture(9, 9)), tmp_path / "x.png")
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"x\.png'\): no permission"):
        images.load(path, SMALL)


def test_decompression_bombs(tmp_path, monkeypatch):
    path = save(Image.fromarray(picture(64, 64)), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"^image \('.*x\.png'\): too large to be decoded safely"):
        images.load(path, SMALL)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(bad):
    array = np.zeros((8, 8, 3))
    array[3, 3, 1] = bad
    for given in (array, torch.from_numpy(array).permute(2, 0, 1), array.astype(np.float16)):
        with pytest.raises(ValueError, match=r"^image: expected finite pixels, got NaN or infinity$"):
            images.load(given, SMALL)


@pytest.mark.parametrize(
    ("low", "high", "hint"),
    [
        (-1, 1, "; pixels already normalised to [-1, 1] go to classifier.tokenize_pixels"),
        (-0.5, 0.25, "; pixels already normalised to [-1, 1] go to classifier.tokenize_pixels"),
        (0, 255, "; divide by 255, or convert to uint8"),
        (-2.1, 2.6, ""),
        (-2.1, 0.9, ""),
        (0, 1.01, "; divide by 255, or convert to uint8"),
        (0, 300, ""),
    ],
)
def test_float_range(low, high, hint):
    array = np.zeros((8, 8))
    array[0, 0], array[0, 1] = low, high
    with pytest.raises(ValueError) as raised:
        images.load(array, SMALL)
    assert str(raised.value) == f"image: expected float pixels in [0, 1], got [{low}, {high}]{hint}"


def test_rounding_errors_are_no_range_errors():
    array = np.array([[-1e-7, 1 + 1e-7], [0, 1]])
    result = images.load(array, as_is(2, 1))
    assert result.min() == -1
    assert result.max() == 1


@pytest.mark.parametrize("dtype", ["bool", "int64", "int32", "int8", "complex64"])
def test_dtypes(dtype):
    zeros = torch.zeros(3, 8, 8, dtype=getattr(torch, dtype))
    for given in (zeros, zeros.permute(1, 2, 0).numpy()):
        with pytest.raises(TypeError, match=rf"^image: expected dtype uint8, uint16 or a float type, got {dtype}$"):
            images.load(given, SMALL)
    with pytest.raises(TypeError, match=r"^images\[0\]: expected dtype"):
        images.load_many(zeros[None], SMALL)


@pytest.mark.parametrize(
    "shape",
    [(10, 28, 28), (2, 28, 28), (28,), (), (2, 3, 28, 28), (1, 2, 3, 28, 28)],
)
def test_shapes_that_are_no_image(shape):
    for given in (torch.zeros(shape), np.zeros(shape)):
        with pytest.raises(ValueError, match=r"^image: expected one image") as raised:
            images.load(given, SMALL)
        assert str(shape) in str(raised.value)
        assert "a batch of greyscale images is a (B, 1, H, W) tensor or a (B, H, W, 1) array" in str(raised.value)


def test_the_other_order_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"\(H, W, C\) array"):
        images.load(np.zeros((3, 28, 28)), SMALL)
    with pytest.raises(ValueError, match=r"\(C, H, W\) tensor"):
        images.load(torch.zeros(28, 28, 3), SMALL)
    with pytest.raises(ValueError, match=r"^images\[0\]: expected one image"):
        images.load_many(np.zeros((2, 3, 28, 28)), SMALL)
    with pytest.raises(ValueError, match=r"^images\[1\]: expected one image"):
        images.load_many([np.zeros((28, 28)), np.zeros((2, 28, 28, 3))], SMALL)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 0, 5), (0, 5, 3), (0, 0, 0)])
def test_arrays_without_pixels(shape):
    for given in (torch.zeros(shape), np.zeros(shape, np.uint8)):
        with pytest.raises(ValueError, match=r"^image: expected (an image with pixels|one image)"):
            images.load(given, SMALL)
    with pytest.raises(ValueError, match=r"^image: expected an image with pixels, got 0 x 5$"):
        images.load(Image.new("RGB", (0, 5)), SMALL)


def test_tensors_that_require_grad():
    with pytest.raises(ValueError, match=r"^image: preprocessing is not differentiable.*tokenize_pixels"):
        images.load(torch.zeros(3, 8, 8, requires_grad=True), SMALL)
    with pytest.raises(ValueError, match=r"^images\[0\]: preprocessing is not differentiable"):
        images.load_many(torch.zeros(2, 3, 8, 8, requires_grad=True) * 1, SMALL)


def test_pil_modes_without_a_meaning():
    with pytest.raises(ValueError, match=r"^image: PIL mode 'F' has no fixed range"):
        images.load(Image.new("F", (8, 8), 0.5), SMALL)
    with pytest.raises(ValueError, match=r"^image: expected 16-bit values.* in PIL mode 'I', got \[0, 70000\]$"):
        images.load(Image.fromarray(np.array([[0, 70000]], np.int32)), SMALL)
    with pytest.raises(ValueError, match=r"^image: PIL mode 'La' cannot be converted to RGB"):
        images.load(Image.new("La", (8, 8)), SMALL)


@pytest.mark.parametrize("thing", [None, 3, b"x.png", {"a": 1}, [[0.0, 1.0]], (i for i in ())])
def test_other_objects(thing):
    name = type(thing[0] if isinstance(thing, list) else thing).__name__
    with pytest.raises(TypeError, match=rf"^images(\[0\])?: expected a path, PIL image.*, got {name}$"):
        images.load_many(thing, SMALL)
