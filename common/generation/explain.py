"""The distribution made visible: what each filter does to the likeliest tokens, and greedy, top-k
and top-p side by side.
"""

import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import replace

import torch
from tabulate import tabulate

from common.generation import decoding, sampling
from common.generation.completion import Completion, Generator, Prompt
from common.generation.sampling import Settings

ROWS = 8  # candidates shown for each token
BAR = 8  # characters of a bar for 100 %
BLOCKS = " ▏▎▍▌▋▊▉█"
# of the blog post that the tutorial follows, huggingface.co/blog/how-to-generate
COMPARED_TOP_K, COMPARED_TOP_P = 50, 0.92


def stages(
    logits: torch.Tensor, tokens: torch.Tensor, settings: Settings, *, prompt_length: int
) -> list[tuple[str, torch.Tensor]]:
    """Return (name, probabilities (V)) of the model's own distribution and after each filter, for
    one text: logits (1, V), tokens (1, T).
    """
    filters = sampling.history_filters(
        settings, prompt_length=prompt_length, starts=None, padding_is_text=True
    )
    found = [("model", logits[0].softmax(-1))]
    for stage in [*filters, *sampling.distribution_filters(settings)]:
        logits = stage.apply(logits, tokens)
        found.append((stage.name, logits[0].softmax(-1)))
    return found


def show_token(place: int, token: int, found: list[tuple[str, torch.Tensor]], tokenizer) -> str:
    """Return the table of one token: the likeliest candidates, each with its probability before
    and after every filter.
    """
    final, first = found[-1][1], found[0][1]
    kept = int((final > 0).sum())
    shown = _order(final, first)[:ROWS]
    shown += [token] if token not in shown else []
    lines = [
        [
            ">" if number == token else "",
            repr(tokenizer.decode([number])),
            *(_cell(values[number].item()) for _, values in found),
        ]
        for number in shown
    ]
    rest = [
        values.index_fill(0, torch.tensor(shown, device=values.device), 0.0).sum().item()
        for _, values in found
    ]
    lines.append(["", "all others", *(_cell(value) for value in rest)])
    head = f"token {place}: {tokenizer.decode([token])!r}, one of {kept:,} kept of {len(final):,}"
    columns = ["", "candidate", *(name for name, _ in found)]
    return f"{head}\n{tabulate(lines, columns, disable_numparse=True, tablefmt='plain')}\n"


def _order(final: torch.Tensor, first: torch.Tensor) -> list[int]:
    """Return the likeliest tokens in the end, and after them, where fewer are kept than shown, the
    likeliest of the model.
    """
    kept = [number for number in final.topk(min(ROWS, len(final))).indices.tolist() if final[number] > 0]
    return list(dict.fromkeys([*kept, *first.topk(min(2 * ROWS, len(first))).indices.tolist()]))


def _cell(value: float) -> str:
    return f"{value:6.1%} {bar(value)}" if value > 0 else f"{'-':>6} {bar(0)}"


def bar(share: float) -> str:
    """Return a bar of BAR characters for a share from 0 to 1, in eighths of a character."""
    eighths = round(min(share, 1.0) * BAR * 8)
    return ("█" * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")).ljust(BAR)


def explain(generator: Generator, prompt: Prompt, seed: int) -> Iterator[tuple[int, str]]:
    """Yield each token as it is generated, by the sampler that the generator's options name, and
    its table.
    """
    settings, language_model = generator.options.settings, generator.language_model
    batch = decoding.left_pad([prompt.ids], language_model, room=settings.max_new_tokens)
    for place, step in enumerate(generator.steps(batch, [Completion(prompt, 0)], seed), start=1):
        found = stages(step.logits, batch.tokens, settings, prompt_length=len(prompt.ids))
        yield step.tokens[0], show_token(place, step.tokens[0], found, language_model.tokenizer)


def compared_settings(settings: Settings) -> dict[str, Settings]:
    """Return the three ways to compare, by name, each with what the user gave and the tutorial's k
    and p where nothing was given.
    """
    plain = replace(settings, top_k=0, top_p=1.0, sample=True)
    k, p = settings.top_k or COMPARED_TOP_K, settings.top_p if settings.top_p < 1 else COMPARED_TOP_P
    return {
        "greedy": replace(plain, sample=False),
        f"top-k {k}": replace(plain, top_k=k),
        f"top-p {p:g}": replace(plain, top_p=p),
    }


def side_by_side(texts: dict[str, Completion], width: int) -> str:
    """Return texts as columns, all together `width` characters wide; what can't be shown, such as
    a control character, becomes a space.
    """
    column = max(20, (width - 2 * (len(texts) - 1)) // len(texts))
    wrapped = []
    for name, found in texts.items():
        paragraphs = [
            "".join(char if char.isprintable() else " " for char in paragraph)
            for paragraph in found.text.strip("\n").split("\n")
        ]
        wrapped.append(
            [
                name,
                "-" * column,
                *(piece for paragraph in paragraphs for piece in textwrap.wrap(paragraph, column) or [""]),
            ]
        )
    return "\n".join(
        "  ".join(cell.ljust(column) for cell in cells).rstrip()
        for cells in itertools.zip_longest(*wrapped, fillvalue="")
    )
