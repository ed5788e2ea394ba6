"""The exceptions that end a script with one line: a mistake which the user can mend, and a run
that was stopped.
"""


class UserError(Exception):
    """A mistake of the user: its message names the value, the place and the way out, in one line.

    `common.cli.run` prints it without a traceback and exits with code 2. Anything else that is
    raised is a bug.
    """


class Interrupted(Exception):
    """The end of a run by a signal, after what it had done was saved; `common.cli.run` prints the
    message and exits with `code`.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the message of a library's exception as one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
