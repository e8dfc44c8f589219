"""Generation runs the model as rarely as it can, with the same shapes, in any precision, and compiled."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fourm.generation.batch_entries import emptied
from fourm.generation.token_sampling import TokenSampler
from fourm.models.generate import GenerationSampler, init_full_input_modality
from tests.generation.toy_chains import (
    MODALITIES,
    MODELS,
    ROOM,
    TOKENIZER,
    chain_model,
    generate,
    inputs,
    make_schedule,
    same,
    with_target,
)
from tests.models.toy_models import SWIGLU, toy_model
from tests.train.test_step import Waits, within


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return chain_model(request.param)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_steps_of_the_same_shapes_write_the_same_texts(model, scale, monkeypatch):
    monkeypatch.setattr("fourm.generation.steps._CHECK_EVERY", 3)
    rooms = torch.tensor([[1], [6], [6], [11]])
    batch = with_target(model, inputs(model), "text", ROOM + 1)
    batch["text"]["target_mask"] = (torch.arange(ROOM + 1) < 1) | (torch.arange(ROOM + 1) > rooms)
    schedule = make_schedule(model, ["text"], ["autoregressive"], [ROOM], [1], scale, temperature=1.3)
    for top_p, tokens in ((0.0, batch), (0.9, with_target(model, inputs(model), "text", ROOM + 1))):
        expected = generate(model, tokens, schedule, top_p=top_p, seed=3)
        sampler = GenerationSampler(model, cuda_graphs=True)
        assert same(sampler.generate(tokens, schedule, text_tokenizer=TOKENIZER, top_p=top_p, seed=3), expected)


class WaitsOfASequence(Waits):
    """Collects the shapes, and what would wait for a GPU, within a step that a CUDA graph replays."""

    def __init__(self):
        super().__init__()
        self.shapes = [[]]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not within("advance"):
            return func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.shapes[-1].append((name, *(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor))))
        if name == "add_":  # of the position, with which a step ends
            self.shapes.append([])
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_a_step_that_a_cuda_graph_replays_has_the_same_shapes_and_waits_for_nothing(model):
    batch = with_target(model, inputs(model, 2), "text", ROOM + 1)
    schedule = make_schedule(model, ["text"], ["autoregressive"], [ROOM], [1], 2.0, temperature=30.0)
    with WaitsOfASequence() as waits:
        GenerationSampler(model, cuda_graphs=True).generate(
            batch, schedule, text_tokenizer=TOKENIZER, top_k=20, top_p=0.9, seed=0
        )
    *steps, rest = waits.shapes
    assert len(steps) == ROOM and waits.names == [] and rest == []
    assert all(step == steps[-1] for step in steps[2:]), "the first two copy weights, on a CPU"


def test_each_part_of_the_model_runs_as_rarely_as_it_can(model):
    calls = {"cross": 0, "embedded": 0, "encoded": 0, "decoded": []}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    hooks = [
        model.decoder[0].cross_attn.kv.register_forward_hook(count("cross")),
        model.encoder_embeddings["pixels"].register_forward_hook(count("embedded")),
        model.encoder[0].register_forward_hook(count("encoded")),
        model.decoder[0].mlp.register_forward_hook(
            lambda _, args, __: calls["decoded"].append(tuple(args[0].shape[:2]))
        ),
    ]
    try:
        schedule = make_schedule(model, ["text"], ["autoregressive"], [ROOM], [1], 2.0, temperature=2.0)
        rooms = torch.tensor([[4], [6], [6], [11]])
        batch = with_target(model, inputs(model), "text", ROOM + 1)
        batch["text"]["target_mask"] = (torch.arange(ROOM + 1) < 1) | (torch.arange(ROOM + 1) > rooms)
        generate(model, batch, schedule, seed=0)
        assert (calls["cross"], calls["embedded"], calls["encoded"]) == (1, 2, 1)
        alive = [(rooms > index).sum().item() for index in range(ROOM)]
        assert calls["decoded"] == [(2 * count, 1) for count in alive], "two conditions; what has ended leaves"
        calls.update(embedded=0, encoded=0, decoded=[])
        generate(model, inputs(model), make_schedule(model, ["grid"], ["roar"], [16], [4], 2.0), seed=0)
        assert (calls["embedded"], calls["encoded"], calls["decoded"]) == (2, 4, [(8, 4)] * 4)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def encoded(model):
    """The number of tokens in each run of the encoder."""
    counts = []
    hook = model.encoder[0].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[:-1].numel()))
    yield counts
    hook.remove()


def test_conditions_are_encoded_without_padding(model, encoded):
    batch = init_full_input_modality(
        {"pixels": {"tensor": torch.randn(2, 3, 16, 16)}}, model.modality_info, "pixels", "cpu"
    )
    steps = make_schedule(model, ["grid"], ["roar"], [16], [2], 2.0)
    generate(model, batch, steps, seed=0)
    own = [model.num_register_tokens + known for known in (0, 8)]
    assert encoded == [2 * (16 + tokens + max(tokens, 1)) for tokens in own]  # attention needs at least one token


def test_inputs_that_do_not_change_are_encoded_once():
    model = toy_model(domains_in=["pixels", "vectors", "codes"], domains_out=["grid"]).eval()
    runs = []
    model.encoder[0].register_forward_hook(lambda *_: runs.append(1))
    for scheme in ("maskgit", "roar", "halton"):
        generate(model, inputs(model), make_schedule(model, ["grid"], [scheme], [16], [4], 2.0), seed=0)
    assert len(runs) == 3


def test_a_step_without_tokens_costs_nothing(model, encoded):
    schedule = make_schedule(model, ["grid"], ["maskgit"], [16], [2])
    expected = generate(model, inputs(model), [schedule[0], {**schedule[0], "num_tokens": 0}, schedule[1]], seed=0)
    assert len(encoded) == 2 and not expected["grid"]["input_mask"].any()


def test_a_model_in_training_generates_without_its_noise_and_goes_on_training():
    model = toy_model(drop_path_rate_encoder=0.9, drop_path_rate_decoder=0.9)
    schedule, batch = (
        make_schedule(model, ["grid", "text"], ["maskgit", "autoregressive"], [16, ROOM], [2, 1]),
        inputs(model),
    )
    out = GenerationSampler(model.train()).generate(batch, schedule, seed=0)
    assert model.training and model.decoder[0].training
    assert same(out, GenerationSampler(model.eval()).generate(batch, schedule, seed=0))


def test_half_precision_generates_nearly_the_same(model):
    batch, schedule = inputs(model), make_schedule(model, ["grid"], ["roar"], [16], [4])
    full, half = (GenerationSampler(model, dtype).generate(batch, schedule, seed=0) for dtype in (None, torch.bfloat16))
    assert (full["grid"]["tensor"] == half["grid"]["tensor"]).float().mean() > 0.7


def test_compiled_blocks_generate_the_same_whatever_the_lengths():
    torch._dynamo.reset()
    model, twin = (toy_model(4, **SWIGLU, modalities=MODALITIES).eval() for _ in range(2))
    compiled = CompileCounterWithBackend("aot_eager")
    twin.compile_blocks(dynamic=True, backend=compiled)
    for size in (2, 3):
        batch = inputs(model, size)
        steps = make_schedule(model, ["grid", "text"], ["roar", "autoregressive"], [16, ROOM], [3, 1], 2.0)
        expected, actual = (generate(m, batch, steps, seed=0) for m in (model, twin))
        for target in ("grid", "text"):
            assert torch.equal(actual[target]["tensor"], expected[target]["tensor"])
    assert 0 < compiled.frame_count < 30  # not once for every length


DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def cast(request):
    """A model with registers and qk-norm whose weights have 16 bits, and its twin with the same weights in float32."""
    options = {**SWIGLU, "qk_norm": True, "num_register_tokens": 3, "modalities": MODALITIES}
    model = toy_model(4, **options).to(request.param).eval()
    return model, copy.deepcopy(model).float()


@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.8}])
@pytest.mark.parametrize(
    "target, scheme, tokens",
    [
        ("grid", "maskgit", 16),
        ("grid", "roar", 16),
        ("text", "autoregressive", 9),
        ("codes", "autoregressive", 5),
    ],
)
def test_a_model_that_was_cast_generates_like_its_twin_in_float32(cast, target, scheme, tokens, limits):
    """Covers plain generation, guidance, and several weighted conditions, with inputs of any precision."""
    model, twin = cast
    pixels = with_target(model, inputs(model), target, tokens)
    others = [{**pixels, name: emptied(pixels, model.modality_info, [name])[name]} for name in ("pixels", "vectors")]
    generated = {}
    for name, one_of_them, dtype in (("cast", model, torch.float64), ("twin", twin, torch.float32)):
        batch, *conditions = (
            {
                k: entry | {"tensor": entry["tensor"].to(dtype)} if k in ("pixels", "vectors") else entry
                for k, entry in b.items()
            }
            for b in (pixels, *others)
        )
        sampler = GenerationSampler(one_of_them)
        schedules = [
            make_schedule(model, [target], [scheme], [tokens], [3], scale, 0.5) for scale in (1.0, 2.0, [2.0, -1.0])
        ]
        options = {"text_tokenizer": TOKENIZER, "seed": 1, **limits}
        results = [sampler.generate(batch, schedule, **options) for schedule in schedules[:2]]
        results.append(sampler.generate_multi_guided(batch, conditions, schedules[2], **options))
        generated[name] = torch.cat([result[target]["tensor"][:, :4].flatten() for result in results])
    assert (generated["cast"] == generated["twin"]).float().mean() > 0.6, "16 bits may tip a choice, not most of them"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_of_tokens_are_computed_in_float32(dtype):
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    uniform = torch.linspace(0, 1 - 1e-6, 50)
    for limits in ((0, 0.0), (5, 0.0), (0, 0.7)):
        mine, exact = (TokenSampler(*limits)(values, 0.7, uniform) for values in (logits, logits.float().clone()))
        assert mine[1].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(mine, exact, strict=True))
