"""train.py with a rank 1 that fails in the middle of its second step: `raise` or `kill`, then train.py's own flags."""

import os
import signal
import sys

from wsft import WeightedSFTConfig, WeightedSFTTrainer
from wsft.model import WeightedSFTModel

how, argv = sys.argv[1], sys.argv[2:]
forward, calls = WeightedSFTModel.forward, 0


def fail_late(self, *args):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 3:  # the first was the look at the head
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("ran out of luck")
    return forward(self, *args)


WeightedSFTModel.forward = fail_late
WeightedSFTTrainer(WeightedSFTConfig.from_args(argv)).train()
