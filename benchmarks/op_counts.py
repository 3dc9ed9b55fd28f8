"""What is left of a model: ours beside timm's own method and torch's fuser.

    python benchmarks/op_counts.py [MODEL …] [--json FILE]

ATen compute ops of one forward pass, batch one, at the model's own input size. Norm
statistics are random, since fresh ones hide errors. `timm` is `reparameterize_model`,
`torch` is `fx.experimental.optimization.fuse`, `both` the second after the first; one
that fails, or whose output is off by more than 1e-4 relative, is shown as such.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as torch_fuse
from torch.utils import _pytree as pytree

import repcompiler

MODELS = (
    "fastvit_t8 fastvit_t12 fastvit_s12 fastvit_sa12 fastvit_sa24 fastvit_sa36 "
    "fastvit_ma36 fastvit_mci0 fastvit_mci2 repvgg_a0 mobileone_s1 repvit_m1 "
    "repghostnet_100 levit_128s resnet50 efficientnet_b0"
).split()


def randomise(model: nn.Module) -> nn.Module:
    """Norm statistics as trained nets have them, and layer scales that show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            mean = getattr(module, "running_mean", None)
            if mean is not None:
                mean.copy_(torch.randn(mean.shape, generator=generator) * 0.3)
                noise = torch.rand(mean.shape, generator=generator)
                module.running_var.copy_(noise * 1.5 + 0.5)
        for name, parameter in model.named_parameters():
            if "gamma" in name or "layer_scale" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def peers() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """The other methods, each from a model to its fused form."""
    return {
        "timm": reparameterize_model,
        "torch": torch_fuse,
        "both": lambda model: torch_fuse(reparameterize_model(model)),
    }


def left_by(
    peer: Callable[[nn.Module], nn.Module], model: nn.Module, inputs: tuple[Any, ...]
) -> Any:
    """The number of ops a peer leaves, or what went wrong.

    A deep net may blow up plain rounding, so an output that is off in float32 gets a
    second chance in float64 before it is called wrong.
    """
    try:
        other = peer(copy.deepcopy(model)).eval()
        error = distance(model, other, inputs)
        if not error < 1e-4:
            wide = copy.deepcopy(model).double()
            double = pytree.tree_map(in_double, inputs)
            error = distance(wide, peer(copy.deepcopy(wide)).eval(), double)
        return count(other, inputs) if error < 1e-4 else f"wrong ({error:.0e})"
    except Exception as failure:
        return type(failure).__name__


def in_double(leaf: Any) -> Any:
    """Floating tensors in float64."""
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.double() if floating else leaf


def distance(a: nn.Module, b: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Relative distance of two models' outputs, the largest of all their tensors."""
    with torch.no_grad():
        expected, found = (_tensors(m(*_copies(inputs))) for m in (a, b))
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    pairs = [(e.double(), f.double()) for e, f in zip(expected, found)]
    ratios = [_ratio(float((f - e).norm()), float(e.norm())) for e, f in pairs]
    return max(ratios, key=lambda ratio: (ratio != ratio, ratio), default=0.0)


def _ratio(error: float, size: float) -> float:
    return 0.0 if error == 0 else error / size if size else float("inf")


def _copies(inputs: tuple[Any, ...]) -> Any:
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, inputs)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def count(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Compute ops, by the compiler's own counter (`repcompiler.counting`)."""
    from repcompiler.counting import count as count_both

    return count_both(model, inputs)[0].total()


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    model = randomise(timm.create_model(name))
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    report = repcompiler.fuse(model, (x,)).report
    row: dict[str, Any] = {"model": name, "before": report.ops.before}
    row.update({key: left_by(peer, model, (x,)) for key, peer in peers().items()})
    equal = report.equivalence
    row.update(
        ours=report.ops.after,
        norms_left=report.ops.after_by_type.get("batch_norm", 0),
        macs=report.macs.after,
        params=report.params.after,
        exactness=equal.exactness,
        error_ratio=equal.error_ratio,
        verdict=equal.verdict,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, timm {timm.__version__}, one thread")
    print(
        "| Model | Train form | timm | torch | both | ours | Exactness | Error ratio |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    rows: list[dict[str, Any]] = []
    for name in options.models:
        row = measure(name)
        rows.append(row)
        print(
            f"| {name} | {row['before']} | {row['timm']} | {row['torch']} | "
            f"{row['both']} | **{row['ours']}** | {row['exactness']:.0e} | "
            f"{row['error_ratio']:.1f} |",
            flush=True,
        )
    if options.json:
        header = {
            "torch": torch.__version__,
            "timm": timm.__version__,
            "argv": sys.argv,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"header": header, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
