"""--use-model-defaults: the choice of tokens that a model's generation_config.json asks for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common.errors import UserError, note
from common.files import read_settings
from common.generation.generation_flags import LIBRARY_DRAWING, check_ranges, is_drawing, make_parser

NAMES = (  # in generation_config.json, of what changes which tokens are chosen
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("top_h", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "guidance_scale", "num_beams"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "forced_bos_token_id"),
    *("forced_eos_token_id", "exponential_decay_length_penalty", "encoder_repetition_penalty"),
)
ONLY_WHEN_DRAWING = (*LIBRARY_DRAWING, "top_h")
NO_EFFECT = {"num_beams": 1, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0}


def read(folder: Path) -> dict[str, Any]:
    """Return how the generation_config.json of a model's folder chooses tokens, as `generate` reads it:
    with do_sample, of the 50 likeliest tokens unless it says otherwise, else greedily.
    """
    path = folder / "generation_config.json"
    found = read_settings(path) if path.exists() else {}
    draws = found.get("do_sample") is True
    known = {"temperature": 1.0, "top_k": 50} if draws else {}
    given = {name: found[name] for name in NAMES if found.get(name) is not None}
    return {
        name: value
        for name, value in {**known, **given}.items()
        if (draws or name not in ONLY_WHEN_DRAWING) and value != NO_EFFECT.get(name)
    }


def set_flags(args: argparse.Namespace, folder: Path, *, name: str) -> None:
    """Set each flag that decides how tokens are chosen, unless it is given, to its value in the
    generation_config.json of a model, and show these values in one line.

    Raises UserError for a value that its flag would not take, and for several samples of a model
    that decodes greedily.
    """
    parser = make_parser()
    types: dict[str, Any] = {action.dest: action.type for action in parser._actions}
    taken, left_out = [], []
    for key, value in read(folder).items():
        if key not in types or key == "num_beams":
            left_out.append(key)
        elif getattr(args, key) == parser.get_default(key):
            try:
                setattr(args, key, types[key](str(value)))
            except argparse.ArgumentTypeError as error:
                place = f"--use-model-defaults: {name}: generation_config.json: {key}"
                raise UserError(f"{place}: {error}; give --{key.replace('_', '-')}") from error
            taken.append(f"{key} {value}")
    if args.num_samples > 1 and not is_drawing(args):
        problem = f"{name} decodes greedily, which gives the same text each time"
        raise UserError(f"--num-samples {args.num_samples}: {problem}; give --temperature")
    check_ranges(args)
    missing = f"; not taken: {', '.join(left_out)}" if left_out else ""
    kind = "drawn" if is_drawing(args) else "greedy"
    settings = ", ".join(taken) or "nothing"
    note(f"note: the generation_config.json of {name}: {settings} ({kind}){missing}")
