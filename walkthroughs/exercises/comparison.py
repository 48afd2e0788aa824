"""How a solution is compared with the project's own function, and what is said if it differs.

Each idea has a second implementation in references.py, which takes a set of mistakes and makes
them. If a student's result differs from the project's, the mistakes are made one by one, then in
pairs, until the result is the student's. So the diagnosis is a computation, not a guess.
"""
from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch


class Wrong(Exception):
    """What is wrong with a solution, in a sentence that a student can act on."""


class Failed(Exception):
    """What the student's code was given when it raised the exception that is the cause of this."""


class Case(NamedTuple):
    """Inputs to compare on. inputs: () -> a tuple, equal each time. text: what they are."""
    text: str
    inputs: Callable


class Comparison(NamedTuple):
    """A function or class of an exercise, and how to tell what is wrong with it.

    name: as in the student's file. product: the project's own.
    run: (function or class, *inputs) -> a tensor, a number, or a tuple of them.
    cases: list of Case, the most general one first.
    reference: (mistakes, *inputs) -> as run gives it, with the named mistakes made.
    mistakes: name -> sentence.
    results: names of the results, if run gives several. tolerance: relative and absolute.
    """
    name: str
    product: Callable
    run: Callable
    cases: list
    reference: Callable
    mistakes: dict
    results: tuple = ("the result",)
    tolerance: float = 1e-4

    def check(self, module):
        """Raise Wrong unless the function in the student's module does as the project's does."""
        solution = member(module, self.name)

        def run_solution(*inputs):
            return self.values(self.run(solution, *inputs))

        for case in self.cases:
            inputs = case.inputs()
            try:
                got = run_solution(*inputs)
            except Exception as error:                 # the student's code may raise anything
                raise Failed(case.text) from error
            wanted = self.values(self.run(self.product, *case.inputs()))
            check_unchanged(inputs, case.inputs())
            if not self.equal(got, wanted):
                cause = self.find_mistakes(got, wanted, case, run_solution)
                raise Wrong(cause or self.describe(got, wanted, case))
            check_gradient(got, wanted)

    def values(self, result):
        """A result as a tuple of tensors. What cannot be a tensor stays as it is."""
        if len(self.results) == 1 or not isinstance(result, (tuple, list)):
            result = (result,)
        return tuple(as_tensor(value) for value in result)

    def equal(self, got, wanted):
        """Whether results are equal in number, shape, dtype and, within the tolerance, value."""
        if len(got) != len(wanted):
            return False
        for one, other in zip(got, wanted, strict=True):
            if not (same_dtype(one, other) and close(one, other, self.tolerance)):
                return False
        return True

    def find_mistakes(self, got, wanted, case, run_solution):
        """The sentence of the mistakes, one or two, that give the student's result, or None."""
        for count in (1, 2):
            candidates = []
            for made in combinations(self.mistakes, count):
                result = self.values(self.reference(frozenset(made), *case.inputs()))
                explained = self.explains(result, got) and not self.explains(result, wanted)
                if explained and self.is_right_before(case, made):
                    candidates.append(made)
            if candidates:
                made = self.choose(candidates, run_solution)
                return "; and ".join(self.mistakes[name] for name in made)
        return None

    def is_right_before(self, case, made):
        """Whether mistakes change nothing in the cases before this one, in which the student's
        function was right.
        """
        for earlier in self.cases[:self.cases.index(case)]:
            wanted = self.values(self.run(self.product, *earlier.inputs()))
            result = self.values(self.reference(frozenset(made), *earlier.inputs()))
            if not self.explains(result, wanted):
                return False
        return True

    def choose(self, candidates, run_solution):
        """Of mistakes that explain one case alike, those that explain the most cases."""
        if len(candidates) == 1:
            return candidates[0]
        explained = dict.fromkeys(candidates, 0)
        for case in self.cases:
            try:
                got = run_solution(*case.inputs())
            except Exception:              # the student's code may raise anything in other cases
                continue
            for made in candidates:
                result = self.values(self.reference(frozenset(made), *case.inputs()))
                explained[made] += int(self.explains(result, got))
        return max(candidates, key=explained.get)

    def explains(self, result, got):
        """Whether a result with mistakes is the student's, whatever its dtype and sides of 1."""
        if len(result) != len(got):
            return False
        for one, other in zip(result, got, strict=True):
            if not torch.is_tensor(other):
                return False
            if not close(one.squeeze(), other.squeeze(), self.tolerance):
                return False
        return True

    def describe(self, got, wanted, case):
        """A sentence on how results differ, where no known mistake gives the student's."""
        if len(got) != len(wanted):
            return f"the function must return {' and '.join(self.results)}"
        for name, one, other in zip(self.results, got, wanted, strict=True):
            if not (same_dtype(one, other) and close(one, other, self.tolerance)):
                return f"{difference(name, one, other)} (inputs: {case.text})"
        raise AssertionError("these results are equal")


# ---------------------------------------------------------------------------- values
def member(module, name):
    """The function or class of that name in the student's module."""
    if not hasattr(module, name):
        raise Wrong(f"there is no {name} in the file; keep the name of the exercise")
    return getattr(module, name)


def as_tensor(value):
    """A number or an array as a tensor. Anything else stays as it is."""
    if isinstance(value, (int, float, complex, np.ndarray, np.generic)):
        return torch.as_tensor(value)
    return value


def same_dtype(got, wanted):
    """Whether two values have one dtype. Of a single number it does not matter, if it is real."""
    if not torch.is_tensor(got):
        return False
    if got.dim() == 0:
        return not got.is_complex()
    return got.dtype == wanted.dtype


def close(got, wanted, tolerance):
    """Whether two tensors have one shape and, within the tolerance, the same finite values."""
    if got.shape != wanted.shape or not got.isfinite().all():
        return False
    if got.is_complex() or wanted.is_complex():
        return False
    if torch.bfloat16 in (got.dtype, wanted.dtype):
        tolerance = 2e-2                       # 8 bits of precision
    return torch.allclose(got.detach().double(), wanted.detach().double(), rtol=tolerance,
                          atol=tolerance)


def check_unchanged(inputs, fresh_inputs):
    """Raise Wrong if a tensor among the inputs is no longer what it was."""
    for value, fresh in zip(inputs, fresh_inputs, strict=True):
        if torch.is_tensor(value) and not torch.equal(value, fresh):
            raise Wrong("an argument is changed in place, which the caller does not expect: write "
                        "x = x + step, not x += step")


def check_gradient(got, wanted):
    """Raise Wrong if a result has lost the gradient that the project's has."""
    for one, other in zip(got, wanted, strict=True):
        if other.requires_grad and not one.requires_grad:
            raise Wrong("the value is right, but it has no gradient, so nothing can be learned "
                        "from it: compute it without no_grad, detach and item")


# ---------------------------------------------------------------------------- sentences
def difference(name, got, wanted):
    """How a value differs from the wanted one."""
    if got is None:
        return "returns None; is the return missing?"
    if not torch.is_tensor(got):
        return f"{name} is a {type(got).__name__}, wanted a tensor"
    if got.is_complex():
        return f"{name} is complex; take its real part, as the rest is rounding"
    if got.shape != wanted.shape:
        return f"{name} has the shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    if not same_dtype(got, wanted):
        return f"{name} has the dtype {got.dtype}, wanted {wanted.dtype}"
    if not got.isfinite().all():
        return f"{name} is not finite: nan or inf"
    got = got.detach().double()
    wanted = wanted.detach().double()
    factor = constant_factor(got, wanted) if got.numel() > 1 else None
    if factor is not None and abs(factor + 1) < 1e-3:
        return f"{name} has the opposite sign of the project's"
    if factor is not None:
        return f"{name} is {factor:.3g} times the project's"
    worst = (got - wanted).abs().argmax()
    at = torch.unravel_index(worst, got.shape)
    index = ", ".join(str(int(i)) for i in at)
    where = f" at [{index}]" if index else ""
    return (f"{name} differs, and no usual mistake explains it: {got.flatten()[worst]:.4g}{where}, "
            f"wanted {wanted.flatten()[worst]:.4g}")


def constant_factor(got, wanted):
    """k if got = k * wanted, else None. Of a single number, this says nothing."""
    size = wanted.square().sum()
    if size == 0:
        return None
    factor = float((got * wanted).sum() / size)
    is_constant = torch.allclose(got, factor * wanted, rtol=1e-3, atol=1e-6)
    if is_constant and abs(factor) > 1e-3 and abs(factor - 1) > 1e-3:
        return factor
    return None
