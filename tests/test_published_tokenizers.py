"""Every shipped YAML of a tokenizer loads, says what the published one says, builds its model, and trains at toy size."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fourm.train.config import load_config
from fourm.train.schedules import build_schedule, run_length
from fourm.train.tasks.diffusion_tokenizer import DiVAETraining, VQControlNetTraining
from fourm.train.tasks.tokenizer import VQVAETraining
from fourm.utils.errors import UserError
from tests.train.tokenizer_data import picture
from tests.train.toy_run import run_in_process
from tests.vq.stable_diffusion import write_stable_diffusion

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "cfgs" / "default" / "tokenization"
PATHS = sorted(FOLDER.rglob("*.yaml"))
TASKS = {"vqvae": VQVAETraining, "divae": DiVAETraining, "vqcontrolnet": VQControlNetTraining}
UNET, GLOBAL = "ViTB-UNetP4", "BMLP1024-BMLP1024_8k"
# name: epochs, batch, blr, warm-up (epochs or steps), dtype, EMA, loss, sizes, their step, P, K, L
STAGES = {
    f"divae/rgb/{UNET}_16k_224_predx0": (50, 64, 1e-4, "5 ep", "fp16", 0.9999, "mse", (224, 224), 32, 16, 16384, 32),
    f"divae/rgb/{UNET}_16k_224-448": (5, 16, 5e-5, "1 ep", "fp16", 0.9999, "mse", (224, 448), 32, 16, 16384, 32),
    f"divae/depth/{UNET}_8k_224_predx0": (20, 64, 1e-4, "5 ep", "fp16", 0.9999, "smooth_l1", (224, 224), 32, 16, 8192, 32),
    f"divae/depth/{UNET}_8k_224-448": (1, 16, 1e-4, "5000 st", "fp16", 0.9999, "smooth_l1", (224, 448), 32, 16, 8192, 32),
    f"divae/normal/{UNET}_8k_224_predx0": (20, 64, 1e-4, "5 ep", "fp16", 0.9999, "mse", (224, 224), 32, 16, 8192, 32),
    f"divae/normal/{UNET}_8k_224-448": (1, 16, 5e-5, "5000 st", "fp16", 0.9999, "mse", (224, 448), 32, 16, 8192, 32),
    f"divae/canny_edge/{UNET}_8k_224_predx0": (50, 64, 5e-5, "5 ep", "fp16", 0.9999, "smooth_l1", (224, 224), 32, 16, 8192, 32),
    f"divae/canny_edge/{UNET}_8k_224-448": (1, 64, 5e-5, "5000 st", "fp16", 0.9999, "smooth_l1", (224, 448), 32, 16, 8192, 32),
    "divae/rgb/ViTB-UViTB_1k_224_predv_frozenenc": (50, 64, 1e-4, "5 ep", "fp16", 0.9999, "mse", (224, 224), 16, 16, 1024, 32),
    "divae/rgb/ViTB-UViTB_1k_224-448": (5, 8, 5e-5, "1 ep", "fp16", 0.9999, "mse", (224, 448), 16, 16, 1024, 32),
    "vqcontrolnet/rgb/ViTB-SD1.5_1k_224": (10, 16, 1.6e-4, "1 ep", "bf16", None, "mse", (224, 224), 16, 16, 1024, 32),
    "vqcontrolnet/rgb/ViTB-SD1.5_1k_224-448": (5, 16, 1.6e-4, "1 ep", "bf16", None, "mse", (224, 448), 16, 16, 1024, 32),
    "vqvae/rgb/ViTB-ViTB_1k_224_CLIPB16-5.0": (50, 64, 1e-4, "5 ep", "bf16", 0.99, "mse", (224, 224), 16, 16, 1024, 32),
    "vqvae/rgb/ViTB-ViTB_1k_224-448_CLIPB16-5.0": (1, 16, 5e-5, "5000 st", "bf16", 0.99, "mse", (224, 448), 16, 16, 1024, 32),
    "vqvae/semseg_coco/ViTB-ViTB_4k_224": (20, 80, 1e-4, "5 ep", "bf16", 0.99, "cross_entropy", (224, 224), 16, 16, 4096, 32),
    "vqvae/semseg_coco/ViTB-ViTB_4k_224-448": (1, 10, 5e-5, "5000 st", "bf16", 0.99, "cross_entropy", (224, 448), 16, 16, 4096, 32),
    "vqvae/CLIP-B16/ViTB-ViTB_8k_224": (20, 128, 1e-4, "5 ep", "bf16", 0.99, "smooth_l1", (224, 224), 16, 16, 8192, 32),
    "vqvae/CLIP-B16/ViTB-ViTB_8k_224-448": (1, 16, 5e-5, "5000 st", "bf16", 0.99, "smooth_l1", (224, 448), 16, 16, 8192, 32),
    "vqvae/DINOv2-B14/ViTB-ViTB_8k_224": (20, 64, 1e-4, "5 ep", "bf16", 0.99, "smooth_l1", (224, 224), 16, 14, 8192, 32),
    "vqvae/DINOv2-B14/ViTB-ViTB_8k_224-448": (1, 16, 5e-5, "5000 st", "bf16", 0.99, "smooth_l1", (224, 448), 14, 14, 8192, 32),
    "vqvae/ImageBind-H14/ViTB-ViTB_8k_224": (20, 128, 1e-4, "5 ep", "bf16", 0.99, "smooth_l1", (224, 224), 16, 14, 8192, 32),
    "vqvae/ImageBind-H14/ViTB-ViTB_8k_224-448": (1, 16, 5e-5, "5000 st", "bf16", 0.99, "smooth_l1", (224, 448), 14, 14, 8192, 32),
    f"vqvae/DINOv2-B14-global/{GLOBAL}_224": (15, 64, 1e-4, "5 ep", "bf16", 0.99, "cosine_1d", (224, 224), 14, 14, 8192, 1024),
    f"vqvae/DINOv2-B14-global/{GLOBAL}_224-448": (1, 16, 1e-4, "0 ep", "bf16", 0.99, "cosine_1d", (224, 448), 14, 14, 8192, 1024),
    f"vqvae/ImageBind-H14-global/{GLOBAL}_224": (15, 64, 1e-4, "5 ep", "bf16", 0.99, "cosine_1d", (224, 224), 14, 14, 8192, 1024),
    f"vqvae/ImageBind-H14-global/{GLOBAL}_224-448": (1, 16, 1e-4, "0 ep", "bf16", 0.99, "cosine_1d", (224, 448), 14, 14, 8192, 1024),
    "vqvae/human_poses/BMLP1024-BMLP1024_1k_224": (15, 64, 1e-4, "1 ep", "bf16", 0.99, "smooth_l1", None, None, None, 1024, 1024),
    "vqvae/sam_instance/ViTB-ViTB_1k_224_64": (24, 384, 1e-4, "5 ep", "fp16", None, "binary_cross_entropy", None, None, 16, 1024, 1024),
}  # fmt: skip
SHAPES = {"CLIP-B16": (512, 16), "DINOv2-B14": (768, 14), "ImageBind-H14": (1280, 14)}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs name files from here


def name_of(path):
    return path.relative_to(FOLDER).with_suffix("").as_posix()


def task_of(name):
    return TASKS[name.split("/")[0]]


def load(name):
    return load_config(task_of(name).config_class, f"cfgs/default/tokenization/{name}.yaml")


def test_nothing_is_shipped_that_no_test_loads():
    assert {name_of(path) for path in PATHS} == set(STAGES) and len(STAGES) == 28


@pytest.mark.parametrize("name", STAGES)
def test_it_has_the_published_figures(name):
    epochs, batch, blr, warmup, dtype, ema, loss, sizes, step, patch, codes, width = STAGES[name]
    config = load(name)
    assert config.run_name == f"default/tokenization/{name}" and config.output_dir == f"output/{config.run_name}"
    assert (config.epochs, config.batch_size, config.blr, config.dtype) == (epochs, batch, blr, dtype)
    number, unit = warmup.split()
    assert {"ep": config.warmup_epochs, "st": config.warmup_steps}[unit] == int(number)
    assert (config.model_ema_decay if config.model_ema else None) == ema
    assert (config.loss_fn, config.codebook_size, config.latent_dim) == (loss, codes, width)
    assert config.opt_betas == (0.9, 0.99) and config.clip_grad == 1 and config.weight_decay == 0.05
    if sizes:
        assert (config.input_size_min, config.input_size_max) == sizes and config.resolution_step == step
    assert patch is None or config.patch_size == patch
    assert config.step_eval and config.eval_freq in (2000, 5000, 10000)
    second = "224-448" in name
    assert bool(config.full_ckpt) == (second or "frozenenc" in name or "SD1.5" in name)
    if config.full_ckpt:
        first = config.full_ckpt.removeprefix("output/default/tokenization/")
        assert first in STAGES and load(first).codebook_size == codes
    if config.quantizer_type == "lucid":
        assert (config.quantizer_ema_decay, config.coef_ema_dead_code, config.commitment_weight) == (0.99, 32, 1)
    else:
        assert config.num_codebooks == 8
    script = f"run_training_{name.split('/')[0]}.py"
    assert f"{script} --config cfgs/default/tokenization/{name}.yaml" in (FOLDER / f"{name}.yaml").read_text()
    length = run_length(
        load_config(type(config), f"cfgs/default/tokenization/{name}.yaml", {"epoch_size": 10_000_000}), 8
    )
    build_schedule(config, length, 8)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("stable-diffusion"))


@pytest.mark.parametrize("name", STAGES)
def test_its_model_is_the_published_one(name, stable_diffusion):
    changes = {"epoch_size": 10**7, "plan": True} | ({"sd_path": stable_diffusion} if "SD1.5" in name else {})
    config = load_config(task_of(name).config_class, f"cfgs/default/tokenization/{name}.yaml", changes)
    task = task_of(name)(config)
    model = task.build_model()
    assert all(tensor.is_meta or tensor_name.endswith("levels") for tensor_name, tensor in model.state_dict().items())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    published = {
        "UNet": 288e6,
        "UViT": 219e6,
        "semseg": 220e6,
        "CLIP-B16": 182e6,
        "sam": 183e6,
        "global": 116e6,
        "poses": 107e6,
    }
    expected = next((count for part, count in published.items() if part in name), None)
    if expected and "global" not in name:
        assert parameters == pytest.approx(expected, rel=0.03)
    if "SD1.5" in name:
        assert (model.image_size, model.image_size_enc, model.image_size_sd) == (config.input_size_max, 224, 512)
        trained = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {"controlnet"} and model.config["freeze_enc"]
    assert task.config.epoch_size == 10**7 and task.blocks(model)


def write_domain(folder, domain, reads):
    """Four files of a domain below ``train`` and ``val``."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        place = folder / split / reads / "0"
        place.mkdir(parents=True)
        for index in range(4):
            image = picture(rng)
            if reads == "depth":
                Image.fromarray(rng.integers(1, 2**16, (40, 40)).astype(np.uint16)).save(place / f"{index}.png")
            elif reads in ("canny_edge", "semseg_coco"):
                image = (
                    image.convert("L")
                    if reads == "canny_edge"
                    else Image.fromarray(rng.choice([0, 132, 255], (40, 40)).astype(np.uint8))
                )
                image.save(place / f"{index}.png")
            elif reads == "sam_mask":
                outline = [[0, 0], [30, 5], [20, 30]]
                (place / f"{index}.json").write_text(json.dumps([outline, {"points": outline}]))
            elif reads in ("rgb", "normal"):
                image.save(place / f"{index}.png")
            else:
                shape = {"human_poses": (23, 3, 3)}.get(reads) or (
                    SHAPES[reads.removesuffix("-global")][0],
                    *([1, 1] if "global" in reads else [2, 2]),
                )
                np.save(place / f"{index}.npy", rng.standard_normal(shape).astype(np.float32))
    return folder


@pytest.mark.parametrize("name", [name for name in STAGES if "SD1.5" in name or "224-448" not in name])
def test_it_trains_at_toy_size(name, tmp_path, stable_diffusion):
    config = load(name)
    domain, task = config.domain, task_of(name)
    keys = {
        "data_path": f"{tmp_path}/train", "eval_data_path": f"{tmp_path}/val", "output_dir": f"{tmp_path}/out",
        "device": "cpu", "num_workers": 0, "batch_size": 2, "full_ckpt": "", "dtype": "float32", "codebook_size": 16, "find_unused_params": False,
        "sd_path": stable_diffusion, "input_size_sd": 32, "num_eval_timesteps": 2, "warmup_epochs": 0, "warmup_steps": -1, "percept_loss_weight": 0.0,
    }  # fmt: skip
    patch = config.patch_size
    keys |= {
        "input_size_min": 2 * patch,
        "input_size_max": 2 * patch,
        "mask_size": 2 * patch,
        "input_size_eval": 2 * patch,
    }
    if "MLP" in config.encoder_type:
        keys |= {"encoder_type": "BottleneckMLP/B_1-Wi_32", "decoder_type": "BottleneckMLP/B_1-Wi_32", "latent_dim": 32}
    else:
        keys |= {"encoder_type": "vit/B_1-Wi_32-H_2", "latent_dim": 8, "input_size_enc": 2 * patch}
        small = {"unet_patched": "unet_patched/Wi_32", "vit_b_dec": "vit/B_1-Wi_32-H_2"}
        if "SD1.5" not in name:
            keys["decoder_type"] = small.get(config.decoder_type, config.decoder_type)
    if config.domain_info.kind in ("map", "vector") and domain != "human_poses":
        keys["feature_network"] = "none"
    write_domain(tmp_path, domain, domain)
    known = set(vars(config))
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    main = tmp_path / "main.yaml"
    main.write_text(yaml.safe_dump(content | {key: value for key, value in keys.items() if key in known}))
    logged = run_in_process(main, "--dry_run", task=task)
    assert "dry run: one step, loss " in logged and "nan" not in logged.split("dry run")[1]


@pytest.mark.parametrize("name", ["vqvae/rgb/ViTB-ViTB_1k_224_CLIPB16-5.0", f"divae/rgb/{UNET}_16k_224_predx0"])
def test_a_plan_needs_no_data(name, capsys):
    logged = run_in_process(FOLDER / f"{name}.yaml", "--plan", "--epoch_size", 10**7, task=task_of(name))
    assert "parameters of the blocks" in logged and "not known" not in logged


def test_a_misspelt_key_names_the_nearest():
    with pytest.raises(UserError, match="unknown key 'coef_ema_dead_codes' \\(did you mean 'coef_ema_dead_code'\\?\\)"):
        load_config(VQVAETraining.config_class, None, {"coef_ema_dead_codes": 32})
