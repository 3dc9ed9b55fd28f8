"""Any form of MODEL as something that runs: tensors in, tensors out.

For the commands that only run a model (check, eval, predict, profile). `sources` gives
what can be rewritten; this gives what can be called, and takes ONNX graphs as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastvit_cli import graphfiles, irgraphs, onnxgraphs, sources
from fastvit_cli.builders import ModelOptions
from fastvit_cli.card import Card
from fastvit_cli.errors import BadInput, summary

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.export import ExportedProgram


Sizes = tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True)
class Runner:
    """A model that can be called, whatever it was read from.

    Attributes:
        name: MODEL as it was given.
        form: `module`, `program` (torch.export), `onnx` or `ir` (OpenVINO).
        card: name, input size, preprocessing, class names and train or fused form.
        recorded: the card inside a file of this project; None for everything else.
        declared: for each input its sizes, None where an axis is free; None for a
            module, which does not say.
        captured: the same for a graph that `torch.export` captured as a module: it may
            run at other sizes too, but need not.
        inputs: example inputs, of batch 1 where the batch is free.
        model: the module or program itself; None for a graph that only runs.
        file: where such a graph was read from.
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
    declared: Sizes | None = None
    captured: Sizes | None = None
    file: str = ""
    notes: tuple[str, ...] = ()

    def __call__(self, *inputs: Tensor) -> Any:
        """What the model returns, without gradients.

        A graph of a runtime returns one tensor, or a tuple where it has several.
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

    def takes(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether the sizes are among those that a program or graph was written for."""
        return self.declared is None or graphfiles.fits(self.declared, inputs)

    def may_refuse(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether the model was captured at other sizes, and may not run at these."""
        return self.captured is not None and not graphfiles.fits(self.captured, inputs)

    def in_dtype(self, dtype: torch.dtype) -> Runner | None:
        """A copy that computes in another dtype; None where that cannot be run.

        onnxruntime has no convolution in float64, OpenVINO computes in float32, and a
        model may fix its own dtype.
        """
        if self.model is None:
            return None
        try:
            module = copy.deepcopy(as_module(self.model)).to(dtype)
            inputs = cast(self.inputs, dtype)
            other = replace(
                self,
                inputs=inputs,
                dtype=str(dtype).removeprefix("torch."),
                model=module,
                call=module,
            )
            other(*inputs)
        except Exception:  # code of somebody else runs here, and may refuse
            return None
        return other


def load(text: str, options: ModelOptions) -> Runner:
    """The model that MODEL names, ready to run in eval mode.

    Raises:
        BadInput: the text, an option or a file is at fault.
    """
    bare, options = sources.split_weights(text, options)
    form = sources.classify(bare)
    if form in READERS:
        return _graph(form, bare, options)
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
        call=as_module(loaded.model),
        declared=None if is_module else _declared(loaded.model),
        captured=_captured(loaded.model),
        notes=loaded.notes,
    )


def as_module(model: Any) -> nn.Module:
    """The module itself, or the one that an exported program runs as."""
    import torch

    return model if isinstance(model, torch.nn.Module) else model.module()


def cast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The inputs with those in floating point in another dtype."""
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def _declared(program: ExportedProgram) -> Sizes:
    names = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.name in names]
    return _sizes(values)


def _captured(model: Any) -> Sizes | None:
    """The sizes that export left on a graph's inputs; None for any other module.

    A free axis counts with the size it had, for export may have taken a branch by it;
    only the first is a batch, and may be any.
    """
    graph = getattr(model, "graph", None)
    nodes = [n for n in getattr(graph, "nodes", ()) if n.op == "placeholder"]
    values = [getattr(node, "meta", {}).get("val") for node in nodes]
    known = [value for value in values if hasattr(value, "shape")]
    if not known or len(known) < len(values):
        return None
    free = [_sizes([value])[0][:1] for value in known]
    return tuple(
        (*batch, *(_hint(size) for size in value.shape[1:]))
        for batch, value in zip(free, known)
    )


def _hint(size: Any) -> int | None:
    """A size, or that of the example where it is free."""
    return size if isinstance(size, int) else getattr(size.node, "hint", None)


def _sizes(values: list[Any]) -> Sizes:
    return tuple(
        tuple(size if isinstance(size, int) else None for size in value.shape)
        for value in values
    )


READERS = {"onnx": onnxgraphs.load, "ir": irgraphs.load}
assert READERS.keys() == graphfiles.KINDS.keys()


def _graph(form: str, text: str, options: ModelOptions) -> Runner:
    sources.check_device(options.device)
    graph = READERS[form](text, options)

    def call(*inputs: Tensor) -> Any:
        outputs = graph.run(*inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    made = Runner(
        name=text,
        form=form,
        card=sources.sized(graph.card, graph.inputs),
        recorded=graph.recorded,
        inputs=graph.inputs,
        dtype=str(graph.inputs[0].dtype).removeprefix("torch."),
        device=options.device,
        dynamic_batch=graph.dynamic_batch,
        model=None,
        call=call,
        declared=graph.declared,
        file=text,
        notes=graph.notes,
    )
    try:
        made(*made.inputs)
    except Exception as error:  # a runtime's exceptions have no common base
        size = "x".join(str(side) for side in made.card.input_size)
        raise BadInput(
            f"{text} cannot take an input of {size} in {made.dtype}: {summary(error)}.",
            hint="Give the size that it takes with --input-size, as in 3x256x256.",
        ) from error
    return made
