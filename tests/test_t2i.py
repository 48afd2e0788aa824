"""Stage 3: data, losses, exact resume, processes, releases. Run: python -m pytest tests/test_t2i.py"""
import json
import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file

import dry_run
import runtime
import sample
import train_dit
import train_t2i
from conftest import torchrun
from data import open_data
from eval_fid import answered, fulfilled, shapes_eval
from llm import IMAGE, SYSTEM, Qwen2, Tokenizer
from model import build_dit, flow_matching_loss
from shapes import Scene, read_scene
from test_shapes import answer, holds
from test_train import DIT, difference, go, go_on_one_thread, load
from train_t2i import ALIGN, DESCRIBE, T2I, TOKENIZER, WHERE, converse, load_t2i, tokenise

FLAGS = ("--width 32 --depth 1 --heads 2 --head_width 192 --head_depth 1 --head_heads 4 --llm_width 32 "
         "--llm_depth 1 --llm_heads 2 --batch 8 --micro_batch 4 --workers 0 --log_every 2 --save_every 4 "
         "--preview_every 0 --warmup 2 --decay_start 2 --decay_end 8 --sampling_steps 2 "
         "--questions 0.5 --llm_start 0").split()
SIZES = dict(width=32, depth=1, heads=2, head_width=0, class_dropout=0.0)
DRAW, EMPTY = ([("user", text), ("assistant", "<image>")] for text in ("a red circle", ""))
LOOK = [("user", "<image>\nwhat is it?"), ("assistant", "a star"), ("user", "sure?"), ("assistant", "yes")]
TALK = [("user", "how are you?"), ("assistant", "fine")]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER)


def tiny(tokenizer, connector="linear", **changes):
    """A T2I of 8 channels on a 4 x 4 grid, all of whose parameters matter."""
    torch.manual_seed(1)
    llm = Qwen2(len(tokenizer), 32, 64, 2, 2, 2, 1e4, 1e-6, False)
    plan = changes.pop("plan", 0)
    dit = build_dit({**SIZES, **changes}, 8, 4, None)
    model = T2I(llm, tokenizer, dit, connector, regression=True, plan=plan)
    for p in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(p, std=max(p.shape[-1], 16) ** -0.5)
    return model


def batch(tokenizer, talks, draws=1):
    ids, labels, kind, _ = tokenise(tokenizer, talks, 16)
    k = draws * max(1, int((kind > 0).sum()))
    return ids, labels, torch.randn(len(talks), 8, 4, 4), kind, torch.rand(k), torch.randn(k, 8, 4, 4)


def rows(folder):
    return [json.loads(row) for row in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------- what is said of a scene
def place(o):                                              # "small red star c7": column c of a to j, row 7
    return f"{o.size} {o.name} {chr(97 + int(10 * o.centre[0]))}{int(10 * o.centre[1])}"


def test_what_is_said_of_scenes_is_true(monkeypatch):
    monkeypatch.setattr(train_t2i, "reword", lambda text, rng: text)
    data = open_data("shapes", 16, chat=partial(converse, questions=0.5))
    aligned, names = Counter(), Counter()
    before, after = ALIGN.split("{}")
    for k in range(1000):
        item, scene = data[k], Scene.random(0, k)
        if scene.held_out():                               # another scene took its place
            continue
        said = [text.removeprefix("<image>\n") for _, text in item["text"]]
        if len(said) == 2:
            names["draw"] += 1
            shapes = [o.shape for o in scene.objects]
            plan, after_it = said[1].split("<image>")
            assert sorted(plan.split(", ")) == sorted(place(o) for o in scene.objects) and after_it == ""
            found = [said[0].find(next(x for x in (part[:-3], part.split(" ", 1)[1][:-3], part.split()[2])
                                       if x in said[0])) for part in plan.split(", ")]
            assert found == sorted(found)                  # in the order of the prompt
            assert said[0] == train_t2i.listing(shapes) or holds(said[0], scene)
            continue
        names["look"] += 1
        assert len(said) == 6 and item["text"][0][1].startswith("<image>\n")
        for question, told in zip(said[::2], said[1::2]):
            if question.startswith(before):
                text = question.removeprefix(before).removesuffix(after)
                assert holds(text, scene) == (told == "yes"), (text, scene.caption())
                aligned[told] += 1
            elif question == DESCRIBE:
                assert holds(told, scene)
            elif question.lower().startswith("where is "):
                thing = question.removeprefix("where is the ").removesuffix("?")
                found = [place(o) for o in sorted(scene.objects, key=lambda o: o.centre[::-1])]
                cells = [text[-2:] for text in found if thing in text.replace(text.split()[2], "object") or
                         thing in text]
                names["everywhere" if question == WHERE else "nowhere" if told == "nowhere" else "where"] += 1
                assert told == (", ".join(found) if question == WHERE else ", ".join(cells) or "nowhere")
            else:
                assert told == answer(question, scene)
    assert abs(names["look"] / (names["look"] + names["draw"]) - 0.5) < 0.05
    assert abs(aligned["no"] / aligned.total() - 0.48) < 0.1 and aligned["no"] > 150
    assert min(names[x] for x in ("everywhere", "where", "nowhere")) > 10


def test_no_training_text_names_what_is_held_out(monkeypatch):
    """Neither as a scene nor as a wrong prompt, which would teach that it is never right."""
    monkeypatch.setattr(train_t2i, "reword", lambda text, rng: text)
    data, seen = open_data("shapes", 16, seed=3, chat=partial(converse, questions=0.6)), 0
    monkeypatch.setattr(train_t2i, "altered", lambda scene, rng: next(
        other for i in range(999) if (other := Scene.random(9, int(rng.integers(9999)))).held_out()))
    for k in range(300):
        said = [text for _, text in data[k]["text"]]
        wrong = [q for q, told in zip(said[::2], said[1::2]) if told == "no" and "align" in q]
        assert not wrong
        seen += len(said) == 6
    assert seen > 100 and sum(Scene.random(3, k).held_out() for k in range(300)) > 20


def test_conversations_are_a_function_of_seed_and_number():
    chat = partial(converse, questions=0.25)
    one, two, other = (open_data("shapes", 16, seed=seed, chat=chat) for seed in (1, 1, 2))
    talks = [one[k]["text"] for k in range(400)]
    assert talks == [two[k]["text"] for k in reversed(range(400))][::-1]
    assert talks[:50] != [other[k]["text"] for k in range(50)]
    share = sum(len(talk) > 2 for talk in talks) / 400
    assert abs(share - 0.25) < 0.07
    sizes = [len(Scene.random(1, k).objects) for k in range(400)]       # whatever is in the scene
    asked = Counter(n for n, talk in zip(sizes, talks) if len(talk) > 2)
    assert min(asked[n] for n in (1, 2, 3, 4)) > 10
    starts = Counter(talk[0][1].split()[0] for talk in talks)
    assert {"draw", "generate", "can", "please", "i", "a", "two"} <= starts.keys()


def test_kinds_of_conversations(tokenizer):
    ids, labels, kind, cut = tokenise(tokenizer, [DRAW, EMPTY, LOOK, TALK], 16)
    assert kind.tolist() == [1, 2, 0, 0] and cut == 0
    assert ((ids == IMAGE).sum(1)).tolist() == [16, 16, 16, 0]
    assert (labels[ids == IMAGE] < 0).all() and (labels[ids < 0] < 0).all()
    long = [[("user", "a red circle " * 50), ("assistant", "<image>")], DRAW]
    ids, _, _, cut = tokenise(tokenizer, long, 16, 100)
    assert cut == 1 and ids.shape[1] <= 100


# ---------------------------------------------------------------------------------- losses and gradients
@pytest.mark.parametrize("talks", [[DRAW], [LOOK], [TALK, TALK], [EMPTY], [DRAW, LOOK, TALK, EMPTY]])
@pytest.mark.parametrize("more", [{}, dict(head_width=48, head_depth=1, head_heads=3)])
def test_every_parameter_has_a_gradient_whatever_the_batch(tokenizer, talks, more):
    model = tiny(tokenizer, "mlp2" if more else "linear", class_dropout=0.1, **more).train()
    ce, error, loss = model(*batch(tokenizer, talks))
    (ce + (error.sum() + loss.sum()) * any(turns[-1][1] == "<image>" for turns in talks)).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), name
    grads = {k: float(p.grad.abs().sum()) for k, p in model.named_parameters() if p.grad is not None}
    assert (grads["latent_queries"] > 0) == (DRAW in talks or EMPTY in talks)
    assert (grads["mm_projector.0.weight"] > 0) == (LOOK in talks)
    assert (grads["dit.x_embedder.proj.weight"] > 0) == (DRAW in talks or EMPTY in talks)


def test_losses_equal_those_of_single_conversations(tokenizer):
    model = tiny(tokenizer).eval()
    talks = [DRAW, LOOK, TALK, EMPTY, DRAW[:1] + [("assistant", "well: <image>")]]
    ids, labels, latents, kind, t, eps = batch(tokenizer, talks, draws=2)
    with torch.no_grad():
        ce, error, loss = model(ids, labels, latents, kind, t, eps)
        parts = [model(ids[s], labels[s], latents[s], kind[s], t[:2], eps[:2])[0]
                 for s in ([0, 1], [2], [3, 4])]
        wanted, conditions, errors = 0.0, {}, []
        for i, turns in enumerate(talks):                               # literally, one by one, not padded
            row, label, _ = tokenizer.chat(turns, 16)
            x, image = [], iter(range(16))
            for token in row:
                if token == IMAGE:
                    j = next(image)
                    z = latents[i].flatten(1)[:, j]
                    x.append(model.mm_projector(z) if turns is LOOK else model.latent_queries[j])
                else:
                    x.append(model.llm.embed_tokens.weight[token])
            hidden = model.llm(torch.stack(x)[None])[0]
            logits = model.llm.logits(hidden)
            pairs = [(logits[k - 1], label[k]) for k in range(1, len(row)) if label[k] >= 0]
            wanted += sum(F.cross_entropy(p[None], torch.tensor([y])) for p, y in pairs)
            if turns not in (LOOK, TALK):
                told = [hidden[k] for k, token in enumerate(row) if token == IMAGE]
                told = model.regression(torch.stack(told))
                errors.append((told - latents[i].flatten(1).T).square().mean())
                y = torch.stack([hidden[k] for k, token in enumerate(row) if token == IMAGE])
                conditions[i] = model.dit.null(torch.empty(16, 32)) if turns is EMPTY else \
                    model.diff_head_projector(y)
        flows = [flow_matching_loss(model.dit, latents[i][None], y[None], t[k:k + 1], eps[k:k + 1])
                 for k, (i, y) in enumerate([*conditions.items()] * 2)]
    torch.testing.assert_close(ce, wanted, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(sum(parts), ce, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(error, torch.stack(errors), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, torch.cat(flows), atol=1e-5, rtol=1e-5)


def test_an_empty_prompt_is_the_dropped_condition(tokenizer):
    model, always = tiny(tokenizer).train(), tiny(tokenizer, class_dropout=1.0).train()
    empty, full = batch(tokenizer, [EMPTY]), batch(tokenizer, [DRAW])
    empty, full = ([*x[:2], *full[2:3], x[3], *full[4:]] for x in (empty, full))
    assert torch.equal(model(*empty)[2], always(*full)[2])
    assert not torch.equal(model(*empty)[2], model(*full)[2])
    y = model.conditions(["", "a red circle"])
    assert torch.equal(y[0], model.dit.null(y[0])) and not torch.equal(y[1], model.dit.null(y[1]))


def record_of_a_run(tmp_path, *flags, **patches):
    go(train_t2i, *FLAGS, *flags, "--out", tmp_path)
    return rows(tmp_path)[-1]


def test_logged_losses_are_means_over_the_whole_batch(tmp_path, monkeypatch):
    """The gradient is that of the mean over all tokens plus flow_weight times that over all images."""
    seen, forward = [], T2I.forward
    monkeypatch.setattr(T2I, "forward", lambda self, ids, labels, *rest: seen.append(
        [(labels >= 0).sum(), *(out := forward(self, ids, labels, *rest)), rest[1]]) or out)
    record = record_of_a_run(tmp_path, "--steps", 1, "--balance", "off", "--prediction", "v",
                             "--flow_weight", 3)
    tokens = sum(n for n, *_ in seen)
    ce = float(sum(ce.detach() for _, ce, *_ in seen) / tokens)
    assert len(seen) == 2 and abs(record["cross_entropy"] - ce) < 1e-5
    flow = torch.cat([loss for *_, loss, kind in seen if (kind > 0).any()]).mean()
    assert abs(record["flow"] - float(flow)) < 1e-5
    error = torch.cat([error for *_, error, _, kind in seen if (kind > 0).any()]).mean()
    assert abs(record["regression"] - float(error)) < 1e-5
    assert abs(record["loss"] - record["cross_entropy"] - 3 * record["flow"] - record["regression"]) < 1e-5


def test_the_first_steps_draw_without_prompts(tmp_path, monkeypatch):
    """Until --llm_start the DiT has the null condition, and the language model learns by the other losses."""
    kinds, forward = [], T2I.forward
    monkeypatch.setattr(T2I, "forward", lambda self, ids, labels, latents, kind, *rest: kinds.append(
        set(kind.tolist())) or forward(self, ids, labels, latents, kind, *rest))
    record_of_a_run(tmp_path, "--steps", 4, "--micro_batch", 8, "--llm_start", 2)
    assert kinds == [{0, 2}, {0, 2}, {0, 1}, {0, 1}]


def test_micro_batches_give_the_gradient_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(train_t2i, "time_shift", lambda t, *_: torch.full_like(t, 0.3))
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: torch.ones(*shape, **how) * 0.7)
    seen = []
    monkeypatch.setattr(runtime, "step_optimizers", lambda opts, model, *rest: seen.append(
        {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}) or 0.0)
    for n in (8, 2, 1):                                    # of one conversation too: drawing or understanding
        go(train_t2i, *FLAGS, "--micro_batch", n, "--steps", 1, "--dtype", "fp32", "--class_dropout", 0,
           "--guidance", 1, "--out", tmp_path / str(n))
    assert difference(seen[0], seen[1]) < 1e-5 and difference(seen[0], seen[2]) < 1e-5


# ---------------------------------------------------------------------------------- conditions and scores
PROMPTS = ["a red circle", "two blue stars and a green ring above a yellow cross", "a star", "nothing"]


def test_conditions_do_not_depend_on_the_batch(tokenizer):
    model = tiny(tokenizer).eval()
    together = model.conditions(PROMPTS)
    assert together.shape == (4, 16, 32) and together.dtype == torch.float32
    for prompt, y in zip(PROMPTS, together):
        torch.testing.assert_close(model.conditions([prompt])[0], y, atol=1e-5, rtol=1e-5)
    ids, _, _ = tokenizer.chat([("user", PROMPTS[1]), ("assistant", "<image>")], 16)
    x = torch.stack([model.llm.embed_tokens.weight[max(i, 0)] for i in ids])
    x[torch.tensor(ids) == IMAGE] = model.latent_queries
    y = model.diff_head_projector(model.llm(x[None])[0][torch.tensor(ids) == IMAGE])
    torch.testing.assert_close(together[1], y, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_plan_is_said_before_the_image(tokenizer):
    """The same for any batch; what it says stands before the queries, and each luck says something else."""
    model, luck = tiny(tokenizer, plan=6).eval(), torch.rand(4, 6)
    said = model.plans(PROMPTS, luck)
    assert said == [model.plans([prompt], row[None])[0] for prompt, row in zip(PROMPTS, luck)]
    assert said != model.plans(PROMPTS, torch.rand(4, 6)) and model.plans(PROMPTS) == model.plans(PROMPTS)
    y = model.conditions(PROMPTS, luck)
    for prompt, plan, row in zip(PROMPTS, said, y):
        ids, _, _ = tokenizer.chat([("user", prompt), ("assistant", f"{plan}<image>")], 16)
        x = torch.stack([model.llm.embed_tokens.weight[max(i, 0)] for i in ids])
        x[torch.tensor(ids) == IMAGE] = model.latent_queries
        own = model.diff_head_projector(model.llm(x[None])[0][torch.tensor(ids) == IMAGE])
        torch.testing.assert_close(row, own, atol=1e-5, rtol=1e-5)
    model.plan = 0
    assert not torch.allclose(model.conditions(PROMPTS), y, atol=1e-3)


@torch.no_grad()
def test_plans_of_images_differ_but_not_by_the_batch(tokenizer, monkeypatch):
    """Equal prompts are planned anew for each image number; what ends a turn or names an image is cut."""
    model, seen = tiny(tokenizer, plan=6).eval(), []
    monkeypatch.setattr(model, "conditions", lambda texts, luck: seen.extend(
        model.plans(texts, luck)) or torch.zeros(len(texts), 16, 32))
    args = sample.parse_args(["--prompt", "-", "--sampling_steps", "1", "--guidance", "1"])
    z = sample.draw_prompts(model, ["a star"] * 4, args, range(4))
    together = [*seen]
    for i in range(4):
        torch.testing.assert_close(sample.draw_prompts(model, ["a star"], args, [i]), z[i:i + 1])
    assert seen[4:] == together and len(set(together)) > 1
    said = [*tokenizer.encode("ab<image>c"), tokenizer.end, *tokenizer.encode("user")]
    monkeypatch.setattr(model.llm, "generate", lambda *_: torch.tensor([said]))
    assert model.plans(["a star"]) == ["abc"]
    monkeypatch.undo()
    monkeypatch.setattr(sample, "noise", lambda shape, *_: torch.full((1, *shape), 9.0))   # a share of 1
    assert sample.draw_prompts(model, ["a star"], args, [0]).isfinite().all()


@torch.no_grad()
def test_long_prompts_are_cut_to_the_context(tokenizer, monkeypatch, capsys, tmp_path):
    """As many tokens as were trained, plan and image included; short prompts stay; it is told."""
    model = tiny(tokenizer, plan=4)
    model.context = 90
    texts = ["A red STAR", "a red star and " * 40, "\U0001f600" * 40]
    fitted = model.fit(texts)
    assert fitted[0] == texts[0] and texts[1].startswith(fitted[1]) and texts[2].startswith(fitted[2])
    for text in fitted[1:]:
        ids, _, cut = tokenizer.chat([("user", text), ("assistant", "<image>")], 16, 90 - 4)
        assert not cut and len(ids) > 86 - 20
    with pytest.raises(ValueError, match="a context of 30 tokens leaves none for a prompt"):
        model.context = 30
        model.fit(texts)
    model.context = 90
    args = sample.parse_args(["--prompt", *texts, "--sampling_steps", "1", "--n", "3", "--seed", "1",
                              "--out", str(tmp_path / "x.png")])
    sample.main(args)
    assert "2 prompts are longer than the model's context of 192 tokens allows" in capsys.readouterr().out
    torch.testing.assert_close(sample.best_of(model, [texts[1]], args, [0]),
                               sample.best_of(model, [fitted[1]], args, [0]))


@torch.no_grad()
def test_the_shipped_model_draws_and_sees_what_is_asked():
    args = sample.parse_args(["--prompt", "-", "--sampling_steps", "24"])
    model, rae, _, _ = sample.load_models(args, "cpu", encoder=True)
    kinds = "single object", "colours", "colour attribution"
    asked = [test for test in shapes_eval() if test[0] in kinds][:12]
    z = sample.draw_prompts(model, [prompt for _, prompt, *_ in asked], args, range(12))
    seen = [read_scene(image) for image in sample.to_images(rae, z).numpy()]
    assert sum(fulfilled(objects, *wanted) for objects, (_, _, *wanted) in zip(seen, asked)) >= 8
    truth = [Scene.random(0, k, (1, 2)) for k in range(8)]
    x = torch.from_numpy(np.stack([scene.render() for scene in truth])).movedim(3, 1).float() / 255
    right, of = answered(model, rae.encode(x), truth).tolist()
    assert right / of > 0.8


def literally(model, z, text, verifier):
    """A verifier's score of one latent c h w, from the text with its special tokens."""
    tokenizer, bpe = model.tokenizer, model.tokenizer.bpe
    def special(text):
        bpe.encode_special_tokens = False
        return bpe.encode(text, add_special_tokens=False).ids
    def logits(ids):
        x = torch.cat([seen if i == IMAGE else model.llm.embed_tokens.weight[i][None] for i, seen in
                       ((i, model.mm_projector(rearrange(z, "c h w -> (h w) c"))) for i in ids)])
        return model.llm.logits(model.llm(x[None])[0])
    def chat(question):
        head, tail = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<im_start>", \
            f"<im_end>\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return [*special(head), IMAGE, *special(tail)]
    if "answer" in verifier:
        ids, told = chat(f"Does this image align with the prompt: {text}?"), []
        words = {w: {i[0] for v in (w, w.title(), w.upper(), " " + w) if len(i := special(v)) == 1}
                 for w in ("yes", "no")}
        p = logits(ids)[-1].softmax(0)
        yes, no = (sum(float(p[i]) for i in words[w]) for w in ("yes", "no"))
        if verifier == "answer":
            return yes / (yes + no)
        while len(told) < 8 and (not told or told[-1][0] != tokenizer.end):
            last = logits(ids + [i for i, _ in told])[-1]
            told.append((int(last.argmax()), float(last.max())))
        yes, no = ([logit for i, logit in told if i in words[w]] for w in ("yes", "no"))
        return bool(yes), (yes or [0.0])[-1], -(no or [0.0])[-1]
    ids, prompt = chat("Describe this image."), special(text)
    logp = logits(ids + prompt).log_softmax(1)[-len(prompt) - 1:]
    if verifier == "likelihood":
        return float(np.mean([float(row[i]) for row, i in zip(logp, prompt)]))
    return float(-(logp[1:] + math.log(logp.shape[1])).mean())


@pytest.mark.parametrize("verifier", sample.VERIFIERS)
def test_scores_equal_a_literal_recomputation(tokenizer, verifier):
    model, z = tiny(tokenizer).eval(), torch.randn(4, 8, 4, 4)
    if verifier == "answer_logits":                        # one that says yes and no now and then
        yes, no = (tokenizer.encode(word)[0] for word in ("yes", "no"))
        model.llm.lm_head.weight.data[[yes, no]] *= 3
    scores = model.scores(z, PROMPTS, verifier)
    with torch.no_grad():
        wanted = [literally(model, *pair, verifier) for pair in zip(z, PROMPTS)]
    assert len(set(wanted)) == 4
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(wanted), atol=2e-5, rtol=1e-4)
    single = [model.scores(z[i:i + 1], [text], verifier)[0] for i, text in enumerate(PROMPTS)]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(single), atol=2e-5, rtol=1e-4)
    if verifier == "answer_logits":
        assert any(said for said, *_ in wanted)
    other = dict(confidence="prompt_confidence", prompt_confidence="confidence").get(verifier, verifier)
    assert scores == model.scores(z, PROMPTS, other)


def test_answers_do_not_depend_on_the_batch(tokenizer):
    model, z = tiny(tokenizer).eval(), torch.randn(3, 8, 4, 4)
    asked = ["what?", "how many stars are there?", "is it?"]
    together = model.ask(z, asked, 5)
    assert together == [model.ask(z[i:i + 1], [text], 5)[0] for i, text in enumerate(asked)]


# ---------------------------------------------------------------------------------- runs
@pytest.mark.parametrize("more", [[], ["--ema", 0, "--freeze_llm"]])
def test_resume_is_exact_to_the_bit(more, tmp_path):
    go(train_t2i, *FLAGS, *more, "--steps", 8, "--out", tmp_path / "straight")
    go(train_t2i, *FLAGS, *more, "--steps", 4, "--out", tmp_path / "twice")
    go(train_t2i, *FLAGS, *more, "--steps", 8, "--out", tmp_path / "twice", "--resume", "--workers", 1)
    one, two = load(tmp_path / "straight"), load(tmp_path / "twice")
    assert difference(one, two) == 0 and ("ema" in one) != bool(more) and one["asked"] > 8
    assert not torch.equal(one["level"], torch.ones_like(one["level"]))
    assert rows(tmp_path / "straight")[-1]["loss"] == rows(tmp_path / "twice")[-1]["loss"]
    with pytest.raises(ValueError, match="--llm here differs from the checkpoint's None"):
        go(train_t2i, *FLAGS, *more, "--llm", "here", "--steps", 9, "--out", tmp_path / "twice", "--resume")


def test_the_language_model_has_its_own_rate_and_can_be_frozen(tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: seen.append(
        [(g["lr"], g["betas"]) for g in self.param_groups]) or step(self, *a))
    go(train_t2i, *FLAGS, "--steps", 2, "--lr", 1e-2, "--llm_lr", 1e-3, "--out", tmp_path / "a")
    assert seen == [[(pytest.approx(lr * 1e-2), (0.9, 0.95)), (pytest.approx(lr * 1e-3), (0.9, 0.999))]
                    for lr in (0.5, 1.0)]
    before, moved = {}, {}
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: [
        before.setdefault(k, v.clone()) for k, v in models[0].state_dict().items()] and step(self, *a))
    models, make = [], T2I.__init__
    monkeypatch.setattr(T2I, "__init__", lambda self, *a: make(self, *a) or models.append(self))
    go(train_t2i, *FLAGS, "--steps", 4, "--freeze_llm", "--out", tmp_path / "b")
    for key, value in load(tmp_path / "b")["model"].items():
        moved.setdefault(key.split(".")[0], []).append(not torch.equal(before[key], value))
    assert not any(moved.pop("llm")) and all(map(any, moved.values())) and len(moved) == 5
    assert difference(*({k: v for k, v in load(tmp_path / "b")[net].items() if k.startswith("llm.")}
                        for net in ("model", "ema"))) == 0


def test_two_processes_and_shards_equal_one_process(tmp_path):
    """One process of 4 x 2, two of 2 x 2, two that share the weights, killed and resumed: all the same."""
    common = [*FLAGS, "--micro_batch", 2, "--dtype", "fp32", "--llm_lr", 1e-3]
    go_on_one_thread(train_t2i, *common, "--steps", 4, "--out", tmp_path / "one")
    torchrun(train_t2i, *common, "--steps", 4, "--out", tmp_path / "two")
    torchrun(train_t2i, *common, "--steps", 2, "--shard", "--preview_every", 2, "--recompute",
             "--out", tmp_path / "shard")
    torchrun(train_t2i, *common, "--steps", 4, "--shard", "--out", tmp_path / "shard", "--resume")
    one, records = load(tmp_path / "one"), [rows(tmp_path / x)[-1] for x in ("one", "two", "shard")]
    for name in ("two", "shard"):
        other = load(tmp_path / name)
        for key in ("model", "ema", "level", "rae"):
            assert difference(one[key], other[key]) < 2e-5, (name, key)
        assert other["asked"] == one["asked"]
        assert [*other["opt"]["state"]] == [*one["opt"]["state"]]
    assert not [*(tmp_path / "shard").glob("*.png")]
    for key in ("loss", "grad", "cross_entropy", "flow"):
        assert records[1][key] == pytest.approx(records[0][key], rel=1e-4), key
        assert records[2][key] == pytest.approx(records[0][key], rel=1e-4), key


def test_cut_prompts_are_counted_and_told(tmp_path, capsys):
    record = record_of_a_run(tmp_path, "--steps", 2, "--context", 70, "--questions", 0, "--plan", 0)
    assert 0 < record["cut"] <= 16
    assert f"{record['cut']} prompts were longer than --context 70 tokens, and cut" in capsys.readouterr().out
    with pytest.raises(ValueError, match="context of 9 tokens leaves none for a prompt"):
        go(train_t2i, *FLAGS, "--context", 9, "--steps", 1, "--out", tmp_path / "short")


def test_one_long_answer_is_cut_and_a_run_may_go_on_with_more_context(tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "x.png")
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red " * 200}]
    (tmp_path / "talk.jsonl").write_text("\n".join([json.dumps(dict(image="x.png", conversations=talk))] * 8))
    flags = [*FLAGS, "--data", tmp_path / "talk.jsonl", "--out", tmp_path / "run"]
    go(train_t2i, *flags, "--context", 110, "--steps", 1)
    assert "8 prompts were longer than --context 110" in capsys.readouterr().out
    go(train_t2i, *flags, "--resume", "--context", 120, "--steps", 2)
    go(train_t2i, *flags, "--resume", "--steps", 3)
    assert load(tmp_path / "run")["args"]["context"] == 120
    again = ["--recipe", "pretrain", "--resume", "--out", f"{tmp_path}/run"]
    assert train_t2i.parse_args(again).context is None
    with pytest.raises(ValueError, match="context of 100 tokens leaves none for a prompt"):
        go(train_t2i, *flags, "--overwrite", "--context", 100, "--plan", 90, "--steps", 1)
    with pytest.raises(SystemExit):
        go(train_t2i, *flags, "--init", tmp_path / "run" / "last.pt", "--overwrite", "--steps", 1)
    assert "last.pt is what this run would write; name another --out" in capsys.readouterr().err


def test_a_model_that_plans_goes_on_planning(tmp_path, monkeypatch):
    """--init of its checkpoint teaches plans too, and sampling says them; with --plan 0 neither does."""
    seen = []
    monkeypatch.setattr(train_t2i, "converse", lambda *a, **k: seen.append(talk := converse(*a, **k)) or talk)
    said = lambda: {talk[1][1] != "<image>" for talk in seen if len(talk) == 2}         # noqa: E731
    go(train_t2i, *FLAGS, "--plan", 8, "--steps", 1, "--out", tmp_path / "a")
    assert said() == {True} and not seen.clear()
    go(train_t2i, *FLAGS, "--init", tmp_path / "a/last.pt", "--steps", 1, "--out", tmp_path / "b")
    assert said() == {True} and not seen.clear()
    assert load_t2i(tmp_path / "b/last.pt")[0].plan == load(tmp_path / "b")["args"]["plan"] == 8
    go(train_t2i, *FLAGS, "--init", tmp_path / "a/last.pt", "--plan", 0, "--steps", 1, "--out",
       tmp_path / "c")
    assert said() == {False} and load_t2i(tmp_path / "c/last.pt")[0].plan == 0


def test_what_gpt_says_before_an_image_is_learned_and_said(tmp_path):
    """Own data plan too: text before <image> in gpt's turn, with --plan N."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "x.png")
    talk = [{"from": "human", "value": "draw"}, {"from": "gpt", "value": "all red <image>"}]
    (tmp_path / "talk.jsonl").write_text("\n".join([json.dumps(dict(image="x.png", conversations=talk))] * 8))
    record = record_of_a_run(tmp_path / "run", "--data", tmp_path / "talk.jsonl", "--plan", 16, "--steps", 40,
                             "--lr", 1e-2, "--llm_lr", 1e-2, "--decay_start", 40, "--decay_end", 40)
    assert record["cross_entropy"] < 0.1
    assert load_t2i(tmp_path / "run/last.pt", weights="model")[0].plans(["draw"]) == ["all red "]


def test_text_only_conversations_train_but_are_no_questions(tmp_path):
    talk = [{"from": "human", "value": "how are you?"}, {"from": "gpt", "value": "fine"}]
    lines = [dict(conversations=talk)] * 8
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = record_of_a_run(tmp_path / "run", "--data", tmp_path / "talk.jsonl", "--steps", 2)
    state = load(tmp_path / "run")
    assert state["asked"] == 0 and record["cross_entropy"] > 0 == record["flow"]
    assert all(v.isfinite().all() for v in state["model"].values())
    flags = ["--ckpt", tmp_path / "run/last.pt", "--prompt", "a star", "--best_of", 2,
             "--out", tmp_path / "x.png"]
    with pytest.raises(ValueError, match="--best_of 2 needs a model that was asked questions"):
        sample.main(sample.parse_args([*map(str, flags)]))


def test_preview_finetuning_and_sampling(tmp_path):
    go(train_t2i, *FLAGS, "--connector", "mlp2", "--steps", 2, "--preview_every", 2, "--out", tmp_path / "a")
    assert (tmp_path / "a" / "preview_0000002.png").exists()
    init = ["--init", tmp_path / "a/last.pt", "--connector", "mlp2"]
    go(train_t2i, *FLAGS, *init, "--steps", 1, "--lr", 1e-9, "--questions", 0, "--out", tmp_path / "b")
    one, two = load(tmp_path / "a"), load(tmp_path / "b")
    assert difference(one["ema"], two["model"]) < 1e-6 < difference(one["ema"], one["model"])
    assert two["args"]["regression"] == one["args"]["regression"] == 1
    assert two["asked"] >= one["asked"] > 0 and two["args"]["llm_lr"] == 1e-10
    assert two["args"]["prediction"] == one["args"]["prediction"] and difference(one["rae"], two["rae"]) == 0
    with pytest.raises(ValueError, match="(?s)--init .*last.pt does not fit T2I.*dit.pos_embed: shape"):
        go(train_t2i, *FLAGS, *init, "--width", 64, "--steps", 1, "--out", tmp_path / "c")
    flags = ["--ckpt", tmp_path / "b/last.pt", "--prompt", "a star", "--best_of", 2, "--n", 1,
             "--sampling_steps", 2]
    sample.main(sample.parse_args([*map(str, flags), "--out", str(tmp_path / "x.png")]))
    assert (tmp_path / "x.png").exists()


# ---------------------------------------------------------------------------------- flags and errors
def parse(tmp_path, *argv):
    return train_t2i.parse_args(["--out", str(tmp_path / "none"), *map(str, argv)])


def test_recipes_are_those_of_the_paper(tmp_path):
    args = parse(tmp_path, "--recipe", "pretrain", "--llm", "x", "--model", "2.4B")
    assert (args.batch, args.steps, args.lr, args.llm_lr) == (2048, 30_000, 5e-4, 5e-5)
    assert (args.warmup, args.decay_start, args.decay_end, args.lr_end) == (402, 402, 30_000, 0)
    assert (args.ema, args.clip, args.weight_decay, args.class_dropout, args.flow_weight) == (0, 1, 0, 0.1, 2)
    found = args.time_law, args.shift_base, args.prediction, args.balance
    assert found == ("logit_normal", 4096, "v", "off")
    assert (args.width, args.depth, args.heads, args.head_width, args.draws) == (2048, 32, 32, 0, 1)
    assert (args.context, args.solver, args.sampling_steps, args.connector) == (512, "euler", 50, "linear")
    args = parse(tmp_path, "--recipe", "finetune", "--init", "scale-rae-7b", "--lr", 1e-4, "--warmup", 7)
    assert (args.batch, args.lr, args.llm_lr, args.context) == (1024, 1e-4, 5.66e-5, 1024)
    assert (args.width, args.head_width, args.warmup, args.decay_start, args.steps) == (4096, 0, 7, 7, 3750)
    args = parse(tmp_path, "--model", "0.5B", "--wide_head", "--llm", "x")
    assert (args.width, args.depth, args.head_width, args.head_depth) == (1280, 16, 2688, 2)
    assert args.llm_lr == args.lr / 10 and parse(tmp_path).llm_lr == parse(tmp_path).lr / 3


def test_the_papers_model_on_the_meta_device(tmp_path, tokenizer):
    args = vars(parse(tmp_path, "--recipe", "pretrain", "--llm", "x", "--model", "2.4B"))
    with torch.device("meta"):
        llm = Qwen2(151_667, 1536, 8960, 28, 12, 2)
        model = train_t2i.assemble(args, dict(latent_shape=[1152, 16, 16]), llm, tokenizer)
    sizes = {k: sum(p.numel() for p in part.parameters()) / 1e9 for k, part in model.named_children()}
    assert round(sizes["dit"], 3) == 2.436 and round(sizes["llm"], 2) == 1.54
    assert model.latent_queries.shape == (256, 1536)
    assert model.diff_head_projector.weight.shape == (2048, 1536)


@pytest.mark.parametrize("argv, message", [
    (["--rae", "nowhere.pt"], "--rae nowhere.pt does not exist"),
    (["--init", "a.pt", "--llm", "x"], "--init a.pt brings its language model and autoencoder"),
    (["--shard"], "--shard needs processes to share among; start with torchrun"),
    (["--llm_width", "30", "--llm_heads", "4"], "--llm_width 30 must be a multiple of 2 x --llm_heads 4"),
    (["--questions", "1"], "--questions: 1 must be at least 0.0 and below 1")])
def test_bad_flags(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, *argv)
    assert message in capsys.readouterr().err


def test_bad_files(tmp_path):
    go(train_dit, *DIT, "--steps", 1, "--out", tmp_path / "dit")
    runtime.save_checkpoint(tmp_path / "x.pt", x=1)
    out = ["--steps", 1, "--out", tmp_path / "run"]
    with pytest.raises(ValueError, match="--rae .*x.pt is no checkpoint of train_decoder.py"):
        go(train_t2i, *FLAGS, "--rae", tmp_path / "x.pt", *out)
    for call in (lambda: load_t2i(tmp_path / "dit/last.pt"),
                 lambda: go(train_t2i, *FLAGS, "--init", tmp_path / "dit/last.pt", *out)):
        with pytest.raises(ValueError, match="dit/last.pt is no checkpoint of train_t2i.py"):
            call()
    with pytest.raises(FileNotFoundError, match="--llm no/where: no such folder: no download"):
        go(train_t2i, *FLAGS, "--llm", "no/where", *out)
    (tmp_path / "images").mkdir()
    for i in range(8):
        sample.Image.new("RGB", (64, 64)).save(tmp_path / "images" / f"{i}.png")
    with pytest.raises(ValueError, match="8 of 8 images have no text"):
        go(train_t2i, *FLAGS, "--data", tmp_path / "images", *out)
    model = tiny(Tokenizer(TOKENIZER))
    runtime.save_checkpoint(tmp_path / "ema.pt", ema=model.state_dict(), llm=model.llm.config, args=dict(
        SIZES, connector="linear"), latent_shape=[8, 4, 4], tokenizer=model.tokenizer.json)
    with pytest.raises(ValueError, match="ema.pt holds no weights model; use --weights ema"):
        load_t2i(tmp_path / "ema.pt", weights="model")


# ---------------------------------------------------------------------------------- LLMs and releases
def write_llm(folder):
    """A Qwen2 folder with a tokenizer without <im_start>, <im_end>, and more rows than tokens."""
    folder.mkdir()
    bare = json.loads(TOKENIZER.read_text("utf-8"))
    bare["added_tokens"] = [token for token in bare["added_tokens"]
                            if token["content"] not in ("<im_start>", "<im_end>")]
    (folder / "tokenizer.json").write_text(json.dumps(bare), "utf-8")
    model = Qwen2(600, 32, 48, 1, 4, 2, 1e4)
    (folder / "config.json").write_text(json.dumps(dict(model.config, model_type="qwen2")))
    save_file({f"model.{k}": v for k, v in model.state_dict().items()}, folder / "model.safetensors")
    return model.embed_tokens.weight.data


def test_a_language_model_from_a_folder(tmp_path, monkeypatch):
    rows = write_llm(tmp_path / "llm")
    monkeypatch.setattr(runtime, "step_optimizers", lambda *_: 0.0)
    go(train_t2i, *FLAGS, "--llm", tmp_path / "llm", "--steps", 1, "--out", tmp_path / "still")
    state, n = load(tmp_path / "still"), len(Tokenizer(TOKENIZER))
    table = state["model"]["llm.embed_tokens.weight"]
    assert len(table) == n == state["llm"]["vocab_size"] and torch.equal(table[:-2], rows[:n - 2])
    torch.testing.assert_close(table[-2:], rows[:n - 2].mean(0).expand(2, -1))
    monkeypatch.undo()
    go(train_t2i, *FLAGS, "--llm", tmp_path / "llm", "--steps", 2, "--out", tmp_path / "run")
    assert load_t2i(tmp_path / "run/last.pt")[0].tokenizer.image_end == n - 1
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / "llm" / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist; copy it"):
            go(train_t2i, *FLAGS, "--llm", tmp_path / "llm", "--steps", 1, "--out", tmp_path / "none")


def test_a_release_draws(tmp_path, monkeypatch):
    llm, decoder = dry_run.make_scale_rae(tmp_path)
    out = ["--prompt", "a cat", "--n", "1", "--sampling_steps", "2", "--out", str(tmp_path / "cat.png")]
    argv = ["--release", "scale-rae-1.5b", "--release_dir", str(tmp_path), *out]
    sample.main(sample.parse_args(argv))
    picture = sample.Image.open(tmp_path / "cat.png")
    assert picture.size[0] == 16 * 4 + 4                                # a gap of 2 on each side
    model, rae, state = load_t2i("scale-rae-1.5b", folder=tmp_path)
    released = train_t2i.read_weights(llm)
    assert torch.equal(model.llm.norm.weight, released["model.norm.weight"])
    assert torch.equal(model.dit.blocks[0].mlp.w3.bias, released["diff_head.model.dit_blocks.0.mlp.w3.bias"])
    assert torch.equal(model.latent_queries, released["model.latent_queries"]) and state["asked"]
    assert (rae.latent_std == 1).all() and rae.decoder.patch == 4
    shard = llm / "model-00001-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors can't be read .*copy it again"):
        load_t2i("scale-rae-1.5b", folder=tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="model-00001-of-00002.safetensors does not exist"):
        load_t2i("scale-rae-1.5b", folder=tmp_path)
    shard.write_bytes(whole)
    (decoder / "model.pt").unlink()
    with pytest.raises(FileNotFoundError, match="siglip2_decoder/model.pt does not exist"):
        load_t2i("scale-rae-1.5b", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="Scale-RAE-Qwen1.5B_DiT2.4B/config.json does not exist"):
        load_t2i("scale-rae-1.5b", folder=tmp_path / "wrong")
    with pytest.raises(FileNotFoundError, match="scale-rae-7b: no download"):
        load_t2i("scale-rae-7b")
