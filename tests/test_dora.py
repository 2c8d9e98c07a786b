"""The kit's DoRA layer against peft's own: values, gradients, files, the exact start."""

import copy
import importlib

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn

import common
import dora

merged_copy = importlib.import_module("01_sft").merged


def plain(bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=bias), nn.Tanh(), nn.Linear(40, 24, bias=bias))


def ours(model: nn.Module, seed: int = 0):
    return common.attach_adapter(model, "dora", 4, 8, r"0|2", seed)


def theirs(model: nn.Module):
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=r"0|2", use_dora=True))


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def perturb(model: nn.Module) -> None:
    """Adapters as after some training; the same for equal names."""
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(trained(model).items())):
            p += 0.2 * torch.randn(p.shape, generator=common.stream(i, "perturb"))


def pair(bias: bool = False) -> tuple[nn.Module, nn.Module]:
    """The same adapted model twice, ours and peft's."""
    a, b = ours(plain(bias)), theirs(plain(bias))
    perturb(a)
    b.load_state_dict(a.state_dict())
    return a, b


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (5, 24), (2, 3, 24)])
def test_values_and_gradients_are_pefts_through_training(shape, bias):
    models = pair(bias)
    assert (
        isinstance(models[0].base_model.model[0], dora.DoraLinear)
        and type(models[1].base_model.model[0]) is Linear
    )
    optimizers = [torch.optim.AdamW(trained(m).values(), 0.02) for m in models]
    for step in range(3):  # the norm follows what the optimiser does
        x = torch.randn(shape, generator=common.stream(step, "x"))
        inputs = [x.clone().requires_grad_() for _ in models]
        outs = [model(i) for model, i in zip(models, inputs, strict=True)]
        close(*outs)
        for out, optimizer in zip(outs, optimizers, strict=True):
            optimizer.zero_grad()
            out.pow(3).sum().backward()
        close(inputs[0].grad, inputs[1].grad)
        ours_, theirs_ = (trained(model) for model in models)
        assert len(ours_) == 6 and ours_.keys() == theirs_.keys()
        for name in ours_:
            close(ours_[name].grad, theirs_[name].grad)
            assert ours_[name].grad.abs().sum() > 0
        for optimizer in optimizers:
            optimizer.step()


def test_gradient_against_finite_differences_with_the_norm_held_fixed():
    g = common.stream(0, "gradcheck")
    x, W, A, B = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((5, 6), (7, 6), (2, 6), (7, 2)))
    m, norm = (torch.rand(7, generator=g, dtype=torch.float64) + 0.5 for _ in range(2))
    for tensor in (x, A, B, m):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *parts: dora.Product.apply(parts[0], W, *parts[1:], norm, 2.0), (x, A, B, m)
    )


def test_norm_is_that_of_the_matrix_written_out():
    layer = pair()[0].base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    close(layer.row_norm("default"), (layer.base_layer.weight + 2.0 * B @ A).norm(dim=1).detach())
    for change in ("in place", "replaced", "moved to another precision"):  # what is kept of W notices
        weight = layer.base_layer.weight
        if change == "in place":
            with torch.no_grad():
                weight *= 3
        else:
            weight.data = (weight.data * 0.5).to(torch.bfloat16 if "precision" in change else torch.float32)
        close(layer.row_norm("default"), (weight.float() + 2.0 * B @ A).norm(dim=1).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_very_layer_whatever_the_batch(dtype):
    model = plain().to(dtype)
    x = torch.randn(130, 24, generator=common.stream(0, "x")).to(dtype)
    want = [model(x[:n]) for n in (1, 2, 7, 64, 130)]
    ours(model)
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    assert all(torch.equal(model(x[:n]), w) for n, w in zip((1, 2, 7, 64, 130), want, strict=True))
    perturb(model)
    assert not torch.equal(model(x), want[-1])


def test_bfloat16_is_near_float32():
    model = ours(plain())
    perturb(model)
    half, x = copy.deepcopy(model), torch.randn(9, 24, generator=common.stream(0, "x"))
    for layer in half.modules():
        if isinstance(layer, dora.DoraLinear):
            layer.base_layer.to(torch.bfloat16)
    for m in (model, half):
        m.zero_grad()
        m(x.to(torch.bfloat16 if m is half else torch.float32)).float().square().sum().backward()
    for name, p in trained(model).items():
        got = dict(half.named_parameters())[name].grad
        assert got.dtype == torch.float32
        assert (got - p.grad).norm() < 0.05 * p.grad.norm(), name


def test_the_saved_adapter_needs_nothing_but_peft(tmp_path):
    model, x = ours(plain()), torch.randn(6, 24, generator=common.stream(0, "x"))
    perturb(model)
    want = model(x)
    model.save_pretrained(str(tmp_path))
    assert "DoraLinear" not in (tmp_path / "adapter_config.json").read_text()
    loaded = PeftModel.from_pretrained(plain(), str(tmp_path))
    assert not any(isinstance(m, dora.DoraLinear) for m in loaded.modules())
    close(loaded(x), want)
    close(loaded.merge_and_unload()(x), want)
    close(model.merge_and_unload()(x), want)


def test_switched_off_and_merged():
    model, x = ours(plain()), torch.randn(6, 24, generator=common.stream(0, "x"))
    perturb(model)
    on = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), plain()(x))
    close(merged_copy(model.base_model.model)(x), on)
    model.merge_adapter()
    close(model(x), on)
    model.unmerge_adapter()
    close(model(x), on)
