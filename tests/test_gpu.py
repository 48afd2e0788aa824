"""The scripts on a GPU that is none (see accelerator.py): they give the results that they give on
the CPU, no tensor of one device meets one of the other, and Python rarely waits for the device.

Run: python -m pytest -rs tests/test_gpu.py
Each script runs in a process of its own, forked from one that has imported the scripts and done
nothing else: the settings that other tests leave behind in this process could change results.
"""
import contextlib
import importlib
import inspect
import io
import math
import multiprocessing

import numpy as np
import pytest
import torch
from torch.utils import backend_registration

import runtime
from conftest import SHIPPED, call_in_process, load_last, read_log
from model import DiTBase

NEEDED = "_setup_privateuseone_for_python_backend"
CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
pytestmark = [
    pytest.mark.skipif(not hasattr(backend_registration, NEEDED),
                       reason=f"torch {torch.__version__} has no {NEEDED}"),
    pytest.mark.skipif(not CAN_FORK, reason="this system cannot fork processes")]

SCRIPTS = ["train_decoder", "train_dit", "train_t2i", "sample", "eval_decoder", "eval_fid",
           "eval_t2i"]
# Both runs compute with the same kernels in fp32, but for operations that are one kernel on the CPU
# and several on another device, such as RMSNorm: their sums are rounded otherwise, by 1e-7. Adam's
# first steps divide small gradients by their own size, which makes 1e-4 of it for one weight of the
# discriminator on one CPU, and at most 1e-5 for all others.
TOLERANCE = 2e-4
# Flags; what depends on the machine; hashes of images, whose bytes may be rounded otherwise.
NOT_COMPARED = {"args", "device", "fused", "img_per_s", "mfu", "gib", "eta_h", "samples_sha1"}
MOST_WAITS = 1                 # in a step: for the norm of the gradients of the step before


# ---------------------------------------------------------------------------- in a fresh process
def run(device_type, script_name, argv, change=None):
    """Run a script on device_type "cpu" or "gpu", in this process.

    change: (module, text, new text) to be put into the source of a module.
    Returns what the script's main returns, and a list of waits, as texts, for each step but the
    first: an optimizer step, or in scripts that draw, an evaluation of the velocity.
    """
    torch.set_num_threads(1)
    torch.backends.cuda.enable_flash_sdp(False)        # as runtime.setup() does on the CPU
    script = importlib.import_module(script_name)
    if change is not None:
        change_source(*change)

    owner, name = DiTBase, "velocity"
    if script_name.startswith("train"):
        owner, name = runtime, "update_ema"
    last_of_step = getattr(owner, name)
    emulation = contextlib.nullcontext()
    device = torch.device("cpu")
    if device_type == "gpu":
        from accelerator import GPU, Emulation
        emulation = Emulation()
        device = GPU

    def last_of_step_and_mark(*args):
        result = last_of_step(*args)
        if device_type == "gpu":
            emulation.mark_step()
        return result

    setattr(owner, name, last_of_step_and_mark)
    runtime.setup = lambda: (0, 1, device)
    messages = io.StringIO()
    with contextlib.redirect_stdout(messages), contextlib.redirect_stderr(messages), emulation:
        try:
            result = script.main(script.parse_args(argv))
        except SystemExit as error:                    # of flags that are wrong
            raise ValueError(messages.getvalue()) from error
    if device_type == "cpu":
        return result, []
    return result, [[str(wait) for wait in waits] for waits in emulation.waits_of_steps()]


def change_source(module_name, text, new_text):
    """Run the source of a module again, with a text in it replaced."""
    module = importlib.import_module(module_name)
    source = inspect.getsource(module)
    assert text in source, f"{module_name}.py has no {text}"
    code = compile(source.replace(text, new_text), module.__file__, "exec")
    exec(code, module.__dict__)


def run_in_process(*args):
    """run(*args), in a fresh process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SCRIPTS)
    return call_in_process(context, run, *args)


def run_on_both(script_name, flags, tmp_path, suffix="", change=None):
    """Run a script on the "gpu" and on the CPU, writing to tmp_path / "gpu" and "cpu" + suffix.

    Returns the results of both mains, and the waits of the first.
    """
    on_gpu, waits = run_in_process("gpu", script_name,
                                   [*flags, "--out", f"{tmp_path / 'gpu'}{suffix}"], change)
    on_cpu, _ = run_in_process("cpu", script_name,
                               [*flags, "--out", f"{tmp_path / 'cpu'}{suffix}"], change)
    return on_gpu, on_cpu, waits


def assert_close(a, b, where=""):
    """Two nested states are the same, but for TOLERANCE times the size of each number, or of 1, and
    for what is NOT_COMPARED.
    """
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - NOT_COMPARED:
            assert_close(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor) and a.is_floating_point():
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE,
                                   msg=lambda text: f"{where}: {text}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, float):
        assert math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE), (where, a, b)
    else:
        assert a == b, where


# ---------------------------------------------------------------------------- training
RUN = ["--steps", "3", "--batch", "4", "--micro_batch", "2", "--workers", "0", "--warmup", "1",
       "--log_every", "100", "--preview_every", "0", "--eval_every", "0", "--dtype", "fp32"]
DIT = [*RUN, "--width", "32", "--depth", "1", "--heads", "2", "--head_width", "192",
       "--head_heads", "4", "--sampling_steps", "2"]
DECODER = [*RUN, "--decoder_width", "32", "--decoder_depth", "1", "--decoder_heads", "2",
           "--decoder_mlp", "64", "--stats_n", "8", "--eval_n", "4"]
GAN = ["--feature", "0.3", "--gan", "0.75", "--disc_start", "0", "--gan_start", "1"]
T2I = [*DIT, "--llm_width", "32", "--llm_depth", "1", "--llm_heads", "2", "--questions", "0.5",
       "--llm_start", "1"]
TRAININGS = [
    pytest.param("train_dit", [*DIT, "--eval_every", "3", "--eval_n", "4"], id="dit"),
    pytest.param("train_dit", [*DIT, "--cache", "8", "--preview_every", "3"], id="dit, cached"),
    pytest.param("train_decoder", [*DECODER, *GAN, "--checkpoint_activations",
                                   "--eval_every", "3", "--preview_every", "3"], id="decoder"),
    pytest.param("train_decoder", [*DECODER, "--encoder", "vae:16:16", "--optimizer", "adamw"],
                 id="vae"),
    pytest.param("train_t2i", [*T2I, "--recompute", "--preview_every", "3"], id="t2i")]


def losses(folder):
    """The records of the log of steps and evaluations."""
    return [record for record in read_log(folder) if "loss" in record or "n" in record]


@pytest.mark.parametrize("script_name, flags", TRAININGS)
def test_a_training_is_that_of_the_cpu(script_name, flags, tmp_path):
    _, _, waits = run_on_both(script_name, flags, tmp_path)

    assert losses(tmp_path / "gpu") != []
    assert_close(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"))
    assert_close(load_last(tmp_path / "gpu"), load_last(tmp_path / "cpu"))
    previews = [path.name for path in (tmp_path / "gpu").glob("*.png")]
    assert len(previews) == ("--preview_every" in flags[len(RUN):])
    assert len(waits) == 2
    assert max(len(of_step) for of_step in waits) <= MOST_WAITS, waits


def test_a_resumed_training_is_that_of_the_cpu(tmp_path):
    flags = [*DIT, "--decay_start", "1", "--decay_end", "3"]
    out = ["--out", str(tmp_path / "gpu")]
    run_in_process("gpu", "train_dit", [*flags, "--steps", "1", *out])
    run_in_process("gpu", "train_dit", ["--resume", "--steps", "2", *out])
    run_in_process("cpu", "train_dit", [*flags, "--steps", "2", "--out", str(tmp_path / "cpu")])
    assert_close(load_last(tmp_path / "gpu"), load_last(tmp_path / "cpu"))


@pytest.mark.parametrize("script_name, flags", [
    ("train_dit", DIT), ("train_decoder", [*DECODER, *GAN]), ("train_t2i", T2I)])
def test_bf16_runs_where_cuda_casts(script_name, flags, tmp_path):
    """CUDA and the CPU cast other operations, so only the losses are alike, to bf16's 2^-8."""
    run_on_both(script_name, [*flags, "--steps", "2", "--micro_batch", "4", "--dtype", "bf16"],
                tmp_path)
    on_gpu, on_cpu = losses(tmp_path / "gpu"), losses(tmp_path / "cpu")
    assert on_gpu[-1]["loss"] == pytest.approx(on_cpu[-1]["loss"], rel=2e-2)


# ---------------------------------------------------------------------------- sampling
DRAW = ["--n", "2", "--sampling_steps", "3", "--dtype", "fp32"]
PROMPT = ["--prompt", "a red star"]


@pytest.mark.parametrize("flags", [
    ["--solver", "euler"],
    ["--solver", "heun", "--interval", "0.2", "0.9"],
    ["--solver", "euler_maruyama", "--guidance", "1"],
    ["--solver", "euler_maruyama", "--weak_ckpt", SHIPPED],
    ["--labels", "none", "red_star", "--release_grid"],
    PROMPT,
    [*PROMPT, "--n", "1", "--best_of", "2"],
    [*PROMPT, "--n", "1", "--best_of", "2", "--verifier", "confidence"],
    [*PROMPT, "--n", "1", "--best_of", "2", "--verifier", "answer_logits"]],
    ids=lambda flags: " ".join(flags).replace(SHIPPED, "shipped"))
def test_images_are_those_of_the_cpu(flags, tmp_path):
    _, _, waits = run_on_both("sample", [*DRAW, *flags], tmp_path, ".npz")

    on_gpu, on_cpu = (np.load(tmp_path / name)["arr_0"] for name in ("gpu.npz", "cpu.npz"))
    difference = np.abs(on_gpu.astype(int) - on_cpu)
    assert difference.max() <= 1 and difference.mean() < 1e-3          # bytes, that are rounded
    assert max(len(of_step) for of_step in waits) <= MOST_WAITS, waits


# ---------------------------------------------------------------------------- evaluation
PROBE = ["--probe", "tiny", "--data", "shapes", "--n", "36", "--hold_out", "36"]
LESS_TRAINING = ("metrics", "steps=1500", "steps=50")
FEWER_QUESTIONS = ("eval_t2i", "QUESTION_SCENES = 200", "QUESTION_SCENES = 2")


@pytest.mark.parametrize("script_name, flags, change", [
    pytest.param("eval_decoder", ["--n", "4"], None, id="reconstruction"),
    pytest.param("eval_decoder", PROBE, LESS_TRAINING, id="probe"),
    pytest.param("eval_fid", ["--n", "4", "--sampling_steps", "2"], None, id="generation"),
    pytest.param("eval_t2i", ["--n", "6", "--sampling_steps", "2"], FEWER_QUESTIONS, id="t2i")])
def test_an_evaluation_is_that_of_the_cpu(script_name, flags, change, tmp_path):
    on_gpu, on_cpu, _ = run_on_both(script_name, flags, tmp_path, ".json", change)
    assert on_gpu["device"] == "gpu"
    assert_close(on_gpu, on_cpu)


# ---------------------------------------------------------------------------- mistakes are found
EPS = "eps = torch.randn_like(x0)"
MISTAKES = {
    "constant of the CPU": (
        "train_dit", DIT, ("train_dit", EPS, "eps = torch.randn(x0.shape)"), "two devices"),
    "labels not moved": (
        "train_dit", DIT, ("train_dit", "runtime.to_device(labels, device)", "labels"),
        "two devices"),
    "generator of the CPU": (
        "train_dit", DIT,
        ("train_dit", EPS, "eps = torch.randn(x0.shape, device=device, "
                           "generator=torch.Generator())"),
        "with a generator of cpu"),
    "EMA left on the CPU": (
        "train_dit", DIT, ("train_dit", "copy.deepcopy(model)", "copy.deepcopy(model).cpu()"),
        "two devices"),
    "mask of the CPU": (
        "train_dit", DIT, ("model", "torch.rand(len(y), device=y.device)", "torch.rand(len(y))"),
        "two devices"),
    "statistics not moved": (
        "train_dit", DIT,
        ("train_dit", "rae = release.unpack_rae(packed_rae).to(device)",
         "rae = release.unpack_rae(packed_rae)\n    rae.encoder.to(device)"), "two devices"),
    "pixels not brought back": (
        "sample", DRAW, ("sample", '"b c h w -> b h w c").cpu()', '"b c h w -> b h w c")'),
        "can't convert"),
    "item in the loop": (
        "train_dit", DIT,
        ("train_dit", "loss_by_time.add(t, loss)", "loss_by_time.add(t, loss); loss[0].item()"),
        "local_scalar_dense"),
    "rows found on the device": (
        "train_t2i", T2I,
        ("t2i", "hidden[conversations.slots]", "hidden[(conversations.ids == IMAGE).flatten()]"),
        "index by a mask"),
    "memory not pinned": (
        "train_dit", DIT, ("runtime", "tensor.pin_memory().to(", "tensor.to("), "not pinned")}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name, tmp_path):
    script_name, flags, mistake, symptom = MISTAKES[name]
    try:
        _, waits = run_in_process("gpu", script_name, [*flags, "--out", str(tmp_path / "out")],
                                  mistake)
    except (RuntimeError, TypeError) as error:
        assert symptom in str(error)
    else:
        assert any(symptom in wait for of_step in waits for wait in of_step)
        assert max(len(of_step) for of_step in waits) > MOST_WAITS
