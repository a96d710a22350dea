"""A training loop of one's own around WeightedSFTTrainer, and what --source and --callbacks name:

    python tests/own_loop.py BATCHES.json FOLDER FLAGS OF train.py

WSFT_TEST="stop 2@1" sends rank 1 a SIGTERM before its batch 2; "raise 2@1" raises there.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def batches_of(config, number):
    """For --source: each batch is the groups of one line."""
    for line in Path(os.environ["WSFT_BATCHES"]).read_text().splitlines()[number:]:
        yield json.loads(line)


class Events:
    """For --callbacks: writes each call into a file of its rank."""

    def __init__(self):
        self.file = Path(os.environ["WSFT_EVENTS"] + os.environ["RANK"])

    def write(self, *words):
        with self.file.open("a") as file:
            print(*words, file=file)

    def on_step(self, trainer, metrics):
        self.write("step", metrics["step"], f"{metrics['loss']:.6f}")

    def on_save(self, trainer, folder):
        self.write("save", folder.name)

    def on_publish(self, trainer, version):
        self.write("publish", version)

    def on_end(self, trainer, folder):
        self.write("end", folder and folder.name)


class Gathers:
    """For --callbacks: prints for each step how often rank 0 gathered parameters, in forward and in backward passes, and how
    many are gathered with a module that is not theirs."""

    def __init__(self):
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

        name, self.counts = "_PartitionedParameterCoordinator__all_gather_params_", {True: 0, False: 0}
        gather = getattr(Coordinator, name)

        def counted(coordinator, params, forward, *args, **kwargs):
            self.counts[forward] += 1
            return gather(coordinator, params, forward, *args, **kwargs)

        setattr(Coordinator, name, counted)

    def on_step(self, trainer, metrics):
        if trainer.world.rank == 0:
            foreign = sum(len(getattr(module, "_external_params", ())) for module in trainer.model.modules())
            print("gathers", json.dumps([*self.counts.values(), foreign]), flush=True)
        self.counts |= dict.fromkeys(self.counts, 0)


def main():
    from wsft import WeightedSFTConfig, WeightedSFTTrainer

    path, folder, *flags = sys.argv[1:]
    batches = [json.loads(line) for line in Path(path).read_text().splitlines()]
    rank = int(os.environ["RANK"])
    what, _, place = os.environ.get("WSFT_TEST", "").partition(" ")
    with WeightedSFTTrainer(WeightedSFTConfig.from_args(flags)) as trainer:
        start = trainer.state.get("position", 0)
        print("from", start, flush=True)
        for number in range(start, len(batches)):
            if what and place == f"{number}@{rank}":
                if what == "raise":
                    raise ValueError("my own mistake")
                os.kill(os.getpid(), signal.SIGTERM)
                while not trainer.stop.code:  # a thread hears it
                    time.sleep(0.01)
            metrics = trainer.step(batches[number] if rank == 0 else None)
            trainer.state["position"] = number + 1
        logps = trainer.logprobs(batches[0] if rank == 0 else None)
        trainer.export(folder)
        if rank == 0:
            Path(folder, "logps.json").write_text(json.dumps([[row.tolist() for row in of_group] for of_group in logps]))
        print("metrics", json.dumps(metrics), flush=True)


if __name__ == "__main__":
    main()
