"""Any form of MODEL as something that runs: tensors in, tensors out.

For the commands that only run a model (check, eval, predict, profile). `sources` gives
what can be rewritten; this gives what can be called, and takes ONNX graphs as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastvit_cli import onnxgraphs, sources
from fastvit_cli.builders import ModelOptions
from fastvit_cli.card import Card
from fastvit_cli.errors import BadInput, summary

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Runner:
    """A model that can be called, whatever it was read from.

    Attributes:
        name: MODEL as it was given.
        form: `module`, `program` (torch.export) or `onnx`.
        card: name, input size, preprocessing, class names and train or fused form.
        recorded: the card inside a file of this project; None for everything else.
        inputs: example inputs, of batch 1 where the batch is free.
        model: the module or program itself; None for ONNX.
        call: runs it and gives what it returns; use the runner itself instead.
    """

    name: str
    form: str
    card: Card
    recorded: Card | None
    inputs: tuple[Tensor, ...]
    dtype: str
    device: str
    dynamic_batch: bool
    model: nn.Module | ExportedProgram | None
    call: Callable[..., Any]
    notes: tuple[str, ...] = ()

    def __call__(self, *inputs: Tensor) -> Any:
        """What the model returns, without gradients.

        An ONNX graph returns one tensor, or a tuple where it has several outputs.
        """
        import torch

        with torch.no_grad():
            return self.call(*inputs)

    def tensors(self, *inputs: Tensor) -> list[Tensor]:
        """The output's tensors, flat."""
        import torch
        from torch.utils import _pytree as pytree

        leaves = pytree.tree_leaves(self(*inputs))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def in_float64(self) -> Runner | None:
        """The same model in float64; None where that cannot be run.

        onnxruntime has no convolution in float64, and a model may fix its own dtype.
        """
        if self.model is None:
            return None
        try:
            module = copy.deepcopy(_callable(self.model)).double()
        except Exception:  # any custom tensor may refuse; then there is none
            return None
        inputs = tuple(
            value.double() if value.is_floating_point() else value
            for value in self.inputs
        )
        wide = replace(self, inputs=inputs, dtype="float64", model=module, call=module)
        try:
            wide(*inputs)
        except Exception:  # code of somebody else runs here
            return None
        return wide


def load(text: str, options: ModelOptions) -> Runner:
    """The model that MODEL names, ready to run in eval mode.

    Raises:
        BadInput: the text, an option or a file is at fault.
    """
    bare, options = sources.split_weights(text, options)
    if sources.classify(bare) == "onnx":
        return _onnx(bare, options)
    return of(sources.load(bare, options), name=text)


def of(loaded: sources.Loaded, name: str | None = None) -> Runner:
    """A model that `sources.load` made, as a runner."""
    import torch

    is_module = isinstance(loaded.model, torch.nn.Module)
    return Runner(
        name=name or loaded.name,
        form="module" if is_module else "program",
        card=loaded.card,
        recorded=loaded.recorded,
        inputs=loaded.inputs,
        dtype=loaded.dtype,
        device=loaded.device,
        dynamic_batch=loaded.dynamic_batch,
        model=loaded.model,
        call=_callable(loaded.model),
        notes=loaded.notes,
    )


def _callable(model: Any) -> nn.Module:
    import torch

    return model if isinstance(model, torch.nn.Module) else model.module()


def _onnx(text: str, options: ModelOptions) -> Runner:
    sources.check_device(options.device)
    graph = onnxgraphs.load(text, options)

    def call(*inputs: Tensor) -> Any:
        outputs = graph.run(*inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    made = Runner(
        name=text,
        form="onnx",
        card=sources.sized(graph.card, graph.inputs),
        recorded=graph.recorded,
        inputs=graph.inputs,
        dtype=str(graph.inputs[0].dtype).removeprefix("torch."),
        device=options.device,
        dynamic_batch=graph.dynamic_batch,
        model=None,
        call=call,
        notes=graph.notes,
    )
    try:
        made(*made.inputs)
    except Exception as error:  # onnxruntime's exceptions have no common base
        size = "x".join(str(side) for side in made.card.input_size)
        raise BadInput(
            f"{text} cannot take an input of {size} in {made.dtype}: {summary(error)}.",
            hint="Give the size that it takes with --input-size CxHxW.",
        ) from error
    return made
