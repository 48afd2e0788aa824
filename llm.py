"""The Qwen2 language model in plain PyTorch, its tokenizer and its chat template with slots for one image.

Source: [Qwen2] arXiv 2407.10671, [RoPE] 2104.09864, [GQA] 2305.13245, [Scale-RAE] 2601.16208.
Shapes: b batch, l tokens of a call, s those and the cached, d width, k heads, dh = d/k, g key heads.
"""
import json
from pathlib import Path

import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from model import fetching, load_strict, require_heads

IMAGE, SYSTEM = -200, "You are a helpful assistant."    # id of an image slot, system text: as in Scale-RAE


class Cache(dict):
    """What a call of Qwen2 leaves to the next: layer's number: [keys, values], b g s dh; valid: b s bool."""
    valid = None


class Layer(nn.Module):
    """Pre-norm transformer layer, causal; k/g query heads share a key and value head. [RoPE], [GQA]"""
    def __init__(self, d, hidden, heads, groups, eps):
        super().__init__()
        self.dh, kv = d // heads, d // heads * groups
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(d, eps=eps) for _ in range(2))
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(d, d), "k_proj": nn.Linear(d, kv),
                                        "v_proj": nn.Linear(d, kv), "o_proj": nn.Linear(d, d, bias=False)})
        self.mlp = nn.ModuleDict({name: nn.Linear(*sizes, bias=False) for name, *sizes in (
            ("gate_proj", d, hidden), ("up_proj", d, hidden), ("down_proj", hidden, d))})

    def forward(self, x, cos, sin, mask, past):                         # x: b l d, mask: b 1 l s
        a, heads, mlp = self.input_layernorm(x), self.self_attn, self.mlp
        q, k, v = (rearrange(heads[f"{i}_proj"](a), "b l (k dh) -> b k l dh", dh=self.dh) for i in "qkv")
        q, k = ((y * cos + y.roll(self.dh // 2, -1) * sin).to(v.dtype) for y in (q, k))        # in fp32
        if past is not None:                                            # [], or keys and values so far
            past[:] = k, v = [torch.cat(pair, 2) for pair in zip(past, (k, v))] or (k, v)      # b g s dh
        a = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        x = x + heads.o_proj(rearrange(a, "b k l dh -> b l (k dh)"))    # b l d
        a = self.post_attention_layernorm(x)                            # b l d
        return x + mlp.down_proj(F.silu(mlp.gate_proj(a)) * mlp.up_proj(a))     # b l d


class Qwen2(nn.Module):
    """Decoder-only transformer; arguments (dict: config) and parameter names of the release, less "model.".

    forward: embeddings x b l d (embed_tokens(ids), or images); a Cache, empty at first, with which a later
        call goes on; valid b l bool, False at padding, only on the right -> normed hidden states b l d, fp32,
        without meaning at padding. checkpoint = True: less memory in training, each layer runs twice.
    Raises ValueError if widths don't split into heads. Source: [Qwen2] 2.2, initialised as the public code.
    """
    def __init__(self, vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
                 num_key_value_heads, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True):
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        require_heads(hidden_size, num_attention_heads, "hidden_size", "num_attention_heads", multiple=2)
        require_heads(num_attention_heads, num_key_value_heads, "num_attention_heads", "num_key_value_heads")
        sizes = (hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, rms_norm_eps)
        self.embed_tokens, self.checkpoint = nn.Embedding(vocab_size, hidden_size), False
        self.layers = nn.ModuleList(Layer(*sizes) for _ in range(num_hidden_layers))
        self.norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        self.lm_head = None if tie_word_embeddings else nn.Linear(hidden_size, vocab_size, bias=False)
        for weight in (w for name, w in self.named_parameters() if "norm" not in name):
            nn.init.normal_(weight, std=0.02 * (weight.ndim == 2))      # biases 0

    def forward(self, x, cache=None, valid=None):                       # x: b l d, valid: b l
        valid = x.new_ones(x.shape[:2], dtype=torch.bool) if valid is None else valid
        mask, dim = None, self.layers[0].dh                             # causality hides padding on the right
        if cache is not None:
            valid = cache.valid = valid if cache.valid is None else torch.cat([cache.valid, valid], 1)  # b s
        if past := valid.shape[1] - x.shape[1]:
            mask = valid.new_ones(x.shape[1], valid.shape[1]).tril(past)                       # l s
            mask = (mask & valid[:, None] | mask.triu(past))[:, None]   # b 1 l s: each sees itself, no 0 / 0
        freqs = self.config["rope_theta"] ** (torch.arange(0, -dim, -2, device=x.device) / dim)     # dh/2
        angle = (valid.cumsum(1) - 1)[:, None, past:, None] * freqs     # b 1 l dh/2: padding doesn't count
        cos, sin = (torch.cat(y, -1) for y in ([angle.cos()] * 2, [-angle.sin(), angle.sin()]))     # b 1 l dh
        twice, x = self.checkpoint and self.training and cache is None, x.float()       # sums stay in fp32
        for i, layer in enumerate(self.layers):
            how = x, cos, sin, mask, None if cache is None else cache.setdefault(i, [])
            x = checkpoint(layer, *how, use_reentrant=False) if twice else layer(*how)         # b l d
        return self.norm(x)                                             # b l d

    def logits(self, hidden):                                           # ... d -> ... vocab
        return F.linear(hidden, (self.lm_head or self.embed_tokens).weight)

    def resize(self, n):             # to n rows of embedding and head; new ones are the mean of the old ones
        for table in filter(None, (self.embed_tokens, self.lm_head)):
            new = table.weight.data.mean(0, keepdim=True).expand(max(0, n - len(table.weight)), -1)
            table.weight.data = torch.cat([table.weight.data[:n], new])
        self.config["vocab_size"] = self.embed_tokens.num_embeddings = n
        return self

    @torch.no_grad()
    def generate(self, x, valid, stop, most, luck=None):                # x: b l d, valid: b l or None
        """The likeliest tokens, at most `most`, till all rows have had `stop`: b m, stop after stop.
        luck: b most in [0,1): drawn by it from those at least 1/4 as likely as the likeliest. 2407.01082"""
        cache, ids = Cache(), x.new_empty(len(x), 0, dtype=torch.long)  # b 0
        least, luck = (1.0, x.new_zeros(len(x), most)) if luck is None else (0.25, luck.to(x.device))
        x = self(x, cache, valid)[torch.arange(len(x), device=x.device), cache.valid.sum(1) - 1]    # b d
        while ids.shape[1] < most and not (done := (ids == stop).any(1)).all():
            p = self.logits(x).float().softmax(-1)                      # b vocab
            p = (p * (p >= least * p.amax(1, keepdim=True))).cumsum(1)  # b vocab
            new = (p <= luck[:, ids.shape[1], None] * p[:, -1:]).sum(1).masked_fill(done, stop)     # b
            ids = torch.cat([ids, new[:, None]], 1)                     # b m
            x = self(self.embed_tokens(new[:, None]), cache)[:, 0]      # b d
        return ids


class Tokenizer:
    """Byte-level BPE and ChatML, of a tokenizer.json: its path, or its content (json: for checkpoints).

    Adds Scale-RAE's <im_start>, <im_end> if absent; start, end, image_start, image_end: ids around a turn, an
    image. Raises FileNotFoundError; ValueError if it is no tokenizer or lacks the tokens of ChatML.
    """
    def __init__(self, source):
        bpe, names = tokenizers.Tokenizer, ["<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>"]
        self.bpe = bpe.from_str(source) if f"{source}"[:1] == "{" else read(source, bpe.from_file)
        if None in map(self.bpe.token_to_id, names[:2]):
            raise ValueError(f"the tokenizer has no {names[0]} or {names[1]}; give that of Qwen2.5")
        self.added = self.bpe.add_special_tokens(names)     # how many; those present keep their ids
        self.start, self.end, self.image_start, self.image_end = map(self.bpe.token_to_id, names)
        self.json = self.bpe.to_str()

    def __len__(self):
        return self.bpe.get_vocab_size()

    def encode(self, text):
        self.bpe.encode_special_tokens = True               # as text: no injection; a pickle forgets it
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids, special=False):                   # without image slots, special tokens if not asked
        return self.bpe.decode([int(i) for i in ids if i >= 0], skip_special_tokens=not special)

    def chat(self, turns, n, context=None, answer=True):
        """A conversation as (ids, labels, cut), from pairs of "user" or "assistant" and a text.

        One "<image>" in a text is <im_start>, n IMAGE, <im_end>. answer=False: the last turn is the user's.
        labels: the id (not shifted) in an assistant's text and the <|im_end|> after it, -100 elsewhere and at
            IMAGE. Scale-RAE's code also learns the newlines and headers of every turn; ours does not.
        context: most ids; beyond, the end of the first user turn's text is left out, or if that is too little
            more than half a context of it and the end of all, and cut is True.
        Raises ValueError: other roles or order, a second image, a context too short for an image.
        """
        roles, last = [role for role, _ in turns], "assistant" if answer else "user"
        if roles[-1:] != [last] or {*roles} - {"user", "assistant"}:
            raise ValueError(f"roles {roles} must be user or assistant, with answer={answer} {last} at last")
        if (images := "\n".join(text for _, text in turns).count("<image>")) > 1:
            raise ValueError(f"a conversation has {images} <image>, at most one is allowed; split it")
        slot, parts, soft = [self.image_start, *[IMAGE] * n, self.image_end], [], []
        for role, text in [("system", SYSTEM), *turns, *[("assistant", "")] * (not answer)]:
            texts = [self.encode(piece) for piece in text.split("<image>")]                    # one or two
            body, learn = [texts[0], slot, texts[-1]][:2 * len(texts) - 1], answer and role == "assistant"
            soft = soft or texts * (role == "user")         # of the first user turn: what may be cut
            parts += [([self.start, *self.encode(f"{role}\n")], False),         # ids, are they learnt?
                      *((ids, learn) for ids in [*body, [self.end]]), (self.encode("\n"), False)]
        parts = parts if answer else parts[:-3]             # the last header stays open
        length, room = sum(len(ids) for ids, _ in parts), sum(map(len, soft))
        short = (keep := room - max(0, length - (context or length))) < 0
        keep = min(room, context // 2) if short else keep   # so that both ends leave something
        for ids in soft * (keep < room):                    # in place: parts hold them
            del ids[keep:]
            keep -= len(ids)
            while self.decode(ids[-4:]).endswith("\ufffd"):             # bytes of half a character
                ids.pop()
        ids = [i for ids, _ in parts for i in ids]
        if short and (not answer or IMAGE in ids[context - 1:]):
            raise ValueError(f"--context {context} is too short; give {length - room}, or {length} uncut")
        labels = [i if learn and i != IMAGE else -100 for ids, learn in parts for i in ids]
        return ids[:context], labels[:context], length > (context or length)


def read(path, load):                        # load(path). Raises FileNotFoundError; ValueError if it can't
    if not Path(path).is_file():
        raise FileNotFoundError(f"file {path} does not exist; copy it there from the model's repository")
    try:
        return load(str(path))
    except Exception as error:                              # json, safetensors, tokenizers: each its own
        raise ValueError(f"{path} can't be read ({error}); cut short? copy it again") from error


def read_json(path):
    return read(path, lambda path: dict(json.loads(Path(path).read_text("utf-8"))))


def read_weights(folder):                 # mapped, names as released: of model.safetensors or of its shards
    files, index = [Path(folder) / "model.safetensors"], Path(folder) / "model.safetensors.index.json"
    if index.is_file() and not files[0].is_file():
        files = [index.parent / name for name in {*read_json(index)["weight_map"].values()}]
    return {key: weight for file in files for key, weight in read(file, load_file).items()}


def qwen2_arguments(config, source):
    """The arguments of Qwen2 from the dict of a config.json. Raises ValueError if it is another model's."""
    sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    defaults = {"num_key_value_heads": config.get("num_attention_heads"), "rope_theta": 1e4,
                "rms_norm_eps": 1e-6, "tie_word_embeddings": False}                    # of the public code
    needed = {"hidden_act": "silu", "use_sliding_window": False, "rope_type": "default"}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}           # transformers 5, 4
    config = {**defaults, **needed, "rope_type": rope.get("type", "default"), **config, **rope}
    found = {key: config.get(key) for key in ("model_type", *needed, *sizes)}
    if "qwen" not in str(found["model_type"]) or None in found.values() or found != {**found, **needed}:
        raise ValueError(f"{source} has {found}; give a Qwen2 model, which has numbers and {needed}")
    return {key: config[key] for key in (*sizes, *defaults)}


def load_qwen2(source, folder_flag="--llm"):
    """(Qwen2, Tokenizer), fp32, of a hub name or a folder: config.json, tokenizer.json, model.safetensors, or
    model.safetensors.index.json and its shards. The embedding has the file's rows, not one for each token.
    Raises FileNotFoundError (a file or the hub), ValueError (not Qwen2; keys that don't fit, listed)."""
    wanted = ["config.json", "tokenizer.json", "model.safetensors.index.json", "model*.safetensors"]
    with fetching(f"{folder_flag} {source}: no such folder", f"connect, or copy huggingface.co/{source} to a "
                  f"folder and name it"):
        folder = Path(source if Path(source).is_dir() else snapshot_download(source, allow_patterns=wanted))
    arguments = qwen2_arguments(read_json(folder / "config.json"), source)
    copy = "lm_head.weight" * arguments["tie_word_embeddings"]          # some files hold one of the embedding
    state = {k.removeprefix("model."): v for k, v in read_weights(folder).items() if k != copy}
    with torch.device("meta"):                              # no memory: load_strict needs every key anyway
        model = Qwen2(**arguments)
    return load_strict(model.to_empty(device="cpu"), state, source), Tokenizer(folder / "tokenizer.json")
