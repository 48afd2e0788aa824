"""Train the small tokenizer of the built-in world on its conversations; write tokenizer.json.

    python assets/make_tokenizer.py --out assets/tokenizer.json

A byte-level BPE with the layout of Qwen2's, so that llm.py reads both files alike: NFC, the same
split into words, then bytes, and the special tokens after the vocabulary. Unlike Qwen2's it is
lower case, as all texts of that world. It has at most 512 tokens, 256 of which are the bytes, so it
can write any text in any language. The same corpus gives the same file. The shipped file was made
before conversations had plans and places; a checkpoint of train_t2i.py carries its own tokenizer.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import run_flags
import runtime
import storage
from llm import SYSTEM
from shapes import Scene, converse

VOCABULARY_SIZE = 512        # with the special tokens
SCENES = 5000                # each gives two conversations: one to draw it, one with questions
# The first three are Qwen2's. The last two, around an image, are Scale-RAE's.
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>"]
# Words as Qwen2 splits them. Source: its tokenizer.json
WORDS = "|".join([
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",         # English contractions
    r"[^\r\n\p{L}\p{N}]?\p{L}+",             # letters after at most one other character
    r"\p{N}",                                # single digits
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",            # punctuation with the newlines after it
    r"\s*[\r\n]+",                           # newlines
    r"\s+(?!\S)",                            # spaces, but the one before a word
    r"\s+",
])


def corpus():
    """Yield all text that a conversation about the built-in world consists of, piece by piece."""
    yield SYSTEM
    yield "system\n"
    yield "user\n"
    yield "assistant\n"
    for index in range(SCENES):
        scene = Scene.random(0, index)
        for questions in (0.0, 1.0):                 # draw it; ask about it
            rng = np.random.default_rng(index)
            for _, text in converse(scene, rng, questions):
                yield from text.split("<image>")


def train_tokenizer():
    """Return the trained tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def parse_args(argv=None):
    p = run_flags.Parser(__doc__, {})
    p.add_argument("--out", type=Path, default=Path("tokenizer.json"),
                   help="File to write.")
    return p.parse_args(argv)


def main(args):
    storage.check_out(args.out)
    storage.check_suffix(args.out, [".json"])
    tokenizer = train_tokenizer()
    content = tokenizer.to_str(pretty=False).encode()
    storage.write_whole(args.out, lambda f: f.write(content))
    example = Scene.random(0, 0).caption()
    print(f"{args.out}: {tokenizer.get_vocab_size()} tokens; {tokenizer.encode(example).tokens}")


if __name__ == "__main__":
    runtime.run(main, parse_args)
