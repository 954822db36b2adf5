"""Settings of the training batches."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class InputSettings:
    """Reading and augmentation of training images: the section `input` of a config.

    Attributes:
        batch_size: Number of images in the global batch.
        crop_size: Side of the crops in pixels.
        short_sides: Lengths that an image's shorter side is drawn from.
        max_long_side: Limit of the longer side.
        skip_unseen_pictures: Leaves out the images without any pixel of a seen class.
        allow_missing_classes: Trains on a user's folder though a seen class has no pixel.
        threads: Threads that read and augment, 0 for one per core; changes speed and memory only.
        prefetch: Number of batches made ahead.
    """

    batch_size: int
    crop_size: int
    short_sides: tuple[int, ...]
    max_long_side: int
    skip_unseen_pictures: bool = False
    allow_missing_classes: bool = False
    threads: int = 0
    prefetch: int = 2
