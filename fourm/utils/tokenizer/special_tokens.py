"""The fixed tokens of the text vocabulary, which precede the learned pieces, in the order of their ids."""

from __future__ import annotations

CONTROL = ("[PAD]", "[UNK]", "[SOS]", "[EOS]")  # ids 0 … 3
PAD, UNK, SOS, EOS = CONTROL
PAD_ID, UNK_ID, SOS_ID, EOS_ID = range(4)

NUM_SENTINELS = 200
NUM_BINS = 1000

COCO_CLASSES = tuple(
    """airplane, apple, backpack, banana, baseball bat, baseball glove, bear, bed, bench, bicycle, bird, boat, book,
    bottle, bowl, broccoli, bus, cake, car, carrot, cat, cell phone, chair, clock, couch, cow, cup, dining table,
    dog, donut, elephant, fire hydrant, fork, frisbee, giraffe, hair drier, handbag, horse, hot dog, keyboard, kite,
    knife, laptop, microwave, motorcycle, mouse, orange, oven, parking meter, person, pizza, potted plant,
    refrigerator, remote, sandwich, scissors, sheep, sink, skateboard, skis, snowboard, spoon, sports ball,
    stop sign, suitcase, surfboard, teddy bear, tennis racket, tie, toaster, toilet, toothbrush, traffic light,
    train, truck, tv, umbrella, vase, wine glass, zebra""".replace("\n    ", " ").split(", ")
)


def sentinel(index: int) -> str:
    """Return the token that replaces the ``index``-th dropped span; spans count from 1."""
    return f"[S_{index}]"


def sentinel_id(index: int) -> int:
    """Return the id of :func:`sentinel` in this layout."""
    return len(CONTROL) + index


SENTINELS = tuple(sentinel(index) for index in range(NUM_SENTINELS))
COORDINATES = tuple(f"v{role}={value}" for role in range(4) for value in range(NUM_BINS))
