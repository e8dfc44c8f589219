"""Generation equals a plain implementation that handles one sample at a time, for every batch and guidance."""

import pytest
import torch

from fourm.models.generate import GenerationSampler, init_full_input_modality
from fourm.utils.errors import DataError, UserError
from tests.generation.toy_chains import (
    EOS,
    MODELS,
    ROOM,
    S1,
    S2,
    TOKENIZER,
    chain_model,
    generate,
    inputs,
    make_schedule,
    one,
    same,
    valid,
    with_target,
)
from tests.models.toy_models import DECLARATIONS, toy_model
from tests.reference import generation as reference


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return chain_model(request.param)


def conditions(model, batch, scale, domains=("pixels",)):
    if scale == 1.0:
        return [(1.0, batch)]
    return [(1 - scale, reference.emptied(model, batch, domains)), (scale, batch)]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_captions_are_those_of_the_plain_method(model, scale):
    batch = with_target(model, inputs(model), "text", ROOM + 1)
    steps = make_schedule(model, ["text"], ["autoregressive"], [ROOM], [1], scale)
    out = generate(model, batch, steps, seed=0)
    for b in range(4):
        expected = reference.write(model, conditions(model, one(inputs(model), b), scale), "text", [S1], ROOM + 1, S2)
        assert valid(out["text"], b) == expected
    assert len({len(valid(out["text"], b)) for b in range(4)}) > 1, "samples should end at different times"


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(("scheme", "steps"), [("maskgit", 1), ("maskgit", 3), ("roar", 1), ("roar", 5), ("halton", 3)])
def test_images_are_those_of_the_plain_method(model, scheme, steps, scale):
    batch = with_target(model, inputs(model), "grid", 16)
    schedule = make_schedule(model, ["grid"], [scheme], [16], [steps], scale)
    out = generate(model, batch, schedule, seed=7)
    counts = [step["num_tokens"] for step in schedule]
    for b in range(4):
        expected = reference.paint(
            model, conditions(model, one(inputs(model), b), scale), "grid", counts, 7 + b, scheme
        )
        assert out["grid"]["tensor"][b].tolist() == expected.tolist()
    assert not out["grid"]["input_mask"].any() and out["grid"]["target_mask"].all()


def with_text(model, batch, ids=(20, 21, 22, EOS)):
    tensor = torch.tensor([[*ids, 0, 0]] * len(batch["pixels"]["tensor"]))
    tensor[1:, 1] = EOS  # shorter in all samples but the first
    return init_full_input_modality({**batch, "text": {"tensor": tensor}}, model.modality_info, "text", "cpu")


@pytest.mark.parametrize("domains", [("text",), ("vectors", "codes"), ("pixels", "text", "vectors")])
def test_guidance_empties_every_kind_of_modality(model, domains):
    batch = with_text(model, inputs(model, 2))
    schedule = make_schedule(model, ["grid"], ["roar"], [16], [2], 2.5, cond=domains)
    out = generate(model, with_target(model, batch, "grid", 16), schedule, seed=1)
    for b in range(2):
        pairs = conditions(model, one(batch, b), 2.5, domains)
        assert (
            out["grid"]["tensor"][b].tolist() == reference.paint(model, pairs, "grid", [8, 8], 1 + b, "roar").tolist()
        )


@pytest.mark.parametrize(("target", "scheme"), [("grid", "roar"), ("grid", "maskgit"), ("text", "autoregressive")])
def test_several_weighted_conditions_are_the_published_sum(model, target, scheme):
    weights, tokens = [2.0, -0.7], {"grid": 16, "text": ROOM}[target]
    steps = make_schedule(model, [target], [scheme], [tokens], [4], weights)
    batch = inputs(model, 2)
    for b in range(2):
        emptied = [("pixels", "vectors"), ("vectors",), ("pixels",)]
        uncond, *conds = (reference.emptied(model, one(batch, b), domains) for domains in emptied)
        pairs = list(zip([0, *weights], (uncond, *conds), strict=True))
        result = GenerationSampler(model).generate_multi_guided(uncond, conds, steps, text_tokenizer=TOKENIZER, seed=3)
        if target == "text":
            assert valid(result["text"]) == reference.write(model, pairs, "text", [S1], ROOM + 1, S2)
        else:
            expected = reference.paint(model, pairs, "grid", [4] * 4, 3, scheme)
            assert result["grid"]["tensor"][0].tolist() == expected.tolist()


def text_row(inputs, room=ROOM):
    return {"text": reference.sequence_entry(inputs, [S1, *[0] * (room - 1)])}


def test_spans_are_written_into_their_places(model):
    rows = [[20, S1, 21, S2, 22, EOS], [S1], [20, S1]]
    batch = inputs(model, 3)
    entries = [text_row(row + [0] * (6 - len(row)))["text"] for row in rows]
    for row, entry in zip(rows, entries, strict=True):
        entry["input_mask"][0, len(row) :] = True
    entry = {key: torch.cat([entry[key] for entry in entries]) for key in entries[0]}
    out = generate(
        model, {**batch, "text": entry}, make_schedule(model, ["text"], ["autoregressive"], [ROOM], [1]), seed=0
    )
    for b, row in enumerate(rows):
        end = [S2 + 1, S2, S2][b]
        expected = reference.write(model, [(1.0, one(batch, b))], "text", row, ROOM + 1, end)
        assert valid(out["text"], b) == expected


def test_every_sample_ends_at_the_token_that_its_own_row_names(model):
    batch = with_target(model, inputs(model), "text", ROOM + 1)
    schedule = make_schedule(model, ["text"], ["autoregressive"], [ROOM], [1], temperature=30.0)
    free = [valid(generate(model, batch, schedule, seed=0)["text"], b) for b in range(4)]
    ends = [ids[1] for ids in free]
    assert len(set(ends)) == 4
    batch["text"]["tensor"][:, -1] = torch.tensor(ends)
    out = generate(model, batch, schedule, seed=0)["text"]
    assert [valid(out, b) for b in range(4)] == [ids[: ids.index(end) + 1] for ids, end in zip(free, ends, strict=True)]


CHAIN = {
    "targets": ["grid", "text", "global"],
    "schemes": ["roar", "autoregressive", "maskgit"],
    "tokens": [16, ROOM, 4],
    "steps": [3, 1, 2],
    "scales": 2.0,
    "temperature": 1.3,
    "cfg_grow_conditioning": True,
}


def test_a_sample_does_not_depend_on_its_batch(model):
    batch, schedule, seeds = inputs(model), make_schedule(model, **CHAIN), [3, 1, 4, 1]
    together = generate(model, batch, schedule, top_p=0.95, seed=seeds)
    for b in range(4):
        alone = generate(model, one(batch, b), schedule, top_p=0.95, seed=seeds[b])
        for target in CHAIN["targets"]:
            assert valid(together[target], b) == valid(alone[target])
    lengths = {len(valid(together["text"], b)) for b in range(4)}
    assert len(lengths) > 1, "samples should end at different times"


def test_a_sample_has_the_same_halton_order_alone_and_in_a_batch(model):
    batch, schedule = inputs(model), make_schedule(model, ["grid"], ["halton"], [16], [4], temperature=1.3)
    together = list(GenerationSampler(model).generate_iter(batch, schedule, seed=[3, 1, 4, 1]))
    for b, seed in enumerate([3, 1, 4, 1]):
        alone = GenerationSampler(model).generate_iter(one(batch, b), schedule, seed=seed)
        assert all(same(one(step, b), single) for step, single in zip(together, alone, strict=True))
    masks = together[0]["grid"]["input_mask"]
    assert len({tuple(mask) for mask in masks.tolist()}) > 1, "samples should begin at different positions"


def test_seeds_reproduce_and_generators_do_too(model):
    batch, schedule = inputs(model), make_schedule(model, **CHAIN)
    generators = (torch.Generator().manual_seed(2) for _ in range(2))
    first, again = (generate(model, batch, schedule, seed=generator) for generator in generators)
    assert same(first, again)
    assert not same(first, generate(model, batch, schedule, seed=0))
    assert not torch.equal(
        generate(model, batch, schedule)["grid"]["tensor"], generate(model, batch, schedule)["grid"]["tensor"]
    )


def test_steps_are_snapshots_and_the_input_stays_as_it_is(model):
    batch = with_target(model, inputs(model), "text", ROOM + 1)
    before = {name: {k: value.clone() for k, value in entry.items()} for name, entry in batch.items()}
    schedule, sampler = make_schedule(model, **CHAIN), GenerationSampler(model)
    known = [
        (~step["grid"]["input_mask"]).sum().item()
        for step in list(sampler.generate_iter(batch, schedule, text_tokenizer=TOKENIZER, seed=0))
    ]
    assert known == [4 * n for n in (6, 11, 16, 16, 16, 16)]
    assert same(batch, before)
    *_, last = sampler.generate_iter(batch, schedule, text_tokenizer=TOKENIZER, seed=0)
    assert same(last, generate(model, batch, schedule, seed=0))
    last["grid"]["tensor"][0, 0] = 1  # an ordinary tensor


def test_targets_may_take_turns(model):
    grid, other = (
        make_schedule(model, ["grid"], ["roar"], [16], [2]),
        make_schedule(model, ["global"], ["maskgit"], [4], [1]),
    )
    out = generate(model, inputs(model), [grid[0], *other, grid[1]], seed=0)
    in_a_row = generate(model, inputs(model), grid, seed=0)
    assert not out["grid"]["input_mask"].any() and not out["global"]["input_mask"].any()
    known = [
        ~step["grid"]["input_mask"] for step in GenerationSampler(model).generate_iter(inputs(model), grid, seed=0)
    ]
    assert torch.equal(out["grid"]["tensor"][known[0]], in_a_row["grid"]["tensor"][known[0]])


def test_without_steps_the_batch_comes_back(model):
    batch = inputs(model)
    assert same(generate(model, batch, []), batch)


def test_every_target_of_a_chain_has_fresh_randomness():
    declarations = {**DECLARATIONS, "again": DECLARATIONS["grid"]}
    names = {"domains_in": [*declarations], "domains_out": ["grid", "again"], "modalities": declarations}
    model = toy_model(**names).eval()
    for name in ("grid", "again"):
        torch.nn.init.zeros_(model.decoder_embeddings[name].to_logits.weight)  # every token is as likely
    schedule = make_schedule(model, ["grid", "again"], ["roar"] * 2, [16] * 2, [2] * 2, temperature=1.0)
    out = generate(model, inputs(model), schedule, seed=0)
    assert (out["grid"]["tensor"] != out["again"]["tensor"]).float().mean() > 0.8
    assert len(out["grid"]["tensor"].unique()) > 20


@pytest.mark.parametrize("scheme", ["roar", "maskgit", "halton"])
def test_only_targets_of_a_partly_known_image_change(model, scheme):
    batch = with_target(model, inputs(model), "grid", 16)
    known = torch.arange(16) < torch.tensor([[0], [5], [12], [16]])
    ids = torch.arange(16, dtype=torch.int16).view(4, 4).expand(4, 4, 4)
    batch["grid"] = {"tensor": ids, "input_mask": ~known, "target_mask": known}
    out = generate(model, batch, make_schedule(model, ["grid"], [scheme], [16], [4]), seed=0)["grid"]
    assert out["tensor"].shape == (4, 4, 4)
    assert (out["tensor"] == ids).flatten(1)[known].all()
    assert not (out["tensor"] == ids).flatten(1)[~known].all()
    assert out["target_mask"].all() and not out["input_mask"].any()


def test_a_row_with_more_room_than_the_model_has_positions():
    model = toy_model().eval()
    model.decoder_embeddings["text"].to_logits.weight.data[:10] = 0  # neither sentinel nor end
    batch = with_target(model, inputs(model, 2), "text", 40)
    schedule = [{**make_schedule(model, ["text"], ["autoregressive"], [12], [1])[0], "num_tokens": None}]
    out = generate(model, batch, schedule, seed=0)
    assert max(len(valid(out["text"], b)) for b in range(2)) == 12


def test_a_target_that_cannot_be_an_input():
    declared = {"domains_in": ["pixels", "vectors", "codes"], "domains_out": ["grid"]}
    model = toy_model(**declared).eval()
    schedule = make_schedule(model, ["grid"], ["maskgit"], [16], [3])
    out = generate(model, inputs(model), schedule, seed=0)
    assert not out["grid"]["input_mask"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_domain": "txt"}, "'txt' cannot be generated .*text"),
        ({"scheme": "maskgit"}, "text is a sequence"),
        ({"num_tokens": 13}, "text has 12 positions, fewer than the 13"),
        ({"cfg_scale": 2.0, "cfg_cond_domains": []}, "guidance of text needs cond_domains"),
        ({"cfg_cond_domains": ["grid"]}, "'grid', which is not among the inputs"),
        ({"cfg_scale": [1.0, 2.0]}, "a weight for each condition"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_one_clear_error(model, change, message):
    steps = [{**make_schedule(model, ["text"], ["autoregressive"], [ROOM], [1])[0], **change}]
    with pytest.raises(UserError, match=message):
        GenerationSampler(model).generate_iter(inputs(model), steps)


def test_codes_without_sentinels_cannot_be_written():
    model = toy_model(modalities=DECLARATIONS).eval()
    schedule = make_schedule(model, ["codes"], ["autoregressive"], [5], [1])
    with pytest.raises(UserError, match="codes: its codes leave no room for sentinels"):
        generate(model, inputs(model), schedule)


def test_inputs_that_do_not_fit_are_one_clear_error(model):
    schedule, sampler = make_schedule(model, ["grid"], ["roar"], [16], [1]), GenerationSampler(model)
    batch = inputs(model)
    for wrong, message in (
        ({}, "at least one"),
        ({**batch, "text": {"tensor": torch.zeros(4, 3, dtype=torch.long)}}, "text: its masks are missing"),
        ({**batch, "vectors": one(batch, 0)["vectors"]}, "same number of samples"),
        (with_target(model, batch, "grid", 15), "grid: the batch has 15 tokens, the model 16 positions"),
    ):
        with pytest.raises(UserError, match=message):
            sampler.generate(wrong, schedule)
    with pytest.raises(UserError, match="cond_dicts is empty"):
        sampler.generate_multi_guided(batch, [], schedule)


def test_dense_answers_become_one_sequence(model):
    batch = with_target(model, inputs(model, 1), "text", ROOM + 1)
    schedule = make_schedule(model, ["text"], ["autoregressive"], [ROOM], [1], temperature=1.0)
    sampler = GenerationSampler(model)
    dense = sampler.generate_sam_dense(batch, schedule, TOKENIZER, batch_size=3, key="text", seed=5)
    answers = [valid(generate(model, batch, schedule, seed=5 + i)["text"]) for i in range(3)]
    assert valid(dense["text"]) == [token for answer in answers for token in answer if token != EOS] + [EOS]
    rows = {key: value.repeat(3, 1) for key, value in batch["text"].items()}
    chunks = sampler.generate_sam_dense({**batch, "text": rows}, schedule, TOKENIZER, batch_size=2, key="text", seed=5)
    assert same(dense, chunks)


def test_whole_numbers_are_no_normalised_pixels(model):
    batch = inputs(model)
    batch["pixels"]["tensor"] = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"an image of type torch.uint8 reached the model; it takes normalised"):
        generate(model, with_target(model, batch, "grid", 16), make_schedule(model, ["grid"], ["roar"], [16], [2]))
