"""Every layout of released FastViT files loads whole and gives the same model.

The Apple layout is written here by rules of this file's own, and read back by timm's
filter as well, which is independent of the map under test.
"""

from __future__ import annotations

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.fastvit import checkpoint_filter_fn

from fastvit import load_weights

# Names as they stand in the released files, for a variant with attention and one
# without: the writer below must produce them.
RELEASED = {
    "fastvit_sa12": [
        "patch_embed.0.rbr_conv.0.conv.weight",
        "patch_embed.1.rbr_scale.bn.running_var",
        "network.0.0.layer_scale",
        "network.0.1.token_mixer.layer_scale",
        "network.0.0.token_mixer.norm.rbr_skip.running_mean",
        "network.0.0.token_mixer.mixer.rbr_conv.0.bn.weight",
        "network.1.proj.0.lkb_origin.conv.weight",
        "network.1.proj.0.small_conv.bn.bias",
        "network.3.proj.1.rbr_skip.num_batches_tracked",
        "network.4.5.convffn.fc2.bias",
        "network.5.proj.1.rbr_conv.0.conv.weight",
        "network.6.pe.weight",
        "network.6.pe.bias",
        "network.7.0.token_mixer.proj.bias",
        "network.7.1.token_mixer.qkv.weight",
        "network.7.0.norm.running_mean",
        "network.7.1.layer_scale_1",
        "network.7.1.layer_scale_2",
        "conv_exp.se.reduce.weight",
        "conv_exp.se.expand.bias",
        "conv_exp.rbr_scale.conv.weight",
        "head.weight",
        "head.bias",
    ],
    "fastvit_t8": [
        "network.4.3.convffn.conv.conv.weight",
        "network.5.proj.0.lkb_origin.bn.weight",
        "network.6.1.token_mixer.mixer.rbr_scale.conv.weight",
    ],
}

RULES = (
    (r"^stem", "patch_embed"),
    (r"^final_conv", "conv_exp"),
    (r"^head\.fc", "head"),
    (r"conv_kxk", "rbr_conv"),
    (r"conv_scale", "rbr_scale"),
    (r"\bidentity\b", "rbr_skip"),
    (r"large_conv", "lkb_origin"),
    (r"\bmlp\b", "convffn"),
    (r"se\.fc1", "se.reduce"),
    (r"se\.fc2", "se.expand"),
    (r"\.gamma$", ""),
)


def in_apple_layout(state):
    """A timm-layout state dict under the released files' names."""
    has_cpe = any("pos_emb" in name for name in state)

    def place(match):
        stage, rest = int(match[1]), match[2]
        if rest.startswith("downsample."):
            return f"network.{2 * stage - 1}.{rest.removeprefix('downsample.')}"
        if rest.startswith("pos_emb."):
            return f"network.6.{rest.removeprefix('pos_emb.').replace('pos_enc', 'pe')}"
        index = 7 if has_cpe and stage == 3 else 2 * stage
        return f"network.{index}.{rest.removeprefix('blocks.')}"

    def renamed(name):
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        return re.sub(r"^stages\.(\d)\.(.*)", place, name)

    return {renamed(name): tensor for name, tensor in state.items()}


def assert_equal_weights(model, expected):
    state = model.state_dict()
    assert [
        name for name in state if not torch.equal(state[name], expected[name])
    ] == []


@pytest.mark.parametrize("name", RELEASED)
def test_apple_layout_loads_and_computes_what_timm_computes(
    name, tmp_path, make_random, make_image
):
    source = make_random(name, seed=1).state_dict()
    apple = in_apple_layout(source)
    assert set(RELEASED[name]) <= set(apple)
    theirs = timm.create_model(name, pretrained=False)
    theirs.load_state_dict(checkpoint_filter_fn(apple, theirs), strict=True)

    path = tmp_path / f"{name}.pth.tar"
    torch.save({"state_dict": apple}, path)
    ours = make_random(name, seed=2)
    loaded = load_weights(ours, path)

    assert (loaded.layout, loaded.ignored) == ("apple", ())
    assert_equal_weights(ours, source)
    with torch.no_grad():
        assert torch.equal(ours(make_image()), theirs.eval()(make_image()))


@pytest.mark.parametrize("name", ["fastvit_s12", "fastvit_ma36"])
def test_apple_layout_of_other_depths_loads(name, tmp_path, make_random):
    source = make_random(name, seed=1).state_dict()
    torch.save(in_apple_layout(source), tmp_path / "weights.pt")
    ours = make_random(name, seed=2)
    assert load_weights(ours, tmp_path / "weights.pt").layout == "apple"
    assert_equal_weights(ours, source)


def test_timm_layout_loads_from_safetensors_with_metadata(tmp_path, make_random):
    source = make_random("fastvit_t8", seed=1).state_dict()
    path = tmp_path / "weights.safetensors"
    save_file(source, path, metadata={"model": "fastvit_t8"})
    ours = make_random("fastvit_t8", seed=2)
    loaded = load_weights(ours, path)
    assert (loaded.layout, loaded.metadata) == ("timm", {"model": "fastvit_t8"})
    assert_equal_weights(ours, source)


def test_timms_feature_extractor_layout_loads_into_the_backbone(tmp_path, make_random):
    theirs = timm.create_model("fastvit_t8", features_only=True)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = make_random("fastvit_t8", features_only=True)
    assert load_weights(ours, tmp_path / "weights.pth").layout == "timm-features"
    expected = list(theirs.state_dict().values())
    given = list(ours.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize("apple", [False, True])
def test_a_backbone_takes_a_classifiers_file_and_says_what_it_left(
    apple, tmp_path, make_random
):
    source = make_random("fastvit_sa12", seed=1).state_dict()
    stored = in_apple_layout(source) if apple else source
    torch.save(stored, tmp_path / "weights.pth")
    backbone = make_random("fastvit_sa12", seed=2, features_only=True)
    loaded = load_weights(backbone, tmp_path / "weights.pth")
    left = set(source) - set(backbone.state_dict())
    assert set(loaded.ignored) == left
    assert {name.split(".")[0] for name in left} == {"final_conv", "head"}
    assert_equal_weights(backbone, source)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_training_wrappers_come_off(prefix, tmp_path, make_random):
    source = make_random("fastvit_t8", seed=1).state_dict()
    wrapped = {prefix + name: tensor for name, tensor in source.items()}
    torch.save({"model": wrapped}, tmp_path / "weights.pth")
    ours = make_random("fastvit_t8", seed=2)
    load_weights(ours, tmp_path / "weights.pth")
    assert_equal_weights(ours, source)


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema"])
def test_averaged_weights_go_before_the_last_step(averaged, tmp_path, make_random):
    last = make_random("fastvit_t8", seed=1).state_dict()
    mean = make_random("fastvit_t8", seed=3).state_dict()
    content = {"epoch": 7, "state_dict": last, averaged: mean, "optimizer": {"lr": 1.0}}
    torch.save(content, tmp_path / "last.pth.tar")
    ours = make_random("fastvit_t8", seed=2)
    loaded = load_weights(ours, tmp_path / "last.pth.tar")
    assert loaded.metadata == {"epoch": "7", "container": averaged}
    assert_equal_weights(ours, mean)
