"""The training configuration: every key that a YAML file or the command line may set.

One dataclass is the single list of keys, types, defaults and help texts. Layers: defaults < YAML < command line.
Quantities "in batches" count micro-batches of one rank, as the learning rate schedule does (paper section 2.3 and
appendix on training details give their values in tokens).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from fourm.utils.config import convert_fields, load_yaml, parse_value
from fourm.utils.errors import UserError, did_you_mean

_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_ALIASES = {"tokenizer_path": "text_tokenizer_path"}


def option(default: Any, text: str) -> Any:
    """A field with its help text."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """All keys. ``-1`` means "not set" where the published YAML files use it so."""

    # Run
    run_name: str = option("auto", "'auto' = the config's path below its first folder, without .yaml")
    output_dir: str = option("output/auto", "run folder; 'auto' in it becomes run_name")
    seed: int = option(0, "seed of initialisation, data order, augmentation and masking")
    device: str = option("auto", "'auto' = cuda where there is one, else cpu")
    dry_run: bool = option(False, "build everything, print it, run one step, exit")
    print_config: bool = option(False, "print the resolved configuration and exit")

    # Model
    model: str = option("fm_tiny_6e_6d_swiglu_nobias", "name of a model size and variant")
    model_kwargs: dict = option({}, "FourM arguments that override the named model, e.g. {dim: 192}")
    patch_size: int = option(16, "patch size in pixels where a modality declares none")
    input_size: int = option(224, "input size in pixels where a modality declares none")
    num_register_tokens: int = option(0, "register tokens of the encoder")
    dtype: Literal["bfloat16", "bf16", "float16", "fp16", "float32", "fp32"] = option(
        "bfloat16", "autocast precision; parameters stay float32"
    )
    use_act_checkpoint: bool = option(False, "recompute every block's activations in the backward pass")
    compile: bool = option(False, "torch.compile every block")
    finetune: str = option("", "start from these weights: a run folder, .safetensors, .pth or a hub id")

    # Length
    batch_size: int = option(128, "samples per rank and micro-batch")
    accum_iter: int = option(1, "micro-batches per optimizer step")
    epochs: int = option(-1, "epochs of epoch_size samples; or set total_tokens")
    total_tokens: float = option(-1.0, "billions of input + target tokens; or set epochs")
    epoch_size: int = option(10_000_000, "samples that make an epoch")
    num_input_tokens: int = option(128, "most input tokens of a sample")
    num_target_tokens: int = option(128, "most target tokens of a sample")
    min_input_tokens: int | None = option(None, "fewest input tokens (default: num_input_tokens)")
    min_target_tokens: int | None = option(None, "fewest target tokens (default: num_target_tokens)")
    loss_type: Literal["mod", "token"] = option("mod", "average over modalities, or over tokens")

    # Optimizer and schedule
    opt: Literal["adamw", "sgd"] = option("adamw", "optimizer")
    opt_eps: float = option(1e-8, "AdamW epsilon")
    opt_betas: tuple[float, float] = option((0.9, 0.95), "AdamW betas")
    momentum: float = option(0.9, "SGD momentum")
    compute_grad_norm: bool = option(True, "log the gradient norm")
    clip_grad: float | None = option(None, "clip the global gradient norm to this")
    skip_grad: float | None = option(None, "skip steps whose gradient norm is larger than this")
    skip_nan_grad: bool = option(False, "skip steps whose gradient norm is not finite")
    weight_decay: float = option(0.05, "on everything but norms and biases")
    weight_decay_end: float | None = option(None, "cosine from weight_decay to this (default: constant)")
    blr: float = option(1e-4, "learning rate per 256 samples")
    min_blr: float = option(0.0, "final learning rate per 256 samples")
    frozen_model_blr: float = option(-1.0, "learning rate per 256 samples of the frozen phase (default: blr)")
    scheduler: str = option("cosine", "cosine, or inverse_sqrt-T with T in batches")
    warmup_epochs: int = option(-1, "linear warm-up; at most one of the three")
    warmup_steps: int = option(-1, "warm-up in batches")
    warmup_tokens: float = option(-1.0, "warm-up in billions of tokens")
    cooldown_epochs: int = option(-1, "linear cool-down of inverse_sqrt; at most one of the three")
    cooldown_steps: int = option(-1, "cool-down in batches")
    cooldown_tokens: float = option(-1.0, "cool-down in billions of tokens")
    frozen_model_epochs: int = option(0, "first train only the embeddings for so many epochs")
    frozen_model_tokens: float = option(0.0, "the same in billions of tokens")
    frozen_embedding_domain: str | None = option(None, "freeze the embeddings of these domains too, joined by '-'")

    # Data
    data_config: str = option("", "path of the data YAML")
    text_tokenizer_path: str = option(
        "fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json", "text vocabulary (also: tokenizer_path)"
    )
    num_workers: int = option(10, "loader processes per rank")
    pin_mem: bool = option(True, "page-locked batches for faster copies to a GPU")
    max_bad_fraction: float = option(0.01, "stop when more than this share of the samples is unusable")

    # Evaluation
    eval: bool = option(False, "evaluate only")
    eval_freq: int = option(1, "evaluate every so many epochs; 0 = never")
    dist_eval: bool = option(True, "split the validation sets over the ranks")
    fixed_eval: bool = option(True, "evaluate with fixed budgets too")
    fixed_eval_input_tokens: int = option(128, "input budget of the fixed evaluation")
    fixed_eval_target_tokens: int = option(128, "target budget of the fixed evaluation")
    fixed_eval_batch_size: int = option(32, "batch size of the fixed evaluation")

    # Checkpoints
    save_ckpt_freq: int = option(1, "save every so many epochs; 0 = only at the end")
    save_every_minutes: float = option(0.0, "save also after so many minutes; 0 = never")
    keep_last: int = option(2, "checkpoints that are kept; 0 = all")
    resume: str = option("", "continue from this checkpoint folder")
    auto_resume: bool = option(True, "continue from the newest complete checkpoint in output_dir")
    start_epoch: int = option(0, "first epoch, when weights come without a checkpoint's position")

    # Remote storage
    s3_endpoint: str = option("", "endpoint of the object store")
    s3_data_endpoint: str = option("", "endpoint for data, where it differs")
    s3_multipart_chunksize_mb: int = option(512, "size of a part of a transfer")
    s3_multipart_threshold_mb: int = option(512, "transfers above this are split")
    s3_max_io_queue: int = option(100, "requests in flight")
    s3_save_dir: str = option("", "copy checkpoints here")

    # Processes and logging
    find_unused_params: bool = option(False, "DDP's search for unused parameters; none are unused")
    dist_url: str = option("env://", "rendezvous of the process group")
    rlimit: int = option(4096, "open files a process may have")
    log_interval: int = option(10, "optimizer steps between two log lines")
    print_all: bool = option(False, "let every rank print")
    show_user_warnings: bool = option(False, "show Python warnings of the UserWarning kind")
    log_wandb: bool = option(False, "log to Weights & Biases")
    wandb_project: str | None = option(None, "project name")
    wandb_entity: str | None = option(None, "user or team")
    wandb_run_name: str = option("auto", "'auto' = run_name")

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
    for key in ("batch_size", "accum_iter", "epoch_size", "num_input_tokens", "num_target_tokens", "log_interval"):
        if getattr(config, key) < 1:
            raise UserError(f"'{key}' must be at least 1, not {getattr(config, key)}")
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
    if config.s3_save_dir:
        raise UserError(
            "'s3_save_dir': saving to an object store is not supported yet; use a mounted path in output_dir"
        )


def _lengths(phase: str) -> list[str]:
    return [f"{phase}_{unit}" for unit in ("epochs", "steps", "tokens")]


def inverse_sqrt_timescale(scheduler: str) -> float | None:
    """T of ``inverse_sqrt-T``; None for ``cosine``."""
    if scheduler == "cosine":
        return None
    name, _, timescale = scheduler.partition("-")
    value = parse_value(timescale) if timescale else 10_000
    if name != "inverse_sqrt" or not isinstance(value, (int, float)) or value <= 0:
        raise UserError(f"'scheduler' must be cosine or inverse_sqrt-T (T in batches), not {scheduler!r}")
    return float(value)


def load_config(path: str | Path | None, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Defaults < the YAML file at ``path`` < ``overrides``, with the ``auto`` names resolved."""
    content = load_yaml(path) if path else {}
    where = str(path)
    for alias, key in _ALIASES.items():
        if alias in content:
            if key in content:
                raise UserError(f"{where}: '{alias}' and '{key}' mean the same; keep one")
            content[key] = content.pop(alias)
    values = convert_fields(TrainConfig, content, where) | convert_fields(TrainConfig, overrides or {}, "command line")
    config = TrainConfig(**values)
    name = config.run_name
    if name == "auto":
        name = Path(*Path(path).with_suffix("").parts[1:]).as_posix() if path else "default"
    return dataclasses.replace(
        config,
        run_name=name,
        output_dir=config.output_dir.replace("auto", name),
        wandb_run_name=name if config.wandb_run_name == "auto" else config.wandb_run_name,
    )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values for YAML and JSON."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}")


def parse_args(argv: list[str] | None = None, description: str = "Train a 4M model.") -> TrainConfig:
    """Read ``--config FILE`` and ``--key value`` overrides; switches come in pairs ``--key`` / ``--no_key``.

    Raises:
        UserError: an unknown key (names the nearest), a bad value or combination.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-c", "--config", help="YAML file; keys on the command line override it")
    flags = ["--config"]
    for name, item in FIELDS.items():
        text = item.metadata["help"].replace("%", "%%")
        aliases = [f"--{name}", *(f"--{alias}" for alias, key in _ALIASES.items() if key == name)]
        flags += aliases
        if item.type == "bool":
            parser.add_argument(f"--{name}", action="store_true", help=text)
            parser.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
            flags.append(f"--no_{name}")
        else:
            count = "+" if "tuple" in str(item.type) else None
            parser.add_argument(*aliases, dest=name, type=parse_value, help=text, nargs=count)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"command line: unknown key '{flag}'{did_you_mean(flag, flags)}")
    overrides = vars(arguments)
    config = load_config(overrides.pop("config", None), overrides)
    if config.print_config:
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config


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
    frozen = epochs_of(config.frozen_model_tokens) if config.frozen_model_tokens > 0 else config.frozen_model_epochs
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
