"""Graphs that a runtime reads from a file, and torch cannot: what is known of them.

`onnxgraphs` and `irgraphs` open them, each in its own runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastvit_cli.builders import DEFAULT_SIZE, ModelOptions, refuse_factory_options
from fastvit_cli.card import Card
from fastvit_cli.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# By form of MODEL, what such a file is called.
KINDS = {"onnx": "an ONNX graph", "ir": "an OpenVINO graph"}


@dataclass(frozen=True)
class GraphFile:
    """A graph that can be run, its card if this project wrote it, and example inputs.

    Attributes:
        run: from tensors to the list of output tensors, on the device of the first.
        declared: the sizes of each input, None where an axis is free.
    """

    run: Callable[..., list[Tensor]]
    card: Card
    recorded: Card | None
    inputs: tuple[Tensor, ...]
    dynamic_batch: bool
    declared: tuple[tuple[int | None, ...], ...]
    notes: tuple[str, ...] = ()


class Value(NamedTuple):
    """An input: its sizes, anything but a positive number where an axis is free."""

    shape: Sequence[Any]
    dtype: torch.dtype


def check_file(text: str, options: ModelOptions) -> None:
    """See that there is a file, and that no option asks for what a graph cannot do.

    Raises:
        BadInput: it is otherwise.
    """
    refuse_factory_options(text, options)
    if not Path(text).is_file():
        raise BadInput(f"there is no file {text}.", hint="Check the path.")


def described(
    text: str,
    form: str,
    options: ModelOptions,
    values: Sequence[Value],
    recorded: Card | None,
    run: Callable[..., list[Tensor]],
) -> GraphFile:
    """What is known of an opened graph.

    Raises:
        BadInput: it takes no input, or computes in another dtype than is asked for.
    """
    if not values:
        raise BadInput(
            f"{text} takes no input: it is a constant, not a model.",
            hint="Export it with an example input.",
        )
    own = str(values[0].dtype).removeprefix("torch.")
    if options.dtype not in (None, own):
        raise BadInput(
            f"{text} is {KINDS[form]} in {own}, and cannot be cast.",
            hint="Export it in the other dtype, or leave --dtype out.",
        )
    inputs, assumed = _inputs(values, recorded, options)
    card = recorded or Card(
        source=text,
        preprocessing={"input_size": list(inputs[0].shape[1:])},
        weights={"origin": "program"},
    )
    note = f"{text} does not say its input size: {assumed} is assumed (--input-size)."
    return GraphFile(
        run=run,
        card=card,
        recorded=recorded,
        inputs=tuple(value.to(options.device) for value in inputs),
        dynamic_batch=all(not _fixed(value.shape[:1]) for value in values),
        declared=tuple(
            tuple(side if _fixed([side]) else None for side in value.shape)
            for value in values
        ),
        notes=(note,) if assumed else (),
    )


def fits(expected: Sequence[Sequence[int | None]], inputs: Sequence[Tensor]) -> bool:
    """Whether inputs have the sizes that are declared, None where an axis is free."""
    return all(
        len(sizes) == value.dim()
        and all(own in (None, size) for own, size in zip(sizes, value.shape))
        for sizes, value in zip(expected, inputs)
    )


def _fixed(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) and size > 0 for size in sizes)


def _inputs(
    values: Sequence[Value], recorded: Card | None, options: ModelOptions
) -> tuple[list[Tensor], str]:
    """Example inputs of batch 1 where it is free, and the size if it is a guess."""
    import torch

    generator = torch.Generator().manual_seed(options.seed)
    size, assumed = options.input_size, ""
    if size is None and recorded is not None:
        size = recorded.input_size
    if size is None and not _fixed(values[0].shape[1:]):
        size, assumed = DEFAULT_SIZE, "x".join(map(str, DEFAULT_SIZE))
    inputs: list[Tensor] = []
    for index, value in enumerate(values):
        sides = [side if _fixed([side]) else 1 for side in value.shape]
        if index == 0 and size is not None:
            sides = [*sides[:1], *size]
        noise = torch.randn(sides, generator=generator)
        inputs.append(noise.to(value.dtype))
    return inputs, assumed
