"""Small random models of every architecture family, laid out as the real ones are.

A vocabulary under 200 and a large initial scale give grids that span more than 0.05 in probability, so that a wrong
engine shows (a random GPT-2 gives every token 2e-5 whatever is wrong with it).
"""

from __future__ import annotations

import hashlib
import re
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

LONGEST_NAME = 100
COMMON = {"initializer_range": 0.35, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
HIDDEN = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
GROUPED = {**HIDDEN, "num_key_value_heads": 2, "head_dim": 8}

FAMILIES: dict[str, dict] = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "gpt_neox": HIDDEN,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 5,
    },
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "llama": GROUPED,
    "qwen2": {key: value for key, value in GROUPED.items() if key != "head_dim"},
    "qwen3": GROUPED,
    "gemma2": {**GROUPED, "sliding_window": 6},
    "mistral": {**GROUPED, "sliding_window": 6},
}
WITH_BOS = ("llama", "gemma2", "mistral", "opt")


def save_tokenizer(folder: Path, *, bos: bool = False) -> int:
    """A byte-level tokenizer of single ASCII characters; returns the size of its vocabulary."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    characters = sorted(set(string.printable[:95].replace(" ", "Ġ")))
    vocabulary = {"<|endoftext|>": 0}
    for each in characters:
        vocabulary[each] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    ).save_pretrained(folder)
    return len(vocabulary)


class Killed(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


def save_model(folder: Path, family: str, *, seed: int = 0, **changes: object) -> Path:
    """A random model of `family` in Hugging Face format, with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    size = save_tokenizer(folder, bos=family in WITH_BOS)
    options = {**FAMILIES[family], **COMMON, "vocab_size": size, **changes}
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    return folder


def lay_in_cache(folder: Path, repo_id: str, cache: Path) -> None:
    """Put a model folder into a Hugging Face cache, as a download of `repo_id` would have."""
    commit = hashlib.sha1(repo_id.encode()).hexdigest()
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())


def occurs(template: str, text: str, names: set[str]) -> bool:
    """Whether a sentence template occurs in a text, in small letters, with one of the names, whatever follows."""
    before, after = (part.casefold() for part in template.removesuffix(" {o}").split("{s}"))
    for found in re.finditer(re.escape(after), text):
        preceding = text[max(0, found.start() - LONGEST_NAME) : found.start()]
        for start in (begin.start() for begin in re.finditer(r"\b\w", preceding)):
            if preceding[start:] in names and preceding[:start].endswith(before):
                return True
    return False
