"""Digests of tensors: equal digests mean equal type, shape and bytes."""

import hashlib

import torch
from torch import Tensor


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 digest of a tensor's type, shape and bytes, as 64 hexadecimal digits."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()
