"""Blocks of the trunk: finite attention, initialisation, compilation."""

import pickle
import subprocess
import sys

import pytest
import torch
from timm.layers import DropPath as PublishedDropPath
from torch import nn

from fourm.models.fm_utils import (
    Attention,
    Block,
    BlockOptions,
    DecoderBlock,
    DropPath,
    LayerNorm,
    Slots,
    attendable,
    init_weights,
)
from fourm.utils.errors import UserError
from tests.models.toy_models import toy_batch, toy_model


def options(**changes):
    return BlockOptions(dim=16, num_heads=2, **changes)


def test_a_norm_without_bias_carries_zeros():
    norm = LayerNorm(4, bias=False)
    assert [*norm.state_dict()] == ["weight", "bias"]
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    assert norm.eps == 1e-6
    assert not norm.bias.any()


@pytest.mark.parametrize("qk_norm", [True, False])
def test_rows_whose_keys_are_all_masked_are_finite_and_their_gradients_too(qk_norm):
    attention = Attention(options(qk_norm=qk_norm))
    x = torch.randn(2, 5, 16, requires_grad=True)
    masked = torch.zeros(2, 5, 5, dtype=torch.bool)
    masked[0, 2] = masked[1] = True
    output = attention(x, attendable(masked))
    output.sum().backward()
    assert output.isfinite().all()
    assert x.grad.isfinite().all()


def test_masked_keys_do_not_matter():
    attention = Attention(options())
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 3 + [True] * 2] * 2)
    changed = torch.cat([x[:, :3], torch.randn(2, 2, 16)], 1)
    before, after = (attention(value, attendable(padding))[:, :3] for value in (x, changed))
    torch.testing.assert_close(before, after)
    torch.testing.assert_close(before, attention(x[:, :3]))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_of_one_sample_after_another_is_that_of_all_slots(qk_norm):
    masked = torch.tensor([[False] * 5, [False] * 2 + [True] * 3, [False] * 4 + [True]])
    index, mask = (~masked).flatten().nonzero().squeeze(1), attendable(masked)
    placed, one_by_one = Slots(index, (3, 5)), Slots(index, (3, 5), lengths=(5, 2, 4))
    rows, y = torch.randn(11, 16), torch.randn(3, 6, 16)
    encoder, decoder = Block(options(qk_norm=qk_norm)), DecoderBlock(options(qk_norm=qk_norm))
    with torch.no_grad():
        torch.testing.assert_close(encoder(rows, None, one_by_one), encoder(rows, mask, placed))
        expected = decoder(y, rows, context_mask=mask, context_slots=placed)
        torch.testing.assert_close(decoder(y, rows, context_slots=one_by_one), expected)


def test_fused_matrices_are_initialised_as_separate_ones():
    block = DecoderBlock(options(gated_mlp=True))
    init_weights(block)
    for linear, fan_out in (
        (block.self_attn.qkv, 16),
        (block.cross_attn.kv, 16),
        (block.cross_attn.q, 16),
        (block.mlp.fc3, 42),
    ):
        bound = (6 / (16 + fan_out)) ** 0.5
        assert 0.9 * bound < linear.weight.abs().max() <= bound
        assert not linear.bias.any()
    assert block.mlp.fc1.out_features == int(2 * 64 / 3)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="num_heads 3"):
        BlockOptions(dim=16, num_heads=3)


@pytest.mark.parametrize("changes", [{}, {"gated_mlp": True, "qk_norm": True, "act_layer": nn.SiLU}])
def test_blocks_compile_without_graph_breaks(changes):
    torch._dynamo.reset()
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    mask, context_mask = attendable(torch.rand(2, 5, 5) > 0.5), attendable(torch.rand(2, 7) > 0.5)
    for block, inputs in (
        (Block(options(**changes)), (x, attendable(torch.rand(2, 5) > 0.5))),
        (DecoderBlock(options(**changes)), (x, context, mask, context_mask)),
    ):
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), block(*inputs))


def test_a_model_of_compiled_blocks_trains_and_keeps_its_names():
    torch._dynamo.reset()
    model, twin = toy_model(), toy_model()
    twin.compile_blocks(fullgraph=True, backend="aot_eager")
    batch = toy_batch(model)
    selection = model.select_tokens(batch, 10, 9)
    losses = [m(batch, 10, 9, selection=selection)[0] for m in (model, twin)]
    torch.testing.assert_close(*losses)
    losses[1].backward()
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert pickle.dumps(twin), "compiled functions are not among its attributes"


@pytest.mark.parametrize("drop_prob", [0.0, 0.3, 1.0])
def test_paths_are_dropped_as_timm_does_it_with_the_same_random_numbers(drop_prob):
    x = torch.randn(64, 3, 4)
    for training in (True, False):
        ours, theirs = (kind(drop_prob).train(training) for kind in (DropPath, PublishedDropPath))
        torch.manual_seed(0)
        found = ours(x)
        torch.manual_seed(0)
        torch.testing.assert_close(found, theirs(x))
        assert str(ours).startswith("DropPath(drop_prob=")


def test_only_who_needs_a_network_of_timm_waits_for_its_import():
    """It imports torchvision and the compiler of torch: with them, every command took twice as long to start."""
    code = (
        "import sys, fourm.train.run, fourm.generation.script, fourm.vq.save_tokens; "
        "print({'timm', 'wandb'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
