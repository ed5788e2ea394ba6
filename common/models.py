"""Load what `from_pretrained` loads, by a bundled name, a local folder or a Hub id; each way in
which that fails is one line for the user.
"""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub.errors
import safetensors
import transformers

from common import bundled, hub
from common.errors import UserError, one_line

# the others are bugs
USER_VALUE_ERRORS = (
    "trust_remote_code",
    "model_type",
    "backend tokenizer",
    "Unrecognized configuration class",
)

# what matters of its warnings is checked and said here
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def locate(name: str, *, find_bundled: Callable[[str], Path]) -> str:
    """Return what `from_pretrained` takes for a name; `find_bundled` turns a bundled one into a folder.
    Raises UserError for a missing folder or a file.
    """
    if bundled.is_bundled(name):
        return str(find_bundled(name))
    if Path(name).is_file():
        raise UserError(f"--model {name}: it is a file; name the folder of a saved model")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"--model {name}: the folder has no config.json; name the folder of a saved model")
    if not Path(name).exists() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise UserError(f"--model {name}: no such folder; check the path")
    return name


def load(auto_class, name: str, location: str, **options):
    """Call `auto_class.from_pretrained(location)`. Raises UserError, naming `name`, when it can't
    be found, reached or read.

    No remote code runs: without `trust_remote_code=False` transformers asks on standard input
    whether it may run the code that a folder names, and takes the first line of a piped text for
    the answer.
    """
    reachable = Path(location).is_dir() or hub.is_reachable()
    try:
        loaded = auto_class.from_pretrained(location, trust_remote_code=False, **options)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError, safetensors.SafetensorError) as error:
        if isinstance(error, ValueError) and not any(known in str(error) for known in USER_VALUE_ERRORS):
            raise
        raise UserError(f"--model {name}: {_explain(error, reachable)}") from error
    if not reachable:
        hub.say_cached(f"--model {name}")
    return loaded


def _explain(error: Exception, reachable: bool) -> str:
    if not reachable:
        return f"the Hub can't be reached; use a local folder or a bundled model: {one_line(error)}"
    if isinstance(error.__cause__, huggingface_hub.errors.RepositoryNotFoundError):
        return (
            "neither a local folder nor a model on the Hub that you may read; check the name (a private one"
            " needs `hf auth login`), or leave --model out for the bundled one"
        )
    if "file named model.safetensors" in str(error):
        return (
            "it has no model.safetensors, and pickled weights (pytorch_model.bin) are never read, for they"
            " can run code; use a version of it with safetensors, or convert it first"
        )
    if "Unrecognized configuration class" in str(error):
        return "it is not a model of the kind that this script needs; name another"
    return f"{one_line(error).rstrip('.')}; mend its files or name another model"
