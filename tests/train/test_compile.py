"""``--compile``: the same losses, and all blocks of a kind are compiled once in a run.

Most tests compile without generating code (``aot_eager``), which shows the same graphs in a fraction of the time.
"""

import os

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from fourm.models import FM
from fourm.train.fsdp import FSDP
from fourm.train.tasks.pretrain import PretrainConfig
from tests.models.toy_models import SWIGLU, toy_batch, toy_config, toy_model
from tests.train.toy_run import CONTEXT, losses, run_in_process, wait_for, write_run


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one_and_compiles_once(tmp_path):
    model = {"dim": 32, "encoder_depth": 3, "decoder_depth": 3, "num_heads": 2}
    configs = [
        write_run(
            tmp_path / name, model_kwargs=model, epochs=1, warmup_epochs=0, eval_freq=0, dtype="float32", num_workers=0
        )
        for name in ("eager", "compiled")
    ]
    run_in_process(configs[0])
    torch._dynamo.reset()
    counters.clear()
    run_in_process(configs[1], "--compile")
    # Inductor reduces more than 4 096 logits in another way, so the cross-entropy has two graphs.
    assert counters["stats"]["unique_graphs"] == 2 + 2, "batches differ in which tokens they have, not in how many"
    assert not counters["graph_break"]
    expected, actual = (losses(tmp_path / name / "out") for name in ("eager", "compiled"))
    assert list(actual) == list(range(1, 13))
    assert list(actual.values()) == pytest.approx(list(expected.values()), rel=1e-4)


def losses_and_gradients(model, num_inputs):
    """Train for a step on each number of inputs, and return the losses and the last gradients."""
    values = []
    for count in num_inputs:
        model.zero_grad()
        batch = toy_batch(model, inputs=count)
        selection = model.select_tokens(batch, 18, 9, torch.Generator().manual_seed(count))
        loss, _ = model(batch, 18, 9, selection=selection)
        loss.backward()
        values.append(loss.detach())
    return values, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_compiled_blocks_have_a_variant_with_and_one_without_a_mask():
    torch._dynamo.reset()
    model, twin = toy_model(**SWIGLU), toy_model(**SWIGLU)
    twin.compile_blocks(fullgraph=True, backend="aot_eager")
    counters.clear()
    num_inputs = (2, 3, 1, 3, 2)  # of six modalities: three of them fill the 18 slots, fewer leave padding
    torch.testing.assert_close(losses_and_gradients(twin, num_inputs), losses_and_gradients(model, num_inputs))
    assert counters["stats"]["unique_graphs"] == 4 + 1  # the other one is the cross-entropy


def test_the_compiled_cross_entropy_is_one_graph_for_all_numbers_of_targets_and_ids():
    torch._dynamo.reset()
    model = toy_model(**SWIGLU)
    model.compile_blocks(fullgraph=True, backend="aot_eager")
    counters.clear()
    for shape in ((5, 30), (7, 30), (7, 50), (2, 31)):
        logits = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(shape[1], shape[:1])
        actual, expected = model.cross_entropy(logits, targets), model.cross_entropy.forward(logits, targets)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits) for loss in (actual, expected)))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("every", [1, 2])
def test_compiled_blocks_can_be_recomputed(every):
    torch._dynamo.reset()
    model, twin = (toy_model(**SWIGLU, encoder_depth=3, use_act_checkpoint=k) for k in (False, every))
    twin.compile_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(losses_and_gradients(twin, [2, 3]), losses_and_gradients(model, [2, 3]))


def _train_compiled_shards(rank: int, meeting_point: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    strategy = FSDP(PretrainConfig(epochs=1, device="cpu", dtype="float32", dist_url=meeting_point))
    results = []
    for every, compiled in ((False, False), (False, True), (True, True)):
        with torch.device("meta"):
            model = FM(toy_config(**SWIGLU, share_embedding=True, use_act_checkpoint=every))
        if compiled:
            model.compile_blocks(fullgraph=True, backend="aot_eager")
        torch.manual_seed(0)
        strategy.materialise(model, [*model.encoder, *model.decoder])
        assert isinstance(model.mask_token, DTensor)
        values, gradients = losses_and_gradients(strategy.wrap(model), [2 + rank, 3 - rank])
        results.append((values, {name: gradient.full_tensor() for name, gradient in gradients.items()}))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    strategy.close()


@pytest.mark.dist
def test_compiled_shards_have_the_losses_and_gradients_of_eager_ones(tmp_path):
    meeting_point = f"file://{tmp_path}/meeting_point"
    ranks = [CONTEXT.Process(target=_train_compiled_shards, args=(rank, meeting_point)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert wait_for(ranks) == [0, 0]
