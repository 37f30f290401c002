"""Pictures of every kind in, the pixels a model wants out.

An image is a path, a PIL image, a torch tensor or a numpy array, and the same picture gives the same pixels whichever
way it comes:

- torch tensors are channel-first, `(C, H, W)` or `(B, C, H, W)`; numpy arrays are channel-last, `(H, W, C)` or
  `(B, H, W, C)`; C is 1, 3 or 4. `(H, W)` is greyscale. Nothing else is guessed at.
- uint8 means 0..255, uint16 means 0..65535, a float type means [0, 1]. Floats, 16-bit arrays and 16-bit greyscale files
  keep their precision; everything else is resized in 8 bits a channel, as the public ImageNet evaluations do.
- The EXIF orientation of files and PIL images is applied. Those evaluations ignore it: the few photographs that carry
  one stand upright here and lie on their side there.
- Alpha is dropped, not blended, as PIL's `convert("RGB")` does. RGB becomes greyscale by PIL's luma, greyscale becomes
  RGB by repetition. Of an animated file the first frame is taken.

Then `Preprocessing` is followed: resize (Lanczos, sides as `torchvision.transforms.Resize` computes them), cut the
centre (as `torchvision.transforms.CenterCrop` does), map to [-1, 1], pad with black.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image

from varlik.models.config import Preprocessing

ImageLike = str | os.PathLike[str] | Image.Image | torch.Tensor | np.ndarray

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROUNDING = 1e-6  # how far float arithmetic may carry a pixel out of [0, 1]
_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # PIL's weights for "L"
_LARGEST = 1 << 26  # pixels of a resized image that is built whole before its centre is cut out
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # a warning is raised if the caller says so
_DAMAGE = (  # what PIL's readers raise on damaged files
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, NotImplementedError),
    *(struct.error, zlib.error),
)
_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load(image: ImageLike, preprocessing: Preprocessing) -> torch.Tensor:
    """One image as (C, S, S) float32 pixels in [-1, 1] on the CPU; C and S are the preprocessing's.

    Raises `FileNotFoundError` for an absent file, `ValueError` for a damaged one, for a wrong shape, pixels out of
    range or NaN and for a tensor that requires grad, `TypeError` for another kind of object or dtype.
    """
    return _load(image, preprocessing, "image")


def load_many(images: ImageLike | Sequence[ImageLike], preprocessing: Preprocessing) -> torch.Tensor:
    """Images as (B, C, S, S) float32 pixels in [-1, 1] on the CPU.

    `images` is one image, a list or tuple of images of any kinds, or a (B, C, H, W) tensor or (B, H, W, C) array.
    Raises what `load` raises, naming the position as `images[i]`, and `ValueError` where there is no image.
    """
    if isinstance(images, (torch.Tensor, np.ndarray)) and images.ndim == 4:
        # One copy to the CPU for the batch instead of one an image.
        batch = list(images.cpu() if isinstance(images, torch.Tensor) else images)
        found = f"batch of shape {tuple(images.shape)}"
    elif isinstance(images, (list, tuple)):
        batch, found = list(images), type(images).__name__
    else:
        return _load(images, preprocessing, "images")[None]
    if not batch:
        raise ValueError(f"images: expected at least one image, got an empty {found}")
    return torch.stack([_load(image, preprocessing, f"images[{i}]") for i, image in enumerate(batch)])


def _load(image: object, preprocessing: Preprocessing, name: str) -> torch.Tensor:
    channels = preprocessing.channels
    if isinstance(image, (str, os.PathLike)):
        name = f"{name} ({os.fspath(image)!r})"
        if os.path.isdir(image):
            raise ValueError(f"{name}: expected an image file, got a folder")
        with _readable(name), Image.open(image) as opened:
            picture = _upright(opened)
        planes = _planes_of_picture(picture, channels, name)
    elif isinstance(image, Image.Image):
        with _readable(name):
            picture = _upright(image)
        planes = _planes_of_picture(picture, channels, name)
    elif isinstance(image, torch.Tensor):
        planes = _planes_of_array(_channel_last(image, name), channels, name)
    elif isinstance(image, np.ndarray):
        _check_shape(image.shape, image.shape[-1] if image.ndim == 3 else 1, name)
        planes = _planes_of_array(image, channels, name)
    else:
        raise TypeError(f"{name}: expected a path, PIL image, torch tensor or numpy array, got {type(image).__name__}")

    cut = [np.asarray(_resize_and_cut(plane, preprocessing)) for plane in planes]
    if cut[0].dtype == np.uint8:  # one plane with all channels
        channel_last = cut[0].reshape(preprocessing.crop, preprocessing.crop, channels)
        pixels = torch.from_numpy(np.ascontiguousarray(channel_last.transpose(2, 0, 1), np.float32)) / 255
    else:
        pixels = torch.from_numpy(np.stack(cut))
    return torch.nn.functional.pad(pixels * 2 - 1, (preprocessing.padding,) * 4, value=-1.0)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """What PIL raises while it reads, as errors that name the image."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such file") from error
    except PermissionError as error:
        raise PermissionError(f"{name}: no permission to read the file") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a readable image file") from error
    except _TOO_LARGE as error:
        raise ValueError(f"{name}: too large to be decoded safely ({error})") from error
    except _DAMAGE as error:
        raise ValueError(f"{name}: not a readable image file ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
    """Decoded copy with the EXIF orientation applied."""
    image.load()
    # Not ImageOps.exif_transpose: it also writes the EXIF block anew, which fails for damaged ones (ImageNet has some).
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:
        turn = None  # the block cannot be read, but the pixels are good
    return image.copy() if turn is None else image.transpose(turn)


def _planes_of_picture(image: Image.Image, channels: int, name: str) -> list[Image.Image]:
    """A PIL image of our own as one 8-bit plane (RGB or L), or as a float plane a channel where it has 16 bits."""
    if 0 in image.size:
        raise ValueError(f"{name}: expected an image with pixels, got {image.width} x {image.height}")
    if image.mode == "F":
        raise ValueError(f"{name}: PIL mode 'F' has no fixed range; give a float array in [0, 1]")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            # "I" has 32 bits, but it is also how PIL presents some 16-bit files.
            found = f"[{values.min()}, {values.max()}]"
            raise ValueError(f"{name}: expected 16-bit values, 0..65535, in PIL mode {image.mode!r}, got {found}")
        return _planes_of_array(values.astype(np.uint16), channels, name)
    mode = "RGB" if channels == 3 else "L"
    if image.mode == mode:
        return [image]
    image.info.pop("transparency", None)  # PIL warns, for palettes, that `convert` drops it
    try:
        return [image.convert("RGB").convert(mode)]
    except ValueError as error:
        raise ValueError(f"{name}: PIL mode {image.mode!r} cannot be converted to RGB") from error


def _channel_last(image: torch.Tensor, name: str) -> np.ndarray:
    if image.requires_grad:
        raise ValueError(
            f"{name}: preprocessing is not differentiable, but the tensor requires grad; detach it, or give normalised "
            f"pixels to classifier.tokenize_pixels"
        )
    if image.dtype not in (torch.uint8, torch.uint16, *_FLOATS):
        raise _wrong_dtype(image.dtype, name)
    _check_shape(tuple(image.shape), image.shape[0] if image.ndim == 3 else 1, name)
    image = image.float() if image.dtype == torch.bfloat16 else image  # numpy has no bfloat16
    array = image.cpu().numpy()
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def _check_shape(shape: tuple[int, ...], channels: int, name: str) -> None:
    if len(shape) not in (2, 3) or channels not in (0, 1, 3, 4):
        raise ValueError(
            f"{name}: expected one image, a (C, H, W) tensor, (H, W, C) array or (H, W) greyscale with C 1, 3 or 4, "
            f"got {shape}; a batch of greyscale images is a (B, 1, H, W) tensor or a (B, H, W, 1) array"
        )
    if 0 in shape:
        raise ValueError(f"{name}: expected an image with pixels, got shape {shape}")


def _wrong_dtype(dtype: object, name: str) -> TypeError:
    return TypeError(f"{name}: expected dtype uint8, uint16 or a float type, got {str(dtype).removeprefix('torch.')}")


def _planes_of_array(array: np.ndarray, channels: int, name: str) -> list[Image.Image]:
    """(H, W) or (H, W, C) as one 8-bit plane (RGB or L), or as one float plane in [0, 1] a channel."""
    if array.dtype.kind != "f" and array.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise _wrong_dtype(array.dtype, name)
    if array.ndim == 3:
        array = array[..., 0] if array.shape[-1] == 1 else array[..., :3]
    if array.dtype == np.uint8:
        return _planes_of_picture(Image.fromarray(np.ascontiguousarray(array)), channels, name)
    if array.dtype.kind == "f":
        _check_range(array, name)
        array = array.astype(np.float32)
    else:
        array = array.astype(np.float32) / 65535
    if array.ndim == 3 and channels == 1:
        array = _LUMA[0] * array[..., 0] + _LUMA[1] * array[..., 1] + _LUMA[2] * array[..., 2]
    planes = [array[..., c] for c in range(3)] if array.ndim == 3 else [array] * channels
    return [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]


def _check_range(array: np.ndarray, name: str) -> None:
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():  # min and max carry a NaN along
        raise ValueError(f"{name}: expected finite pixels, got NaN or infinity")
    if low >= -_ROUNDING and high <= 1 + _ROUNDING:
        return
    hint = ""
    if -1 - _ROUNDING <= low < 0 and high <= 1 + _ROUNDING:
        hint = "; pixels already normalised to [-1, 1] go to classifier.tokenize_pixels"
    elif low >= 0 and high <= 255:
        hint = "; divide by 255, or convert to uint8"
    raise ValueError(f"{name}: expected float pixels in [0, 1], got [{low:.6g}, {high:.6g}]{hint}")


def _resize_and_cut(plane: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    side, crop = preprocessing.resize, preprocessing.crop
    long = int(side * max(plane.size) / min(plane.size))
    width, height = (side, long) if plane.width <= plane.height else (long, side)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    if width * height <= _LARGEST:
        whole = _resize(plane, (width, height), (0, 0, *plane.size))
        return whole.crop((left, top, left + crop, top + crop))
    # A sliver of a picture: only the part of it that the cut shows is resized, or it would take gigabytes.
    across, down = plane.width / width, plane.height / height
    return _resize(plane, (crop, crop), (left * across, top * down, (left + crop) * across, (top + crop) * down))


def _resize(plane: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    lanczos = Image.Resampling.LANCZOS
    if plane.mode != "F":
        return plane.resize(size, lanczos, box)
    # PIL resizes across, then down, and clamps 8-bit images after each: floats must be too, to give the same picture.
    left, top, right, bottom = box
    plane = _clamp(plane.resize((size[0], plane.height), lanczos, (left, 0, right, plane.height)))
    return _clamp(plane.resize(size, lanczos, (0, top, size[0], bottom)))


def _clamp(plane: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(plane).clip(0, 1))
