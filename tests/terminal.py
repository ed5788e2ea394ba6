"""What a person sees: a command in a pseudo-terminal, and the screen that it leaves."""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pyte

ROOT = Path(__file__).resolve().parent.parent


def run_on_terminal(
    *command, columns: int = 400, rows: int = 120, environment: dict[str, str] | None = None
) -> tuple[int, str, list[str]]:
    """Run a script with a terminal as its standard streams; return its exit code, all that it wrote,
    and the lines of the screen at the end, without empty ones below the last.
    """
    terminal, streams = pty.openpty()
    termios.tcsetwinsize(streams, (rows, columns))
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdin=streams,
        stdout=streams,
        stderr=streams,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": str(columns), **(environment or {})},
        start_new_session=True,
    )
    os.close(streams)
    written = b""
    try:
        while chunk := os.read(terminal, 65536):
            written += chunk
    except OSError:  # a pseudo-terminal ends with EIO when its other side closes
        pass
    os.close(terminal)
    text = written.decode()
    return process.wait(), text, final_screen(text, columns=columns, rows=rows)


def final_screen(written: str, *, columns: int, rows: int) -> list[str]:
    """Return the lines of a terminal's screen after a text with control characters was written."""
    screen = pyte.Screen(columns, rows)
    pyte.Stream(screen).feed(written)
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return lines
