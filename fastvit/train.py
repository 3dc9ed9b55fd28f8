"""Training, read from top to bottom: prepare, resume, epochs of updates, keep the best.

The data, the objective and the update have files of their own (`batches`, `objective`,
`engine`); what is here is the order of things, and that no work is lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fastvit.batches import (
    Batch,
    EpochOrder,
    EvaluationImages,
    Problem,
    TrainingImages,
)
from fastvit.checkpoint import (
    LAST,
    Position,
    check_same_model,
    check_same_run,
    position_of,
    read_state,
    write_state,
    write_whole,
)
from fastvit.data import evaluation_transform, training_transform
from fastvit.engine import Engine, build_engine
from fastvit.errors import RecipeError, ResumeError, TrainingError
from fastvit.evaluate import Predictions, evaluate
from fastvit.loaders import evaluation_loader, training_loader
from fastvit.objective import Objective, build_mixup, build_teacher, label_loss
from fastvit.planning import plan_batches, settled
from fastvit.recipe_files import to_toml
from fastvit.run import (
    Clock,
    Job,
    Listener,
    Outcome,
    Progress,
    StopRequest,
    stop_requests,
)
from fastvit.runfiles import (
    Row,
    best_row,
    keep_best,
    write_history,
    write_skipped,
)

_GO_ON, _SAVE, _STOP = range(3)


@dataclass
class _Run:
    """A run as it goes: what it is, where it stands, what it found."""

    job: Job
    engine: Engine
    order: EpochOrder
    listener: Listener
    position: Position = field(default_factory=Position)
    history: list[Row] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    saved: float = field(default_factory=time.monotonic)


def train(model: nn.Module, job: Job, listener: Listener) -> Outcome:
    """Train `model`, in place, until the recipe's end or a signal.

    Raises:
        TrainingError: the run cannot start as asked, a checkpoint could not be written
            or the loss is not a number; the last good checkpoint is there in each case.
        DataError: an image is unreadable and the job is strict.
    """
    run = _prepare(model, job, listener)
    if job.resume:
        _resume(run)
    loader = training_loader(
        TrainingImages(
            job.splits.train,
            training_transform(job.recipe.augment, job.preprocessing),
            seed=job.recipe.loop.seed,
            strict=job.strict,
        ),
        run.order,
        job.recipe.loop.workers,
        job.world.device,
    )
    if job.world.leads:
        write_whole(job.output / "recipe.toml", to_toml(job.recipe).encode())
        listener.started(run.engine, run.position)
    with stop_requests() as stop:
        while run.position.epoch < job.recipe.total_epochs:
            if not _train_epoch(run, loader, stop) or not _end_epoch(run, stop):
                return _outcome(run, stop.signal)
    return _outcome(run)


def _prepare(model: nn.Module, job: Job, listener: Listener) -> _Run:
    """The parts of a run, before its first update."""
    recipe, world = settled(job.recipe, job.world), job.world
    job = replace(job, recipe=recipe)
    plan = plan_batches(recipe, len(job.splits.train), world)
    if recipe.loop.deterministic:
        torch.use_deterministic_algorithms(True)
    classes = len(job.splits.class_names)
    mixup = build_mixup(recipe.augment, classes)
    if mixup is not None and plan.micro % 2:
        raise RecipeError(
            f"mixup and cutmix pair images, micro_batch {plan.micro} is odd.",
            hint="Use an even one, or --set mixup=0 --set cutmix=0.",
        )
    objective = Objective(
        mixup,
        label_loss(recipe.augment, mixup is not None),
        recipe.distill,
        build_teacher(recipe.distill, classes, job.preprocessing, world.device),
    )
    engine = build_engine(model, objective, recipe, plan, world)
    return _Run(job, engine, EpochOrder(plan, recipe.loop.seed), listener)


def _resume(run: _Run) -> None:
    """Put the run where its last checkpoint was, if there is one.

    Raises:
        ResumeError: the checkpoint is damaged or another recipe's.
    """
    path = run.job.output / LAST
    world = run.job.world
    seen = world.total([float(path.exists())])[0]
    if 0 < seen < world.size:
        raise ResumeError(
            f"{path} is there for {seen:.0f} of {world.size} processes.",
            hint="The output folder must be on a disk that all machines share.",
        )
    if not seen:
        run.listener.noted(f"{path} does not exist: starting from the beginning.")
        return
    state = read_state(path)
    check_same_run(path, state, run.job.recipe)
    if tuple(state["classes"]) != run.job.splits.class_names:
        raise ResumeError(
            f"{path} was trained on other classes.", hint="Name the same DATA."
        )
    check_same_model(path, state, run.engine.model)
    for text in _differences(run, state):
        run.listener.noted(text)
    run.position = position_of(state, world.rank, world.size)
    run.history = state["history"]
    run.problems = state["problems"]
    done = run.position.epoch * run.engine.plan.updates + run.position.update
    run.engine.load_state(state, done)


def _differences(run: _Run, state: dict[str, Any]) -> Iterator[str]:
    """What keeps a run from going on as it would have gone."""
    images, now = state["images"], run.engine.plan.images
    if images != now:
        yield (
            f"There were {images} training images, now there are {now}: the run will "
            "not be what it would have been."
        )
    processes, now = len(state["norms"]), run.job.world.size
    if processes != now:
        yield (
            f"{processes} processes became {now}: the same images in each update, but "
            "not bit for bit the same run."
        )
    now = torch.get_num_threads()
    threads = state.get("threads", now)  # an older checkpoint does not say
    if threads != now and run.job.world.device.type == "cpu":
        yield (
            f"{threads} torch threads became {now}: sums are rounded in another order, "
            f"so not bit for bit the same run; OMP_NUM_THREADS={threads} makes it so."
        )


def _train_epoch(run: _Run, batches: Iterable[Batch], stop: StopRequest) -> bool:
    """The updates of an epoch that are still to do; False where a signal ended them."""
    engine = run.engine
    run.order.epoch, run.order.first_update = run.position.epoch, run.position.update
    run.clock = Clock(run.position.update)
    if run.position.update == engine.plan.updates:
        return True
    engine.model.train()
    passes: list[Batch] = []
    for batch in batches:
        passes.append(batch)
        if len(passes) < engine.plan.passes:
            continue
        losses = engine.update(passes, run.position.epoch, run.position.update)
        _note_problems(run, [p for done in passes for p in done.problems])
        passes = []
        _advance(run, losses)
        _tell(run)
        wish = _STOP if stop.signal else _SAVE if _is_due(run) else _GO_ON
        word = run.job.world.highest(wish)
        if word >= _SAVE:
            _save(run)
        if word == _STOP:
            return False
    return True


def _end_epoch(run: _Run, stop: StopRequest) -> bool:
    """Average, evaluate, keep; False where a signal ended it."""
    job, engine = run.job, run.engine
    run.clock.stop()
    if not run.position.averaged:
        engine.finish_epoch()
        run.position = replace(run.position, averaged=True)
        _save(run)  # evaluating takes a while, and may be interrupted
    row = _evaluate(run, stop)
    if row is None:
        return False
    run.history.append(row)
    run.position = Position(run.position.epoch + 1)
    if job.world.leads:
        keep_best(job.output, engine, run.history, job.describe(row))
    _save(run)
    if job.world.leads:
        write_history(job.output, run.history)
        best = best_row(run.history)
        assert best is not None
        run.listener.epoch_ended(row, best)
    over = run.position.epoch == job.recipe.total_epochs
    return over or job.world.highest(_STOP if stop.signal else _GO_ON) != _STOP


def _evaluate(run: _Run, stop: StopRequest) -> Row | None:
    """The epoch's row; None where a signal ended the evaluation."""
    job, engine, world = run.job, run.engine, run.job.world
    images = EvaluationImages(
        job.splits.val, evaluation_transform(job.preprocessing), strict=job.strict
    )
    batches = evaluation_loader(
        images,
        engine.plan.micro,
        job.recipe.loop.workers,
        world.device,
        (world.rank, world.size),
    )

    def progress(done: int) -> bool:
        if world.leads:
            run.listener.evaluating(min(done * world.size, len(images)), len(images))
        # Several processes cannot leave one by one: they finish, then stop.
        return world.size > 1 or not stop.signal

    found = evaluate(
        {"model": engine.evaluated.eval()},
        batches,
        world.device,
        autocast=engine.amp,
        channels_last=bool(job.recipe.loop.channels_last),
        progress=progress,
    )
    if found is None:
        return None
    _note_problems(run, found.problems)
    _share_problems(run)
    return _row(run, found.forms["model"])


def _row(run: _Run, said: Predictions) -> Row:
    """What an epoch came to, over all processes."""
    at, world = run.position, run.job.world
    count, loss, top1, top5, train_loss, losses = world.total(
        [
            said.images,
            said.losses.double().sum().item(),
            (said.predicted == said.targets).sum().item(),
            said.in_top5.sum().item(),
            at.loss_sum,
            at.losses,
        ]
    )
    if not count:
        raise TrainingError(
            "no validation image could be read.",
            hint="Check that the data set was copied whole.",
        )
    speed = run.clock.updates_per_second(at.update) * run.engine.plan.batch_size
    return {
        "epoch": at.epoch + 1,
        "lr": run.engine.lr,
        "train_loss": train_loss / max(1, losses),
        "val_loss": loss / count,
        "top1": 100 * top1 / count,
        "top5": 100 * top5 / count,
        "images": int(count),
        "skipped": len(run.problems),
        "images_per_second": round(speed, 2),
        "seconds": round(time.monotonic() - run.clock.began, 2),
    }


def _advance(run: _Run, losses: list[float], updates: int = 1) -> None:
    at = run.position
    run.position = replace(
        at,
        update=at.update + updates,
        loss_sum=at.loss_sum + sum(losses),
        losses=at.losses + len(losses),
    )


def _note_problems(run: _Run, problems: list[Problem]) -> None:
    for problem in problems:
        if problem.name not in run.problems:
            run.problems[problem.name] = problem.reason
            run.listener.noted(f"Skipped {problem.name}: {problem.reason}")


def _share_problems(run: _Run) -> None:
    """Tell the first process of those that others met; every process takes part."""
    for found in run.job.world.gather(run.problems):
        _note_problems(run, [Problem(*pair) for pair in found.items()])


def _is_due(run: _Run) -> bool:
    """Whether a checkpoint is due; of several processes the first says so."""
    loop, at = run.job.recipe.loop, run.position
    by_count = loop.checkpoint_updates and at.update % loop.checkpoint_updates == 0
    by_time = time.monotonic() - run.saved >= 60 * loop.checkpoint_minutes
    return bool(by_count) or (run.job.world.leads and by_time)


def _save(run: _Run) -> None:
    """Write the run's state; every process takes part, the first one writes.

    Raises:
        Diverged: a loss or a weight is not finite: nothing is written.
        CheckpointError: the disk would not take it: the older state stays.
    """
    _advance(run, run.engine.checked_losses(now=True), updates=0)
    run.engine.check_weights(run.position.epoch, run.position.update)
    state = run.engine.state()
    shares = run.job.world.gather([run.position.loss_sum, run.position.losses])
    _share_problems(run)
    run.saved = time.monotonic()
    if not run.job.world.leads:
        return
    position = {"position": asdict(run.position), "shares": shares}
    history = {"history": run.history, "problems": run.problems}
    data = {
        "classes": list(run.job.splits.class_names),
        "images": run.engine.plan.images,
        "recipe": to_toml(run.job.recipe),
        "threads": torch.get_num_threads(),
    }
    whole = {**state, **position, **history, **data}
    write_state(run.job.output / LAST, whole)
    write_skipped(run.job.output, run.problems)


def _tell(run: _Run) -> None:
    """Say where the run is."""
    if not run.job.world.leads:
        return
    at, plan, recipe = run.position, run.engine.plan, run.job.recipe
    speed = run.clock.updates_per_second(at.update)
    left = (recipe.total_epochs - at.epoch) * plan.updates - at.update
    run.listener.stepped(
        Progress(
            epoch=at.epoch + 1,
            epochs=recipe.total_epochs,
            update=at.update,
            updates=plan.updates,
            loss=at.loss_sum / max(1, at.losses),
            lr=run.engine.lr,
            images_per_second=speed * plan.batch_size,
            seconds_left=left / speed,
        )
    )


def _outcome(run: _Run, signal: int | None = None) -> Outcome:
    return Outcome(
        run.history, best_row(run.history), run.problems, run.position, signal
    )
