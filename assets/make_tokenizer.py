"""Train the small tokenizer of the built-in world on its prompts, questions, answers; writes tokenizer.json.

A byte-level BPE laid out as that of Qwen2: NFC, the same split into words, then bytes, and the special tokens
after the vocabulary, so that llm.py reads both files alike; but lower case, as all texts of that world. At
most 512 tokens, 256 of them the bytes: any text can be written, in any language. The same corpus gives the
same file. The shipped one is older than the plans and places that prompts and questions now have; a
checkpoint of train_t2i.py carries its own.
    python assets/make_tokenizer.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llm import SYSTEM
from shapes import Scene
from train_t2i import converse

SIZE, SCENES = 512, 5000
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>"]     # Qwen2's, Scale-RAE's
# Words as Qwen2 splits them, from its tokenizer.json: English contractions, letters after at most one other
# character, single digits, punctuation with the newlines after it, newlines, spaces.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")


def corpus():
    """All text that a conversation on the built-in world is made of, piece by piece."""
    yield from (SYSTEM, "system\n", "user\n", "assistant\n")
    for index in range(SCENES):
        for questions in (0.0, 1.0):
            for _, text in converse(Scene.random(0, index), np.random.default_rng(index), questions):
                yield from text.split("<image>")


def build():
    """The trained tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase()]), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=SIZE - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


if __name__ == "__main__":
    target = Path(__file__).with_name("tokenizer.json")
    tokenizer = build()
    tokenizer.save(str(target), pretty=False)
    sample = Scene.random(0, 0).caption()
    print(f"{target}: {tokenizer.get_vocab_size()} tokens; {tokenizer.encode(sample).tokens}")
