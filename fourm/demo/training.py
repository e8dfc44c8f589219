"""Run a training command in a separate process; the 4M training is stopped once on purpose, and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fourm.utils.errors import UserError

_POLL = 0.5  # seconds


def last_step(run: Path) -> int:
    """Return the latest optimizer step in the run's log, or 0 before the first step."""
    log = run / "log.jsonl"
    if not log.exists():
        return 0
    lines = log.read_text().splitlines()
    steps = (json.loads(line).get("step", 0) for line in reversed(lines[-50:]) if line.endswith("}"))
    return max(steps, default=0)


def train(command: Sequence[str], run: Path, stop_at: int | None = None) -> int | None:
    """Run ``command`` until it finishes or is stopped.

    Args:
        command: The training command.
        run: Its run folder.
        stop_at: Step at which it is stopped with SIGTERM, so that it writes a checkpoint and exits; None to let it
            finish.

    Returns:
        The step at which it was stopped, or None if it finished.

    Raises:
        UserError: If the command fails.
    """
    # With a new session, Ctrl-C reaches only this process, which then asks the training once to save and exit.
    process = subprocess.Popen(command, start_new_session=True)
    stopped = None
    try:
        while process.poll() is None:
            if stop_at is not None and stopped is None and last_step(run) >= stop_at:
                stopped = last_step(run)
                print(f"\nstopping the training on purpose at step {stopped}; it will be resumed", flush=True)
                process.send_signal(signal.SIGTERM)
            time.sleep(_POLL)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()
    if stopped is None and process.returncode:
        raise UserError(
            f"training failed with exit status {process.returncode}; see the messages above and the logs in {run}. "
            f"To run only this stage again: {' '.join(command)}"
        )
    return stopped


def command(name: str, config: Path, **overrides: object) -> list[str]:
    """Return a subcommand of ``fourm`` that trains, with ``--key value`` overrides; ``--key`` alone for True."""
    options = [
        part
        for key, value in overrides.items()
        for part in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]
    return [sys.executable, "-m", "fourm", name, "--config", str(config), "--auto_resume", *options]
