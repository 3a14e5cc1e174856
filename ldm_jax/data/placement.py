"""The position of a training picture's pixels in its file.

A source fits a file to the training size, and augmentations move it further. Both update the
example's `Placement`, which transforms other data of the file (boxes, a segmentation, a depth map,
SDXL's sizes) in the same way.
"""

import dataclasses

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Placement:
    """The picture is a window of the file, which was mirrored if `mirrored`, then resized.

    Attributes:
      original: of the file, upright, pixels (height, width).
      resized: what the file was resized to, pixels (height, width).
      corner: (top, left) of the window in the resized file; negative outside of it.
      size: of the window, (height, width): that of the picture.
      mirrored: whether left and right are exchanged.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    mirrored: bool = False

    @classmethod
    def centre(cls, original: tuple[int, int], size: tuple[int, int]) -> "Placement":
        """The centre of a file in `size` (height, width): what `images.fit` makes."""
        height, width = original
        scale = max(size[0] / height, size[1] / width)
        resized = (max(round(height * scale), size[0]), max(round(width * scale), size[1]))
        corner = ((resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2)
        return cls((int(height), int(width)), resized, corner, (int(size[0]), int(size[1])))

    def flipped(self) -> "Placement":
        """With left and right exchanged."""
        top, left = self.corner
        corner = (top, self.resized[1] - left - self.size[1])
        return dataclasses.replace(self, corner=corner, mirrored=not self.mirrored)

    def moved(self, top: int, left: int) -> "Placement":
        """With the window further down and right by so many pixels."""
        corner = (self.corner[0] + top, self.corner[1] + left)
        return dataclasses.replace(self, corner=corner)

    def scaled(self, size: tuple[int, int]) -> "Placement":
        """With file and picture resized, so that the picture has `size` (height, width)."""
        factors = [new / old for new, old in zip(size, self.size, strict=True)]
        resized = tuple(round(s * f) for s, f in zip(self.resized, factors, strict=True))
        corner = tuple(round(c * f) for c, f in zip(self.corner, factors, strict=True))
        return dataclasses.replace(self, resized=resized, corner=corner, size=tuple(size))

    def cut(self, height: int, width: int) -> "Placement":
        """With a window of another size, from the same corner."""
        return dataclasses.replace(self, size=(height, width))

    def apply(self, array: np.ndarray, smooth: bool, outside: float | None = None) -> np.ndarray:
        """Transforms an array over the whole file to one over the picture: (h, w) of any size with
        the file's aspect ratio → `size`.

        Args:
          array: uint8, int32 or float32 (h, w).
          smooth: bicubic and antialiased; False: the nearest value, for labels.
          outside: the value outside of the file; None repeats its edge.
        """
        image = Image.fromarray(array[:, ::-1] if self.mirrored else array)
        how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
        resized = np.asarray(image.resize(self.resized[::-1], how))
        (top, left), (height, width) = self.corner, self.size
        rows, columns = np.arange(top, top + height), np.arange(left, left + width)
        picture = resized[
            np.ix_(
                *(np.clip(i, 0, n - 1) for i, n in zip((rows, columns), self.resized, strict=True))
            )
        ]
        if outside is None:
            return picture
        inside = np.ix_(
            (rows >= 0) & (rows < self.resized[0]), (columns >= 0) & (columns < self.resized[1])
        )
        filled = np.full(picture.shape, outside, picture.dtype)
        filled[inside] = picture[inside]
        return filled

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) of (left, top, right, bottom), relative to the file → to the picture.

        The results may be outside of 0 … 1.
        """
        left, top, right, bottom = np.moveaxis(np.asarray(boxes, np.float64), -1, 0)
        if self.mirrored:
            left, right = 1.0 - right, 1.0 - left
        edges = []
        for x, y in ((left, top), (right, bottom)):
            edges.append((x * self.resized[1] - self.corner[1]) / self.size[1])
            edges.append((y * self.resized[0] - self.corner[0]) / self.size[0])
        return np.stack(edges, axis=-1)
