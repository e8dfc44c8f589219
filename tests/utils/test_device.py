"""Which device a process uses, and the error if there is none."""

import pytest
import torch

from fourm.utils.device import choose_device, share_gpus
from fourm.utils.errors import UserError

GPUS = torch.cuda.device_count()


def test_auto_is_a_gpu_if_there_is_one():
    assert choose_device("auto").type == ("cuda" if GPUS else "cpu")
    assert choose_device("cpu", local_rank=3) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cpu:x", "", "mps:9", f"cuda:{GPUS}"])
def test_a_missing_device_is_reported_in_one_line(name):
    with pytest.raises(UserError, match=f"^device '{name}' cannot be used") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


def test_a_process_without_a_gpu_of_its_own_is_an_error():
    with pytest.raises(UserError, match=f"GPU {GPUS} is needed, but torch sees {GPUS} GPUs"):
        choose_device("cuda", local_rank=GPUS)


def test_without_gpus_there_is_nothing_to_share():
    share_gpus(GPUS + 2)  # must not fail without a GPU
    if GPUS:
        assert torch.cuda.current_device() == 2 % GPUS


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="needs a CUDA device")
def test_the_gpu_of_a_process_is_that_of_its_rank():
    share_gpus(GPUS - 1)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", GPUS - 1), "the current one"
    assert choose_device("cuda", local_rank=0) == choose_device("cuda:0", local_rank=5) == torch.device("cuda", 0)
