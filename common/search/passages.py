"""Long texts -> overlapping passages that a model can read whole."""

from common.errors import UserError

BLOCK = 256  # texts tokenised at once


def room(encoder, overlap: int) -> int:
    """Return how many tokens of a text a passage holds.

    Raises UserError when that is not more than `overlap`, or the tokenizer doesn't say which
    characters a token stands for.
    """
    tokenizer = encoder.tokenizer
    if not tokenizer.is_fast:
        raise UserError(
            f"--chunk: the tokenizer of {encoder.name} doesn't say where its tokens stand in a text; leave"
            " --chunk out or use another model"
        )
    size = (
        encoder.max_length
        - tokenizer.num_special_tokens_to_add()
        - len(tokenizer(encoder.prompt("document"), add_special_tokens=False)["input_ids"])
    )
    if not 0 <= overlap < size:
        raise UserError(f"--chunk-overlap {overlap}: a passage holds {size} tokens; use fewer than that")
    return size


def split(texts: list[str], encoder, *, overlap: int) -> list[list[tuple[int, str]]]:
    """Return for each text its passages as (first character, passage), each of at most the
    encoder's max_length in tokens.

    Neighbours share about `overlap` tokens; cuts fall between words where a word is no longer than
    a passage. A text that fits stays whole. Raises UserError as room() does.
    """
    size = room(encoder, overlap)
    return [
        cuts
        for start in range(0, len(texts), BLOCK)
        for cuts in _split_block(texts[start : start + BLOCK], encoder.tokenizer, size, overlap)
    ]


def _split_block(texts: list[str], tokenizer, size: int, overlap: int) -> list[list[tuple[int, str]]]:
    """Return the passages of texts. A passage by itself can have more tokens than in its text, as
    a word's beginning may be another token there.
    """
    tokens, found = _tokens(texts, tokenizer), []
    for place, text in enumerate(texts):
        words, offsets, fitting = tokens.word_ids(place), tokens["offset_mapping"][place], size
        while True:
            cuts = _cut(text, offsets, token_windows(words, fitting, min(overlap, fitting - 1)))
            longest = max(map(len, _tokens([passage for _, passage in cuts], tokenizer)["input_ids"]))
            if longest <= size or fitting == 1 or len(cuts) == 1:
                break
            fitting = max(fitting - (longest - size), 1)
        found.append(cuts)
    return found


def _tokens(texts: list[str], tokenizer):
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        truncation=False,
        padding=False,
        verbose=False,
    )


def token_windows(words: list, room: int, overlap: int) -> list[tuple[int, int]]:
    """Return windows (first token, token after the last) of at most `room` tokens that cover all
    tokens; `words` is the word of each token.

    A window ends, and starts, where a word does, unless the word is longer than half of a window.
    """

    def word_start(token: int, lowest: int) -> int:
        first = token
        while first > lowest and words[first] == words[first - 1] and words[first] is not None:
            first -= 1
        return first if first > lowest else token

    windows, start, end = [], 0, 0
    while len(words) - start > room:
        end = word_start(start + room, max(start + room // 2, end))  # always beyond the last end
        windows.append((start, end))
        start = max(word_start(end - overlap, start + 1), start + 1) if overlap else end
    return [*windows, (start, len(words))]


def _cut(text: str, offsets: list[tuple[int, int]], windows: list[tuple[int, int]]) -> list[tuple[int, str]]:
    """Return (first character, passage) of each window of tokens; what stands between two tokens
    goes with the second.
    """
    cuts = []
    for number, (first, last) in enumerate(windows):
        # the first and the last passage reach to the text's ends
        start = offsets[first - 1][1] if number else 0
        end = offsets[last - 1][1] if number < len(windows) - 1 else len(text)
        if end > start:  # several tokens can share a character
            cuts.append((start, text[start:end]))
    return cuts
