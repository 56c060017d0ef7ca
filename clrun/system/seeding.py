"""Random numbers that depend on a seed and a scope (a purpose and ids), never on how many were drawn before."""

import hashlib
import random

import numpy as np
import torch


def derive(seed: int, *scope: str | int) -> int:
    """Return a 63-bit seed that depends on `seed` and each part of `scope`, the same on all platforms and versions."""
    text = repr((int(seed), *scope)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(seed: int, *scope: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new torch generator seeded with `derive(seed, *scope)`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *scope))


def seed_all(seed: int, *scope: str | int) -> None:
    """Seed the global generators of random, numpy and torch with `derive(seed, *scope)`."""
    value = derive(seed, *scope)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
