"""What stands in for PEFT's and PyTorch's own code computes the same: LoRA layers and matrix products."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn

from rlhf_recipes.models.lora import LeanLoraLinear, use_lean_lora


def peft_model(dtype, dropout=0.0, bias=True):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 5, bias=bias)).to(dtype)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"], lora_dropout=dropout)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model


def outputs_and_gradients(model, x):
    x = x.clone().requires_grad_(True)
    y = model(x)
    y.float().square().sum().backward()
    return [y, x.grad, *[p.grad for p in model.parameters() if p.requires_grad]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_lean_lora_is_pefts(dtype, bias):
    theirs, ours = peft_model(dtype, bias=bias), peft_model(dtype, bias=bias)
    use_lean_lora(ours)
    assert sum(type(m) is LeanLoraLinear for m in ours.modules()) == 2
    x = torch.randn(4, 7, 6, dtype=dtype)
    for mine, plain in zip(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x), strict=True):
        assert mine.dtype == plain.dtype
        assert (mine - plain).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * plain.norm()


def test_lean_lora_gradients_by_finite_differences():
    model = peft_model(torch.float64)
    use_lean_lora(model)
    for module in model.modules():
        if isinstance(module, lora.Linear):
            module.to(torch.float64)
    layer = next(m for m in model.modules() if isinstance(m, LeanLoraLinear))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    assert torch.autograd.gradcheck(lambda *_: layer(x.detach()), (a, b))


def test_lean_lora_leaves_to_peft_what_is_pefts():
    """Adapters off, merged, dropout in training, two adapters at once, autocast."""
    x = torch.randn(4, 6)
    ours, theirs = peft_model(torch.float32), peft_model(torch.float32)
    use_lean_lora(ours)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
    for model in (ours, theirs):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    other = {n: p for n, p in theirs.named_parameters() if "other" in n}
    for name, parameter in ours.named_parameters():
        if "other" in name:
            parameter.data = other[name].data
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    assert torch.equal(ours(x), theirs(x))
    merged = copy.deepcopy(ours).merge_and_unload()
    torch.testing.assert_close(merged(x), ours(x))
    ours, theirs = peft_model(torch.float32, dropout=0.5), peft_model(torch.float32, dropout=0.5)
    use_lean_lora(ours)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        results.append(model.train()(x))
    assert torch.equal(*results)


MATMUL = """
import torch
from rlhf_recipes.models.matmul import use_onednn_on_amd
if not use_onednn_on_amd():
    print("not here")
    raise SystemExit
for dtype in (torch.float32, torch.float64, torch.int64, torch.bfloat16):
    for m, k, n in [(0, 5, 6), (5, 0, 6), (1, 5000, 7), (70, 80, 90), (5000, 1, 2), (300, 300, 1), (1, 300, 300), (2, 3, 4)]:
        a, b = torch.randn(m, k).mul(5).to(dtype), torch.randn(n, k).mul(5).to(dtype).t()
        for x in (a, a.t().contiguous().t(), torch.cat([a, a], 1)[:, :k]):
            for y in (b, b.contiguous()):
                plain = torch.addmm(torch.empty(m, n, dtype=dtype), x, y, beta=0)
                torch.testing.assert_close(torch.mm(x, y), plain, atol=1e-3, rtol=1e-2)
                torch.testing.assert_close(torch.mm(x, y, out=torch.empty(m, n, dtype=dtype)), plain, atol=1e-3, rtol=1e-2)
a, b = (torch.randn(*shape, requires_grad=True) for shape in ((90, 80), (80, 70)))
(a @ b).square().sum().backward()
torch.testing.assert_close(a.grad, 2 * (a @ b) @ b.t())
torch.testing.assert_close(b.grad, 2 * a.t() @ (a @ b))
assert torch.equal(a @ b, a @ b)
try:
    torch.mm(torch.randn(100, 100), torch.randn(90, 100))
except RuntimeError as error:
    assert "cannot be multiplied" in str(error)
print("equal")
"""


def test_onednns_products_are_the_same():
    """In a process of its own, whose kernel is replaced for good."""
    done = subprocess.run([sys.executable, "-c", MATMUL], capture_output=True, text=True)
    assert done.stdout.strip() in ("equal", "not here"), done.stderr
