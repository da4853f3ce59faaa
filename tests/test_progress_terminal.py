"""Progress on a terminal that can do nothing: no colours, no cursor, forty columns, no letters but ASCII."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

from test_cli import COMMAND

POOR = {"TERM": "dumb", "NO_COLOR": "1", "LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "40"}


def test_a_poor_terminal_shows_progress_without_a_fault_or_a_control_code(tiny_run: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*COMMAND, "generate", str(tiny_run), str(tmp_path / "made"), "--n", "1", "--steps", "8"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=os.environ | POOR)
    os.close(theirs)
    shown = b""
    try:
        while read := os.read(ours, 4096):
            shown += read
    except OSError:  # how a terminal tells that nobody writes to it any more
        pass
    finally:
        os.close(ours)
    assert process.wait(timeout=60) == 0, shown
    assert b"0:00:0" in shown, "no bar was shown"
    assert b"Traceback" not in shown and b"\x1b" not in shown and shown.isascii()
