"""A user's session: versions and undo, cancelling, regions that are generated again, limits, downloads."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fourm.app.session import Limits, Request, Session, Sessions
from fourm.generation.results import read_result
from fourm.utils.errors import UserError
from tests.app.toy_app import DEPTH, RGB, SEMSEG, TOK_RGB, photo, toy_sampler

PROMPT = {"caption": "a red duck"}


@pytest.fixture(scope="module")
def sampler():
    return toy_sampler()


@pytest.fixture
def session(sampler):
    return Session(sampler, Limits(max_samples=3, max_versions=2))


def run(steps):
    return list(steps)[-1][1]


def ids(version, name, sample=0):
    return version.results[sample][name].tensor.flatten().tolist()


def test_samples_are_one_batch_and_are_those_of_the_sampler(session, sampler):
    request = Request(targets=[TOK_RGB, DEPTH], samples=2, seed=5, settings={"decoding_steps": {DEPTH: 2}})
    steps = list(session.generate(PROMPT, request))
    assert [step.target for step, _ in steps] == [TOK_RGB] * 4 + [DEPTH] * 2
    assert [step.number for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    version = session.current
    assert steps[-1][1] is version and version.complete and version.seeds == (5, 6) and not steps[0][1].results
    expected = sampler([PROMPT] * 2, [TOK_RGB, DEPTH], seed=[5, 6], decoding_steps={DEPTH: 2})
    for result, other in zip(version.results, expected, strict=True):
        assert result.keys() == other.keys() == {"caption", TOK_RGB, DEPTH}
        assert all(torch.equal(result[name].tensor, other[name].tensor) for name in result)


def test_targets_appear_step_by_step(session):
    missing = []
    for step, _ in session.generate(PROMPT, Request(targets=[DEPTH])):
        (result,) = step.results()
        missing.append(result[DEPTH].dropped)
    assert missing == [12, 8, 4, 0]


def test_what_is_given_is_not_generated(session, sampler, tmp_path):
    version = run(session.generate({RGB: photo(sampler, tmp_path)}, Request(targets=[TOK_RGB, DEPTH])))
    assert version.targets == (DEPTH,) and version.given == (RGB,)
    with pytest.raises(UserError, match="choose something to generate"):
        session.generate(PROMPT, Request(targets=["caption"]))


def test_a_cancelled_generation_keeps_what_it_has_and_can_be_undone(session):
    for step, _ in session.generate(PROMPT, Request(targets=[TOK_RGB, DEPTH])):
        if step.number == 2:
            session.cancel()
    version = session.current
    assert step.number == 3 and not version.complete
    assert DEPTH not in version.results[0] and version.results[0][TOK_RGB].dropped == 4
    assert not session.is_running and session.undo() is None
    assert run(session.generate(PROMPT, Request(targets=[DEPTH]))).complete


def test_a_user_generates_one_thing_at_a_time_and_cannot_undo_meanwhile(session):
    steps = session.generate(PROMPT, Request(targets=[DEPTH]))
    next(steps)
    with pytest.raises(UserError, match="running already"):
        next(session.generate(PROMPT, Request(targets=[DEPTH])))
    with pytest.raises(UserError, match="stop the generation"):
        session.undo()
    steps.close()  # as when the user closes the page
    assert not session.is_running and session.current is None


def test_undo_goes_back_through_the_versions_up_to_a_limit(session):
    first, second, third = (run(session.generate(PROMPT, Request(targets=[DEPTH], seed=seed))) for seed in range(3))
    assert session.current is third and session.undo() is second and session.undo() is None
    with pytest.raises(UserError, match="nothing to undo"):
        session.undo()


def test_a_region_is_generated_again_and_the_rest_stays(session):
    before = run(session.generate(PROMPT, Request(targets=[TOK_RGB, DEPTH, SEMSEG], samples=2)))
    assert session.editable(1) == [TOK_RGB, DEPTH, SEMSEG] and session.grid(DEPTH) == (4, 4)
    assert session.conditions(DEPTH, 1) == (["caption", TOK_RGB, SEMSEG], ["caption"])
    assert session.later_targets(DEPTH) == [SEMSEG]
    cells = [0, 1, 4, 5, 10]
    request = Request(
        targets=[SEMSEG], samples=3, seed=9, settings={"temps": {DEPTH: 5.0}, "decoding_steps": {DEPTH: 16}}
    )
    after = run(session.regenerate(DEPTH, 1, cells, ["caption", TOK_RGB], request))
    assert len(after.results) == 3 and after.given == ("caption",) and after.targets == (TOK_RGB, DEPTH, SEMSEG)
    old, new = np.array(ids(before, DEPTH, 1)), np.array([ids(after, DEPTH, sample) for sample in range(3)])
    rest = np.setdiff1d(np.arange(16), cells)
    assert (new[:, rest] == old[rest]).all() and (new[:, cells] != old[cells]).any()
    assert (new[0] != new[1]).any() and (new >= 0).all()
    assert ids(after, TOK_RGB) == ids(before, TOK_RGB, 1)
    assert session.undo() is before


def test_a_region_follows_a_changed_caption(session, sampler):
    run(session.generate(PROMPT, Request(targets=[DEPTH])))
    after = run(session.regenerate(DEPTH, 0, [3], ["caption"], Request(), changed={"caption": "a cup", RGB: "ignored"}))
    assert after.results[0]["caption"].value == sampler({"caption": "a cup"}, [DEPTH], seed=0)[0]["caption"].value
    assert RGB not in after.results[0]


def test_a_region_of_a_photograph_is_generated_by_its_tokens(session, sampler, tmp_path):
    before = run(session.generate({RGB: photo(sampler, tmp_path)}, Request(targets=[DEPTH])))
    assert TOK_RGB in session.editable() and session.picture_of(TOK_RGB, 0).shape == (32, 32, 3)
    assert session.conditions(TOK_RGB) == ([DEPTH], []) and session.later_targets(TOK_RGB) == [DEPTH]
    after = run(session.regenerate(TOK_RGB, 0, [0], [DEPTH], Request()))
    assert RGB not in after.results[0] and ids(after, DEPTH) == ids(before, DEPTH)
    shown = Image.fromarray(before.results[0][RGB].value)
    tokens = sampler({TOK_RGB: shown}, [DEPTH], seed=0)[0][TOK_RGB].tensor.flatten().tolist()
    assert ids(after, TOK_RGB)[1:] == tokens[1:] and ids(after, TOK_RGB)[0] >= 0
    assert after.given == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("caption", 0, [0], []), "no image 'caption'"),
        ((DEPTH, 7, [0], []), "no image"),
        ((DEPTH, -1, [0], []), "no image"),
        ((DEPTH, 0, [], ["caption"]), "select the region"),
        ((DEPTH, 0, [16], ["caption"]), "select the region"),
        ((DEPTH, 0, [-1], ["caption"]), "select the region"),
        ((DEPTH, 0, ["0"], ["caption"]), "select the region"),
        ((DEPTH, 0, [0], [DEPTH]), "cannot condition"),
        ((DEPTH, 0, [0], ["nothing"]), "cannot condition"),
    ],
)
def test_a_region_that_does_not_exist_is_refused(session, arguments, message):
    run(session.generate(PROMPT, Request(targets=[DEPTH])))
    with pytest.raises(UserError, match=message):
        session.regenerate(*arguments, Request())


@pytest.mark.parametrize(
    ("inputs", "request_", "message"),
    [
        ({}, Request(targets=[DEPTH]), "drop a picture"),
        (PROMPT, Request(targets=[DEPTH], samples=4), "1 to 3 samples"),
        (PROMPT, Request(targets=[DEPTH], samples=0), "1 to 3 samples"),
        (PROMPT, Request(targets=[DEPTH], seed=-1), "seed"),
        (PROMPT, Request(targets=[DEPTH], seed=2**60), "seed"),
        (PROMPT, Request(targets=["nothing"]), "'nothing' is not a target"),
    ],
)
def test_what_exceeds_the_limits_is_refused(session, inputs, request_, message):
    with pytest.raises(UserError, match=message):
        session.generate(inputs, request_)


def test_results_are_downloaded_with_the_settings_that_made_them(session, tmp_path):
    with pytest.raises(UserError, match="no results"):
        session.archive()
    request = Request(targets=[DEPTH, "metadata"], samples=2, seed=3, settings={"temps": {DEPTH: 0.5}})
    run(session.generate(PROMPT, request))
    version = run(session.regenerate(DEPTH, 1, [2], ["caption"], Request(seed=8)))
    zipfile.ZipFile(io.BytesIO(session.archive())).extractall(tmp_path)
    saved = read_result(tmp_path / "sample-0")
    assert saved.keys() == {"caption", DEPTH, "metadata"}
    assert np.array_equal(saved[DEPTH].value, version.results[0][DEPTH].value)
    first, second = json.loads((tmp_path / "steps.json").read_bytes())
    assert first["seeds"] == [3, 4] and first["settings"] == {"temps": {DEPTH: 0.5}} and first["complete"]
    assert second["region"] == {DEPTH: [2]} and second["sample"] == 1 and second["conditions"] == ["caption"]


def test_the_session_that_was_not_used_for_longest_makes_room(sampler):
    sessions = Sessions(sampler, Limits(max_users=2))
    first, second = sessions.get("a"), sessions.get("b")
    assert sessions.get("a") is first
    sessions.get("c")
    assert len(sessions) == 2 and sessions.get("a") is first and sessions.get("b") is not second


def test_sessions_that_generate_are_kept_and_stop_when_their_user_leaves(sampler):
    sessions = Sessions(sampler, Limits(max_users=1))
    steps = sessions.get("a").generate(PROMPT, Request(targets=[DEPTH]))
    next(steps)
    with pytest.raises(UserError, match="try again later"):
        sessions.get("b")
    sessions.drop("a")
    assert len(list(steps)) == 1 and len(sessions) == 0
