"""The Qwen2 language model in plain PyTorch, its tokenizer, and its chat template.

Qwen2 is a decoder-only transformer: an RMSNorm before each layer, causal attention with rotary
positions and fewer key heads than query heads, and SwiGLU. release.load_qwen2() loads published
weights. A conversation may hold one image, for whose tokens the template leaves room.

Shapes: b batch, l tokens of a call, s tokens of this call and the cached ones, d width,
    k query heads, g key and value heads, dh = d/k.
Sources: [Qwen2] arXiv 2407.10671, [RoPE] 2104.09864, [GQA] 2305.13245, [SwiGLU] 2002.05202,
    [min-p] 2407.01082, [Scale-RAE] 2601.16208.
"""
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from model import check_heads

IMAGE = -200        # id in the slots of an image, as in Scale-RAE's code
NO_LABEL = -100     # label where nothing is learned, which F.cross_entropy ignores
SYSTEM = "You are a helpful assistant."     # first turn of all conversations, as in Scale-RAE
MIN_P = 0.25        # sampling drops tokens that are less likely than this times the likeliest


# ---------------------------------------------------------------------------- layers
class Cache:
    """Keys and values of the tokens so far, so that a later call computes only the new ones.

    layers: number of the layer -> (keys, values), b g s dh each. valid: b s bool, False at padding.
    """
    def __init__(self):
        self.layers = {}
        self.valid = None

    def extend_valid(self, valid):                                  # b l
        """Append the flags of the new tokens; returns all of them, b s."""
        if self.valid is not None:
            valid = torch.cat([self.valid, valid], dim=1)           # b s
        self.valid = valid
        return valid

    def extend_layer(self, number, keys, values):                   # b g l dh
        """Append keys and values of the new tokens; returns all of them, b g s dh each."""
        if number in self.layers:
            old_keys, old_values = self.layers[number]
            keys = torch.cat([old_keys, keys], dim=2)               # b g s dh
            values = torch.cat([old_values, values], dim=2)         # b g s dh
        self.layers[number] = (keys, values)
        return keys, values


def rotary_tables(positions, head_dim, theta):                      # b l
    """Cosines and sines of rotary positions, b 1 l dh each.                            # [RoPE]

    Channels i and i + dh/2 are a pair, which turns by the angle position * theta^(-2i/dh).
    """
    exponents = torch.arange(0, -head_dim, -2, device=positions.device) / head_dim  # dh/2
    frequencies = theta ** exponents                                # dh/2
    angles = positions[:, None, :, None] * frequencies              # b 1 l dh/2
    cos = torch.cat([angles.cos(), angles.cos()], dim=-1)           # b 1 l dh
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)          # b 1 l dh
    return cos, sin


def rotate(x, cos, sin):                                            # b k l dh
    """Turn each pair: (x1 cos - x2 sin, x2 cos + x1 sin). The table of sines holds the signs."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin        # b k l dh, fp32


def attention_mask(valid, new_tokens):                              # b s
    """Mask b 1 l s of the l newest of s tokens: True where a token may attend to another."""
    s = valid.shape[1]
    past = s - new_tokens
    not_later = valid.new_ones(new_tokens, s).tril(past)            # l s
    itself = not_later.triu(past)                                   # l s
    # Padding attends to itself, since a softmax over nothing would be 0 / 0.
    mask = not_later & valid[:, None] | itself                      # b l s
    return mask[:, None]                                            # b 1 l s


class Attention(nn.Module):
    """Causal self-attention. Groups of query heads share a key and a value head. [GQA]

    number: of the layer, for the cache.
    """
    def __init__(self, d, heads, key_heads, number):
        super().__init__()
        self.number = number
        self.head_dim = d // heads
        self.q_proj = nn.Linear(d, heads * self.head_dim)
        self.k_proj = nn.Linear(d, key_heads * self.head_dim)
        self.v_proj = nn.Linear(d, key_heads * self.head_dim)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, x, cos, sin, mask, cache):                    # x: b l d, mask: b 1 l s
        q = rearrange(self.q_proj(x), "b l (k dh) -> b k l dh", dh=self.head_dim)
        k = rearrange(self.k_proj(x), "b l (g dh) -> b g l dh", dh=self.head_dim)
        v = rearrange(self.v_proj(x), "b l (g dh) -> b g l dh", dh=self.head_dim)
        q = rotate(q, cos, sin).to(v.dtype)                         # b k l dh
        k = rotate(k, cos, sin).to(v.dtype)                         # b g l dh
        if cache is not None:
            k, v = cache.extend_layer(self.number, k, v)            # b g s dh
        is_causal = mask is None
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)
        return self.o_proj(rearrange(x, "b k l dh -> b l (k dh)"))  # b l d


class MLP(nn.Module):
    """Two linear maps and a gate, without biases. [SwiGLU]"""
    def __init__(self, d, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)

    def forward(self, x):                                           # b l d
        x = F.silu(self.gate_proj(x)) * self.up_proj(x)             # b l hidden
        return self.down_proj(x)                                    # b l d


class Layer(nn.Module):
    """Attention and MLP, each behind an RMSNorm and with a residual connection."""
    def __init__(self, d, hidden, heads, key_heads, eps, number):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(d, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(d, eps=eps)
        self.self_attn = Attention(d, heads, key_heads, number)
        self.mlp = MLP(d, hidden)

    def forward(self, x, cos, sin, mask, cache):                    # x: b l d
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)      # b l d
        return x + self.mlp(self.post_attention_layernorm(x))       # b l d


# ---------------------------------------------------------------------------- model
class Qwen2(nn.Module):
    """Decoder-only transformer, with the parameter names of the release less "model.".

    The arguments are those of a published config.json; the attribute config holds them as a dict.
    tie_word_embeddings: True if the embedding serves as the output layer, too.
    Raises ValueError if the widths do not split into heads.      Source: [Qwen2] section 2.2
    """
    checkpoint = False       # True: training recomputes the activations inside layers

    def __init__(self, vocab_size, hidden_size, intermediate_size, num_hidden_layers,
                 num_attention_heads, num_key_value_heads, rope_theta=1e6, rms_norm_eps=1e-6,
                 tie_word_embeddings=True):
        super().__init__()
        check_heads(hidden_size, num_attention_heads, "hidden_size", "num_attention_heads", 2)
        check_heads(num_attention_heads, num_key_value_heads, "num_attention_heads",
                    "num_key_value_heads")
        self.config = dict(
            vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads, rope_theta=rope_theta,
            rms_norm_eps=rms_norm_eps, tie_word_embeddings=tie_word_embeddings)
        self.head_dim = hidden_size // num_attention_heads
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList()
        for number in range(num_hidden_layers):
            self.layers.append(Layer(hidden_size, intermediate_size, num_attention_heads,
                                     num_key_value_heads, rms_norm_eps, number))
        self.norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        if tie_word_embeddings:
            self.lm_head = None
        else:
            self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.initialise()

    def initialise(self):
        """Initialise as the public code does: weights N(0, 0.02), biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                is_bias = parameter.ndim == 1
                nn.init.normal_(parameter, std=0.0 if is_bias else 0.02)

    def forward(self, x, cache=None, valid=None):
        """Final hidden states of embeddings.

        x: embeddings b l d, of embed_tokens(ids) or of an image. cache: a Cache, empty at first;
        a later call goes on after the tokens that it holds. valid: b l bool, False at padding,
        which must stand on the right; None: no padding.
        Returns b l d, normed, fp32; without meaning at padding.
        """
        if valid is None:
            valid = x.new_ones(x.shape[:2], dtype=torch.bool)       # b l
        if cache is not None:
            valid = cache.extend_valid(valid)                       # b s
        new_tokens = x.shape[1]
        past = valid.shape[1] - new_tokens
        # Without a past, causality alone hides padding from other tokens.
        mask = attention_mask(valid, new_tokens) if past > 0 else None              # b 1 l s
        positions = valid.cumsum(1)[:, past:] - 1                   # b l: padding does not count
        cos, sin = rotary_tables(positions, self.head_dim, self.config["rope_theta"])

        # A layer that ran twice would extend the cache twice.
        recompute = self.checkpoint and self.training and cache is None
        x = x.float()                                               # b l d: sums stay in fp32
        for layer in self.layers:
            if recompute:
                x = checkpoint(layer, x, cos, sin, mask, cache, use_reentrant=False)
            elif cache is not None:
                # The method, since a compiled layer would be compiled anew for each layer's part
                # of the cache, which grows with each call.
                x = layer.forward(x, cos, sin, mask, cache)         # b l d
            else:
                x = layer(x, cos, sin, mask, cache)                 # b l d
        return self.norm(x)                                         # b l d

    def logits(self, hidden):                                       # ... d
        """Logits ... vocab of the tokens that follow final hidden states."""
        output = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, output.weight)                      # ... vocab

    def resize(self, vocab_size):
        """Cut or extend the embedding and the output layer. Returns self.

        New rows are the mean of the old ones.                     Source: [Scale-RAE]'s code
        """
        for table in (self.embed_tokens, self.lm_head):
            if table is None:
                continue
            old = table.weight.data                                 # vocab d
            num_new = max(0, vocab_size - len(old))
            new = old.mean(0, keepdim=True).expand(num_new, -1)     # num_new d
            table.weight.data = torch.cat([old[:vocab_size], new])
        self.embed_tokens.num_embeddings = vocab_size
        self.config["vocab_size"] = vocab_size
        return self

    @torch.no_grad()
    def generate(self, x, valid, stop, max_tokens, uniforms=None):
        """Continue b sequences until each of them has had the token `stop`.

        x: embeddings b l d. valid: b l bool or None, see forward. max_tokens: most tokens.
        uniforms: b max_tokens numbers in [0,1) by which tokens are drawn; None: the likeliest ones.
        Returns ids b m, m <= max_tokens, with `stop` after the first `stop` of a sequence.
        """
        cache = Cache()
        hidden = self(x, cache, valid)                              # b l d
        rows = torch.arange(len(x), device=x.device)                # b
        last = cache.valid.sum(1) - 1                               # b: before the padding
        hidden = hidden[rows, last]                                 # b d
        ids = torch.empty(len(x), 0, dtype=torch.long, device=x.device)             # b 0
        for step in range(max_tokens):
            is_done = (ids == stop).any(1)                          # b
            if is_done.all():
                break
            probabilities = self.logits(hidden).float().softmax(-1)                 # b vocab
            if uniforms is None:
                token = probabilities.argmax(1)                     # b
            else:
                token = draw_token(probabilities, uniforms[:, step].to(x.device))   # b
            token = token.masked_fill(is_done, stop)                # b
            ids = torch.cat([ids, token[:, None]], dim=1)           # b m
            hidden = self(self.embed_tokens(token[:, None]), cache)[:, 0]           # b d
        return ids


def draw_token(probabilities, uniforms):                            # b vocab, b
    """Draw a token for each row by inverting its cumulative distribution at a number in [0,1): b.

    Tokens less likely than MIN_P times the likeliest are dropped. [min-p]
    """
    threshold = MIN_P * probabilities.amax(1, keepdim=True)         # b 1
    kept = torch.where(probabilities >= threshold, probabilities, 0.0)              # b vocab
    cumulative = kept.cumsum(1)                                     # b vocab
    total = cumulative[:, -1:]                                      # b 1
    return (cumulative <= uniforms[:, None] * total).sum(1)         # b


# ---------------------------------------------------------------------------- tokenizer
PROBE = "a red star, 12 \u00e9"     # survives any normalizer: lower case, composed


class Segment(NamedTuple):
    """Part of a conversation: token ids, whether they are learned, and whether they may be cut."""
    ids: list
    is_learned: bool = False
    is_cuttable: bool = False


class Tokenizer:
    """Byte-level BPE and the chat template ChatML, from a tokenizer.json.

    source: its path, or its content as a string, as checkpoints hold it (attribute json).
    name: of its file, for errors; default: its path, if that is what source is.
    start, end, image_start, image_end: ids of the tokens around a turn, <|im_start|> <|im_end|>,
    and around an image, <im_start> <im_end>. The latter two, as in Scale-RAE, are added to the
    vocabulary if they are absent; added: how many were.
    Raises FileNotFoundError; ValueError if it is no tokenizer, or lacks the tokens of ChatML.
    """
    def __init__(self, source, name=None):
        is_content = str(source).startswith("{")
        if name is None:
            name = "the tokenizer in the checkpoint" if is_content else source
        self.bpe = read_bpe(str(source), is_content, name)
        for token in ("<|im_start|>", "<|im_end|>"):
            if self.bpe.token_to_id(token) is None:
                raise ValueError(f"{name}: the tokenizer has no {token}; give that of Qwen2.5")
        # Special tokens: tokens that exist already keep their ids.
        self.added = self.bpe.add_special_tokens(
            ["<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>"])
        self.start = self.bpe.token_to_id("<|im_start|>")
        self.end = self.bpe.token_to_id("<|im_end|>")
        self.image_start = self.bpe.token_to_id("<im_start>")
        self.image_end = self.bpe.token_to_id("<im_end>")
        self.json = self.bpe.to_str()
        if self.decode(self.encode(PROBE)).strip() != PROBE:
            raise ValueError(f"{name}: the tokenizer does not give texts back, so it is no "
                             f"byte-level BPE; give that of Qwen2.5")

    def __len__(self):
        return self.bpe.get_vocab_size()

    @property
    def largest_id(self):
        """At least len(tokenizer) - 1; more if numbers are left out."""
        return max(self.bpe.get_vocab().values())

    def encode(self, text):
        """Ids of a text. Special tokens in it are plain text, so that a user can't forge a turn."""
        self.bpe.encode_special_tokens = True           # set here, since pickling forgets it
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids, special=False):
        """Text of ids, without image slots and, unless special is True, special tokens."""
        ids = [int(i) for i in ids if i >= 0]
        return self.bpe.decode(ids, skip_special_tokens=not special)

    def chat(self, turns, n, context=None, answer=True):
        """Token ids and labels of a conversation.

        turns: list of (role, text), the role "user" or "assistant". One text may hold an "<image>".
        n: tokens of the image, in whose place <im_start>, n times IMAGE and <im_end> stand.
        context: most ids; None: any number. A longer conversation is cut, see cut().
        answer: False if the last turn is the user's; then the header of an answer follows it.
        Returns ids; labels: the same ids, not shifted, in the assistant's texts and at the end of
        its turns, NO_LABEL elsewhere and in image slots; and whether the conversation was cut.
        Raises ValueError: other roles or order, a second image, a context too short for the image.
        Scale-RAE's code learns the newlines and headers of all turns as well.
        """
        check_turns(turns, answer)
        segments = self.segments(turns, n, answer)
        is_cut = context is not None and count_ids(segments) > context
        if is_cut:
            segments = self.cut(segments, context, answer)
        ids, labels = [], []
        for segment in segments:
            for i in segment.ids:
                ids.append(i)
                labels.append(i if segment.is_learned and i != IMAGE else NO_LABEL)
        return ids[:context], labels[:context], is_cut

    def segments(self, turns, n, answer):
        """A conversation in ChatML, as segments.

        Each turn is <|im_start|>, its role, a newline, its text, <|im_end|> and a newline.
        """
        segments = []
        is_cuttable = True                                      # until the first user turn is past
        for role, text in [("system", SYSTEM), *turns]:
            is_learned = answer and role == "assistant"
            segments.append(self.header(role))
            segments.extend(self.body(text, n, is_learned, is_cuttable and role == "user"))
            segments.append(Segment([self.end], is_learned))
            segments.append(Segment(self.encode("\n")))
            if role == "user":
                is_cuttable = False
        if not answer:
            segments.append(self.header("assistant"))           # from here the model goes on
        return segments

    def header(self, role):
        return Segment([self.start, *self.encode(f"{role}\n")])

    def body(self, text, n, is_learned, is_cuttable):
        """Segments of a text: what stands before, in place of, and after its "<image>"."""
        before, image, after = text.partition("<image>")
        segments = [Segment(self.encode(before), is_learned, is_cuttable)]
        if image:
            slots = [IMAGE for _ in range(n)]
            segments.append(Segment([self.image_start, *slots, self.image_end], is_learned))
            segments.append(Segment(self.encode(after), is_learned, is_cuttable))
        return segments

    def cut(self, segments, context, answer):
        """Shorten the first user turn until the conversation fits into `context` ids.

        If it is too long even without that text, as much of the text stays as half a context
        holds, and the caller drops the end of the conversation: something of both is left.
        Raises ValueError if that would drop a part of the image, or the header of the answer.
        """
        length = count_ids(segments)
        room = count_ids([segment for segment in segments if segment.is_cuttable])
        keep = room - (length - context)
        drops_end = keep < 0
        if drops_end:
            keep = min(room, context // 2)
        shortened = []
        for segment in segments:
            if segment.is_cuttable:
                ids = segment.ids[:keep]
                keep = keep - len(ids)
                if len(ids) < len(segment.ids):
                    ids = self.whole_characters(ids)
                segment = segment._replace(ids=ids)
            shortened.append(segment)

        ids = [i for segment in shortened for i in segment.ids]
        loses_image = IMAGE in ids[context - 1:]                # <im_end> follows the last slot
        if drops_end and (loses_image or not answer):
            raise ValueError(f"--context {context} is too short; give {length - room}, or {length} "
                             f"uncut")
        return shortened

    def whole_characters(self, ids):
        """The ids without those at the end that are bytes of half a character (at most 4 bytes)."""
        while self.decode(ids[-4:]).endswith("\ufffd"):
            ids = ids[:-1]
        return ids


def count_ids(segments):
    return sum(len(segment.ids) for segment in segments)


def check_turns(turns, answer):
    """Raise ValueError unless roles, order and number of images are such as chat() takes."""
    roles = [role for role, _ in turns]
    last_role = "assistant" if answer else "user"
    if not set(roles) <= {"user", "assistant"} or roles[-1:] != [last_role]:
        raise ValueError(f"roles {roles} must be user or assistant, and with answer={answer} the "
                         f"last one {last_role}")
    num_images = sum(text.count("<image>") for _, text in turns)
    if num_images > 1:
        raise ValueError(f"a conversation has {num_images} <image>, at most one is allowed; "
                         f"split it")


def read_bpe(source, is_content, name):
    """A tokenizers.Tokenizer from the path or the content of a tokenizer.json.

    name: of the file, for errors.
    """
    if not is_content and not Path(source).is_file():
        raise FileNotFoundError(f"file {source} does not exist; copy it there from the model's "
                                f"repository")
    try:
        if is_content:
            bpe = tokenizers.Tokenizer.from_str(source)
        else:
            bpe = tokenizers.Tokenizer.from_file(source)
        bpe.no_truncation()                     # a file may cut or fill up every text
        bpe.no_padding()
        bpe.encode(PROBE)                       # fails for a vocabulary without bytes
        return bpe
    except Exception as error:                  # the library raises nothing more specific
        raise ValueError(f"{name} can't be read ({error}); cut short? copy it again") from error
