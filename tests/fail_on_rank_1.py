"""train.py with a rank 1 that fails in the middle of its second step (`raise`, `kill`), or as it verifies a checkpoint
(`verify`), whose disk is its own (`apart`), or becomes so before the first save (`lost`); then train.py's own flags."""

import os
import signal
import sys

from wsft import WeightedSFTConfig, WeightedSFTTrainer
from wsft.distributed.state_writer import StateWriter
from wsft.model.causal_lm import WeightedSFTModel
from wsft.run import checkpoint
from wsft.run import output_folder as run_folder

how, argv = sys.argv[1], sys.argv[2:]
forward, calls = WeightedSFTModel.forward, 0


def fail_late(self, tokens, *args, **options):
    global calls
    calls += self.training and not tokens.is_meta  # the others are looks at the model before the first step
    if os.environ["RANK"] == "1" and calls == 2 and how in ("raise", "kill"):
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("ran out of luck")
    return forward(self, tokens, *args, **options)


def verify(folder):
    raise RuntimeError(f"{folder} is rank 0's to look at")


write = StateWriter._write


def write_elsewhere(self, state, path):
    write(self, state, os.path.join(os.environ["OTHER_DISK"], "lost"))


WeightedSFTModel.forward = fail_late
checkpoint.SHARED_WAIT_S = run_folder.SHARED_WAIT_S = 1
if os.environ["RANK"] == "1":
    if how == "verify":
        checkpoint.Checkpoint.at = verify
    elif how == "apart":
        argv += ["--output_dir", os.environ["OTHER_DISK"]]
    elif how == "lost":
        StateWriter._write = write_elsewhere
WeightedSFTTrainer(WeightedSFTConfig.from_args(argv)).train()
