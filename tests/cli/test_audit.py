"""`fastvit audit`: known wrong peers are caught, each with its own trap."""

from __future__ import annotations

import json

import pytest
from fastvit_cli import audit as command
from fastvit_cli.audit_peers import run_peer

# Inputs that other fusers are known to get wrong, from public reports.
TRAPS = """
import torch
from torch import nn

def draw(net, size=(4, 8, 8)):
    torch.manual_seed(3)
    for part in net.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(part.running_mean, -1, 1)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -1, 1)
    net.input_size = size
    return net.eval()

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x * 2)

def called_twice():
    return draw(Twice())

def hooked():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    net[0].register_forward_hook(lambda _, __, out: out * 2)
    return draw(net)

class Widths(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.linspace(1, 2, 8))

    def forward(self, x):
        return self.conv(x) * self.scale

def along_the_width():
    return draw(Widths())

class TwoNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.one, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.one(self.conv(x)) - self.other(self.conv(x * 2))

def under_two_norms():
    return draw(TwoNorms())

def positions_as_many_as_channels():
    rows = nn.Linear(64, 4)  # (N, 4, 8, 8) → (N, 4, 64) → (N, 4, 4)
    return draw(nn.Sequential(nn.Flatten(2), rows, nn.BatchNorm1d(4)))

class ReadElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight)

def weight_read_elsewhere():
    return draw(ReadElsewhere())

def transposed():
    return draw(nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)))

class Dilated(nn.Module):
    def __init__(self):
        super().__init__()
        from timm.models.fastvit import MobileOneBlock
        self.block = MobileOneBlock(4, 4, 3, dilation=2, use_act=False)

    def forward(self, x):
        return self.block(x)

def dilated_branches():
    return draw(Dilated())
"""
# trap → the peer that it is about
WRONG = {
    "called_twice": "torch fx",
    "hooked": "torch fx",
    "along_the_width": "onnxslim",
    "under_two_norms": "torch fx",
    "positions_as_many_as_channels": "torch fx",
    "weight_read_elsewhere": "torch fx",
    "transposed": "inductor",
    "dilated_branches": "timm",
}


@pytest.fixture
def traps(folder):
    """The file of traps; what a peer sets in its process is put back."""
    import torch._inductor.config as config

    (folder / "traps.py").write_text(TRAPS)
    with config.patch(freezing=config.freezing):
        yield folder


def ask(peer, trap):
    """A request as the command makes it."""
    from dataclasses import asdict

    from fastvit_cli.builders import ModelOptions

    return {
        "peer": peer,
        "model": f"traps.py:{trap}",
        "options": asdict(ModelOptions()),
        "samples": 2,
        "threads": 1,
    }


@pytest.mark.parametrize("trap", list(WRONG))
def test_ours_keeps_the_function_of_every_trap(traps, trap):
    row = run_peer(ask("this project", trap), traps)
    assert row["verdict"] == "equal", row


@pytest.mark.parametrize("trap", list(WRONG))
def test_a_peer_that_changes_the_function_is_caught(traps, trap):
    peer = WRONG[trap]
    try:
        row = run_peer(ask(peer, trap), traps)
    except RuntimeError as error:  # a wrong rewrite may not even run
        pytest.skip(f"{peer} fails: {error}")
    if row["verdict"] == "not installed":
        pytest.skip(row["note"])
    assert row["verdict"] == "different", row
    assert row["error_ratio"] > 1e3
    assert row["where"]


def test_the_command_isolates_each_peer_and_says_what_came_of_it(fastvit, traps):
    args = ("--peer", "torch fx", "--json", "-")
    result = fastvit("audit", "traps.py:called_twice", *args)
    assert result.code == 0, result.err
    (row,) = json.loads(result.out)["peers"]
    assert row["verdict"] == "different"
    assert "different" in result.err


def test_a_peer_that_hangs_or_dies_is_one_row(traps, monkeypatch):
    from fastvit_cli.builders import ModelOptions

    def row(seconds):
        return command._row(
            "timm", "traps.py:hooked", ModelOptions(), (seconds, 1), lambda stage: None
        )

    assert row(0.01)["verdict"] == "too slow"
    monkeypatch.setattr(command.sys, "executable", "/bin/false")
    assert row(60)["verdict"] == "crashed"


def test_unknown_peers_and_graphs_are_refused(fastvit, traps):
    unknown = fastvit("audit", "traps.py:hooked", "--peer", "magic")
    assert unknown.code == 2
    assert "onnxslim" in unknown.error
    assert fastvit("audit", "gone.onnx").code == 2
