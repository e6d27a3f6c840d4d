"""Every form of data becomes the same batches."""

from __future__ import annotations

import networks
import numpy as np
import pytest
import torch

from bitfold.calibration import Settings
from bitfold.calibration.batches import as_batches

ROWS = [[5, 6, 7], [8, 9], [1, 2, 3, 4]]


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("transformers")
    return networks.make("llama")


class TakesTwo(torch.nn.Module):
    def forward(self, x, factor):
        return x * factor


def ids(batches):
    return [batch.kwargs["input_ids"].tolist() for batch in batches]


def test_sequences_are_sorted_padded_and_masked(llama):
    (batch,) = as_batches(ROWS, llama, None, Settings())
    assert ids([batch]) == [[[8, 9, 0, 0], [5, 6, 7, 0], [1, 2, 3, 4]]]
    assert batch.masks[0].tolist() == [[True] * n + [False] * (4 - n) for n in (2, 3, 4)]
    assert torch.equal(batch.kwargs["attention_mask"], batch.masks[0].long())


@pytest.mark.parametrize(
    "given",
    [
        ROWS,
        (row for row in ROWS),
        [torch.tensor(row) for row in ROWS],
        [{"input_ids": row} for row in ROWS],
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ROWS],
    ],
    ids=["lists", "generator", "tensors", "dicts", "dicts-with-masks"],
)
def test_forms_of_single_sequences(llama, given):
    assert ids(as_batches(given, llama, None, Settings())) == ids(as_batches(ROWS, llama, None, Settings()))


def test_batches_are_taken_as_they_are(llama):
    table = torch.tensor([[1, 2], [3, 4]])
    assert ids(as_batches([table, table], llama, None, Settings())) == [table.tolist()] * 2
    assert ids(as_batches(table, llama, None, Settings())) == [table.tolist()]
    padded = {"input_ids": table, "attention_mask": torch.tensor([[1, 0], [1, 1]])}
    (batch,) = as_batches([padded], llama, None, Settings())
    assert batch.masks[0].tolist() == [[True, False], [True, True]]
    (batch,) = as_batches([{"input_ids": [[1, 2], [3, 4]]}], llama, None, Settings())
    assert ids([batch]) == [table.tolist()]


def test_texts_go_through_any_tokenizer(llama):
    def tokenizer(text):
        return [ord(letter) - 90 for letter in text]

    one = as_batches(["abc", "de"], llama, tokenizer, Settings())
    assert ids(one) == [[[10, 11, 0], [7, 8, 9]]]
    assert ids(as_batches("abc", llama, tokenizer, Settings())) == [[[7, 8, 9]]]
    as_dict = as_batches(["abc", "de"], llama, lambda text: {"input_ids": tokenizer(text)}, Settings())
    assert ids(as_dict) == ids(one)


def test_long_texts_are_cut_and_packed_ones_are_full(llama):
    row = list(range(1, 11))
    assert ids(as_batches([row], llama, None, Settings(sequence_length=4))) == [
        [[9, 10, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    ]
    packed = as_batches([row, row], llama, None, Settings(sequence_length=6, pack=True))
    assert ids(packed) == [[[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 1, 2], [3, 4, 5, 6, 7, 8]]]
    assert [len(part) for part in ids(as_batches([row] * 5, llama, None, Settings(batch_size=2)))] == [
        2,
        2,
        1,
    ]


def test_decoders_are_fed_the_shifted_input():
    pytest.importorskip("transformers")
    (batch,) = as_batches(ROWS, networks.make("t5"), None, Settings())
    assert batch.kwargs["decoder_input_ids"].tolist() == [[0, 8, 9, 0], [0, 5, 6, 7], [0, 1, 2, 3]]
    given = {"input_ids": [1, 2, 3], "labels": [4, 5]}
    (batch,) = as_batches([given], networks.make("t5"), None, Settings())
    assert "decoder_input_ids" not in batch.kwargs
    assert batch.kwargs["labels"].tolist() == [[4, 5]]


def test_plain_models_get_positional_tensors_and_equal_lengths():
    model = networks.make("perceptron")
    x = torch.randn(3, 48)
    (batch,) = as_batches([x], model, None, Settings())
    assert batch.args[0] is x
    (batch,) = as_batches([(x, 2)], TakesTwo(), None, Settings())
    assert batch.args == (x, 2)
    rows = as_batches([[1, 2], [3], [4, 5]], model, None, Settings())
    assert [batch.args[0].tolist() for batch in rows] == [[[3]], [[1, 2], [4, 5]]]


def test_a_ragged_dict_is_refused(llama):
    with pytest.raises(ValueError, match=r"item 0\['input_ids'\]: a list that is no rectangle"):
        as_batches([{"input_ids": [[1, 2], [3]]}], llama, None, Settings())


def test_arrays_are_tensors(llama):
    rows = as_batches([np.array(row) for row in ROWS], llama, None, Settings())
    assert ids(rows) == ids(as_batches(ROWS, llama, None, Settings()))
    (batch,) = as_batches([{"input_ids": np.array([[1, 2]])}], llama, None, Settings())
    assert batch.kwargs["input_ids"].tolist() == [[1, 2]]
    (batch,) = as_batches([np.ones((3, 48), "float32")], networks.make("perceptron"), None, Settings())
    assert batch.args[0].shape == (3, 48)
