"""The kinds of statement that a random program is made of."""

from __future__ import annotations

from typing import Any

from grammar import Writer
from hypothesis import strategies as st
from pieces import few, make_conv
from programs import Sum, norm_for
from spell import module_text
from strategies import PIECES
from torch import nn


def add_piece(writer: Writer) -> None:
    """Any operator of the table."""
    value = writer.some()
    rank = writer.value(value).dim()
    keys = [i for i, p in enumerate(PIECES.values()) if rank in p.ranks]
    target = list(PIECES)[writer.draw(st.sampled_from(keys))]
    writer.piece(target, value)


def add_sum(writer: Writer) -> None:
    """Two values added or subtracted, in one spelling."""
    a = writer.some()
    b = writer.alike(a)
    a, b = few(writer.draw, (a, b), (b, a))
    spellings = {
        "+": f"{a} + {b}",
        "-": f"{a} - {b}",
        "add": f"torch.add({a}, {b})",
        "sub": f"torch.sub({a}, {b}, alpha=2)",
        "method": f"{a}.add({b})",
        "alpha": f"torch.add({a}, {b}, alpha=-0.5)",
    }
    writer.assign(spellings[few(writer.draw, *Sum.SPELLINGS)])


def add_branches(writer: Writer) -> None:
    """Convs, norms and the value itself, side by side, summed."""
    root = writer.some()
    if writer.value(root).dim() < 3:
        return
    ends = [_branch(writer, root) for _ in range(few(writer.draw, 2, 2, 3))]
    total = ends[0]
    for end in ends[1:]:
        if writer.value(end).shape == writer.value(total).shape:
            sign = few(writer.draw, "+", "+", "-")
            total = writer.assign(f"{total} {sign} {end}") or total


def _branch(writer: Writer, root: str) -> str:
    end = root
    for _ in range(few(writer.draw, 0, 1, 1, 2)):
        shape = tuple(writer.value(end).shape)
        conv = few(writer.draw, True, False)
        made = (
            make_conv(writer.draw, shape, same=True)
            if conv
            else norm_for(writer.value(end))
        )
        end = writer.apply(made, end) or end
    return end


def add_sequential(writer: Writer) -> None:
    """A conv, a norm and perhaps an activation as one nested module."""
    value = writer.some()
    shape = tuple(writer.value(value).shape)
    if len(shape) < 3:
        return
    conv = make_conv(writer.draw, shape)
    norm = type(norm_for(writer.value(value)))(conv.out_channels)
    parts = [module_text(conv), module_text(norm)]
    parts += few(writer.draw, [], ["nn.ReLU()"], ["nn.ReLU(inplace=True)"])
    name = writer.fresh("m")
    setup = f"self.{name} = nn.Sequential({', '.join(parts)})"
    if writer.assign(f"self.{name}({value})", (setup,)):
        writer.modules.append(name)


def add_nonlinear(writer: Writer) -> None:
    """An op that no map passes."""
    value = writer.some()
    size = writer.value(value).shape[-1]
    calls = ["torch.sigmoid({})", "torch.relu({})", "F.softmax({}, -1)", "F.gelu({})"]
    calls += ["{}.tanh()", f"F.layer_norm({{}}, ({size},))", "{}.abs()"]
    writer.assign(few(writer.draw, *calls).format(value))


def add_shared(writer: Writer) -> None:
    """A module that was called before, called again."""
    if declared := writer.declared:
        writer.assign(f"self.{few(writer.draw, *declared)}({writer.some()})")


def _called_conv(writer: Writer) -> tuple[str, Any] | None:
    """A value and a conv of it that was just written; None where none could be."""
    value = writer.some()
    shape = tuple(writer.value(value).shape)
    if len(shape) < 3:
        return None
    made = make_conv(writer.draw, shape, same=True)
    first, setup = writer.expression(made, value)
    return None if writer.assign(first, setup) is None else (value, made)


def add_tied(writer: Writer) -> None:
    """A conv and another with the very same weight."""
    called = _called_conv(writer)
    if called is None:
        return
    value, made = called
    name, twin = writer.modules[-1], writer.fresh("m")
    lines = (
        f"self.{twin} = {module_text(made)}",
        f"self.{twin}.weight = self.{name}.weight",
    )
    other = few(writer.draw, value, writer.values[-1])
    writer.assign(f"self.{twin}({other})", lines)


def add_weight_read(writer: Writer) -> None:
    """A conv's weight read a second time, by a function; perhaps in one sum with it."""
    called = _called_conv(writer)
    if called is None:
        return
    value, made = called
    first = writer.values[-1]
    weight = f"self.{writer.modules[-1]}.weight"
    shaped = few(writer.draw, weight, f"{weight}.abs()", f"{weight} * 2")
    pads, groups = [k // 2 for k in made.kernel_size], made.groups
    read = writer.assign(
        f"F.conv{len(pads)}d({value}, {shaped}, None, 1, {pads}, 1, {groups})"
    )
    if read is not None and few(writer.draw, True, False):
        writer.assign(f"{first} + {read}")


def add_write(writer: Writer) -> None:
    """A value written in place, whatever else reads it or is a view of it."""
    a = writer.some()
    b = writer.alike(a)
    channels = writer.value(a).shape[1]
    lines = [f"{a}.add_({b})", f"{a} += {b}", f"{a} *= 2", f"{a}.relu_()"]
    lines += [f"{a}.mul_(-0.5)", f"F.relu({a}, inplace=True)", f"{a}.clamp_(min=0)"]
    lines += [f"{a}[:, {channels - 1}:] = 0", f"{a}.copy_({b})", f"{a}.neg_()"]
    lines += [f"torch.add({a}, {b}, out={a})", f"{a}.sub_({b}, alpha=2)"]
    line = few(writer.draw, *lines)
    if few(writer.draw, True, False):
        fresh = writer.fresh("v")
        if "=" not in line.split("(")[0]:
            writer.run(f"{fresh} = {line}", (), fresh)
            return
    writer.run(line)


def add_view(writer: Writer) -> None:
    """A view, whose sizes may be read from the value."""
    a = writer.some()
    value = writer.value(a)
    rank, channels = value.dim(), value.shape[1]
    lines = [f"{a}.view({a}.shape[0], -1)", f"{a}.flatten(1)", f"{a}[:, 1:]"]
    lines += [f"{a}.reshape({a}.size(0), {a}.size(1), -1)", f"{a}.unsqueeze(1)"]
    lines += [f"{a}.transpose(1, {rank - 1})", f"{a}.view({a}.size())", f"{a}[:, :1]"]
    lines += [f"{a}.permute({', '.join(map(str, [0, *range(2, rank), 1]))})"]
    lines += [
        f"{a}.expand_as({writer.alike(a)})",
        f"{a}[..., ::2]",
        f"{a}.contiguous()",
    ]
    if channels % 2 == 0 and rank > 2:
        tail = ", ".join(f"{a}.size({i})" for i in range(2, rank))
        pairs = f"{a}.size(0), 2, {channels // 2}, {tail}"
        lines.append(f"{a}.view({pairs}).transpose(1, 2).reshape({a}.shape)")
    writer.assign(few(writer.draw, *lines))


def add_channels(writer: Writer) -> None:
    """Channels split and put together in another order or number."""
    a = writer.some()
    b, channels = writer.alike(a), writer.value(a).shape[1]
    lines = [f"torch.cat([{a}, {b}], 1)", f"torch.cat(({b}, {a}), dim=1)"]
    if channels % 2 == 0:
        pair = f"{a}.chunk(2, 1)", f"torch.split({a}, {channels // 2}, dim=1)"
        half = few(writer.draw, *pair)
        lines += [f"{half}[0] + {half}[1]", f"torch.cat({half}[::-1], 1)"]
        lines += [f"{half}[1]", f"{half}[0] * {half}[1].sigmoid()"]
    writer.assign(few(writer.draw, *lines))


def add_cast(writer: Writer) -> None:
    """A value in another dtype, or a weight in another one."""
    a = writer.some()
    shape = (writer.value(a).shape[1], *[1] * (writer.value(a).dim() - 2))
    name = writer.fresh("p")
    narrow = f"torch.randn({shape}, dtype=torch.float32)"
    setup = (f"self.{name} = nn.Parameter({narrow})",)
    if few(writer.draw, True, True, False):
        writer.assign(f"{a} {few(writer.draw, '*', '+')} self.{name}", setup)
        return
    cast = few(writer.draw, ".float()", ".to(torch.float32).double()", ".double()")
    writer.casts |= cast != ".double()"
    writer.assign(f"{a}{cast}")


def add_pool(writer: Writer) -> None:
    """A pool to one position, and a linear layer after it, as heads do."""
    a = writer.some()
    value = writer.value(a)
    if value.dim() != 4:
        return
    pooled = few(
        writer.draw,
        f"F.adaptive_avg_pool2d({a}, 1).flatten(1)",
        f"{a}.mean((2, 3))",
        f"{a}.mean([-1, -2], keepdim=True).flatten(1)",
        f"F.max_pool2d({a}, 2, 1)",
    )
    made = writer.assign(pooled)
    if made is not None and writer.value(made).dim() == 2:
        writer.apply(nn.Linear(value.shape[1], 3), made)


STEPS = (
    *(add_piece,) * 6,
    *(add_branches,) * 3,
    *(add_sequential,) * 2,
    *(add_sum,) * 3,
    *(add_nonlinear,) * 2,
    *(add_view,) * 2,
    *(add_write,) * 2,
    *(add_shared, add_tied, add_weight_read, add_channels, add_cast, add_pool),
)
