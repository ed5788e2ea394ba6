"""What the three scripts share."""

import sys

# before anything is imported that such a machine lacks
if sys.version_info < (3, 11):  # noqa: UP036  (older versions get this message)
    version = ".".join(map(str, sys.version_info[:3]))
    sys.stderr.write(f"error: Python {version} is too old; run the scripts with 3.11 or later\n")
    sys.exit(2)
if sys.platform == "win32":
    sys.stderr.write("error: the scripts run on Linux and macOS; on Windows, run them in WSL 2\n")
    sys.exit(2)
