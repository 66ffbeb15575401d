"""Make photos16.h5: 16×16 crops of scikit-learn's two photographs, the images that the restoration pictures were made from.

    python bench/photo_crops.py && alphabar train --data photos16.h5 --steps 1300 --name photos
    alphabar edit super-resolve runs/photos --data photos16.h5 --factor 2 --out super.png

The test images come from a band of the photographs that no training image touches.
"""

import h5py
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIDE, CROPS, EVERY = 16, 1500, 10  # one crop in ten is a test image
BAND = (56, 80)  # columns of the test images


def crops() -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 (N, 16, 16, 3), split: 1 for test)."""
    rng = np.random.default_rng(0)
    images, split = [], []
    low, high = BAND
    for photo in load_sample_images().images:
        small = np.asarray(Image.fromarray(photo).resize((128, 85), Image.Resampling.LANCZOS))
        height, width = small.shape[:2]
        for k in range(CROPS):
            test, row = k % EVERY == 0, rng.integers(0, height - SIDE + 1)
            if test:
                column = rng.integers(low, high - SIDE + 1)
            else:
                column = rng.integers(0, low - SIDE + 1 + width - high - SIDE + 1)
                column = column if column <= low - SIDE else high + column - (low - SIDE + 1)
            crop = small[row : row + SIDE, column : column + SIDE]
            images.append(crop[:, ::-1] if not test and rng.random() < 0.5 else crop)
            split.append(int(test))
    return np.stack(images), np.array(split, np.uint8)


if __name__ == "__main__":
    with h5py.File("photos16.h5", "w") as f:
        f["images"], f["split"] = crops()
