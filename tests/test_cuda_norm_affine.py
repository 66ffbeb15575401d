"""Statistics of a group norm and what it comes down to by channel, on CUDA run on the host."""

import numpy as np
import pytest

from alphabar.kernels import gpu
from alphabar.kernels.gpu import norm, norm_affine
from tests import cusim
from tests.cuda_arrays import aligned
from tests.cuda_norm_affine_cases import NORMS, Norm, Place, arrays, case, parameters
from tests.cusim.probes import shifted

pytestmark = [
    pytest.mark.skipif(not cusim.available(), reason="g++ is not installed"),
    pytest.mark.usefixtures("nothing_is_left_unwritten"),
]


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("of", NORMS)
def test_they_are_those_of_the_definition(of: Norm, low: bool, host: cusim.Host) -> None:
    for modulated in (True, False):
        for place in (aligned, shifted):
            case(of, low, modulated, place)


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("of", NORMS)
def test_the_statistics_have_the_bits_of_the_norm_itself(of: Norm, low: bool, host: cusim.Host) -> None:
    given, one = arrays(of, low)[1], np.ones(of[0][-1], np.float32)
    _, *wanted = gpu.group_norm_silu(gamma=one, beta=one, groups=of[1], eps=1e-3, **given)
    found = norm_affine.group_stats(given["x"], of[1], 1e-3, given["tail"])
    assert all(np.array_equal(p, q) for p, q in zip(found, wanted, strict=True))


@pytest.mark.parametrize("order", cusim.ORDERS)
def test_any_order_of_threads_gives_the_same_bits(order: str) -> None:
    for of in NORMS[:3]:
        given, found = arrays(of, True)[1], []
        gamma, beta, scale, shift = parameters(of[0][0], of[0][-1], True)
        for device in (cusim.Host(), cusim.Host("fast", order, 7)):
            with gpu.on(device):
                found.append(norm_affine.group_affine(given["x"], gamma, beta, of[1], 1e-5, scale, shift, given["tail"]))
        assert all(np.array_equal(p, q) for p, q in zip(*found, strict=True))


@pytest.mark.parametrize(("order", "place"), [("forward", aligned), ("random", shifted)])
def test_no_rule_is_broken(order: str, place: Place) -> None:
    with gpu.on(cusim.Host("check", order)):
        for of in NORMS:
            for low in (True, False):
                case(of, low, low, place)


def test_large_groups_and_nothing_go_by_the_definition(host: cusim.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "LARGEST_GROUP", 4)
    for low in (True, False):
        case(((2, 6, 10), 2, 7), low, True, aligned)
    assert set(host.launched) == {"norm_affine"}
    mean, rstd = norm_affine.group_stats(np.zeros((0, 4, 4, 8), np.float32), 4)
    a, b = norm_affine.norm_affine(mean, rstd, np.ones(8, np.float32), np.ones(8, np.float32))
    assert mean.shape == rstd.shape == (0, 4) and a.shape == b.shape == (0, 8)


def test_a_constant_group_has_the_deviation_of_eps(host: cusim.Host) -> None:
    mean, rstd = norm_affine.group_stats(np.full((2, 5, 8), 3, np.float32), 2, 1e-4)
    assert (mean == 3).all()
    np.testing.assert_allclose(rstd, 100, rtol=1e-6)
