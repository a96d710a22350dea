"""train.py with a rank 1 that fails in the middle of its second step: `raise` or `kill`, then train.py's own flags."""

import os
import signal
import sys

from wsft import WeightedSFTConfig, WeightedSFTTrainer
from wsft.model import WeightedSFTModel

how, argv = sys.argv[1], sys.argv[2:]
forward, calls = WeightedSFTModel.forward, 0


def fail_late(self, *args, **options):
    global calls
    calls += self.training  # the others are looks at the model before the first step
    if os.environ["RANK"] == "1" and calls == 2:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("ran out of luck")
    return forward(self, *args, **options)


WeightedSFTModel.forward = fail_late
WeightedSFTTrainer(WeightedSFTConfig.from_args(argv)).train()
