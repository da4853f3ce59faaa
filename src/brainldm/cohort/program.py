"""Somebody else's program at work on one image, for as long as an image can take and no longer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence

from brainldm.base.errors import BadInput

# The slowest of them takes some minutes an image on one processor; after an hour it hangs.
TIMEOUT_SECONDS = 3600.0


def run_program(name: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """What the command said, and with which code it ended; BadInput, with the name, where it is still at work after
    TIMEOUT_SECONDS. Then, and on Ctrl-C, it ends with all that it started: such programs are scripts around others.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, errors="replace", process_group=0) as running:
        try:
            out, err = running.communicate(timeout=TIMEOUT_SECONDS)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise BadInput(
                f"{name} was still at work on it after {TIMEOUT_SECONDS / 60:g} minutes, and was ended.",
                remedy=f"Run {name} on this image by itself to see what holds it up.",
                reason="timeout",
            ) from error
    return subprocess.CompletedProcess(command, running.returncode, out, err)
