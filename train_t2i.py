"""Stage 3: train a text-to-image model on the latents of a frozen RAE.

    python train_t2i.py                                     the built-in world, laptop size
    python train_t2i.py --data photos/ --rae runs/decoder/last.pt --llm Qwen/Qwen2.5-0.5B-Instruct
    torchrun --nproc_per_node=8 train_t2i.py --recipe pretrain --llm Qwen/Qwen2.5-1.5B-Instruct \\
        --model 2.4B --rae siglip2.pt --data web=web.jsonl:0.9 ask=cambrian.jsonl:0.1 \\
        --micro_batch 8 --recompute --shard                 the paper, then its finetuning:
    torchrun --nproc_per_node=8 train_t2i.py --recipe finetune --model 2.4B --data blip3o.jsonl \\
        --init runs/t2i/last.pt --out runs/tuned --micro_batch 8 --recompute --shard

The data are conversations about one image each: "<image>" in the assistant's turn is to be drawn,
in the user's turn it is to be understood. The model is in t2i.py.
Writes OUT/last.pt (all that sampling and an exact resume need), OUT/log.jsonl, OUT/preview_*.png.
With --shard, weights and moments lie beside last.pt, in a folder that it names: see sharding.py.
"""
import argparse
import copy
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import metrics
import pictures
import progress
import release
import run_flags
import runtime
import sample
import saving
import sharding
import speed
import storage
from data import batches, check_amounts, check_batch, fit_defaults, open_data
from eval_t2i import evaluate_prompts, has_shapes
from llm import IMAGE, NO_LABEL, Qwen2, Tokenizer
from model import T2I_HEAD, T2I_SIZES, TIME_LAWS, check_heads, sample_times, time_weight
from run_flags import at_least
from shapes import converse
from t2i import (
    DRAW_UNCONDITIONED,
    PAD,
    UNDERSTAND,
    Conversations,
    build_t2i,
    read_t2i,
    split_tasks,
    tokenize,
)

TOKENIZER = Path(__file__).resolve().parent / "assets" / "tokenizer.json"
OBJECTS = (1, 1, 2, 2, 3, 4)     # in a scene of the built-in world: the simple ones more often

# ---------------------------------------------------------------------------- flags
# Laptop size, for the built-in world. Flags default to None; resolve() fills in these values.
DEFAULTS = dict(
    run_flags.RUN_DEFAULTS, **sample.SAMPLING_DEFAULTS, out="runs/t2i",
    data=["shapes"], questions=0.3, context=None, rae=None, init=None, recipe=None,
    llm=None, llm_width=128, llm_depth=3, llm_heads=4, freeze_llm=False, connector="linear",
    model=None, wide_head=False, width=128, depth=4, heads=4,
    head_width=192, head_depth=1, head_heads=4, class_dropout=0.1,
    plan=0, regression=0.0, llm_start=None, flow_weight=2.0, draws=2,
    time_law="logit_normal", shift_base=4096, prediction="v",
    steps=1500, lr=3e-3, llm_lr=None, lr_end=0.02, warmup=None, decay_start=None, decay_end=None,
    weight_decay=0.0, clip=1.0, ema=0.998, shard=False, recompute=False, compile=False,
    log_every=50, save_every=500, preview_every=500, eval_every=0, eval_n=300)
# What a small language model from scratch needs: it says where things are before it draws them,
# its queries also learn from the latents directly, and the DiT waits until they mean something.
FROM_SCRATCH = dict(plan=40, regression=1.0)
# The tiny encoder's tokens repeat each other, so it takes more noise to hide an image, and few
# dimensions of the latents vary, so x0 is easier to predict than v.
TINY_LATENTS = dict(shift_base=340, prediction="x0")
# Tables 8 and 9 of arXiv 2601.16208. The warm-up is 1.34% and 3% of the steps.
PAPER = dict(sample.PAPER_SAMPLING, lr_end=0.0, ema=0.0, time_law="logit_normal", draws=1,
             shift_base=4096, prediction="v",
             save_every=1000, preview_every=1000)           # 1.5 hours on 8 GPUs, see BENCH.md
RECIPES = {
    "pretrain": dict(PAPER, batch=2048, steps=30_000, lr=5e-4, llm_lr=5e-5, warmup=402,
                     context=512),
    "finetune": dict(PAPER, batch=1024, steps=3750, lr=5.66e-4, llm_lr=5.66e-5, warmup=112,
                     context=1024),
}
# DiT of each published model, a key of T2I_SIZES.
PUBLISHED_SIZES = {"scale-rae-1.5b": "2.4B", "scale-rae-7b": "9.8B"}
# Flags that --init takes from its checkpoint, as the weights were trained with them.
OF_INIT = ("width", "depth", "heads", "head_width", "head_depth", "head_heads", "connector",
           "plan", "regression", "context", "shift_base", "prediction")
# Flags that a resumed run must keep: they say what is trained on what. Rates, horizons and how
# often to report may change.
FIXED = ("recipe", "rae", "data", "model", "wide_head", "llm", "llm_width", "llm_depth",
         "llm_heads", "connector", "seed", "batch", "micro_batch", "width", "depth", "heads",
         "head_width", "head_depth", "head_heads", "class_dropout", "shift_base", "prediction",
         "draws", "questions", "plan", "dtype", "flow_weight", "regression", "llm_start",
         "freeze_llm", "weight_decay")


def make_parser():
    p = run_flags.Parser(__doc__, DEFAULTS)
    add_data_flags(p)
    add_model_flags(p)
    add_training_flags(p)
    run_flags.add_run_flags(p)
    sample.add_sampling_flags(p)
    return p


def parse_args(argv=None):
    return make_parser().parse(argv, resolve, check_flags)


def add_data_flags(p):
    """Flags of the images and conversations."""
    p.add_argument("--data", nargs="+",
                   help="Images with text: shapes, a folder, tars, a .jsonl of conversations, or "
                        "several NAME=PATH:WEIGHT to mix.")
    p.add_argument("--questions", type=at_least(0.0, 1),
                   help="Fraction of the scenes of shapes that are to be understood instead of "
                        "drawn, below 1.")
    p.add_argument("--plan", type=at_least(0),
                   help="Most tokens that the model says before it draws; 0: none. As in --init; "
                        f"for a language model from scratch {FROM_SCRATCH['plan']}.")
    p.add_argument("--context", type=at_least(1),
                   help="Most tokens of a conversation, beyond which its prompt is cut (default: "
                        "that of --init, else 176 more than an image has).")
    p.add_argument("--rae",
                   help="Autoencoder: a checkpoint of train_decoder.py, or a published one by "
                        f"name: {', '.join(release.PUBLISHED_RAES)} (default: that of --init, else "
                        "the shipped one).")


def add_model_flags(p):
    """Flags of the language model, the connector and the DiT."""
    p.add_argument("--llm", help="Qwen2 to start from: a name on the hub, or a folder (default: a "
                                 "small one from scratch).")
    p.add_argument("--llm_width", type=at_least(1),
                   help="Width of a language model from scratch, a multiple of 2 x llm_heads.")
    p.add_argument("--llm_depth", type=at_least(1),
                   help="Layers of a language model from scratch.")
    p.add_argument("--llm_heads", type=at_least(1),
                   help="Attention heads of a language model from scratch.")
    p.add_argument("--freeze_llm", action="store_true", default=None,
                   help="Train all but the language model.")
    p.add_argument("--connector", choices=("linear", "mlp2"),
                   help="Layers between the language model and the DiT: one, as in the paper's "
                        "code, or two, as in its text.")
    p.add_argument("--model", choices=T2I_SIZES,
                   help="Size of the DiT in the paper: sets width, depth and heads, and head_width "
                        "to 0.")
    p.add_argument("--wide_head", action="store_true", default=None,
                   help="Set head_width, head_depth and head_heads to the paper's 2 blocks of "
                        "2688.")
    p.add_argument("--width", type=at_least(1),
                   help="Width of the DiT's backbone, a multiple of 4 x heads.")
    p.add_argument("--depth", type=at_least(1), help="Blocks of the backbone.")
    p.add_argument("--heads", type=at_least(1), help="Attention heads of the backbone.")
    p.add_argument("--head_width", type=at_least(0), help="Width of the wide head; 0: a plain DiT.")
    p.add_argument("--head_depth", type=at_least(1), help="Blocks of the wide head.")
    p.add_argument("--head_heads", type=at_least(1), help="Attention heads of the wide head.")
    p.add_argument("--class_dropout", type=at_least(0.0, 1),
                   help="Probability that the null condition replaces a prompt, for guidance.")
    p.add_argument("--init", help="Checkpoint whose EMA weights to start from, or a published "
                                  f"model: {', '.join(release.PUBLISHED_T2I)}.")


def add_training_flags(p):
    """Flags of the objective, the optimizer and the evaluation."""
    # objective
    p.add_argument("--time_law", choices=TIME_LAWS, help="Distribution of t before its shift.")
    p.add_argument("--shift_base", type=at_least(1e-9),
                   help="n of the time shift sqrt(m/n), m = tokens x channels (default: 4096; for "
                        "the tiny encoder 340).")
    p.add_argument("--prediction", choices=("v", "x0"),
                   help="What the DiT's last layer predicts (default: v; for the tiny encoder x0).")
    p.add_argument("--draws", type=at_least(1),
                   help="Times t at which each image is drawn in a step; paper: 1.")
    p.add_argument("--flow_weight", type=at_least(0.0),
                   help="Weight of the flow matching loss; that of the cross-entropy is 1.")
    p.add_argument("--regression", type=at_least(0.0),
                   help="Weight of the error with which the states of the queries predict the "
                        "latents. As in --init; for a language model from scratch "
                        f"{FROM_SCRATCH['regression']:g}.")
    p.add_argument("--llm_start", type=at_least(0),
                   help="Step from which prompts condition the DiT (default: 0; for a language "
                        "model from scratch steps / 3).")
    # optimisation
    p.add_argument("--recipe", choices=RECIPES,
                   help="The paper's batch, steps, learning rates, law of t, and sampling.")
    p.add_argument("--llm_lr", type=at_least(0.0),
                   help="Peak learning rate of all but the DiT and its connector (default: lr / 3 "
                        "for a language model from scratch, else lr / 10).")
    p.add_argument("--decay_start", type=at_least(0),
                   help="Step at which the learning rate begins to decay (default: steps / 2; with "
                        "--recipe: after the warm-up).")
    p.add_argument("--decay_end", type=at_least(0),
                   help="Step at which the decay ends (default: steps).")
    p.add_argument("--shard", action="store_true", default=None,
                   help="Spread weights, EMA and optimizer over the processes of a node (FSDP2). "
                        "No previews then, since one process cannot draw.")
    p.add_argument("--recompute", action="store_true", default=None,
                   help="Recompute activations in the backward pass: less memory, slower.")
    p.add_argument("--compile", action="store_true", default=None,
                   help="Compile the blocks of all networks by torch.compile.")
    # evaluation in training
    p.add_argument("--eval_every", type=at_least(0),
                   help="Steps between runs of ShapesEval on the EMA weights; 0: none.")
    p.add_argument("--eval_n", type=at_least(6), help="Images in each run of ShapesEval.")


def resolve(args):
    """A copy of args in which every flag has its value; --context may stay open until main().

    Given flags win; then come, with --resume, the flags of that run; else presets; else DEFAULTS.
    """
    given = run_flags.given_flags(args)
    from_scratch = not (args.llm or args.init or args.recipe)
    values = dict(DEFAULTS)
    if args.resume:
        out = given.get("out", DEFAULTS["out"])
        stored = run_flags.flags_of_run(out, "train_t2i.py", "llm", make_parser())
        run_flags.check_unchanged(args, stored, FIXED)
        if args.ema and stored["ema"] == 0:
            raise ValueError(f"--ema {args.ema} would go on with an average that this run, of "
                             f"--ema 0, does not have; leave it out, or start another run from "
                             f"the weights by --init")
        values |= stored
    else:
        fitting = fit_defaults(args, DEFAULTS | {"hold_out": 0}, with_conversations=True)
        values["batch"] = fitting["batch"]
        values |= presets(args, from_scratch)
    values |= given

    if values["micro_batch"] is None:
        values["micro_batch"] = run_flags.default_micro_batch(values["batch"])
    if values["llm_lr"] is None:
        values["llm_lr"] = values["lr"] / (3 if from_scratch else 10)
    if values["llm_start"] is None:
        values["llm_start"] = values["steps"] // 3 if from_scratch else 0
    if values["warmup"] is None:
        values["warmup"] = run_flags.default_warmup(values["steps"])
    if values["decay_start"] is None and args.recipe:
        values["decay_start"] = values["warmup"]
    elif values["decay_start"] is None:
        values["decay_start"] = max(values["warmup"], values["steps"] // 2)
    if values["decay_end"] is None:
        values["decay_end"] = max(values["decay_start"], values["steps"])
    return argparse.Namespace(**values)


def presets(args, from_scratch):
    """Defaults of a new run that depend on where it starts from, its recipe and its size."""
    values = {}
    if args.init:
        values |= flags_of_init(args)
    elif release.encoder_name(args.rae) == "tiny":
        values |= TINY_LATENTS
    if from_scratch:
        values |= FROM_SCRATCH
    values |= RECIPES.get(args.recipe, {})
    if args.model:
        values |= T2I_SIZES[args.model]
        values["head_width"] = 0
    if args.wide_head:
        values |= T2I_HEAD
    return values


def flags_of_init(args):
    """Flags that belong to the weights of --init. Raises ValueError beside --llm or --rae."""
    if args.llm or args.rae:
        raise ValueError(f"--init {args.init} brings its language model and autoencoder; leave "
                         f"--llm and --rae out")
    if args.init in release.PUBLISHED_T2I:
        size = T2I_SIZES[PUBLISHED_SIZES[args.init]]
        return dict(size, head_width=0, context=1024)       # that of its finetuning
    trained = read_t2i(args.init)["args"]
    return {name: trained[name] for name in OF_INIT if name in trained}


def check_flags(args):
    """Raise ValueError for flags that cannot be trained with, before any work is done."""
    run_flags.check_run_flags(args)
    check_amounts(args.data, args.batch, with_conversations=True)
    sample.check_sampling_flags(args)
    check_heads(args.llm_width, args.llm_heads, "--llm_width", "--llm_heads", multiple=2)
    check_heads(args.width, args.heads, "--width", "--heads", multiple=4)
    if args.head_width:
        check_heads(args.head_width, args.head_heads, "--head_width", "--head_heads", multiple=4)
    if args.class_dropout == 0 and args.guidance != 1:
        raise ValueError(f"--class_dropout 0 trains no null condition for --guidance "
                         f"{args.guidance}; add --guidance 1")
    if not args.warmup <= args.decay_start <= args.decay_end:
        raise ValueError(f"--warmup {args.warmup}, --decay_start {args.decay_start}, --decay_end "
                         f"{args.decay_end} must not decrease; lower --warmup")
    is_published = args.init in release.PUBLISHED_T2I or args.rae in release.PUBLISHED_RAES
    if args.release_dir and not is_published:
        raise ValueError(f"--release_dir {args.release_dir} is for published models; name one by "
                         f"--init or --rae, or leave the flag out")
    if args.eval_every and not has_shapes(args.data):
        raise ValueError("--eval_every runs ShapesEval, which measures nothing without shapes "
                         "among --data; leave it out")
    if args.shard and args.eval_every:
        raise ValueError("--eval_every draws with all weights on one process, and --shard spreads "
                         "them; evaluate checkpoints by eval_t2i.py")
    if args.shard and runtime.world_size() == 1:
        raise ValueError("--shard needs processes to share among; start with torchrun "
                         "--nproc_per_node=N train_t2i.py")


# ---------------------------------------------------------------------------- data
class Counts(NamedTuple):
    """What is in a micro-batch, or in a whole batch."""
    tokens: int              # to learn
    drawn: int               # images to draw
    understood: int          # images to understand
    cut: int                 # conversations that were longer than the context


class MicroBatch(NamedTuple):
    """What a process computes in one forward and backward pass."""
    number: int              # within the step, over all processes
    images: torch.Tensor     # b 3 H W, uint8
    asked: Conversations     # those that draw nothing
    drawn: Conversations     # those that draw their image
    counts: Counts

    def to(self, device):
        return self._replace(images=runtime.to_device(self.images, device),
                             asked=self.asked.to(device), drawn=self.drawn.to(device))

    def without_prompts(self):
        """The same, but what is to be drawn is drawn whatever its prompt."""
        tasks = torch.full_like(self.drawn.tasks, DRAW_UNCONDITIONED)
        return self._replace(drawn=self.drawn._replace(tasks=tasks))


def make_micro_batch(number, images, conversations, tokenizer, n, context):
    """Tokenize conversations and count what is in them."""
    ids, labels, tasks, num_cut = tokenize(tokenizer, conversations, n, context)
    is_drawing = tasks != UNDERSTAND                                    # b
    has_image = (ids == IMAGE).any(1)                                   # b
    counts = Counts(
        tokens=int((labels != NO_LABEL).sum()),
        drawn=int(is_drawing.sum()),
        understood=int((has_image & ~is_drawing).sum()),
        cut=num_cut)
    asked, drawn = split_tasks(ids, labels, tasks)
    return MicroBatch(number, images, asked, drawn, counts)


def training_steps(stream, tokenizer, n, context):
    """Yields (step, micro-batches) from the stream of data.batches.

    The micro-batches of a step come together, since their tokens and images are to be counted
    before any of them is computed: losses are means over the whole batch.
    """
    for step, items in groupby(stream, key=itemgetter(0)):
        micro_batches = []
        for _, number, images, _, conversations in items:
            micro_batches.append(
                make_micro_batch(number, images, conversations, tokenizer, n, context))
        yield step, micro_batches


def count_batch(micro_batches):
    """Counts of a step's batch over all processes, from this process's micro-batches."""
    counts = torch.zeros(len(Counts._fields), dtype=torch.float64)     # on the CPU, as they are
    for micro in micro_batches:
        counts += torch.tensor(micro.counts)
    totals = runtime.all_sum(counts).tolist()
    return Counts(*[round(total) for total in totals])


def preview_prompts(args, size, num_prompts=12):
    """Prompts of validation images that are to be drawn: the first ones among 60 images."""
    only_drawing = partial(converse, questions=0.0)
    val_data = open_data(args.data, size, split="val", chat=only_drawing)
    prompts = []
    for k in range(60):
        turns = val_data[k]["text"]
        prompt, answer = turns[0][1], turns[1][1]
        if len(turns) == 2 and prompt and "<image>" in answer:
            prompts.append(prompt)
    return prompts[:num_prompts]


# ---------------------------------------------------------------------------- model
def pretrained_language_model(source):
    """A published Qwen2 and its tokenizer, with rows for the tokens around an image."""
    llm, tokenizer = release.load_qwen2(source)
    # The published embedding has rows to spare, which were never trained. They are cut first: new
    # rows start as the mean of the old ones.
    llm.resize(len(tokenizer) - tokenizer.added)
    llm.resize(len(tokenizer))
    return llm, tokenizer


def small_language_model(args):
    """A Qwen2 of the size of --llm_*, not yet trained, and the shipped tokenizer."""
    tokenizer = Tokenizer(TOKENIZER)
    llm = Qwen2(vocab_size=len(tokenizer), hidden_size=args.llm_width,
                intermediate_size=2 * args.llm_width, num_hidden_layers=args.llm_depth,
                num_attention_heads=args.llm_heads, num_key_value_heads=args.llm_heads,
                rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False)
    # Qwen2's standard deviation of 0.02 is too little for small widths: prompts would not reach the
    # queries. These keep the variance.
    for parameter in llm.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    nn.init.normal_(llm.embed_tokens.weight)
    return llm, tokenizer


def build_model(args, context, latent_shape, init):
    """The T2I to train, on the CPU. Weights of --init are not loaded yet.

    context: most tokens of a conversation. init: dict of the checkpoint to start from, or None.
    """
    flags = dict(vars(args), context=context)
    if init:
        t2i = build_t2i(flags, init)
    else:
        if args.llm:
            llm, tokenizer = pretrained_language_model(args.llm)
        else:
            llm, tokenizer = small_language_model(args)
        t2i = build_t2i(flags, dict(latent_shape=latent_shape), llm, tokenizer)
    t2i.fit([""])                        # raises if the context has no room for a prompt
    t2i.llm.requires_grad_(not args.freeze_llm)
    t2i.llm.checkpoint = args.recompute
    t2i.dit.checkpoint = args.recompute
    return t2i.train()


def load_weights(t2i, init, resumed, args):
    """Load the weights of the resumed run, or those of --init, if there are any."""
    if resumed:
        release.load_release(t2i, resumed["model"], "the resumed model")
    elif init:
        weights = init["ema"] if "ema" in init else init["model"]
        release.load_release(t2i, weights, f"--init {args.init}")


def build_whole(args, context, rae, init, resumed, device):
    """The T2I to train and its EMA, with the weights they start from, and the T2IFlops of the T2I.

    The EMA is a frozen copy, to become the average of the weights; with --ema 0 the T2I itself.
    """
    latent_shape = list(rae.latent_mean.shape)              # c h w
    t2i = build_model(args, context, latent_shape, init)
    load_weights(t2i, init, resumed, args)
    if args.ema == 0:
        ema = t2i
    else:
        ema = copy.deepcopy(t2i).requires_grad_(False).eval()
    if resumed and args.ema > 0:
        release.load_release(ema, resumed["ema"], "the resumed EMA")
    flops = T2IFlops(ema, rae, args)
    if args.compile:
        runtime.compile_blocks(t2i)
    return t2i.to(device), ema.to(device), flops


def build_sharded(args, context, rae, init, resumed, device):
    """As build_whole(), but with weights that are spread over the processes.

    Only rank 0 ever has a T2I as a whole, on the CPU. If the weights are in pieces already, in the
    folder of a resumed run, nobody has, and they are yet to be read from there.
    """
    latent_shape = list(rae.latent_mean.shape)              # c h w
    is_in_pieces = resumed is not None and "weights" in resumed
    whole = None                                       # the T2I, on rank 0

    def build_on_rank_0():
        nonlocal whole
        whole = build_model(args, context, latent_shape, init)
        load_weights(whole, init, resumed, args)
        return dict(llm=whole.llm.config, tokenizer=whole.tokenizer.json, latent_shape=latent_shape)

    description = resumed if is_in_pieces else runtime.on_rank_0(build_on_rank_0)
    mesh = sharding.make_mesh(device)

    def build_empty():
        return release.build_empty(lambda: build_model(args, context, latent_shape, description))

    def spread(t2i):
        # The language model runs twice, for the two kinds of conversation: see T2I.forward.
        sharding.shard(t2i, mesh, args.dtype, blocks=t2i.dit.blocks, kept=t2i.llm.layers)
        sharding.give_memory(t2i, device)
        return t2i

    with FakeTensorMode(allow_non_fake_inputs=True):   # tensors of shapes alone
        like_t2i = build_model(args, context, latent_shape, description)
        flops = T2IFlops(like_t2i.eval(), rae, args)
    t2i = build_empty()
    if args.compile:
        runtime.compile_blocks(t2i)
    spread(t2i)
    if not is_in_pieces:
        sharding.broadcast_weights(t2i, whole, device)
    if args.ema == 0:
        return t2i, t2i, flops

    ema = spread(build_empty()).requires_grad_(False).eval()
    if resumed and not is_in_pieces:                   # a checkpoint of a run without --shard
        if whole is not None:
            release.load_release(whole, resumed["ema"], "the resumed EMA")
        sharding.broadcast_weights(ema, whole, device)
    else:
        sharding.copy_weights(ema, t2i)
    return t2i, ema, flops


# ---------------------------------------------------------------------------- optimiser
def make_optimizer(t2i, args):
    """AdamW with a group for the DiT and the connector, and one for the language model's side.

    Source: Scale-RAE's code, where the first learns at ten times the rate and with beta2 = 0.95.
    """
    dit_parameters = []
    llm_parameters = []
    for name, parameter in t2i.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith(("dit.", "diff_head_projector.")):
            dit_parameters.append(parameter)
        else:
            llm_parameters.append(parameter)
    groups = [dict(params=dit_parameters, betas=(0.9, 0.95), lr_scale=1.0),
              dict(params=llm_parameters, betas=(0.9, 0.999), lr_scale=args.llm_lr / args.lr)]
    return torch.optim.AdamW(groups, args.lr, eps=1e-8, weight_decay=args.weight_decay, fused=True)


# As a whole even if the run was started again with --shard. They stay on the device: Checkpoints
# copies them.
WHOLE = StateDictOptions(full_state_dict=True)


def whole_state(t2i, ema, optimizer):
    """State dicts for a checkpoint of one file. ema may be the T2I itself."""
    state = dict(model=get_model_state_dict(t2i, options=WHOLE))
    if ema is not t2i:
        state["ema"] = get_model_state_dict(ema, options=WHOLE)
    state["opt"] = get_optimizer_state_dict(t2i, optimizer, options=WHOLE)
    return state


def load_moments(t2i, optimizer, stored):
    """Load the moments of all parameters; rates and the like stay as the flags set them.

    stored: what whole_state() has under "opt", whatever the number of processes then and now.
    """
    if len(stored["param_groups"]) != len(optimizer.param_groups):
        raise ValueError("the checkpoint's optimizer is of other weights; start another run from "
                         "its weights by --init")
    shapes = {name: parameter.shape for name, parameter in t2i.named_parameters()}
    saving.check_moments(stored["state"], shapes, saving.ADAM_MOMENTS)
    groups = []
    for group, stored_group in zip(optimizer.param_groups, stored["param_groups"], strict=True):
        groups.append({**group, "params": stored_group["params"]})      # names of parameters
    state = dict(state=stored["state"], param_groups=groups)
    set_optimizer_state_dict(t2i, optimizer, state, options=WHOLE)


def load_pieces(t2i, ema, optimizer, out):
    """Load weights, EMA and moments, in place, from the folder that OUT/last.pt names."""
    sharding.empty_moments(optimizer)
    state = sharding.training_state(t2i, ema, optimizer)
    sharding.read_into(state, sharding.folder_of(Path(out) / "last.pt"))


# ---------------------------------------------------------------------------- training
class Losses:
    """Mean losses since the last line of the log."""
    def __init__(self, args, device):
        self.args = args
        self.device = device
        self.reset()

    def reset(self):
        self.by_time = runtime.LossByTime(self.device)
        self.sums = torch.zeros(2, device=self.device)     # cross-entropy, regression error
        self.tokens, self.drawn, self.cut = 0, 0, 0        # as in Counts, of all processes

    def add(self, micro, t, cross_entropy, error, flow):
        """Add the losses of a micro-batch, as T2I returns them, with flow matching at times t."""
        if micro.counts.drawn > 0:       # else the flow is that of a stand-in
            self.by_time.add(t, flow)
        self.sums += torch.stack([cross_entropy.detach(), error.detach().sum()])

    def add_counts(self, counts):
        """Add the Counts of a whole batch."""
        self.tokens += counts.tokens
        self.drawn += counts.drawn
        self.cut += counts.cut

    def write(self, log, step, grad_norm, lr, context):
        """Write the means over all processes to the log, and start again."""
        flow, loss_by_t = self.by_time.means()
        cross_entropy_sum, error_sum = runtime.all_sum(self.sums).tolist()
        cross_entropy = cross_entropy_sum / max(1, self.tokens)
        error = error_sum / max(1, self.drawn)
        loss = cross_entropy + self.args.flow_weight * flow + self.args.regression * error
        log.step(step, loss, grad_norm, lr, cross_entropy=cross_entropy, flow=flow,
                 regression=error, cut=self.cut, loss_by_t=loss_by_t)
        if self.cut > 0:
            log.say(f"{self.cut} prompts were longer than --context {context} tokens, and cut")
        self.reset()


class T2IFlops:
    """FLOPs of forward and backward passes, for the log. Padding and stand-ins count nothing.

    t2i: a T2I, not yet spread over processes. rae: an RAE on its device.
    """
    def __init__(self, t2i, rae, args):
        self.draws = args.draws
        d, vocab = t2i.llm.config["hidden_size"], t2i.llm.config["vocab_size"]
        layers = t2i.llm.layers
        weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
        token = speed.Flops(2 * weights, 0)
        label = speed.Flops(2 * d * vocab, 0)
        pair = speed.Flops(0, 4 * len(layers) * d)          # of tokens that attend to each other
        if args.freeze_llm:                                 # gradients still go to the queries
            self.token, self.label, self.pair = token.frozen, label.frozen, pair.frozen
        else:
            self.token, self.label, self.pair = token.training, label.training, pair.training

        device = t2i.latent_queries.device
        side, dit = rae.encoder.image_size, t2i.dit
        image = torch.zeros(1, 3, side, side, device=rae.latent_mean.device)
        x_t = torch.zeros(1, dit.in_channels, dit.grid, dit.grid, device=device)
        t = torch.zeros(1, device=device)
        states = torch.zeros(1, t2i.n, d, device=device)
        conditions = torch.zeros(1, t2i.n, dit.pos_embed.shape[2], device=device)
        tokens = torch.zeros(1, t2i.n, dit.in_channels, device=device)
        self.encode = speed.count_flops(rae.encode, image).forward
        self.flow = speed.count_flops(dit, x_t, t, conditions).training
        self.connect = speed.count_flops(t2i.diff_head_projector, states).training
        if t2i.regression is not None:
            self.connect += speed.count_flops(t2i.regression, states).training
        self.project = speed.count_flops(t2i.mm_projector, tokens).training

    def of(self, micro):
        """FLOPs of a micro-batch on the CPU."""
        parts = [part for part in (micro.asked, micro.drawn) if not part.is_stand_in]
        lengths = torch.cat([(part.ids != PAD).sum(1) for part in parts])   # b
        return (len(micro.images) * self.encode
                + int(lengths.sum()) * self.token
                + int(lengths.square().sum()) * self.pair
                + micro.counts.tokens * self.label
                + micro.counts.understood * self.project
                + micro.counts.drawn * (self.connect + self.draws * self.flow))


def main(args, data=None, conversation=None):
    """Train by the flags of parse_args.

    data: an ImageData in place of --data's training images. conversation: a function (scene, rng)
    -> [(role, text), ...] about a scene of shapes, in place of converse().
    """
    rank, world, device = runtime.setup()
    lock = storage.lock(args.out, is_folder=True)

    # ---------------------------------------------------------------- checkpoint and autoencoder
    resumed = release.load_resumed(args, "train_t2i.py") if args.resume else None
    init = resumed
    if args.init and not resumed:
        init = read_t2i(args.init, args.release_dir)
    if init:
        packed_rae = init["rae"]                            # the latent space that it knows
    else:
        packed_rae = release.load_packed_rae(args.rae or release.SHIPPED_RAE, args.release_dir)
    latent_shape = list(packed_rae["latent_mean"].shape)    # c h w
    num_latents = latent_shape[1] * latent_shape[2]
    context = args.context or num_latents + 176             # 176: ample for shapes, with a plan
    flags = dict(run_flags.flags_as_dict(args), context=context)

    # ---------------------------------------------------------------- data
    if conversation is None:
        conversation = partial(converse, questions=args.questions, plan=args.plan > 0)
    if data is None:
        data = open_data(args.data, packed_rae["size"], args.seed, objects=OBJECTS,
                         chat=conversation)
    check_batch(data, args.batch)
    identity = data.identity()
    run_flags.check_same_run(args, resumed, identity)
    change_of_data = saving.describe_change(resumed, identity, 0)
    prompts = []
    if args.preview_every and rank == 0 and not args.shard:
        prompts = preview_prompts(args, packed_rae["size"])

    # ---------------------------------------------------------------- model
    rae = release.unpack_rae(packed_rae).to(device)
    torch.manual_seed(args.seed)
    build = build_sharded if args.shard else build_whole
    t2i, ema, flops = build(args, context, rae, init, resumed, device)
    if args.compile:
        runtime.compile_blocks(rae.encoder)
    step_model = t2i
    if world > 1 and not args.shard:
        step_model = runtime.data_parallel(t2i)

    # ---------------------------------------------------------------- optimiser
    optimizer = make_optimizer(t2i, args)
    start = 0
    asked = init.get("asked", 0) if init else 0             # images it was asked about so far
    if resumed:
        start = resumed["step"]
        if "weights" in resumed:
            load_pieces(t2i, ema, optimizer, args.out)
        else:
            load_moments(t2i, optimizer, resumed["opt"])
    parameters = sum(p.numel() for p in t2i.parameters())
    log = progress.Log(argparse.Namespace(**flags), rank, device, start, parameters, data)
    make_checkpoints = sharding.Checkpoints if args.shard else saving.Checkpoints
    checkpoints = make_checkpoints(args, rank, log, lock, in_background=device.type != "cpu")
    checkpoints.begin(start)
    if rank == 0 and not args.shard:
        sharding.remove_unnamed(args.out)                   # of an earlier run with --shard
    log.warn(change_of_data)
    run_flags.warn_of_flags(log, args, resumed)
    release.warn_of_tiny_encoder(log, packed_rae["encoder"], data)
    losses = Losses(args, device)

    def save(step, is_stop):
        if args.shard:
            state = dict(pieces=sharding.training_state(t2i, ema, optimizer))
        else:
            state = whole_state(t2i, ema, optimizer)
        checkpoints.save(
            step, is_stop, **state, asked=asked, rae=packed_rae, args=flags, llm=t2i.llm.config,
            tokenizer=t2i.tokenizer.json, latent_shape=latent_shape, data=identity)

    # Previews and ShapesEval draw one image of a prompt, so nothing is to choose from.
    drawing = argparse.Namespace(**dict(vars(args), batch=72, best_of=1, verifier="answer"))

    def draw_preview():
        try:
            images = sample.generate_prompts(ema.eval(), rae, prompts, drawing, dtype=args.dtype)
        finally:
            t2i.train()                                     # it is the EMA itself with --ema 0
        return pictures.draw_grid(images, prompts)

    def evaluate(step):
        results = evaluate_prompts(ema.eval(), rae, drawing, args.eval_n, rank, world)
        log.write(dict(step=step, **results))
        log.say(f"step {step} | " + metrics.format_results(results))
        t2i.train()

    # ---------------------------------------------------------------- loop
    stream = batches(data, args.batch, args.micro_batch, start, rank, world, args.workers,
                     stop=args.steps)
    steps = training_steps(stream, t2i.tokenizer, t2i.n, context)
    for step, micro_batches in runtime.stop_request.catching(steps):
        counts = count_batch(micro_batches)
        losses.add_counts(counts)
        asked += counts.understood
        for i, micro in enumerate(micro_batches, start=1):
            is_last = i == len(micro_batches)
            log.flops += flops.of(micro)
            micro = micro.to(device)
            if step < args.llm_start:
                micro = micro.without_prompts()
            with runtime.autocast(device, args.dtype):
                latents = rae.encode(micro.images.float() / 255).float()    # b c h w, variance 1
            runtime.seed_step(args.seed, step, micro.number)
            k = args.draws * max(1, micro.counts.drawn)                 # 1: for T2I's stand-in
            eps = torch.randn(k, *latents.shape[1:], device=device)         # k c h w
            t = sample_times(k, args.time_law, eps[0].numel(), args.shift_base, device)     # k
            if args.shard:
                t2i.set_requires_gradient_sync(is_last)
            with runtime.sync_gradients(step_model, is_last):
                with runtime.autocast(device, args.dtype):
                    cross_entropy, error, flow = step_model(                # -, r, k
                        micro.asked, micro.drawn, latents, t, eps)
                if args.prediction == "x0":
                    flow = time_weight(t) * flow                            # k
                # Cross-entropy + regression |W s - x0|^2 + flow_weight |v - (eps - x0)|^2: means
                # over tokens, or over images, of the whole batch, however it is split.
                mean_flow = flow.sum() / max(1, counts.drawn * args.draws)
                loss = (cross_entropy / max(1, counts.tokens)           # [T2]
                        + args.regression * error.sum() / max(1, counts.drawn)
                        + args.flow_weight * mean_flow)
                (world * loss).backward()                   # processes' gradients are averaged
            losses.add(micro, t, cross_entropy, error, flow)

        lr = args.lr * runtime.lr_factor(step, args.warmup, args.decay_start, args.decay_end,
                                         args.lr_end, "cosine")
        grad_norm = runtime.optimizer_step([optimizer], t2i, args.clip, lr)
        if args.ema:
            runtime.update_ema(ema, t2i, args.ema, step)

        done = step + 1
        checkpoints.check(done, grad_norm, loss=loss.detach())
        is_end = done == args.steps
        is_stop = runtime.stop_request.was_made()
        log.first_steps(done)
        if done % args.log_every == 0 or is_end:
            losses.write(log, done, grad_norm, lr, context)
        if checkpoints.is_due(done, is_stop):
            save(done, is_stop)
        if is_stop and not is_end:
            checkpoints.say_stopped()
            break
        if prompts and (done % args.preview_every == 0 or is_end):
            log.preview(done, draw_preview)
        if args.eval_every and (done % args.eval_every == 0 or is_end):
            evaluate(done)


if __name__ == "__main__":
    runtime.run(main, parse_args)
