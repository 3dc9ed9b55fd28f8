"""What the package promises in words exists: exports, reasons, and their pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from equality import Branches, Net, assert_same, conv, draw, randomise, reasons
from torch import nn

import repcompiler as rc
from repcompiler import errors

DOCS = Path(__file__).resolve().parent.parent / "docs"


# ---- names -------------------------------------------------------------------------


def test_all_is_what_is_exported():
    own = {
        name
        for name, value in vars(rc).items()
        if not name.startswith("_")
        and not isinstance(value, type(rc))
        and (
            name == "RULES" or getattr(value, "__module__", "").startswith(rc.__name__)
        )
    }
    # `capture` and `verify` are functions that hide the modules they live in.
    assert sorted(own) == sorted(rc.__all__)
    assert callable(rc.capture)
    assert callable(rc.verify)


def test_what_is_exported_is_documented():
    pages = "\n".join(page.read_text("utf-8") for page in DOCS.glob("*.md"))
    for name in rc.__all__:
        assert name == "RULES" or getattr(rc, name).__doc__, name
        assert re.search(rf"`[^`]*\b{name}\b[^`]*`", pages), f"{name} is on no page"


def test_every_error_is_in_the_tree_at_the_top_of_its_file():
    kinds = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    tree = errors.__doc__ or ""
    assert all(name in tree and name in rc.__all__ for name in kinds)


# ---- reasons -----------------------------------------------------------------------

IMAGE = (2, 4, 8, 8)


def scale(*shape: int) -> nn.Parameter:
    """Numbers away from zero."""
    return nn.Parameter(torch.rand(*shape) + 1)


def lying_rule(op: rc.Op) -> rc.Alias:
    """Claims that an operator gives back its input."""
    return rc.Alias(op.input)


def _hooked() -> nn.Module:
    net = nn.Sequential(conv(), nn.BatchNorm2d(4))
    net[0].register_forward_hook(lambda _, __, out: out * 2)
    return net


def _written(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = s.conv(x)
    y[:, 0] = 1
    return s.norm(y)


NORM = {"conv": conv(), "norm": nn.BatchNorm2d(4)}

# reason → (model, shape of its example input or None)
PROVOKED = {
    "padded_border": (lambda: nn.Sequential(nn.BatchNorm2d(4), conv()), IMAGE),
    "size_mismatch": (
        lambda: Net(
            lambda s, x: s.a(x) + s.b(x),
            a=nn.Conv2d(4, 4, 2, stride=2),
            b=conv(stride=2),
        ),
        IMAGE,
    ),
    "stride_mismatch": (
        lambda: Net(
            lambda s, x: s.a(x) + s.b(x), a=conv(stride=2), b=nn.Conv2d(4, 4, 1)
        ),
        (2, 4, 1, 1),
    ),
    "padding_mode": (
        lambda: Branches(conv(padding_mode="reflect"), conv(), skip=False),
        IMAGE,
    ),
    "axis_mismatch": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)),
        (2, 6, 6),
    ),
    "channel_mismatch": (
        lambda: Net(lambda s, x: s.a(x) + s.b(x), a=conv(), b=nn.Conv2d(4, 1, 1)),
        None,
    ),
    "broadcast": (
        lambda: Net(lambda s, x: s.conv(x) * s.scale, conv=conv(), scale=scale(8, 8)),
        IMAGE,
    ),
    "view_mixes_channels": (
        lambda: Net(
            lambda s, x: s.conv(s.norm(x).reshape(x.shape[0] * 2, 2, 8, 8)),
            norm=nn.BatchNorm2d(4),
            conv=nn.Conv2d(2, 2, 1),
        ),
        IMAGE,
    ),
    "spatial_sum": (
        lambda: Net(
            lambda s, x: s.last(s.a(x.relu()) + s.b(x.tanh())),
            a=conv(),
            b=conv(),
            last=nn.Conv2d(4, 4, 3),
        ),
        IMAGE,
    ),
    "layout": (
        lambda: Net(
            lambda s, x: s.linear(s.conv(x).flatten(2).transpose(1, 2)),
            conv=conv(),
            linear=nn.Linear(4, 4),
        ),
        IMAGE,
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), conv()),
        IMAGE,
    ),
    "train_mode": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
        IMAGE,
    ),
    "not_constant": (
        lambda: Net(
            lambda s, x: F.conv2d(x, s.weight * x.mean()), weight=scale(4, 4, 3, 3)
        ),
        IMAGE,
    ),
    "not_finite": (
        lambda: Net(lambda s, x: (s.conv(x) * float("inf")).sigmoid(), conv=conv()),
        IMAGE,
    ),
    "mutated": (lambda: Net(_written, **NORM), IMAGE),
    "hooked": (_hooked, IMAGE),
    "not_captured": (
        lambda: Net(_deciding, block=nn.Sequential(conv(), nn.ReLU()), **NORM),
        IMAGE,
    ),
    "unknown_shape": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), None),
    "dtype": (
        lambda: Net(
            lambda s, x: s.conv(x).float() * s.scale, conv=conv(), scale=scale(4, 1, 1)
        ),
        IMAGE,
    ),
    "ceil_or_count": (
        lambda: nn.Sequential(conv(), nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
        IMAGE,
    ),
    "other_reader": (
        lambda: Net(
            lambda s, x: torch.cat([s.norm(y := s.conv(x)), y.relu()], 1), **NORM
        ),
        IMAGE,
    ),
    "dearer": (
        lambda: nn.Sequential(
            conv(64, 64, 7, groups=64, bias=False), nn.Conv2d(64, 64, 1)
        ),
        (2, 64, 8, 8),
    ),
    "no_neighbour": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()),
        IMAGE,
    ),
    "not_equal": (
        lambda: Net(lambda s, x: s.norm(torch.tanh(s.conv(x))), **NORM),
        IMAGE,
    ),
}


def _deciding(s, x):
    """Looks at values between two submodules."""
    y = s.block(x)
    return s.norm(s.conv(y)) if float(y.sum()) > 1e6 else s.norm(y)


CODES = [reason.code for reason in rc.Reason]


def test_every_reason_is_provoked_and_no_code_is_used_twice():
    assert sorted(PROVOKED) == sorted(CODES)
    assert len(set(CODES)) == len(CODES)


@pytest.mark.parametrize("code", CODES)
def test_reason_is_reported_and_the_value_is_right(code):
    make, shape = PROVOKED[code]
    net = randomise(make())
    rules = (
        {**rc.RULES, torch.tanh: rc.Rule(lying_rule)} if code == "not_equal" else None
    )
    inputs = None if shape is None else (draw(shape),)
    result = rc.fuse(net, inputs, rules=rules)
    assert code in reasons(result)
    kept = next(kept for kept in result.report.kept if kept.reason == code)
    assert kept.detail == next(r.sentence for r in rc.Reason if r.code == code)
    channels = "unknown_shape" if code == "unknown_shape" else None
    shown = (3, 4) if channels else (3, 4, 6, 6)
    assert_same(net, result.model, [(draw(shape or shown),)])


def test_every_reason_has_its_section_and_every_section_a_reason():
    page = (DOCS / "refusals.md").read_text("utf-8")
    sections = re.findall(r"^## `(\w+)`$", page, flags=re.MULTILINE)
    assert sections == CODES
    for reason, text in zip(rc.Reason, re.split(r"^## .*$", page, flags=re.M)[1:]):
        said = " ".join(text.split())
        assert reason.sentence[1:] in said, reason.code
        assert "**Example.**" in text, reason.code
        assert "**What to do.**" in text, reason.code
