"""Every form of MODEL gives the compiler the right module, size, dtype and weights."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch
from fastvit_cli.sources import ModelOptions, classify, load, split_weights
from safetensors.torch import save_file


@pytest.fixture
def given(fastvit, stand_in):
    """Runs `fastvit fuse ARGS…` and returns the model, its input and the JSON."""

    def run(*args):
        calls = stand_in()
        result = fastvit("fuse", *args, "--json", "-")
        assert result.code == 0, result.err
        (call,) = calls
        return call["model"], call["example_inputs"], json.loads(result.out)

    return run


def test_a_variant_of_this_project_at_its_own_size(given):
    model, inputs, document = given("fastvit_t8")
    assert not model.training
    assert inputs[0].shape == (1, 3, 256, 256)
    assert document["model"] == "fastvit_t8"
    assert document["input_size"] == [3, 256, 256]
    assert document["weights"]["origin"] == "random"


def test_timm_says_its_own_size(given):
    model, inputs, document = given("timm:test_resnet")
    assert type(model).__module__.startswith("timm.")
    assert inputs[0].shape == (1, 3, 160, 160)
    assert document["input_size"] == [3, 160, 160]


def test_torchvision_says_its_own_size(given):
    model, inputs, _ = given("torchvision:squeezenet1_1")
    assert type(model).__module__.startswith("torchvision.")
    assert inputs[0].shape == (1, 3, 224, 224)


def test_pretrained_is_asked_of_timm_and_recorded(given, monkeypatch):
    import timm

    asked = []
    create = timm.create_model

    def recording(name, pretrained=False, **options):
        asked.append(pretrained)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", recording)
    _, _, document = given("timm:test_resnet", "--pretrained")
    assert asked == [True]
    assert document["weights"]["origin"] == "pretrained"


def test_model_args_reach_the_factory_and_channels_the_input(given):
    args = ("--model-arg", "in_chans=1", "--model-arg", "num_classes=7")
    model, inputs, document = given("timm:test_resnet", *args)
    assert inputs[0].shape == (1, 1, 160, 160)
    assert model(inputs[0]).shape == (1, 7)
    assert document["input_size"] == [1, 160, 160]


def test_bare_words_are_text_and_literals_are_values(given):
    args = ("--model-arg", "act_layer=relu6", "--model-arg", "drop_rate=0.25")
    model, _, _ = given("timm:test_resnet", *args)
    assert isinstance(model.act1, torch.nn.ReLU6)
    assert model.drop_rate == 0.25


def test_a_factory_in_a_file(given, net):
    model, inputs, document = given(net, "--model-arg", "num_classes=3")
    assert model(inputs[0]).shape == (1, 3)
    assert inputs[0].shape == (1, 3, 16, 16)  # its attribute input_size
    assert document["weights"]["origin"] == "factory"
    assert "random unless" in document["weights"]["note"]


def test_a_file_may_import_its_neighbours(given, net, folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "parts.py").write_text((folder / "net.py").read_text())
    (folder / "sub" / "main.py").write_text("from parts import build\n")
    model, _, _ = given("sub/main.py:build")
    assert type(model).__name__ == "Small"


def test_a_factory_in_a_package_of_the_working_directory(given, net, folder):
    package = folder / "my_nets_for_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "small.py").write_text((folder / "net.py").read_text())
    model, _, _ = given("my_nets_for_test.small:Small")
    assert type(model).__name__ == "Small"


def test_an_assumed_input_size_is_said_aloud(fastvit, net, stand_in):
    stand_in()
    result = fastvit("fuse", "net.py:undeclared")
    assert "does not say its input size: 3x224x224 is assumed" in result.out
    given_size = fastvit("fuse", "net.py:undeclared", "--input-size", "3x32x32")
    assert "assumed" not in given_size.out
    assert "3x32x32" in given_size.out


def test_the_seed_decides_random_weights(net):
    def weight(seed):
        return load(net, ModelOptions(seed=seed)).model.head.weight

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtype_casts_model_and_input(given, net, dtype):
    model, inputs, _ = given(net, "--dtype", dtype)
    assert model.head.weight.dtype == getattr(torch, dtype)
    assert inputs[0].dtype == getattr(torch, dtype)


def test_prints_of_a_factory_leave_stdout_clean(fastvit, folder, net, stand_in):
    noisy = (folder / "net.py").read_text() + "print('building')\n"
    (folder / "noisy.py").write_text(textwrap.dedent(noisy))
    stand_in()
    result = fastvit("fuse", "noisy.py:build", "--json", "-")
    assert json.loads(result.out)["schema"] == 1
    assert "building" in result.err


def test_a_program_keeps_its_own_inputs_and_fixed_batch(fastvit, folder, net):
    model = load(net, ModelOptions()).model
    program = torch.export.export(model, (torch.randn(4, 3, 16, 16),))
    torch.export.save(program, folder / "fixed.pt2")
    loaded = load("fixed.pt2", ModelOptions())
    assert loaded.inputs[0].shape == (4, 3, 16, 16)
    assert not loaded.dynamic_batch
    assert loaded.card.weights["origin"] == "program"


def test_a_program_with_a_dynamic_batch_runs_at_batch_one(folder, net):
    model = load(net, ModelOptions()).model
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    inputs = (torch.randn(4, 3, 16, 16),)
    program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
    torch.export.save(program, folder / "dynamic.pt2")
    loaded = load("dynamic.pt2", ModelOptions())
    assert loaded.inputs[0].shape == (1, 3, 16, 16)
    assert loaded.dynamic_batch


def test_a_program_refuses_what_it_cannot_be(fastvit, folder, net):
    model = load(net, ModelOptions()).model
    program = torch.export.export(model, (torch.randn(1, 3, 16, 16),))
    torch.export.save(program, folder / "net.pt2")
    for option in (["--dtype", "float16"], ["--weights", "x.pth"], ["--pretrained"]):
        result = fastvit("fuse", "net.pt2", *option)
        assert result.code == 2
        assert "net.pt2" in result.error
    (folder / "junk.pt2").write_bytes(b"junk")
    junk = fastvit("fuse", "junk.pt2")
    assert junk.code == 2
    assert "not an exported program" in junk.error


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize("form", ["--weights", "@"])
def test_a_checkpoint_is_loaded_whole(given, net, folder, suffix, form):
    other = load(net, ModelOptions(seed=5)).model.state_dict()
    path = f"other{suffix}"
    if suffix == ".safetensors":
        save_file(other, folder / path)
    else:
        torch.save(other, folder / path)
    args = [net, "--weights", path] if form == "--weights" else [f"{net}@{path}"]
    model, _, document = given(*args)
    assert torch.equal(model.head.weight, other["head.weight"])
    assert document["weights"] == {
        "origin": "file",
        "file": path,
        "note": f"weights from {path}",
    }


def test_weights_given_twice_are_refused(fastvit, net):
    result = fastvit("fuse", f"{net}@a.pth", "--weights", "b.pth")
    assert result.code == 2
    assert "--weights" in result.error


def test_an_at_sign_in_a_path_that_exists_is_no_checkpoint(folder):
    (folder / "a@b.pt2").touch()
    assert split_weights("a@b.pt2", ModelOptions())[0] == "a@b.pt2"
    assert split_weights("timm:x@w.pth", ModelOptions())[1].weights == "w.pth"


class Evil:
    """Would create a file if it were unpickled."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def bad_checkpoints(folder, net):
    """Files that must not load, with what the message must hold."""
    state = load(net, ModelOptions()).model.state_dict()
    torch.save({**state, "extra": torch.ones(1)}, folder / "extra.pth")
    torch.save({k: state[k] for k in list(state)[1:]}, folder / "part.pth")
    wide = load(net, ModelOptions(args={"width": 9})).model
    torch.save(wide.state_dict(), folder / "wide.pth")
    torch.save({"weights": Evil()}, folder / "evil.pth")
    (folder / "junk.pth").write_bytes(b"\x80junk")
    (folder / "junk.safetensors").write_bytes(b"\x08\x00")
    (folder / "note.txt").write_text("hello")
    return {
        "gone.pth": "gone.pth",
        "extra.pth": "extra",
        "part.pth": "conv.weight",
        "wide.pth": "misshapen",
        "evil.pth": "evil.pth",
        "junk.pth": "junk.pth",
        "junk.safetensors": "junk.safetensors",
        "note.txt": "note.txt",
    }


def test_a_bad_checkpoint_is_one_line_and_runs_nothing(fastvit, net, folder, stand_in):
    calls = stand_in()
    for path, problem in bad_checkpoints(folder, net).items():
        result = fastvit("fuse", net, "--weights", path)
        assert result.code == 2, path
        assert problem in result.error
    assert calls == []
    assert not (folder / "ran").exists()


def test_the_checkpoint_of_another_variant_is_named(fastvit, folder):
    import fastvit as package

    torch.save(package.create_model("fastvit_t12").state_dict(), folder / "t12.pth")
    result = fastvit("fuse", "fastvit_t8", "--weights", "t12.pth")
    assert result.code == 2
    assert "fastvit_t12" in result.error


def test_a_foreign_safetensors_is_no_model(fastvit, folder):
    save_file({"x": torch.ones(1)}, folder / "foreign.safetensors")
    result = fastvit("fuse", "foreign.safetensors")
    assert result.code == 2
    assert "--weights foreign.safetensors" in result.error


def test_forms_are_told_apart():
    assert classify("fastvit_ma36") == "fastvit"
    assert classify("timm:resnet18") == "timm"
    assert classify("torchvision:resnet18") == "torchvision"
    assert classify("a.b:c") == "factory"
    assert classify("dir/a.py:c") == "factory"
    assert classify("dir/a.pt2") == "program"
    assert classify("dir/a.safetensors") == "artefact"
    assert classify("dir/a.onnx") == "onnx"
