"""Settings: the same from Python, YAML and flags; errors are one sentence."""

import json

import pytest
import yaml
from pydantic import ValidationError

from wsft import WeightedSFTConfig
from wsft.distributed.deepspeed_config import ModelSizes, resolve
from wsft.errors import UserError


def output(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        WeightedSFTConfig.from_args(argv)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_python_yaml_and_flags_agree(tmp_path):
    settings = dict(model_name="m", learning_rate=2e-5, batch_size=8, gradient_checkpointing=False, data="x.jsonl")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    flags = [f"--{name}={value}" for name, value in settings.items()]
    python = WeightedSFTConfig(**settings)
    assert python == WeightedSFTConfig.from_args(flags) == WeightedSFTConfig.from_args(["--config", str(path)])


def test_flags_win_over_yaml_and_the_resolved_yaml_reads_back(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name: m\nlearning_rate: 1e-5\n")  # YAML 1.1 reads 1e-5 as a string
    config = WeightedSFTConfig.from_args(["--config", str(path), "--learning_rate", "3e-5", "--local_rank=0"])
    assert config.learning_rate == 3e-5
    path.write_text(config.to_yaml())
    assert WeightedSFTConfig.from_args(["--config", str(path)]) == config


def test_a_misspelt_setting_is_an_error_that_suggests_the_near_one(tmp_path, capsys):
    assert "--learnin_rate, did you mean --learning_rate?" in output(["--model_name=m", "--learnin_rate", "1"], capsys)
    path = tmp_path / "run.yaml"
    path.write_text("model_name: m\nbatchsize: 4\n")
    assert "batchsize, did you mean batch_size?" in output(["--config", str(path)], capsys)
    with pytest.raises(ValidationError, match="did you mean micro_batch_tokens"):
        WeightedSFTConfig(model_name="m", microbatch_tokens=4)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "model_name is not set"),
        (["--model_name=m", "--batch_size=0"], "batch_size is '0'"),
        (
            ["--model_name=m", "--reduction=none"],
            "reduction is 'none': Input should be 'mean', 'sequence_mean', 'constant' or 'sum'",
        ),
        (["--model_name=m", "--learning_rate=nan"], "learning_rate is 'nan'"),
        (["--model_name=m", "--data=x", "--fetch_mode=per_rank"], "drop one of the two"),
        (["--model_name=m", "--warmup_steps=9", "--training_steps=9"], "warmup_steps 9 must be below training_steps 9"),
        (["--model_name=m", "stray"], "unexpected argument 'stray'"),
        (["--config=/nowhere.yaml"], "nowhere.yaml"),
        (["--model_name="], "model_name is ''"),
        (["--model_name=m", "--output_dir="], "output_dir is ''"),
        (["--model_name=m", "--seed=99999999999999999999"], "seed is"),
        (["--model_name=m", "--data=$NO_SUCH/x"], "data is '$NO_SUCH/x': there is no NO_SUCH in the environment"),
        (["--model_name=m", "--output_dir=~nobody_here/x"], "there is no user 'nobody_here' with a home folder"),
        (["--config=$NO_SUCH/run.yaml"], "there is no NO_SUCH in the environment"),
    ],
)
def test_wrong_settings_are_one_sentence(flags, sentence, capsys):
    assert sentence in output(flags, capsys)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "on: 1\n", "model_name: m\nbatch_size: true\n"])
def test_a_config_that_is_not_a_mapping_is_an_error(text, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    message = output(["--config", str(tmp_path / "run.yaml")], capsys)
    assert "run.yaml" in message or "batch_size is True: expected a number" in message


def test_paths_are_expanded_as_a_shell_does(monkeypatch, tmp_path):
    """Which does not see ~ behind an equals sign, nor what stands in YAML."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    (tmp_path / "run.yaml").write_text("model_name: ~/model\ndata: ${SCRATCH}/data.jsonl\noutput_dir: $SCRATCH/run\n")
    more = ["--deepspeed=~/ds.json", "--resume=~/x", "--tokenizer_name=~", "--ref_model_name=$SCRATCH/ref", "--kl_coef=1"]
    config = WeightedSFTConfig.from_args(["--config=~/run.yaml", *more])
    assert (config.model_name, config.data, config.output_dir) == (f"{tmp_path}/model", "/scratch/data.jsonl", "/scratch/run")
    assert (config.deepspeed, config.resume, config.tokenizer_name) == (f"{tmp_path}/ds.json", f"{tmp_path}/x", str(tmp_path))
    assert config.ref_model_name == "/scratch/ref"


def test_a_duplicate_key_is_an_error_with_its_line(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model_name: m\nseed: 1\nobjective_args: {a: 1}\nseed: 2\n")
    assert "run.yaml: duplicate key seed, the second on line 4" in output(["--config", str(path)], capsys)
    path.write_text("model_name: m\nobjective_args:\n  a: 1\n  b: 2\n  a: 3\n")
    assert "duplicate key a, the second on line 5" in output(["--config", str(path)], capsys)
    assert "duplicate key a," in output(["--model_name=m", "--objective_args={a: 1, a: 2}"], capsys)
    ds = tmp_path / "ds.json"
    ds.write_text('{"optimizer": {"type": "AdamW", "params": {"lr": [1, {"x": ":"}],\n"type": 1}},\n "bf16": {}, "bf16": {}}')
    with pytest.raises(UserError, match=r"ds\.json: duplicate key bf16, the second on line 3"):
        resolved(str(ds))
    ds.write_text('{"optimizer": {"type": "AdamW",\n "params": {"lr": 1e-3}}, "bf16": {"enabled": "auto"}}')
    assert resolved(str(ds))[0].learning_rate == 1e-3


def test_only_rank_0_says_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert output(["--nonsense"], capsys) == ""


def test_a_user_without_a_home_folder_is_an_error(monkeypatch, capsys):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # of a container's /etc/passwd
    assert "there is no HOME, and user" in output(["--model_name=m"], capsys)


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        WeightedSFTConfig.from_args(["--help"])
    text = capsys.readouterr().out
    for name, field in WeightedSFTConfig.model_fields.items():
        assert f"--{name}" in text and field.description.split()[0] in text


def resolved(ds, ranks=(2, 2), **settings):
    """On that many ranks, of which as many on a host."""
    config, sizes = WeightedSFTConfig(model_name="m", deepspeed=ds, **settings), ModelSizes(hidden=64, layer=50_000)
    return resolve(config, *ranks, sizes, native_bf16=True)


def test_auto_is_filled_from_the_run():
    ds = {
        "bf16": {"enabled": "auto"}, "gradient_clipping": "auto", "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"},
    }  # fmt: skip
    _, out = resolved(ds, learning_rate=2e-5, weight_decay=0.1, max_grad_norm=0.7)
    assert out["optimizer"]["params"] == {"lr": 2e-5, "weight_decay": 0.1, "betas": [0.9, 0.999], "eps": 1e-8}
    assert out["gradient_clipping"] == 0.7 and out["bf16"]["enabled"] is True
    assert out["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 50_000, "stage3_param_persistence_threshold": 640}
    assert resolved(ds, lora_rank=4)[1]["zero_optimization"]["reduce_bucket_size"] == 64 * 64
    assert (out["train_batch_size"], out["train_micro_batch_size_per_gpu"], out["gradient_accumulation_steps"]) == (2, 1, 1)


@pytest.mark.parametrize("ranks, size", [((32, 8), 8), ((8, 8), 1), ((2, 1), 1)])
def test_second_shares_are_a_hosts_where_there_are_several(ranks, size):
    _, out = resolved({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}, ranks)
    assert out["zero_optimization"]["zero_hpz_partition_size"] == size


def test_a_value_of_the_json_is_adopted_where_the_run_has_the_default():
    config, _ = resolved({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}, "train_batch_size": 32})
    assert (config.learning_rate, config.batch_size) == (0.1, 32)


@pytest.mark.parametrize(
    "ds, settings, named",
    [
        (
            {"optimizer": {"params": {"lr": 0.1}}},
            dict(learning_rate=0.2),
            ("optimizer.params.lr", "0.1", "learning_rate", "0.2"),
        ),
        ({"gradient_clipping": 1.0}, dict(max_grad_norm=0.0), ("gradient_clipping", "max_grad_norm")),
        ({"train_batch_size": 64}, dict(batch_size=128), ("train_batch_size", "64", "batch_size", "128")),
        ({"gradient_accumulation_steps": 4}, {}, ("gradient_accumulation_steps", "micro_batch_tokens")),
        ({"train_micro_batch_size_per_gpu": 4}, {}, ("train_micro_batch_size_per_gpu", "micro_batch_tokens")),
        *(({"scheduler": {"type": kind}}, {}, (kind, "WarmupDecayLR")) for kind in ("LRRangeTest", "CyclicLR", "OneCycleLR")),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1}}},
            dict(learning_rate=2),
            ("warmup_max_lr", "2"),
        ),
        ({"scheduler": {"type": "WarmupLR"}}, dict(lr_scheduler="cosine"), ("scheduler", "WarmupLR", "lr_scheduler", "cosine")),
        ({"fp16": {"enabled": True}}, {}, ("fp16", "bf16")),
        ({"zero_optimization": {"stage": 4}}, {}, ("stage", "4")),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, {}, ("zero_hpz_partition_size is 8", "2 rank(s)")),
        ({"activation_checkpointing": {"number_checkpoints": "auto"}}, {}, ("activation_checkpointing.number_checkpoints",)),
        ({"optimizer": "AdamW"}, {}, ("optimizer", "AdamW")),
        ({"gradient_clipping": "1.0"}, {}, ("gradient_clipping", "expected a number")),
        ({"zero_optimisation": {"stage": 2}}, {}, ("zero_optimisation", "zero_optimization")),
        ({"optimizer": {"type": "AdamW", "params": {"betas": ["auto", 0.9]}}}, {}, ("optimizer.params.betas.0",)),
    ],
)
def test_what_contradicts_the_run_is_an_error_naming_both(ds, settings, named):
    with pytest.raises(UserError) as error:
        resolved(ds, **settings)
    assert all(word in str(error.value) for word in named)


def test_a_json_that_is_none_is_a_sentence(tmp_path):
    broken = tmp_path / "ds.json"
    broken.write_text('{"bf16": ')
    with pytest.raises(UserError, match=r"ds.json is not JSON: .*line 1"):
        resolved(str(broken))
    broken.write_text("[1]")
    with pytest.raises(UserError, match="expected an object"):
        resolved(str(broken))
    with pytest.raises(UserError, match="cannot be read"):
        resolved(str(tmp_path / "absent.json"))


def test_the_users_scheduler_drives_the_run():
    params = {"warmup_max_lr": "auto", "warmup_min_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"}
    _, out = resolved({"scheduler": {"type": "WarmupDecayLR", "params": params}}, warmup_steps=5, training_steps=50)
    assert out["scheduler"]["params"] == {
        "warmup_max_lr": 1e-6, "warmup_min_lr": 0, "warmup_num_steps": 5, "total_num_steps": 50,
    }  # fmt: skip


def test_the_older_name_of_bf16_is_bf16():
    _, out = resolved({"bfloat16": {"enabled": "auto"}})
    assert out["bf16"] == {"enabled": True} and "bfloat16" not in out


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_in_bf16_are_summed_in_float32_unless_the_json_says_otherwise(stage, caplog):
    ds = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    caplog.set_level("INFO", "wsft")
    for more in ({}, {"data_types": {}}, {"data_types": {"grad_accum_dtype": "auto"}, "communication_data_type": "auto"}):
        _, out = resolved(ds | more)
        assert out["data_types"]["grad_accum_dtype"] == out["communication_data_type"] == "fp32"
        assert out["zero_optimization"]["stage"] == max(1, stage)  # stage 0 of DeepSpeed cannot
    assert ("stage 1" in caplog.text) == (stage == 0) and "lose digits" not in caplog.text
    _, out = resolved(ds | {"data_types": {"grad_accum_dtype": "bf16"}})
    assert out["data_types"]["grad_accum_dtype"] == out["communication_data_type"] == "bf16"
    assert out["zero_optimization"]["stage"] == stage and "lose digits" in caplog.text
    assert resolved(ds | {"communication_data_type": "bf16"})[1]["communication_data_type"] == "bf16"


def test_without_a_json_gradients_are_summed_in_float32():
    assert resolved(None)[1]["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("optimizer, decay", [("AdamW", 0.0), ("SGD", 0.0), ("Rprop", None)])
def test_weight_decay_is_the_runs_where_the_json_has_none(optimizer, decay):
    """torch's AdamW would take 0.01."""
    _, out = resolved({"optimizer": {"type": optimizer, "params": {"lr": "auto"}}})
    assert out["optimizer"]["params"].get("weight_decay") == decay


@pytest.mark.parametrize(
    "kind, wanted",
    [
        ("WarmupLR", {"warmup_max_lr": 0.5, "warmup_num_steps": 1}),
        ("WarmupDecayLR", {"warmup_max_lr": 0.5, "warmup_num_steps": 1, "total_num_steps": 6}),
        ("WarmupCosineLR", {"warmup_num_steps": 1, "total_num_steps": 6}),  # whose peak is the optimizer's rate
        ("OneCycle", {"cycle_max_lr": 0.5}),
        ("ExponentialLR", {}),  # torch's, likewise
    ],
)
def test_the_peak_of_any_scheduler_is_the_runs_learning_rate(kind, wanted):
    """And the run's own steps are its steps: DeepSpeed would take 0.001 and 1,000."""
    _, out = resolved({"scheduler": {"type": kind}}, training_steps=6, learning_rate=0.5)
    assert out["scheduler"]["params"] == wanted and out["optimizer"]["params"]["lr"] == 0.5


def test_an_empty_section_of_bf16_is_none():
    assert resolved({"bf16": {}})[1]["bf16"] == {"enabled": False}


def test_resolving_leaves_the_users_dict_alone():
    ds = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    before = json.dumps(ds)
    resolved(ds)
    assert json.dumps(ds) == before
