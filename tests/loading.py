"""One rank: load a model as a run does, and print the memory that it took. `python tests/loading.py MODEL DEEPSPEED_JSON`"""

import json
import re
import sys
import threading
from pathlib import Path

from wsft import WeightedSFTConfig
from wsft.distributed import deepspeed_config
from wsft.distributed.process_start import start_ranks
from wsft.distributed.world import ranks_from_environment
from wsft.model.loading import load_model, load_model_config


def held():
    """KiB of this process that the kernel could not drop: not the pages of mapped files, which it can read again."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


ranks_from_environment()
config = WeightedSFTConfig(model_name=sys.argv[1], deepspeed=sys.argv[2], device="cpu")
world = start_ranks(config)
sizes = deepspeed_config.ModelSizes(load_model_config(config.model_name, config).hidden_size, layer=0)
config, ds = deepspeed_config.resolve(config, world.size, 1, sizes, native_bf16=False)
before, peak, over = held(), 0, threading.Event()


def watch():
    global peak
    while not over.wait(0.002):
        peak = max(peak, held())


thread = threading.Thread(target=watch)
thread.start()
model = load_model(config.model_name, config, ds)
over.set()
thread.join()
print(json.dumps({"rank": world.rank, "peak": (peak - before) * 1024, "after": (held() - before) * 1024}), flush=True)
