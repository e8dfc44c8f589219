"""A step never waits for the device: the host decides beforehand which tokens are used (token_selection)."""

import sys

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fourm.train.config import parse_args
from fourm.train.parallel import DDP
from fourm.train.run import Run
from fourm.train.tasks.pretrain import Pretrain, PretrainConfig
from tests.train.toy_run import write_run

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "bincount"}
BY_MASK = {"index", "index_put", "index_put_", "_unsafe_index"}


def within(name: str) -> bool:
    """Whether a function of this name is being called."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None


class Waits(TorchDispatchMode):
    """Collects the operations that would wait for a GPU, except for the selection of tokens, which runs on the host."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in BY_MASK and any(t is not None and t.dtype == torch.bool for t in args[1])
        if (name in WAITS or by_mask) and not within("select_tokens"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Masks(TorchFunctionMode):
    """Collects the attention masks."""

    def __init__(self):
        super().__init__()
        self.masks: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.masks.append(kwargs["attn_mask"])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def trainer_and_batches(tmp_path, request):
    opt = getattr(request, "param", "adamw")
    model = {"dim": 32, "encoder_depth": 2, "decoder_depth": 3, "num_heads": 2}
    path = write_run(
        tmp_path / "toys",
        num_workers=0,
        accum_iter=2,
        skip_grad=100.0,
        skip_nan_grad=True,
        model_kwargs=model,
        opt=opt,
    )
    config = parse_args(PretrainConfig, ["--config", str(path)])
    run = Run(Pretrain(config), DDP(config))
    batches = run._batches()
    return run.trainer, [next(batches), next(batches)]


@pytest.mark.parametrize(
    ("trainer_and_batches", "loss_type"),
    [("adamw", "mod"), ("adamw", "token"), ("muon", "mod")],
    indirect=["trainer_and_batches"],
)
def test_nothing_of_a_step_waits_for_the_device(trainer_and_batches, loss_type):
    trainer, batches = trainer_and_batches
    object.__setattr__(trainer.config, "loss_type", loss_type)
    with Waits() as waits:
        trainer.train_step(batches)
    assert waits.names == []
    with Waits() as waits:  # it does notice operations that wait
        mask = torch.tensor([True, False])
        assert (mask.float()[mask].sum() > 0).item()
    assert waits.names == ["index", "_local_scalar_dense"]


def test_masks_are_made_once_a_step_and_never_for_each_head(trainer_and_batches):
    trainer, batches = trainer_and_batches
    with Masks() as masks:
        trainer.train_step(batches[:1])
    n, m = masks.masks[0].shape[-1], masks.masks[2].shape[-1]
    assert n <= 16 and m <= 12, "slots that are padding in all samples are left out"
    # 2 encoder blocks, 3 decoder blocks of self- and cross-attention
    assert [tuple(mask.shape) for mask in masks.masks] == [(4, 1, 1, n)] * 2 + [(4, 1, m, m), (4, 1, 1, n)] * 3
    assert all(mask.is_floating_point() for mask in masks.masks), "a bool mask is converted in every block"
    assert len({mask.data_ptr() for mask in masks.masks[2:]}) == 2, "all decoder blocks share theirs"


def test_logits_are_computed_for_targets_only(trainer_and_batches):
    trainer, batches = trainer_and_batches
    rows = {}
    for name, embedding in trainer.model.decoder_embeddings.items():
        embedding.to_logits.register_forward_hook(lambda _, inputs, out, name=name: rows.update({name: len(out)}))
    trainer.train_step(batches[:1])
    targets = trainer.interval.state()["counts"]["targets"]
    assert rows == {name: targets[name] for name in rows} and 0 < sum(rows.values()) <= 4 * 12
