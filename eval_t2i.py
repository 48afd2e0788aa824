"""Stage 3's numbers: what is asked for in words, read back from the images.

    python eval_t2i.py                                             ShapesEval of the shipped model
    python eval_t2i.py --ckpt runs/t2i/last.pt --n 300 --best_of 4
    python eval_t2i.py --prompts evaluation_metadata.jsonl --out geneval/
    python eval_t2i.py --prompts dpg_bench/prompts/ --out dpg/

ShapesEval has GenEval's six categories (arXiv 2310.11513) on the built-in world, with 50 prompts
each. Training never shows its pairs of classes, nor its counts of one class. read_scene() judges
the images, and where it is unsure, the image is wrong. "overall" is the mean over the categories.
Protocol: 4 images of each of the 300 prompts. Questions about scenes are asked as well, about
held-out images and about what the model drew. train_t2i.py calls evaluate_prompts() on its EMA.

--prompts draws the images of GenEval or DPG-Bench, 4 for each prompt, in folders as their scorers
read them. Give the command of a killed run again, and it goes on.
"""
import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image

import evaluation
import progress
import release
import run_flags
import runtime
import sample
import storage
from data import SHAPES_VAL, parse_specs
from run_flags import at_least
from shapes import Scene, fulfils, read_scene, shapes_eval_prompts
from t2i import LONGEST_PROMPT, check_prompt

IMAGES_PER_PROMPT = 4          # of ShapesEval, GenEval and DPG-Bench
QUESTION_SCENES = 200          # held-out scenes that questions are asked about
SCENES_PER_BATCH = 50
QUESTIONS_PER_BATCH = 256      # of the language model
LARGEST_FILE = 2 ** 24         # bytes of --prompts: 100 times GenEval's


# ---------------------------------------------------------------------------- ShapesEval
def has_shapes(specs):
    """Whether shapes is among the sources of --data."""
    paths, _ = parse_specs(specs)
    return ["shapes"] in paths.values()


def check_world(state, source):
    """Raise ValueError if a T2I was not trained on shapes, which are all that ShapesEval asks for.

    state: dict of the checkpoint, from the file `source`. Published models know shapes, too.
    """
    specs, _ = release.training_data(state, source)
    if specs and not has_shapes(specs):
        raise ValueError(f"{source} was trained on {' '.join(specs)}, without shapes: ShapesEval "
                         f"would measure nothing; draw prompts of its own world by --prompts FILE, "
                         f"or by sample.py --prompt")


def count_right_answers(t2i, latents, scenes):
    """Ask a T2I all questions about b scenes, which latents b c h w show.

    Returns two counts, fp64: right answers, questions.
    """
    rows, questions, answers = [], [], []
    for row, scene in enumerate(scenes):
        for question, answer in scene.questions():
            rows.append(row)
            questions.append(question)
            answers.append(answer)

    right = 0
    for start in range(0, len(questions), QUESTIONS_PER_BATCH):
        batch = slice(start, start + QUESTIONS_PER_BATCH)
        replies = t2i.ask(latents[rows[batch]], questions[batch])
        for reply, answer in zip(replies, answers[batch], strict=True):
            if reply == answer:
                right += 1
    return torch.tensor([right, len(questions)], dtype=torch.float64)


def count_answers_on_images(t2i, rae, rank=0, world=1):
    """Right answers and questions about this process's part of the held-out scenes."""
    counts = torch.zeros(2, dtype=torch.float64)
    for numbers in runtime.split_numbers(QUESTION_SCENES, SCENES_PER_BATCH, rank, world):
        scenes = [Scene.random(0, SHAPES_VAL + number) for number in numbers]
        images = torch.from_numpy(np.stack([scene.render() for scene in scenes]))
        x = rearrange(images, "b h w c -> b c h w").float() / 255
        latents = rae.encode(x.to(rae.pixel_mean.device))                  # b c h w
        counts += count_right_answers(t2i, latents, scenes)
    return counts


def fraction(counts):                                                      # ... 2
    """First of two counts over the second; 0 of 0 is 0."""
    return counts[..., 0] / counts[..., 1].clamp(min=1)                    # ...


def evaluate_prompts(t2i, rae, args, n, rank=0, world=1):
    """ShapesEval on n images, and answers about held-out images and about what was drawn.

    t2i: T2I in eval mode. rae: with its encoder. args: sampling and verifier flags, batch, dtype.
    n: at least 6, since categories take turns. Returns a dict, the same on all processes.
    """
    tests = shapes_eval_prompts()
    categories = [test.category for test in tests[:6]]
    counts = torch.zeros(len(categories), 2, dtype=torch.float64)          # right, drawn
    own_answers = torch.zeros(2, dtype=torch.float64)                      # right, asked
    batch = max(1, args.batch // args.best_of)
    batches = runtime.split_numbers(n, batch, rank, world)
    for numbers in progress.progress_bar(batches, "evaluate"):
        batch_tests = [tests[number % len(tests)] for number in numbers]
        prompts = [test.prompt for test in batch_tests]
        with runtime.autocast(rae.pixel_mean.device, args.dtype):
            latents = sample.best_of(t2i, prompts, args, numbers)          # b c h w
            images = sample.to_images(rae, latents)                        # b H W 3
            found = [read_scene(image) for image in images.numpy()]
            # Only where read_scene() is sure of the objects, right answers are known.
            sure = [row for row, objects in enumerate(found) if objects]
            scenes = [Scene(found[row]) for row in sure]
            own_answers += count_right_answers(t2i, latents[sure], scenes)
        for test, objects in zip(batch_tests, found, strict=True):
            is_right = fulfils(objects, test.names, test.relation)
            counts[categories.index(test.category)] += torch.tensor([is_right, 1])
    image_answers = count_answers_on_images(t2i, rae, rank, world)

    accuracies = fraction(runtime.all_sum(counts)).tolist()
    results = dict(n=n, guidance=args.guidance, sampling_steps=args.sampling_steps,
                   best_of=args.best_of, verifier=args.verifier,
                   overall=sum(accuracies) / len(accuracies))
    results |= dict(zip(categories, accuracies, strict=True))
    results["answers_on_images"] = fraction(runtime.all_sum(image_answers)).item()
    results["answers_on_own_latents"] = fraction(runtime.all_sum(own_answers)).item()
    return results


# ---------------------------------------------------------------------------- GenEval and DPG-Bench
class Prompt(NamedTuple):
    name: str                  # of its folder or picture
    text: str
    metadata: str | None       # GenEval's line of JSON; DPG-Bench has none


def read_prompts(path):
    """The Prompts of GenEval's evaluation_metadata.jsonl or of DPG-Bench's folder of .txt files.

    Raises FileNotFoundError; ValueError if there is no prompt, or one that can't be drawn.
    """
    path = Path(path)
    prompts = read_dpg_bench(path) if path.is_dir() else read_geneval(path)
    if not prompts:
        raise ValueError(f"--prompts {path}: no prompt in {path}; give a .jsonl, or a folder of "
                         f".txt")
    for prompt in prompts:
        try:
            check_prompt(prompt.text)
        except ValueError as error:
            raise ValueError(f"--prompts {path}, {prompt.name}: {error}") from error
    return prompts


def read_text(path, largest):
    """The text of a file of at most `largest` bytes. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path} is no file; give a .jsonl, or a folder of .txt")
    size = path.stat().st_size
    if size > largest:
        raise ValueError(f"--prompts {path} has {size} bytes, more than prompts need; give a file "
                         f"of at most {largest}")
    try:
        return path.read_text("utf-8-sig")             # sig: without the mark that Windows writes
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path} is no UTF-8 ({error.reason} at byte {error.start}); "
                         f"convert it") from error


def read_dpg_bench(folder):
    prompts = []
    for file in sorted(folder.glob("*.txt")):
        # A character of UTF-8 has at most 4 bytes.
        text = read_text(file, largest=4 * LONGEST_PROMPT)
        prompts.append(Prompt(file.stem, text.strip(), metadata=None))
    return prompts


def read_geneval(path):
    # Not splitlines(): JSON may hold other ends of lines, inside a prompt.
    lines = read_text(path, LARGEST_FILE).split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    prompts = []
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, or thousands of brackets
            raise ValueError(f"--prompts {path}, line {number + 1}: {error}; every line must be "
                             f"JSON with a prompt") from None
        if not isinstance(record, dict) or "prompt" not in record:
            raise ValueError(f"--prompts {path}, line {number + 1}: no \"prompt\" in {line[:80]}; "
                             f"every line must be JSON with a prompt")
        prompts.append(Prompt(f"{number:05d}", record["prompt"], line))
    return prompts


def finish_geneval(folder, prompt):
    """Add metadata.jsonl to NAME/samples/0000.png ... 0003.png, as GenEval's scorer reads them."""
    line = f"{prompt.metadata}\n".encode()
    storage.write_whole(folder / prompt.name / "metadata.jsonl", lambda f: f.write(line))


def finish_dpg_bench(folder, prompt):
    """Put NAME/samples into NAME.png, in two rows, as DPG-Bench's scorer reads them."""
    files = sorted((folder / prompt.name / "samples").iterdir())
    images = np.stack([Image.open(file) for file in files])                # 4 h w c
    sheet = Image.fromarray(rearrange(images, "(r s) h w c -> (r h) (s w) c", r=2))
    storage.write_whole(folder / f"{prompt.name}.png", lambda f: sheet.save(f, "png"))
    shutil.rmtree(folder / prompt.name)


def draw_benchmark(args, rank, world, device):
    """Draw the images of --prompts into the folder --out."""
    start = time.time()
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists; delete it, or name another folder")
    prompts = read_prompts(args.prompts)
    t2i, rae, _ = sample.load_t2i_models(args, device)
    if rank == 0:
        sample.report_cut_prompts(t2i, [prompt.text for prompt in prompts])

    # Image i is of prompt i % len(prompts). Until all are drawn, they lie in a folder beside --out.
    texts = [prompt.text for prompt in prompts]
    depends_on = argparse.Namespace(**dict(vars(args), prompts=texts))
    folder = sample.parts_folder(args.out, depends_on, rae, t2i)
    files = []
    for number in range(IMAGES_PER_PROMPT):
        for prompt in prompts:
            files.append(folder / prompt.name / "samples" / f"{number:04d}.png")

    def draw_images(numbers):
        chosen = [texts[number % len(texts)] for number in numbers]
        return sample.generate_prompts(t2i, rae, chosen, args, numbers, args.dtype)

    if rank == 0:
        sample.report_stale_parts(folder)
    with sample.says_what_is_kept(files):
        sample.draw_files(files, draw_images, math.ceil(args.batch / args.best_of), rank, world)
    if rank > 0:
        return
    for prompt in prompts:
        if prompt.metadata is None:
            finish_dpg_bench(folder, prompt)
        else:
            finish_geneval(folder, prompt)
    folder.rename(args.out)
    sample.delete_parts(folder)
    print(f"{len(files)} images in {time.time() - start:.1f} s, {args.sampling_steps} "
          f"{args.solver} steps: {args.out}")


# ---------------------------------------------------------------------------- flags
def parse_args(argv=None):
    p = run_flags.Parser(__doc__, sample.MODEL_DEFAULTS)
    p.add_argument("--n", "--num_images", type=at_least(6),
                   help=f"Images of ShapesEval (default: {IMAGES_PER_PROMPT} for each prompt).")
    p.add_argument("--prompts", metavar="PATH",
                   help="GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder of .txt files, "
                        f"to draw {IMAGES_PER_PROMPT} images of each prompt into the folder --out, "
                        "in place of ShapesEval.")
    p.add_argument("--out", type=Path,
                   help="File to write the line of JSON to as well; with --prompts, the folder to "
                        "draw into.")
    sample.add_model_flags(p, classes=False)
    return p.parse(argv, lambda args: sample.resolve_model_flags(args, text=True), check_flags)


def check_flags(args):
    """Raise ValueError for flags that contradict each other."""
    sample.check_model_flags(args, text=True)
    if not args.prompts:
        return
    if args.n or args.out is None or args.out.suffix:
        raise ValueError(f"--prompts draws {IMAGES_PER_PROMPT} images each into a folder; leave "
                         f"--n out, and give --out FOLDER")


# ---------------------------------------------------------------------------- main
def main(args):
    rank, world, device = runtime.setup()
    if args.prompts:
        with storage.locked(args.out):
            return draw_benchmark(args, rank, world, device)
    start = time.time()
    evaluation.prepare_output(args.out)
    t2i, rae, state = sample.load_t2i_models(args, device, with_encoder=True)
    check_world(state, args.ckpt)
    n = args.n or IMAGES_PER_PROMPT * len(shapes_eval_prompts())
    results = evaluate_prompts(t2i, rae, args, n, rank, world)
    results |= dict(solver=args.solver, guidance_interval=list(args.interval),
                    release_grid=args.release_grid, weights=args.weights, checkpoint=args.ckpt,
                    seed=args.seed, dtype=args.dtype, tf32=runtime.uses_tf32(device))
    results |= evaluation.environment(device)
    if rank == 0:
        evaluation.report(results, time.time() - start, args.out)
    return results


if __name__ == "__main__":
    runtime.run(main, parse_args)
