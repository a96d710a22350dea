"""Train a causal language model by loss-masked, advantage-weighted SFT on rollouts from Atropos.

    deepspeed train.py --deepspeed ds_configs/zero3.json --model_name Qwen/Qwen2.5-7B-Instruct --atropos_url http://host:8000
    torchrun --nproc_per_node 8 train.py --config run.yaml
    srun python train.py --config run.yaml
    python train.py --model_name FOLDER --data rollouts.jsonl           # one rank, no server, no GPU needed
    python train.py --config run.yaml --dry_run --ranks 8 --gpu_memory_gib 80   # would it fit?

`python train.py --help` explains every setting. What a run is: config -> trainer -> train; the loop is in wsft/trainer.py.
"""

import sys

from wsft import WeightedSFTConfig
from wsft.distributed.signals import note_signals


def main() -> None:
    config = WeightedSFTConfig.from_args()
    if not config.dry_run:
        note_signals()

    from wsft import WeightedSFTTrainer  # torch and transformers load here: after flags were checked
    from wsft.errors import UserError

    try:
        if config.dry_run:
            from wsft.dry_run import dry_run

            sys.exit(0 if dry_run(config) else 1)
        WeightedSFTTrainer(config).train()
    except UserError as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
