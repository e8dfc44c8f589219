"""Training of the text vocabulary: layout, corpus files, and the same file from the same corpus."""

import json
import random
import subprocess
import tarfile
from pathlib import Path

import pytest

from fourm.utils.errors import UserError
from fourm.utils.tokenizer import load_text_tokenizer
from fourm.utils.tokenizer.train_wordpiece import corpus, layout, main, train_wordpiece
from tests.warm_python import warm_python

ROOT = Path(__file__).parents[2]
WORDS = ["duck", "ducks", "wooden", "checkered", "table", "tables", "painted", "paint", "zebra", "kettle", "settled"]
SYNSET = '00001740 03 n 02 dining_table 0 board 0 001 @ 0000 n 0000 | a table for meals; "he sat down at the table"  \n'


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(" ".join(rng.choices(WORDS, k=6)) for _ in range(200)))
    return path


def run(*arguments):
    return subprocess.run(
        [warm_python(), "train_wordpiece_tokenizer.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_writes_the_same_file_again(tmp_path, text):
    for name in ("a.json", "b.json"):  # separate processes, because their hash seeds differ
        done = run("--input", text, "--output", tmp_path / name, "--vocab_size", 4460)
        assert done.returncode == 0 and "tokens, 1" in done.stdout, done.stderr
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    tokenizer = load_text_tokenizer(tmp_path / "a.json")
    assert tokenizer.encode("v0=3 dining table ducks tables").tokens == ["v0=3", "dining table", "ducks", "tables"]


def test_layout_comes_first_and_only_it_is_special(text):
    tokenizer = train_wordpiece(corpus([str(text)]), 4420)
    ids = tokenizer.get_vocab()
    assert (
        [ids[token.content] for token in layout()] == list(range(4284)) == sorted(tokenizer.get_added_tokens_decoder())
    )
    assert sorted(ids.values()) == list(range(4420))
    shipped = json.loads(
        load_text_tokenizer("fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json").to_str()
    )
    content = json.loads(tokenizer.to_str())
    assert {k: v for k, v in content.items() if k != "model"} == {k: v for k, v in shipped.items() if k != "model"}
    flags = {(token["single_word"], token["normalized"]) for token in content["added_tokens"][:4]}
    assert flags == {(False, False)} and all(token["special"] for token in content["added_tokens"])
    assert {t["single_word"] for t in content["added_tokens"][4:]} == {True}
    assert [t["normalized"] for t in content["added_tokens"][4:]] == [False] * 4200 + [True] * 80


def test_ascii_is_never_unknown(text):
    tokenizer = train_wordpiece(corpus([str(text)]), 4500)
    printable = "".join(map(chr, range(32, 127)))
    assert "[UNK]" not in tokenizer.encode(" ".join(printable) + " " + printable + " Qx9j").tokens


def test_corpus_files(tmp_path):
    wordnet = tmp_path / "a" / "dict"
    wordnet.mkdir(parents=True)
    (wordnet / "data.noun").write_text("  1 the licence\n" + SYNSET)
    (wordnet / "index.noun").write_text("never read\n")
    (tmp_path / "a" / "z.txt").write_text("first line\nsecond line")
    (tmp_path / "a" / "b.json").write_text(json.dumps([{"caption": "one"}, "two", 3]))
    (tmp_path / "c.txt").write_text("in a shard")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "c.txt", "0001.txt")
    synset = 'dining table, board: a table for meals; "he sat down at the table"'
    assert list(corpus([str(wordnet)])) == [synset]
    assert list(corpus([str(tmp_path / "a" / "z.txt"), str(tmp_path / "shard.tar")])) == [
        "first line",
        "second line",
        "in a shard",
    ]
    assert list(corpus([str(tmp_path / "a" / "b.json")])) == ["one", "two"]


@pytest.mark.parametrize(
    "content, options, message",
    [
        (b"\xff\xfe\x00", [], "corpus.txt cannot be read as text"),
        (b"duck", ["--vocab_size", "4284"], "vocab_size must be at least 4"),
        (None, [], "corpus.txt does not exist"),
        (b"duck", ["--vocabsize", "1"], "unknown key '--vocabsize' (did you mean '--vocab_size'?)"),
    ],
)
def test_errors_are_one_line(tmp_path, content, options, message):
    if content is not None:
        (tmp_path / "corpus.txt").write_bytes(content)
    with pytest.raises(UserError) as error:
        main(["--input", str(tmp_path / "corpus.txt"), "--output", str(tmp_path / "o.json"), *options])
    assert message in str(error.value) and not (tmp_path / "o.json").exists()


def test_error_of_the_command():
    done = run("--input", "nowhere.txt", "--output", "o.json")
    assert done.returncode == 2 and done.stderr == "error: input: nowhere.txt does not exist\n"
