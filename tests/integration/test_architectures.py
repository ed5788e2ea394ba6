"""Which architectures of transformers generate.py serves: token for token as `model.generate`, or
refused with one line.
"""

import io
from pathlib import Path

import pytest
import torch
import transformers

import generate
from common.generation.conversation import Chat
from conftest import exit_code_in_process, quick
from language_models import CHAT_TEMPLATE, train_byte_bpe

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KEYS = {"num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}
SERVED = {  # model_type: its settings
    "bart": {  # alone: its decoder
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_ffn_dim": 64,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 128,
        "is_encoder_decoder": False,
        "is_decoder": True,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 2},
    "codegen": {**GPT, "n_ctx": 128, "rotary_dim": 4},
    "cohere": {**COMMON, **KEYS},
    "falcon": {**COMMON, "num_kv_heads": 2, "new_decoder_architecture": True},
    "gemma": {**COMMON, **KEYS, "head_dim": 8},
    "gemma2": {**COMMON, **KEYS, "head_dim": 8, "sliding_window": 6},
    "gemma4_text": {
        **{**COMMON, **KEYS, "head_dim": 8, "global_head_dim": 16, "sliding_window": 6},
        **{"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 8},
        "vocab_size_per_layer_input": 512,
    },
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        **{name: value for name, value in COMMON.items() if "hidden_layers" not in name},
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 6,
    },
    "gpt_neox": COMMON,
    "gptj": {**GPT, "rotary_dim": 4},
    "granite": {**COMMON, **KEYS},
    "llama": {**COMMON, **KEYS},
    "mistral": {**COMMON, **KEYS, "sliding_window": 6},
    "mixtral": {**COMMON, **KEYS, "num_local_experts": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2},
    "olmo": {**COMMON, **KEYS},
    "opt": {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": {**COMMON, **KEYS},
    "phi3": {**COMMON, **KEYS},
    "qwen2": {**COMMON, **KEYS},
    "qwen3": {**COMMON, **KEYS, "head_dim": 8},
    "stablelm": {**COMMON, **KEYS},
    "starcoder2": {**COMMON, **KEYS},
}
# Models with a recurrent state beside their keys and values: it can't be taken back.
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
HYBRID = {
    "qwen3_5_text": {**COMMON, **KEYS, **LINEAR, "head_dim": 8},
    "qwen3_next": {
        **{**COMMON, **KEYS, **LINEAR, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2},
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "falcon_h1": {**COMMON, **KEYS, **MAMBA, "mamba_d_ssm": 64},
    "bamba": {**COMMON, **KEYS, **MAMBA, "attn_layer_indices": [1]},
    "jamba": {
        **{**COMMON, **KEYS, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        **{"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    },
    "zamba2": {
        **{**COMMON, "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 4},
        **{"chunk_size": 8, "use_mamba_kernels": False},
    },
    "granitemoehybrid": {
        **{**COMMON, **KEYS, **MAMBA, "layer_types": ["mamba", "attention"]},
        **{"num_local_experts": 4, "shared_intermediate_size": 32},
    },
    "olmo_hybrid": {**COMMON, **KEYS, **LINEAR},
    "recurrent_gemma": {
        **{**COMMON, "num_key_value_heads": 1, "num_hidden_layers": 3},
        **{"lru_width": 32, "attention_window_size": 16},
    },
}
REFUSED = {
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "minimax": {
        **{**COMMON, **KEYS, "num_local_experts": 4, "block_size": 8},
        "layer_types": ["full_attention", "linear_attention"],
    },
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "xlstm": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "chunk_size": 8},
    "openai-gpt": GPT,
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 128},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}


def save(folder: Path, model_type: str, settings: dict) -> Path:
    """Write a random model of an architecture with a tokenizer."""
    tokenizer = train_byte_bpe()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**settings, "vocab_size": len(tokenizer)})
    kind = transformers.T5ForConditionalGeneration if model_type == "t5" else None
    model = kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


def run(capsys, folder: Path, *flags: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of generate.py for two prompts of different lengths."""
    command = ["--model", str(folder), "--device", "cpu", "--precision", "fp32", "--max-new-tokens", "12"]
    command += ["--prompt", "The quick brown fox", "--prompt", "Why", *flags]
    return exit_code_in_process(generate, command), *capsys.readouterr()


# one for each way to tell positions apart, to share keys, to look back, and to order a block
QUICK = ("bart", "gemma2", "gpt2", "gptj", "mistral", "mixtral")


@pytest.mark.parametrize("model_type", quick(SERVED.keys(), *QUICK))
def test_its_tokens_are_those_of_generate(model_type, tmp_path, capsys):
    folder = save(tmp_path / model_type, model_type, SERVED[model_type])
    for flags in ([], ["--top-k", "20", "--repetition-penalty", "1.2"], ["--lookup", "3"]):
        code, stdout, stderr = run(capsys, folder, *flags, "--check")
        assert code == 0, stdout + stderr


@pytest.mark.parametrize("model_type", quick(list(HYBRID), "recurrent_gemma"))
def test_a_hybrids_tokens_are_those_of_generate_and_guesses_are_refused(model_type, tmp_path, capsys):
    """Texts of different lengths in a batch, beams that swap their states; a wrong guess would stay
    in the state, and with it in the text.
    """
    folder = save(tmp_path / model_type, model_type, HYBRID[model_type])
    for flags in ([], ["--top-k", "20", "--repetition-penalty", "1.2"], ["--num-beams", "3"]):
        code, stdout, stderr = run(capsys, folder, *flags, "--check")
        assert code == 0, stdout + stderr
    code, _, stderr = run(capsys, folder, "--lookup", "3")
    assert code == 2 and "--lookup 3" in stderr and len(stderr.splitlines()) == 1, stderr
    code, together, stderr = run(capsys, folder, "--top-k", "20", "--sampler", "independent")
    alone = run(capsys, folder, "--top-k", "20", "--sampler", "independent", "--batch-size", "1")
    if model_type == "recurrent_gemma":
        assert code == 2 and "--batch-size 1" in stderr and alone[0] == 0
    else:
        assert together == alone[1]  # the padding of its neighbours is no text


@pytest.mark.parametrize("model_type", quick([*HYBRID, "bart", "llama", "mistral"], "jamba"))
def test_a_conversation_reads_only_what_is_new_where_its_cache_can_forget(
    model_type, tmp_path, capsys, monkeypatch
):
    """Oracle: a cache that is made anew for each turn."""
    folder = save(tmp_path / model_type, model_type, {**SERVED, **HYBRID}[model_type])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    command = ["--model", str(folder), "--device", "cpu", "--precision", "fp32", "--max-new-tokens", "6"]
    answers = []
    for _ in range(2):
        lines = io.StringIO("Why is it?\nThe quick\nWhy\n")
        monkeypatch.setattr("sys.stdin", lines)
        assert exit_code_in_process(generate, [*command, "--plain-step", "--interactive"]) == 0
        answers.append(capsys.readouterr().out)
        monkeypatch.setattr(
            Chat, "_reusable_cache", lambda chat, ids: chat.run.language_model.model.new_cache()
        )
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize("model_type", REFUSED)
def test_it_is_refused_in_one_line(model_type, tmp_path, capsys):
    code, stdout, stderr = run(capsys, save(tmp_path / model_type, model_type, REFUSED[model_type]))
    assert (code, stdout, len(stderr.splitlines())) == (2, "", 1) and "--model" in stderr, stderr


def test_a_model_that_ignores_the_cache_that_it_takes_is_refused(tmp_path, capsys, monkeypatch):
    """It would read each token as if it were the first, and write on without a word."""
    folder, kind = save(tmp_path / "gpt2", "gpt2", GPT), transformers.GPT2LMHeadModel
    forward = kind.forward

    def forgetful(self, input_ids=None, past_key_values=None, position_ids=None, **options):
        return forward(self, input_ids, position_ids=position_ids, **options)

    monkeypatch.setattr(kind, "forward", forgetful)
    code, _, stderr = run(capsys, folder)
    assert code == 2 and "cache" in stderr and len(stderr.splitlines()) == 1
