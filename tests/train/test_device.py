"""Images are copied to the device in 8 bits, and normalised there exactly as the loader would do it."""

import dataclasses

import numpy as np
import pytest
import torch

from fourm.data.modality_transforms import NormalTransform, PixelTransform, RGBTransform
from fourm.data.unified_datasets import build_eval_loader, build_train_loader
from fourm.train.config import parse_args
from fourm.train.parallel import DDP
from fourm.train.run import Run
from fourm.train.tasks.pretrain import Pretrain, PretrainConfig, normalise, to_device
from tests.train.toy_run import write_run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "transform",
    [RGBTransform(), RGBTransform(imagenet_default_mean_and_std=False), NormalTransform(), PixelTransform()],
    ids=["imagenet", "minus one to one", "normals", "grey"],
)
def test_every_level_of_every_channel_is_normalised_to_the_same_bits(transform):
    levels = np.random.default_rng(0).permuted(np.tile(np.arange(256, dtype=np.uint8), (transform.channels, 1)), axis=1)
    picture = levels.T.reshape(16, 16, -1)
    raw = dataclasses.replace(transform, raw=True)
    pixels = raw.postprocess(picture)
    assert pixels.dtype == raw.empty((16, 16)).dtype == np.uint8 and pixels.flags.c_contiguous
    expected = torch.from_numpy(transform.postprocess(picture))
    assert torch.equal(normalise(torch.from_numpy(pixels)[None], *raw.scaling)[0], expected)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("pixels") / "toys", num_workers=0)
    config = parse_args(PretrainConfig, ["--config", str(path)])
    return Run(Pretrain(config), DDP(config))


def batches(run, raw_pixels, split="train"):
    text = run.task.text_tokenizer
    if split == "val":
        dataset = run.task.data.val["toys"]
        return list(
            build_eval_loader(
                dataset, text, batch_size=4, num_workers=0, rank=0, world_size=1, seed=0, raw_pixels=raw_pixels
            )
        )
    loader = build_train_loader(
        run.task.data,
        text,
        batch_size=4,
        batches_per_epoch=12,
        num_workers=0,
        rank=0,
        world_size=1,
        seed=0,
        raw_pixels=raw_pixels,
    )
    return [batch for batch, _ in zip(loader, range(4), strict=False)]


@pytest.mark.parametrize("split", ["train", "val"])
def test_losses_and_gradients_are_the_same_to_the_last_bit(toy_run, split):
    model = toy_run.trainer.model.eval()
    results = []
    for raw_pixels in (False, True):
        losses, gradients = [], []
        for batch in batches(toy_run, raw_pixels, split):
            assert batch.mod_dict["rgb@32"]["tensor"].dtype == (torch.uint8 if raw_pixels else torch.float32)
            torch.manual_seed(0)
            selection = model.select_tokens(batch.mod_dict, 16, 12)
            assert selection.encoder.counts["rgb@32"]
            mod_dict, selection = to_device(batch, selection, CPU)
            loss, _ = model(mod_dict, 16, 12, selection=selection)
            loss.backward()
            losses.append(loss.item())
            gradients.append(model.encoder_embeddings["rgb@32"].proj.weight.grad.clone())
            model.zero_grad()
        results.append((losses, torch.stack(gradients)))
    assert results[0][0] == results[1][0] and len(set(results[0][0])) > 1
    assert torch.equal(results[0][1], results[1][1]) and results[0][1].any()


def test_training_and_evaluation_send_pictures_in_8_bits(toy_run):
    for batch in (next(toy_run._batches()), next(iter(toy_run.evaluations[0].loader))):
        assert batch.mod_dict["rgb@32"]["tensor"].dtype == torch.uint8


def test_a_sample_without_the_picture_changes_nothing_for_the_others(toy_run):
    """A mixture fills in zeros for what a data set lacks; they must not turn the bytes of the batch into floats."""
    dataset = toy_run.task.data.train["toys"]
    text_only = dataclasses.replace(
        dataset,
        name="text",
        in_domains=("caption",),
        out_domains=("caption",),
        data_path=dataset.data_path,
        modalities={"caption": dataset.modalities["caption"]},
        main_augment_domain=None,
        modality_name_map={},
    )
    mixture = dataclasses.replace(
        toy_run.task.data, train={"toys": dataset, "text": text_only}, weights={"toys": 0.5, "text": 0.5}
    )
    options = {
        "batch_size": 16,
        "batches_per_epoch": 4,
        "num_workers": 0,
        "rank": 0,
        "world_size": 1,
        "seed": 0,
    }
    floats, raw = (
        next(iter(build_train_loader(mixture, toy_run.task.text_tokenizer, **options, raw_pixels=value)))
        for value in (False, True)
    )
    assert raw.mod_dict["rgb@32"]["tensor"].dtype == torch.uint8
    seen = ~floats.mod_dict["rgb@32"]["input_mask"].all(1)
    assert 0 < seen.sum() < 16
    selection = toy_run.trainer.model.select_tokens(raw.mod_dict, 16, 12)
    mod_dict, _ = to_device(raw, selection, CPU)
    assert torch.equal(mod_dict["rgb@32"]["tensor"][seen], floats.mod_dict["rgb@32"]["tensor"][seen])
