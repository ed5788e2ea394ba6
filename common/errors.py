"""The one exception that stands for a mistake which the user can mend."""


class UserError(Exception):
    """A mistake of the user: its message names the value, the place and the way out, in one line.

    `common.cli.run` prints it without a traceback and exits with code 2. Anything else that is raised is a bug.
    """


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the message of a library's exception as one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
