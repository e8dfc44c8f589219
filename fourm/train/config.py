"""The configuration of a run: the groups of options that every task has, and how they are read.

The command line overrides YAML, which overrides the defaults. The keys are flat: a configuration inherits from the
groups, each of which is defined next to the code that it configures.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fourm.data.options import LoaderOptions
from fourm.train.checkpoint import CheckpointOptions
from fourm.train.ema import EMAOptions
from fourm.train.evaluate import EvaluationOptions
from fourm.train.fsdp import FSDPOptions
from fourm.train.journal import LogOptions
from fourm.train.optimizer import OptimizerOptions
from fourm.train.options import saved_options
from fourm.train.run_copy import RunCopyOptions
from fourm.train.schedules import ScheduleOptions
from fourm.utils.config import convert_fields, load_yaml
from fourm.utils.errors import UserError
from fourm.utils.options import aliases, parse_overrides
from fourm.utils.paths import expand_path, shipped
from fourm.utils.plugin import PluginOptions
from fourm.utils.s3 import check_endpoint


@dataclass(frozen=True, kw_only=True)
class RunConfig(
    PluginOptions,
    LogOptions,
    ScheduleOptions,
    OptimizerOptions,
    EMAOptions,
    LoaderOptions,
    EvaluationOptions,
    CheckpointOptions,
    RunCopyOptions,
    FSDPOptions,
):
    """The options that every task needs. The configuration of a task adds its own groups."""

    def check(self) -> None:
        if any(place.startswith("s3://") for place in (self.finetune, self.resume, self.s3_save_dir)):
            check_endpoint(self, "s3_endpoint")


Config = TypeVar("Config", bound=RunConfig)


def load_config(cls: type[Config], path: str | Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """Read a configuration and resolve its ``auto`` names.

    Args:
        cls: The configuration class of the task.
        path: The YAML file, which overrides the defaults.
        overrides: Values that override the file.

    Raises:
        UserError: An unknown key (names the nearest one), or a bad value or combination of values.
    """
    path = expand_path(str(path), "command line: 'config'") if path else None
    file = shipped(path) if path else None
    content = load_yaml(file) if file else {}
    where = str(path)
    for alias, key in aliases(cls).items():
        if alias in content:
            if key in content:
                raise UserError(f"{where}: '{alias}' and '{key}' mean the same; keep only one of them")
            content[key] = content.pop(alias)
    values = convert_fields(cls, content, where, file) | convert_fields(cls, overrides or {}, "command line")
    config = cls(**values)
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


def parse_args(cls: type[Config], argv: list[str] | None = None, description: str = "") -> Config:
    """Read ``--config FILE`` and ``--key value`` overrides; switches come in pairs ``--key`` / ``--no_key``.

    Raises:
        UserError: As in :func:`load_config`.
        SystemExit: After ``--help`` or ``--print_config``.
    """
    overrides = parse_overrides(cls, argv, description, config_file=True)
    config = load_config(cls, overrides.pop("config", None), overrides)
    if config.print_config:
        print(yaml.safe_dump(saved_options(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config
