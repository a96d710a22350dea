"""train.py whose adapters, from the first step on, lack a layer (missing), have another module's name (renamed), or hold a
number that is none (nan); then train.py's own flags."""

import sys

import torch

from wsft import WeightedSFTConfig, WeightedSFTTrainer
from wsft.publish.adapters import AdapterFolder

how, argv, write = sys.argv[1], sys.argv[2:], AdapterFolder._write


def broken(self, step, tensors):
    if step and how == "missing":
        tensors = {name: tensor for name, tensor in tensors.items() if ".layers.3." not in name}
    if step and how == "renamed":
        tensors = {name.replace(".layers.3.", ".layers.300."): tensor for name, tensor in tensors.items()}
    if step and how == "nan":
        next(iter(tensors.values())).view(-1)[0] = torch.nan
    return write(self, step, tensors)


AdapterFolder._write = broken
WeightedSFTTrainer(WeightedSFTConfig.from_args(argv)).train()
