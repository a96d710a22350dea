"""Several runs in one start of the ranks: a JSON list of configs, trained one after another."""

import json
import sys
from pathlib import Path

from wsft import WeightedSFTConfig, WeightedSFTTrainer

for settings in json.loads(Path(sys.argv[1]).read_text()):
    WeightedSFTTrainer(WeightedSFTConfig(**settings)).train()
