"""Tokens are selected from the masks alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourm.models.token_selection import Selection, select_tokens

KINDS = {"a": {"type": "img", "id": 11}, "b": {"type": "seq", "id": 12}, "c": {"type": "img", "id": 13}}


def batch(masks):
    """{modality: (inputs, targets)} as strings of one sample each, "x" = valid."""

    def mask(rows):
        return torch.tensor([[token != "x" for token in row] for row in rows])

    return {
        name: {
            "input_mask": mask(inputs),
            "target_mask": mask(targets),
            "decoder_attention_mask": (~mask(targets)).int(),
        }
        for name, (inputs, targets) in masks.items()
    }


def select(masks, encoder_tokens=4, decoder_tokens=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return select_tokens(batch(masks), KINDS, KINDS, encoder_tokens, decoder_tokens, generator)


def rows_of(selection, name):
    rows = selection.rows()[name]
    return list(zip(rows.sample.tolist(), rows.index.tolist(), rows.position.tolist(), strict=True))


def test_the_first_valid_inputs_are_kept_in_the_order_of_the_batch():
    encoder = select({"c": (["x.x", "..."], ["...", "..."]), "a": (["xx.x", ".x.."], ["....", "...."])}).encoder
    assert encoder.modality.tolist() == [[13, 13, 11, 11], [11, -1, -1, -1]]
    assert rows_of(encoder, "c") == [(0, 0, 0), (0, 2, 2)]
    assert rows_of(encoder, "a") == [(0, 0, 0), (0, 1, 1), (1, 1, 1)]
    assert rows_of(encoder, "b") == []
    assert encoder.padding.tolist() == [[False] * 4, [False, True, True, True]]


def test_positions_of_a_sequence_count_its_valid_tokens():
    encoder = select({"b": ([".xx..x"], ["......"])}).encoder
    assert rows_of(encoder, "b") == [(0, 1, 0), (0, 2, 1), (0, 5, 2)]


def test_sequence_targets_are_shifted():
    """The last valid token is only predicted; a gap breaks the chain."""
    decoder = select({"b": (["......."], [".xxx.xx"])}).decoder
    assert rows_of(decoder, "b") == [(0, 1, 0), (0, 2, 1), (0, 5, 3)]
    assert decoder.attention.tolist() == [[1, 1, 1, 0]]


def test_target_modalities_come_in_a_random_order_that_the_generator_decides():
    masks = {name: (["..."], ["xxx"]) for name in KINDS}
    orders = [select(masks, decoder_tokens=8, seed=seed).decoder.modality.tolist() for seed in range(20)]
    assert len({str(order) for order in orders}) == 6
    assert orders == [select(masks, decoder_tokens=8, seed=seed).decoder.modality.tolist() for seed in range(20)]
    assert all(sorted(order[0]) == [11] * 3 + [12] * 2 + [13] * 3 for order in orders)
    # The rows follow the order of the model, not that of the slots, so that all ranks call modules in the same order.
    assert {tuple(select(masks, seed=seed).decoder.counts) for seed in range(20)} == {("a", "b", "c")}


def test_place_and_take_are_inverse():
    encoder = select({"a": (["xx.x", ".x.."], ["....", "...."]), "b": (["x..x", "xxxx"], ["....", "...."])}).encoder
    tokens = [torch.randn(count, 5) for count in encoder.counts.values()]
    slots = encoder.place(tokens)
    assert slots.shape == (2, 4, 5)
    assert (slots[encoder.padding] == 0).all()
    taken = encoder.take(slots)
    for name, expected in zip(encoder.counts, tokens, strict=True):
        assert torch.equal(taken[name], expected)


def test_slots_that_all_samples_leave_empty_are_trimmed():
    masks = {"a": (["xx..", "x..."], ["....", "...."]), "b": (["...", "xx."], ["...", "..."])}
    for num_slots, shape in ((2, (2, 2)), (8, (2, 3))):
        selection = select_tokens(batch(masks), KINDS, KINDS, num_slots, 8, pack=True)
        assert selection.encoder.modality.shape == shape and selection.decoder.modality.shape == (2, 1)
        assert torch.equal(selection.encoder.modality, select(masks, num_slots).encoder.modality[:, : shape[1]])


def test_everything_is_what_selecting_full_rows_gives():
    selected = select_tokens(batch({"a": (["xxx", "xxx"], ["...", "..."])}), {"a": KINDS["a"]}, {"a": KINDS["a"]}, 3, 3)
    everything = Selection.everything("a", 2, 3, torch.device("cpu"))
    assert rows_of(everything, "a") == rows_of(selected.encoder, "a")
    assert torch.equal(everything.slot, selected.encoder.slot)


row = st.text("x.", min_size=6, max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(row, row, row), min_size=1, max_size=4), st.integers(1, 20))
def test_every_valid_token_gets_one_slot_until_they_are_full(samples, num_slots):
    columns = {name: [sample[i] for sample in samples] for i, name in enumerate(KINDS)}
    selection = select({name: (rows, rows) for name, rows in columns.items()}, num_slots, num_slots).encoder
    assert len(set(selection.slot.tolist())) == len(selection.slot)
    for b, sample in enumerate(samples):
        valid = [(name, i) for name, text in zip(KINDS, sample, strict=True) for i, c in enumerate(text) if c == "x"]
        kept = [(name, i) for name in KINDS for s, i, _ in rows_of(selection, name) if s == b]
        assert kept == valid[:num_slots]
        assert (~selection.padding[b]).tolist() == [j < len(kept) for j in range(num_slots)]
