"""Two processes whose batches have different modalities do not wait for missing gradients."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.models.toy_models import toy_batch, toy_model
from tests.train.toy_run import wait_for
from tests.warm_python import CONTEXT


def _step(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = toy_model(share_embedding=True)
    parallel = DistributedDataParallel(model)
    for step in range(2):  # the second forward raises if the first left a parameter without gradient
        batch = toy_batch(model, seed=2 * step + rank)
        for name in (["text", "global"], ["grid", "pixels", "vectors"])[rank]:
            batch[name]["input_mask"][:] = batch[name]["target_mask"][:] = True
        del batch["codes"]
        parallel(batch, 10, 9)[0].backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_ddp_needs_no_search_for_unused_parameters(tmp_path):
    ranks = [CONTEXT.Process(target=_step, args=(rank, str(tmp_path))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert wait_for(ranks) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], msg=name)
    assert first["decoder_embeddings.text.token_emb.weight"].any()
    assert first["decoder_embeddings.grid.token_emb.weight"].any()
