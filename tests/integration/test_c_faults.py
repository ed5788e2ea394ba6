"""Faults in decoder.c and attention.c, made one at a time in every statement that computes: each must
show when what it computes is compared with float64.

A fault is a statement left out, another operator, or a whole number one larger. Each is compiled by
itself, without optimisations, and runs in a child process, since it may crash or never end.
"""

import ctypes
import faulthandler
import functools
import os
import random
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decoder import (
    ROUNDING,
    around_zero,
    identity,
    in_kind,
    in_mixed_kinds,
    multiply,
    random_matrix,
    random_model,
    widen,
    widen_rows,
)
from torch import Tensor

from common import attention, compiler
from common.generation import fast_decoding
from common.generation.fast_decoding import CompiledModel, Kernel
from common.generation.llama import Transformer
from common.generation.stored_weights import KINDS, Matrix, as_matrix, pack
from language_models import needs_compiler, own_transformer

pytestmark = needs_compiler

AVX2 = {"__AVX2__", "__FMA__", "__F16C__", "__x86_64__"}
AVX512 = AVX2 | {"__AVX512F__", "__AVX512BW__", "__AVX512VNNI__"}
VARIANTS = {  # the processor's instructions -> what is defined when it is compiled, and how
    "avx512_vnni": (AVX512, ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vnni"]),
    "avx2": (AVX2, ["-mavx2", "-mfma", "-mf16c"]),
    "portable C": (set(), []),
}
SECONDS = 20  # for all comparisons; usual are some tenths
# functions in which no number of a text is computed: threads, memory, how work is shared
NOT_COMPUTING = {
    *("prefetch", "fetch_ahead", "pause_or_yield", "wait_for_all", "take", "chunk_of", "serve", "run"),
    *("stop", "start", "step", "round_up", "lay_out", "instructions", "widen", "product"),
}
Check = Callable[[Kernel], bool]


# From the source to its statements ----------------------------------------------------------------


def source_of(path: Path, defined: set[str]) -> str:
    """Return a source with what it includes of ours, without comments and without what is not compiled
    where some names are defined. Nothing is inlined, which halves the time to compile it.
    """
    text = path.read_text().replace('#include "vectors.h"', compiler.VECTORS.read_text())
    text = re.sub(r"//[^\n]*|#pragma.*", "", text)
    text, num_inlined = re.subn(r"(#define INLINE) .*", r"\1 static __attribute__((unused))", text)
    assert num_inlined == 1
    known: dict[str, int] = dict.fromkeys(defined, 1)
    lines, taken = [], []  # of each #if: whether this branch is compiled, whether one was
    for line in text.split("\n"):
        words = line.split(None, 1) or [""]
        if words[0] in ("#if", "#elif", "#else"):
            if words[0] == "#if":
                taken.append([False, False])
            is_true = words[0] == "#else" or is_defined(words[1], known)
            taken[-1] = [is_true and not taken[-1][1], taken[-1][1] or is_true]
            line = ""
        elif words[0] == "#endif":
            taken.pop()
            line = ""
        elif not all(is_compiled for is_compiled, _ in taken):
            line = ""
        elif match := re.fullmatch(r"#define (\w+)(?: (\d+))?\s*", line):
            known[match[1]] = int(match[2] or 1)
        lines.append(line)
    return "\n".join(lines)


def is_defined(condition: str, known: dict[str, int]) -> bool:
    """Return whether the condition of an #if is true."""
    words = re.sub(r"defined\((\w+)\)", lambda match: str(match[1] in known), condition)
    words = words.replace("!", " not ").replace("&&", " and ").replace("||", " or ")
    return eval(words, {}, known)  # of our own file


def functions_of(source: str) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each function that computes, and where its body begins and ends."""
    for match in re.finditer(r"^(?:INLINE|static|void) [^;{}=]*?(\w+)\([^;{}]*\) \{", source, re.MULTILINE):
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        if match[1] not in NOT_COMPUTING:
            yield match[1], match.end(), end - 1


def statements_of(source: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where each statement of a function's body begins and ends; the head of a loop or a
    condition is one with what follows it, or one of its own before a block.
    """
    depth, first = 0, begin
    for index in range(begin, end):
        depth += {"(": 1, ")": -1}.get(source[index], 0)
        if depth == 0 and source[index] in ";{}":
            if source[first : index + 1].strip(" \n\\;{}"):
                yield first, index + 1
            first = index + 1


# From a statement to faults -----------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A change of the source."""

    function: str
    begin: int
    end: int
    wrong: str  # instead of source[begin:end]

    def apply(self, source: str) -> str:
        """Return the source with the fault."""
        return source[: self.begin] + self.wrong + source[self.end :]

    def shown(self, source: str) -> str:
        """Return the fault as a person reads it: the line or lines before and after."""
        first, last = source.rfind("\n", 0, self.begin) + 1, source.find("\n", self.end)
        wrong = source[first : self.begin] + self.wrong + source[self.end : last]
        before, after = (" ".join(text.split()) for text in (source[first:last], wrong))
        return f"{self.function}, line {source.count(chr(10), 0, self.begin) + 1}: {before} -> {after}"


OPERATORS = (  # right, wrong
    *((" + ", " - "), (" - ", " + "), (" * ", " + "), (" / ", " * "), (" % ", " / "), (" << ", " >> ")),
    *((" >> ", " << "), (" & ", " | "), (" | ", " & "), (" += ", " -= "), (" && ", " || ")),
    *((" < ", " + 1 < "), (" <= ", " + 1 <= "), (" > ", " < "), (" == ", " != "), ("(-", "(")),
    *((" = -", " = "), ("? -", "? ")),
)
HEAD = r"(?:\s|\\\n|else\b|(?:for|if|while|SHARE) ?\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*"
DECLARATION = r"(?:const|static|u?int\w*|size_t|float|Floats|Ints|Bytes|Scratch|Rows|Layer)\b"


def faults_of(source: str, function: str, begin: int, end: int) -> list[Fault]:
    """Return all faults of a statement."""
    text, faults = source[begin:end], []
    head = re.match(HEAD, text)
    assert head is not None
    is_declaration = re.match(DECLARATION, text[head.end() :]) is not None
    sizes_end = text.find("=") % (len(text) + 1) if is_declaration else 0  # before: how large arrays are
    if (
        text.endswith(";")
        and not is_declaration
        and not re.match(r"return \S|#|\(void\)", text[head.end() :])
    ):
        faults.append(Fault(function, begin + head.end(), end, ";"))
    for right, wrong in OPERATORS:
        faults += [
            Fault(function, begin + match.start(), begin + match.end(), wrong)
            for match in re.finditer(re.escape(right), text)
        ]
    faults += [
        Fault(function, begin + match.start(), begin + match.end(), str(int(match[0]) + 1))
        for match in re.finditer(r"(?<![\w.])(?<!< )\d+(?![\w.])", text)
        if match.start() >= sizes_end
    ]
    return faults


def chosen_faults(source: str, each: int | None) -> list[Fault]:
    """Return up to `each` faults of every statement that computes, None: all. They are drawn at
    random, those of a statement in the same way whatever else changes in the file.
    """
    chosen = []
    for function, begin, end in functions_of(source):
        for first, last in statements_of(source, begin, end):
            faults = faults_of(source, function, first, last)
            generator = random.Random(f"{function}: {source[first:last]}")
            chosen += faults if each is None else generator.sample(faults, min(each, len(faults)))
    return chosen


# What is compared ---------------------------------------------------------------------------------


def is_near(found: Tensor, expected: Tensor, tolerance: Tensor | float) -> bool:
    """Return whether all numbers are as near to others as they must be; NaN is near to nothing."""
    return bool(((found.double() - expected).abs() <= tolerance).all())


def product_checks() -> Iterator[Check]:
    """Yield products with each kind of matrix, by the rows of a token, of guesses and of a prompt,
    and the matrices in fp32.
    """
    for kind in KINDS:
        sizes = [(31, 96), (20, 1056)] + ([] if kind.startswith("groups") else [(21, 37), (3, 5)])
        for size in sizes:
            matrix = random_matrix(kind, *size)
            weights = matrix.widen()
            yield lambda kernel, m=matrix, w=weights: torch.equal(widen(kernel, m), w)
            yield lambda kernel, m=matrix, w=weights: torch.equal(widen_rows(kernel, m), w)
            for rows, wide in ((1, False), (2, False), (3, False), (7, True), (14, True), (17, True)):
                x = torch.randn(rows, size[1], generator=torch.Generator().manual_seed(rows))
                yield product_check(matrix, x * torch.logspace(-3, 3, rows)[:, None], wide=wide)
        matrix = random_matrix(kind, 37, 96)
        second = matrix.widen()[16:]
        yield lambda kernel, m=matrix, w=second: torch.equal(widen(kernel, m, 16), w)


def product_check(matrix: Matrix, x: Tensor, *, wide: bool = False) -> Check:
    """Return the comparison of a product."""
    weights = matrix.widen().double()
    expected = x.double() @ weights.T
    tolerance = ROUNDING * (x.double().abs() @ weights.abs().T).clamp(min=1e-300)
    return lambda kernel: is_near(multiply(kernel, matrix, x, wide=wide), expected, tolerance)


def digit_checks() -> Iterator[Check]:
    """Yield products at the limits of digits and numbers, and what no number becomes."""
    for kind in ("groups4", "groups8"):
        for number in (0, 15) if kind == "groups4" else (-128, 127):
            ones = torch.ones(17, 2).half()
            numbers = torch.full((17, 64), number, dtype=torch.int16)
            matrix = pack(kind, numbers, ones, -ones if kind == "groups4" else None)
            for value in (1.0, -1.0, 3.7e-20, 1e30):
                x = torch.full((2, 64), value)
                x[1, 1::2] *= -1 / 3
                yield product_check(matrix, x)
        matrix, x = random_matrix(kind, 20, 64), torch.randn(4, 64)
        x[0], x[1, 40], x[2, 3] = 0.0, torch.inf, torch.nan
        yield (
            lambda kernel, m=matrix, x=x: (
                bool((product := multiply(kernel, m, x))[0].eq(0).all())
                and bool(product[3].isfinite().all())
                and bool(product[1:3].isnan().all())
            )
        )
        eye = identity(kind, 64)
        whole = torch.randint(
            -8_355_000, 8_355_001, (9, 64), generator=torch.Generator().manual_seed(1)
        ).float()
        whole[:, ::32] = 8_355_000
        yield lambda kernel, m=eye, x=whole: torch.equal(multiply(kernel, m, x), x)
        yield lambda kernel, m=eye: bool((multiply(kernel, m, torch.full((2, 64), 1e-38)) == 0).all())
        near_0 = around_zero()
        yield lambda kernel, m=eye, x=near_0: torch.equal(multiply(kernel, m, x), x.round())
        x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
        size = x.abs().amax(1, keepdim=True)
        bound = (0.5 / 8_355_000 + 3 * 2**-24) * size
        yield lambda kernel, m=eye, x=x, bound=bound: is_near(multiply(kernel, m, x), x.double(), bound)
        yield (
            lambda kernel, m=eye, x=x, size=size: (
                abs(((multiply(kernel, m, x) - x) * x.sign() / size).double().mean().item()) < 3e-8
            )
        )
    halves = torch.tensor([[6e-8, -6e-8, 3e-5, 6e-5, 65504.0, -0.0, 1.0, 2.0]]).half()
    matrix = as_matrix(halves)
    yield lambda kernel: torch.equal(widen(kernel, matrix), halves.float())


STEPS = (  # model, kind of the weights (a number: mixed), first columns of texts, how columns come, threads
    ("llama, odd sizes", "fp32", [0], [1, 2, 9, 10], 1),
    ("llama, odd sizes", "fp32", [0, 3], [37, 38], 2),
    ("llama, large heads", "fp32", [0, 3], [4, 5, 6], 1),
    ("mistral, a window and heads of whole tiles", "fp32", [0], [5, 43, 76, 111], 2),
    ("mistral, a window and heads of whole tiles", "fp32", [0, 1, 0, 3, 40], [41, 42], 1),
    ("mistral, a window and heads of whole tiles", "fp32", [0, 3], [1, 30], 1),
    ("mistral, window", "fp32", [0], [7, 8, 9, 20], 1),
    ("llama, tied, biases, scaled positions", "fp32", [0, 3], [4, 5, 30], 1),
    ("qwen3, norms of queries and keys, a window in one layer", "fp32", [0, 3], [4, 20, 21], 1),
    *(("llama, several groups of 32", kind, [0, 3], [4, 5, 25], 1) for kind in (*KINDS, 0, 1, 2, 3, 4)),
    ("steep", "fp32", [0, 3], [12, 13, 40], 1),
)
TOLERANCE = {"steep": 3e-4}  # its scores are so large that fp32 shows


def model_of(name: str) -> Any:
    """Return a model of the tests; in "steep", attention sees few columns, and exp what is below -87."""
    if name != "steep":
        return random_model(name)
    model = deepcopy(random_model("mistral, a window and heads of whole tiles"))
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(30)
    return model


@dataclass(frozen=True)
class StepCheck:
    """The comparison of a step over padded texts, whose columns come in parts."""

    transformer: Transformer
    ids: Tensor  # (B, T)
    starts: Tensor  # (B): the first column of each text
    splits: list[int]  # where the parts end
    expected: Tensor  # (B, T, V)
    tolerance: float
    num_threads: int

    def __call__(self, kernel: Kernel) -> bool:
        """Return whether the logits are near to those expected, also where only the last are asked for."""
        model = CompiledModel(self.transformer, Kernel(kernel.library, self.num_threads))
        cache, length = model.new_cache(), self.ids.shape[1]
        for begin, end in zip([0, *self.splits], self.splits):
            logits = model.compute(self.ids[:, :end], self.starts, cache, first=begin, keep=end - begin)
            if not self.is_right(logits, begin, end):
                return False
        logits = model.compute(self.ids, self.starts, model.new_cache(), first=0, keep=2)
        return self.is_right(logits, length - 2, length)

    def is_right(self, logits: Tensor, begin: int, end: int) -> bool:
        """Return whether logits of some columns are near to those expected; padding does not count."""
        is_text = torch.arange(begin, end) >= self.starts[:, None]
        expected = self.expected[:, begin:end][is_text]
        return is_near(logits[is_text], expected, self.tolerance * (1 + expected.abs()))


def step_checks() -> Iterator[Check]:
    """Yield steps against transformers in float64."""
    for name, kind, starts, splits, num_threads in STEPS:
        model = model_of(name)
        stored = in_kind(model, kind) if isinstance(kind, str) else in_mixed_kinds(model, kind)
        exact = deepcopy(model).double()
        for parameter_name, parameter in exact.named_parameters():
            if parameter_name in stored:
                parameter.copy_(stored[parameter_name].widen())
        transformer = own_transformer(model, stored)
        shape = (len(starts), splits[-1])
        ids = torch.randint(0, transformer.embedding.rows, shape, generator=torch.Generator().manual_seed(2))
        positions = torch.arange(splits[-1]) - torch.tensor(starts)[:, None]  # (B, T)
        mask = (positions >= 0).long()
        expected = exact(input_ids=ids, attention_mask=mask, position_ids=positions.clamp(min=0)).logits
        tolerance = TOLERANCE.get(name, 1e-4)
        yield StepCheck(transformer, ids, torch.tensor(starts), splits, expected, tolerance, num_threads)


@functools.cache
def all_checks() -> tuple[Check, ...]:
    """Return all comparisons, with what is expected computed already."""
    with torch.no_grad():
        return (*digit_checks(), *product_checks(), *step_checks())


# Running ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Where faults of a variant are compiled."""

    folder: Path
    command: list[str]

    @classmethod
    def make(cls, folder: Path, flags: list[str]) -> "Bench":
        """Compile the library's headers once, which are most of the time."""
        options = ["-O0", "-w", *compiler.FLAGS[1:], *flags]
        header = folder / "headers.h"
        text = fast_decoding.SOURCE.read_text()
        wanted = re.findall(r"^#include <(?!arm_neon).*>", text, re.MULTILINE)
        header.write_text(
            "\n".join(line for line in dict.fromkeys(wanted) if flags or "immintrin" not in line)
        )
        command = [*(compiler.find_compiler() or ()), *options]
        subprocess.run([*command, "-x", "c-header", str(header), "-o", f"{header}.gch"], check=True)
        return cls(folder, [*command, "-include", str(header)])

    def compile(self, source: str) -> Path | None:
        """Return the compiled source, None if it is no C."""
        path, compiled = self.folder / "fault.c", self.folder / "fault.so"
        path.write_text(source)
        command = [*self.command, str(path), "-o", str(compiled), "-lm"]
        done = subprocess.run(command, capture_output=True)
        return compiled if done.returncode == 0 else None


def decodes(compiled: ctypes.CDLL) -> bool:
    """Return whether compiled decoder.c computes all that is expected."""
    kernel = Kernel(fast_decoding._declare(compiled), 1)
    with torch.no_grad():
        return all(check(kernel) for check in all_checks())


@functools.cache
def attention_checks() -> tuple[tuple[list[Tensor], list[Tensor], float], ...]:
    """Return query, key, value (B, H, T, D), bias (B, T) or None and the gradient of the output, and what
    comes of them in float64: the output (B, T, H, D), the logarithms (B, T, H), and the gradients; and
    how near that must be.
    """
    cases = []
    # tokens, whether a text is padded, how large the scores are: beyond what exp holds
    for length, masked, size in (
        (1, False, 1),
        (17, True, 1),
        (50, True, 1),
        (102, False, 1),
        (49, True, 60),
        (70, False, 1),
    ):
        generator = torch.Generator().manual_seed(length)
        *parts, grad = torch.randn(4, 2, length, 3, attention.SIZE, generator=generator)  # each (B, T, H, D)
        parts = [size * parts[0].transpose(1, 2), *(part.transpose(1, 2) for part in parts[1:])]
        seen = (torch.arange(length) < torch.tensor([[length], [1 + length // 2]]))[:, None, None]
        bias = attention.bias_of_keys(seen) if masked else None
        exact = [part.double().requires_grad_() for part in parts]
        scores = exact[0] @ exact[1].transpose(-1, -2) * 0.3
        scores = scores if bias is None else scores + bias[:, None, None]
        output = attention.reference(*exact, None if bias is None else bias.double(), 0.3)
        grads = torch.autograd.grad(output, exact, grad.double())
        log_sums = scores.logsumexp(-1).transpose(1, 2)
        expected = [output, log_sums, *(part.transpose(1, 2) for part in grads)]
        cases.append(([*parts, bias, grad], [tensor.detach() for tensor in expected], 3e-6 * size))
    return tuple(cases)


def attends(compiled: ctypes.CDLL) -> bool:
    """Return whether compiled attention.c computes all that is expected."""
    library = attention._declare(compiled)
    for (*parts, bias, grad), expected, tolerance in attention_checks():
        found = [torch.full(tensor.shape, torch.nan) for tensor in expected]
        attention._run(library, parts, bias, 0.3, found[:2])
        attention._run(library, parts, bias, 0.3, [*found[:2], grad, *found[2:]])
        for own, right in zip(found, expected):
            if not is_near(own, right, tolerance * (1 + right.abs().max())):
                return False
    return True


def passes(compiled: Path, is_right: Callable[[ctypes.CDLL], bool]) -> bool:
    """Return whether compiled code computes all that is expected, in a child process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            faulthandler.disable()
            torch.set_num_threads(1)  # the parent's other threads are not here, and would be waited for
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            code = 0 if is_right(ctypes.CDLL(str(compiled))) else 1
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def survivors_of(
    source: str, bench: Bench, faults: list[Fault], is_right: Callable[[ctypes.CDLL], bool]
) -> tuple[list[Fault], int]:
    """Return the faults that no comparison shows, and how many were compiled."""
    survivors, num_compiled = [], 0
    for fault in faults:
        compiled = bench.compile(fault.apply(source))
        if compiled is None:
            continue
        num_compiled += 1
        if passes(compiled, is_right):
            survivors.append(fault)
    return survivors, num_compiled


# Faults that change no number, or none that may be compared: what they look like, and why.
EQUIVALENT = {
    r"prefetch\(|fetch_ahead\(": "it fetches what is read later",
    r"SHARE\((.*), \d+\) .*-> .*SHARE\(\1, \d+\)": "how many pieces of work a thread takes at a time",
    r"memset\(.*, 1, ": "a float whose bytes are 1 is 2e-38",
    r"multiply_groups\(\d, \w+, rows, 2,": "more than is read",
    r"multiply_groups\(9, |attends_together.*size \+ 1 <=|rows->wide \|\| rows": "two ways to one number",
    r"window \+ 2 > first\)": "where both are equal, the number stays",
    r"-> put\(.*, 2, ": "it is added, as with any number but 0",
    r": [12];$|\+ TILE \+ 1\) / TILE": "memory or a tile that nobody reads",
    r"\|\| !widens": "whole numbers that nobody reads",
    r"attends_together.*rows < step->stride": "two ways to one number",
    r"stride \+ 1 < rows": "a row that is computed twice",
    r"exponential.*x \+ 1 < -87": "numbers below 2e-38",
    r"shifted \+ 0x4b400000": "the bits that differ are shifted out",
    r"first \+ 1 < WIDE_COLUMNS": "where both are equal, the number stays",
    r"(soften|attend|largest_of), .*LANES \+ 1 <=": "two ways to one number",
    r"attend, .*first \+= [48] \+ LANES": "numbers that are computed twice",
    r"columns - 2\)": "a key whose scores nobody reads",
    r"j \+ 1 < TILE; j \+= LANES": "a tile is a whole number of vectors",
    r"\[TILE \+ LARGEST_HEAD\]|num_scores, ": "memory that is too small, which no number shows",
    r"largest \+ 1 >= 0x7f800000": "the largest number of fp32 alone counts as infinite",
    r"to_digits, .* (hi_)?sum = 1;": "less than what is rounded",
    r"(portable C|avx512_vnni): to_digits, .*return; -> ;": "infinity times the digit 0 is NaN, too",
    r"key \+ 1 < keys; key \+= WIDE|(i|part) \+ 1 < size; (i|part) \+= WIDE": "whole vectors",
    r"avx512_vnni: .*(part \* LANES|LANES \* part|load\(tile\[row\] \+ j\))": "a tile is one vector",
    r"backward, .* \+ row \* size \+ part, size": "a head is one vector of this product",
    r"sums\[3\]": "memory that nobody reads",
    r"portable C: smaller, ": "a row that is computed twice",
    r"largest = 1, ": "the smallest number of fp32 counts as 0 anyway",
}


SOURCES = {  # and what tells that they are right, and how many faults there are at least
    "decoder.c": (fast_decoding.SOURCE, decodes, 300),
    "attention.c": (attention.SOURCE, attends, 80),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fault_in_any_statement_is_caught(variant, name, tmp_path):
    """One of every statement that computes, drawn at random; without any, all is equal."""
    if variant != "portable C" and variant not in compiler.processor().split():
        pytest.skip("another processor")
    path, is_right, least = SOURCES[name]
    defined, flags = VARIANTS[variant]
    source, bench = source_of(path, defined), Bench.make(tmp_path, flags)
    # before processes are forked
    all_checks()
    attention_checks()
    compiled = bench.compile(source)
    assert compiled is not None and passes(compiled, is_right)
    faults = [
        fault
        for fault in chosen_faults(source, each=1)
        if not any(re.search(pattern, f"{variant}: {fault.shown(source)}") for pattern in EQUIVALENT)
    ]
    survivors, num_compiled = survivors_of(source, bench, faults, is_right)
    assert not survivors, "\n".join(fault.shown(source) for fault in survivors)
    assert num_compiled > least
