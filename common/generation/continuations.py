"""How likely given texts are after a prompt: what multiple-choice evaluations ask.

The log-probability of a continuation is the sum over its tokens, each predicted from the prompt and
the tokens before it. Prompt and continuation are encoded together, because a tokenizer may join the
end of one and the beginning of the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from common import plain_files, reading, terminal
from common.columns import KeptColumns, names_beside
from common.errors import UserError, shorten, without_errors
from common.generation import decoding
from common.generation.language_model import LanguageModel, check_characters, check_length
from common.generation.messages import as_conversation
from common.generation.prompts import json_value
from common.generation.scoring import start_token

if TYPE_CHECKING:
    from common.generation.chat import ChatFormat

MOST_LOGITS = 1 << 27  # numbers of a batch's logits: 512 MB
SHOWN = 60  # characters of a text in a table
READ_FIELDS = ("prompt", "choices", "answer")
OWN_FIELDS = ("prompt_number", "likeliest", *READ_FIELDS)  # in each line of the output
ADVICE = 'write {"prompt": "...", "choices": ["...", "..."], "answer": 0}; answer may be left out'


@dataclass(frozen=True)
class Question:
    """A prompt, texts that may follow it, the number of the right one (from 0) if it is known, and the cells
    of the columns that are kept.
    """

    prompt: str
    choices: list[str]
    answer: int | None
    cells: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A prompt and one of its continuations as tokens."""

    question: int  # its number, from 0
    text: str  # the continuation
    ids: list[int]
    num_before: int  # tokens of the prompt

    @property
    def num_scored(self) -> int:
        """The number of tokens of the continuation."""
        return len(self.ids) - self.num_before


@dataclass(frozen=True)
class Scored:
    """A continuation with its log-probability, a natural logarithm."""

    text: str
    logprob: float
    num_tokens: int

    @property
    def per_token(self) -> float:
        """The log-probability of a token, on average."""
        return self.logprob / self.num_tokens

    @property
    def per_character(self) -> float:
        """The log-probability of a character, on average."""
        return self.logprob / len(self.text)


# how continuations are compared: by the whole, or so that longer ones are not at a disadvantage
MEASURES = {
    "total": lambda scored: scored.logprob,
    "per token": lambda scored: scored.per_token,
    "per character": lambda scored: scored.per_character,
}


def read_file(name: str, *, encoding: str | None, kept: KeptColumns) -> list[Question]:
    """Return the questions of a JSONL file, or of standard input ("-"), with the columns to keep (`kept`).
    Raises UserError, naming the line, for anything that is not a question, and for a column that is not
    there.
    """
    lines, source = reading.read_lines(name, encoding=encoding), plain_files.source_name(name)
    named = [(line, f"{source}, line {number}") for number, line in enumerate(lines, start=1)]
    rows = [_read_row(line, place) for line, place in named]
    questions = [_read_question(row, place) for row, (_, place) in zip(rows, named)]
    if len({question.answer is None for question in questions}) > 1:
        number = next(n for n, question in enumerate(questions, 1) if question.answer is None)
        problem = "no answer, and other lines have one"
        raise UserError(f"{source}, line {number}: {problem}; give all or none")
    names = dict.fromkeys(key for row in rows for key in row)
    found = kept.among(names, others=READ_FIELDS, source=source)
    columns = list(zip(names_beside(found, OWN_FIELDS), found))
    return [
        replace(question, cells={name: json_value(row.get(key)) for name, key in columns})
        for question, row in zip(questions, rows)
    ]


def _read_row(line: str, place: str) -> dict:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f"{place}: no JSON object with a prompt; {ADVICE}")
    return row


def _read_question(row: dict, place: str) -> Question:
    choices = row.get("choices")
    are_texts = isinstance(choices, list) and all(isinstance(text, str) for text in choices)
    if not choices or not are_texts:
        raise UserError(f"{place}: its choices are no list of texts; {ADVICE}")
    if "" in choices:
        raise UserError(f"{place}: choice {choices.index('') + 1} is empty; write a text")
    answer = row.get("answer")
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(choices)):
        which = shorten(repr(answer), SHOWN)
        wanted = f"neither one of its choices nor a number from 0 to {len(choices) - 1}"
        raise UserError(f"{place}: its answer {which} is {wanted}; {ADVICE}")
    return Question(row["prompt"], choices, answer)


def encode_pair(
    prompt: str, continuation: str, model: LanguageModel, *, name: str, is_written: bool = False
) -> tuple[list[int], int]:
    """Return the tokens of a prompt with its continuation, and how many of them are the prompt's.

    Spaces at the end of the prompt go to the continuation, since most tokenizers put a space before
    a word into the word's token. A token that holds the end of the prompt and the beginning of the
    continuation counts as the continuation's. Nothing predicts the first token of a text: an empty
    prompt is the token that begins texts, or else one that ends them. `is_written`: a chat template
    has written the prompt, with all special tokens.
    """
    check_characters(prompt + continuation, model, name=name)
    start = None if is_written else start_token(model)
    first = [] if start is None else [start]
    both, before = (
        [*first, *model.tokenizer(text, add_special_tokens=False)["input_ids"]] if text else first
        for text in (prompt + continuation, prompt.rstrip(" "))
    )
    num_equal = 0
    while num_equal < min(len(before), len(both) - 1) and before[num_equal] == both[num_equal]:
        num_equal += 1
    if num_equal > 0:
        return both, num_equal
    if not model.end_ids:
        raise UserError(f"{name}: {model.name} has no token that could stand for an empty prompt")
    return [model.end_ids[0], *both], 1


def write_prompts(
    questions: list[Question], chat_format: ChatFormat | None, system: str | None
) -> list[str] | None:
    """Return the prompts of questions as the chat template writes them, None without one. Raises
    UserError for one that it refuses.
    """
    if chat_format is None:
        return None
    if system:
        chat_format.note_system()
    conversations = [as_conversation(question.prompt, system) for question in questions]
    names = [f"prompt {number}" for number in range(1, len(questions) + 1)]
    return without_errors(chat_format.write(conversations, names))


@torch.inference_mode()
def score(
    questions: list[Question], model: LanguageModel, *, batch_size: int, written: list[str] | None = None
) -> list[list[Scored]]:
    """Return the scored choices of each question, `batch_size` texts at a time; `written` are the
    prompts as a chat template writes them.

    Raises UserError for a text that does not fit into the model's context.
    """
    pairs = []
    for number, question in enumerate(questions):
        for which, text in enumerate(question.choices, start=1):
            name = f"prompt {number + 1} with choice {which}"
            prompt, is_chat = (written[number], True) if written else (question.prompt, False)
            ids, num_before = encode_pair(prompt, text, model, name=name, is_written=is_chat)
            check_length(ids, 0, model, name=name)
            pairs.append(Pair(number, text, ids, num_before))
    found: dict[int, Scored] = {}
    order = sorted(range(len(pairs)), key=lambda place: len(pairs[place].ids))  # little padding
    while order:
        chosen, order = order[:batch_size], order[batch_size:]
        longest = max(pairs[place].num_scored for place in chosen)
        fitting = max(1, MOST_LOGITS // (model.vocabulary * (longest + 1)))
        chosen, order = chosen[:fitting], chosen[fitting:] + order
        batch = decoding.left_pad([pairs[place].ids for place in chosen], model, room=0)
        # from the column before the first token that is scored
        logits = model.model.forward(batch, first=0, keep=min(longest + 1, batch.length))
        for place, row in zip(chosen, logits):
            pair = pairs[place]
            targets = torch.tensor(pair.ids[pair.num_before :], device=row.device)
            predicting = row[-len(targets) - 1 : -1].float().log_softmax(-1)  # (N, V)
            logprob = predicting.gather(-1, targets[:, None]).double().sum().item()
            found[place] = Scored(pair.text, logprob, len(targets))
    result: list[list[Scored]] = [[] for _ in questions]
    for place, pair in enumerate(pairs):
        result[pair.question].append(found[place])
    return result


def likeliest(choices: list[Scored], measure: str) -> int:
    """Return the number of the likeliest choice; of equal ones, the first."""
    values = [MEASURES[measure](scored) for scored in choices]
    return values.index(max(values))


def lines(questions: list[Question], scored: list[list[Scored]]) -> list[dict]:
    """Return what is written for all questions, as JSON takes it."""
    return [_line(number, *pair) for number, pair in enumerate(zip(questions, scored), start=1)]


def _line(number: int, question: Question, choices: list[Scored]) -> dict:
    scores = [
        {
            "text": scored.text,
            "logprob": round(scored.logprob, 6),
            "num_tokens": scored.num_tokens,
            "per_token": round(scored.per_token, 6),
            "per_character": round(scored.per_character, 6),
        }
        for scored in choices
    ]
    return {
        "prompt_number": number,
        "prompt": question.prompt,
        "choices": scores,
        "likeliest": {name.replace(" ", "_"): likeliest(choices, name) for name in MEASURES},
        "answer": question.answer,
        **question.cells,
    }


def tables(questions: list[Question], scored: list[list[Scored]]) -> str:
    """Return the tables of all questions, with marks at the likeliest and the right choices."""
    numbered = enumerate(zip(questions, scored), start=1)
    return "\n".join(_table(number, *pair) for number, pair in numbered)


def _table(number: int, question: Question, choices: list[Scored]) -> str:
    best = {measure: likeliest(choices, measure) for measure in MEASURES}
    rows = []
    for place, scored in enumerate(choices):
        values = [
            f"{value(scored):.4f}{'*' if best[measure] == place else ' '}"
            for measure, value in MEASURES.items()
        ]
        mark = "=" if place == question.answer else ""
        rows.append([mark, terminal.cut(repr(scored.text), terminal.room(SHOWN)), scored.num_tokens, *values])
    names = ["", "continuation", "tokens", *MEASURES]
    head = f"--- prompt {number}: {terminal.cut(question.prompt, terminal.room(SHOWN + 16) - 16)}"
    options = {"disable_numparse": True, "style": "plain", "stralign": "right"}
    return f"{head}\n{terminal.table(rows, names, texts=[1], keys=2, **options)}"


def accuracy(questions: list[Question], scored: list[list[Scored]]) -> str:
    """Return in one line how often the likeliest choice is the right one, by each measure."""
    parts = []
    for measure in MEASURES:
        pairs = zip(questions, scored)
        right = sum(likeliest(choices, measure) == one.answer for one, choices in pairs)
        parts.append(f"{right / len(questions):.4f} {measure}")
    return f"accuracy over {len(questions):,} prompts: {', '.join(parts)}"
