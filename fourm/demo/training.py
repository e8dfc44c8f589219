"""Stage 4: the ordinary training command as a process of its own, stopped once on purpose and resumed."""

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
    """The newest optimizer step that the run's log mentions; 0 before the first."""
    log = run / "log.jsonl"
    if not log.exists():
        return 0
    lines = log.read_text().splitlines()
    steps = (json.loads(line).get("step", 0) for line in reversed(lines[-50:]) if line.endswith("}"))
    return max(steps, default=0)


def train(command: Sequence[str], cwd: Path, run: Path, stop_at: int | None) -> int | None:
    """Run ``command`` to its end.

    Args:
        run: its run folder.
        stop_at: at this step it is told to stop (SIGTERM), which it answers with a checkpoint; then it is not run again.

    Returns:
        The step at which it was stopped; None if it finished.

    Raises:
        UserError: it failed.
    """
    # In a session of its own Ctrl-C reaches only this process, which then asks the training to save and end, once.
    process = subprocess.Popen(command, cwd=cwd, start_new_session=True)
    stopped = None
    try:
        while process.poll() is None:
            if stop_at is not None and stopped is None and last_step(run) >= stop_at:
                stopped = last_step(run)
                print(f"\nstopping on purpose at step {stopped}; it will resume", flush=True)
                process.send_signal(signal.SIGTERM)
            time.sleep(_POLL)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()
    if stopped is None and process.returncode:
        raise UserError(
            f"training failed with exit status {process.returncode}: see above and {run}; "
            f"to repeat it alone: {' '.join(command)}"
        )
    return stopped


def command(config: Path, **overrides: object) -> list[str]:
    """The training command with ``--key value`` overrides."""
    options = [str(part) for key, value in overrides.items() for part in (f"--{key}", value)]
    return [sys.executable, "run_training_4m.py", "--config", str(config), "--auto_resume", *options]
