"""No rank holds a whole model: only its partition, a parameter or two while loading, and a shard at export."""

import json

import pytest
from conftest import ROOT, make_model, run_ranks

WIDE = dict(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=10,
    num_attention_heads=8,
    head_dim=64,
    tied=False,
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A model of 36 million parameters in float32, 138 MiB, in files of 12 MiB at most; and its bytes, and the largest's."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "sharded"
    make_model(folder, **WIDE)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="12MB")
    assert len(list(folder.glob("*.safetensors"))) > 8
    sizes = [p.nbytes for p in model.parameters()]
    return folder, sum(sizes), max(sizes)


def test_a_rank_loads_its_share_and_a_parameter_at_a_time(sharded, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what malloc keeps of freed memory is not what is held
    folder, whole, largest = sharded
    for code, output in run_ranks(["tests/loading.py", folder, ROOT / "ds_configs" / "zero3_cpu.json"], 2, imports_done=False):
        assert code == 0, output
        printed = json.loads(output.strip().splitlines()[-1])
        # a gathered parameter, what was read of it, the message that it is broadcast in; and 32 MiB of modules and names
        assert whole / 2 <= printed["peak"] < whole / 2 + 3 * largest + 2**25, printed
        assert printed["after"] < whole / 2 + 2**25, printed
