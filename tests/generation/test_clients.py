"""The calls of the published notebooks and of the demo sampler run on stand-ins of the published models."""

import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer

from fourm.data.modality_info import MODALITY_INFO
from fourm.data.modality_transforms import (
    MetadataTransform,
    RGBTransform,
    get_transform_key,
    get_transform_resolution,
)
from fourm.demo_4M_sampler import Demo4MSampler, img_from_url
from fourm.models.fm import FM
from fourm.models.generate import (
    GenerationSampler,
    build_chained_generation_schedules,
    custom_text,
    expand_to_batch,
    init_empty_target_modality,
    init_full_input_modality,
)
from fourm.utils import denormalize, plotting_utils
from fourm.utils.errors import UserError
from fourm.utils.plotting_utils import decode_dict
from fourm.vq.vqvae import VQVAE, DiVAE
from tests.generation.stand_ins import HUB, ROOT, TOKENIZERS, write_model, write_tokenizer

VOCABULARY = "./fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json"
KEYS = {
    "tok_rgb": "rgb_16k_224-448",
    "tok_depth": "depth_8k_224-448",
    "tok_normal": "normal_8k_224-448",
    "tok_canny_edge": "edge_8k_224-512",
    "tok_sam_edge": "edge_8k_224-512",
    "tok_semseg": "semseg_4k_224-448",
    "tok_clip": "CLIP-B16_8k_224-448",
    "tok_dinov2": "DINOv2-B14_8k_224-448",
    "tok_imagebind": "ImageBind-H14_8k_224-448",
    "tok_dinov2_global": "DINOv2-B14-global_8k_16_224",
    "tok_imagebind_global": "ImageBind-H14-global_8k_16_224",
    "sam_instance": "sam-instance_1k_64",
    "human_poses": "human-poses_1k_8",
}
TEXTS = ("caption", "det", "metadata", "color_palette", "human_poses", "sam_instance")
device = "cpu"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder with the stand-ins, which is the working directory, as the repository is for the notebooks."""
    folder = tmp_path_factory.mktemp("hub")
    for name in ("4M-21_XL_CC12M", "4M-7-SR_L_CC12M"):
        write_model(name, folder)
    for name in TOKENIZERS:
        write_tokenizer(name, folder)
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "photo.png")
    (folder / "fourm").symlink_to(ROOT / "fourm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def toks(hub):
    classes = {name: cls for name, (cls, _) in TOKENIZERS.items()}
    assert {*classes.values()} == {DiVAE, VQVAE}
    return {
        key: classes[name].from_pretrained(f"{HUB}/4M_tokenizers_{name}").eval().to(device)
        for key, name in KEYS.items()
    }


@pytest.fixture(scope="module")
def text_tok(hub):
    return Tokenizer.from_file(VOCABULARY)


@pytest.fixture(scope="module")
def sampler(hub):
    return GenerationSampler(FM.from_pretrained(f"{HUB}/4M-21_XL_CC12M").eval().to(device))


def photo():
    transform = RGBTransform(imagenet_default_mean_and_std=True)
    picture = transform.preprocess(transform.load("photo.png"))
    picture = TF.center_crop(picture, min(picture.size)).resize((224, 224))
    return transform.postprocess(picture).unsqueeze(0)


def with_targets(batch, targets, tokens):
    for target, count in zip(targets, tokens, strict=True):
        batch = init_empty_target_modality(batch, MODALITY_INFO, target, 1, count, device)
    return batch


def schedule_of(conds, targets, tokens, scheme="roar", **columns):
    is_text = [target.split("@")[0] in TEXTS for target in targets]
    return build_chained_generation_schedules(
        cond_domains=conds,
        target_domains=targets,
        tokens_per_target=tokens,
        autoregression_schemes=["autoregressive" if text else scheme for text in is_text],
        decoding_steps=[None if text else 1 for text in is_text],
        token_decoding_schedules=[None if text else "linear" for text in is_text],
        temps=[0.3 if text else 0.01 for text in is_text],
        temp_schedules=["constant"] * len(targets),
        cfg_scales=[1.0 if text else 2.0 for text in is_text],
        cfg_schedules=["constant"] * len(targets),
        cfg_grow_conditioning=True,
        **columns,
    )


def test_a_picture_becomes_everything(sampler, toks, text_tok):
    conds = ["rgb@224"]
    targets = [
        "tok_clip@224",
        "tok_dinov2@224",
        "tok_imagebind@224",
        "tok_depth@224",
        "tok_normal@224",
        "tok_semseg@224",
        "tok_canny_edge@224",
        "tok_sam_edge@224",
        "caption",
        "det",
        "color_palette",
        "metadata",
        "tok_dinov2_global",
    ]
    tokens = [196, 256, 256, 196, 196, 196, 196, 196, 9, 9, 23, 40, 16]
    batch = with_targets({"rgb@224": {"tensor": photo()}}, targets, tokens)
    for cond in conds:
        batch = init_full_input_modality(batch, MODALITY_INFO, cond, device, eos_id=text_tok.token_to_id("[EOS]"))
    out = sampler.generate(
        batch, schedule_of(conds, targets, tokens), text_tokenizer=text_tok, verbose=False, seed=0, top_p=0.8, top_k=0.0
    )
    dec = decode_dict(out, toks, text_tok, image_size=224, patch_size=16, decoding_steps=2, seed=0)
    assert dec.keys() == {*conds, *targets}
    colours = ["rgb@224", "tok_depth@224", "tok_normal@224", "tok_semseg@224", "tok_canny_edge@224", "tok_sam_edge@224"]
    for key in colours:
        assert dec[key].shape == (224, 224, 3) and dec[key].min() >= 0 and dec[key].max() <= 1, key
    for key, side in (("tok_clip@224", 14), ("tok_dinov2@224", 16), ("tok_imagebind@224", 16)):
        assert dec[key].shape == (side, side, 3) and dec[key].min() >= 0 and dec[key].max() <= 1, key
    assert torch.is_tensor(dec["tok_dinov2_global"]) and dec["tok_dinov2_global"].shape == (768,)
    for key in ("caption", "det"):
        assert len(dec[key]) == 1 and isinstance(dec[key][0], str) and "[EOS]" not in dec[key][0]
    assert isinstance(dec["metadata"], dict) and dec["color_palette"].shape == (224, 224, 3)
    np.testing.assert_allclose(dec["rgb@224"], denormalize(photo())[0].permute(1, 2, 0), atol=1e-6)
    again = decode_dict(out, toks, text_tok, decoding_steps=2, seed=0)
    assert np.array_equal(again["tok_normal@224"], dec["tok_normal@224"])
    plotting_utils.plot_conds_and_targets(conds, targets, dec, save_path="sheet.png", figscale=1)
    assert Image.open("sheet.png").width > 1000
    plotting_utils.save_conds_and_targets(conds, ["tok_depth@224", "caption"], [dec], "saved")
    assert {path.name for path in Path("saved").iterdir()} == {
        "00000_rgb@224.png",
        "00000_tok_depth@224.png",
        "00000_caption.txt",
    }


def test_words_become_a_picture_at_448_pixels(sampler, toks, text_tok):
    batch = with_targets({}, ["tok_clip@224", "tok_rgb@224"], [196, 196])
    batch = custom_text(
        batch,
        input_text="a photo of a cup [EOS]",
        eos_token="[EOS]",
        key="caption",
        device=device,
        text_tokenizer=text_tok,
    )
    batch = init_full_input_modality(batch, MODALITY_INFO, "caption", device, eos_id=text_tok.token_to_id("[EOS]"))
    schedule = schedule_of(["caption"], ["tok_clip@224", "tok_rgb@224"], [196, 196])
    out = sampler.generate(batch, schedule, text_tokenizer=text_tok, seed=0, top_p=0.8, top_k=0.0)
    assert decode_dict({"caption": out["caption"]}, toks, text_tok)["caption"] == ["a photo of a cup"]
    assert plotting_utils.decode_text(out, "caption", text_tok)[2] == ["a photo of a cup [EOS]"]

    superres = GenerationSampler(FM.from_pretrained(f"{HUB}/4M-7-SR_L_CC12M"))
    targets = ["tok_clip@448", "tok_rgb@448"]
    for name in ("caption", "tok_clip@224", "tok_rgb@224"):
        out = init_full_input_modality(out, MODALITY_INFO, name, device, eos_id=text_tok.token_to_id("[EOS]"))
    large = superres.generate(
        with_targets(out, targets, [784, 784]),
        schedule_of([*out], targets, [784, 784], scheme="maskgit"),
        text_tokenizer=text_tok,
        seed=1,
        top_p=0.0,
    )
    dec = decode_dict(large, toks, text_tok, image_size=448, patch_size=16, decoding_steps=1)
    assert dec["tok_rgb@448"].shape == (448, 448, 3) and dec["tok_clip@448"].shape == (28, 28, 3)


def test_the_modalities_of_a_model(sampler):
    model = sampler.model
    assert model.encoder_modalities["rgb@224"] == MODALITY_INFO["rgb@224"]["id"]
    assert "tok_clip@224" in [*model.decoder_modalities] and "rgb@224" not in model.decoder_modalities
    assert [get_transform_key(name) for name in ("tok_rgb@448", "caption")] == ["tok_rgb", "caption"]
    assert get_transform_resolution("tok_rgb@448", 224) == (448, 448)
    assert get_transform_resolution("caption", (224, 112)) == (224, 112)
    assert get_transform_resolution("caption", 224, to_tuple=False) == 224


def test_metadata_that_is_partly_given(sampler, text_tok):
    transform = MetadataTransform(shuffle=False, random_trunc=False, return_chunks=False)
    text = transform.metadata_to_string({"semantic_diversity": 2})
    assert text == "v1=16 v0=2"
    batch = custom_text(
        {"rgb@224": {"tensor": photo()}},
        input_text=text + " [S_1]",
        eos_token="[EOS]",
        key="metadata",
        device=device,
        text_tokenizer=text_tok,
        target_max_len=256,
        start_token="[S_1]",
    )
    batch = init_full_input_modality(batch, MODALITY_INFO, "rgb@224", device)
    out = sampler.generate(
        batch, schedule_of(["rgb@224"], ["metadata"], [5]), text_tokenizer=text_tok, seed=0, top_p=0.8, top_k=0.0
    )
    assert plotting_utils.decode_metadata(out, "metadata", text_tok)["semantic_diversity"] == 2
    assert out["metadata"]["tensor"].shape[1] <= 2 + 5


def test_retrieval_by_global_features(sampler, toks, text_tok):
    targets = ["tok_dinov2_global", "tok_imagebind_global"]
    batch = init_full_input_modality({"rgb@224": {"tensor": photo()}}, MODALITY_INFO, "rgb@224", device)
    batch = with_targets(expand_to_batch(batch, 2), targets, [16, 16])
    batch = expand_to_batch(batch, 2)
    out = sampler.generate(batch, schedule_of(["rgb@224"], targets, [16, 16]), text_tokenizer=text_tok, seed=0)
    vectors = [
        plotting_utils.decode_tok_dinov2_global(out, toks, targets[0]),
        plotting_utils.decode_tok_imagebind_global(out, toks, targets[1]),
    ]
    assert [vector.shape for vector in vectors] == [(2, 768), (2, 1280)]
    assert torch.cosine_similarity(*vectors[0], dim=0) <= 1.001


def test_instances_of_many_points(sampler, text_tok):
    batch = init_full_input_modality({"rgb@224": {"tensor": photo()}}, MODALITY_INFO, "rgb@224", device)
    batch = with_targets(batch, ["sam_instance"], [256])
    schedule = schedule_of(["rgb@224"], ["sam_instance"], [4])
    out = sampler.generate_sam_dense(batch, schedule, text_tokenizer=text_tok, batch_size=3, seed=0)
    assert out["sam_instance"]["tensor"].shape[0] == 1


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("human_poses", "human v0=100 v1=100 v2=900 v3=900 pose " + "v0=3 " * 8),
        ("sam_instance", "point v0=100 v1=100 polygon v0=10 v1=10 v2=900 v3=900 " + "v1=3 " * 16),
    ],
)
def test_poses_and_instances_are_drawn(key, text, toks, text_tok):
    batch = custom_text({}, text, "[EOS]", key, device, text_tok)
    batch = init_full_input_modality(batch, MODALITY_INFO, key, device)
    picture = decode_dict(batch, toks, text_tok)[key]
    assert picture.shape == (224, 224, 3) and picture.min() < picture.max() <= 1


def test_tokens_from_a_file(toks):
    sample = {f"tok_{kind}@224": {"tensor": torch.arange(196)[None]} for kind in ("depth", "semseg")}
    assert plotting_utils.decode_tok_depth(sample, toks, "tok_depth@224", t=1).shape == (224, 224, 3)
    raw = plotting_utils.decode_tok_depth(sample, toks, "tok_depth@224", 224, 16, 1, to_rgb=False)
    assert raw.shape == (224, 224)
    classes = plotting_utils.decode_tok_semseg(np.ones((224, 224, 3)), sample, toks, "tok_semseg@224")
    assert classes.shape == (224, 224, 3) and 0 <= classes.min() <= classes.max() <= 1
    logits = decode_dict({"tok_semseg@224": sample["tok_semseg@224"]}, toks, None, to_rgb=False)["tok_semseg@224"]
    assert logits.shape == (134, 224, 224)
    with pytest.raises(UserError, match="tok_depth cannot be decoded without its tokenizer"):
        decode_dict(sample, {}, None)


def test_a_tokenizer_in_a_file_with_its_configuration_in_the_header(toks):
    header = {key: str(value) for key, value in toks["tok_clip"].config.items()}
    save_file(dict(toks["tok_clip"].state_dict()), "clip.safetensors", header)
    loaded = VQVAE.from_pretrained("clip.safetensors")
    ids = torch.arange(196).view(1, 14, 14)
    assert torch.equal(loaded.decode_tokens(ids), toks["tok_clip"].decode_tokens(ids)) and not loaded.training


def test_boxes_and_texts_become_pictures(text_tok):
    text = "v0=100 v1=200 v2=499 v3=999 teddy bear v0=0 v1=0 v2=0 v3=0 cup"
    (box,) = plotting_utils.convert_string_to_bboxes(text)
    assert box[:4] == pytest.approx([0.1001, 0.2002, 0.4995, 1.0]) and box[4] == "teddy bear"
    drawn = plotting_utils.visualize_bboxes(np.zeros((100, 200, 3)), text, color=(0, 255, 0), thickness=3)
    assert drawn.dtype == np.uint8 and drawn.shape == (100, 200, 3)
    assert drawn[50, 20].tolist() == [0, 255, 0] and not drawn[:, 120:].any()
    assert plotting_utils.visualize_bboxes(None, text, "red").mean() > 200
    picture = plotting_utils.text_to_pil_image("costs $5 and $7", image_size=(200, 100))
    assert picture.size == (200, 100) and np.asarray(picture).min() < 100
    plotting_utils.plot_images_with_captions([drawn, picture], ["one", "two"], save_path="captions.png", figscale=1)
    assert Image.open("captions.png").width > Image.open("captions.png").height
    palette = custom_text({}, "v1=2 v0=255 v0=0 v0=0 v0=0 v0=0 v0=255", "[EOS]", "color_palette", device, text_tok)
    palette = init_full_input_modality(palette, MODALITY_INFO, "color_palette", device)
    colours = plotting_utils.decode_color_palette(palette, "color_palette", text_tok, 10)
    assert colours[0].tolist() == [[1, 0, 0]] * 5 + [[0, 0, 1]] * 5


@pytest.fixture(scope="module")
def demo(hub):
    return Demo4MSampler(verbose=False).to(device)


def test_the_demo_sampler_describes_a_picture_from_the_web(hub, demo):
    handler = partial(SimpleHTTPRequestHandler, directory=hub)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    image = img_from_url(f"{url}/photo.png")
    with pytest.raises(UserError, match="config.json is not a picture"):
        img_from_url(f"{url}/{HUB}/4M-21_XL_CC12M/config.json")
    server.shutdown()
    assert image.shape == (1, 3, 224, 224)
    targets = ["tok_clip@224", "tok_semseg", "color_palette", "metadata"]
    result = demo({"rgb@224": image}, seed=0, target_modalities=targets)
    assert [*result] == [
        "rgb@224",
        "tok_clip@224",
        "tok_semseg@224",
        "color_palette",
        "metadata",
        "tok_clip@448",
        "tok_semseg@448",
    ]
    assert result["tok_semseg@448"].shape == (448, 448, 3)
    pictures = demo.modalities_to_pil(result, use_fixed_plotting_order=True, resize=64)
    assert [title for _, title in pictures] == ["RGB", "CLIP", "Semantic segmentation", "Color palette", "Metadata"]
    assert {picture.size for picture, _ in pictures} == {(64, 64)}
    demo.plot_modalities(result, ncols_max=3, figscale=1.0, save_path="demo.png")
    assert Image.open("demo.png").width > 200
    again = demo({"rgb@224": image}, seed=0, target_modalities=targets, perform_sr=False)
    assert [*again] == [*result][:5] and np.array_equal(again["tok_clip@224"], result["tok_clip@224"])


def test_the_demo_sampler_starts_from_words(demo):
    result = demo({"det": "v0=10 v1=10 v2=900 v3=900 cup"}, seed=0, target_modalities=["tok_dinov2"], perform_sr=False)
    assert result["det"] == ["v0=10 v1=10 v2=900 v3=900 cup"] and result["tok_dinov2@224"].shape == (16, 16, 3)
    with pytest.raises(UserError, match="target_modalities: 'tok_rgb@448' is none of tok_clip@224, "):
        demo({"caption": "a cup"}, target_modalities=["tok_rgb@448"])
    with pytest.raises(UserError, match="'tok_t5' is not an input of the model"):
        demo({"tok_t5": "a cup"})


def test_the_published_paths_import_nothing_heavy():
    code = (
        "import sys; import fourm.utils.plotting_utils, fourm.demo_4M_sampler, fourm.models.generate, fourm.vq.vqvae; "
        "heavy = 'matplotlib', 'faiss', 'diffusers', 'transformers', 'sklearn'; "
        "print([name for name in heavy if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"
