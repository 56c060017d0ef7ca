"""Puts this folder on the path, for `helpers` and `running`; tests run on one thread, so that sums do not vary."""

import torch

torch.set_num_threads(1)
