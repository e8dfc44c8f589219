"""Options of every run, whatever it trains, and what the command line asks of a run."""

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

    run_name: str = option("'auto' = the config's path below its first folder, without .yaml", "auto")
    output_dir: OutputPath = option("run folder; 'auto' in it becomes run_name", "output/auto")
    seed: int = option(
        "seed of initialisation, data order, augmentation and masking", 0, at_least=0, at_most=2**62, fixed=True
    )


@dataclass(frozen=True, kw_only=True)
class Commands(Options):
    """Commands: instead of training"""

    # They belong to one call, and are not part of the configuration that is saved with a run.

    dry_run: bool = option("build everything, print it, run one step, exit", False)
    plan: bool = option(
        "print memory, steps and days of the run on plan_world_size GPUs; needs no data or GPU; exit", False
    )
    plan_world_size: int = option("processes (GPUs) that --plan assumes", 8, at_least=1, at_most=10**6)
    plan_gpu: str = option("GPU that --plan assumes", "H100")
    plan_mfu: float = option("share of the GPU's peak that --plan assumes", 0.4, above=0, at_most=1)
    print_config: bool = option("print the resolved configuration and exit", False)
    eval: bool = option("evaluate only", False)
    profile: bool = option("write a Chrome trace of three steps to profile/trace.json in the run folder", False)


def saved_options(options: Options) -> dict[str, Any]:
    """Options for YAML and JSON, which others will read: without commands, and URLs without passwords and signatures."""
    commands = {item.name for item in dataclasses.fields(Commands)}
    return redact({k: v for k, v in dataclasses.asdict(options).items() if k not in commands})  # type: ignore[call-overload]
