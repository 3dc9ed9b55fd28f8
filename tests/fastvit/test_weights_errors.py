"""Weights that do not belong: which error, what it says, and a model left as it was."""

from __future__ import annotations

import argparse
import os
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fastvit import (
    CorruptFile,
    FusedCheckpoint,
    KeyMismatch,
    UnsafePickle,
    WeightsError,
    WeightsNotFound,
    load_state_dict_strictly,
    load_weights,
    read_state_dict,
)


@pytest.fixture
def refused(make_random):
    """Loads a file that must not load; the error, once the model is seen unchanged."""

    def load(path, kind, *, name="fastvit_t8", **options):
        model = make_random(name, **options)
        return check(model, lambda: load_weights(model, path), kind)

    return load


def check(model, action, kind):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind) as caught:
        action()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    error = caught.value
    assert type(error) is kind
    assert isinstance(error, WeightsError)
    assert error.hint
    assert str(error).endswith(error.hint)
    return error


@pytest.fixture
def stored(tmp_path, make_random):
    """Writes a model's state dict, changed by a function, and returns the path."""

    def save(name="fastvit_t8", change=dict, **options):
        path = tmp_path / "weights.pth"
        torch.save(change(make_random(name, **options).state_dict()), path)
        return path

    return save


def test_missing_unexpected_and_misshapen_keys_are_all_listed(stored, refused):
    def change(state):
        state = dict(state)
        del state["stem.0.conv_kxk.0.bn.weight"]
        state["stem.9.weight"] = torch.zeros(1)
        state["head.fc.bias"] = torch.zeros(7)
        return state

    error = refused(stored(change=change), KeyMismatch)
    assert error.missing == ("stem.0.conv_kxk.0.bn.weight",)
    assert error.unexpected == ("stem.9.weight",)
    assert error.misshapen == ("head.fc.bias: file (7,), model (1000,)",)
    for part in (*error.missing, *error.unexpected, *error.misshapen, "weights.pth"):
        assert part in str(error)
    assert "no whole train-form checkpoint" in error.hint


def test_long_lists_are_cut_with_a_count(stored, refused):
    error = refused(stored(change=lambda state: {"a": torch.zeros(1)}), KeyMismatch)
    assert len(error.missing) > 200
    assert f"{len(error.missing)} missing" in str(error)
    assert f"and {len(error.missing) - 5} more" in str(error)
    assert len(str(error)) < 1000


@pytest.mark.parametrize("other", ["fastvit_t12", "fastvit_sa24", "fastvit_ma36"])
def test_another_variants_file_is_named(other, stored, refused):
    error = refused(stored(other, num_classes=12), KeyMismatch)
    assert f"is a {other}:" in error.hint


def test_another_variants_file_is_named_for_a_backbone_too(stored, refused):
    path = stored("fastvit_s12", features_only=True)
    error = refused(path, KeyMismatch, features_only=True)
    assert "is a fastvit_s12:" in error.hint


def test_other_class_counts_and_channels_are_named(stored, refused):
    error = refused(stored(num_classes=12), KeyMismatch)
    assert "num_classes=12" in error.hint
    assert "reset_classifier(1000)" in error.hint
    assert len(error.misshapen) == 2
    error = refused(stored(in_chans=1), KeyMismatch)
    assert "in_chans=1" in error.hint


def test_a_backbones_file_is_named(stored, refused):
    error = refused(stored(features_only=True), KeyMismatch)
    assert "features_only=True" in error.hint


def test_norms_that_a_classifier_lacks_are_named(stored, refused):
    error = refused(stored(), KeyMismatch, features_only=True, norms=True)
    assert "norms=False" in error.hint


def test_the_deploy_form_is_named(tmp_path, refused):
    fused = timm.utils.reparameterize_model(timm.create_model("fastvit_t8").eval())
    torch.save(fused.state_dict(), tmp_path / "fused.pth")
    error = refused(tmp_path / "fused.pth", FusedCheckpoint)
    assert "deploy-form" in str(error)
    assert "unfused" in error.hint


def test_apples_deploy_form_is_named(tmp_path, refused):
    state = {"network.0.0.token_mixer.reparam_conv.weight": torch.zeros(48, 1, 3, 3)}
    torch.save({"state_dict": state}, tmp_path / "fused.pth")
    refused(tmp_path / "fused.pth", FusedCheckpoint)


def test_metadata_that_says_fused_is_believed(tmp_path, refused):
    path = tmp_path / "fused.safetensors"
    save_file({"stem.0.weight": torch.zeros(2)}, path, metadata={"form": "fused"})
    refused(path, FusedCheckpoint)


def test_integers_do_not_fill_floating_point_weights(stored, refused):
    def quantise(state):
        name = "head.fc.weight"
        return {**state, name: state[name].to(torch.int8)}

    error = refused(stored(change=quantise), KeyMismatch)
    assert "int8" in error.misshapen[0]


def test_a_missing_file(tmp_path, refused):
    error = refused(tmp_path / "none.pth", WeightsNotFound)
    assert isinstance(error, FileNotFoundError)


def test_a_folder_and_an_unknown_suffix(tmp_path, refused):
    (tmp_path / "folder.pth").mkdir()
    refused(tmp_path / "folder.pth", WeightsError)
    (tmp_path / "weights.h5").write_bytes(b"x")
    assert ".safetensors" in str(refused(tmp_path / "weights.h5", WeightsError))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>Not Found", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "LFS pointer"),
        (b"no checkpoint at all " * 20, "is"),
        (bytes(range(256)) * 4, "is"),
    ],
)
def test_files_that_are_no_checkpoints(content, said, suffix, tmp_path, refused):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert said in str(refused(path, CorruptFile))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_half_a_file(kind, tmp_path, make_random, refused):
    state = make_random("fastvit_t8").state_dict()
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, CorruptFile)


class RunsCode:
    """A pickle that makes a folder when it is read without care."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_does_not_run(zipped, tmp_path, refused):
    trap, path = tmp_path / "sprung", tmp_path / "weights.pth"
    torch.save({"a": RunsCode(trap)}, path, _use_new_zipfile_serialization=zipped)
    error = refused(path, UnsafePickle)
    assert not trap.exists()
    assert "mkdir" in str(error)


def test_a_whole_pickled_model_is_refused_by_name(tmp_path, refused):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    error = refused(tmp_path / "model.pth", UnsafePickle)
    assert "torch.nn.modules.linear.Linear" in str(error)


def test_a_program_is_refused(tmp_path, refused):
    program = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    torch.jit.save(program, tmp_path / "model.pt")
    assert "TorchScript" in str(refused(tmp_path / "model.pt", CorruptFile))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "type list"),
        ({}, "an empty dictionary"),
        ({"epoch": 3, "weights": [1]}, "keys epoch, weights"),
        ({"state_dict": {}}, "keys state_dict"),
    ],
)
def test_files_without_a_state_dict(content, said, tmp_path, refused):
    torch.save(content, tmp_path / "weights.pth")
    assert said in str(refused(tmp_path / "weights.pth", CorruptFile))


def test_an_archive_that_is_no_checkpoint(tmp_path, refused):
    with zipfile.ZipFile(tmp_path / "weights.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "weights.pth", CorruptFile)


def test_arguments_beside_the_weights_do_not_stand_in_the_way(tmp_path):
    content = {
        "state_dict": {"w": torch.ones(2)},
        "args": argparse.Namespace(lr=1e-3),
        "arch": "fastvit_t8",
    }
    torch.save(content, tmp_path / "weights.pth.tar")
    state, metadata = read_state_dict(tmp_path / "weights.pth.tar")
    assert torch.equal(state["w"], torch.ones(2))
    assert metadata == {"arch": "fastvit_t8", "container": "state_dict"}


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_any_module_loads_its_own_names(tmp_path):
    source, model = small(), small()
    wrapped = {f"module.{k}": v for k, v in source.state_dict().items()}
    torch.save(wrapped, tmp_path / "weights.bin")
    assert load_weights(model, tmp_path / "weights.bin").layout == "own"
    pairs = zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_any_module_is_left_alone_when_one_key_is_wrong():
    model = small()
    state = {**small().state_dict(), "1.bias": torch.zeros(5)}
    error = check(model, lambda: load_state_dict_strictly(model, state), KeyMismatch)
    assert error.misshapen == ("1.bias: file (5,), model (4,)",)
    assert "same arguments" in error.hint


def test_a_prefix_that_is_the_models_own_stays():
    model, source = nn.DataParallel(small()), nn.DataParallel(small())
    load_state_dict_strictly(model, source.state_dict())
    assert torch.equal(model.module[0].weight, source.module[0].weight)


def test_step_counters_may_be_absent_and_nothing_else():
    model = small()
    state = small().state_dict()
    del state["1.num_batches_tracked"]
    load_state_dict_strictly(model, state)
    assert torch.equal(model[0].weight, state["0.weight"])
    del state["1.running_mean"]
    with pytest.raises(KeyMismatch) as caught:
        load_state_dict_strictly(model, state)
    assert caught.value.missing == ("1.running_mean",)


def test_half_precision_files_are_cast():
    model = small()
    state = {k: v.half() for k, v in small().state_dict().items()}
    load_state_dict_strictly(model, state)
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, state["0.weight"].float())
