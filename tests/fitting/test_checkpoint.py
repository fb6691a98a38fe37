"""A fit that was killed and goes on gives bitwise what it would have given; any other checkpoint is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Answers,
    Checkpoint,
    Diagonal,
    LaplaceLoRA,
    LowRank,
    MonteCarlo,
    Options,
    Regression,
    Rows,
    StateError,
    Tokens,
)
from laplace_lora_fast.saving import checked, recorder
from tests import tiny

ANSWERS = Answers(tiny.ANSWERS)
STRUCTURES = {
    "rows": Rows(),
    "rows, sampled labels": Rows(fisher=MonteCarlo(2), columns=5),
    "rows, refit": Rows(refit=True, columns=6),
    "kfac": KFAC(factors="dense"),
    "kfac, expand": KFAC(tokens="expand", factors="dense"),
    "kfac, sketch": KFAC(tokens="expand", factors="sketch", columns=6),
    "kfac, sampled labels": KFAC(fisher="mc", factors="dense"),
    "ekfac": EKFAC(factors="dense"),
    "diagonal": Diagonal(),
    "low rank": LowRank(rank=10, columns=6),
    "auto": "auto",
}
TEST = tiny.batch(3, 6, seed=77)


class Killed(Exception):
    """Stands for a kill: nothing of the fit's own runs after it."""


def data(n=7):
    return [tiny.batch(2 + index % 3, 5 + index % 2, seed=index) for index in range(n)]


def ragged(n=5):
    """Groups of two and of three sequences, with the option's tokens as labels."""
    made = []
    for index in range(n):
        sizes = [2, 3, 2] if index % 2 else [3, 3]
        batch = tiny.batch(sum(sizes), 6, seed=index, padding="right", labels=False)
        counted = batch["attention_mask"].clone()
        counted[:, 0] = 0
        group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        made.append(batch | {"group": group, "option_mask": counted, "labels": torch.ones(len(sizes)).long()})
    return made


def stopping(batches, after):
    """A loader that is killed after so many batches; counted over all its passes."""
    state = {"left": after}

    class Loader:
        def __len__(self):
            return len(batches)

        def __iter__(self):
            return self.counted(iter(batches))

        def counted(self, some):
            for batch in some:
                if state["left"] == 0:
                    raise Killed
                state["left"] -= 1
                yield batch

    return Loader()


def laplace(structure, model=None, task=ANSWERS, **options):
    return LaplaceLoRA(tiny.tiny_llama() if model is None else model, task, structure=structure, **options)


def tensors(la):
    fit = la.snapshot()[0]
    found = fit.curvature.tensors() | {"n": torch.tensor(fit.n_examples)}
    return found | {"log likelihood": torch.tensor(fit.log_likelihood, dtype=torch.float64)}


def require_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def interrupted(make, batches, folder, stops, **options):
    """The fit after several kills, each after some batches more."""
    for after in stops:
        with pytest.raises(Killed):
            make().fit(stopping(batches, after), checkpoint=Checkpoint(folder, 0), progress=False, **options)
    return make().fit(batches, checkpoint=Checkpoint(folder, 0), progress=False, **options)


@pytest.mark.parametrize("name", STRUCTURES)
def test_bitwise_after_kills(name, tmp_path):
    structure = STRUCTURES[name]
    expected = laplace(structure).fit(data(), progress=False)
    # a second pass begins after 7 batches; batches that were taken in before are read again
    stops = [1, 3, 3, 6, 9, 12] if name == "ekfac" else [2, 2, 5, 6]
    found = interrupted(lambda: laplace(structure), data(), tmp_path / "new", stops)
    require_equal(tensors(found), tensors(expected))
    assert torch.equal(found.predict(TEST), expected.predict(TEST))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["device", "files"])
def test_ragged_options_and_rows_in_files(place, tmp_path):
    budget = 1000 if place == "files" else None

    def make():
        return laplace(Rows(), task=Options(), budget=budget)

    expected = make().fit(ragged(), progress=False)
    found = interrupted(make, ragged(), tmp_path, [1, 2, 4])
    require_equal(tensors(found), tensors(expected))


def test_tokens(tmp_path):
    batches = [
        batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
        for batch in data()
    ]

    def make():
        return laplace(KFAC(tokens="expand", factors="dense"), task=Tokens(samples=2))

    expected = make().fit(batches, progress=False).snapshot()[0].curvature.tensors()
    found = interrupted(make, batches, tmp_path, [2, 4]).snapshot()[0].curvature.tensors()
    require_equal(found, expected)


def test_regression(tmp_path):
    model = tiny.tiny_llama_classifier(1)
    batches = [tiny.batch(3, 5, classes=0, seed=index) for index in range(4)]
    expected = laplace("rows", model, Regression()).fit(batches, progress=False)
    found = interrupted(lambda: laplace("rows", model, Regression()), batches, tmp_path, [2, 3])
    require_equal(tensors(found), tensors(expected))
    assert found.sigma_noise == expected.sigma_noise


def test_a_shuffling_loader_with_a_generator_of_its_own(tmp_path):
    examples = [
        {key: value[0] for key, value in tiny.batch(1, 5, seed=i, padding=None).items()} for i in range(9)
    ]

    def loader():
        return torch.utils.data.DataLoader(
            examples, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3)
        )

    make = lambda: laplace(EKFAC(factors="dense"))  # noqa: E731
    expected = make().fit(loader(), progress=False)
    for after in (3, 8):
        with pytest.raises(Killed):
            make().fit(stopping(loader(), after), checkpoint=Checkpoint(tmp_path, 0), progress=False)
    found = make().fit(loader(), checkpoint=Checkpoint(tmp_path, 0), progress=False)
    require_equal(tensors(found), tensors(expected))
    torch.manual_seed(0)
    with pytest.raises(Killed):
        make().fit(stopping(loader(), 2), checkpoint=Checkpoint(tmp_path, 0), progress=False)
    with pytest.raises(StateError, match=r"differs in its first 2 batches.*generator with a seed"):
        make().fit(
            torch.utils.data.DataLoader(examples, batch_size=2, shuffle=True),
            checkpoint=tmp_path,
            progress=False,
        )


@pytest.fixture
def begun(tmp_path):
    """A checkpoint of three batches with rows."""
    with pytest.raises(Killed):
        laplace(Rows()).fit(stopping(data(), 3), checkpoint=Checkpoint(tmp_path, 0), progress=False)
    return tmp_path


OTHERS = {
    "data": (lambda: laplace(Rows()), data(8)[1:], "differs in its first 3 batches"),
    "fewer data": (lambda: laplace(Rows()), data()[:1], "has 1 batches, of which 3 were taken in"),
    "order": (lambda: laplace(Rows()), data()[::-1], "differs in its first 3 batches"),
    "structure": (lambda: laplace("kfac"), data(), "another fit, which differs in options, structure"),
    "option": (
        lambda: laplace(Rows(columns=5)),
        data(),
        "differs in options, structure, Rows, columns: null then, 5",
    ),
    "seed": (lambda: laplace(Rows(), seed=1), data(), "differs in options, seed: 0 then, 1 now"),
    "task": (lambda: laplace(Rows(), task=Answers((5, 11))), data(), "differs in options, task"),
    "adapter": (
        lambda: laplace(Rows(), tiny.adapt(tiny.tiny_llama().unload(), seed=5)),
        data(),
        "differs in the adapter's weights",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_of_another_fit_is_refused(name, begun):
    make, batches, message = OTHERS[name]
    with pytest.raises(StateError, match=message):
        make().fit(batches, checkpoint=begun, progress=False)
    found = laplace(Rows()).fit(data(), checkpoint=begun, progress=False)  # nothing was lost
    require_equal(tensors(found), tensors(laplace(Rows()).fit(data(), progress=False)))


def test_another_prior_is_no_other_fit(begun):
    assert (
        laplace(Rows(), prior_precision=3.0).fit(data(), checkpoint=begun, progress=False).prior_precision
        == 3
    )


def files(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


@pytest.mark.parametrize("which", [1, 3])
@pytest.mark.parametrize("how", ["cut", "flipped", "older", "other run", "gone"])
def test_damaged_checkpoints_are_refused(how, which, begun):
    found = files(begun)
    assert [path.name for path in found] == [
        f"rank-0-of-1-stage-0{part}.safetensors" for part in ("-part-0", "-part-1", "-part-2", "")
    ]
    path = found[which]
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif how == "gone":
        path.unlink()
        if path.name.endswith("stage-0.safetensors"):  # as before the first write: parts alone count nothing
            laplace(Rows()).fit(data(), checkpoint=begun, progress=False)
            return
    else:
        with safe_open(path, "pt") as file:
            old, kept = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        header = json.loads(old["header"]) | ({"run": "another"} if how == "other run" else {})
        form = "laplace-lora-fast-checkpoint/0" if how == "older" else recorder.FORMAT
        safetensors.torch.save_file(kept, path, checked.metadata(form, json.dumps(header), kept))
    message = {
        "cut": "truncated or damaged",
        "flipped": "does not match its checksum",
        "older": "this version reads .*: delete .* to start again",
        "other run": "is of another fit",
        "gone": "is missing",
    }[how]
    with pytest.raises(StateError, match=message):
        laplace(Rows()).fit(data(), checkpoint=begun, progress=False)


@pytest.mark.parametrize("failing", range(1, 5))
def test_a_full_disk_loses_nothing(failing, tmp_path, monkeypatch):
    """At any of the writes, parts or state, a half-written file and an error; then there is room again."""
    save, calls = checked.save_file, []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == failing:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(checked, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        laplace(Rows()).fit(data(), checkpoint=Checkpoint(tmp_path, 0), progress=False)
    monkeypatch.setattr(checked, "save_file", save)
    found = laplace(Rows()).fit(data(), checkpoint=Checkpoint(tmp_path, 0), progress=False)
    require_equal(tensors(found), tensors(laplace(Rows()).fit(data(), progress=False)))


def test_one_fit_a_folder(begun):
    """While a fit runs, no other takes its folder; after its error, the next one does."""

    class Nosy:
        dataset = range(sum(len(batch["labels"]) for batch in data()))  # which tells the size without a pass

        def __iter__(self):
            with pytest.raises(StateError, match="another process writes a checkpoint"):
                laplace(Rows()).fit(data(), checkpoint=begun, progress=False)
            return iter(data())

    laplace(Rows()).fit(Nosy(), checkpoint=begun, progress=False)


def test_another_number_of_ranks_is_refused(begun):
    for path in files(begun):
        path.rename(begun / path.name.replace("of-1", "of-2"))
    with pytest.raises(StateError, match="by 2 processes, this one is by 1"):
        laplace(Rows()).fit(data(), checkpoint=begun, progress=False)


@pytest.mark.parametrize("seconds", [-1, float("nan"), "5", True])
def test_seconds(seconds, tmp_path):
    with pytest.raises(ValueError, match="seconds must be a number"):
        Checkpoint(tmp_path, seconds)


def test_files_of_others_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    laplace("diagonal").fit(data(), checkpoint=Checkpoint(tmp_path, 0), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_rows_are_written_once(tmp_path, monkeypatch):
    """What only grows is not written again and again."""
    save, sizes = checked.save_file, []

    def watched(tensors, path, metadata):
        sizes.append(sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("rows.")))
        save(tensors, path, metadata)

    monkeypatch.setattr(checked, "save_file", watched)
    la = laplace(Rows()).fit(data(), checkpoint=Checkpoint(tmp_path, 0), progress=False)
    assert sum(sizes) == sum(rows.numel() for rows in la.snapshot()[0].curvature.rows)


class Slow(list):
    """Batches that take a while, for kills to fall among them."""

    def __iter__(self):
        for batch in list.__iter__(self):
            time.sleep(0.002)
            yield batch


KILLED = ["rows", "kfac, sketch", "ekfac", "rows, refit", "options"]


def fit_named(name, folder=None):
    la = laplace(STRUCTURES[name]) if name in STRUCTURES else laplace("rows", task=Options())
    batches = data(16) if name in STRUCTURES else ragged(16)
    checkpoint = None if folder is None else Checkpoint(folder, 0.005)
    return la.fit(Slow(batches), checkpoint=checkpoint, progress=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", KILLED)
def test_sigkill(name, tmp_path):
    """Six times at a random time: while batches are taken in, files are written or the end is computed."""
    began = time.monotonic()
    expected = tensors(fit_named(name))
    took, draw, killed = time.monotonic() - began, random.Random(name), 0
    for _ in range(6):
        child = os.fork()
        if child == 0:  # whatever happens, it must not go on as a second pytest
            try:
                fit_named(name, tmp_path / "checkpoint")
            finally:
                os._exit(0)
        time.sleep(took * draw.random())
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    assert killed > 2
    require_equal(tensors(fit_named(name, tmp_path / "checkpoint")), expected)
    assert not (tmp_path / "checkpoint").exists()
