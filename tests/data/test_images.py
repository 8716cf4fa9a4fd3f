"""Images of the user's own, good and bad."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from conftest import encoded, picture
from PIL import Image, PngImagePlugin, features

from eqm_jax.data import images

SHAPE = (8, 8, 1)


def test_a_folder_is_read_in_order_cropped_and_converted(tmp_path):
  Image.new("RGB", (40, 24), (255, 255, 255)).save(tmp_path / "b.jpg")
  Image.new("L", (8, 8), 0).save(tmp_path / "a.png")
  Image.new("P", (9, 30)).save(tmp_path / "c.png")
  Image.new("CMYK", (64, 64)).save(tmp_path / "d.jpg")
  (tmp_path / ".hidden").write_text("no image")
  read, labels = images.read(str(tmp_path), SHAPE, 4)
  assert read.shape == (4, 8, 8, 1) and read.dtype == np.float32 and labels is None
  np.testing.assert_allclose(read[0], -1)
  np.testing.assert_allclose(read[1], 1)
  assert len(images.read(str(tmp_path), SHAPE, 2)[0]) == 2
  assert images.read(str(tmp_path), (8, 8, 3), 9)[0].shape == (4, 8, 8, 3)


def png(depth: int, colour: int, channels: int) -> bytes:
  """A black PNG of 9×9 pixels, of a depth that Pillow does not write."""

  def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

  header = struct.pack(">IIBBBBB", 9, 9, depth, colour, 0, 0, 0)
  rows = zlib.compress(bytes(1 + 9 * channels * depth // 8) * 9)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff(depth: int, channels: int, *, sample_format: int = 1, photometric: int = 2) -> bytes:
  """A black TIFF of 9×9 pixels; `sample_format` 3 is floating point, `photometric` 2 is RGB and 8 is Lab."""
  pixels = bytes(9 * 9 * channels * 8)
  numbers = {256: 9, 257: 9, 259: 1, 262: photometric, 273: 512, 277: channels, 278: 9, 279: len(pixels)}
  entries = {tag: struct.pack("<HHII", tag, 3, 1, number) for tag, number in numbers.items()}
  arrays = {258: depth, 339: sample_format}  # of each channel: in place, or from byte 256 on
  for place, (tag, number) in zip((256, 384), arrays.items()):
    array = struct.pack("<I", place) if channels > 2 else struct.pack("<HH", number, number)
    entries[tag] = struct.pack("<HHI", tag, 3, channels) + array
  directory = struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + bytes(4)
  data = (b"II*\0" + struct.pack("<I", 8) + directory).ljust(256, b"\0")
  for number in arrays.values():
    data += struct.pack(f"<{channels}H", *[number] * channels).ljust(128, b"\0")
  return data + pixels


def with_bytes(data: bytes, marker: bytes, offset: int, new: bytes) -> bytes:
  """A file with bytes changed, so far behind a marker."""
  place = data.index(marker) + offset
  return data[:place] + new + data[place + len(new) :]


DEEP = {
  "grey.png": (png(16, 0, 1), "I;16 pixels, more than 8 bits deep (16 bits a channel)"),
  "rgb.png": (png(16, 2, 3), "RGB pixels, more than 8 bits deep (16 bits a channel)"),
  "grey_alpha.png": (png(16, 4, 2), "(16 bits a channel)"),
  "rgb_alpha.png": (png(16, 6, 4), "(16 bits a channel)"),
  "rgb.tif": (tiff(16, 3), "RGB pixels, more than 8 bits deep (16 bits a channel)"),
  "rgb_float.tif": (tiff(32, 3, sample_format=3), "(32 bits a channel)"),  # Pillow opens neither this nor the next
  "lab.tif": (tiff(16, 3, photometric=8), "(16 bits a channel)"),
  "odd_start.tif": (with_bytes(tiff(16, 3), b"II*\0", 0, b"II\0*"), "(16 bits a channel)"),  # which Pillow opens, too
  "grey.tif": (tiff(12, 1, photometric=1), "(12 bits a channel)"),
  "float.tif": (encoded(Image.new("F", (9, 9)), "TIFF"), "F pixels, more than 8 bits deep (32 bits a channel)"),
  "rgb.ppm": (b"P6\n# 9 9 255\n9 9 # wide\n65535\n" + bytes(9 * 9 * 6), "RGB pixels, more than 8 bits deep (16 bits"),
  "text.pgm": (b"P2 9 9 1023\n" + b"1000 " * 81, "(10 bits a channel)"),
  "twelve.jpg": (with_bytes(encoded(picture(), "JPEG"), b"\xff\xc0", 4, b"\x0c"), "(12 bits a channel)"),
  "fill.jpg": (
    encoded(picture(), "JPEG")[:2] + b"\xff" + with_bytes(encoded(picture(), "JPEG"), b"\xff\xc0", 4, b"\x0c")[2:],
    "(12 bits a channel)",
  ),
  "jpeg2000.png": (encoded(Image.new("I;16", (9, 9)), "JPEG2000"), "(16 bits a channel)"),  # under another name
}


if features.check("avif"):
  DEEP["ten.avif"] = with_bytes(encoded(picture(), "AVIF"), b"pixi", 9, b"\x0a" * 3), "(10 bits a channel)"


@pytest.mark.parametrize("name", DEEP)
def test_the_depth_is_that_of_the_files_own_header(name):
  data, message = DEEP[name]
  with pytest.raises(images.DamagedImage, match=f"{name}: has .*convert it to 8 bits first") as error:
    images.decode(data, name, 8, 3)
  assert message in str(error.value)


@pytest.mark.parametrize(
  "data",
  [png(8, 2, 3), png(1, 0, 1), tiff(8, 3), tiff(8, 3, photometric=8), b"P6 9 9 255\n" + bytes(243)]
  + [b"P6 9 9 15\n" + bytes(243), b"P5\n9 9\n255\n" + bytes(81), encoded(picture(), "JPEG2000")]
  + [
    encoded(picture(), "WEBP"),
    encoded(picture(), "BMP"),
    encoded(picture("L"), "GIF"),
    encoded(picture("CMYK"), "TIFF"),
  ],
)
def test_eight_bits_and_fewer_are_read(data):
  assert images.decode(data, "a", 8, 3).shape == (8, 8, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of the same
def test_headers_that_end_early_are_damaged_images():
  for data in (png(16, 2, 3), tiff(16, 3), *(DEEP[name][0] for name in ("twelve.jpg", "jpeg2000.png", "rgb.ppm"))):
    for length in (*range(0, 64), len(data) // 2):
      with pytest.raises(images.DamagedImage):
        images.decode(data[:length], "a", 8, 3)


def test_very_large_images_are_too_large_and_not_damaged(monkeypatch):
  """Pillow raises beyond twice its limit, and warns beyond the limit."""
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
  with pytest.raises(
    images.LargeImage, match=r"big.png: too large, but not damaged \(Image size \(900 pixels\).*smaller"
  ):
    images.decode(encoded(picture(size=(30, 30))), "big.png", 8, 3)
  with pytest.warns(Image.DecompressionBombWarning):
    assert images.decode(encoded(picture()), "a.png", 8, 3).shape == (8, 8, 3)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    with pytest.raises(images.LargeImage, match="a.png: too large"):
      images.decode(encoded(picture()), "a.png", 8, 3)
  assert not issubclass(images.LargeImage, images.DamagedImage)


def test_texts_that_are_too_large_are_named():
  texts, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
  texts.add_text("workflow", "x" * 2_000_000, zip=True)
  picture().save(buffer, "PNG", pnginfo=texts)
  with pytest.raises(images.LargeImage, match="a.png: its texts are too large .*remove them first"):
    images.decode(buffer.getvalue(), "a.png", 8, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_an_option(orientation, kind):
  stored = picture(size=(16, 16))
  exif = Image.Exif()
  exif[0x0112] = orientation
  buffer = io.BytesIO()
  stored.save(buffer, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
  data = buffer.getvalue()
  with Image.open(io.BytesIO(data)) as image:
    pixels = np.asarray(image.convert("RGB"))
  # The first row and column of what is stored, in what is shown: EXIF's definition.
  shown = {
    1: pixels,
    2: pixels[:, ::-1],
    3: pixels[::-1, ::-1],
    4: pixels[::-1],
    5: pixels.swapaxes(0, 1),
    6: pixels.swapaxes(0, 1)[:, ::-1],
    7: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: pixels.swapaxes(0, 1)[::-1],
  }
  np.testing.assert_array_equal(images.decode(data, "a", 16, 3), pixels)
  np.testing.assert_array_equal(images.decode(data, "a", 16, 3, upright=True), shown[orientation])


def test_images_of_a_task_are_upright_by_default(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 3
  half = Image.fromarray(np.repeat(np.asarray([[0], [255]], np.uint8), 8, axis=1)).resize(
    (8, 8), Image.Resampling.NEAREST
  )
  half.save(tmp_path / "a.png", exif=exif)
  upright, stored = (images.read(str(tmp_path), SHAPE, 1, upright=upright)[0][0] for upright in (True, False))
  np.testing.assert_array_equal(
    upright, images.read(str(tmp_path / "a.png"), SHAPE, 9)[0][0]
  )  # one file, and by default
  assert stored[0, 0] == -1 and upright[0, 0] == 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of the same
def test_damaged_exif_leaves_the_image_as_it_is_stored():
  buffer = io.BytesIO()
  picture().save(buffer, "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff no such thing")
  data = buffer.getvalue()
  expected = images.decode(encoded(picture()), "a", 8, 3)
  np.testing.assert_array_equal(images.decode(data, "a", 8, 3, upright=True), expected)
  with pytest.raises(images.DamagedImage, match="not a complete image"):
    images.decode(data[: len(data) // 2], "a", 8, 3, upright=True)


def transparent(mode: str) -> bytes:
  """Red (of grey modes: 76) of which the left half is transparent."""
  image = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
  image.paste((255, 0, 0, 0), (0, 0, 8, 16))
  if mode in ("RGBA", "LA"):
    return encoded(image.convert(mode))
  buffer = io.BytesIO()
  if mode == "P":
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([255, 0, 0, 255, 0, 0])
    palette.paste(0, (0, 0, 8, 16))
    palette.save(buffer, "PNG", transparency=b"\x00\xff")
  else:  # one colour, or grey, is transparent
    colours = {"RGB": ((255, 0, 0), (254, 0, 0)), "L": (76, 75), "GIF": (1, 0)}[mode]
    image = Image.new("P" if mode == "GIF" else mode, (16, 16), colours[0])
    if mode == "GIF":
      image.putpalette([254, 0, 0, 255, 0, 0])
    image.paste(colours[1], (0, 0, 8, 16))
    image.save(buffer, "GIF" if mode == "GIF" else "PNG", transparency=colours[1])
  return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "GIF"])
def test_transparency_is_dropped_or_filled(mode):
  colour = (76, 76, 76) if mode in ("LA", "L") else (255, 0, 0)
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # Pillow's of palettes with transparency
    for background, left in ((None, colour), ("white", (255, 255, 255)), ("black", (0, 0, 0))):
      pixels = images.decode(transparent(mode), "a", 16, 3, background=background).astype(int)
      assert np.abs(pixels[8, 12] - colour).max() <= 1 and np.abs(pixels[8, 2] - left).max() <= 1
  grey = images.decode(transparent(mode), "a", 16, 1, background="white")
  assert grey[8, 2] == 255 and abs(int(grey[8, 12, 0]) - 76) <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_without_options_pixels_are_those_that_pillow_converts(mode, channels):
  """As in earlier versions, also of a transparent image."""
  kind = "TIFF" if mode == "CMYK" else "PNG"
  image = picture("RGB" if mode in ("LA", "RGBA") else mode, size=(8, 8))
  if mode in ("LA", "RGBA"):
    image.putalpha(picture("L", size=(8, 8), seed=1))
    image = image.convert(mode)
  expected = np.asarray(image.convert(images.MODES[channels])).reshape(8, 8, channels)
  np.testing.assert_array_equal(images.decode(encoded(image, kind), "a", 8, channels), expected)


def test_of_several_frames_the_first_is_taken():
  buffer = io.BytesIO()
  frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
  frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
  assert images.decode(buffer.getvalue(), "a", 8, 3)[0, 0].tolist() == [255, 0, 0]


def test_missing_and_damaged_files_are_named(tmp_path):
  with pytest.raises(ValueError, match="nowhere: no such folder"):
    images.read(str(tmp_path / "nowhere"), SHAPE, 9)
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="empty: the folder holds no image"):
    images.read(str(tmp_path / "empty"), SHAPE, 9)
  (tmp_path / "half.npz").write_bytes(b"PK\x03\x04 and no more")
  with pytest.raises(ValueError, match="half.npz: not a complete .npz"):
    images.read(str(tmp_path / "half.npz"), SHAPE, 9)
  Image.effect_noise((64, 64), 50).save(tmp_path / "empty" / "cut.jpg")
  whole = (tmp_path / "empty" / "cut.jpg").read_bytes()
  (tmp_path / "empty" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="cut.jpg: not a complete image"):
    images.read(str(tmp_path / "empty"), SHAPE, 9)
