"""Stage 3: conversations, losses, verifiers, runs, published models.

Run: python -m pytest tests/test_t2i.py
"""
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
import release
import runtime
import sample
import storage
import train_dit
import train_t2i
from conftest import (
    largest_difference,
    load_last,
    read_log,
    run_script,
)
from data import open_data
from eval_t2i import count_right_answers
from llm import IMAGE, NO_LABEL, SYSTEM, Qwen2, Tokenizer
from model import build_dit, flow_matching_loss
from shapes import (
    ALIGN_QUESTION,
    DESCRIBE_QUESTION,
    WHERE_QUESTION,
    Scene,
    converse,
    fulfils,
    language,
    listing,
    read_scene,
    shapes_eval_prompts,
)
from t2i import (
    DRAW,
    DRAW_UNCONDITIONED,
    T2I,
    UNDERSTAND,
    VERIFIERS,
    build_t2i,
    load_t2i,
    split_tasks,
    tokenize,
)
from test_shapes import answer, holds
from test_train import DIT_FLAGS
from train_t2i import TOKENIZER

FLAGS = ["--width", "32", "--depth", "1", "--heads", "2",
         "--head_width", "192", "--head_depth", "1", "--head_heads", "4",
         "--llm_width", "32", "--llm_depth", "1", "--llm_heads", "2",
         "--batch", "8", "--micro_batch", "4", "--workers", "0",
         "--log_every", "2", "--save_every", "4", "--preview_every", "0",
         "--warmup", "2", "--decay_start", "2", "--decay_end", "8", "--sampling_steps", "2",
         "--questions", "0.5", "--llm_start", "0"]

NO_HEAD = dict(head_width=0)
SMALL_HEAD = dict(head_width=48, head_depth=1, head_heads=3)

# Conversations of all kinds.
DRAWING = [("user", "a red circle"), ("assistant", "<image>")]
EMPTY = [("user", ""), ("assistant", "<image>")]
LOOKING = [("user", "<image>\nwhat is it?"), ("assistant", "a star"),
           ("user", "sure?"), ("assistant", "yes")]
TALKING = [("user", "how are you?"), ("assistant", "fine")]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER)


def small_t2i(tokenizer, connector="linear", plan=0, class_dropout=0.0, head=NO_HEAD):
    """A T2I of 8 channels on a 4 x 4 grid, with random weights everywhere, always the same."""
    torch.manual_seed(1)
    llm = Qwen2(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False)
    flags = dict(width=32, depth=1, heads=2, class_dropout=class_dropout, **head)
    t2i = T2I(llm, tokenizer, build_dit(flags, 8, 4, None), connector, regression=True, plan=plan)
    for parameter in t2i.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=max(parameter.shape[-1], 16) ** -0.5)
    return t2i


def random_batch(tokenizer, conversations, draws=1):
    """The inputs of T2I.forward for these conversations, with random latents, times and noise."""
    ids, labels, tasks, _ = tokenize(tokenizer, conversations, 16)
    asked, drawn = split_tasks(ids, labels, tasks)
    k = draws * max(1, int((tasks != UNDERSTAND).sum()))
    latents = torch.randn(len(conversations), 8, 4, 4)
    return dict(asked=asked, drawn=drawn, latents=latents, t=torch.rand(k),
                eps=torch.randn(k, 8, 4, 4))


# ---------------------------------------------------------------------------- words about scenes
def place(obj):
    """Such as "small red star c7": column c of a to j, row 7."""
    column = chr(ord("a") + int(10 * obj.centre[0]))
    row = int(10 * obj.centre[1])
    return f"{obj.size} {obj.name} {column}{row}"


def from_the_top(scene):
    return sorted(scene.objects, key=lambda obj: obj.centre[::-1])


@pytest.fixture(scope="module")
def conversations():
    """(scene, texts) for 1000 scenes, half of them to understand, in the words of captions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "reword", lambda text, rng: text)
        data = open_data("shapes", 16, chat=partial(converse, questions=0.5))
        found = []
        for k in range(1000):
            scene = Scene.random(0, k)
            if scene.held_out():                       # another scene takes its place
                continue
            found.append((scene, [text for _, text in data[k]["text"]]))
        return found


def first_mention(prompt, description):
    """Where a prompt first names what is at a place of the plan."""
    size, colour, shape, _ = description.split()
    for name in (f"{size} {colour} {shape}", f"{colour} {shape}", shape):
        if name in prompt:
            return prompt.find(name)
    raise AssertionError(f"{prompt!r} does not name {description!r}")


def test_prompts_and_plans_are_true(conversations):
    drawing = [(scene, texts) for scene, texts in conversations if len(texts) == 2]
    assert len(drawing) > 100
    for scene, (prompt, reply) in drawing:
        shapes = [obj.shape for obj in scene.objects]
        assert prompt == listing(shapes) or holds(prompt, scene)
        plan, after_image = reply.split("<image>")
        assert after_image == ""
        places = plan.split(", ")
        assert sorted(places) == sorted(place(obj) for obj in scene.objects)
        mentions = [first_mention(prompt, description) for description in places]
        assert mentions == sorted(mentions)


def expected_answer(question, scene):
    """The answer to a question about a scene that training asks, by independent means."""
    before, after = ALIGN_QUESTION.split("{}")
    if question.startswith(before):
        prompt = question.removeprefix(before).removesuffix(after)
        return "yes" if holds(prompt, scene) else "no"
    places = [place(obj) for obj in from_the_top(scene)]
    if question == WHERE_QUESTION:
        return ", ".join(places)
    if question.startswith("where is the "):
        thing = question.removeprefix("where is the ").removesuffix("?")
        cells = []
        for description in places:
            size, colour, shape, cell = description.split()
            if thing in (shape, f"{colour} {shape}", f"{colour} object"):
                cells.append(cell)
        return ", ".join(cells) or "nowhere"
    return answer(question, scene)


def test_answers_are_true(conversations):
    looking = [(scene, texts) for scene, texts in conversations if len(texts) > 2]
    assert len(looking) > 100
    for scene, texts in looking:
        assert len(texts) == 6
        assert texts[0].startswith("<image>\n")
        questions = [text.removeprefix("<image>\n") for text in texts[::2]]
        for question, reply in zip(questions, texts[1::2], strict=True):
            if question == DESCRIBE_QUESTION:
                assert holds(reply, scene)
            else:
                assert reply == expected_answer(question, scene), (question, scene.caption())


def test_all_kinds_of_conversations_are_frequent(conversations):
    looking = [texts for _, texts in conversations if len(texts) > 2]
    aligned = Counter()
    where = Counter()
    for texts in looking:
        for question, reply in zip(texts[::2], texts[1::2], strict=True):
            question = question.removeprefix("<image>\n")
            if question.startswith("Does this image align"):
                aligned[reply] += 1
            elif question == WHERE_QUESTION:
                where["everything"] += 1
            elif question.startswith("where is the "):
                where["nowhere" if reply == "nowhere" else "somewhere"] += 1

    assert abs(len(looking) / len(conversations) - 0.5) < 0.05
    assert abs(aligned["no"] / aligned.total() - 0.48) < 0.1
    assert aligned["no"] > 150
    assert min(where["everything"], where["somewhere"], where["nowhere"]) > 10


def held_out_scene(scene, rng):
    """In place of altered(): some scene that training must not show."""
    while True:
        other = Scene.random(9, int(rng.integers(9999)))
        if other.held_out():
            return other


def test_no_training_text_names_what_is_held_out(monkeypatch):
    """Neither as a scene nor as a wrong prompt, which would teach that it is never right."""
    monkeypatch.setattr(language, "reword", lambda text, rng: text)
    monkeypatch.setattr(language, "altered", held_out_scene)
    data = open_data("shapes", 16, seed=3, chat=partial(converse, questions=0.6))

    num_looking = 0
    for k in range(300):
        texts = [text for _, text in data[k]["text"]]
        num_looking += len(texts) == 6
        for question, reply in zip(texts[::2], texts[1::2], strict=True):
            assert not ("align" in question and reply == "no")

    assert num_looking > 100
    assert sum(Scene.random(3, k).held_out() for k in range(300)) > 20


def conversations_of_seed(seed):
    data = open_data("shapes", 16, seed=seed, chat=partial(converse, questions=0.25))
    return [data[k]["text"] for k in range(400)]


def test_conversations_are_a_function_of_seed_and_number():
    data = open_data("shapes", 16, seed=1, chat=partial(converse, questions=0.25))
    backwards = [data[k]["text"] for k in reversed(range(400))]
    conversations = conversations_of_seed(1)
    assert conversations == backwards[::-1]
    assert conversations[:50] != conversations_of_seed(2)[:50]


def test_questions_do_not_depend_on_what_is_in_the_scene():
    conversations = conversations_of_seed(1)
    is_asked = [len(turns) > 2 for turns in conversations]
    asked_by_objects = Counter()
    for k in range(400):
        if is_asked[k]:
            asked_by_objects[len(Scene.random(1, k).objects)] += 1
    assert abs(sum(is_asked) / 400 - 0.25) < 0.07
    assert min(asked_by_objects[n] for n in (1, 2, 3, 4)) > 10


def test_prompts_begin_in_many_ways():
    first_words = {turns[0][1].split()[0] for turns in conversations_of_seed(1)}
    assert {"draw", "generate", "can", "please", "i", "a", "two"} <= first_words


# ---------------------------------------------------------------------------- tokens
def test_tasks_of_conversations(tokenizer):
    batch = [DRAWING, EMPTY, LOOKING, TALKING]
    ids, labels, tasks, num_cut = tokenize(tokenizer, batch, 16)
    assert tasks.tolist() == [DRAW, DRAW_UNCONDITIONED, UNDERSTAND, UNDERSTAND]
    assert num_cut == 0
    assert (ids == IMAGE).sum(1).tolist() == [16, 16, 16, 0]
    assert (labels[ids == IMAGE] == NO_LABEL).all()
    assert (labels[ids < 0] == NO_LABEL).all()


def test_long_conversations_are_cut_to_the_context(tokenizer):
    long = [("user", "a red circle " * 50), ("assistant", "<image>")]
    ids, _, _, num_cut = tokenize(tokenizer, [long, DRAWING], 16, context=100)
    assert num_cut == 1
    assert ids.shape[1] <= 100


# ---------------------------------------------------------------------------- losses and gradients
@pytest.mark.parametrize("batch", [
    pytest.param([DRAWING], id="drawing"),
    pytest.param([LOOKING], id="looking"),
    pytest.param([TALKING, TALKING], id="talking"),
    pytest.param([EMPTY], id="empty"),
    pytest.param([DRAWING, LOOKING, TALKING, EMPTY], id="all")])
@pytest.mark.parametrize("connector, head", [("linear", NO_HEAD), ("mlp2", SMALL_HEAD)])
def test_every_parameter_has_a_gradient_whatever_the_batch(tokenizer, batch, connector, head):
    t2i = small_t2i(tokenizer, connector, class_dropout=0.1, head=head).train()
    draws = DRAWING in batch or EMPTY in batch

    cross_entropy, error, flow = t2i(**random_batch(tokenizer, batch))
    (cross_entropy + error.sum() + flow.sum()).backward()

    assert bool(error.sum() > 0) == draws
    assert bool(flow.sum() > 0) == draws
    for name, parameter in t2i.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert bool(t2i.latent_queries.grad.any()) == draws
    assert bool(t2i.dit.x_embedder.proj.weight.grad.any()) == draws
    assert bool(t2i.mm_projector[0].weight.grad.any()) == (LOOKING in batch)


def single_pass(t2i, turns, latents=None):
    """Ids l, labels l and hidden states l d of one conversation, without batch or padding.

    latents: c h w of the image to understand; None: it is to be drawn.
    """
    ids, labels, _ = t2i.tokenizer.chat(turns, 16)
    if latents is None:
        image = t2i.latent_queries
    else:
        image = t2i.mm_projector(rearrange(latents, "c h w -> (h w) c"))
    embeddings = []
    position = 0
    for token in ids:
        if token == IMAGE:
            embeddings.append(image[position])
            position += 1
        else:
            embeddings.append(t2i.llm.embed_tokens.weight[token])
    hidden = t2i.llm(torch.stack(embeddings)[None])[0]
    return torch.tensor(ids), torch.tensor(labels), hidden


@torch.no_grad()
def test_losses_equal_those_of_single_conversations(tokenizer):
    t2i = small_t2i(tokenizer).eval()
    drawing_after_a_word = [("user", "a red circle"), ("assistant", "well: <image>")]
    conversations = [DRAWING, LOOKING, TALKING, EMPTY, drawing_after_a_word]
    batch = random_batch(tokenizer, conversations, draws=2)

    cross_entropy, error, flow = t2i(**batch)

    expected_cross_entropy = 0.0
    expected_error = []
    drawn = []                                         # latents and conditions
    for turns, latents in zip(conversations, batch["latents"], strict=True):
        ids, labels, hidden = single_pass(t2i, turns, latents if turns is LOOKING else None)
        logits = t2i.llm.logits(hidden)
        expected_cross_entropy += F.cross_entropy(logits[:-1], labels[1:], ignore_index=NO_LABEL,
                                                  reduction="sum")
        if turns is LOOKING or turns is TALKING:
            continue
        states = hidden[ids == IMAGE]                  # n d
        tokens = rearrange(latents, "c h w -> (h w) c")
        expected_error.append((t2i.regression(states) - tokens).square().mean())
        conditions = t2i.diff_head_projector(states)
        if turns is EMPTY:
            conditions = t2i.dit.null_condition(conditions)
        drawn.append((latents, conditions))
    expected_flow = []
    for k, (latents, conditions) in enumerate(drawn + drawn):          # two draws
        expected_flow.append(flow_matching_loss(t2i.dit, latents[None], conditions[None],
                                                batch["t"][k:k + 1], batch["eps"][k:k + 1]))
    torch.testing.assert_close(cross_entropy, expected_cross_entropy, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(error, torch.stack(expected_error), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flow, torch.cat(expected_flow), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cross_entropy_is_a_sum_over_the_parts_of_a_batch(tokenizer):
    t2i = small_t2i(tokenizer).eval()
    conversations = [DRAWING, LOOKING, TALKING, EMPTY, DRAWING]
    batch = random_batch(tokenizer, conversations)
    whole, _, _ = t2i(**batch)

    total = 0.0
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        part = random_batch(tokenizer, conversations[rows])
        part["latents"] = batch["latents"][rows]
        cross_entropy, _, _ = t2i(**part)
        total += cross_entropy

    torch.testing.assert_close(total, whole, atol=1e-3, rtol=1e-5)


def test_an_empty_prompt_is_the_dropped_condition(tokenizer):
    t2i = small_t2i(tokenizer).train()
    always_dropped = small_t2i(tokenizer, class_dropout=1.0).train()
    drawing = random_batch(tokenizer, [DRAWING])
    empty = random_batch(tokenizer, [EMPTY])
    for name in ("latents", "t", "eps"):
        empty[name] = drawing[name]

    _, _, flow_of_empty = t2i(**empty)
    _, _, flow_of_dropped = always_dropped(**drawing)
    _, _, flow_of_prompt = t2i(**drawing)

    assert torch.equal(flow_of_empty, flow_of_dropped)
    assert not torch.equal(flow_of_empty, flow_of_prompt)


def test_conditions_of_an_empty_prompt_are_null(tokenizer):
    t2i = small_t2i(tokenizer).train()
    of_empty, of_prompt = t2i.conditions(["", "a red circle"])
    null = t2i.dit.null_condition(of_empty)
    assert torch.equal(of_empty, null)
    assert not torch.equal(of_prompt, null)


# ---------------------------------------------------------------------------- losses of a run
def last_record(folder, *flags):
    """The last record in the log of a run with these flags."""
    run_script(train_t2i, *FLAGS, *flags, "--out", folder)
    return read_log(folder)[-1]


@pytest.fixture
def recorded_passes(monkeypatch):
    """Tasks, numbers of tokens to learn, and losses of every forward pass of a T2I."""
    passes = []
    forward = T2I.forward

    def recording_forward(t2i, asked, drawn, latents, t, eps):
        cross_entropy, error, flow = forward(t2i, asked, drawn, latents, t, eps)
        parts = [part for part in (asked, drawn) if not part.is_stand_in]
        passes.append(dict(tasks=torch.cat([part.tasks for part in parts]),
                           num_tokens=sum(len(part.targets) for part in parts),
                           cross_entropy=cross_entropy.detach(), error=error.detach(),
                           flow=flow.detach()))
        return cross_entropy, error, flow

    monkeypatch.setattr(T2I, "forward", recording_forward)
    return passes


def test_logged_losses_are_means_over_the_whole_batch(tmp_path, recorded_passes):
    """The loss is the mean over all tokens plus flow_weight times the mean over all images."""
    record = last_record(tmp_path, "--steps", 1, "--prediction", "v",
                         "--flow_weight", 3)

    assert len(recorded_passes) == 2
    num_tokens = sum(one["num_tokens"] for one in recorded_passes)
    cross_entropy = sum(one["cross_entropy"] for one in recorded_passes) / num_tokens
    drawing = [one for one in recorded_passes if (one["tasks"] != UNDERSTAND).any()]
    flow = torch.cat([one["flow"] for one in drawing]).mean()
    error = torch.cat([one["error"] for one in drawing]).mean()
    assert abs(record["cross_entropy"] - float(cross_entropy)) < 1e-5
    assert abs(record["flow"] - float(flow)) < 1e-5
    assert abs(record["regression"] - float(error)) < 1e-5
    total = record["cross_entropy"] + 3 * record["flow"] + record["regression"]
    assert abs(record["loss"] - total) < 1e-5


def test_the_first_steps_draw_without_prompts(tmp_path, recorded_passes):
    """Until --llm_start the DiT has the null condition; the LLM learns by its other losses."""
    last_record(tmp_path, "--steps", 4, "--micro_batch", 8, "--llm_start", 2)
    tasks = [set(one["tasks"].tolist()) for one in recorded_passes]
    before = {UNDERSTAND, DRAW_UNCONDITIONED}
    after = {UNDERSTAND, DRAW}
    assert tasks == [before, before, after, after]


def gradients_of_first_step(monkeypatch, folder, micro_batch):
    """Gradients before the first update, with the same time and noise for all images."""
    gradients = {}

    def keep_gradients(optimizers, model, *rest):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()
        return 0.0

    def constant_noise(*shape, **options):
        return 0.7 * torch.ones(*shape, **options)

    monkeypatch.setattr(train_t2i, "sample_times", lambda n, *_: torch.full((n,), 0.3))
    monkeypatch.setattr(torch, "randn", constant_noise)
    monkeypatch.setattr(runtime, "optimizer_step", keep_gradients)
    run_script(train_t2i, *FLAGS, "--micro_batch", micro_batch, "--steps", 1, "--dtype", "fp32",
               "--class_dropout", 0, "--guidance", 1, "--out", folder)
    return gradients


@pytest.mark.parametrize("micro_batch", [2, 1])        # 1: either drawing or understanding
def test_micro_batches_give_the_gradient_of_the_whole(micro_batch, tmp_path, monkeypatch):
    whole = gradients_of_first_step(monkeypatch, tmp_path / "whole", 8)
    split = gradients_of_first_step(monkeypatch, tmp_path / "split", micro_batch)
    assert largest_difference(whole, split) < 1e-5


# ---------------------------------------------------------------------------- conditions and plans
PROMPTS = ["a red circle", "two blue stars and a green ring above a yellow cross", "a star",
           "nothing"]


def single_conditions(t2i, prompt, plan=""):
    """Conditions n d of one prompt, without batch or padding."""
    ids, _, hidden = single_pass(t2i, [("user", prompt), ("assistant", f"{plan}<image>")])
    return t2i.diff_head_projector(hidden[ids == IMAGE])


@torch.no_grad()
def test_conditions_do_not_depend_on_the_batch(tokenizer):
    t2i = small_t2i(tokenizer).eval()
    together = t2i.conditions(PROMPTS)
    assert together.shape == (4, 16, 32)
    assert together.dtype == torch.float32
    for prompt, conditions in zip(PROMPTS, together, strict=True):
        alone = t2i.conditions([prompt])[0]
        torch.testing.assert_close(alone, conditions, atol=1e-5, rtol=1e-5)
        expected = single_conditions(t2i, prompt)
        torch.testing.assert_close(conditions, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_plans_do_not_depend_on_the_batch(tokenizer):
    t2i = small_t2i(tokenizer, plan=6).eval()
    uniforms = torch.rand(4, 6)
    plans = t2i.plans(PROMPTS, uniforms)
    for i, prompt in enumerate(PROMPTS):
        assert t2i.plans([prompt], uniforms[i:i + 1]) == [plans[i]]


@torch.no_grad()
def test_other_numbers_draw_other_plans(tokenizer):
    t2i = small_t2i(tokenizer, plan=6).eval()
    assert t2i.plans(PROMPTS, torch.rand(4, 6)) != t2i.plans(PROMPTS, torch.rand(4, 6))
    assert t2i.plans(PROMPTS) == t2i.plans(PROMPTS)


@torch.no_grad()
def test_a_plan_stands_before_the_image(tokenizer):
    t2i = small_t2i(tokenizer, plan=6).eval()
    uniforms = torch.rand(4, 6)
    plans = t2i.plans(PROMPTS, uniforms)
    conditions = t2i.conditions(PROMPTS, uniforms)
    for i, prompt in enumerate(PROMPTS):
        expected = single_conditions(t2i, prompt, plans[i])
        torch.testing.assert_close(conditions[i], expected, atol=1e-5, rtol=1e-5)
    t2i.plan = 0
    assert not torch.allclose(t2i.conditions(PROMPTS), conditions, atol=1e-3)


def sampling_args(*flags):
    return sample.parse_args(["--prompt", "-", "--sampling_steps", "1", *flags])


@torch.no_grad()
def test_plans_of_equal_prompts_differ_but_not_by_the_batch(tokenizer, monkeypatch):
    """The plan of an image is a function of the image's number."""
    t2i = small_t2i(tokenizer, plan=6).eval()
    args = sampling_args("--guidance", "1")
    plans = []

    def keep_plans(prompts, uniforms):
        plans.extend(t2i.plans(prompts, uniforms))
        return torch.zeros(len(prompts), 16, 32)

    monkeypatch.setattr(t2i, "conditions", keep_plans)
    together = sample.draw_prompts(t2i, ["a star", "a star", "a star", "a star"], args, range(4))
    plans_together = list(plans)
    plans.clear()
    for i in range(4):
        alone = sample.draw_prompts(t2i, ["a star"], args, [i])
        torch.testing.assert_close(alone, together[i:i + 1])
    assert plans == plans_together
    assert len(set(plans)) > 1


@torch.no_grad()
def test_a_plan_ends_with_its_turn_and_names_no_image(tokenizer, monkeypatch):
    t2i = small_t2i(tokenizer, plan=6).eval()
    said = [*tokenizer.encode("ab<image>c"), tokenizer.end, *tokenizer.encode("user")]
    monkeypatch.setattr(t2i.llm, "generate", lambda *_: torch.tensor([said]))
    assert t2i.plans(["a star"]) == ["abc"]


@torch.no_grad()
def test_extreme_noise_draws_a_token_of_the_vocabulary(tokenizer, monkeypatch):
    """Noise of 9 is the number 1 in fp32, which is not below 1."""
    t2i = small_t2i(tokenizer, plan=6).eval()
    args = sampling_args("--guidance", "1")
    monkeypatch.setattr(sample, "noise", lambda shape, *_, **__: torch.full((1, *shape), 9.0))
    assert sample.draw_prompts(t2i, ["a star"], args, [0]).isfinite().all()


LONG_PROMPTS = ["A red STAR", "a red star and " * 40, "\U0001f600" * 40]


def test_long_prompts_are_cut_to_the_context(tokenizer):
    """To as many tokens as were trained with, plan and image included; short prompts stay."""
    t2i = small_t2i(tokenizer, plan=4)
    t2i.context = 90
    short, long, emoji = t2i.fit(LONG_PROMPTS)
    assert short == LONG_PROMPTS[0]
    assert LONG_PROMPTS[1].startswith(long)
    assert LONG_PROMPTS[2].startswith(emoji)
    for prompt in (long, emoji):
        turns = [("user", prompt), ("assistant", "<image>")]
        ids, _, is_cut = tokenizer.chat(turns, 16, 90 - 4)
        assert not is_cut
        assert len(ids) > 86 - 20


def test_a_context_without_room_for_prompts_is_refused(tokenizer):
    t2i = small_t2i(tokenizer, plan=4)
    t2i.context = 30
    with pytest.raises(ValueError, match="a context of 30 tokens leaves none for a prompt"):
        t2i.fit(LONG_PROMPTS)


@torch.no_grad()
def test_long_prompts_are_drawn_as_they_are_cut(tokenizer):
    t2i = small_t2i(tokenizer, plan=4)
    t2i.context = 90
    args = sampling_args("--seed", "1")
    long = LONG_PROMPTS[1]
    fitted = t2i.fit([long])
    from_long = sample.best_of(t2i, [long], args, [0])
    from_fitted = sample.best_of(t2i, fitted, args, [0])
    torch.testing.assert_close(from_long, from_fitted)


def test_sampling_says_which_prompts_are_cut(tmp_path, capsys):
    sample.main(sample.parse_args(["--prompt", *LONG_PROMPTS, "--sampling_steps", "1", "--n", "3",
                                   "--out", str(tmp_path / "x.png")]))
    message = "2 prompts are longer than the model's context of 192 tokens allows"
    assert message in capsys.readouterr().out


# ---------------------------------------------------------------------------- the shipped model
@torch.no_grad()
def test_the_shipped_model_draws_what_is_asked():
    args = sample.parse_args(["--prompt", "-", "--sampling_steps", "24"])
    t2i, rae, _ = sample.load_t2i_models(args, "cpu")
    categories = ("single object", "colours", "colour attribution")
    tests = [test for test in shapes_eval_prompts() if test.category in categories][:12]

    latents = sample.draw_prompts(t2i, [test.prompt for test in tests], args, range(12))
    images = sample.to_images(rae, latents).numpy()

    num_right = 0
    for test, image in zip(tests, images, strict=True):
        num_right += fulfils(read_scene(image), test.names, test.relation)
    assert num_right >= 8


@torch.no_grad()
def test_the_shipped_model_answers_questions():
    t2i, rae, _ = load_t2i(release.SHIPPED_T2I, with_encoder=True)
    scenes = [Scene.random(0, k, (1, 2)) for k in range(8)]
    images = torch.from_numpy(np.stack([scene.render() for scene in scenes]))
    images = rearrange(images, "b h w c -> b c h w").float() / 255
    right, asked = count_right_answers(t2i, rae.encode(images), scenes).tolist()
    assert right / asked > 0.8


# ---------------------------------------------------------------------------- verifiers
def special_encode(tokenizer, text):
    """Ids of a text in which special tokens are special, unlike in Tokenizer.encode."""
    tokenizer.bpe.encode_special_tokens = False
    return tokenizer.bpe.encode(text, add_special_tokens=False).ids


def question_ids(tokenizer, question):
    """Ids of a chat that asks one question about an image, for which one IMAGE stands."""
    before = special_encode(tokenizer, f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
                                       f"<|im_start|>user\n<im_start>")
    after = special_encode(tokenizer, f"<im_end>\n{question}<|im_end|>\n<|im_start|>assistant\n")
    return [*before, IMAGE, *after]


def next_logits(t2i, latents, ids):
    """Logits after every token of a chat about latents c h w; its image counts as n tokens."""
    embeddings = []
    for token in ids:
        if token == IMAGE:
            embeddings.append(t2i.mm_projector(rearrange(latents, "c h w -> (h w) c")))
        else:
            embeddings.append(t2i.llm.embed_tokens.weight[token][None])
    return t2i.llm.logits(t2i.llm(torch.cat(embeddings)[None])[0])


def spellings(tokenizer, word):
    """Ids of the single tokens that spell a word."""
    ids = set()
    for text in (word, word.title(), word.upper(), f" {word}"):
        tokens = special_encode(tokenizer, text)
        if len(tokens) == 1:
            ids.add(tokens[0])
    return ids


def literal_answer_score(t2i, latents, prompt):
    ids = question_ids(t2i.tokenizer, f"Does this image align with the prompt: {prompt}?")
    p = next_logits(t2i, latents, ids)[-1].softmax(0)
    p_yes = sum(float(p[token]) for token in spellings(t2i.tokenizer, "yes"))
    p_no = sum(float(p[token]) for token in spellings(t2i.tokenizer, "no"))
    return p_yes / (p_yes + p_no)


def literal_answer_logits(t2i, latents, prompt):
    """(is "yes" said, its logit, minus the logit of "no"), 0 for what is not said."""
    ids = question_ids(t2i.tokenizer, f"Does this image align with the prompt: {prompt}?")
    is_yes_said = False
    yes_logit = 0.0
    no_logit = 0.0
    for _ in range(8):
        logits = next_logits(t2i, latents, ids)[-1]
        token = int(logits.argmax())
        ids = [*ids, token]
        if token in spellings(t2i.tokenizer, "yes"):
            is_yes_said = True
            yes_logit = float(logits[token])
        if token in spellings(t2i.tokenizer, "no"):
            no_logit = float(logits[token])
        if token == t2i.tokenizer.end:
            break
    return is_yes_said, yes_logit, -no_logit


def literal_prompt_confidence(t2i, latents, prompt):
    ids = question_ids(t2i.tokenizer, "Describe this image.")
    prompt_ids = special_encode(t2i.tokenizer, prompt)
    log_p = next_logits(t2i, latents, ids + prompt_ids).log_softmax(1)[-len(prompt_ids):]
    return float(-(log_p + math.log(log_p.shape[1])).mean())


def assert_scores_equal(scores, expected):
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("verifier, literal", [
    ("answer", literal_answer_score), ("confidence", literal_prompt_confidence)])
@torch.no_grad()
def test_scores_equal_a_literal_recomputation(tokenizer, verifier, literal):
    t2i = small_t2i(tokenizer).eval()
    latents = torch.randn(4, 8, 4, 4)
    scores = VERIFIERS[verifier](t2i, latents, PROMPTS)
    expected = [literal(t2i, latents[i], PROMPTS[i]) for i in range(4)]
    assert len(set(expected)) == 4
    assert_scores_equal(scores, expected)


@torch.no_grad()
def test_answer_logits_rank_as_the_paper_does(tokenizer):
    t2i = talkative_t2i(tokenizer)
    latents = torch.randn(4, 8, 4, 4)
    scores = VERIFIERS["answer_logits"](t2i, latents, PROMPTS)
    expected = [literal_answer_logits(t2i, latents[i], PROMPTS[i]) for i in range(4)]

    assert len(set(expected)) == 4
    assert any(is_yes_said for is_yes_said, _, _ in expected)
    by_score = sorted(range(4), key=lambda i: scores[i])
    by_tuple = sorted(range(4), key=lambda i: expected[i])
    assert by_score == by_tuple
    for score, (is_yes_said, yes_logit, minus_no_logit) in zip(scores, expected, strict=True):
        if is_yes_said:
            assert score - 1e6 == pytest.approx(yes_logit, rel=1e-4, abs=2e-5)
        else:
            assert score == pytest.approx(minus_no_logit, rel=1e-4, abs=2e-5)


def talkative_t2i(tokenizer):
    """A T2I that says yes and no now and then."""
    t2i = small_t2i(tokenizer).eval()
    for word in ("yes", "no"):
        token = tokenizer.encode(word)[0]
        t2i.llm.lm_head.weight.data[token] *= 3
    return t2i


@pytest.mark.parametrize("verifier", VERIFIERS)
@torch.no_grad()
def test_scores_do_not_depend_on_the_batch(tokenizer, verifier):
    t2i = talkative_t2i(tokenizer)
    latents = torch.randn(4, 8, 4, 4)
    score = VERIFIERS[verifier]
    together = score(t2i, latents, PROMPTS)
    alone = [score(t2i, latents[i:i + 1], [PROMPTS[i]])[0] for i in range(4)]
    assert_scores_equal(together, alone)


def test_answers_do_not_depend_on_the_batch(tokenizer):
    t2i = small_t2i(tokenizer).eval()
    latents = torch.randn(3, 8, 4, 4)
    questions = ["what?", "how many stars are there?", "is it?"]
    together = t2i.ask(latents, questions, 5)
    alone = [t2i.ask(latents[i:i + 1], [questions[i]], 5)[0] for i in range(3)]
    assert together == alone


# ---------------------------------------------------------------------------- runs
with_and_without_ema = pytest.mark.parametrize("more", [
    pytest.param([], id="ema"), pytest.param(["--ema", 0, "--freeze_llm"], id="no_ema_frozen_llm")])


@with_and_without_ema
def test_resume_is_exact_to_the_bit(more, tmp_path):
    straight, twice = tmp_path / "straight", tmp_path / "twice"
    run_script(train_t2i, *FLAGS, *more, "--steps", 8, "--out", straight)
    run_script(train_t2i, *FLAGS, *more, "--steps", 4, "--out", twice)
    run_script(train_t2i, "--steps", 8, "--out", twice, "--resume", "--workers", 1)

    one, two = load_last(straight), load_last(twice)
    assert largest_difference(one, two) == 0
    assert ("ema" in one) == (not more)
    assert one["asked"] > 8
    assert read_log(straight)[-1]["loss"] == read_log(twice)[-1]["loss"]


def test_resume_with_another_language_model_is_refused(tmp_path, capsys):
    run_script(train_t2i, *FLAGS, "--steps", 1, "--out", tmp_path)
    with pytest.raises(SystemExit):
        train_t2i.parse_args(["--llm", "here", "--steps", "9", "--out", str(tmp_path), "--resume"])
    assert "--llm here differs from the checkpoint's None" in capsys.readouterr().err


def test_an_average_that_a_run_does_not_have_cannot_go_on(tmp_path, capsys):
    run_script(train_t2i, *FLAGS, "--ema", 0, "--steps", 1, "--out", tmp_path)
    with pytest.raises(SystemExit):
        train_t2i.parse_args(["--ema", "0.9", "--steps", "2", "--out", str(tmp_path), "--resume"])
    assert "--ema 0.9 would go on with an average that this run" in capsys.readouterr().err
    run_script(train_t2i, "--steps", 2, "--out", tmp_path, "--resume")


def test_the_language_model_has_its_own_rate(tmp_path, monkeypatch):
    groups = []
    original = torch.optim.AdamW.step

    def recording_step(optimizer, *args):
        groups.append([(group["lr"], group["betas"]) for group in optimizer.param_groups])
        return original(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording_step)
    run_script(train_t2i, *FLAGS, "--steps", 2, "--lr", 1e-2, "--llm_lr", 1e-3, "--out", tmp_path)
    assert groups == [                                 # a warm-up of two steps
        [(pytest.approx(0.5e-2), (0.9, 0.95)), (pytest.approx(0.5e-3), (0.9, 0.999))],
        [(pytest.approx(1e-2), (0.9, 0.95)), (pytest.approx(1e-3), (0.9, 0.999))]]


def test_the_language_model_can_be_frozen(tmp_path, monkeypatch):
    initial = {}
    original = runtime.optimizer_step

    def keep_initial_weights(optimizers, model, *rest):
        for name, value in model.state_dict().items():
            initial.setdefault(name, value.clone())
        return original(optimizers, model, *rest)

    monkeypatch.setattr(runtime, "optimizer_step", keep_initial_weights)
    run_script(train_t2i, *FLAGS, "--steps", 4, "--freeze_llm", "--out", tmp_path)

    state = load_last(tmp_path)
    moved = set()
    for name, value in state["model"].items():
        if not torch.equal(value, initial[name]):
            moved.add(name.split(".")[0])
        if name.startswith("llm."):
            assert torch.equal(value, state["ema"][name])
    assert moved == {"dit", "latent_queries", "mm_projector", "diff_head_projector", "regression"}


def test_data_and_conversation_of_a_lesson_replace_the_flags(tmp_path):
    """main(args, data, conversation): without patching the module."""
    scenes = []

    def describe(scene, rng):
        scenes.append(scene)
        return [("user", scene.caption()), ("assistant", "<image>")]

    data = open_data("shapes", 64, seed=5, chat=describe)
    args = train_t2i.parse_args([*FLAGS, "--steps", "1", "--out", str(tmp_path / "data")])
    train_t2i.main(args, data=data)
    assert scenes[:8] == [data.scene_or_text(k) for k in range(8)]

    scenes.clear()
    args = train_t2i.parse_args([*FLAGS, "--steps", "1", "--out", str(tmp_path / "words")])
    train_t2i.main(args, conversation=describe)
    assert len(scenes) == 8
    assert load_last(tmp_path / "words")["asked"] == 0


# ---------------------------------------------------------------------------- context
def test_cut_prompts_are_counted_and_reported(tmp_path, capsys):
    record = last_record(tmp_path, "--steps", 2, "--context", 70, "--questions", 0, "--plan", 0)
    assert 0 < record["cut"] <= 16
    message = f"{record['cut']} prompts were longer than --context 70 tokens, and cut"
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("context, plan", [(9, 40), (100, 90)])
def test_a_context_too_short_for_prompts_is_refused(context, plan, tmp_path):
    message = f"context of {context} tokens leaves none for a prompt"
    with pytest.raises(ValueError, match=message):
        run_script(train_t2i, *FLAGS, "--context", context, "--plan", plan, "--steps", 1,
                   "--out", tmp_path)


def write_conversations(folder, human, gpt, with_image=True):
    """A .jsonl of 8 equal conversations, about a red image if they are about one."""
    record = {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]}
    if with_image:
        Image.new("RGB", (64, 64), "red").save(folder / "x.png")
        record["image"] = "x.png"
    path = folder / "conversations.jsonl"
    path.write_text("\n".join([json.dumps(record)] * 8))
    return path


def test_long_answers_are_cut(tmp_path, capsys):
    data = write_conversations(tmp_path, "<image>\nwhat?", "red " * 200)
    run_script(train_t2i, *FLAGS, "--data", data, "--context", 110, "--steps", 1,
               "--out", tmp_path / "run")
    assert "8 prompts were longer than --context 110" in capsys.readouterr().out


def test_a_run_may_go_on_with_more_context(tmp_path, capsys):
    data = write_conversations(tmp_path, "<image>\nwhat?", "red " * 200)
    out = ["--out", tmp_path / "run"]
    run_script(train_t2i, *FLAGS, *out, "--data", data, "--context", 110, "--steps", 1)
    run_script(train_t2i, *out, "--resume", "--context", 120, "--steps", 2)
    run_script(train_t2i, *out, "--resume", "--steps", 3)
    assert load_last(tmp_path / "run")["args"]["context"] == 120
    args = train_t2i.parse_args(["--resume", "--out", f"{tmp_path}/run"])
    assert args.context == 120
    with pytest.raises(SystemExit):
        train_t2i.parse_args(["--recipe", "pretrain", "--resume", "--out", f"{tmp_path}/run"])
    message = "--recipe pretrain differs from the checkpoint's None; resume without it"
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------- plans in training
@pytest.fixture
def replies(monkeypatch):
    """What the assistant says in the conversations that draw, in all runs so far."""
    found = []

    def recording_converse(scene, rng, questions, plan=True):
        turns = converse(scene, rng, questions, plan)
        if len(turns) == 2:
            found.append(turns[1][1])
        return turns

    monkeypatch.setattr(train_t2i, "converse", recording_converse)
    return found


def test_a_model_that_plans_goes_on_planning(tmp_path, replies):
    """--init of its checkpoint teaches plans, too, and sampling says them."""
    first, second = tmp_path / "first", tmp_path / "second"
    run_script(train_t2i, *FLAGS, "--plan", 8, "--steps", 1, "--out", first)
    assert replies
    assert "<image>" not in replies
    replies.clear()
    run_script(train_t2i, *FLAGS, "--init", first / "last.pt", "--steps", 1, "--out", second)
    assert replies
    assert "<image>" not in replies
    assert load_last(second)["args"]["plan"] == 8
    assert load_t2i(second / "last.pt")[0].plan == 8


def test_a_model_may_stop_planning(tmp_path, replies):
    first, second = tmp_path / "first", tmp_path / "second"
    run_script(train_t2i, *FLAGS, "--plan", 8, "--steps", 1, "--out", first)
    replies.clear()
    run_script(train_t2i, *FLAGS, "--init", first / "last.pt", "--plan", 0, "--steps", 1,
               "--out", second)
    assert set(replies) == {"<image>"}
    assert load_t2i(second / "last.pt")[0].plan == 0


def test_what_gpt_says_before_an_image_is_learned(tmp_path):
    """Own data plan, too: text before <image> in gpt's turn, with --plan N."""
    data = write_conversations(tmp_path, "draw", "all red <image>")
    record = last_record(tmp_path / "run", "--data", data, "--plan", 16, "--steps", 40,
                         "--lr", 1e-2, "--llm_lr", 1e-2, "--decay_start", 40, "--decay_end", 40,
                         "--head_width", 0, "--draws", 1, "--micro_batch", 8)
    t2i, _, _ = load_t2i(tmp_path / "run" / "last.pt", weights="model")
    assert record["cross_entropy"] < 0.1
    assert t2i.plans(["draw"]) == ["all red "]


def test_conversations_without_images_train_but_are_no_questions(tmp_path):
    data = write_conversations(tmp_path, "how are you?", "fine", with_image=False)
    record = last_record(tmp_path / "run", "--data", data, "--steps", 2)
    state = load_last(tmp_path / "run")
    assert state["asked"] == 0
    assert record["cross_entropy"] > 0
    assert record["flow"] == 0
    assert all(value.isfinite().all() for value in state["model"].values())

    args = sample.parse_args(["--ckpt", str(tmp_path / "run" / "last.pt"), "--prompt", "a star",
                              "--best_of", "2", "--out", str(tmp_path / "x.png")])
    with pytest.raises(ValueError, match="--best_of 2 needs a model that was asked questions"):
        sample.main(args)


# ---------------------------------------------------------------------------- previews, finetuning
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of two steps, with a preview."""
    folder = tmp_path_factory.mktemp("trained")
    run_script(train_t2i, *FLAGS, "--connector", "mlp2", "--steps", 2, "--preview_every", 2,
               "--out", folder)
    return folder


def test_a_run_draws_previews(trained):
    assert (trained / "preview_0000002.png").exists()


def test_finetuning_starts_from_the_ema_with_its_flags(trained, tmp_path):
    run_script(train_t2i, *FLAGS, "--init", trained / "last.pt", "--steps", 1, "--lr", 1e-9,
               "--questions", 0, "--out", tmp_path)
    one, two = load_last(trained), load_last(tmp_path)
    assert largest_difference(one["ema"], two["model"]) < 1e-6
    assert largest_difference(one["ema"], one["model"]) > 1e-6
    assert largest_difference(one["rae"], two["rae"]) == 0
    assert one["args"]["regression"] == 1
    assert two["args"]["regression"] == 1
    assert two["args"]["prediction"] == one["args"]["prediction"]
    assert two["args"]["llm_lr"] == 1e-10
    assert two["asked"] >= one["asked"] > 0


def test_finetuning_takes_the_size_of_the_weights(tmp_path):
    args = parse(tmp_path, "--init", release.SHIPPED_T2I)
    assert (args.width, args.head_width, args.depth) == (160, 224, 4)


def test_finetuning_another_size_is_refused(trained, tmp_path):
    message = "(?s)--init .*last.pt does not fit T2I.*dit.pos_embed: shape"
    with pytest.raises(ValueError, match=message):
        run_script(train_t2i, *FLAGS, "--init", trained / "last.pt", "--width", 64,
                   "--steps", 1, "--out", tmp_path)


def test_a_run_must_not_overwrite_what_it_starts_from(trained, capsys):
    with pytest.raises(SystemExit):
        train_t2i.parse_args([*FLAGS, "--init", str(trained / "last.pt"), "--overwrite",
                              "--steps", "1", "--out", str(trained)])
    message = "last.pt is what this run would write; name another --out"
    assert message in capsys.readouterr().err


def test_a_trained_model_draws_the_best_of_two(trained, tmp_path):
    args = sample.parse_args(["--ckpt", str(trained / "last.pt"), "--prompt", "a star",
                              "--best_of", "2", "--n", "1", "--sampling_steps", "2",
                              "--out", str(tmp_path / "x.png")])
    sample.main(args)
    assert (tmp_path / "x.png").exists()


# ---------------------------------------------------------------------------- flags
def parse(tmp_path, *flags):
    """Flags of a run in a new folder."""
    out = str(tmp_path / "new")
    return train_t2i.parse_args(["--out", out, *[str(flag) for flag in flags]])


def test_the_recipe_of_pretraining_is_the_papers(tmp_path):
    args = parse(tmp_path, "--recipe", "pretrain", "--llm", "x", "--model", "2.4B")
    assert (args.batch, args.steps, args.lr, args.llm_lr) == (2048, 30_000, 5e-4, 5e-5)
    assert (args.warmup, args.decay_start, args.decay_end) == (402, 402, 30_000)
    assert (args.lr_end, args.ema, args.clip, args.weight_decay) == (0, 0, 1, 0)
    assert (args.class_dropout, args.flow_weight, args.draws) == (0.1, 2, 1)
    assert (args.time_law, args.shift_base) == ("logit_normal", 4096)
    assert args.prediction == "v"
    assert (args.width, args.depth, args.heads, args.head_width) == (2048, 32, 32, 0)
    assert (args.context, args.connector) == (512, "linear")
    assert (args.solver, args.sampling_steps) == ("euler", 50)
    assert (args.save_every, args.preview_every) == (1000, 1000)


def test_the_recipe_of_finetuning_is_the_papers(tmp_path):
    """Given flags win."""
    args = parse(tmp_path, "--recipe", "finetune", "--init", "scale-rae-7b", "--lr", 1e-4,
                 "--warmup", 7)
    assert (args.batch, args.lr, args.llm_lr, args.context) == (1024, 1e-4, 5.66e-5, 1024)
    assert (args.warmup, args.decay_start, args.steps) == (7, 7, 3750)
    assert (args.width, args.head_width) == (4096, 0)


def test_named_sizes(tmp_path):
    args = parse(tmp_path, "--model", "0.5B", "--wide_head", "--llm", "x")
    assert (args.width, args.depth, args.head_width, args.head_depth) == (1280, 16, 2688, 2)


def test_rate_of_the_language_model(tmp_path):
    pretrained = parse(tmp_path, "--llm", "x")
    from_scratch = parse(tmp_path)
    assert pretrained.llm_lr == pretrained.lr / 10
    assert from_scratch.llm_lr == from_scratch.lr / 3


def test_the_papers_model_on_the_meta_device(tmp_path, tokenizer):
    args = parse(tmp_path, "--recipe", "pretrain", "--llm", "x", "--model", "2.4B")
    with torch.device("meta"):
        llm = Qwen2(151_667, 1536, 8960, 28, 12, 2)    # Qwen2.5-1.5B
        t2i = build_t2i(vars(args), dict(latent_shape=[1152, 16, 16]), llm, tokenizer)
    billions = {}
    for name, part in t2i.named_children():
        billions[name] = sum(parameter.numel() for parameter in part.parameters()) / 1e9
    assert round(billions["dit"], 3) == 2.436
    assert round(billions["llm"], 2) == 1.54
    assert t2i.latent_queries.shape == (256, 1536)
    assert t2i.diff_head_projector.weight.shape == (2048, 1536)


@pytest.mark.parametrize("flags, message", [
    (["--rae", "nowhere.pt"], "file nowhere.pt does not exist"),
    (["--init", "a.pt", "--llm", "x"], "--init a.pt brings its language model and autoencoder"),
    (["--shard"], "--shard needs processes to share among; start with torchrun"),
    (["--shard", "--eval_every", "9"], "evaluate checkpoints by eval_t2i.py"),
    (["--llm_width", "30", "--llm_heads", "4"],
     "--llm_width 30 must be a multiple of --llm_heads 4 x 2; try --llm_width 32"),
    (["--questions", "1"], "--questions: 1 must be at least 0.0 and below 1")])
def test_bad_flags(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, *flags)
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------- files of the user
def test_a_file_that_holds_no_autoencoder_is_refused(tmp_path, capsys):
    storage.save_checkpoint(tmp_path / "x.pt", x=1)
    with pytest.raises(SystemExit):
        parse(tmp_path, "--rae", tmp_path / "x.pt")
    assert "x.pt is no checkpoint of train_decoder.py" in capsys.readouterr().err


def test_a_checkpoint_of_classes_is_refused(tmp_path, capsys):
    run_script(train_dit, *DIT_FLAGS, "--steps", 1, "--out", tmp_path / "dit")
    message = "dit/last.pt is a checkpoint of train_dit.py, for sample.py, eval_fid.py"
    with pytest.raises(ValueError, match=message):
        load_t2i(tmp_path / "dit" / "last.pt")
    with pytest.raises(SystemExit):
        parse(tmp_path, "--init", tmp_path / "dit" / "last.pt")
    assert message in capsys.readouterr().err


def test_an_unknown_language_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="--llm no/where: no such folder: no download"):
        run_script(train_t2i, *FLAGS, "--llm", "no/where", "--out", tmp_path)


def test_images_without_text_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / f"{i}.png")
    with pytest.raises(ValueError, match="8 of 8 images have no text"):
        run_script(train_t2i, *FLAGS, "--data", tmp_path / "images", "--out", tmp_path / "run")


def test_missing_weights_are_refused():
    """The shipped checkpoint has the EMA weights alone."""
    with pytest.raises(ValueError, match="holds no weights model; use --weights ema"):
        load_t2i(release.SHIPPED_T2I, weights="model")


# ---------------------------------------------------------------------------- published models
@pytest.fixture
def published_llm(tmp_path):
    """A folder with a Qwen2 that has more rows than tokens and no <im_start> and <im_end>."""
    folder = tmp_path / "llm"
    folder.mkdir()
    content = json.loads(TOKENIZER.read_text("utf-8"))
    kept = [token for token in content["added_tokens"]
            if token["content"] not in ("<im_start>", "<im_end>")]
    content["added_tokens"] = kept
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    llm = Qwen2(600, 32, 48, 1, 4, 2, 1e4)
    config = dict(llm.config, model_type="qwen2")
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"model.{name}": value for name, value in llm.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_published_language_model_gets_tokens_for_images(published_llm, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "optimizer_step", lambda *_: 0.0)     # it stays as it was
    rows = release.read_weights(published_llm)["model.embed_tokens.weight"]
    num_tokens = len(Tokenizer(TOKENIZER))

    run_script(train_t2i, *FLAGS, "--llm", published_llm, "--steps", 1, "--out", tmp_path / "run")

    state = load_last(tmp_path / "run")
    table = state["model"]["llm.embed_tokens.weight"]
    assert len(table) == num_tokens == state["llm"]["vocab_size"]
    assert torch.equal(table[:-2], rows[:num_tokens - 2])
    mean = rows[:num_tokens - 2].mean(0)
    torch.testing.assert_close(table[-2:], mean.expand(2, -1))


def test_a_published_language_model_is_trained_and_loaded(published_llm, tmp_path):
    run_script(train_t2i, *FLAGS, "--llm", published_llm, "--steps", 2, "--out", tmp_path / "run")
    t2i, _, _ = load_t2i(tmp_path / "run" / "last.pt")
    assert t2i.tokenizer.image_end == len(Tokenizer(TOKENIZER)) - 1


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_missing_files_of_a_language_model_are_named(name, published_llm, tmp_path):
    (published_llm / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist; copy it"):
        run_script(train_t2i, *FLAGS, "--llm", published_llm, "--steps", 1,
                   "--out", tmp_path / "run")


@pytest.mark.shipped
def test_a_published_model_loads(tmp_path):
    folder, _ = dry_run.make_scale_rae(tmp_path)
    t2i, rae, state = load_t2i("scale-rae-1.5b", folder=tmp_path)
    weights = release.read_weights(folder)
    bias = weights["diff_head.model.dit_blocks.0.mlp.w3.bias"]
    assert torch.equal(t2i.llm.norm.weight, weights["model.norm.weight"])
    assert torch.equal(t2i.dit.blocks[0].mlp.w3.bias, bias)
    assert torch.equal(t2i.latent_queries, weights["model.latent_queries"])
    assert state["asked"]
    assert (rae.latent_std == 1).all()
    assert rae.decoder.patch == 4


@pytest.mark.shipped
def test_a_published_model_draws(tmp_path):
    dry_run.make_scale_rae(tmp_path)
    sample.main(sample.parse_args([
        "--release", "scale-rae-1.5b", "--release_dir", str(tmp_path), "--prompt", "a cat",
        "--n", "1", "--sampling_steps", "2", "--out", str(tmp_path / "cat.png")]))
    picture = Image.open(tmp_path / "cat.png")
    assert picture.size[0] == 16 * 4 + 4               # a gap of 2 on each side


def test_a_shard_that_is_cut_short_is_named(tmp_path):
    folder, _ = dry_run.make_scale_rae(tmp_path)
    shard = folder / "model-00001-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:len(content) // 2])
    message = "model-00001-of-00002.safetensors can't be read .*copy it again"
    with pytest.raises(ValueError, match=message):
        load_t2i("scale-rae-1.5b", folder=tmp_path)


@pytest.mark.parametrize("path", [
    "Scale-RAE-Qwen1.5B_DiT2.4B/model-00001-of-00002.safetensors",
    "Scale-RAE-Qwen1.5B_DiT2.4B/config.json",
    "siglip2_decoder/model.pt"])
def test_missing_files_of_a_published_model_are_named(path, tmp_path):
    dry_run.make_scale_rae(tmp_path)
    (tmp_path / path).unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} does not exist"):
        load_t2i("scale-rae-1.5b", folder=tmp_path)


def test_a_published_model_that_cannot_be_downloaded_is_named():
    with pytest.raises(FileNotFoundError, match="scale-rae-7b: no download"):
        load_t2i("scale-rae-7b")
