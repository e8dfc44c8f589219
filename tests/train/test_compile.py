"""``--compile``: the same losses, and one compilation each for all encoder and for all decoder blocks of a run."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.train.toy_run import losses, run_in_process, write_run


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
    assert counters["stats"]["unique_graphs"] == 2, "batches differ in which tokens they have, not in how many"
    assert not counters["graph_break"]
    expected, actual = (losses(tmp_path / name / "out") for name in ("eager", "compiled"))
    assert list(actual) == list(range(1, 13))
    assert list(actual.values()) == pytest.approx(list(expected.values()), rel=1e-4)
