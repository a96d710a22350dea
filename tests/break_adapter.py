"""train.py whose adapters, from the first step on, lack a layer (missing), have another module's name (renamed), or hold a
number that is none (nan); then train.py's own flags."""

import runpy
import sys
from pathlib import Path

import torch

from wsft.publish.adapters import AdapterFolder

how, write = sys.argv[1], AdapterFolder._write


def broken(self, step, tensors):
    if step and how == "missing":
        tensors = {name: tensor for name, tensor in tensors.items() if ".layers.3." not in name}
    if step and how == "renamed":
        tensors = {name.replace(".layers.3.", ".layers.300."): tensor for name, tensor in tensors.items()}
    if step and how == "nan":
        next(iter(tensors.values())).view(-1)[0] = torch.nan
    return write(self, step, tensors)


AdapterFolder._write = broken
sys.argv = [str(Path(__file__).resolve().parent.parent / "train.py"), *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
