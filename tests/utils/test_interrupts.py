import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "run_cli" in path.read_text())


@pytest.fixture(autouse=True)
def heeded_interrupts():
    """Processes inherit it if interrupts are ignored, as they are in what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("command", [["run_training_4m.py"], ["-m", "fourm.tools.pack"], ["-m", "fourm", "pack"]])
def test_ctrl_c_during_imports_causes_no_traceback(command):
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_handle_ctrl_c_before_they_import_anything_else(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if "import" in line]
    assert [line for line in lines if not line.startswith(" ")] == [
        "from fourm.utils.errors import run_cli",
        "from fourm.utils.interrupts import exit_on_interrupt",
    ]


def test_importing_the_package_does_not_change_the_ctrl_c_handler():
    code = "import signal, fourm; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
