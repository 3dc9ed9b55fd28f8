"""The pipeline: one function of named lines.

    capture → lift → compose → select → lower → verify → report

Each stage takes what the one before it returns and adds to it; `stop_after` ends early
and hands back the state, which is what the tests, the goldens and `--debug` look at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule

from repcompiler.capture import Model, require_numbers, run_capture
from repcompiler.certificate import certificate
from repcompiler.compose import compose
from repcompiler.errors import CaptureError, UnsupportedInput
from repcompiler.invariants import check as check_invariants
from repcompiler.lift import Rules, lift
from repcompiler.limits import assert_limits
from repcompiler.nearby import against_nearby, against_nearby64, widened
from repcompiler.operators import RULES
from repcompiler.part import Signature
from repcompiler.parts import Pipeline
from repcompiler.prepare import prepare
from repcompiler.probes import probe_shapes
from repcompiler.record import make_report
from repcompiler.region_error import Shapes, region_error
from repcompiler.regions import Rewrite, fused_form, original_form, rewrites
from repcompiler.report import FuseReport, VerifyReport
from repcompiler.rewrite import Rewritten, rewrite
from repcompiler.select import select
from repcompiler.state import State
from repcompiler.thinning import thinned
from repcompiler.tuning import Tuning, apply
from repcompiler.verify import (
    EXACT,
    MAX_ERROR_RATIO,
    compare,
    exactness,
    sample_batches,
)
from repcompiler.whole import DOOR, fuse_parts

STAGES = ("capture", "lift", "compose", "select", "lower", "verify", "report")
SAMPLES = 4
Inputs = Sequence[Any] | Mapping[str, Any] | torch.Tensor


@dataclass(frozen=True)
class FuseResult:
    """The fused model and the record of how it came about."""

    model: nn.Module
    report: FuseReport
    certificate: dict[str, Any] | None = None


def fuse(
    model: Model,
    example_inputs: Inputs | None = None,
    *,
    verify: bool = True,
    samples: int = SAMPLES,
    rules: Rules | None = None,
    capture: str = "auto",
    progress: Callable[[str], None] | None = None,
    certify: bool = False,
    tuning: Tuning | None = None,
    debug: bool = False,
) -> FuseResult:
    """Rewrite the affine parts of `model` into the cheapest ops of the same function.

    Args:
        model: an nn.Module in eval mode, an fx.GraphModule or an ExportedProgram. It is
            not changed, and shares nothing with the result.
        example_inputs: positional inputs, or a mapping of keywords to inputs. Without
            them only what is provable from the graph alone is fused, and the whole
            model is not run.
        verify: check every region and the whole model; the report says if not.
        samples: how many inputs the whole model is compared on, the example first.
        rules: the operator table; extend it as ``{**RULES, target: rule}``.
        capture: `auto`, `symbolic_trace`, `export` or `submodules`. `auto` tries them
            in this order; with the last, the result is a copy of the model in which
            the submodules that could be captured are fused.
        progress: called with the name of each stage as it starts.
        certify: hand back a certificate, which `certify` checks without the compiler.
        tuning: measured costs and chosen forms, in place of the nominal machine's; a
            model that is fused in parts takes none.
        debug: assert the invariants of every stage's result (`invariants`).

    Returns:
        The fused model, with the signature, dtype, device and dynamic sizes of `model`,
        and the report.

    Raises:
        NotEval, CaptureError, UnsupportedInput: see `repcompiler.errors`.
    """
    require_numbers(model)
    inputs = positional_inputs(model, example_inputs)
    door = "auto" if capture == DOOR else capture
    if certify and tuning is not None:
        tuning = replace(tuning, in_order=True)

    def pipeline(part: Model, given: tuple[Any, ...] | None, many: int = 1) -> State:
        return run_stages(
            part,
            given,
            verify=verify,
            samples=many,
            rules=rules,
            door=door,
            progress=progress,
            tuning=tuning,
            debug=debug,
        )

    if capture == DOOR:
        return _by_parts(model, inputs, pipeline, verify, samples)
    try:
        state = pipeline(model, inputs, samples)
    except CaptureError as error:
        if capture != "auto" or inputs is None or isinstance(model, GraphModule):
            raise
        return _by_parts(model, inputs, pipeline, verify, samples, error)
    assert state.rewritten is not None and state.report is not None
    record = certificate(state) if certify else None
    return FuseResult(state.rewritten.module, state.report, record)


def _by_parts(
    model: Model,
    inputs: tuple[Any, ...] | None,
    pipeline: Pipeline,
    check: bool,
    samples: int,
    error: CaptureError | None = None,
) -> FuseResult:
    """Fuse what can be captured of a model that has no graph as a whole."""
    if inputs is None or not isinstance(model, nn.Module):
        raise UnsupportedInput(
            "Fusing submodule by submodule needs a module and example_inputs."
        )
    why = "Only submodules were asked for." if error is None else str(error.args[0])
    sizes: dict[str, Any] = {"check": check, "samples": samples}
    return FuseResult(*fuse_parts(model, inputs, pipeline, why=why, **sizes))


def positional_inputs(
    model: Model, example_inputs: Inputs | None
) -> tuple[Any, ...] | None:
    """Example inputs by position, from a tensor, a sequence or a mapping of keywords.

    Raises:
        UnsupportedInput: `forward` takes one of them by keyword only, or not at all.
    """
    if example_inputs is None or isinstance(example_inputs, torch.Tensor):
        return None if example_inputs is None else (example_inputs,)
    given = cast(object, example_inputs)
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UnsupportedInput(
            f"example_inputs is of type {type(example_inputs).__name__}.",
            hint="Pass a tensor, a sequence of inputs or a mapping of keywords.",
        )
    if not isinstance(example_inputs, Mapping):
        return tuple(example_inputs)
    if not isinstance(model, nn.Module):
        model = model.module()
    return Signature.of(model).positional((), example_inputs)


def run_stages(
    model: Model,
    example_inputs: Inputs | None = None,
    *,
    verify: bool = True,
    samples: int = SAMPLES,
    rules: Rules | None = None,
    door: str = "auto",
    progress: Callable[[str], None] | None = None,
    stop_after: str = "report",
    tuning: Tuning | None = None,
    debug: bool = False,
) -> State:
    """Run the pipeline up to and including `stop_after`."""
    inputs = positional_inputs(model, example_inputs)
    table = RULES if rules is None else rules
    state = State(model, inputs, table, check=verify, samples=samples)
    state.tuning = tuning or state.tuning
    stages: dict[str, Callable[[], None]] = {
        "capture": lambda: _capture(state, door),
        "lift": lambda: _lift(state),
        "compose": lambda: _compose(state),
        "select": lambda: _select(state),
        "lower": lambda: _lower(state),
        "verify": lambda: _verify(state),
        "report": lambda: _report(state),
    }
    for name, stage in stages.items():
        if progress is not None:
            progress(name)
        with _timed(state, name):
            stage()
        if debug:
            check_invariants(state, name)
        if name == stop_after:
            break
    return state


@contextmanager
def _timed(state: State, name: str) -> Generator[None, None, None]:
    start = time.perf_counter()
    yield
    state.seconds[name] = time.perf_counter() - start


def _capture(state: State, door: str) -> None:
    state.captured = run_capture(
        state.model, state.inputs, door=door, check=state.check
    )


def _lift(state: State) -> None:
    captured = state.captured
    assert captured is not None
    state.opened, state.facts = prepare(captured, state.rules)
    state.lifted = {
        node: lift(node, state.facts, state.rules)
        for node in captured.module.graph.nodes
        if node not in captured.mutated
    }


def _compose(state: State) -> None:
    assert state.lifted is not None and state.facts is not None
    state.composed = compose(state.graph_module.graph, state.lifted, state.facts)


def _select(state: State) -> None:
    assert state.composed is not None and state.facts is not None
    graph = state.graph_module.graph
    state.selected = select(graph, state.composed, state.facts, state.tuning.costs)
    parts = state.parts_of_norms  # they are put back as they were
    chosen = {n: m for n, m in state.selected.chosen.items() if n not in parts}
    found = rewrites(graph, chosen, state.composed.lifted, state.facts)
    state.regions = tuple(
        replace(region, kind="ln_linear")
        if parts.intersection(region.nodes) and region.kind in ("skip", "layer_scale")
        else region
        for region in found
    )


def _lower(state: State) -> None:
    """Build the fused model; each region must first reproduce the original's."""
    assert state.facts is not None and state.captured is not None
    if state.check:
        _check_regions(state)
    state.rewritten = _rewritten(state, state.regions)
    assert_limits(state.rewritten.module, state.captured.limits)
    _keep_attributes(state)


def _rewritten(
    state: State, regions: tuple[Rewrite, ...], dtype: torch.dtype | None = None
) -> Rewritten:
    assert state.facts is not None and state.captured is not None
    graph, facts = state.graph_module, state.facts
    made = rewrite(graph, regions, facts, opened=state.opened, dtype=dtype)
    return apply(state.tuning, made, state.captured.inputs)


def _check_regions(state: State) -> None:
    facts = state.facts
    assert facts is not None
    sound: list[Rewrite] = []
    undone: list[Rewrite] = []
    for region in state.regions:
        original = original_form(region, state.graph_module, facts)
        fused = fused_form(region, state.graph_module, facts)
        shapes = probe_shapes(region.meaning, region.value, facts, region.unread)
        error = _error_of(region, original, fused, shapes)
        state.exactness[region.value] = error
        good = error is not None and error <= EXACT
        (sound if good else undone).append(region)
    state.regions, state.undone = tuple(sound), tuple(undone)


def _error_of(
    region: Rewrite,
    original: GraphModule,
    fused: GraphModule,
    shapes: Sequence[Shapes],
) -> float | None:
    """The region's error; on one grid of a dilated conv first, which is quick to run.

    What is not shown equal there is judged by all outputs.
    """
    axis = region.meaning.axis
    pair = thinned(region.meaning, original, fused)
    error = None if pair is None else region_error(*pair, shapes, axis)
    if error is not None and error <= EXACT:
        return error
    return region_error(original, fused, shapes, axis)


def _keep_attributes(state: State) -> None:
    """Plain attributes of the root, which callers may read (`num_classes`, …)."""
    assert state.rewritten is not None
    root, fused = state.model, state.rewritten.module
    if not isinstance(root, nn.Module):
        return
    for name, value in root.__dict__.items():
        plain = not isinstance(value, (nn.Module, torch.Tensor)) and not callable(value)
        if plain and not name.startswith("_") and not hasattr(fused, name):
            setattr(fused, name, value)
    fused.eval()


def _verify(state: State) -> None:
    assert state.facts is not None and state.rewritten is not None
    if not state.check:
        state.equivalence = VerifyReport(False, "not checked", note="verify=False")
        return
    if state.inputs is None:
        exact = max((e for e in state.exactness.values() if e is not None), default=0.0)
        note = (
            "no example inputs: every region was checked, the whole model was not run"
        )
        state.equivalence = VerifyReport(True, "regions equal", exact, note=note)
        return
    wide = _rewritten(state, state.regions, torch.float64)
    batches = sample_batches(state.inputs, state.samples)
    verdict = compare(state.model, state.rewritten.module, wide.module, batches)
    if not verdict.ok and (verdict.exactness or 0.0) > EXACT:
        verdict = _against_capture(state, verdict, wide.module, batches)
    elif not verdict.ok and isinstance(state.model, nn.Module):
        verdict = against_nearby(state.model, state.rewritten.module, batches, verdict)
    if verdict.exactness is None:
        worst = max((e for e in state.exactness.values() if e is not None), default=0.0)
        note = "the graph does not run in float64: exactness is the worst region's"
        verdict = replace(verdict, exactness=worst, note=verdict.note or note)
    state.equivalence = verdict


def _against_capture(
    state: State,
    verdict: VerifyReport,
    fused64: nn.Module,
    batches: Sequence[tuple[Any, ...]],
) -> VerifyReport:
    """Judge the rewrite alone, where the model's own arithmetic is not in float64.

    A model that asks a parameter for its dtype computes in float64 when cast; its
    graph, in which the answer is a constant, does not. Then the graph is what the
    rewrite has to equal, and the model in its own dtype what the error ratio has to
    answer to. Where both cast values to a narrower dtype, neither does.
    """
    assert state.facts is not None and state.rewritten is not None
    if verdict.verdict != "different":
        return verdict
    if (verdict.error_ratio or 0.0) <= MAX_ERROR_RATIO:
        plain = _rewritten(state, (), torch.float64)
        error = exactness(plain.module, fused64, batches)
        if error > EXACT:
            error = exactness(widened(plain.module), widened(fused64), batches)
        if error <= EXACT:
            note = "the model fixes a dtype of its own: exactness is against the graph"
            equal = replace(verdict, ok=True, verdict="equal", note=note)
            return replace(equal, exactness=error)
    if not isinstance(state.model, nn.Module):
        return verdict
    fused = state.rewritten.module
    return against_nearby64(state.model, fused, fused64, batches, verdict)


def _report(state: State) -> None:
    state.report = make_report(state)
