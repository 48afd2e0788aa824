"""Stage 2: train a DiT or DiT^DH by flow matching on the latents of a frozen RAE.

    python train_dit.py                                             the built-in world, laptop size
    python train_dit.py --data photos/ --rae runs/decoder/last.pt   your own images
    torchrun --nproc_per_node=8 train_dit.py --model DiTDH-XL --data imagenet/ --rae decoder.pt --batch 1024
        --micro_batch 32 --steps 1000800 --lr 2e-4 --lr_end 0.1 --decay_start 50040 --ema 0.9995 --dtype fp32
        --time_law logit_normal --label_std 0.02 --solver euler --sampling_steps 50
(the paper's recipe). Writes OUT/last.pt (all that sampling and an exact resume need), log.jsonl, previews.
"""
import argparse
import contextlib
import copy
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import eval_fid
import runtime
import sample
from data import batches, check, open_data
from model import (DIT_SIZES, RELEASES, build_dit, flow_matching_loss, load_dit, load_release, require_heads,
                   time_shift, unpack_rae)
from runtime import at_least

SHIPPED_RAE = Path(__file__).resolve().parent / "assets" / "tiny_rae.safetensors"
BINS = 20                    # of t, for the balance of the loss
PAPERS = dict(shift_base=4096, prediction="v", balance="off")          # where left open; TINY for the
TINY = dict(shift_base=340, prediction="x0", balance="on")             # tiny encoder, whose tokens repeat
SHAPING = ("rae data seed batch micro_batch width depth heads head_width head_depth head_heads class_dropout "
           "shift_base prediction balance flip cache hold_out weight_decay dtype").split()    # fixed in a run


def add_dit_flags(p):
    """The flags of a DiT, its training and its run, shared with train_t2i.py."""
    # data
    p.add_argument("--data", nargs="+", default=["shapes"], help="shapes, folder, tars, NAME=PATH:WEIGHT ...")
    p.add_argument("--rae", help="checkpoint of train_decoder.py; default: of --init, else the shipped one")
    p.add_argument("--workers", type=at_least(0), default=1, help="loader processes of each training process")
    # model
    p.add_argument("--width", type=at_least(1), default=128, help="of the backbone; a multiple of 4 * heads")
    p.add_argument("--depth", type=at_least(1), default=4, help="blocks of the backbone")
    p.add_argument("--heads", type=at_least(1), default=4, help="attention heads of the backbone")
    p.add_argument("--head_width", type=at_least(0), default=192, help="of the head; 0: none, the plain DiT")
    p.add_argument("--head_depth", type=at_least(1), default=1, help="blocks of the wide head")
    p.add_argument("--head_heads", type=at_least(1), default=4, help="attention heads of the wide head")
    p.add_argument("--class_dropout", type=at_least(0.0, 1), default=0.1, help="share of null conditions, <1")
    # optimisation
    p.add_argument("--batch", type=at_least(1), default=64, help="images per optimizer step, all processes")
    p.add_argument("--micro_batch", type=at_least(1), help="images per process and forward; default: all")
    p.add_argument("--steps", type=at_least(1), default=2400, help="optimizer steps in all")
    p.add_argument("--lr", type=at_least(1e-9), default=3e-3, help="peak learning rate; papers 2e-4, 5e-4")
    p.add_argument("--lr_end", type=at_least(0.0, 1 + 1e-9), default=0.02, help="share of --lr; paper 0.1")
    p.add_argument("--warmup", type=at_least(0), default=100, help="steps of linear warm-up")
    p.add_argument("--decay_start", type=at_least(0), help="step where decay begins; default: steps / 2")
    p.add_argument("--decay_end", type=at_least(0), help="step at which it ends (default: steps)")
    p.add_argument("--weight_decay", type=at_least(0.0), default=0.0)
    p.add_argument("--clip", type=at_least(0.0), default=1.0, help="largest gradient norm; 0: none")
    p.add_argument("--ema", type=at_least(0.0, 1), default=0.998, help="decay per step, <1; papers 0.9995")
    p.add_argument("--time_law", choices=("logit_normal", "uniform"), default="uniform", help="of t")
    p.add_argument("--shift_base", type=at_least(1e-9), help="n of the shift sqrt(m/n); else 4096, tiny 340")
    p.add_argument("--prediction", choices=("v", "x0"), help="of the model; default v, tiny encoder x0")
    p.add_argument("--balance", choices=("on", "off"), help="loss over its mean at t; default off, tiny on")
    # run
    p.add_argument("--out", default="runs/dit", help="folder of the run")
    p.add_argument("--dtype", choices=("bf16", "fp32"), default=runtime.DTYPE, help="bf16 where fast")
    p.add_argument("--log_every", type=at_least(1), default=50, help="steps")
    p.add_argument("--save_every", type=at_least(1), default=500, help="steps; the last step is always saved")
    p.add_argument("--preview_every", type=at_least(0), default=500, help="steps between grids; 0: none")
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt")
    p.add_argument("--overwrite", action="store_true", help="start anew although OUT/last.pt exists")
    p.add_argument("--wandb", metavar="PROJECT", help="also log to Weights & Biases (pip install wandb)")
    sample.add_sampling_flags(p)


def check_dit_flags(p, args):
    """Fill in what depends on other flags, and refuse what can't be trained, through parser.error."""
    args.decay_start = max(args.warmup, args.steps // 2) if args.decay_start is None else args.decay_start
    args.decay_end = max(args.decay_start, args.steps) if args.decay_end is None else args.decay_end
    runtime.check_common(p, args)
    sample.check_sampling_flags(p, args, "init")
    try:
        require_heads(args.width, args.heads, "--width", "--heads", multiple=4)
        if args.head_width:
            require_heads(args.head_width, args.head_heads, "--head_width", "--head_heads", multiple=4)
    except ValueError as error:
        p.error(str(error))
    if args.class_dropout == 0 and args.guidance != 1:
        p.error(f"--class_dropout 0 trains no null class for --guidance {args.guidance}; add --guidance 1")
    if not args.warmup <= args.decay_start <= args.decay_end:
        p.error(f"--warmup {args.warmup}, --decay_start {args.decay_start}, --decay_end {args.decay_end} "
                f"must not decrease; lower --warmup")
    if args.rae and not Path(args.rae).exists():
        p.error(f"--rae {args.rae} does not exist; train one with train_decoder.py, or leave the flag out")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    add_dit_flags(p)
    p.add_argument("--flip", choices=("on", "off"), default="on", help="mirror half of the images")
    p.add_argument("--hold_out", type=at_least(0), default=0, help="images kept for evaluation")
    p.add_argument("--cache", type=at_least(0), default=0, help="images encoded once, kept in RAM")
    p.add_argument("--model", choices=DIT_SIZES, help="sets width, depth, heads, head_* as in the paper")
    p.add_argument("--init", help="start from a checkpoint's EMA; imagenet256, imagenet512: official")
    p.add_argument("--label_std", type=at_least(0.0), default=1.0, help="class table at first; papers 0.02")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--eval_every", type=at_least(0), default=0, help="steps between EMA evaluations; 0: none")
    p.add_argument("--eval_n", type=at_least(2), default=360, help="images per evaluation")
    p.add_argument("--eval_features", help="inception, fd-dinov2 or an encoder; default: the RAE's")
    args = p.parse_args(argv)
    if args.init in RELEASES:                                  # goes on as it was trained
        p.set_defaults(lr=2e-4, ema=0.9995, time_law="logit_normal", label_std=0.02, **DIT_SIZES["DiTDH-XL"])
    p.set_defaults(**DIT_SIZES.get(args.model, {}))            # the size, then what was given beside it
    args = p.parse_args(argv)
    check_dit_flags(p, args)
    eval_fid.check_features(p, args, "eval_features")
    return args


def replay(data, rae, args, start, rank, world, device):
    """As batches(), latents for images: those of the first --cache images, encoded once, drawn at random."""
    parts, unit = [], args.micro_batch * world
    turns = -(-args.cache // unit)
    for *_, images, labels, _ in batches(data, unit, args.micro_batch, 0, rank, world, args.workers, turns):
        with runtime.autocast(device, args.dtype):
            parts.append((rae.encode(images.to(device).float() / 255).half().cpu(), labels))
    parts = [torch.cat(x) for x in zip(*(part for turn in zip(*eval_fid.gather(parts)) for part in turn))]
    for step in range(start, args.steps):
        for m in range(rank, args.batch // args.micro_batch, world):
            rows = np.random.default_rng((args.seed, step, m)).integers(args.cache, size=args.micro_batch)
            yield step, m, parts[0][rows], parts[1][rows], None


def main(args):
    rank, world, device = runtime.setup()
    accumulate = args.batch // (args.micro_batch * world)
    resumed = args.resume and runtime.resume(args, SHAPING)
    init = {} if resumed or not args.init else load_dit(args.init, encoder=None, folder=args.release_dir)[2]
    packed = (resumed or not args.rae and init or runtime.load_checkpoint(args.rae or SHIPPED_RAE)).get("rae")
    if packed is None:
        raise ValueError(f"--rae {args.rae} is no checkpoint of train_decoder.py; give one of those")
    split = dict(hold_out=args.hold_out, objects=1)
    data = open_data(args.data, packed["size"], args.seed, flip=args.flip == "on", **split)
    val = open_data(args.data, packed["size"], split="val", **split)
    check(data, args.batch)
    eval_fid.check_n(args, val)
    judge = eval_fid.find_judge(args.eval_features).to(device) if args.eval_features else None
    usual = init.get("args", TINY if packed["encoder"] == "tiny" else PAPERS)     # --init: as it was trained
    vars(args).update({k: usual.get(k, PAPERS[k]) for k in PAPERS if getattr(args, k) is None})
    rae = unpack_rae(packed).to(device)
    val.size = max(val.size, side := rae.decoder.grid * rae.decoder.patch)      # of what is drawn
    eval_fid.check_side(args, val, side)
    channels, grid, _ = packed["latent_mean"].shape
    torch.manual_seed(args.seed)
    model = build_dit(vars(args), channels, grid, data.num_classes).to(device).train()
    torch.nn.init.normal_(model.y_embedder.embedding_table.weight, std=args.label_std)
    if init:
        weights, table = dict(init["ema"]), "y_embedder.embedding_table.weight"
        if init["num_classes"] != data.num_classes:                     # only the null class is known
            weights[table] = torch.cat([model.state_dict()[table][:-1].cpu(), weights[table][-1:]])
        load_release(model, weights, f"--init {args.init}")
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    opt = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.95), 1e-8, args.weight_decay, fused=True)
    level, start = torch.ones(BINS, device=device), 0                   # running mean of the loss by t
    if resumed:
        load_release(model, {"model": resumed["model"]})
        load_release(ema, {"ema": resumed["ema"]})
        opt.load_state_dict(resumed["opt"])
        level, start = resumed["level"].to(device), resumed["step"]
    step_model = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    if args.compile:
        step_model = torch.compile(step_model)
    log = runtime.Log(args, rank, device, start, sum(p.numel() for p in model.parameters()))

    def save(step):
        if rank == 0:
            runtime.save_checkpoint(
                f"{args.out}/last.pt", model=model.state_dict(), ema=ema.state_dict(), step=step,
                opt=opt.state_dict(), level=level, args=runtime.plain(args), rae=packed,
                num_classes=data.num_classes, class_names=data.class_names, latent_shape=[channels, grid])

    stream = replay(data, rae, args, start, rank, world, device) if args.cache else batches(
        data, args.batch, args.micro_batch, start, rank, world, args.workers, stop=args.steps)
    sums, by_t = torch.zeros(2, 2, BINS, device=device)    # losses and counts: of a step, of a log interval
    for step, m, x0, labels, _ in stream:
        last = m // world == accumulate - 1
        x0, labels = x0.to(device).float(), labels.to(device)
        if not args.cache:                                              # they are images yet: b 3 H W
            with runtime.autocast(device, args.dtype):
                x0 = rae.encode(x0 / 255).float()                       # b c h w, unit variance
        runtime.seed_step(args.seed, step, m)
        t = torch.randn(len(x0), device=device).sigmoid()               # b
        t = t if args.time_law == "logit_normal" else torch.rand_like(t)
        t = time_shift(t, x0[0].numel(), model.shift_base)
        eps = torch.randn_like(x0)
        quiet = contextlib.nullcontext() if world == 1 or last else step_model.no_sync()
        with quiet:                                                     # DDP averages gradients once a step
            with runtime.autocast(device, args.dtype):
                loss = flow_matching_loss(step_model, x0, labels, t, eps)  # b
            if model.prediction == "x0":
                loss = loss * t.square()                                # the error of x0, from t = 0.05 on
            at = (t * BINS).long().clamp(max=BINS - 1)                  # b
            weight = 1 / level[at] if args.balance == "on" else 1.0     # each t has the same say
            ((weight * loss).mean() / accumulate).backward()
        sums = sums.index_add(1, at, torch.stack([loss.detach(), torch.ones_like(loss)]))
        if not last:
            continue
        lr = args.lr * runtime.lr_factor(step, args.warmup, args.decay_start, args.decay_end, args.lr_end)
        norm = runtime.step_optimizers([opt], model, args.clip, loss.detach().mean(), step, lr)
        runtime.update_ema(ema, model, args.ema, step)
        sums = runtime.all_mean(sums)
        mean, by_t, sums = sums[0] / sums[1], by_t + sums, torch.zeros_like(sums)
        # Nan: no t fell into the bin. In logarithms: one wild loss does not silence its t for long.
        level = torch.where(mean.isfinite(), level ** 0.95 * mean ** 0.05, level)
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            tenths = by_t.view(2, 10, -1).sum(2)
            log.step(done, float(by_t[0].sum() / by_t[1].sum()), norm, lr,
                     loss_by_t=[x if x == x else None for x in (tenths[0] / tenths[1]).tolist()])
            by_t = torch.zeros_like(by_t)
        if done % args.save_every == 0 or done == args.steps:
            save(done)
        if args.preview_every and (done % args.preview_every == 0 or done == args.steps) and rank == 0:
            images = sample.generate(ema, rae, [*range(min(36, data.num_classes))] * 2, args)
            sample.draw_grid(images, data.class_names[:36]).save(f"{args.out}/preview_{done:07d}.png")
        if args.eval_every and (done % args.eval_every == 0 or done == args.steps):
            metrics = eval_fid.evaluate_generation(ema, rae, val, args, args.eval_n, rank, world, judge=judge)
            log.write(dict(step=done, **metrics))
            log.say(f"step {done} | " + eval_fid.one_line(metrics))


if __name__ == "__main__":
    runtime.run(main, parse_args)
