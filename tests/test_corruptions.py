"""What every corruption of the study promises, on patches of photographs."""

import sys

import pytest
import torch
from conftest import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT / "recipes"))
from corruptions import CORRUPTIONS, SEVERITIES, corrupt, gaussian_blur
from data import photo_patches

RANDOM = ("gaussian_noise", "elastic")


def patches(size: int) -> Tensor:
    """Ten of them, (10, 3, size, size)."""
    return photo_patches(size, 10)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 64, 64), (3, 24, 40), (1, 32, 32)])
def test_images_keep_their_shape_and_range(name: str, shape: tuple[int, int, int]):
    images = patches(64)[:2, : shape[0], : shape[1], : shape[2]].contiguous()
    before = images.clone()
    for severity in SEVERITIES:
        corrupted = corrupt(images, name, severity)
        assert corrupted.shape == images.shape
        assert corrupted.dtype == images.dtype
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1
    assert images.equal(before)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [32, 64])
def test_severity_moves_images_further_away(name: str, size: int):
    images = patches(size)
    distances = [(corrupt(images, name, severity) - images).square().mean() for severity in SEVERITIES]
    assert distances[0] > 0
    assert distances == sorted(set(distances))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_decides_and_the_global_generator_is_left_alone(name: str):
    images = patches(32)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = corrupt(images, name, 3, seed=5)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    assert corrupt(images, name, 3, seed=5).equal(first)
    assert corrupt(images, name, 3, seed=6).equal(first) == (name not in RANDOM)


@pytest.mark.parametrize("name", RANDOM)
def test_each_image_is_corrupted_in_its_own_way(name: str):
    first, second = corrupt(patches(32)[:1].expand(2, -1, -1, -1), name, 3)
    assert not first.equal(second)


@pytest.mark.parametrize("name", ["gaussian_blur", "elastic", "pixelate"])
def test_a_severity_means_the_same_at_any_size(name: str):
    large = gaussian_blur(patches(128), 0.03)  # nothing in it that 32 pixels could not hold
    small = torch.nn.functional.avg_pool2d(large, 4)
    moved = [(corrupt(images, name, 5) - images).square().mean() for images in (small, large)]
    torch.testing.assert_close(moved[0], moved[1], rtol=0.3, atol=0)


@pytest.mark.parametrize("severity", [0, 6])
def test_there_are_five_severities(severity: int):
    with pytest.raises(ValueError, match=f"severity={severity} is not one of"):
        corrupt(patches(32), "jpeg", severity)
