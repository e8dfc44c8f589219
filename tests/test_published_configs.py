"""Every shipped YAML file loads together with the files it refers to, and matches the papers."""

from pathlib import Path

import pytest
import yaml

from fourm.data.data_config import load_data_config
from fourm.data.modality_info import MODALITY_INFO
from fourm.models.registry import MODEL_NAMES
from fourm.train.config import load_config
from fourm.train.schedules import run_length
from fourm.train.tasks.pretrain import PretrainConfig

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "cfgs" / "default" / "4m"
MAIN = sorted(PUBLISHED.glob("models/**/*.yaml"))
DATA = sorted(PUBLISHED.glob("data/**/*.yaml"))
ALPHAS = sorted(PUBLISHED.glob("alphas_mixture/**/*.yaml"))

# name: (tokens in, out, blr, batch per GPU, GPUs, clip_grad, activation checkpointing)
MODELS = {
    "main/4m-b_mod7_500b": ((128, 128), (128, 128), 1e-4, 128, 64, None, False),
    "main/4m-l_mod7_500b": ((128, 128), (128, 128), 1e-4, 64, 128, 1e4, False),
    "main/4m-xl_mod7_500b": ((128, 128), (128, 128), 2e-5, 64, 128, 3.0, True),
    "main/4m-b_mod21_500b": ((256, 256), (256, 256), 1e-4, 64, 64, None, False),
    "main/4m-l_mod21_500b": ((256, 256), (256, 256), 1e-4, 64, 64, 1e4, True),
    "main/4m-xl_mod21_500b": ((256, 256), (256, 256), 2e-5, 32, 128, 3.0, True),
    "specialized/4m-b_mod7_500b--spec_text2im_100b": ((64, 256), (256, 256), 1e-4, 128, 64, None, False),
    "specialized/4m-l_mod7_500b--spec_text2im_100b": ((64, 256), (256, 256), 1e-4, 64, 128, 1e4, False),
    "specialized/4m-xl_mod7_500b--spec_text2im_100b": ((64, 256), (256, 256), 2e-5, 32, 128, 3.0, True),
    "superres/4m-l_mod7_500b--sr_448_100b": ((64, 1024), (1024, 1024), 1e-4, 32, 128, 3.0, False),
}
SIZES = {"b": "base_12e_12d", "l": "large_24e_24d", "xl": "xlarge_24e_24d"}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs name files relative to the repository


def ids(paths):
    return [str(path.relative_to(PUBLISHED).with_suffix("")) for path in paths]


def test_every_shipped_config_is_tested():
    assert set(PUBLISHED.rglob("*.yaml")) == {*MAIN, *DATA, *ALPHAS}
    assert set(ids(MAIN)) == {f"models/{name}" for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_main_config_has_the_published_figures_and_valid_data(name):
    (low, high), target, blr, batch, gpus, clip, checkpointing = MODELS[name]
    size = name.split("/4m-")[1].split("_")[0]
    finetuned, long = "mod21" in name or "--" in name, "500b" in name.split("--")[-1]
    config = load_config(PretrainConfig, f"cfgs/default/4m/models/{name}.yaml")
    assert config.model == f"fm_{SIZES[size]}_swiglu_nobias" and config.model in MODEL_NAMES
    assert config.run_name == f"default/4m/models/{name}" and config.output_dir == f"output/{config.run_name}"
    assert (config.num_input_tokens, config.num_target_tokens) == (high, target[1])
    assert (config.min_input_tokens or high) == low
    assert config.blr == blr and config.opt == "adamw" and config.dtype == "bfloat16" and config.loss_type == "mod"
    assert config.batch_size == batch and config.clip_grad == clip and config.use_act_checkpoint is checkpointing
    assert config.total_tokens == (500 if long else 100) and config.epochs == -1 and config.epoch_size == 10_000_000
    short_warmup = "superres" in name or name.startswith("specialized/4m-xl")
    assert config.warmup_tokens == (5 if short_warmup else 10) and config.warmup_epochs == -1
    assert config.skip_nan_grad is (size != "b") and bool(config.finetune) is finetuned
    assert config.eval_freq == config.save_ckpt_freq == 1
    text = Path(f"cfgs/default/4m/models/{name}.yaml").read_text()
    script = "run_training_4m.py" if size == "b" else "run_training_4m_fsdp.py"
    assert f"on each of {gpus} GPUs" in text and f"--nnodes={gpus // 8} --nproc_per_node=8 {script} " in text
    length = run_length(config, world_size=gpus)
    tokens = length.epochs * 10_000_000 * config.tokens_per_sample
    assert config.total_tokens * 1e9 <= tokens < config.total_tokens * 1e9 * 1.1
    data = config.load_data()
    assert data.train["cc12m"].input_tokens_range == (low, high) and data.val


@pytest.mark.parametrize("path", DATA, ids=ids(DATA))
def test_data_config_loads_with_its_alphas(path):
    config = load_data_config(path, num_input_tokens=256, num_target_tokens=256)
    cc12m = config.train["cc12m"]
    assert (cc12m.use_wds, cc12m.wds_n_repeats, cc12m.main_augment_domain) == (True, 4, "rgb@224")
    assert cc12m.wds_shuffle_buffer_tar == cc12m.wds_shuffle_buffer_repeat == 1000
    assert "rgb@224" in config.in_domains and "rgb@224" not in config.out_domains
    assert sum(config.weights.values()) == pytest.approx(1)
    for dataset in config.train.values():
        if dataset.type == "multimodal":
            folders = dataset.data_path.split("[")[1].split("]")[0].split(",")
            assert set(folders) == {m.path for m in dataset.modalities.values()} | {"crop_settings"}


def test_the_21_modality_data_is_the_published_mixture():
    path = PUBLISHED / "data/cc12m+coyo+c4/main/mix_mod21_all2allmix_rgb2all_capT5bias_C4.yaml"
    config = load_data_config(path, num_input_tokens=256, num_target_tokens=256)
    assert config.weights == {"cc12m": 0.6, "coyo700m": 0.2, "c4": 0.2}
    at_224 = {n for n, m in MODALITY_INFO.items() if m.decoder_embedding and not n.endswith("@448")}
    assert set(config.train["cc12m"].out_domains) == at_224
    assert set(config.train["cc12m"].in_domains) == at_224 | {"rgb@224", "t5_caption"}
    assert len(config.train["coyo700m"].modalities) == 8 and config.train["coyo700m"].wds_n_repeats == 1
    assert config.train["c4"].type == "huggingface" and list(config.train["c4"].modalities) == ["caption"]
    assert config.train["cc12m"].sampling_weights == (1, 1, 1, 1, 1, 0.5, 0.5)


MIX = [0.01, 0.1, 1, 10]
# file: {modality, or "*" for all others: (input_alphas, target_alphas, keep)}
EXPECTED = {
    "main/mix_mod7_all2all_rgb2all_a0.5": {
        "rgb@224": ([1000, 0.5], None, None),
        "*": ([0, 0.5], [0.5, 0.5], ["random"] * 2),
    },
    "main/mix_mod7_all2all_rgb2dense_a0.5": {
        "rgb@224": ([1000, 0.5], None, None),
        "caption": ([0, 0.5], [0, 0.5], ["random"] * 2),
        "det": ([0, 0.5], [0, 0.5], ["random"] * 2),
        "*": ([0, 0.5], [0.5, 0.5], None),
    },
    "main/mix_mod7_all2allmix_rgb2all_capbias": {
        "rgb@224": ([*MIX, 1000, 0.05], None, None),
        "caption": ([*MIX, 0, 5], [*MIX, 0.5, 0.5], ["random"] * 5 + ["all"]),
        "*": ([*MIX, 0, 0.05], [*MIX, 0.5, 0.5], ["random"] * 6),
    },
    "main/mix_mod21_all2allmix_rgb2all_capT5bias": {
        "rgb@224": ([*MIX, 1000, 0.05, 0.05], None, None),
        "caption": ([*MIX, 0, 5, 0], [*MIX, 0.5, 0, 0.5], ["random"] * 5 + ["all", "random"]),
        "t5_caption": ([*MIX, 0, 0, 5], None, ["random"] * 6 + ["all"]),
        "color_palette": ([*MIX, 0, 0.05, 0.05], [*MIX, 0.5, 0.5, 0.5], ["binary"] * 7),
        "*": ([*MIX, 0, 0.05, 0.05], [*MIX, 0.5, 0.5, 0.5], ["random"] * 7),
    },
    "specialized/mix_caption_bias_a0.2_a1.0": {
        "rgb@224": ([0.05, 0.2, 1], None, None),
        "caption": ([5, 0.2, 1], [1, 1, 1], ["all", "random", "random"]),
        "*": ([0.05, 0.2, 1], [1, 1, 1], ["random"] * 3),
    },
    "superres/mix_mod7_superres_caption_rgb_bias": {
        "caption": ([0.05, 5, 0.2, 1], None, ["random", "all", "random", "random"]),
        "det": ([0.05, 0.05, 0.2, 1], None, ["random"] * 4),
        "tok_rgb@224": ([5, 0.05, 0.2, 1], None, None),
        "tok_rgb@448": ([5, 0.05, 0.2, 1], [5, 1, 1, 1], None),
        **{
            f"tok_{kind}@448": ([0.05, 0.05, 0.2, 1], [0.05, 1, 1, 1], None)
            for kind in ("clip", "depth", "normal", "semseg")
        },
        "*": ([0.05, 0.05, 0.2, 1], None, None),
    },
}


@pytest.mark.parametrize("path", ALPHAS, ids=ids(ALPHAS))
def test_alphas_are_the_published_ones(path):
    content = yaml.safe_load(path.read_text())
    expected = EXPECTED[str(path.relative_to(PUBLISHED / "alphas_mixture").with_suffix(""))]
    for name, values in content.get("alphas_mixture", content).items():
        if name == "sampling_weights":
            continue
        inputs, targets, keep = expected.get(name, expected["*"])
        assert values["input_alphas"] == inputs, name
        assert values.get("target_alphas") == targets, name
        assert values.get("keep") == (keep if MODALITY_INFO[name].type.startswith("seq") else None), name


@pytest.mark.parametrize("path", sorted((ROOT / "cfgs").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_main_config_finds_its_files(path):
    """This includes the configs for tests and for the demo."""
    content = yaml.safe_load(path.read_text()) or {}
    if "model" in content and "data_config" in content:
        config = load_config(PretrainConfig, path.relative_to(ROOT))
        assert config.load_data().train
        made_by_the_demo = config.text_tokenizer_path.startswith(
            ("demo_run/", "demo21_run/", "model_scenes/", "debug_run/")
        )
        assert made_by_the_demo or Path(config.text_tokenizer_path).is_file(), config.text_tokenizer_path
