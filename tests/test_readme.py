"""The Python examples of the READMEs run unchanged."""

import json
import re
import threading

from atropos_server import atropos_server, post_group, register_env
from conftest import RANK_VARIABLES, ROOT, make_group, run_ranks, write_groups

from wsft.reference import reference
from wsft.run.measurements import METRICS


def test_the_three_uses_of_the_readme_run(tiny_model, tmp_path, rng, monkeypatch):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    alone, server_batch, trainer, own_loop = re.findall(r"```python\n(.*?)```", (ROOT / "wsft" / "README.md").read_text(), re.S)

    names = {}
    exec(alone, names)
    assert names["logits"].grad.abs().sum() > 0 and names["result"]["num_tokens"] == 6

    groups = [make_group(rng, [6, 9]) for _ in range(2)]
    with atropos_server() as server:
        import requests

        registration = dict(wandb_group="", wandb_project="", batch_size=4, max_token_len=64, checkpoint_dir="")
        registration |= dict(save_checkpoint_interval=0, starting_step=0, num_steps=1)
        requests.post(f"{server.url}/register", json=registration).raise_for_status()
        assert requests.get(f"{server.url}/batch").json() == {"batch": None}
        env = register_env(server.url, group_size=2)
        for group in groups:
            post_group(server.url, env, group)
        names = {"url": server.url}
        exec(server_batch, names)
    assert {tuple(t.shape) for t in names["tensors"].values()} == {(4, 9)}

    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [6, 9]) for _ in range(4)])
    before = set(threading.enumerate())
    exec(trainer, {"model": tiny_model, "data": data, "out": str(tmp_path / "out")})
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    found = {re.sub(r"env_\d+", "env_N", name) for line in lines for name in json.loads(line)}
    assert found <= {name for names in METRICS for name in names.split()}
    names = {"model": tiny_model, "data": data, "out": str(tmp_path / "own")}
    groups = [[make_group(rng, [6, 9]), make_group(rng, [7, 5])] for _ in range(2)]
    script = f"import json\nglobals().update({names!r})\nmy_batches = json.loads({json.dumps(groups)!r})\n"
    script += trainer.replace("WeightedSFTTrainer(config).train()\n", "") + own_loop
    (tmp_path / "own_loop.py").write_text(script)
    for code, output in run_ranks([str(tmp_path / "own_loop.py")], 2):
        assert code == 0, output
    assert (tmp_path / "own" / "model" / "model.safetensors").exists()
    left = set(threading.enumerate()) - before
    assert len(left) < 10, left


def test_the_reference_is_what_the_code_says():
    assert (ROOT / "wsft" / "REFERENCE.md").read_text() == reference(), "python -m wsft.reference > wsft/REFERENCE.md"


def test_the_readme_is_short_and_its_links_lead_somewhere():
    for readme in (ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("wsft/*/*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", readme.read_text()):
            assert link.startswith("https://") or (readme.parent / link).exists(), f"{readme}: {link}"
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_cost_model_in_the_launchers_readme_is_what_its_script_computes(capsys):
    from benchmarks import scaling

    scaling.main([])
    assert capsys.readouterr().out in (ROOT / "launch" / "README.md").read_text()
