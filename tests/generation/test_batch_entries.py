"""Batches for generation have the right inputs and targets, and guidance empties the right modalities."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from fourm.data.modality_info import declare
from fourm.generation.batch_entries import emptied
from fourm.models.generate import (
    GenerationSampler,
    custom_text,
    expand_to_batch,
    init_empty_target_modality,
    init_full_input_modality,
)
from fourm.utils.errors import UserError
from tests.models.toy_models import DECLARATIONS, toy_model
from tests.reference import generation as reference

MODALITIES = {name: declare(name, fields) for name, fields in DECLARATIONS.items()}
WORDS = ["[PAD]", "[UNK]", "[SOS]", "[EOS]", *(f"[S_{i}]" for i in range(6)), *(f"w{i}" for i in range(10, 50))]
TOKENIZER = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}))
TOKENIZER.pre_tokenizer = WhitespaceSplit()


def described(entry, index=0):
    """Return the ids with ``i`` before inputs and ``t`` before targets."""
    inputs, targets = ~entry["input_mask"][index], ~entry["target_mask"][index]
    return [
        "it"[bool(b)] + str(token) if a or b else "-"
        for token, a, b in zip(entry["tensor"][index].tolist(), inputs, targets, strict=True)
    ]


def full(name, tensor, **entry):
    return init_full_input_modality({name: {"tensor": tensor, **entry}}, MODALITIES, name, "cpu")[name]


def test_an_empty_image_is_all_target():
    entry = init_empty_target_modality({}, MODALITIES, "grid", 2, 16, "cpu")["grid"]
    assert entry["input_mask"].all() and not entry["target_mask"].any()
    assert entry["decoder_attention_mask"].tolist() == [[16] + [0] * 15] * 2


def test_an_empty_sequence_is_a_lone_sentinel_and_room():
    entry = init_empty_target_modality({}, MODALITIES, "text", 2, 5, "cpu")["text"]
    assert described(entry, 1) == ["i5", "t5", "t0", "t0", "t0"]
    assert entry["decoder_attention_mask"].tolist() == [[0, 1, 1, 1, 1]] * 2


def test_one_sample_becomes_a_batch():
    batch = full_pixels() | {"text": full("text", torch.tensor([[9, 3], [8, 3], [7, 3]]))}
    expanded = expand_to_batch(batch, 3)
    assert {len(value) for entry in expanded.values() for value in entry.values()} == {3}
    assert torch.equal(expanded["pixels"]["tensor"][2], batch["pixels"]["tensor"][0])
    with pytest.raises(UserError, match="text: 3 samples cannot be expanded to a batch of 2"):
        expand_to_batch(batch, 2)


def test_vectors_cannot_be_targets():
    with pytest.raises(UserError, match="vectors"):
        init_empty_target_modality({}, MODALITIES, "vectors", 2, 6, "cpu")


def test_a_full_sequence_ends_with_its_end_or_its_last_token():
    entry = full("text", torch.tensor([[9, 8, 3, 7, 0], [9, 0, 8, 0, 0], [3, 0, 0, 0, 0], [1, 1, 1, 1, 1]]))
    assert (~entry["input_mask"]).sum(1).tolist() == [3, 3, 1, 5]
    assert entry["target_mask"].all()
    assert (~full("text", torch.tensor([[9, 8, 3]]))["input_mask"]).all()


def test_full_images_codes_and_vectors():
    assert full("pixels", torch.zeros(2, 3, 16, 16))["input_mask"].shape == (2, 16)
    assert full("grid", torch.zeros(2, 4, 4, dtype=torch.long))["input_mask"].shape == (2, 16)
    assert not full("codes", torch.tensor([[0, 3, 5, 0, 0]]))["input_mask"].any()
    mask = torch.tensor([[False, False, True]])
    assert torch.equal(full("vectors", torch.zeros(1, 3, 10), input_mask=mask)["input_mask"], mask)


def test_the_batch_that_is_given_stays_as_it_is():
    batch = {"text": {"tensor": torch.tensor([[9, 3]])}}
    init_full_input_modality(batch, MODALITIES, "text", "cpu")
    init_empty_target_modality(batch, MODALITIES, "grid", 1, 16, "cpu")
    custom_text(batch, "w10", "[EOS]", "text", "cpu", TOKENIZER)
    assert batch.keys() == {"text"} and batch["text"].keys() == {"tensor"}


def test_a_prompt_and_the_room_for_what_follows():
    entry = custom_text({}, "w10 [S_1] w11", "[EOS]", "text", "cpu", TOKENIZER, target_max_len=4)["text"]
    assert described(entry) == ["i10", "i5", "i11", "t5", "t0", "t0", "t3"]
    assert entry["decoder_attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    with pytest.raises(UserError, match=r"no token \[END\]"):
        custom_text({}, "w10", "[END]", "text", "cpu", TOKENIZER)


def test_a_prompt_as_a_full_input_is_what_it_says():
    prompt = custom_text({}, "w10 w11", "[EOS]", "text", "cpu", TOKENIZER, target_max_len=4)
    entry = init_full_input_modality(prompt, MODALITIES, "text", "cpu")["text"]
    assert described(entry) == ["i10", "i11", "-", "-", "-", "-"]


@pytest.mark.parametrize("end", ["[EOS]", "[S_2]", "w30"])
def test_writing_ends_at_the_token_that_the_prompt_names(end):
    model = toy_model(2).eval()
    batch = full_pixels()
    for seed in range(5):
        prompt = custom_text(batch, "w10 [S_1] w11", end, "text", "cpu", TOKENIZER, target_max_len=11)
        schedule = [{"target_domain": "text", "scheme": "autoregressive", "num_tokens": None, "temperature": 30.0}]
        out = GenerationSampler(model).generate(prompt, schedule, text_tokenizer=TOKENIZER, seed=seed)["text"]
        ids = out["tensor"][~out["input_mask"]].tolist()
        assert ids[-1] == 11, "what follows the gap stays"
        assert TOKENIZER.token_to_id(end) not in ids[1:-2], "nothing is written after the end"
    expected = reference.write(model, [(1.0, batch)], "text", [10, 5, 11], 12, TOKENIZER.token_to_id(end))
    schedule[0]["temperature"] = 0.0
    out = GenerationSampler(model).generate(prompt, schedule, text_tokenizer=TOKENIZER)["text"]
    assert out["tensor"][~out["input_mask"]].tolist() == expected


@pytest.mark.parametrize("num_tokens", [3, 7, 11])
def test_a_sequence_that_never_ends_has_as_many_tokens_as_in_the_published_code(num_tokens):
    model = toy_model(2).eval()
    batch = init_empty_target_modality(full_pixels(), MODALITIES, "text", 1, num_tokens, "cpu")
    with torch.no_grad():
        model.decoder_embeddings["text"].to_logits.weight[6] = model.decoder_embeddings["text"].to_logits.weight[20]
    schedule = [{"target_domain": "text", "scheme": "autoregressive", "num_tokens": num_tokens, "temperature": 0.0}]
    out = GenerationSampler(model).generate(batch, schedule, text_tokenizer=TOKENIZER)["text"]
    assert out["tensor"].shape[1] == num_tokens - 1, "the row without its input, the start token"


def full_pixels():
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixels": full("pixels", pixels)}


def test_guidance_takes_everything_away():
    batch = {
        "pixels": full("pixels", torch.zeros(2, 3, 16, 16)),
        "text": full("text", torch.tensor([[9, 8, 3], [9, 3, 0]])),
        "vectors": full("vectors", torch.ones(2, 3, 10)),
        "codes": full("codes", torch.tensor([[1, 2], [3, 4]])),
    }
    empty = emptied(batch, MODALITIES, batch)
    assert empty["pixels"]["input_mask"].all() and empty["codes"]["input_mask"].all()
    assert described(empty["text"]) == ["i5"]
    assert empty["vectors"]["tensor"].shape == (2, 1, 10) and not empty["vectors"]["tensor"].any()
    assert not empty["vectors"]["input_mask"].any()
    assert not batch["pixels"]["input_mask"].any()


def test_inputs_longer_than_their_position_table():
    model = toy_model().eval()
    text = full("text", torch.full((1, 700), 9))
    schedule = [{"target_domain": "grid", "scheme": "roar", "num_tokens": 16, "temperature": 0.0}]
    out = GenerationSampler(model).generate({"text": text}, schedule, seed=0)
    assert not out["grid"]["input_mask"].any()
