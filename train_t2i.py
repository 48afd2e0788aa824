"""Stage 3: text to image. A language model reads the prompt, its states at query tokens condition a DiT.

    python train_t2i.py                                             the built-in world, laptop size
    python train_t2i.py --data photos/ --rae runs/decoder/last.pt --llm Qwen/Qwen2.5-0.5B-Instruct
    torchrun --nproc_per_node=8 train_t2i.py --recipe pretrain --llm Qwen/Qwen2.5-1.5B-Instruct --model 2.4B
        --rae siglip2.pt --data web=web.jsonl:0.9 ask=cambrian.jsonl:0.1 --micro_batch 8 --recompute --shard
(the paper's; then --recipe finetune --model 2.4B --init runs/t2i/last.pt --out runs/tuned). "<image>" in the
assistant's turn is drawn, in the user's understood. Writes OUT/last.pt, log.jsonl, previews.
"""
import argparse
import contextlib
import copy
import math
import os
import re
from functools import partial
from itertools import groupby
from pathlib import Path

import huggingface_hub
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.distributed.checkpoint import state_dict as full
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

import eval_fid
import runtime
import sample
from data import batches, check, open_data
from llm import IMAGE, Qwen2, Tokenizer, load_qwen2, qwen2_arguments, read_json, read_weights
from model import (DECODER_HUB, DECODER_SIZES, T2I_HEAD, T2I_RELEASES, T2I_SIZES, build_dit, fetching,
                   flow_matching_loss, load_release, revive, time_shift, unpack_rae)
from runtime import at_least
from shapes import CLASSES, COLOURS, Object, Scene, listing
from train_dit import BINS, PAPERS, SHIPPED_RAE, TINY, add_dit_flags, check_dit_flags

TOKENIZER = Path(__file__).resolve().parent / "assets" / "tokenizer.json"
SHAPING = ("rae data llm llm_width llm_depth llm_heads connector seed batch micro_batch width depth heads "
           "head_width head_depth head_heads class_dropout shift_base prediction balance draws questions "
           "plan dtype flow_weight regression llm_start freeze_llm weight_decay").split()   # of a run
COMMON = dict(lr_end=0.0, ema=0.0, time_law="logit_normal", shift_base=4096, prediction="v", balance="off",
              draws=1, solver="euler", sampling_steps=50)
RECIPES = {                                                             # tables 8 and 9 of arXiv 2601.16208
    "pretrain": dict(COMMON, batch=2048, steps=30_000, lr=5e-4, llm_lr=5e-5, warmup=402, context=512),
    "finetune": dict(COMMON, batch=1024, steps=3750, lr=5.66e-4, llm_lr=5.66e-5, warmup=112, context=1024)}
# How a prompt may ask for the built-in world, and what may stand for what in it.
ASK = ("draw {}", "generate an image of {}", "can you generate a photo of {}?", "please show me {}",
       "an image of {}", "i would like {}", "{} on a grey background", "there is {}")
REWORD = (("(left|right) of", r"to the \1 of"), ("below", "under"), (r"\ba ", "one "), (r"\ba ", ""),
          ("two", "2"), ("three", "3"), (" and ", " with "), (f"({'|'.join(COLOURS)}) (\\w+)", r"\2 in \1"))
PAD = -100                                                              # an id and a label of nothing
ALIGN, DESCRIBE = "Does this image align with the prompt: {}?", "Describe this image."     # Scale-RAE's words
WHERE = "Where is everything?"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    add_dit_flags(p)
    # data
    p.add_argument("--questions", type=at_least(0.0, 1), default=0.3, help="of scenes, to understand; <1")
    p.add_argument("--plan", type=at_least(0), help="most tokens said before an image is drawn; small LM 40")
    p.add_argument("--context", type=at_least(1), help="tokens, beyond it prompts are cut; image's + 176")
    # model
    p.add_argument("--llm", help="Qwen2 to start from, hub name or folder; default: a small one from scratch")
    p.add_argument("--llm_width", type=at_least(1), default=128, help="of the one from scratch")
    p.add_argument("--llm_depth", type=at_least(1), default=3, help="of the one from scratch")
    p.add_argument("--llm_heads", type=at_least(1), default=4, help="of the one from scratch")
    p.add_argument("--connector", choices=("linear", "mlp2"), default="linear", help="the paper's text: mlp2")
    p.add_argument("--model", choices=T2I_SIZES, help="sets width, depth, heads of the DiT, no wide head")
    p.add_argument("--wide_head", action="store_true", help="sets head_* to the paper's 2 blocks of 2688")
    p.add_argument("--init", help="start from a checkpoint's EMA, or a release: scale-rae-1.5b, scale-rae-7b")
    p.add_argument("--freeze_llm", action="store_true", help="train all but the language model")
    # optimisation
    p.add_argument("--recipe", choices=RECIPES, help="the paper's batch, steps, rates, times, loss, sampling")
    p.add_argument("--llm_lr", type=at_least(0.0), help="of all but DiT, connector; lr / 10, small LM / 3")
    p.add_argument("--regression", type=at_least(0.0), help="of latents by queries, in the loss; small LM 1")
    p.add_argument("--llm_start", type=at_least(0), help="when prompts reach the DiT; small LM 500")
    p.add_argument("--flow_weight", type=at_least(0.0), default=2.0, help="of flow matching in the loss")
    p.add_argument("--draws", type=at_least(1), default=2, help="times t for each image; the papers: 1")
    p.add_argument("--shard", action="store_true", help="FSDP2: weights and optimizer spread over processes")
    p.add_argument("--recompute", action="store_true", help="activation checkpointing: for memory, slower")
    p.add_argument("--eval_every", type=at_least(0), default=0, help="steps between ShapesEvals; 0: none")
    p.add_argument("--eval_n", type=at_least(6), default=300, help="images of each")
    p.set_defaults(out="runs/t2i", steps=1500)
    args = p.parse_args(argv)
    size = args.model or T2I_RELEASES.get(args.init, "DiT").split("DiT")[1]    # Scale-RAE-Qwen1.5B_DiT2.4B
    sizes = {"head_width": 0, **T2I_SIZES[size]} if size else {}
    recipe = dict(RECIPES.get(args.recipe, {}))
    args.resume and recipe.pop("context", None)            # then the checkpoint's
    p.set_defaults(**recipe, **{**sizes, **(T2I_HEAD if args.wide_head else {})})
    args = p.parse_args(argv)
    if args.llm_lr is None and not args.resume:
        args.llm_lr = args.lr / (10 if args.llm or args.init else 3)
    scratch = not (args.llm or args.init or args.recipe)
    args.regression = float(scratch) if args.regression is None and not args.init else args.regression
    args.llm_start = 500 * scratch if args.llm_start is None else args.llm_start
    args.plan = 40 * scratch if args.plan is None and not args.init else args.plan
    args.decay_start = args.warmup if args.recipe and args.decay_start is None else args.decay_start
    check_dit_flags(p, args)
    if args.llm_width % (2 * args.llm_heads):
        p.error(f"--llm_width {args.llm_width} must be a multiple of 2 x --llm_heads {args.llm_heads}")
    if args.init and (args.llm or args.rae):
        p.error(f"--init {args.init} brings its language model and autoencoder; leave --llm and --rae out")
    if args.shard and args.eval_every:
        p.error("--eval_every draws with all weights, which --shard has not; evaluate by eval_fid.py")
    if args.shard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        p.error("--shard needs processes to share among; start with torchrun --nproc_per_node=N train_t2i.py")
    return args


# ---------------------------------------------------------------------------------- what is said of a scene
def reword(text, rng):
    """The text in other words, with a request before it or not; rng: of numpy."""
    for old, new in REWORD:
        text = re.sub(old, new, text) if rng.random() < 1 / 8 else text
    if rng.random() < 1 / 8:                               # words that it doesn't know shall not disturb
        strange = "".join(map(chr, rng.integers(97, 123, rng.integers(2, 8))))
        text = f"{strange} {text}" if rng.random() < 1 / 2 else f"{text} {strange}"
    return ASK[rng.integers(len(ASK))].format(text) if rng.random() < 1 / 2 else text


def altered(scene, rng):
    """The scene with all places mirrored, one object less, colours swapped, or one colour or shape new."""
    objects, how = list(scene.objects), rng.integers(4)
    if how == 0 and 1 < len({o.name for o in objects}) == len(objects):    # reverses each relation
        return Scene([Object(o.shape, o.colour, o.size, (1 - o.centre[0], 1 - o.centre[1])) for o in objects])
    if how == 1 and 1 < len(objects):
        a, b, *rest = (objects[i] for i in rng.permutation(len(objects)))
        if a.shape != b.shape and a.colour != b.colour:
            return Scene([Object(a.shape, b.colour, a.size, a.centre),
                          Object(b.shape, a.colour, b.size, b.centre), *rest])
    old = objects.pop(rng.integers(len(objects)))
    if how == 2 or not objects:
        near = [c for c in CLASSES if len({*c.split()} & {old.colour, old.shape}) == 1]
        colour, shape = near[rng.integers(len(near))].split()
        objects.append(Object(shape, colour, old.size, old.centre))
    return Scene(objects)


def layout(objects, thing=None):
    """What is where, on a board of columns a to j from the left, rows 0 to 9 from the top; of a thing
    ("star", "red star", "red object") the places alone."""
    found = [(o, f"{'abcdefghij'[int(10 * o.centre[0])]}{int(10 * o.centre[1])}") for o in objects
             if thing in (None, o.name, o.shape, f"{o.colour} object")]
    return ", ".join(cell if thing else f"{o.size} {o.name} {cell}" for o, cell in found) or "nowhere"


def converse(scene, rng, questions, plan=True):
    """A conversation about a scene: prompt, plan and image, or with probability `questions` three answers."""
    texts, rng = scene.captions(), rng.spawn(1)[0]         # as data.py gives it, it is what drew the scene
    if rng.random() >= questions:
        texts.append(listing([o.shape for o in scene.objects]))
        placed = [text for text in texts if re.search(" (left of|right of|above|below) ", text)]
        texts = placed if placed and rng.random() < 0.4 else texts      # the hardest to learn
        text = texts[rng.integers(len(texts))]
        order = sorted(scene.objects, key=lambda o: next(               # that of the prompt
            text.find(x) for x in (f"{o.size} {o.name}", o.name, o.shape) if x in text))
        return [("user", reword(text, rng)), ("assistant", layout(order) * bool(plan) + "<image>")]
    other = altered(scene, rng)                            # what is held out is not taught as wrong either
    wrong = [text for text in other.captions() if text not in texts and not other.held_out()]
    asked, text = scene.questions(), texts[rng.integers(len(texts))]
    fits = (ALIGN.format(reword(text, rng)), "yes")
    if wrong and rng.random() < 1 / 2:
        fits = (ALIGN.format(reword(wrong[rng.integers(len(wrong))], rng)), "no")
    seen = sorted(scene.objects, key=lambda o: o.centre[::-1])          # from the top down
    name = (CLASSES[rng.integers(len(CLASSES))], *[o.name for o in seen] * 2)[rng.integers(2 * len(seen) + 1)]
    thing = (name, name.split()[0] + " object", *[name.split()[1]] * 2)[rng.integers(4)]   # shapes are hard
    find = f"where is the {thing}?", layout(seen, thing)
    kinds = [[pair for pair in asked if pair[0][:7] == kind] for kind in {q[:7]: 0 for q, _ in asked}]
    one, more = (kinds[i][rng.integers(len(kinds[i]))] for i in rng.integers(len(kinds), size=2))
    pairs = [one, fits, (more, (DESCRIBE, text), (WHERE, layout(seen)), find, find)[rng.integers(5)]]
    turns = [turn for i in rng.permutation(len(pairs)) for turn in zip(("user", "assistant"), pairs[i])]
    return [("user", "<image>\n" + turns[0][1]), *turns[1:]]


# ---------------------------------------------------------------------------------- model
class T2I(nn.Module):
    """A language model that reads prompts and images, and a DiT that draws what its query tokens then hold.

    llm: Qwen2. tokenizer: its Tokenizer. dit: text-conditioned DiT or DiTDH. connector: "linear" or "mlp2".
    forward: ids b l, labels b l, kind b of tokenise(), latents b c h w; t k and eps k c h w, k = draws *
        max(1, images to draw) -> cross-entropy, summed; errors of regression (b) and flow matching (k).
    Source: arXiv 2601.16208 section 3, names as released: the prompt, then n = h*w learned queries, causal;
        the final state of query i conditions latent token i. Images to understand: mm_projector.
    """
    def __init__(self, llm, tokenizer, dit, connector, regression=False, plan=0, context=10 ** 9):
        super().__init__()
        self.plan, self.context = plan, context
        self.llm, self.tokenizer, self.dit, self.n = llm, tokenizer, dit, dit.grid ** 2
        d, width = llm.config["hidden_size"], dit.pos_embed.shape[2]
        self.latent_queries = nn.Parameter(torch.randn(self.n, d) / d ** 0.5)
        self.mm_projector = nn.Sequential(nn.Linear(dit.in_channels, d), nn.GELU(), nn.Linear(d, d))
        self.diff_head_projector = nn.Linear(d, width) if connector == "linear" else nn.Sequential(
            nn.Linear(d, width), nn.GELU(), nn.Linear(width, width))
        for weight in (w for w in self.diff_head_projector.parameters() if w.ndim == 2):
            nn.init.xavier_uniform_(weight)                             # as the DiT: prompts must differ
        self.regression = nn.Linear(d, dit.in_channels) if regression else None

    def embed(self, ids, latents, draw):                                # ids: b l, latents: b c h w, draw: b
        x, slots = self.llm.embed_tokens(ids.clamp(min=0)), ids == IMAGE                       # b l d, b l
        seen = self.mm_projector(rearrange(latents, "b c h w -> b (h w) c"))                   # b n d
        image = torch.where(draw[:, None, None], self.latent_queries, seen.float())            # b n d
        return x.masked_scatter(slots[:, :, None], image[slots.any(1)]), slots

    def condition(self, x, kind):                                       # states of the queries b n d, kind: b
        y = self.diff_head_projector(x).float()                         # b n d
        return torch.where((kind == 2)[:, None, None], self.dit.null(y), y)

    def forward(self, ids, labels, latents, kind, t, eps):
        ce = 0.0
        for draw in (False, True):       # apart: less padding. Both always run, as FSDP and DDP need it
            rows = ((kind > 0) == draw).nonzero()[:, 0]                 # r
            some = rows if len(rows) else rows.new_zeros(1)
            l = int((ids[some] != PAD).sum(1).max()) if len(rows) else 1
            x, slots = self.embed(ids[some, :l], latents[some], kind[some] > 0)                # r l d, r l
            x, target = self.llm(x), labels[some, 1:l]                  # r l d, r l-1
            logits = self.llm.logits(x[:, :-1][target >= 0])            # tokens vocab
            ce = ce + F.cross_entropy(logits.float(), target[target >= 0], reduction="sum")
        x = x[slots].unflatten(0, (-1, self.n)) if len(rows) else x.expand(-1, self.n, -1)     # r n d
        y, x0 = self.condition(x, kind[some]), latents[some]            # r n d, r c h w
        error = x.new_zeros(len(some))                                  # r
        if self.regression:                                             # optional in Scale-RAE, too
            tokens = rearrange(x0, "r c h w -> r (h w) c")              # r n c
            error = (self.regression(x).float() - tokens).square().mean((1, 2))
        x0, y = (z.repeat(len(t) // len(some), *[1] * (z.ndim - 1)) for z in (x0, y))          # k ...
        return ce, error, flow_matching_loss(self.dit, x0, y, t, eps)

    @torch.no_grad()
    def read(self, latents, turns, answer=True):
        """Embeddings b l d of b conversations about latents (or None); ids, labels, kind of tokenise()."""
        c, grid = self.dit.in_channels, self.dit.grid
        latents = self.latent_queries.new_zeros(len(turns), c, grid, grid) if latents is None else latents
        ids, labels, kind, _ = tokenise(self.tokenizer, turns, self.n, answer=answer)
        ids, labels, kind = (x.to(latents.device) for x in (ids, labels, kind))
        return self.embed(ids, latents, kind > 0)[0], ids, labels, kind

    def fit(self, prompts):
        """The b prompts, where needed cut to what plan and image leave of the context it was trained with."""
        others = self.tokenizer.chat([("user", ""), ("assistant", "<image>")], self.n)[0]
        if (room := self.context - self.plan - len(others)) < 1:
            raise ValueError(f"a context of {self.context} tokens leaves none for a prompt, as plan and "
                             f"image take {self.plan + len(others)}; give more --context, or --plan 0")
        return [text if len(ids := self.tokenizer.encode(text)) <= room else
                self.tokenizer.decode(ids[:room]).rstrip("\ufffd") for text in prompts]

    @torch.no_grad()
    def plans(self, prompts, luck=None):
        """What it says to b prompts before it draws: b texts. luck: b plan in [0,1); None: the likeliest."""
        x, ids, _, _ = self.read(None, [[("user", text)] for text in prompts], answer=False)
        said = self.llm.generate(x, ids != PAD, self.tokenizer.image_start, self.plan, luck)
        rows = [row[:[*row, end].index(end)] for end in [self.tokenizer.end] for row in said.tolist()]
        return [self.tokenizer.decode(row).replace("<image>", "") for row in rows]

    @torch.no_grad()
    def conditions(self, prompts, luck=None):
        """Conditions of the DiT for a list of b prompts, after what plans() says: b n d fp32."""
        plans = self.plans(prompts, luck) if self.plan else [""] * len(prompts)
        x, ids, _, kind = self.read(None, [[("user", text), ("assistant", f"{plan}<image>")]
                                           for text, plan in zip(prompts, plans)])
        return self.condition(self.llm(x)[ids == IMAGE].unflatten(0, (-1, self.n)), kind)

    def ask(self, latents, questions, most=40):
        """The model's answers, greedy, to one question about each latent b c h w: a list of b texts."""
        x, ids, _, _ = self.read(latents, [[("user", f"<image>\n{q}")] for q in questions], answer=False)
        told = self.llm.generate(x, ids != PAD, self.tokenizer.end, most)                        # b m
        return [self.tokenizer.decode(row).strip() for row in told.tolist()]

    @torch.no_grad()
    def scores(self, latents, prompts, verifier):
        """How well latents b c h w meet their prompts: b floats (answer_logits: tuples), more is better.

        answer: probability of yes against no to ALIGN. answer_logits: the paper's: whether yes is said, its
        raw logit, minus that of no. confidence = prompt_confidence: mean of -log(V p) over vocabulary and the
        prompt's tokens, an answer to DESCRIBE. likelihood: their mean log p.         Source: arXiv 2601.16208
        """
        asks = verifier in ("answer", "answer_logits")
        turns = [[("user", f"<image>\n{ALIGN.format(text)}")] if asks else
                 [("user", f"<image>\n{DESCRIBE}"), ("assistant", text)] for text in prompts]
        x, ids, labels, _ = self.read(latents, turns, answer=not asks)
        hidden, end = self.llm(x), (ids != PAD).sum(1, keepdim=True) - 1        # b l d, b 1: the last token's
        if not asks:
            said = (labels >= 0) & (labels != self.tokenizer.end)       # b l: the prompt's own tokens
            before = said[:, 1:] if verifier == "likelihood" else said  # b l-1|l: where logits are looked at
            hidden = hidden[:, :before.shape[1]][before]                # tokens d
            worth = self.llm.logits(hidden).float().log_softmax(-1)     # tokens vocab
            worth = worth.gather(1, ids[said][:, None]) if verifier == "likelihood" else \
                -worth - math.log(worth.shape[1])                       # tokens 1|vocab
            return [float(part.mean()) for part in worth.split(said.sum(1).tolist())]
        spelt = {word: [self.tokenizer.encode(space + text) for space in ("", " ")
                        for text in (word, word.title(), word.upper())] for word in ("yes", "no")}
        yes, no = ([*{ids[0] for ids in spelt[word] if len(ids) == 1}] for word in ("yes", "no"))
        rows = torch.arange(len(x), device=x.device)[:, None]           # b 1
        if verifier == "answer":
            p = self.llm.logits(hidden[rows, end])[:, 0].float().softmax(-1)                   # b vocab
            return (p[:, yes].sum(1) / p[:, yes + no].sum(1)).tolist()
        told = self.llm.generate(x, ids != PAD, self.tokenizer.end, 8)    # b m
        ids = [torch.cat([row[:n + 1], more]) for row, n, more in zip(ids, end, told)]
        x, _ = self.embed(pad_sequence(ids, True, PAD), latents, rows[:, 0] < 0)               # b l d
        hidden = self.llm(x)[rows, end + torch.arange(told.shape[1], device=x.device)]         # b m d
        raw = self.llm.logits(hidden).float().gather(2, told[:, :, None])[:, :, 0]             # b m
        raw = [[[0.0, *(logit for i, logit in zip(*pair) if i in word)] for word in (yes, no)]
               for pair in zip(told.tolist(), raw.tolist())]            # 0: not said
        return [(len(one) > 1, one[-1], -other[-1]) for one, other in raw]


def tokenise(tokenizer, conversations, n, context=None, answer=True):
    """Conversations as ids b l and labels b l, PAD on the right; kind b; how many were cut to the context.

    kind: 0: no image to draw; 1: one to draw; 2: one to draw without condition, the prompt being empty.
    """
    rows = [tokenizer.chat(turns, n, context, answer) for turns in conversations]
    ids, labels = (pad_sequence([torch.tensor(row[k]) for row in rows], True, PAD) for k in (0, 1))
    draw = [any(role == "assistant" and "<image>" in text for role, text in turns) for turns in conversations]
    empty = [not any(text.strip() for role, text in turns if role == "user") for turns in conversations]
    kind = torch.tensor([d + (d and e) for d, e in zip(draw, empty)])
    return ids, labels, kind, sum(row[2] for row in rows)


# ---------------------------------------------------------------------------------- building and loading
def assemble(args, state, llm=None, tokenizer=None):       # of the flags as a dict and a checkpoint's dict
    dit, llm = build_dit(args, *state["latent_shape"][:2], None), llm or Qwen2(**state["llm"])
    return T2I(llm, tokenizer or Tokenizer(state["tokenizer"]), dit, args["connector"],
               args.get("regression", 0) > 0, args.get("plan", 0), args["context"])


def load_scale_rae(name, folder=None):
    """A release of Scale-RAE as the dict of a checkpoint of this script, without the encoder's weights.

    folder: holds copies of T2I_RELEASES[name] and DECODER_HUB of the hub, under their own names; None: they
    are downloaded, once.                                               Raises: FileNotFoundError, ValueError
    """
    hubs = T2I_RELEASES[name], DECODER_HUB
    files = ["*.json", "*.safetensors", "model.pt"]
    with fetching(name, f"connect, or copy huggingface.co/{hubs[0]} and {hubs[1]} to a folder, each with its "
                  f"name: --release_dir FOLDER"):
        here, decoder = (Path(folder) / hub.split("/")[1] if folder else
                         Path(huggingface_hub.snapshot_download(hub, allow_patterns=files)) for hub in hubs)
    config, drawing = read_json(here / "config.json"), read_json(decoder / "config.json")
    width, depth, heads = (config.get(f"diffusion_model_{k}") for k in ("hidden_size", "depth", "heads"))
    if not all(isinstance(x, int) for x in (width, depth, heads)):
        raise ValueError(f"{here}/config.json has a DiT of width {width}, depth {depth}, heads {heads}; one "
                         f"number each is needed: wide heads were not released")
    args = dict(width=width, depth=depth, heads=heads, head_width=0, connector="linear", context=1024,
                class_dropout=config.get("diffusion_class_dropout_prob", 0.1),
                shift_base=config.get("diffusion_base_dim") or 4096)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = {k: drawing.get(f"decoder_{name}", usual)
             for name, (k, usual) in zip(names, DECODER_SIZES["XL"].items(), strict=True)}
    var = torch.full((1152, 16, 16), 1 - 1e-5)          # no statistics: RAE adds 1e-5
    rae = dict(encoder="siglip2-so400m", size=256, **sizes, decoder_patch=drawing.get("patch_size", 14),
               latent_mean=torch.zeros_like(var), latent_var=var,
               decoder=runtime.load_checkpoint(decoder / "model.pt"))
    return dict(model=read_weights(here), args=args, rae=rae, llm=qwen2_arguments(config, here),
                latent_shape=[*var.shape], tokenizer=Tokenizer(here / "tokenizer.json").json, asked=1)


def read_t2i(path, folder=None):
    """The dict of a checkpoint of this script, or of a release.    Raises FileNotFoundError, ValueError"""
    state = load_scale_rae(f"{path}", folder) if f"{path}" in T2I_RELEASES else runtime.load_checkpoint(path)
    if "llm" not in state:
        raise ValueError(f"{path} is no checkpoint of train_t2i.py; give one (of classes: no --prompt)")
    return state


def load_t2i(path, device="cpu", encoder=False, weights="ema", folder=None):
    """T2I and RAE of a checkpoint of this script or of a release (in folder), frozen, and the dict.

    weights: "ema" or "model". encoder=False: the RAE only decodes.      Raises FileNotFoundError, ValueError
    """
    state = read_t2i(path, folder)
    weights = weights if "ema" in state else "model"                    # --ema 0 keeps no average
    model = revive(lambda: assemble(state["args"], state), state, weights, path, device)
    return model, unpack_rae(state["rae"], encoder).to(device), state


# ---------------------------------------------------------------------------------- training
def main(args):
    rank, world, device = runtime.setup()
    accumulate = args.batch // (args.micro_batch * world)
    resumed = args.resume and runtime.resume(args, SHAPING)
    args.llm_lr = resumed["args"]["llm_lr"] if args.llm_lr is None else args.llm_lr
    init = resumed or (read_t2i(args.init, args.release_dir) if args.init else {})
    packed = (init or runtime.load_checkpoint(args.rae or SHIPPED_RAE)).get("rae")
    if packed is None:
        raise ValueError(f"--rae {args.rae} is no checkpoint of train_decoder.py; give one of those")
    args.plan = init["args"].get("plan", 0) if args.plan is None else args.plan
    shape = [*packed["latent_mean"].shape]
    args.context = args.context or init.get("args", {}).get("context", shape[1] * shape[2] + 176)
    data = open_data(args.data, packed["size"], args.seed, objects=(1, 1, 2, 2, 3, 4),
                     chat=partial(converse, questions=args.questions, plan=args.plan))
    check(data, args.batch)
    usual = init.get("args", TINY if packed["encoder"] == "tiny" else PAPERS)     # --init: as it was trained
    vars(args).update({k: usual.get(k, PAPERS[k]) for k in PAPERS if getattr(args, k) is None})
    if args.regression is None:                                         # --init: as it was trained, too
        args.regression = init["args"].get("regression", 0.0)
    rae = unpack_rae(packed).to(device)
    torch.manual_seed(args.seed)
    llm = tokenizer = None                                              # --init: of the checkpoint
    if args.llm and not init:
        llm, tokenizer = load_qwen2(args.llm)
        llm.resize(len(tokenizer) - tokenizer.added).resize(len(tokenizer))     # rows of <im_start>, <im_end>
    elif not init:
        tokenizer, d, heads = Tokenizer(TOKENIZER), args.llm_width, args.llm_heads
        llm = Qwen2(len(tokenizer), d, 2 * d, args.llm_depth, heads, heads, 1e4, 1e-6, False)
        for weight in (w for w in llm.parameters() if w.ndim == 2):     # 0.02 is too little for small widths:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)        # prompts would not reach the queries
        nn.init.normal_(llm.embed_tokens.weight)
    model = assemble(vars(args), dict(init, latent_shape=shape), llm, tokenizer).train()
    llm, tokenizer = model.llm, model.tokenizer
    if init:
        load_release(model, init["model" if resumed or "ema" not in init else "ema"], f"--init {args.init}")
    model.fit([""])                                                     # is there room for a prompt at all?
    llm.requires_grad_(not args.freeze_llm)
    llm.checkpoint = model.dit.checkpoint = args.recompute
    ema = copy.deepcopy(model).requires_grad_(False).eval() if args.ema else model
    resumed and args.ema and load_release(ema, {"ema": resumed["ema"]})
    for net in {model, ema} if args.shard else ():                      # moves them to the device, in parts
        for block in (*net.llm.layers, *net.dit.blocks, net):
            fully_shard(block)
    model.to(device), ema.to(device)
    mine = [(k.startswith(("dit.", "diff_head_projector.")), p) for k, p in model.named_parameters()]
    groups = [dict(params=[p for head, p in mine if head == which and p.requires_grad], betas=(0.9, beta2),
                   share=1.0) for which, beta2 in ((True, 0.95), (False, 0.999))]      # as in Scale-RAE
    opt = torch.optim.AdamW(groups, args.lr, eps=1e-8, weight_decay=args.weight_decay, fused=True)
    level, start, asked = torch.ones(BINS, device=device), 0, init.get("asked", 0)    # mean of the loss by t
    options = full.StateDictOptions(full_state_dict=True, cpu_offload=True)
    if resumed:
        full.set_optimizer_state_dict(model, opt, resumed["opt"], options=options)
        level, start = resumed["level"].to(device), resumed["step"]
    opt.param_groups[1]["share"] = args.llm_lr / args.lr                # a resumed run may change it
    parallel = world > 1 and not args.shard
    step_model = DistributedDataParallel(model, broadcast_buffers=False) if parallel else model
    log = runtime.Log(args, rank, device, start, sum(p.numel() for p in model.parameters()))
    prompts = []                                                        # of the previews
    alone = argparse.Namespace(**{**vars(args), "best_of": 1, "verifier": "answer", "batch": 72})
    if args.preview_every and rank == 0 and not args.shard:
        val = open_data(args.data, packed["size"], split="val", chat=partial(converse, questions=0.0))
        talks = [talk for k in range(60) if "<image>" in (talk := val[k]["text"])[1][1] and len(talk) == 2]
        prompts = [ask for (_, ask), _ in talks if ask][:12]

    def save(step):
        weights = {k: full.get_model_state_dict(net, options=options)
                   for k, net in (("model", model), ("ema", ema)) if k == "model" or net is not model}
        state = full.get_optimizer_state_dict(model, opt, options=options)       # all processes take part
        if rank == 0:
            runtime.save_checkpoint(
                f"{args.out}/last.pt", **weights, opt=state, step=step, level=level, asked=asked, rae=packed,
                args=runtime.plain(args), llm=llm.config, tokenizer=tokenizer.json, latent_shape=shape)

    stream = batches(data, args.batch, args.micro_batch, start, rank, world, args.workers, stop=args.steps)
    sums, by_t = torch.zeros(2, 2, BINS, device=device)    # losses and counts: of a step, of a log interval
    words, cut = torch.zeros(4, device=device), 0          # of an interval: losses and their counts
    for step, parts in groupby(stream, key=lambda part: part[0]):
        parts = [(m, images, *tokenise(tokenizer, talks, model.n, args.context))
                 for _, m, images, _, talks in parts]
        counts = [((labels >= 0).sum(), (kind > 0).sum(), ((kind == 0) & (ids == IMAGE).any(1)).sum(), short)
                  for *_, ids, labels, kind, short in parts]
        counts = torch.tensor(counts, dtype=torch.float64, device=device).sum(0)
        tokens, drawn, told, short = eval_fid.total(counts).tolist()    # of all processes
        asked, cut = asked + int(told), cut + int(short)
        for m, images, ids, labels, kind, _ in parts:
            last = m // world == accumulate - 1
            with runtime.autocast(device, args.dtype):
                latents = rae.encode(images.to(device).float() / 255).float()  # b c h w, unit variance
            runtime.seed_step(args.seed, step, m)
            real = int((kind > 0).sum())                                # 0: the DiT runs, but counts nothing
            kind = kind.clamp(max=1) * 2 if step < args.llm_start else kind    # first, images without prompts
            eps = torch.randn(max(1, real) * args.draws, *latents.shape[1:], device=device)
            t = torch.randn(len(eps), device=device).sigmoid()          # k
            t = t if args.time_law == "logit_normal" else torch.rand_like(t)
            t = time_shift(t, eps[0].numel(), model.dit.shift_base)
            args.shard and model.set_requires_gradient_sync(last)
            with step_model.no_sync() if parallel and not last else contextlib.nullcontext():
                with runtime.autocast(device, args.dtype):
                    ids, labels, kind = (x.to(device) for x in (ids, labels, kind))
                    ce, error, loss = step_model(ids, labels, latents, kind, t, eps)
                loss = loss * t.square() if model.dit.prediction == "x0" else loss      # k: the error of x0
                at = (t * BINS).long().clamp(max=BINS - 1)              # k
                weight = 1 / level[at] if args.balance == "on" else 1.0
                flow = (weight * loss).sum() / max(1, drawn * args.draws) * (real > 0)
                error = error.sum() * (real > 0)
                # Means over the whole batch, however it is split; the processes' gradients are averaged.
                (world * (ce / max(1, tokens) + args.regression * error / max(1, drawn)
                          + args.flow_weight * flow)).backward()
            keep = torch.full_like(loss, real > 0)
            sums = sums.index_add(1, at, torch.stack([loss.detach() * keep, keep]))
            n = [torch.as_tensor(x, device=device) for x in ((labels >= 0).sum(), real)]
            words += torch.stack([ce.detach(), n[0], error.detach(), n[1]])
        span = args.warmup, args.decay_start, args.decay_end, args.lr_end
        lr = args.lr * runtime.lr_factor(step, *span, "cosine")
        norm = runtime.step_optimizers([opt], model, args.clip, loss.detach().mean() + ce.detach(), step, lr)
        args.ema and runtime.update_ema(ema, model, args.ema, step)
        sums = runtime.all_mean(sums)
        mean, by_t, sums = sums[0] / sums[1], by_t + sums, torch.zeros_like(sums)
        # Nan: no t fell into the bin. In logarithms: one wild loss does not silence its t for long.
        level = torch.where(mean.isfinite(), level ** 0.95 * mean ** 0.05, level)
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            tenths, told = by_t.view(2, 10, -1).sum(2), runtime.all_mean(words).view(2, 2)
            flow, ce, error = (float(x / n.clamp(min=1e-9)) for x, n in (by_t.sum(1), *told))
            log.step(done, ce + args.flow_weight * flow + args.regression * error, norm, lr, cross_entropy=ce,
                     flow=flow, regression=error, cut=cut,
                     loss_by_t=[x if x == x else None for x in (tenths[0] / tenths[1]).tolist()])
            cut and log.say(f"{cut} prompts were longer than --context {args.context} tokens, and cut")
            by_t, words, cut = torch.zeros_like(by_t), torch.zeros_like(words), 0
        if done % args.save_every == 0 or done == args.steps:
            save(done)
        if prompts and (done % args.preview_every == 0 or done == args.steps):
            images = sample.generate(ema.eval(), rae, prompts, alone)
            sample.draw_grid(images, prompts).save(f"{args.out}/preview_{done:07d}.png")
        if args.eval_every and (done % args.eval_every == 0 or done == args.steps):
            metrics = eval_fid.evaluate_prompts(ema.eval(), rae, alone, args.eval_n, rank, world)
            log.write(dict(step=done, **metrics))
            log.say(f"step {done} | " + eval_fid.one_line(metrics))
        model.train()


if __name__ == "__main__":
    runtime.run(main, parse_args)
