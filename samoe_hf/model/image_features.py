"""The features of frames, which all objects of a frame share."""

from typing import Any, NamedTuple

from torch import Tensor


class ImageFeatures(NamedTuple):
    """Features of one frame for each row: a video, or an object of it.

    Attributes:
        fine: (rows, hidden / 8, S / 4, S / 4), for the mask decoder.
        middle: (rows, hidden / 4, S / 8, S / 8), for the mask decoder.
        coarse: (rows, hidden, S / 16, S / 16), for the memory and the mask decoder.
        position: (tokens, 1, hidden), position encoding of `coarse` for the memory attention.
        decoder_position: (1, hidden, S / 16, S / 16), the same for the mask decoder.
    """

    fine: Tensor
    middle: Tensor
    coarse: Tensor
    position: Tensor
    decoder_position: Tensor

    def select(self, index: Any) -> "ImageFeatures":
        """The rows of an index."""
        return self._replace(fine=self.fine[index], middle=self.middle[index], coarse=self.coarse[index])

    def for_objects(self, objects_per_video: int) -> "ImageFeatures":
        """Repeats each row for a video's objects. A single row stays one, which broadcasts over all objects."""
        if self.coarse.shape[0] == 1 or objects_per_video == 1:
            return self
        fine, middle, coarse = (x.repeat_interleave(objects_per_video, dim=0) for x in self[:3])
        return self._replace(fine=fine, middle=middle, coarse=coarse)
