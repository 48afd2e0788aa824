"""Which images are trained on, and in which order, as functions of seed and number.

Up to AT_ONCE images, all orders are permutations of the whole. That of 73 million would take 584 MB
in each process that loads images, and send each of them to another place of the disk. Above it, the
memory does not depend on the number of images, and reading stays local: see EpochOrder.
"""
import numpy as np

# Their permutation takes 8 MB, and ImageNet's 1.28 million keep the order of earlier versions.
AT_ONCE = 2**21
# Images of 100 KB that lie beside each other in a tar make up 25 MB, enough to read it at the speed
# of a disk. As many different pieces are mixed, so that classes that lie apart meet in a batch.
PIECE = 2**8
BUFFER = 2**8 * PIECE      # 65,536 images, of 100 KB 6.6 GB: the page cache of a node holds them


class EpochOrder:
    """The order of images 0 to length - 1, another one in every epoch.

    Up to AT_ONCE images it is a random permutation. Above it, PIECEs of neighbours come in random
    order, and are shuffled within a BUFFER of pieces. The borders of the pieces differ between
    epochs. In either case, every epoch has each image once.

    seed: of the run. source: index of the images' source in its mixture
    """

    def __init__(self, length, seed, source):
        self.length = length
        self.seed = seed
        self.source = source
        # The part of the order that is being loaded, and its indices: all of it is too large to
        # keep. They are one pair, since threads that load may be in two parts.
        self.loaded = None, None

    def index_of(self, number):
        """Return which image is number = 0, 1, ... without end."""
        epoch, position = divmod(number, self.length)
        buffer = 0
        if self.length > AT_ONCE:
            buffer, position = divmod(position, BUFFER)
        part, indices = self.loaded
        if part != (epoch, buffer):
            indices = self.shuffle(epoch, buffer)
            self.loaded = (epoch, buffer), indices
        return int(indices[position])

    def shuffle(self, epoch, buffer):
        """Return the images of a buffer of an epoch in their order, or of the whole epoch."""
        rng = np.random.default_rng((self.seed, epoch, 1, self.source))
        if self.length <= AT_ONCE:
            return permutation(rng, self.length)
        pieces = rng.permutation(self.length // PIECE)
        shift = rng.integers(self.length)

        first = buffer * BUFFER // PIECE
        chosen = pieces[first:first + BUFFER // PIECE]
        indices = (PIECE * chosen[:, None] + np.arange(PIECE)).ravel()
        if buffer == (self.length - 1) // BUFFER:                 # less than a piece is left
            indices = np.append(indices, np.arange(PIECE * len(pieces), self.length))
        indices = (indices + shift) % self.length
        rng = np.random.default_rng((self.seed, epoch, 1, self.source, buffer))
        return rng.permutation(indices)


def permutation(rng, n):
    """Return rng.permutation(n) in 4 bytes a number, not 8."""
    numbers = np.arange(n, dtype=np.int32)
    rng.shuffle(numbers)
    return numbers


class AllBut:
    """The integers from 0 to n - 1 except for some, in ascending order: a sequence.

    It keeps only those that are left out.
    """

    def __init__(self, n, left_out):
        self.length = n - len(left_out)
        # For each of those left out: how many before it are not.
        self.kept_before = np.sort(left_out) - np.arange(len(left_out))

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return int(i + np.searchsorted(self.kept_before, i, side="right"))


def split_images(n, hold_out):
    """Part images 0 to n - 1 at random; the same for every seed, so that runs can be compared.

    The images of a smaller `hold_out` are among those of a larger one.
    Returns: those to train on, and the `hold_out` others: sequences of integers
    """
    rng = np.random.default_rng(0)
    if n <= AT_ONCE:
        order = permutation(rng, n)
        return order[hold_out:], order[:hold_out]
    held_out = {}                                 # as a set that keeps the order
    while len(held_out) < hold_out:
        held_out[int(rng.integers(n))] = None
    held_out = np.array(list(held_out), np.int64)
    return AllBut(n, held_out), held_out
