"""Packed batches, in which every process has its own number of tokens, train two processes as they train one."""

import os

import pytest
import torch
from torch.distributed.tensor import DTensor

from fourm.models import FM
from fourm.train.fsdp import FSDP
from fourm.train.parallel import DDP
from fourm.train.tasks.pretrain import PretrainConfig
from tests.models.toy_models import SWIGLU, toy_batch, toy_config
from tests.train.toy_run import CONTEXT, wait_for

CONFIG = toy_config(**SWIGLU, share_embedding=True, num_register_tokens=1, use_act_checkpoint=2)
SLOTS = (18, 16)
PACKED = {0: (True, True), 1: (False, False), 2: (True, True), 3: (True, True)}  # by 2 · step + rank


def _loss(model, wrapped, seed):
    """Return the loss of a batch, of which one sample lacks some modalities unless nothing is to be packed."""
    batch = toy_batch(model, seed=seed)
    if PACKED[seed][0]:
        for name in ("pixels", "text", "codes", "global")[: 2 + seed % 3]:
            batch[name]["input_mask"][seed % 3] = batch[name]["target_mask"][seed % 3] = True
    selection = model.select_tokens(batch, *SLOTS, torch.Generator().manual_seed(seed), pack=True)
    assert (selection.encoder.packed, selection.decoder.packed) == PACKED[seed]
    return wrapped(batch, *SLOTS, selection=selection)[0]


def _train(rank: int, folder: str, strategy: type[DDP]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    meeting_point = f"file://{folder}/meeting_point"
    parallel = strategy(PretrainConfig(epochs=1, device="cpu", dtype="float32", dist_url=meeting_point))
    with torch.device("meta"):
        model = FM(CONFIG)
    torch.manual_seed(0)
    parallel.materialise(model, [*model.encoder, *model.decoder])
    optimizer, wrapped, losses = torch.optim.SGD(model.parameters(), lr=0.1), parallel.wrap(model), []
    for step in range(2):
        loss = _loss(model, wrapped, 2 * step + rank)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in model.named_parameters()}
    torch.save({"losses": losses, "weights": weights}, f"{folder}/{rank}.pt")
    parallel.close()


@pytest.mark.dist
@pytest.mark.parametrize("strategy", [DDP, FSDP])
def test_two_processes_have_the_losses_and_weights_of_one(tmp_path, strategy):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = FM(CONFIG)
    model.to_empty(device="cpu").init_weights()
    optimizer, expected = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(2):
        losses = [_loss(model, model, 2 * step + rank) for rank in range(2)]
        (sum(losses) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append([loss.detach() for loss in losses])
    ranks = [CONTEXT.Process(target=_train, args=(rank, str(tmp_path), strategy)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert wait_for(ranks) == [0, 0]
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(result["losses"], [losses[rank] for losses in expected], rtol=1e-5, atol=0)
        torch.testing.assert_close(result["weights"], {name: p.detach() for name, p in model.named_parameters()})
