"""Which structure "auto" takes, and that no batch is lost or read twice on the way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader, IterableDataset

from laplace_lora_fast import KFAC, Classes, InvalidBatchError, LaplaceLoRA, LowRank, Rows
from tests import tiny
from tests.structures.dense import TRAIN, fitted, model_of


def test_auto_chooses_rows_for_small_data_and_says_why() -> None:
    model = model_of(3)
    small = fitted(model, "auto")
    assert small.snapshot()[0].structure == Rows()
    assert "rows" in small.summary()
    assert fitted(model, "auto", budget=1000).snapshot()[0].structure == KFAC()
    endless = LaplaceLoRA(model, Classes()).fit(iter([TRAIN]), progress=False)
    assert endless.snapshot()[0].structure == LowRank()
    assert endless.snapshot()[0].n_examples == 7  # the batch looked at is not lost
    assert "no length" in endless.summary()


class Stream(IterableDataset):
    """Hands out one stream, however often it is asked."""

    def __init__(self, items: list[tiny.Batch]) -> None:
        self._items = iter(items)

    def __iter__(self) -> Iterator[tiny.Batch]:
        return self._items


@pytest.mark.parametrize("structure", ["auto", "kfac", "rows"])
def test_no_batch_of_a_stream_is_lost(structure: str) -> None:
    """Nor of a DataLoader over one, which has no length."""
    for stream in (Stream(tiny.split(TRAIN, 3)), DataLoader(Stream(tiny.split(TRAIN, 1)), batch_size=None)):
        la = LaplaceLoRA(model_of(3), Classes(), structure=structure).fit(stream, progress=False)
        assert la.snapshot()[0].n_examples == len(TRAIN["labels"])
        if structure == "auto":
            assert "no length" in la.summary()


def test_a_pass_starts_its_loader_once() -> None:
    """Workers of a DataLoader, and draws of its order, would be doubled."""
    starts = []

    class Loader(list):
        def __iter__(self) -> Iterator[tiny.Batch]:
            starts.append(True)
            return super().__iter__()

    loader = Loader(tiny.split(TRAIN, 3))
    la = LaplaceLoRA(model_of(3), Classes()).fit(loader, progress=False)
    assert len(starts) == 1
    la.predictions(loader, progress=False)
    assert len(starts) == 2


def test_ekfac_of_a_stream_is_refused() -> None:
    la = LaplaceLoRA(model_of(3), Classes(), structure="ekfac")
    with pytest.raises(InvalidBatchError, match="no batch"):
        la.fit(Stream(tiny.split(TRAIN, 3)), progress=False)
    batches, passes = tiny.split(TRAIN, 3), []

    class Shrinking(list):
        def __iter__(self) -> Iterator[tiny.Batch]:
            passes.append(True)
            return iter(batches[: 5 - len(passes)])

    with pytest.raises(InvalidBatchError, match="7 examples in a first pass and 6 in a second"):
        la.fit(Shrinking(batches), progress=False)
