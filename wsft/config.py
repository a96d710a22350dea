"""WeightedSFTConfig: every setting of a run, validated alike from Python, a YAML file and the command line.

Knows nothing of torch, DeepSpeed or HTTP. `distributed/deepspeed_config.py` resolves the DeepSpeed JSON that a run points to.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from wsft.command_line import from_args, unknown_setting
from wsft.loss.corrections import SEQUENCE_MASKS, Bounds, Corrections
from wsft.loss.objectives import OBJECTIVES, Objective
from wsft.settings_files import expand_path, parse_yaml

_SECRET_NAME = re.compile(r"(api_?key|password|secret|token)$", re.IGNORECASE)

# settings that may differ on resume: they do not change what is learned, except for rounding and the run's length
RESUME_MAY_CHANGE = {
    *("attn_implementation", "kernels", "gradient_checkpointing", "device", "deepspeed", "trust_remote_code"),
    *("micro_batch_tokens", "packing", "share_prefixes", "skip_zero_weight", "prefetch_batches"),
    *("eval_data", "eval_steps", "source", "callbacks", "atropos_url", "atropos_timeout", "fetch_mode"),
    *("training_steps", "step_timeout", "strict", "output_dir", "overwrite_output_dir", "save_steps", "keep_checkpoints"),
    *("background_save", "resume", "journal_gib"),
    *("publish_folder", "publish_steps", "publish_keep", "publish_bucket_mib", "publish_to", "publish_transport"),
    *("publish_lora", "publish_pause", "publish_timeout", "publish_failures", "publish_verify_steps", "publish_tolerance"),
    *("wandb_project", "wandb_group", "wandb_run_name"),
}

# settings that may name a file or folder
PATHS = (
    "model_name",
    "tokenizer_name",
    "ref_model_name",
    "deepspeed",
    "data",
    "eval_data",
    "output_dir",
    "resume",
    "publish_folder",
)

# settings of a dry run only: not in config.yaml, and ignored on resume
DRY_RUN_FIELDS = {"dry_run", "ranks", "gpu_memory_gib"}


class WeightedSFTConfig(BaseModel):
    """The settings of one run. An unknown name is an error that suggests a similar one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), str_min_length=1)

    # model
    model_name: str = Field(description="Folder or hub name of the Hugging Face causal language model to train.")
    tokenizer_name: str | None = Field(None, description="Folder or hub name of the tokenizer; the model's own if unset.")
    attn_implementation: str | None = Field(
        None, description="Attention of the model: sdpa, eager, flash_attention_2, ...; chosen by the model if unset."
    )
    gradient_checkpointing: bool = Field(
        True,
        description="Recompute each layer's activations in the backward pass: less memory, about a third more time.",
    )
    kernels: Literal["auto", "liger", "none"] = Field(
        "auto",
        description="liger: fused kernels of liger-kernel for RMSNorm, gated MLPs and rotary embeddings. auto: where there is "
        "a GPU, it is installed, knows the model, and a trial gives the results of the model's own code.",
    )
    trust_remote_code: bool = Field(False, description="Run the model's own Python code, from its folder or the hub.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto uses CUDA if available.")
    deepspeed: str | dict[str, Any] | None = Field(
        None, description="DeepSpeed JSON (path, or a dict from Python). Unset: ZeRO-3, AdamW, bf16."
    )

    # data
    atropos_url: str = Field("http://localhost:8000", description="URL of the Atropos server.")
    atropos_timeout: float = Field(
        600,
        gt=0,
        description="Seconds at a stretch that the Atropos server may be unreachable or unusable before the run ends.",
    )
    data: str | None = Field(
        None,
        description="Train on these files of Atropos groups instead of a server's: JSONL (also .gz, .zst) or Parquet; paths or "
        "patterns, separated by commas.",
    )
    epochs: int = Field(1, ge=1, description="Passes over data.")
    shuffle: bool = Field(False, description="Read the lines of data in a random order, another one in each epoch.")
    source: str | None = Field(
        None,
        description="Take batches from this generator function, my_module:my_generator, instead of a server: of the config and "
        "the number of batches taken so far; it yields lists of Atropos groups.",
    )
    callbacks: str | None = Field(
        None,
        description="A class or function of yours, my_module:my_callbacks, called without arguments; what it returns may have "
        "on_step, on_save, on_publish and on_end.",
    )
    fetch_mode: Literal["rank0", "per_rank"] = Field(
        "rank0", description="rank0: one rank fetches for all. per_rank: each fetches batch_size / ranks sequences."
    )
    batch_size: int = Field(128, ge=1, description="Sequences in one batch, over all ranks.")
    updates_per_batch: int = Field(
        1,
        ge=1,
        description="Optimizer steps on one batch, each on a part of its groups. Checkpoints and published versions come after "
        "whole batches.",
    )
    max_token_len: int = Field(4096, ge=2, description="Longest sequence to train on, in tokens.")
    overlong: Literal["drop", "truncate"] = Field("drop", description="What to do with sequences over max_token_len.")
    micro_batch_tokens: int = Field(
        8192,
        ge=2,
        description="Tokens, padding included, in one forward pass on one rank; a longer sequence gets its own.",
    )
    packing: bool = Field(
        True, description="Pack several sequences into a row, without attention between them, if the model supports it."
    )
    share_prefixes: bool = Field(
        True,
        description="Compute common prefixes, such as the prompt of a group, once per micro-batch; needs packing.",
    )
    skip_zero_weight: bool = Field(True, description="Skip tokens whose weight is certainly 0.")
    prefetch_batches: int = Field(
        1, ge=0, description="Batches to fetch, decode and assign to ranks ahead of the one that trains."
    )

    # optimisation
    training_steps: int = Field(1000, ge=1, description="Optimizer steps of the run.")
    learning_rate: float = Field(1e-6, ge=0, allow_inf_nan=False, description="Peak learning rate.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning rate schedule after the warmup; linear and cosine decay towards 0."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warmup of the learning rate.")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="Decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False, description="Clip the global gradient norm; 0: no clipping.")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of every random generator.")

    # LoRA
    lora_rank: int | None = Field(
        None, ge=1, description="Train adapters of this rank (LoRA) instead of all parameters; unset: all parameters."
    )
    lora_alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="Adapters count lora_alpha / lora_rank times.")
    lora_target: str = Field(
        "attention-mlp",
        description="Modules with adapters: attention and MLP projections of each decoder layer, or ends of module names, "
        "separated by commas.",
    )

    # objective
    objective: str = Field(
        "weighted_sft", description=f"Weight of a token: {', '.join(OBJECTIVES)}, or your own as my_module:my_function."
    )
    objective_args: dict[str, Any] = Field({}, description='Its arguments, as YAML or JSON: "{eps_low: 0.2, eps_high: 0.28}".')
    mismatch_mask: tuple[float, float] | None = Field(
        None, description='Weight 0 for tokens whose ratio to the sampler is outside: "[0.5, 2.0]". With any objective.'
    )
    mismatch_cap: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Multiply weights by the ratio to the sampler, truncated at this; the objective's own ratio is then to the "
        "policy at the start of the batch.",
    )
    mismatch_cap_level: Literal["token", "sequence"] = Field(
        "token", description="The ratio of mismatch_cap: of the token, or the product over its sequence."
    )
    icepop: tuple[float, float] | None = Field(
        None, description='As mismatch_cap, but weight 0 for tokens whose ratio is outside: "[0.5, 5.0]".'
    )
    sequence_mask: dict[str, tuple[float, float] | None] = Field(
        {},
        description='Weight 0 for sequences outside: "{geometric: [0.99, 1.01], ...}" of '
        f"{', '.join(SEQUENCE_MASKS)}; or a name, with its default bounds.",
    )
    off_policy_mask: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Weight 0 for tokens of negative advantage in sequences whose mean log ratio is below minus this.",
    )
    mask_truncated: bool = Field(
        False,
        description="Weight 0 for sequences that the sampler cut off: by their finish_reason, or as their last token ends no "
        "text. Their scores still count in their groups.",
    )
    max_staleness: int | None = Field(
        None,
        ge=0,
        description="Weight 0 for tokens sampled more than this many optimizer steps ago, as weight_version says.",
    )
    reduction: Literal["mean", "sequence_mean", "constant", "sum"] = Field(
        "mean",
        description="Over the global batch. mean: over trained tokens. sequence_mean: of sequences' means. constant: of "
        "sequences' sums over max_token_len. sum: not divided.",
    )
    score_advantages: Literal["group_norm", "group_center", "rloo", "maxrl", "raw"] = Field(
        "group_norm", description="How to compute advantages from scores, for groups without token-level advantages."
    )
    advantage_normalization: Literal["none", "batch", "batch_center"] = Field(
        "none",
        description="Over the trained tokens of the global batch. batch: zero mean, unit standard deviation. "
        "batch_center: zero mean.",
    )
    advantage_clip: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Then clip advantages to plus and minus this."
    )
    negative_advantage_scale: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Then multiply negative advantages by this; 0 drops them."
    )
    temperature: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="Sampling temperature: logits are divided by it. Used if the record has none.",
    )
    record_temperature: bool = Field(
        True, description="Use the record's temperature; set false if inference_logprobs were not scaled by it."
    )
    kl_coef: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Coefficient of the KL to a reference: ref_model_name, or else the record's ref_logprobs; with LoRA, for "
        "tokens that have none, the base model.",
    )
    ref_model_name: str | None = Field(None, description="Folder or hub name of a frozen reference model for kl_coef.")
    entropy_coef: float = Field(0.0, allow_inf_nan=False, description="Coefficient of an entropy bonus for each trained token.")
    distill_coef: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Coefficient of the KL from the record's teacher: distill_token_ids and distill_logprobs.",
    )
    distill_renormalize: bool = Field(False, description="Normalize the probabilities of the teacher's entries to sum to 1.")
    strict: bool = Field(
        False,
        description="End the run at a batch without inference_logprobs, ref_logprobs or teacher, if the loss needs them.",
    )

    eval_data: str | None = Field(
        None, description="JSONL file of Atropos groups that are not trained on: loss and logprobs of it are metrics (eval/*)."
    )
    eval_steps: int = Field(100, ge=1, description="Optimizer steps between two evaluations; there is one at the start.")

    # output
    output_dir: str = Field("runs/wsft", description="Folder of the run; with several hosts, on a shared file system.")
    overwrite_output_dir: bool = Field(
        False, description="Replace the results of an earlier run in output_dir, unless the run resumes from them."
    )
    save_steps: int = Field(100, ge=1, description="Steps between checkpoints; there is always one at the end.")
    keep_checkpoints: int = Field(2, ge=1, description="Number of checkpoints to keep; older ones are deleted.")
    background_save: bool = Field(
        True,
        description="Write checkpoints while training goes on, from a copy in host memory; without room for it training waits.",
    )
    resume: bool | str = Field(
        False,
        description="Continue from the newest checkpoint in output_dir, or start at step 0 if there is none; "
        "with a path, from that checkpoint.",
    )
    journal_gib: float = Field(
        64,
        gt=0,
        description="Disk space for batches fetched since the oldest kept checkpoint; once full, a checkpoint is saved.",
    )
    step_timeout: float = Field(
        1800,
        gt=0,
        description="Seconds without progress after which the run ends as hanging, and logs the stacks of all ranks.",
    )
    # publishing
    publish_folder: str | None = Field(
        None,
        description="Write the weights to this folder at the start and after every publish_steps steps.",
    )
    publish_to: str | None = Field(
        None, description="URLs of inference servers (vLLM, SGLang), separated by commas, which load each published version."
    )
    publish_transport: Literal["auto", "nccl", "gloo", "disk"] = Field(
        "auto",
        description="How weights reach the servers: broadcast from rank 0 over nccl or gloo, or by a folder that they load "
        "(disk). auto: disk if publish_folder is set, else the first of nccl, gloo and disk that trainer and servers have.",
    )
    publish_lora: Literal["auto", "adapter", "merged"] = Field(
        "auto",
        description="With lora_rank: publish adapters under names of their own, or added to the weights (merged). auto: "
        "adapters if all servers take them.",
    )
    publish_pause: Literal["keep", "abort", "wait"] = Field(
        "keep",
        description="Requests in flight while a server loads weights: pause and keep them, abort them, or wait for them.",
    )
    publish_timeout: float = Field(
        120, gt=0, description="Seconds for which a server that fails is tried again, and in which it must answer a request."
    )
    publish_failures: Literal["stop", "ignore"] = Field(
        "stop", description="After that: save a checkpoint and end the run, or continue without the server."
    )
    publish_verify_steps: int = Field(
        50,
        ge=1,
        description="Compare logprobs of the servers with the trainer's at the first and every so many published versions.",
    )
    publish_tolerance: float | None = Field(
        None,
        gt=0,
        description="Mean difference of these logprobs that is allowed, in nats; 0.002 in fp32 and 0.1 in bf16 if unset.",
    )
    publish_steps: int = Field(1, ge=1, description="Optimizer steps between two published versions.")
    publish_keep: int = Field(2, ge=1, description="Published versions to keep in publish_folder; older ones are deleted.")
    publish_bucket_mib: int = Field(
        256, ge=1, description="Size of the buckets in which parameters are gathered for publishing; two are in memory."
    )
    # Weights & Biases
    wandb_project: str | None = Field(None, description="Log to this Weights & Biases project as well.")
    wandb_group: str | None = Field(None, description="Group of the W&B run.")
    wandb_run_name: str | None = Field(None, description="Name of the W&B run.")

    # before a run
    dry_run: bool = Field(
        False, description="Train nothing: check the settings, and estimate the memory and disk that the run needs."
    )
    ranks: int | None = Field(None, ge=1, description="Number of ranks to estimate for; those of this start if unset.")
    gpu_memory_gib: float | None = Field(
        None, gt=0, description="Memory of each GPU to estimate for, on hosts of 8; this machine's if unset."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_names(cls, values: Any) -> Any:
        unknown = [name for name in values if name not in cls.model_fields] if isinstance(values, dict) else []
        if unknown:
            raise ValueError("; ".join(unknown_setting(name, cls.model_fields) for name in unknown))
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float):
            raise ValueError("expected a number")
        return value

    @field_validator("resume", mode="before")
    @classmethod
    def _read_switch(cls, value: Any) -> Any:
        return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value

    @field_validator(*PATHS)
    @classmethod
    def _expand_path(cls, value: Any) -> Any:
        return expand_path(value) if isinstance(value, str) else value

    @field_validator("sequence_mask", mode="before")
    @classmethod
    def _read_kind(cls, value: Any) -> Any:  # called after the next one
        return {value: None} if isinstance(value, str) else value

    @field_validator("objective_args", "mismatch_mask", "icepop", "sequence_mask", mode="before")
    @classmethod
    def _read_yaml_of_flag(cls, value: Any) -> Any:
        try:
            return parse_yaml(value) if isinstance(value, str) else value
        except yaml.YAMLError as error:
            raise ValueError("expected YAML or JSON") from error

    @field_validator("mismatch_mask", "icepop")
    @classmethod
    def _check_bounds(cls, value: Bounds | None) -> Bounds | None:
        if value is not None and not 0 <= value[0] < value[1] < float("inf"):
            raise ValueError("expected two numbers [low, high] of a ratio, 0 <= low < high")
        return value

    @field_validator("sequence_mask")
    @classmethod
    def _check_kinds(cls, value: dict[str, Bounds | None]) -> dict[str, Bounds]:
        for kind, bounds in value.items():
            if kind not in SEQUENCE_MASKS:
                raise ValueError(f"expected {', '.join(SEQUENCE_MASKS)}, each with its bounds")
            cls._check_bounds(bounds)
        return {kind: bounds or SEQUENCE_MASKS[kind] for kind, bounds in value.items()}

    @model_validator(mode="after")
    def _check_together(self) -> WeightedSFTConfig:
        if self.data is not None and self.fetch_mode == "per_rank":
            raise ValueError("fetch_mode per_rank fetches from a server, but data names a file: drop one of the two")
        if self.source is not None and (self.data is not None or self.fetch_mode == "per_rank"):
            other = "data names a file" if self.data is not None else "fetch_mode per_rank fetches from a server"
            raise ValueError(f"source {self.source} gives the batches, but {other}: drop one of the two")
        if self.data is None and (self.epochs > 1 or self.shuffle):
            raise ValueError("epochs and shuffle are for data, which is not set: name files, or drop them")
        Objective(self.objective, self.objective_args)
        if self.mismatch_cap is not None and self.icepop is not None:
            raise ValueError("mismatch_cap and icepop both multiply by the ratio to the sampler: drop one of the two")
        if self.mismatch_cap_level != "token" and self.mismatch_cap is None:
            raise ValueError("mismatch_cap_level is set, but mismatch_cap is not: set it, or drop the level")
        if self.ref_model_name and not self.kl_coef:
            raise ValueError("ref_model_name is set, but kl_coef is 0: set kl_coef, or drop the reference model")
        if self.training_steps % self.updates_per_batch:
            raise ValueError(
                f"training_steps {self.training_steps} is no multiple of updates_per_batch {self.updates_per_batch}: the last "
                f"batch would be trained in part"
            )
        of_lora = ("lora_alpha", "lora_target")
        if self.lora_rank is None and any(getattr(self, name) != type(self).model_fields[name].default for name in of_lora):
            raise ValueError("lora_alpha and lora_target are for LoRA, but lora_rank is not set: set it, or drop them")
        if self.warmup_steps >= self.training_steps and self.warmup_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below training_steps {self.training_steps}")
        return self

    @classmethod
    def from_args(cls, argv: list[str] | None = None, prog: str = "train.py") -> WeightedSFTConfig:
        """Settings from `--config run.yaml` with flags on top. Errors go to stderr, with exit code 2."""
        return from_args(cls, argv, prog)

    @property
    def needs_behavior(self) -> bool:
        """Whether the loss uses inference_logprobs."""
        return Objective(self.objective, self.objective_args).needs_behavior or bool(self.corrections)

    @property
    def corrections(self) -> Corrections:
        return Corrections(
            token_mask=self.mismatch_mask,
            cap=self.mismatch_cap,
            cap_level=self.mismatch_cap_level,
            icepop=self.icepop,
            sequence_mask=self.sequence_mask,
            off_policy_mask=self.off_policy_mask,
        )

    def public(self) -> dict[str, Any]:
        """The settings with passwords in URLs and keys in the DeepSpeed dict masked, for logs and files."""
        return _masked(self.model_dump(exclude=DRY_RUN_FIELDS))

    def to_yaml(self) -> str:
        """The config without secrets as YAML, which `--config` can read."""
        return yaml.safe_dump(self.public(), sort_keys=False)


def _masked(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _masked(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, str):
        return "***" if _SECRET_NAME.search(name) else without_password(value)
    return value


def without_password(url: str) -> str:
    """The URL with user and password masked."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", url)
