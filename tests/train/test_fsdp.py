"""The shards of a model that each process holds."""

import os

import pytest
import torch
from torch.distributed.tensor import DTensor

from fourm.models import FM
from fourm.train.fsdp import FSDP
from fourm.train.tasks.pretrain import PretrainConfig
from tests.models.toy_models import SWIGLU, toy_config
from tests.train.toy_run import CONTEXT, wait_for

CONFIG = toy_config(**SWIGLU, share_embedding=True, num_register_tokens=2)


def _check_shards(rank: int, meeting_point: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    strategy = FSDP(PretrainConfig(epochs=1, device="cpu", dtype="float32", dist_url=meeting_point))
    with torch.device("meta"):
        model = FM(CONFIG)
        expected = FM(CONFIG)
    torch.manual_seed(3)
    expected.to_empty(device="cpu").init_weights()
    torch.manual_seed(3)
    strategy.materialise(model, [*model.encoder_embeddings.text.children(), *model.encoder, *model.decoder])
    parameters, wanted = dict(model.named_parameters()), dict(expected.named_parameters())
    assert parameters.keys() == wanted.keys(), "ties are kept"
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor), name
        assert torch.equal(parameter.full_tensor(), wanted[name]), name
    for name, buffer in expected.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    held, total = (
        sum(map(torch.Tensor.numel, ts)) for ts in ([p.to_local() for p in parameters.values()], wanted.values())
    )
    assert 0.45 * total < held < 0.55 * total
    assert model.decoder_embeddings["text"].to_logits.weight is model.decoder_embeddings["text"].token_emb.weight
    assert model.decoder_embeddings["grid"].mod_emb is model.encoder_embeddings["grid"].mod_emb
    strategy.close()


@pytest.mark.dist
def test_every_process_holds_its_half_of_the_unsharded_initialisation(tmp_path):
    meeting_point = f"file://{tmp_path}/meeting_point"
    ranks = [CONTEXT.Process(target=_check_shards, args=(rank, meeting_point)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert wait_for(ranks) == [0, 0]
