"""What a person sees: a command in a pseudo-terminal, and the screen that it leaves."""

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyte

ROOT = Path(__file__).resolve().parent.parent


def run_on_terminal(
    *command, columns: int = 400, rows: int = 120, environment: dict[str, str] | None = None
) -> tuple[int, str, list[str]]:
    """Run a script with a terminal as its standard streams; return its exit code, all that it wrote,
    and the lines of the screen at the end, without empty ones below the last.
    """
    running = OnTerminal(*command, columns=columns, rows=rows, environment=environment)
    code, text = running.end()
    return code, text, final_screen(text, columns=columns, rows=rows)


class OnTerminal:
    """A running script with a terminal of its own as its standard streams, at which somebody types."""

    def __init__(
        self, *command, columns: int = 400, rows: int = 120, environment: dict[str, str] | None = None
    ):
        self.terminal, streams = pty.openpty()
        termios.tcsetwinsize(streams, (rows, columns))
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            stdin=streams,
            stdout=streams,
            stderr=streams,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": str(columns), **(environment or {})},
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        )
        os.close(streams)
        self.written, self.seen = b"", 0

    def type(self, keys: str) -> None:
        """Type keys, as a terminal sends them."""
        os.write(self.terminal, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until a text is shown after what was waited for before."""
        until = time.monotonic() + seconds
        while (place := self.written.find(text.encode(), self.seen)) < 0:
            self._read_until(until, repr(text))
        self.seen = place + len(text.encode())

    def wait_for_more(self, count: int, seconds: float = 60) -> None:
        """Wait until so many bytes are shown after what was waited for before."""
        until = time.monotonic() + seconds
        while len(self.written) < self.seen + count:
            self._read_until(until, f"{count} bytes")
        self.seen = len(self.written)

    def _read_until(self, until: float, wanted: str) -> None:
        ready = select.select([self.terminal], [], [], max(until - time.monotonic(), 0))[0]
        if not ready or not self._read():
            self.process.kill()
            raise AssertionError(f"no {wanted} after {self.written[self.seen :]!r}")

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and all that was written."""
        while self._read():
            pass
        os.close(self.terminal)
        return self.process.wait(), self.written.decode()

    def _read(self) -> bool:
        try:
            chunk = os.read(self.terminal, 65536)
        except OSError:  # a pseudo-terminal ends with EIO when its other side closes
            chunk = b""
        self.written += chunk
        return bool(chunk)


def final_screen(written: str, *, columns: int, rows: int) -> list[str]:
    """Return the lines of a terminal's screen after a text with control characters was written."""
    screen = pyte.Screen(columns, rows)
    pyte.Stream(screen).feed(written)
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return lines
