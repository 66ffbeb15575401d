"""Tables of the DDIM paper (Song et al. 2021) that the documents quote: results of trained networks, kept for comparison."""

from collections.abc import Mapping
from types import MappingProxyType

FID_STEPS = (10, 20, 50, 100, 1000)

# FID by data set and row, one value for each of FID_STEPS; lower is better. Eq: S2-T1, T1
DDIM_FID: Mapping[str, Mapping[str, tuple[float, ...]]] = MappingProxyType(
    {
        "CIFAR-10": MappingProxyType(
            {
                "eta=0.0": (13.36, 6.84, 4.67, 4.16, 4.04),
                "eta=0.2": (14.04, 7.11, 4.77, 4.25, 4.09),
                "eta=0.5": (16.66, 8.35, 5.25, 4.46, 4.29),
                "eta=1.0": (41.07, 18.36, 8.01, 5.78, 4.73),
                "sigma_hat": (367.43, 133.37, 32.72, 9.99, 3.17),
            }
        ),
        "CelebA": MappingProxyType(
            {
                "eta=0.0": (17.33, 13.73, 9.17, 6.53, 3.51),
                "eta=0.2": (17.66, 14.11, 9.51, 6.79, 3.64),
                "eta=0.5": (19.86, 16.06, 11.01, 8.09, 4.28),
                "eta=1.0": (33.12, 26.03, 18.48, 13.93, 5.98),
                "sigma_hat": (299.71, 183.83, 71.71, 45.20, 3.26),
            }
        ),
    }
)

# Mean squared error per dimension of decoding an encoded image, CIFAR-10 test set, by S. Eq: S2-T2, T2
DDIM_RECONSTRUCTION: Mapping[int, float] = MappingProxyType(
    {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}
)
