"""Packed weights give the results of plain ones, follow every change of them, and are used only where they can be."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fourm.generation.packed_linear import PackedLinears, supported

pytestmark = pytest.mark.skipif(not supported(), reason="oneDNN cannot pack weights here")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16, bias=False))


@torch.inference_mode()
def run(packed, model, x, times=2):
    for _ in range(times):
        with packed.applied(model):
            y = model(x)
    return y


@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (3, 5, 24), (2, 0, 24)])
def test_results_are_those_of_plain_weights(model, shape):
    packed, x = PackedLinears(), torch.randn(shape)
    assert torch.allclose(run(packed, model, x), model(x), atol=1e-6)
    if x.numel():
        assert packed.nbytes == 4 * (24 * 40 + 40 * 16)
    assert all("forward" not in vars(layer) for layer in model), "the methods are restored"


@pytest.mark.parametrize("shape", [(2, 24), (2, 1, 24), (1, 2, 24)])
def test_two_rows_need_no_copy(model, shape):
    packed, x = PackedLinears(), torch.randn(shape)
    y = run(packed, model, x)
    assert torch.allclose(y, model(x), atol=1e-6) and y.is_contiguous() and packed.nbytes == 0


def test_one_row_and_several_rows_have_copies_of_their_own(model):
    packed, one, several = PackedLinears(), torch.randn(1, 24), torch.randn(5, 24)
    for x in (one, several, one):
        assert torch.allclose(run(packed, model, x), model(x), atol=1e-6)
    first, last = 4 * 24 * 40, 4 * 40 * 16
    assert packed.nbytes == 2 * first + last, "a layer that narrows has one order for all numbers of rows"
    with torch.no_grad():
        model[0].weight.zero_()
    packed.check()
    for x in (one, several):
        assert torch.allclose(run(packed, model, x, times=1), model(x), atol=1e-6)


def test_a_layer_is_packed_when_it_is_used_again(model):
    packed, x = PackedLinears(), torch.randn(3, 24)
    run(packed, model, x, times=1)
    assert packed.nbytes == 0
    run(packed, model, x, times=1)
    assert packed.nbytes > 0


def by_an_optimizer(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()


def behind_its_back(weight):
    weight.data[0] += 1


def by_replacing(weight):
    weight.data = weight.data * 2


@pytest.mark.parametrize("change", [by_an_optimizer, behind_its_back, by_replacing])
def test_changed_weights_are_packed_again(model, change):
    packed, x = PackedLinears(), torch.randn(3, 24)
    before = run(packed, model, x)
    change(model[0].weight)
    packed.check()
    after = run(packed, model, x, times=1)
    assert torch.allclose(after, model(x), atol=1e-5) and not torch.allclose(after, before)


def test_memory_is_limited(model):
    packed, x = PackedLinears(), torch.randn(3, 24)
    packed.limit = 4 * 24 * 40
    assert torch.allclose(run(packed, model, x), model(x), atol=1e-6)
    assert packed.nbytes == packed.limit


def test_other_precisions_and_compiled_models_keep_plain_weights(model):
    half, compiled, autocast = (PackedLinears() for _ in range(3))
    x = torch.randn(3, 24)
    run(half, copy.deepcopy(model).bfloat16(), x.bfloat16())
    twin = copy.deepcopy(model)
    twin[0].compile(backend="eager")
    run(compiled, twin, x)
    with torch.autocast("cpu", torch.bfloat16):
        run(autocast, model, x)
    assert (half.nbytes, compiled.nbytes, autocast.nbytes) == (0, 0, 0)


def test_an_error_restores_the_methods(model):
    with pytest.raises(ZeroDivisionError), PackedLinears().applied(model):
        1 / 0  # noqa: B018
    assert torch.equal(model[0](torch.ones(24)), F.linear(torch.ones(24), model[0].weight, model[0].bias))
