"""The inputs that `fastvit check` compares two models on.

Noise alone misses borders, large and small values, and odd sizes. Each case is made in
float32 from a seed, so that it can be made again; what failed is saved and replayed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit_cli.errors import BadInput, summary

if TYPE_CHECKING:
    import torch
    from fastvit_cli.runners import Runner
    from torch import Tensor

LARGE = {"float16": 1e2}  # 1e4 overflows in half a network of float16
BATCHES = (1, 3)
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True)
class Case:
    """Named inputs; `strict` if the reference must take them."""

    name: str
    inputs: tuple[Tensor, ...]
    strict: bool = True

    @property
    def rows(self) -> int:
        """How many samples it holds."""
        return int(self.inputs[0].shape[0]) if self.inputs[0].dim() else 1


@dataclass(frozen=True)
class Maker:
    """What the makers of cases know: the example's sizes, statistics and a seed."""

    inputs: tuple[Tensor, ...]
    preprocessing: dict[str, Any]
    dtype: str
    fixed_batch: int | None
    generator: torch.Generator

    def noise(self, batch: int, scale: float = 1.0) -> tuple[Tensor, ...]:
        """Normal numbers in every input; whole numbers stay the example's."""
        import torch

        def draw(value: Tensor) -> Tensor:
            if not value.dim():
                return value.clone()
            if not value.is_floating_point():
                return value[:1].expand(batch, *value.shape[1:]).clone()
            shape = (batch, *value.shape[1:])
            return torch.randn(shape, generator=self.generator) * scale

        return tuple(draw(value) for value in self.inputs)

    def images(self, images: Tensor) -> tuple[Tensor, ...]:
        """The first input given, the others noise."""
        return (images, *self.noise(len(images))[1:])

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] as the model's preprocessing would hand them over."""
        import torch

        channels = pixels.shape[1]
        mean = self.preprocessing.get("mean") or [0.5] * channels
        std = self.preprocessing.get("std") or [0.25] * channels
        if len(mean) != channels or len(std) != channels:
            return pixels
        shape = (1, channels, 1, 1)
        return (pixels - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(
            shape
        )


def maker_of(reference: Runner, candidate: Runner) -> Runner:
    """Whose inputs both are asked: the one with the fewest sizes, the best known."""
    narrow = reference if candidate.dynamic_batch else candidate
    known = narrow if narrow.recorded or narrow is reference else reference
    return replace(narrow, card=known.card)


def make(runner: Runner, samples: int, seed: int) -> list[Case]:
    """Noise, pixels, constants, impulses, large and tiny values, odd sizes."""
    import torch

    maker = Maker(
        inputs=runner.inputs,
        preprocessing=runner.card.preprocessing,
        dtype=runner.dtype,
        fixed_batch=_fixed_batch(runner),
        generator=torch.Generator().manual_seed(seed + 104729),
    )
    makers: list[Callable[[Maker], Iterator[Case]]] = [_magnitudes]
    if runner.inputs[0].dim() == 4 and runner.inputs[0].is_floating_point():
        makers = [_pixels, _constants, _impulses, _magnitudes, _odd_sizes]
    cases = [*_noise(maker, samples)]
    cases += [case for function in makers for case in function(maker)]
    if maker.fixed_batch is None:
        return cases
    return [_rebatched(case, maker.fixed_batch) for case in cases]


def _fixed_batch(runner: Runner) -> int | None:
    sizes = [int(value.shape[0]) for value in runner.inputs if value.dim()]
    return None if runner.dynamic_batch else (sizes or [1])[0]


def _noise(maker: Maker, samples: int) -> Iterator[Case]:
    """Batches of 1 and 3 in turn, until there are `samples` rows."""
    rows = 0
    while rows < samples:
        batch = min(BATCHES[rows % 2], samples - rows)
        yield Case(f"noise {rows}, batch {batch}", maker.noise(batch))
        rows += batch


def _pixels(maker: Maker) -> Iterator[Case]:
    import torch
    import torch.nn.functional as F

    shape = maker.inputs[0].shape[1:]
    pixels = torch.rand((1, *shape), generator=maker.generator)
    coarse = torch.rand((1, shape[0], 5, 5), generator=maker.generator)
    smooth = F.interpolate(coarse, size=shape[1:], mode="bilinear")
    both = torch.cat([pixels, smooth])
    yield Case("pixels, rough and smooth", maker.images(maker.normalised(both)))


def _constants(maker: Maker) -> Iterator[Case]:
    import torch

    black, white = (torch.full((1, *maker.inputs[0].shape[1:]), v) for v in (0.0, 1.0))
    ends = maker.normalised(torch.cat([black, white]))
    yield Case("black, white and zero", maker.images(torch.cat([ends, black])))


def _impulses(maker: Maker) -> Iterator[Case]:
    """One pixel each, where kernels hang over the border."""
    import torch

    high, wide = (size - 1 for size in maker.inputs[0].shape[2:])
    places = {
        "corners": ((0, 0), (high, wide), (0, wide)),
        "edges": ((high, 0), (0, wide // 2), (high // 2, wide)),
    }
    for name, positions in places.items():
        images = torch.zeros(len(positions), *maker.inputs[0].shape[1:])
        for image, (row, column) in zip(images, positions):
            image[:, row, column] = 10.0
        yield Case(f"impulses at {name}", maker.images(images))


def _magnitudes(maker: Maker) -> Iterator[Case]:
    large = LARGE.get(maker.dtype, 1e4)
    yield Case(f"noise times {large:g}", maker.noise(1, large))
    yield Case("noise times 0.0001", maker.noise(1, 1e-4))


def _odd_sizes(maker: Maker) -> Iterator[Case]:
    """Sizes that few kernels divide; many models take only their own."""
    import torch

    channels, high, wide = maker.inputs[0].shape[1:]
    for size in ((high // 2 | 1, wide // 2 | 1), (high // 2, wide * 3 // 4 | 1)):
        images = torch.randn((1, channels, *size), generator=maker.generator)
        name = f"odd size {size[0]}x{size[1]}"
        yield Case(name, maker.images(images), strict=False)


def _rebatched(case: Case, batch: int) -> Case:
    """The rows repeated, or the first of them, for a program of a fixed batch."""
    import torch

    def fit(value: Tensor) -> Tensor:
        if not value.dim():
            return value
        copies = -(-batch // max(len(value), 1))
        return torch.cat([value] * copies)[:batch]

    return Case(case.name, tuple(map(fit, case.inputs)), case.strict)


# ---- real images, and inputs that were saved ---------------------------------------


def from_images(folder: str, runner: Runner, samples: int) -> list[Case]:
    """At least `samples` images of a folder, as the model takes them.

    Raises:
        BadInput: there is no such folder, no image in it, or one cannot be read.
    """
    import torch
    from fastvit_cli import judging, predict

    root = Path(folder)
    if not root.is_dir():
        raise BadInput(
            f"--data {folder} is not a directory.", hint="Name a folder of images."
        )
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGES)
    if not found:
        raise BadInput(
            f"--data {folder} holds no image.", hint=f"Looked for {', '.join(IMAGES)}."
        )
    preprocessing, _ = judging.preprocessing_of(runner)
    every = max(1, len(found) // max(samples, 1))
    names = [str(path) for path in found[::every][: max(samples, 1)]]
    reader = judging.Classifier(runner, 0, preprocessing)
    pictures, bad = predict.read_all(names, reader)
    if bad:
        raise BadInput(
            f"{bad[0]['image']} cannot be read: {bad[0]['reason']}.",
            hint="Take it out of the folder.",
        )
    cases = [
        Case(f"image {Path(name).relative_to(root)}", (torch.as_tensor(pixels)[None],))
        for name, pixels in pictures
    ]
    if runner.dynamic_batch:
        return cases
    return [_rebatched(case, int(runner.inputs[0].shape[0])) for case in cases]


def save(path: Path, cases: Sequence[Case], about: dict[str, Any]) -> None:
    """Write cases with what they were made for; `replay` reads them again."""
    from safetensors.torch import save_file

    tensors = {
        f"{number}.{index}": value.contiguous().clone()
        for number, case in enumerate(cases)
        for index, value in enumerate(case.inputs)
    }
    names = json.dumps([case.name for case in cases])
    save_file(tensors, path, metadata={"cases": names, "about": json.dumps(about)})


def replay(path: str) -> list[Case]:
    """The cases in a file that `save` wrote.

    Raises:
        BadInput: there is no such file, or it is another program's.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = json.loads((file.metadata() or {})["cases"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises several kinds of its own
        raise BadInput(
            f"--replay {path} holds no inputs of this command: {summary(error, 100)}.",
            hint="Give the inputs.safetensors that --repro DIR wrote.",
        ) from error
    cases: list[Case] = []
    for number, name in enumerate(names):
        own = sorted(key for key in tensors if key.split(".")[0] == str(number))
        cases.append(Case(name, tuple(tensors[key] for key in own)))
    return cases
