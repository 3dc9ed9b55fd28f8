"""A recipe made to fit: the device, the number of processes and the data set."""

from __future__ import annotations

from dataclasses import replace

from fastvit.batches import BatchPlan
from fastvit.errors import RecipeError
from fastvit.parallel import World
from fastvit.recipes import Recipe


def settled(recipe: Recipe, world: World) -> Recipe:
    """The recipe with what depends on the device decided.

    Raises:
        RecipeError: it asks for what the device cannot do.
    """
    cuda = world.device.type == "cuda"
    loop = recipe.loop
    if loop.channels_last and world.device.type == "cpu":
        raise RecipeError(
            "channels_last=true is not for the CPU: the backward pass of such a model "
            "corrupts memory there with torch 2.14.",
            hint="Leave it out; it is on by itself with CUDA.",
        )
    if loop.compile and not cuda:
        raise RecipeError("compile=true needs --device cuda.", hint="Leave it out.")
    on = cuda if loop.channels_last is None else loop.channels_last
    return replace(recipe, loop=replace(loop, channels_last=on))


def plan_batches(recipe: Recipe, images: int, world: World) -> BatchPlan:
    """How an update's images are shared out.

    Raises:
        RecipeError: the batch cannot be split so, or is larger than the data set.
    """
    batch, micro = recipe.loop.batch_size, recipe.loop.micro_batch
    if batch % world.size:
        raise RecipeError(
            f"batch_size {batch} cannot be shared by {world.size} processes.",
            hint=f"Use a multiple of {world.size}.",
        )
    micro = min(micro, batch // world.size)
    if batch % (micro * world.size):
        raise RecipeError(
            f"batch_size {batch} is no multiple of micro_batch {micro} times "
            f"{world.size} processes.",
            hint="Change either with --set.",
        )
    plan = BatchPlan(
        images, micro, batch // (micro * world.size), world.rank, world.size
    )
    if plan.updates == 0:
        raise RecipeError(
            f"there are {images} training images, fewer than one batch of {batch}.",
            hint=f"Use --set batch_size={max(1, images // world.size * world.size)} "
            "or less.",
        )
    return plan
