"""Where `Hardware.place` puts a module: as torch's own `to` does, without touching what is there already."""

import copy
import itertools

import pytest
import torch
from helpers import cpu
from torch import nn

SHAPES = list(itertools.product((1, 5), (1, 2, 3), (1, 3), (1, 3)))  # of weights [O, C, H, W]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("before", [torch.channels_last, torch.contiguous_format])
def test_strides_are_those_that_to_gives(channels_last, before):
    after = torch.channels_last if channels_last else torch.contiguous_format
    for shape in SHAPES:
        module = nn.Module()
        module.weight = nn.Parameter(torch.randn(shape).contiguous(memory_format=before))
        expected = copy.deepcopy(module).to(device="cpu", memory_format=after)
        for _ in range(2):  # a second time nothing changes
            cpu(channels_last=channels_last).place(module)
            assert module.weight.stride() == expected.weight.stride()
            assert torch.equal(module.weight, expected.weight)


def test_only_what_is_elsewhere_is_touched(monkeypatch):
    networks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(3))
    place = cpu(channels_last=True).place
    place(networks)
    networks.append(nn.Conv2d(3, 4, 3))
    touched = []
    monkeypatch.setattr(nn.Module, "to", lambda self, **kwargs: touched.append(self))
    place(networks)
    assert touched == [networks[-1]]
