"""Files: downloads, writing them whole or not at all, locks, checks of paths, checkpoints."""
import contextlib
import errno
import json
import math
import os
import platform
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import torch
from safetensors import safe_open

try:
    import fcntl
except ImportError:                # Windows has no such locks
    fcntl = None

import runtime


# ---------------------------------------------------------------------------- downloads
@contextlib.contextmanager
def fetching(what, advice):
    """Turn what a failing download raises inside the block into a FileNotFoundError with advice."""
    try:
        yield
    except Exception as error:             # the hub, http, ssl and files each raise their own kinds
        cause = type(error).__name__
        raise FileNotFoundError(f"{what}: no download ({cause}); {advice}") from error


def fetch_hub(repository, patterns):
    """Folder with those files of a repository on huggingface.co that fit `patterns`, downloaded
    once.

    Without a network it fails at once. The functions that fetch a single file, which timm and
    diffusers use, try again for 50 seconds; where this came first, they find the file.
    """
    return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))


# ---------------------------------------------------------------------------- writing
def write_whole(path, write):
    """Write a file that is there whole or not at all, and its folder, if that is not there.

    write: function of an open file. It writes to a temporary name, which is flushed and renamed.
    Raises OSError that names the path; the file that was there before is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch.save hides the error of a full disk behind a RuntimeError of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"{path} could not be written: {cause.strerror or cause}") from None
    except BaseException:                              # such as Ctrl-C
        temporary.unlink(missing_ok=True)
        raise


def append_whole(path, text):
    """Append text to a file, all of it or nothing. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)
    except OSError:                                    # a full disk may have taken half of it
        if path.exists():
            os.truncate(path, size)
        raise


def to_json(record):
    """A record as a line of strict JSON: null stands for nan and the infinities."""
    return json.dumps(without_nan(record), allow_nan=False)


def without_nan(value):
    """The same value of dicts, lists and plain types, with None for floats that are not finite."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---------------------------------------------------------------------------- locks
class Lock:
    """The right to write to a path, which only one process has, until it ends or releases it.

    The lock is a file that the operating system locks for this process, not for its children, and
    unlocks when the process ends, however it ends. There are no locks on Windows, nor on file
    systems that have none. Raises ValueError if another process has the lock.
    """
    def __init__(self, path, what):
        self.path = Path(path)
        self.file = None
        if fcntl is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while self.file is None or not self.is_current():      # the owner may have removed its file
            self.file = open(self.path, "a")                   # noqa: SIM115, open while it is held
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ValueError(f"another process is writing to {what}; wait for it, or name "
                                     f"another --out") from None
                return                                         # no locks here

    def is_current(self):
        """Whether the locked file is still the one at the path."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False

    def release(self):
        """Remove the file, then give up the lock."""
        if self.file is not None:
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None


def lock_file(path, is_folder=False):
    """The file that locks an output: of a folder OUT/.lock, of a file X .X.lock beside it."""
    if is_folder:
        return Path(path) / ".lock"
    return Path(path).with_name(f".{Path(path).name}.lock")


def lock(path, is_folder=False):
    """Lock an output, a folder or a file. Returns a Lock.

    Only rank 0 takes the lock, but all processes must call this, and all raise ValueError if
    another run has it, or if nothing can be written there.
    """
    file = lock_file(path, is_folder)
    taken, problem = None, None
    if runtime.process_rank() == 0:
        try:
            taken = Lock(file, Path(path))
        except ValueError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{path} cannot be written ({error.strerror}); name another --out"
    problem = runtime.gather(problem)[0]
    if problem:
        raise ValueError(problem)
    return taken


@contextlib.contextmanager
def locked(path):
    """Context in which an output file, or a folder that is yet to be made, is locked by lock()."""
    taken = lock(path)
    try:
        yield
    finally:
        if taken is not None:                          # of rank 0
            taken.release()


def check_shared(path, is_folder=False):
    """Raise ValueError unless all processes see the lock that rank 0 has on an output: its disk
    must be shared, since all of them write there.
    """
    file = lock_file(path, is_folder)
    sees_lock = runtime.gather((platform.node(), file.exists()))
    for host, is_seen in sees_lock:
        if sees_lock[0][1] and not is_seen:            # rank 0 has no lock on Windows
            raise ValueError(f"{path} is not on a disk that {host} shares with "
                             f"{sees_lock[0][0]}, and the processes of all nodes write there; "
                             f"name an --out on a shared disk")


# ---------------------------------------------------------------------------- checks of paths
def check_out(path, flag="--out"):
    """Raise ValueError if a path that is to be written was left empty, or cannot be written to."""
    if not str(path).strip():
        raise ValueError(f"{flag} is empty, perhaps a variable that is not set; name a path")
    ancestor = Path(path).absolute()
    while not ancestor.exists() and ancestor != ancestor.parent:       # a drive may be missing
        ancestor = ancestor.parent
    if not ancestor.exists():
        raise ValueError(f"{flag} {path} cannot be written: there is no {ancestor}")
    is_folder = ancestor.is_dir()
    if ancestor != Path(path).absolute() and not is_folder:
        raise ValueError(f"{flag} {path} cannot be written: {ancestor} is a file, not a folder")
    if not is_folder and not ancestor.is_file():       # it would be replaced by a file
        raise ValueError(f"{flag} {path} is a pipe or a device; name a file or a folder")
    folder = ancestor if is_folder else ancestor.parent                # where a temporary file goes
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{flag} {path} cannot be written: no permission for {folder}")


def check_suffix(path, suffixes, flag="--out"):
    """Raise ValueError unless a path ends in one of the suffixes; "" among them is a folder's."""
    if Path(path).suffix.lower() in suffixes:
        return
    files = " ".join(suffix for suffix in suffixes if suffix)
    or_folder = ", or a folder, which has no suffix" if "" in suffixes else ""
    raise ValueError(f"{flag} {path} can't be written in the format of its suffix; use one of "
                     f"{files}{or_folder}")


# ---------------------------------------------------------------------------- checkpoints
def save_checkpoint(path, **state):
    """Write a checkpoint of tensors and plain types as one file. Raises OSError."""
    write_whole(path, lambda f: torch.save(state, f))


def load_checkpoint(path):
    """The dict of a checkpoint, on the CPU, from a file of torch.save or our .safetensors.

    Raises FileNotFoundError; ValueError if the file cannot be read safely.
    """
    if Path(path).is_dir():
        raise FileNotFoundError(f"{path} is a folder; name the checkpoint in it, such as "
                                f"{Path(path) / 'last.pt'}")
    if not Path(path).is_file():
        if Path(path).exists():
            raise ValueError(f"{path} is a pipe or a device; name a file")
        raise FileNotFoundError(f"file {path} does not exist; check the path, or copy or train it "
                                f"first")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} may not be read by this user; change its permissions, or copy "
                         f"it")
    try:
        if Path(path).suffix == ".safetensors":
            state = read_nested_safetensors(path)
        else:
            # Windows cannot replace a file that is mapped, as a resumed run will.
            is_mapped = zipfile.is_zipfile(path) and sys.platform != "win32"
            state = torch.load(path, "cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:             # pickle, zip and safetensors raise a dozen kinds
        raise ValueError(f"{path} is no checkpoint that can be read safely: another kind of file, "
                         f"cut short, or with code in it ({type(error).__name__}); copy or train "
                         f"it again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint, as it holds a {type(state).__name__} and no "
                         f"dict; copy or train it again")
    return state


def read_nested_safetensors(path):
    """Nested dicts from a flat file: "rae/decoder/x.weight" becomes
    state["rae"]["decoder"]["x.weight"].

    Plain values stand as JSON in the metadata under "plain"; tensors are stored in half precision.
    """
    with safe_open(path, "pt") as f:
        metadata = f.metadata() or {}
        state = json.loads(metadata.get("plain", "{}"))
        for key in f.keys():                           # noqa: SIM118, safe_open is no dict
            *parents, leaf = key.split("/")
            node = state
            for parent in parents:
                node = node.setdefault(parent, {})
            tensor = f.get_tensor(key)
            node[leaf] = tensor.float() if tensor.is_floating_point() else tensor
    return state
