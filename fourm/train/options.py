"""Options that every run has, and the commands of its command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fourm.utils.options import Options, option
from fourm.utils.paths import OutputPath
from fourm.utils.urls import redact


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Run"""

    run_name: str = option("name of the run; 'auto' = path of the config below its first folder, without .yaml", "auto")
    output_dir: OutputPath = option("run folder; 'auto' in it becomes run_name", "output/auto")
    seed: int = option(
        "seed of initialisation, data order, augmentation and masking", 0, at_least=0, at_most=2**62, fixed=True
    )


@dataclass(frozen=True, kw_only=True)
class Commands(Options):
    """Commands: instead of training"""

    # These belong to one call, and are not saved with the configuration of a run.

    dry_run: bool = option("build everything, log it, run one step and exit", False)
    plan: bool = option(
        "print memory, steps and days of the run on plan_world_size GPUs, without data or GPU, and exit", False
    )
    plan_world_size: int = option("processes (GPUs) that --plan assumes", 8, at_least=1, at_most=10**6)
    plan_gpu: str = option("GPU that --plan assumes", "H100")
    plan_mfu: float = option("share of the peak performance of the GPU that --plan assumes", 0.4, above=0, at_most=1)
    print_config: bool = option("print the resolved configuration and exit", False)
    eval: bool = option("evaluate without training", False)
    profile: bool = option("write a Chrome trace of three steps to profile/trace.json in the run folder", False)


def saved_options(options: Options) -> dict[str, Any]:
    """Return the options to save as YAML or JSON: without commands, and without passwords and signatures in URLs."""
    commands = {item.name for item in dataclasses.fields(Commands)}
    values: dict[str, Any] = dataclasses.asdict(options)  # type: ignore[call-overload]
    return redact({key: value for key, value in values.items() if key not in commands})
