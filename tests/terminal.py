"""What a person sees: a command in a pseudo-terminal, and the screen that it leaves."""

import os
import pty
import select
import termios
import time

import pyte

from conftest import Forker


def run_on_terminal(
    forker: Forker, *command, columns: int = 400, rows: int = 120
) -> tuple[int, str, list[str]]:
    """Run a script with a terminal as its standard streams; return its exit code, all that it
    wrote, and the lines of the screen at the end, without empty ones below the last.
    """
    running = OnTerminal(forker, *command, columns=columns, rows=rows)
    code, text = running.end()
    return code, text, final_screen(text, columns=columns, rows=rows)


class OnTerminal:
    """A running script with a terminal of its own as its standard streams, at which somebody types."""

    def __init__(self, forker: Forker, *command, columns: int = 400, rows: int = 120, **environment: str):
        self.forker = forker
        self.terminal, self.streams = pty.openpty()
        termios.tcsetwinsize(self.streams, (rows, columns))
        variables = {"COLUMNS": str(columns), **environment}
        command = list(map(str, command))
        forker.begin(command=command, terminal=os.ttyname(self.streams), environment=variables)
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
            os.close(self.terminal)  # the line is dead: the script gets SIGHUP
            self.forker.wait()
            raise AssertionError(f"no {wanted} after {self.written[self.seen :]!r}")

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and all that was written."""
        while self._read():
            pass
        os.close(self.terminal)
        [code] = self.forker.wait()
        return code, self.written.decode()

    def _read(self) -> bool:
        ended = self.forker.process.stdout
        if self.streams is not None and self.terminal not in select.select([self.terminal, ended], [], [])[0]:
            os.close(self.streams)  # it was open until now, for the script might not have opened its own
            self.streams = None
        try:
            chunk = os.read(self.terminal, 65536)
        except OSError:  # a pseudo-terminal ends with EIO when its other side is closed
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
