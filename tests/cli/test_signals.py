"""A runtime that was used and let go leaves signals as they were."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import faulthandler, gc, signal, sys
from pathlib import Path
import torch
from fastvit_cli.backends import BACKENDS, Subject
from fastvit_cli.card import Card

faulthandler.enable()  # as pytest does: a stack of its own for signals
inputs = (torch.randn(1, 3, 8, 8),)
runs = []
for count in range(2):
    model = torch.nn.Conv2d(3, 4, 3).eval()
    place = Path(f"{count}")
    place.mkdir()
    card = Card("conv", {"input_size": [3, 8, 8]}, weights={"origin": "program"})
    subject = Subject(model, inputs, card, "float32", "cpu", 1, scratch=place)
    runs.append(BACKENDS[sys.argv[1]].prepare(subject, inputs))
    runs[-1]()
while runs:
    runs.pop(0)
    gc.collect()
again = [bytearray(12_000) for _ in range(1000)]
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_signal_is_handled_after_a_runtime_is_gone(folder, backend):
    """OpenVINO frees the stack that it gave signals: exit code -11, without a word."""
    pytest.importorskip(backend)
    command = [sys.executable, "-c", SCRIPT, backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


class Loading:
    """The command's module, in the middle of whose import somebody presses ctrl-c."""

    @property
    def main(self) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_while_the_command_is_loaded_is_one_line(monkeypatch, capsys):
    from fastvit_cli import __main__ as entry

    monkeypatch.setitem(sys.modules, "fastvit_cli.main", Loading())
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"
