"""A pytest plugin: equal models as tests, in any project that has this one installed.

def test_export(repcompiler_equal):
    repcompiler_equal("net.py:build", "net.onnx")

@pytest.mark.equivalence(model="net.py:build")
def test_fused(): ...

The mark compares MODEL with `candidate`, or with its own fused form, before the test's
body runs. Models are MODEL texts as on the command line, or modules with `inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from inspect import signature
from typing import Any

import pytest

MARK = (
    "equivalence(model, candidate=None, *, samples=4, max_error_ratio=None, "
    "input_size=None, seed=0): the two models are the same function; without a "
    "candidate, the model and its fused form."
)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark, for --strict-markers."""
    config.addinivalue_line("markers", MARK)


@pytest.fixture
def repcompiler_equal() -> Callable[..., Any]:
    """`repcompiler_equal(reference, candidate=None, …)`: fails with what differs."""
    return assert_equal


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Make the comparisons that a test is marked with, then run it."""
    __tracebackhide__ = True
    for mark in pyfuncitem.iter_markers("equivalence"):
        try:
            told = signature(assert_equal).bind(*mark.args, **mark.kwargs)
        except TypeError as error:
            pytest.fail(f"equivalence mark: {error}. It is {MARK}.", pytrace=False)
        assert_equal(*told.args, **told.kwargs)
    return (yield)


def assert_equal(
    model: Any,
    candidate: Any = None,
    *,
    inputs: Sequence[Any] | None = None,
    samples: int = 4,
    max_error_ratio: float | None = None,
    input_size: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> Any:
    """Compare two models as `fastvit check` does; the outcome where they are equal.

    Args:
        model: MODEL as text, or an nn.Module in eval mode.
        candidate: likewise; None for the model's fused form.
        inputs: positional example inputs, for modules.
        samples, max_error_ratio, input_size, seed: as the command's options.
    """
    __tracebackhide__ = True
    from fastvit_cli import check_view, checking
    from fastvit_cli.builders import ModelOptions
    from fastvit_cli.check import Job
    from fastvit_cli.errors import Stop

    options = ModelOptions(input_size=input_size, seed=seed)
    try:
        _check(samples, max_error_ratio, input_size)
        reference = _runner(model, inputs, options)
        other = _fused(reference) if candidate is None else candidate
        judged = _runner(other, inputs or reference.inputs, options)
        outcome = checking.ask(
            reference, judged, samples=samples, seed=seed, limit=max_error_ratio
        )
    except Stop as error:
        pytest.fail(error.line, pytrace=False)
    if not outcome.ok:
        job = Job(reference.name, judged.name, options, samples, max_error_ratio)
        pytest.fail(check_view.in_one_line(job, outcome), pytrace=False)
    return outcome


def _check(samples: Any, limit: Any, size: Any) -> None:
    """What the command's options would refuse.

    Raises:
        BadInput: an argument is not what it should be.
    """
    from fastvit_cli.builders import is_size
    from fastvit_cli.errors import BadInput

    if type(samples) is not int or samples < 1:
        raise BadInput(f"samples={samples!r} is no number of inputs.", hint="Give 4.")
    if limit is not None and not (isinstance(limit, (int, float)) and limit > 0):
        raise BadInput(f"max_error_ratio={limit!r} is not above 0.", hint="Give 8.")
    if size is not None and not is_size(size):
        raise BadInput(f"input_size={size!r} is no size.", hint="Give (3, 256, 256).")


def _runner(model: Any, inputs: Sequence[Any] | None, options: Any) -> Any:
    """A MODEL, or a module with its example inputs, as a runner.

    Raises:
        BadInput: it is neither; or a module has no inputs, does not take them, or is in
            train mode.
    """
    import torch
    from fastvit_cli import runners, sources
    from fastvit_cli.card import Card
    from fastvit_cli.errors import BadInput
    from fastvit_cli.sources import Loaded

    if isinstance(model, str):
        return runners.load(model, options)
    if not isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
        raise BadInput(
            f"{model!r} is neither the text of a MODEL nor a module.",
            hint="Give 'file.py:callable', a file, or the module itself.",
        )
    name = type(model).__name__
    if inputs is None:
        raise BadInput(f"{name} is a module.", hint="Give inputs=(x,) with it.")
    if getattr(model, "training", False):
        raise BadInput(f"{name} is in train mode.", hint="Call .eval() first.")
    listed = isinstance(inputs, (list, tuple)) and len(inputs) > 0
    if not listed or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise BadInput(
            f"inputs of {name} are no tuple of tensors.", hint="Give inputs=(x,)."
        )
    example = tuple(inputs)
    card = Card(
        name,
        {"input_size": list(example[0].shape[1:])},
        weights={"origin": "factory"},
    )
    dtype = str(example[0].dtype).removeprefix("torch.")
    place = str(example[0].device)
    loaded = Loaded(name, model, example, card, dtype, place)
    sources.try_once(loaded)
    return runners.of(loaded)


def _fused(reference: Any) -> Any:
    """The fused form of a reference.

    Raises:
        BadInput: the compiler cannot take it.
    """
    from fastvit_cli.errors import BadInput

    import repcompiler as rc

    if reference.model is None:
        raise BadInput(
            f"{reference.name} is an ONNX graph, which has no fused form.",
            hint="Name a candidate.",
        )
    try:
        return rc.fuse(reference.model, reference.inputs).model
    except rc.RepCompilerError as error:
        raise BadInput(f"{reference.name}: {error}", hint=error.hint) from error
