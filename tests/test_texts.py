from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from headstart import texts
from tests import examples

SENTENCES = [
    "the film was splendid",
    "",
    "a bore",
    "the garden next to the train was cold and dull and truly awful",
    "the film was splendid",
    "zebra",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    examples.write_bert(folder)
    return folder / "tokenizer.json"


def tokens_of(found: texts.Tokens, row: int) -> list[int]:
    return found.ids[found.bounds[row] : found.bounds[row + 1]].tolist()


def test_each_text_has_the_tokens_that_it_would_have_alone(tokenizer: Path) -> None:
    alone = Tokenizer.from_file(str(tokenizer))
    found = texts.tokenise(SENTENCES, tokenizer, 64)
    for row, sentence in enumerate(SENTENCES):
        assert tokens_of(found, row) == alone.encode(sentence).ids
    assert found.lengths.tolist() == [6, 2, 4, 15, 6, 3]


def test_texts_beyond_one_chunk_are_all_there(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = texts.tokenise(SENTENCES, tokenizer, 64)
    monkeypatch.setattr(texts, "CHUNK", 4)
    pieces = texts.tokenise(SENTENCES, tokenizer, 64)
    assert (pieces.ids == whole.ids).all()
    assert (pieces.bounds == whole.bounds).all()


def test_the_order_of_the_texts_does_not_change_their_tokens(tokenizer: Path) -> None:
    one = texts.tokenise(SENTENCES, tokenizer, 64)
    two = texts.tokenise(SENTENCES[::-1], tokenizer, 64)
    for row in range(len(SENTENCES)):
        assert tokens_of(one, row) == tokens_of(two, len(SENTENCES) - 1 - row)


def test_a_long_text_is_cut_and_keeps_the_marks_around_it(tokenizer: Path) -> None:
    whole = tokens_of(texts.tokenise(SENTENCES, tokenizer, 64), 3)
    cut = tokens_of(texts.tokenise(SENTENCES, tokenizer, 8), 3)
    assert cut == [*whole[:7], whole[-1]]


def test_padding_and_truncation_that_a_tokenizer_was_saved_with_do_not_count(
    tokenizer: Path, tmp_path: Path
) -> None:
    saved = Tokenizer.from_file(str(tokenizer))
    saved.enable_padding(length=50)
    saved.enable_truncation(5, direction="left")
    saved.save(str(tmp_path / "tokenizer.json"))
    one, two = (texts.tokenise(SENTENCES, path, 12) for path in (tokenizer, tmp_path / "tokenizer.json"))
    assert (one.ids == two.ids).all()
    assert (one.bounds == two.bounds).all()


def test_no_texts_are_no_tokens_and_no_batches(tokenizer: Path) -> None:
    found = texts.tokenise([], tokenizer, 64)
    assert found.lengths.tolist() == []
    assert texts.batches(found.lengths, 100) == []


def test_a_batch_is_padded_to_its_longest_and_says_where_there_is_text(tokenizer: Path) -> None:
    found = texts.tokenise(SENTENCES, tokenizer, 64)
    ids, mask = found.padded(np.array([2, 0, 1]), padding=9)
    a, b, c = (tokens_of(found, row) for row in (2, 0, 1))
    assert ids.tolist() == [[*a, 9, 9], b, [*c, 9, 9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 0, 0, 0, 0]]
    assert ids.dtype == mask.dtype == np.int64


def test_a_text_without_a_single_token_still_has_a_place(tmp_path: Path) -> None:
    bare = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))  # no marks around a text
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.save(str(tmp_path / "tokenizer.json"))
    found = texts.tokenise(["", "word word", ""], tmp_path / "tokenizer.json", 8)
    assert found.lengths.tolist() == [0, 2, 0]
    assert sorted(np.concatenate(texts.batches(found.lengths, 4)).tolist()) == [0, 1, 2]
    ids, mask = found.padded(np.array([0, 1]), padding=7)
    assert ids.tolist() == [[7, 7], [1, 1]]
    assert mask.tolist() == [[1, 0], [1, 1]]
    ids, mask = found.padded(np.array([0, 2]), padding=7)
    assert ids.tolist() == [[7], [7]]
    assert mask.tolist() == [[1], [1]]


@pytest.mark.parametrize("budget", [1, 30, 128, 4096])
def test_batches_hold_every_text_once_longest_first_within_the_budget(budget: int) -> None:
    lengths = np.random.default_rng(0).integers(2, 129, 500)
    found = texts.batches(lengths, budget)
    order = np.concatenate(found)
    assert sorted(order.tolist()) == list(range(500))
    assert (np.diff(lengths[order]) <= 0).all()
    for rows in found:
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= budget


def test_batches_leave_hardly_any_place_empty() -> None:
    lengths = np.random.default_rng(0).integers(2, 129, 5000)
    places = sum(len(rows) * lengths[rows].max() for rows in texts.batches(lengths, 4096))
    assert places < 1.05 * lengths.sum()


def test_texts_of_one_length_stay_in_order() -> None:
    found = texts.batches(np.full(10, 5), 20)
    assert [rows.tolist() for rows in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_texts_of_one_length_share_a_batch_and_no_others() -> None:
    lengths = np.array([3, 9, 3, 0, 9, 3, 3, 9, 0])
    rows = np.array([0, 1, 2, 3, 4, 5, 6, 8])
    found = texts.of_one_length(lengths, rows, 9)
    assert [part.tolist() for part in found] == [[1], [4], [0, 2, 5], [6], [3, 8]]
    assert texts.of_one_length(lengths, rows[:0], 9) == []


LONG = {
    "words": " ".join(SENTENCES * 200),
    "lines": "\n\n".join(SENTENCES * 200),
    "no spaces": "电影很好看但是结局不好" * 500,
    "one word": "splendid" * 2000,
    "a word, then none": "splendid " + "电影很好看" * 1000,
    "spaces alone": " " * 20_000,
    "spaces, then words": " " * 5_000 + " ".join(SENTENCES * 100),
}


@pytest.fixture(scope="module")
def tokenizers(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, corpus = tmp_path_factory.mktemp("tokenizers"), [*SENTENCES, *LONG.values()]
    found = {"WordPiece": tokenizer}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    for name, model, before, trainer in (
        ("BPE", models.BPE(), pre_tokenizers.ByteLevel(), trainers.BpeTrainer(initial_alphabet=alphabet)),
        ("Unigram", models.Unigram(), pre_tokenizers.Metaspace(), trainers.UnigramTrainer(vocab_size=80)),
        ("one word", models.BPE(), None, trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=300)),
    ):
        trained = Tokenizer(model)
        if before is not None:
            trained.pre_tokenizer = before  # type: ignore[assignment]
        trained.train_from_iterator([text[:400] for text in corpus], trainer)
        found[name] = folder / f"{name}.json"
        trained.save(str(found[name]))
    return found


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram", "one word"])
def test_of_a_long_text_the_beginning_gives_the_tokens_that_all_of_it_gives(
    kind: str, tokenizers: dict[str, Path]
) -> None:
    plain = Tokenizer.from_file(str(tokenizers[kind]))
    plain.no_padding()
    plain.enable_truncation(16)
    found = texts.tokenise(list(LONG.values()), tokenizers[kind], 16)
    for row, text in enumerate(LONG.values()):
        assert tokens_of(found, row) == plain.encode(text).ids


def test_a_text_of_megabytes_is_not_read_to_its_end(tokenizers: dict[str, Path]) -> None:
    for kind in ("WordPiece", "BPE", "Unigram"):
        whole = Tokenizer.from_file(str(tokenizers[kind]))
        whole.no_truncation()
        for name in ("words", "lines"):
            assert len(texts.beginning(LONG[name] * 50, 16, whole)) < 5_000
    assert len(texts.beginning(LONG["no spaces"] * 50, 16, whole)) < 5_000
