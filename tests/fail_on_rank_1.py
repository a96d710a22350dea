"""train.py with a rank 1 that fails in the middle of its second step (`raise`, `kill`), or as it verifies a checkpoint
(`verify`); then train.py's own flags."""

import os
import signal
import sys

from wsft import WeightedSFTConfig, WeightedSFTTrainer
from wsft.checkpoint import Checkpoint
from wsft.model import WeightedSFTModel

how, argv = sys.argv[1], sys.argv[2:]
forward, calls = WeightedSFTModel.forward, 0


def fail_late(self, *args, **options):
    global calls
    calls += self.training  # the others are looks at the model before the first step
    if os.environ["RANK"] == "1" and calls == 2 and how != "verify":
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("ran out of luck")
    return forward(self, *args, **options)


def verify(folder):
    raise RuntimeError(f"{folder} is rank 0's to look at")


WeightedSFTModel.forward = fail_late
if how == "verify" and os.environ["RANK"] == "1":
    Checkpoint.at = verify
WeightedSFTTrainer(WeightedSFTConfig.from_args(argv)).train()
