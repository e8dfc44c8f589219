"""The training configuration: every key that a YAML file or the command line may set.

One dataclass is the single list of keys, types, defaults and help texts. Layers: defaults < YAML < command line.
Quantities "in batches" count micro-batches of one rank, as the learning rate schedule does (paper section 2.3 and
appendix on training details give their values in tokens).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fourm.data.options import check_endpoint
from fourm.utils.config import convert, convert_fields, load_yaml, settle
from fourm.utils.errors import UserError
from fourm.utils.options import option, parse_overrides
from fourm.utils.paths import AnyPath, InputPath, OutputPath, expand_path
from fourm.utils.urls import without_secrets

_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_ALIASES = {"tokenizer_path": "text_tokenizer_path"}


@dataclass(frozen=True)
class TrainConfig:
    """All keys. ``-1`` means "not set" where the published YAML files use it so."""

    # Run
    run_name: str = option("'auto' = the config's path below its first folder, without .yaml", "auto")
    output_dir: OutputPath = option("run folder; 'auto' in it becomes run_name", "output/auto")
    seed: int = option("seed of initialisation, data order, augmentation and masking", 0, at_least=0, at_most=2**62)
    device: str = option("'auto' = cuda where there is one, else cpu", "auto")
    dry_run: bool = option("build everything, print it, run one step, exit", False)
    plan: bool = option(
        "print memory, steps and days of the run on plan_world_size GPUs; needs no data or GPU; exit", False
    )
    plan_world_size: int = option("processes (GPUs) that --plan assumes", 8, at_least=1, at_most=10**6)
    plan_gpu: str = option("GPU that --plan assumes", "H100")
    plan_mfu: float = option("share of the GPU's peak that --plan assumes", 0.4, above=0, at_most=1)
    print_config: bool = option("print the resolved configuration and exit", False)

    # Model
    model: str = option("name of a model size and variant", "fm_tiny_6e_6d_swiglu_nobias")
    model_kwargs: dict = option("FourM arguments that override the named model, e.g. {dim: 192}", {})
    patch_size: int = option("patch size in pixels where a modality declares none", 16, at_least=1, at_most=10_000)
    input_size: int = option("input size in pixels where a modality declares none", 224, at_least=1, at_most=100_000)
    num_register_tokens: int = option("register tokens of the encoder", 0, at_least=0, at_most=100_000)
    dtype: Literal["bfloat16", "bf16", "float16", "fp16", "float32", "fp32"] = option(
        "autocast precision; parameters stay float32", "bfloat16"
    )
    use_act_checkpoint: bool = option("recompute the blocks' activations in the backward pass", False)
    act_checkpoint_every: int = option("with use_act_checkpoint: those of every so many-th block", 1, at_least=1)
    compile: bool = option("torch.compile every block", False)
    finetune: InputPath = option(
        "start from these weights: a run folder, .safetensors, .pth, s3:// URL of one of these, or a hub id", ""
    )

    # Length
    batch_size: int = option("samples per rank and micro-batch", 128, at_least=1, at_most=10**6)
    accum_iter: int = option("micro-batches per optimizer step", 1, at_least=1, at_most=10**6)
    epochs: int = option("epochs of epoch_size samples; or set total_tokens", -1, at_least=0, unset=-1, at_most=10**9)
    total_tokens: float = option(
        "billions of input + target tokens; or set epochs", -1.0, at_least=0, unset=-1, at_most=1e9
    )
    epoch_size: int = option("samples that make an epoch", 10_000_000, at_least=1, at_most=10**15)
    num_input_tokens: int = option("most input tokens of a sample", 128, at_least=1, at_most=10**6)
    num_target_tokens: int = option("most target tokens of a sample", 128, at_least=1, at_most=10**6)
    min_input_tokens: int | None = option("fewest input tokens (default: num_input_tokens)", None, at_least=0)
    min_target_tokens: int | None = option("fewest target tokens (default: num_target_tokens)", None, at_least=0)
    loss_type: Literal["mod", "token"] = option("average over modalities, or over tokens", "mod")

    # Optimizer and schedule
    opt: Literal["adamw", "sgd"] = option("optimizer", "adamw")
    opt_eps: float = option("AdamW epsilon", 1e-8, at_least=1e-30, at_most=1.0)
    opt_betas: tuple[float, float] = option("AdamW betas", (0.9, 0.95), at_least=0, below=1)
    momentum: float = option("SGD momentum", 0.9, at_least=0, below=1)
    model_ema: bool = option("keep, evaluate and save a moving average of the weights too", False)
    model_ema_decay: float = option(
        "of model_ema: the share of the average that each step keeps", 0.9999, at_least=0, below=1
    )
    compute_grad_norm: bool = option("log the gradient norm", True)
    clip_grad: float | None = option("clip the global gradient norm to this", None, above=0)
    skip_grad: float | None = option("skip steps whose gradient norm is larger than this", None, above=0)
    skip_nan_grad: bool = option("published; steps whose loss or gradient norm is not finite are always skipped", False)
    max_skipped_steps: int = option(
        "stop after so many steps in a row whose loss or gradient norm was not finite", 10, at_least=1
    )
    weight_decay: float = option("on everything but norms and biases", 0.05, at_least=0)
    weight_decay_end: float | None = option("cosine from weight_decay to this (default: constant)", None, at_least=0)
    blr: float = option("learning rate per 256 samples", 1e-4, at_least=0)
    min_blr: float = option("final learning rate per 256 samples", 0.0, at_least=0)
    frozen_model_blr: float = option(
        "learning rate per 256 samples of the frozen phase (default: blr)", -1.0, at_least=0, unset=-1
    )
    scheduler: str = option("cosine, or inverse_sqrt-T with T in batches", "cosine")
    warmup_epochs: int = option("linear warm-up; at most one of the three", -1, at_least=0, unset=-1, at_most=10**9)
    warmup_steps: int = option("warm-up in batches", -1, at_least=0, unset=-1, at_most=10**15)
    warmup_tokens: float = option("warm-up in billions of tokens", -1.0, at_least=0, unset=-1, at_most=1e9)
    cooldown_epochs: int = option(
        "linear cool-down of inverse_sqrt; at most one of the three", -1, at_least=0, unset=-1, at_most=10**9
    )
    cooldown_steps: int = option("cool-down in batches", -1, at_least=0, unset=-1, at_most=10**15)
    cooldown_tokens: float = option("cool-down in billions of tokens", -1.0, at_least=0, unset=-1, at_most=1e9)
    frozen_model_epochs: int = option(
        "first train only the embeddings for so many epochs", 0, at_least=0, unset=-1, at_most=10**9
    )
    frozen_model_tokens: float = option("the same in billions of tokens", 0.0, at_least=0, unset=-1, at_most=1e9)
    frozen_embedding_domain: str | None = option("freeze the embeddings of these domains too, joined by '-'", None)

    # Data
    data_config: InputPath = option("path of the data YAML", "")
    plugin: str = option(
        "Python module of your own modalities, imported before anything else: my_package.my_modalities", ""
    )
    text_tokenizer_path: InputPath = option(
        "text vocabulary (also: tokenizer_path)", "fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json"
    )
    num_workers: int = option("loader processes per rank", 10, at_least=0, at_most=512)
    num_streams: int | None = option(
        "the data are the same whatever the processes and num_workers, as long as their product divides this (default: it)",
        None,
        at_least=1,
        at_most=10**7,
    )
    pin_mem: bool = option("page-locked batches for faster copies to a GPU", True)
    data_timeout: float = option("stop after waiting so many minutes for a batch", 30.0, above=0)
    max_bad_fraction: float = option(
        "stop when more than this share of the samples is unusable", 0.01, at_least=0, at_most=1
    )

    # Evaluation
    eval: bool = option("evaluate only", False)
    eval_freq: int = option("evaluate every so many epochs; 0 = never", 1, at_least=0)
    dist_eval: bool = option("split the validation sets over the ranks", True)
    fixed_eval: bool = option("evaluate with fixed budgets too", True)
    fixed_eval_input_tokens: int = option("input budget of the fixed evaluation", 128, at_least=1, at_most=10**6)
    fixed_eval_target_tokens: int = option("target budget of the fixed evaluation", 128, at_least=1, at_most=10**6)
    fixed_eval_batch_size: int = option("batch size of the fixed evaluation", 32, at_least=1, at_most=10**6)

    # Checkpoints
    save_ckpt_freq: int = option("save every so many epochs; 0 = only at the end", 1, at_least=0)
    save_every_minutes: float = option("save also after so many minutes; 0 = never", 0.0, at_least=0)
    keep_last: int = option("checkpoints that are kept; 0 = all", 2, at_least=0)
    async_save: bool = option("write checkpoints while the training goes on, from a copy in the host's memory", True)
    resume: InputPath = option("continue from this checkpoint, or the newest of this run: a folder or an s3:// URL", "")
    auto_resume: bool = option("continue from the newest complete checkpoint in output_dir or s3_save_dir", True)
    allow_changes: bool = option(
        "go on from a checkpoint although the data, seed or schedule have changed since", False
    )
    start_epoch: int = option(
        "first epoch, when weights come without a checkpoint's position", 0, at_least=0, at_most=10**9
    )

    # Remote storage
    s3_endpoint: str = option("URL of the object store (default: as boto3 is configured, else AWS)", "")
    s3_data_endpoint: str = option("the same for data, where it differs", "")
    s3_multipart_chunksize_mb: int = option("size of a part of a transfer", 512, at_least=1, at_most=5120)
    s3_multipart_threshold_mb: int = option("transfers above this are split", 512, at_least=0, at_most=10**7)
    s3_max_io_queue: int = option("requests that a process may have in flight", 100, at_least=1, at_most=10_000)
    s3_save_dir: str = option(
        "copy checkpoints, log and final model to s3://bucket/folder, below run_name; keep_last holds there too", ""
    )
    data_cache_dir: AnyPath = option("local copies of remote shards, shared by all processes", "~/.cache/fourm/shards")
    data_cache_gb: float = option("most that these copies may take, in 10^9 bytes", 50.0, above=0, at_most=1e9)

    # Processes and logging
    fsdp_param_dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "FSDP: precision of gathered parameters and of their gradients; auto = dtype", "auto"
    )
    fsdp_reduce_dtype: Literal["bfloat16", "float32"] = option(
        "FSDP: precision in which gradients are averaged", "float32"
    )
    fsdp_reshard_after_forward: bool = option(
        "FSDP: free a block's gathered parameters after its forward pass too (ZeRO-3); else they stay until its backward "
        "pass, and from one of accum_iter micro-batches to the next (ZeRO-2)",
        True,
    )
    fsdp_shard_size: int = option(
        "FSDP: neighbouring processes that hold the model together, e.g. the GPUs of a node; others replicate it; 0 = all",
        0,
        at_least=0,
    )
    find_unused_params: bool = option("DDP's search for unused parameters; none are unused", False)
    dist_url: str = option("rendezvous of the process group", "env://")
    rlimit: int = option("open files a process may have", 4096, at_least=0, at_most=2**31)
    log_interval: int = option("optimizer steps between two log lines", 10, at_least=1)
    peak_tflops: float | None = option(
        "10^12 operations per second a device could do, of which MFU is the share (default: by the name of the GPU)",
        None,
        above=0,
    )
    profile: bool = option("write a Chrome trace of three steps to profile/trace.json in the run folder", False)
    print_all: bool = option("let every rank print", False)
    show_user_warnings: bool = option("show Python warnings of the UserWarning kind", False)
    log_wandb: bool = option("log to Weights & Biases", False)
    wandb_project: str | None = option("project name", None)
    wandb_entity: str | None = option("user or team", None)
    wandb_run_name: str = option("'auto' = run_name", "auto")

    def __post_init__(self) -> None:
        _check(self)

    @property
    def tokens_per_sample(self) -> int:
        return self.num_input_tokens + self.num_target_tokens

    @property
    def autocast_dtype(self) -> str:
        """``dtype`` without its abbreviations, a name in torch."""
        return _SHORT_DTYPES.get(self.dtype, self.dtype)


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}


def _check(config: TrainConfig) -> None:
    """Raise a :class:`UserError` for values and combinations that cannot work."""
    settle(config)
    if config.autocast_dtype == "float32" and config.fsdp_param_dtype not in ("auto", "float32"):
        raise UserError(
            f"'fsdp_param_dtype' {config.fsdp_param_dtype} needs 'dtype' bfloat16 or float16: without autocast nothing "
            "converts what meets these parameters"
        )
    if (config.epochs >= 0) == (config.total_tokens >= 0) and not config.eval:
        both = config.epochs >= 0
        raise UserError(
            f"set either 'epochs' or 'total_tokens'{', not both: leave one at -1' if both else ' (neither is set)'}"
        )
    for phase in ("warmup", "cooldown"):
        given = [key for key in _lengths(phase) if getattr(config, key) >= 0]
        if len(given) > 1:
            raise UserError(f"set only one of {' and '.join(given)}; leave the others at -1")
    if config.frozen_model_epochs > 0 and config.frozen_model_tokens > 0:
        raise UserError("set only one of frozen_model_epochs and frozen_model_tokens")
    for kind in ("input", "target"):
        low, high = getattr(config, f"min_{kind}_tokens"), getattr(config, f"num_{kind}_tokens")
        if low is not None and not 0 <= low <= high:
            raise UserError(f"'min_{kind}_tokens' must lie between 0 and num_{kind}_tokens ({high}), not {low}")
    inverse_sqrt_timescale(config.scheduler)
    if len(config.opt_betas) != 2:
        raise UserError(f"'opt_betas' must be two numbers, not {list(config.opt_betas)}")
    if any(place.startswith("s3://") for place in (config.finetune, config.resume, config.s3_save_dir)):
        check_endpoint(config, "s3_endpoint")
    if config.s3_save_dir and not config.s3_save_dir.startswith("s3://"):
        raise UserError(f"'s3_save_dir' must be s3://BUCKET or s3://BUCKET/FOLDER, not {config.s3_save_dir!r}")


def _lengths(phase: str) -> list[str]:
    return [f"{phase}_{unit}" for unit in ("epochs", "steps", "tokens")]


def inverse_sqrt_timescale(scheduler: str) -> float | None:
    """T of ``inverse_sqrt-T``; None for ``cosine``."""
    if scheduler == "cosine":
        return None
    name, _, timescale = scheduler.partition("-")
    where = "'scheduler' must be cosine or inverse_sqrt-T (T in batches, above 0)"
    if name != "inverse_sqrt":
        raise UserError(f"{where}, not {scheduler!r}")
    try:
        value = convert(timescale or 10_000, float, "T")
    except UserError as error:
        raise UserError(f"{where}, not {scheduler!r}") from error
    if value <= 0:
        raise UserError(f"{where}, not {scheduler!r}")
    return value


def load_config(path: str | Path | None, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Defaults < the YAML file at ``path`` < ``overrides``, with the ``auto`` names resolved."""
    path = expand_path(str(path), "command line: 'config'") if path else None
    content = load_yaml(path) if path else {}
    where = str(path)
    for alias, key in _ALIASES.items():
        if alias in content:
            if key in content:
                raise UserError(f"{where}: '{alias}' and '{key}' mean the same; keep one")
            content[key] = content.pop(alias)
    values = convert_fields(TrainConfig, content, where, path) | convert_fields(
        TrainConfig, overrides or {}, "command line"
    )
    config = TrainConfig(**values)
    name = config.run_name
    if name == "auto":
        place = Path(path or "default").with_suffix("")
        nested = len(place.parts) > 1 and not place.is_absolute()
        name = Path(*place.parts[1:]).as_posix() if nested else place.name
    folders = [name if part == "auto" else part for part in Path(config.output_dir).parts]
    return dataclasses.replace(
        config,
        run_name=name,
        output_dir=Path(*folders).as_posix(),
        wandb_run_name=name if config.wandb_run_name == "auto" else config.wandb_run_name,
    )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values for YAML and JSON, which others will read: URLs are without passwords and signatures."""
    return without_secrets(dataclasses.asdict(config))


def parse_args(argv: list[str] | None = None, description: str = "Train a 4M model.") -> TrainConfig:
    """Read ``--config FILE`` and ``--key value`` overrides; switches come in pairs ``--key`` / ``--no_key``.

    Raises:
        UserError: an unknown key (names the nearest), a bad value or combination.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    overrides = parse_overrides(TrainConfig, argv, description, _ALIASES, config_file=True)
    config = load_config(overrides.pop("config", None), overrides)
    if config.print_config:
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def num_streams(config: TrainConfig, world_size: int) -> int:
    """Streams of the training data (:mod:`fourm.data.unified_datasets`), shared out to the workers of all ranks."""
    workers = world_size * max(1, config.num_workers)
    streams = config.num_streams or workers
    if streams % workers:
        raise UserError(
            f"'num_streams' {streams} must be a multiple of processes x num_workers, {world_size} x "
            f"{max(1, config.num_workers)}; choose another num_workers"
        )
    return streams


@dataclass(frozen=True)
class RunLength:
    """How long a run and its phases are, in micro-batches of one rank unless said otherwise."""

    epochs: int
    batches_per_epoch: int
    total_batches: int
    frozen_batches: int
    warmup_batches: int
    cooldown_batches: int


def run_length(config: TrainConfig, world_size: int) -> RunLength:
    """Tokens and epochs → micro-batches (training arithmetic of the published runs).

    An epoch ends with a whole optimizer step: its micro-batches are rounded down to a multiple of ``accum_iter``.
    """
    samples = config.batch_size * world_size
    per_epoch = config.epoch_size // (samples * config.accum_iter) * config.accum_iter
    if per_epoch == 0 and config.eval:
        per_epoch = 1  # nothing is trained
    if per_epoch == 0:
        raise UserError(
            f"'epoch_size' {config.epoch_size} is smaller than one optimizer step of batch_size {config.batch_size} x "
            f"accum_iter {config.accum_iter} x {world_size} processes; lower batch_size or raise epoch_size"
        )

    def epochs_of(billions: float) -> int:
        return math.ceil(billions * 1e9 / (config.tokens_per_sample * config.epoch_size))

    def batches_of(phase: str) -> int:
        in_epochs, in_steps, in_tokens = (getattr(config, key) for key in _lengths(phase))
        if in_tokens >= 0:
            return math.ceil(in_tokens * 1e9 / (config.tokens_per_sample * samples))
        return max(in_steps, in_epochs * per_epoch, 0)

    epochs = epochs_of(config.total_tokens) if config.total_tokens >= 0 else max(config.epochs, 0)
    frozen = (
        epochs_of(config.frozen_model_tokens) if config.frozen_model_tokens > 0 else max(config.frozen_model_epochs, 0)
    )
    if epochs * config.epoch_size >= 2**62:
        raise UserError(
            f"the run is too long: {epochs} epochs of 'epoch_size' {config.epoch_size} samples; lower one of them"
        )
    length = RunLength(
        epochs, per_epoch, epochs * per_epoch, frozen * per_epoch, batches_of("warmup"), batches_of("cooldown")
    )
    fixed = length.frozen_batches + length.warmup_batches + length.cooldown_batches
    if fixed > length.total_batches and not config.eval:
        raise UserError(
            f"the frozen, warm-up and cool-down phases need {fixed} batches, but the run has only "
            f"{length.total_batches}; shorten them or raise epochs or total_tokens"
        )
    return length
