"""The text-to-image model: a language model with query tokens that condition a DiT; its verifiers.

    prompt -> language model -> states of the queries b n d -> connector -> conditions b n e -> DiT

A conversation holds at most one "<image>". In an assistant's turn the image is to be drawn: n
learned queries stand in its place, and the final state of query i conditions latent token i. In a
user's turn it is to be understood: its latents stand there, projected to the width of the language
model.

Shapes: b batch, l text tokens, n = h*w queries, c latent channels, d width of the language model,
    e width of the DiT, r rows of a batch that draw, k = r * draws noisy latents.
Source: [Scale-RAE] arXiv 2601.16208; modules and parameters are named as in its release.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.nn.utils.rnn import pad_sequence

import runtime
import sharding
import storage
from llm import IMAGE, NO_LABEL, Qwen2, Tokenizer
from model import build_dit, flow_matching_loss
from release import (
    PUBLISHED_T2I,
    check_checkpoint,
    check_source,
    materialize,
    published_t2i,
    unpack_rae,
)
from shapes import ALIGN_QUESTION, DESCRIBE_QUESTION

PAD = -100       # id of no token

# What a conversation asks for: answers alone, an image of its prompt, or an image without a prompt.
UNDERSTAND, DRAW, DRAW_UNCONDITIONED = range(3)


# Characters of a prompt. The context of the published models is 1024 tokens, of a few characters
# each, so that what follows would be cut; a longer text is no prompt but a mistake.
LONGEST_PROMPT = 32_768


# ---------------------------------------------------------------------------- prompts and tokens
def check_prompt(text):
    """Raise ValueError unless an image can be drawn from a text. It is checked before it is
    tokenized, which takes long for a whole book.
    """
    if not isinstance(text, str):
        raise ValueError(f"a prompt must be a text, not {type(text).__name__}")
    if len(text) > LONGEST_PROMPT:
        raise ValueError(f"a prompt has {len(text)} characters, more than any model reads; give "
                         f"at most {LONGEST_PROMPT}")
    shown = repr(text if len(text) <= 80 else f"{text[:80]}...")
    if not text.strip() or "<image>" in text:
        raise ValueError(f"prompt {shown} must say what to draw, in words and without <image>")
    # A byte that is no UTF-8 reaches Python as half a surrogate pair.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"prompt {shown} is no valid UTF-8; type it anew, or set LANG to UTF-8")


def task_of(turns):
    """UNDERSTAND, DRAW or, if the prompt is empty, DRAW_UNCONDITIONED, for one conversation."""
    draws = any(role == "assistant" and "<image>" in text for role, text in turns)
    has_prompt = any(role == "user" and text.strip() for role, text in turns)
    if not draws:
        return UNDERSTAND
    if has_prompt:
        return DRAW
    return DRAW_UNCONDITIONED


def tokenize(tokenizer, conversations, n, context=None, answer=True):
    """Conversations as one batch, padded on the right.

    conversations: b lists of (role, text). n: tokens of an image. context: most tokens of a
    conversation; None: any number. answer: False if the last turn is the user's.
    Returns ids b l (PAD at padding, IMAGE in image slots), labels b l (NO_LABEL where there is
    nothing to learn), tasks b, and the number of conversations that were cut to the context.
    """
    ids = []
    labels = []
    num_cut = 0
    for turns in conversations:
        own_ids, own_labels, is_cut = tokenizer.chat(turns, n, context, answer)
        ids.append(torch.tensor(own_ids))
        labels.append(torch.tensor(own_labels))
        num_cut += is_cut
    ids = pad_sequence(ids, batch_first=True, padding_value=PAD)        # b l
    labels = pad_sequence(labels, batch_first=True, padding_value=NO_LABEL)         # b l
    tasks = torch.tensor([task_of(turns) for turns in conversations])   # b
    return ids, labels, tasks, num_cut


class Conversations(NamedTuple):
    """Those conversations of a batch that all draw an image, or all do not, as T2I reads them.

    Made on the CPU, where the tokens are. On a GPU, Python would have to wait for each number here.
    If there are none, the first token of the batch stands in, because DDP and FSDP need every
    parameter in every step on every process. It has nothing to learn, so its loss is 0.
    """
    rows: torch.Tensor       # r, which conversations of the batch
    ids: torch.Tensor        # r l
    tasks: torch.Tensor      # r
    slots: torch.Tensor      # positions in r*l of the image slots
    learned: torch.Tensor    # positions in r*l of the tokens before those to learn
    targets: torch.Tensor    # the tokens to learn
    is_stand_in: bool

    def to(self, device):
        *tensors, is_stand_in = self
        moved = [runtime.to_device(tensor, device) for tensor in tensors]
        return Conversations(*moved, is_stand_in)


def split_tasks(ids, labels, tasks):
    """The Conversations of a batch that draw nothing, and those that draw.

    ids, labels: b l; tasks: b; as tokenize() returns them. The two kinds run apart, since they
    differ in length: this saves padding.
    """
    is_drawing = tasks != UNDERSTAND                                    # b
    asked = take_conversations(ids, labels, tasks, ~is_drawing)
    drawn = take_conversations(ids, labels, tasks, is_drawing)
    return asked, drawn


def take_conversations(ids, labels, tasks, is_taken):
    """The Conversations of the rows of a batch where is_taken, b bool. The others: split_tasks."""
    rows = is_taken.nonzero()[:, 0]                                     # r
    is_stand_in = len(rows) == 0
    if is_stand_in:
        rows = torch.zeros(1, dtype=torch.long)
        length = 1
    else:
        length = int((ids[rows] != PAD).sum(1).max())
    ids = ids[rows, :length]                                            # r l
    next_tokens = labels[rows, 1:length]                                # r l-1
    row, column = (next_tokens != NO_LABEL).nonzero(as_tuple=True)
    return Conversations(rows, ids, tasks[rows], image_slots(ids), learned=row * length + column,
                         targets=next_tokens[row, column], is_stand_in=is_stand_in)


def image_slots(ids):
    """Positions in b*l of the image slots of conversations, ids b l."""
    return (ids == IMAGE).flatten().nonzero()[:, 0]


# ---------------------------------------------------------------------------- model
class T2I(nn.Module):
    """A language model that reads prompts and images, and a DiT that draws from its states.

    llm: Qwen2. tokenizer: its Tokenizer. dit: a DiT or DiTDH conditioned on text.
    connector: "linear" or "mlp2". regression: whether a layer predicts the latents from the states.
    plan: most tokens that the model says before it draws; 0: none.
    context: most tokens of a conversation.
    Source: [Scale-RAE] section 3: the queries follow the prompt, all attention is causal.
    """
    def __init__(self, llm, tokenizer, dit, connector, regression=False, plan=0, context=10 ** 9):
        super().__init__()
        self.llm = llm
        self.tokenizer = tokenizer
        self.dit = dit
        self.n = dit.grid ** 2
        self.plan = plan
        self.context = context
        d = llm.config["hidden_size"]
        e = dit.pos_embed.shape[2]
        self.latent_queries = nn.Parameter(torch.randn(self.n, d) / d ** 0.5)
        # Into the language model: the latents of an image that is to be understood.
        self.mm_projector = nn.Sequential(nn.Linear(dit.in_channels, d), nn.GELU(), nn.Linear(d, d))
        # Out of it: the connector. One layer in the released code, two in the text of the paper.
        if connector == "linear":
            self.diff_head_projector = nn.Linear(d, e)
        else:
            self.diff_head_projector = nn.Sequential(nn.Linear(d, e), nn.GELU(), nn.Linear(e, e))
        # Xavier, as in the DiT: with PyTorch's smaller default, prompts would hardly differ to it.
        for parameter in self.diff_head_projector.parameters():
            if parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
        self.regression = nn.Linear(d, dit.in_channels) if regression else None

    # ------------------------------------------------------------------------ training
    def forward(self, asked, drawn, latents, t, eps):
        """The three losses of a batch of conversations, each about one image.

        asked, drawn: Conversations of split_tasks(), on the device.
        latents: b c h w, of the images that are to be drawn or understood.
        t: k times in [0,1]. eps: standard normal noise k c h w. k is a multiple of the number r of
        rows that draw: row i is drawn at t[i], t[i + r] and so on.
        Returns the cross-entropy, summed over all tokens to learn; the squared error of the
        regression, r; the flow matching loss, k. If no row draws, r is 1 and the last two are 0.
        """
        answer_loss, _ = self.language_model_pass(asked, latents[asked.rows])
        plan_loss, states = self.language_model_pass(drawn)             # -, r*n d
        states = rearrange(states, "(r n) d -> r n d", n=self.n)        # r n d
        x0 = latents[drawn.rows]                                        # r c h w
        error = self.regression_error(states, x0)                       # r

        draws = len(t) // len(x0)
        conditions = self.connect(states, drawn.tasks)                  # r n e
        conditions = conditions.repeat(draws, 1, 1)                     # k n e
        x0 = x0.repeat(draws, 1, 1, 1)                                  # k c h w
        flow_loss = flow_matching_loss(self.dit, x0, conditions, t, eps)            # k

        if drawn.is_stand_in:
            error = 0 * error
            flow_loss = 0 * flow_loss
        return answer_loss + plan_loss, error, flow_loss

    def language_model_pass(self, conversations, latents=None):
        """Language modelling loss and image states of Conversations.

        latents: r c h w of images to understand; None: the images are to be drawn.
        Returns the cross-entropy, summed over the tokens to learn, and the final states in image
        slots, r*n d; of a stand-in its state, in place of each of the queries'.
        """
        hidden = self.llm(self.embed(conversations.ids, conversations.slots, latents))  # r l d
        hidden = hidden.flatten(0, 1)                                   # r*l d
        logits = self.llm.logits(hidden[conversations.learned])         # tokens vocab
        loss = F.cross_entropy(logits.float(), conversations.targets, reduction="sum")

        if conversations.is_stand_in:
            return loss, hidden.expand(self.n, -1)                      # -, n d
        return loss, hidden[conversations.slots]                        # -, r*n d

    def regression_error(self, states, x0):                             # r n d, r c h w
        """Mean squared error of the latents as predicted from the states of the queries: r.

        It teaches the queries what to draw before the DiT can. Optional in Scale-RAE's code, too.
        """
        if self.regression is None:
            return states.new_zeros(len(states))                        # r
        target = rearrange(x0, "r c h w -> r (h w) c")                  # r n c
        prediction = self.regression(states).float()                    # r n c
        return (prediction - target).square().mean((1, 2))              # r

    # ------------------------------------------------------------------------ in and out
    def embed(self, ids, slots, latents=None):                          # b l, s, b c h w
        """Embeddings b l d of conversations, images included.

        slots: image_slots(ids). There stand the projected latents b c h w of an image that is to be
        understood or, without latents, the queries of one that is to be drawn.
        """
        embeddings = self.llm.embed_tokens(ids.clamp(min=0))            # b l d
        if latents is None:
            images = self.latent_queries.expand(len(ids), -1, -1)       # b n d
        else:
            tokens = rearrange(latents, "b c h w -> b (h w) c")         # b n c
            images = self.mm_projector(tokens).float()                  # b n d
        # A conversation has n slots, or none if it is text only.
        row = slots // ids.shape[1]                                     # s
        token = torch.arange(len(slots), device=slots.device) % self.n  # s
        filled = embeddings.flatten(0, 1).index_copy(0, slots, images[row, token])      # b*l d
        return filled.view_as(embeddings)                               # b l d

    @torch.no_grad()
    def embed_conversations(self, conversations, latents=None, answer=True):
        """Embeddings b l d, ids b l, labels b l and tasks b of conversations about latents b c h w.

        latents: None if images are to be drawn. answer: False if the model is to speak next.
        """
        device = self.latent_queries.device
        ids, labels, tasks, _ = tokenize(self.tokenizer, conversations, self.n, answer=answer)
        slots = image_slots(ids).to(device)
        ids, labels, tasks = ids.to(device), labels.to(device), tasks.to(device)
        return self.embed(ids, slots, latents), ids, labels, tasks

    def connect(self, states, tasks):                                   # b n d, b
        """Conditions of the DiT from the states of the queries; null where there is no prompt."""
        conditions = self.diff_head_projector(states).float()           # b n e
        is_unconditioned = (tasks == DRAW_UNCONDITIONED)[:, None, None]             # b 1 1
        null = self.dit.null_condition(conditions)                      # b n e
        return torch.where(is_unconditioned, null, conditions)          # b n e

    # ------------------------------------------------------------------------ sampling
    def fit(self, prompts):
        """The prompts, cut where needed to what the plan and the image leave of the context.

        Raises ValueError if they leave nothing.
        """
        no_prompt, _, _ = self.tokenizer.chat([("user", ""), ("assistant", "<image>")], self.n)
        taken = self.plan + len(no_prompt)
        room = self.context - taken
        if room < 1:
            raise ValueError(f"a context of {self.context} tokens leaves none for a prompt, as "
                             f"plan and image take {taken}; give more --context, or --plan 0")
        fitted = []
        for prompt in prompts:
            ids = self.tokenizer.encode(prompt)
            if len(ids) > room:
                prompt = self.tokenizer.decode(ids[:room])
                prompt = prompt.rstrip("\ufffd")       # bytes of half a character
            fitted.append(prompt)
        return fitted

    @torch.no_grad()
    def plans(self, prompts, uniforms=None):
        """What the model says to b prompts before it draws: b texts.

        uniforms: b plan, numbers in [0,1) that choose the tokens; None: always the likeliest token.
        """
        end, image_start = self.tokenizer.end, self.tokenizer.image_start
        conversations = [[("user", prompt)] for prompt in prompts]
        embeddings, ids, _, _ = self.embed_conversations(conversations, answer=False)
        said = self.llm.generate(embeddings, ids != PAD, image_start, self.plan, uniforms)
        texts = []
        for tokens in said.tolist():
            if end in tokens:
                tokens = tokens[:tokens.index(end)]
            text = self.tokenizer.decode(tokens)
            texts.append(text.replace("<image>", ""))  # the one image comes after the plan
        return texts

    @torch.no_grad()
    def conditions(self, prompts, uniforms=None):                       # [T1]
        """Conditions of the DiT for b prompts, each after its plan: b n e, fp32."""
        if self.plan > 0:
            plans = self.plans(prompts, uniforms)
        else:
            plans = ["" for _ in prompts]
        conversations = []
        for prompt, plan in zip(prompts, plans, strict=True):
            conversations.append([("user", prompt), ("assistant", f"{plan}<image>")])
        embeddings, ids, _, tasks = self.embed_conversations(conversations)
        states = self.llm(embeddings)[ids == IMAGE]                     # b*n d
        states = rearrange(states, "(b n) d -> b n d", n=self.n)        # b n d
        return self.connect(states, tasks)                              # b n e

    def ask(self, latents, questions, max_tokens=40):
        """The model's answers, decoded greedily, to one question about each of b latents."""
        turns = [[("user", f"<image>\n{question}")] for question in questions]
        embeddings, ids, _, _ = self.embed_conversations(turns, latents, answer=False)
        answers = self.llm.generate(embeddings, ids != PAD, self.tokenizer.end, max_tokens)   # b m
        return [self.tokenizer.decode(tokens).strip() for tokens in answers.tolist()]


# ---------------------------------------------------------------------------- verifiers
# (t2i, latents b c h w, b prompts) -> b floats: how well each image shows its prompt, higher is
# better. The language model reads the latents themselves; nothing is decoded to pixels.
# Source: [Scale-RAE] section 5 and its script of test-time scaling
ANSWER_TOKENS = 8            # room for "Yes." or a short sentence
SAID_YES = 1e6               # above any logit


def ask_alignment(t2i, latents, prompts):
    """Embeddings b l d and ids b l of the question whether each image aligns with its prompt."""
    turns = [[("user", f"<image>\n{ALIGN_QUESTION.format(prompt)}")] for prompt in prompts]
    embeddings, ids, _, _ = t2i.embed_conversations(turns, latents, answer=False)
    return embeddings, ids


def single_tokens(tokenizer, word):
    """Ids of the single tokens that spell a word: in any case, after a space or not."""
    found = []
    for space in ("", " "):
        for spelling in (word, word.title(), word.upper()):
            ids = tokenizer.encode(space + spelling)
            if len(ids) == 1 and ids[0] not in found:
                found.append(ids[0])
    return found


@torch.no_grad()
def answer_score(t2i, latents, prompts):
    """Probability of "yes" against "no" as the first token of the answer to ALIGN_QUESTION."""
    yes = single_tokens(t2i.tokenizer, "yes")
    no = single_tokens(t2i.tokenizer, "no")
    embeddings, ids = ask_alignment(t2i, latents, prompts)
    hidden = t2i.llm(embeddings)                                        # b l d
    last = (ids != PAD).sum(1) - 1                                      # b
    rows = torch.arange(len(ids), device=ids.device)                    # b
    p = t2i.llm.logits(hidden[rows, last]).float().softmax(-1)          # b vocab
    p_yes = p[:, yes].sum(1)                                            # b
    p_yes_or_no = p[:, yes + no].sum(1)                                 # b
    return (p_yes / p_yes_or_no).tolist()


@torch.no_grad()
def prompt_confidence(t2i, latents, prompts):
    """How certain the model is while it says the prompt in answer to DESCRIBE_QUESTION.

    The mean of -log(V p) over the tokens of the prompt and the V tokens of the vocabulary, a
    divergence of p from the uniform distribution. Which token comes next does not enter.
    Source: "self-certainty", arXiv 2502.18581
    """
    conversations = []
    for prompt in prompts:
        conversations.append([("user", f"<image>\n{DESCRIBE_QUESTION}"), ("assistant", prompt)])
    embeddings, _, labels, _ = t2i.embed_conversations(conversations, latents)
    # As in the release, p is what follows each of the prompt's tokens, not what predicts them.
    is_prompt = (labels != NO_LABEL) & (labels != t2i.tokenizer.end)    # b l
    hidden = t2i.llm(embeddings)[is_prompt]                             # tokens d
    log_p = t2i.llm.logits(hidden).float().log_softmax(-1)              # tokens vocab
    confidence = -log_p - math.log(log_p.shape[1])                      # tokens vocab
    prompt_lengths = is_prompt.sum(1).tolist()
    return [float(own.mean()) for own in confidence.split(prompt_lengths)]


@torch.no_grad()
def answer_logits(t2i, latents, prompts):
    """The paper's ranking, by the raw logits of the tokens in the answer to ALIGN_QUESTION.

    Images with a "yes" in the answer come first, ordered by the logit of "yes"; the others are
    ordered by the logit of "no", the smaller the better, which is 0 if "no" is not said.
    """
    yes = single_tokens(t2i.tokenizer, "yes")
    no = single_tokens(t2i.tokenizer, "no")
    embeddings, ids = ask_alignment(t2i, latents, prompts)
    is_token = ids != PAD                                               # b l
    lengths = is_token.sum(1)                                           # b
    answers = t2i.llm.generate(embeddings, is_token, t2i.tokenizer.end, ANSWER_TOKENS)      # b m

    # Read question and answer once more, for the logits: the state before a token predicts it.
    sequences = []
    for question, length, answer in zip(ids, lengths, answers, strict=True):
        sequences.append(torch.cat([question[:length], answer]))
    ids = pad_sequence(sequences, batch_first=True, padding_value=PAD)  # b l+m
    hidden = t2i.llm(t2i.embed(ids, image_slots(ids), latents))         # b l+m d
    rows = torch.arange(len(ids), device=ids.device)[:, None]           # b 1
    steps = torch.arange(answers.shape[1], device=ids.device)           # m
    before = lengths[:, None] - 1 + steps                               # b m
    logits = t2i.llm.logits(hidden[rows, before]).float()               # b m vocab
    logits = logits.gather(2, answers[:, :, None])[:, :, 0]             # b m

    scores = []
    for tokens, token_logits in zip(answers.tolist(), logits.tolist(), strict=True):
        scores.append(rank_answer(tokens, token_logits, yes, no))
    return scores


def rank_answer(tokens, logits, yes, no):
    """The score of one answer for answer_logits. Of several "yes" (or "no"), the last counts."""
    yes_logit = None
    no_logit = 0.0
    for token, logit in zip(tokens, logits, strict=True):
        if token in yes:
            yes_logit = logit
        elif token in no:
            no_logit = logit
    if yes_logit is None:
        return -no_logit
    return SAID_YES + yes_logit


VERIFIERS = {
    "answer": answer_score,
    "confidence": prompt_confidence,
    "answer_logits": answer_logits,
}


# ---------------------------------------------------------------------------- building and loading
def build_t2i(flags, state, llm=None, tokenizer=None, source="the checkpoint"):
    """A T2I from a dict of the flags of train_t2i.py and the dict of a checkpoint.

    state: needs latent_shape (c h w); without the arguments llm and tokenizer also llm (arguments
    of Qwen2) and tokenizer (content of a tokenizer.json). source: its path, for errors.
    Raises ValueError if the tokenizer and the language model do not fit.
    """
    channels, grid = state["latent_shape"][:2]
    dit = build_dit(flags, channels, grid, num_classes=None)
    if llm is None:
        llm = Qwen2(**state["llm"])
    if tokenizer is None:
        tokenizer = Tokenizer(state["tokenizer"], f"{source}: tokenizer")
    if tokenizer.largest_id >= llm.config["vocab_size"]:
        raise ValueError(f"{source} has a tokenizer of ids up to {tokenizer.largest_id} and a "
                         f"language model of {llm.config['vocab_size']} tokens; give those of one "
                         f"model")
    return T2I(llm, tokenizer, dit, flags["connector"], regression=flags.get("regression", 0) > 0,
               plan=flags.get("plan", 0), context=flags["context"])


def read_t2i(path, folder=None):
    """The dict of a checkpoint of train_t2i.py, or of a published model.

    path: of a file, or a name of PUBLISHED_T2I. folder: holds copies of the published files; None:
    they are downloaded, once.
    Raises FileNotFoundError; ValueError if it is the checkpoint of another stage.
    """
    if str(path) in PUBLISHED_T2I:
        state = published_t2i(str(path), folder)
    else:
        check_source(path, "train_t2i.py")
        state = storage.load_checkpoint(path)
    check_checkpoint(state, "train_t2i.py", path)
    if "weights" in state:
        raise ValueError(sharding.how_to_convert(path))
    return state


def load_t2i(path, device="cpu", with_encoder=False, weights="ema", folder=None):
    """Frozen T2I, RAE and dict of a checkpoint of train_t2i.py, or of a published model.

    with_encoder: False for an RAE that only decodes. weights: "ema" or "model"; a run with --ema 0
    has only the latter. path, folder: as in read_t2i. Raises FileNotFoundError, ValueError.
    """
    state = read_t2i(path, folder)
    if "ema" not in state:
        weights = "model"

    def build():
        return build_t2i(state["args"], state, source=path)

    t2i = materialize(build, state, weights, path, device)
    rae = unpack_rae(state["rae"], with_encoder, path).to(device)
    return t2i, rae, state
