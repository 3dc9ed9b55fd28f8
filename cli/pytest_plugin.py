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
        assert_equal(*mark.args, **mark.kwargs)
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


def _runner(model: Any, inputs: Sequence[Any] | None, options: Any) -> Any:
    """A MODEL, or a module with its example inputs, as a runner.

    Raises:
        BadInput: a module has no inputs, or is in train mode.
    """
    from fastvit_cli import runners
    from fastvit_cli.card import Card
    from fastvit_cli.errors import BadInput
    from fastvit_cli.sources import Loaded

    if isinstance(model, str):
        return runners.load(model, options)
    name = type(model).__name__
    if inputs is None:
        raise BadInput(f"{name} is a module.", hint="Give inputs=(x,) with it.")
    if getattr(model, "training", False):
        raise BadInput(f"{name} is in train mode.", hint="Call .eval() first.")
    example = tuple(inputs)
    card = Card(
        name,
        {"input_size": list(example[0].shape[1:])},
        weights={"origin": "factory"},
    )
    dtype = str(example[0].dtype).removeprefix("torch.")
    place = str(example[0].device)
    return runners.of(Loaded(name, model, example, card, dtype, place))


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
