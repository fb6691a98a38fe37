"""Posterior files that are damaged, of another format, or of another model."""

from __future__ import annotations

import contextlib
import copy
import json
import random

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from laplace_lora_fast import LaplaceLoRA, StateError, UnsupportedAdapterError
from laplace_lora_fast.saving import checked, posterior
from tests import tiny
from tests.saving.cases import QKV, assert_equal, build, build_model, everything


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    la, _ = build("dense")
    la.save(folder)
    return (folder / "posterior.safetensors").read_bytes()


def write(folder, data):
    (folder / "posterior.safetensors").write_bytes(data)


def rewrite(folder, data, tensors=lambda t: t, header=lambda h: h, metadata=lambda m: m):
    path = folder / "posterior.safetensors"
    path.write_bytes(data)
    with safe_open(path, "pt") as file:
        old = file.metadata()
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changed = tensors(content)
    text = header(json.loads(old["header"]))
    new = checked.metadata(posterior.FORMAT, text if isinstance(text, str) else json.dumps(text), changed)
    safetensors.torch.save_file(changed, path, metadata(new))


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.1, 0.5, -1])
def test_truncated_file(saved, tmp_path, kept):
    write(tmp_path, saved[: int(kept * len(saved)) if isinstance(kept, float) else kept])
    with pytest.raises(StateError, match=r"posterior.safetensors is truncated or damaged"):
        LaplaceLoRA.load(tmp_path, build_model())


def test_damaged_file(saved, tmp_path):
    for damaged in (b"\0" * 500, b"not a state at all, " * 30, saved[:8] + b"#" + saved[9:]):
        write(tmp_path, damaged)
        with pytest.raises(StateError, match=r"truncated or damaged"):
            LaplaceLoRA.load(tmp_path, build_model())


def without(key):
    return lambda entries: {k: v for k, v in entries.items() if k != key}


PER_LAYER = {"names": 2, "scalings": 1, "shared_inputs": 1}
REWRITES = {
    "other format": (
        {"metadata": lambda m: m | {"format": "laplace-lora-fast/99"}},
        "format 'laplace-lora-fast/99'",
    ),
    "no format": ({"metadata": without("format")}, "format None"),
    "a file of something else": ({"metadata": lambda m: None}, "format None"),
    "no header": ({"metadata": without("header")}, "checksum"),
    "no checksum": ({"metadata": without("sha256")}, "checksum"),
    "another header": ({"metadata": lambda m: m | {"header": m["header"][:50]}}, "checksum"),
    "header is not JSON": ({"header": lambda h: "{'"}, "header"),
    "header is another JSON": ({"header": lambda h: "[]"}, "header"),
    "header is a number": ({"header": lambda h: "3"}, "header"),
    "header without an end": ({"header": lambda h: "[" * 100_000}, "header"),
    "no settings": ({"header": without("settings")}, "settings"),
    "no shared inputs": ({"header": without("shared_inputs")}, "shared_inputs"),
    "no structure": ({"header": without("structure")}, "structure"),
    "no scalings": ({"header": without("scalings")}, "scalings"),
    "no surroundings": ({"header": without("surroundings")}, "surroundings"),
    "the format before this one": (
        {"metadata": lambda m: m | {"format": "laplace-lora-fast/4"}},
        "format 'laplace-lora-fast/4'",
    ),
    "unknown setting": ({"header": lambda h: h | {"settings": h["settings"] | {"new": 1}}}, "new"),
    "setting of a wrong kind": (
        {"header": lambda h: h | {"settings": h["settings"] | {"seed": "none"}}},
        "seed",
    ),
    "option of a wrong kind": (
        {"header": lambda h: h | {"settings": h["settings"] | {"structure": {"KFAC": {"tokens": "none"}}}}},
        "tokens must be one of",
    ),
    "option that is not there": (
        {"header": lambda h: h | {"structure": {"KFAC": {"mode": "reduce"}}}},
        "option KFAC does not fit.*mode",
    ),
    "structure that nobody knows": ({"header": lambda h: h | {"structure": {"Dense": {}}}}, "'Dense'"),
    "lacks a tensor": ({"tensors": without("block.3.mean")}, "block.3.mean"),
    "lacks a spectrum": ({"tensors": without("spectrum.1.values")}, "spectrum.1.values"),
    "lacks a block": (
        {"header": lambda h: h | {key: h[key][:-n] for key, n in PER_LAYER.items()}},
        "lm_head",
    ),
    "mean of another shape": (
        {"tensors": lambda t: t | {"block.1.mean": t["block.1.mean"][:, :5].clone()}},
        "q_proj",
    ),
    "spectrum of another shape": (
        {"tensors": lambda t: t | {"spectrum.1.vectors": t["spectrum.1.vectors"][:5].clone()}},
        "q_proj",
    ),
    "values that are not finite": (
        {"tensors": lambda t: t | {"spectrum.1.values": t["spectrum.1.values"] * torch.nan}},
        "q_proj.*finite",
    ),
}


@pytest.mark.parametrize("name", REWRITES)
def test_file_that_does_not_fit(saved, tmp_path, name):
    changes, match = REWRITES[name]
    rewrite(tmp_path, saved, **changes)
    with pytest.raises(StateError, match=match):
        LaplaceLoRA.load(tmp_path, build_model())


def test_rewriting_alone_changes_nothing(saved, tmp_path):
    """So that the test above fails for the reason it gives."""
    rewrite(tmp_path, saved)
    assert_equal(everything(LaplaceLoRA.load(tmp_path, build_model())), everything(build("dense")[0]))


def test_posterior_of_another_adapter(saved, tmp_path):
    write(tmp_path, saved)
    targets = (*QKV, "lm_head")
    others = {
        r"other LoRA layers.*k_proj": tiny.tiny_llama(targets=("q_proj", "v_proj", "lm_head")),
        r"other LoRA layers.*layers\.2": tiny.tiny_llama(targets=targets, layers=3),
        r"'[\w.]+q_proj' has lora_A of shape \(2, 16\)": tiny.tiny_llama(targets=targets, r=2),
        r"'[\w.]+k_proj' has lora_B of shape \(4, 16\)": tiny.tiny_llama(
            targets=targets, config={"num_key_value_heads": 4}
        ),
        r"weights of layer '[\w.]+q_proj' differ": tiny.tiny_llama(targets=targets, seed=2),
    }
    for match, model in others.items():
        with pytest.raises(StateError, match=match):
            LaplaceLoRA.load(tmp_path, model)
    base = tiny.tiny_llama().unload()
    with pytest.raises(UnsupportedAdapterError, match="no LoRA layer"):
        LaplaceLoRA.load(tmp_path, base)


def test_one_weight_off_by_one_bit_is_another_adapter(saved, tmp_path):
    write(tmp_path, saved)
    model = build_model()
    weight = model.base_model.model.model.layers[1].self_attn.v_proj.lora_B["default"].weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf, dtype=weight.dtype))
    with pytest.raises(StateError, match=r"layers.1.self_attn.v_proj' differ"):
        LaplaceLoRA.load(tmp_path, model)


def attempt(folder, model, expected):
    """What a file is taken for: None where it is refused; else it has to be the one that was saved."""
    try:
        la = LaplaceLoRA.load(folder, model)
    except StateError:
        return
    batch = tiny.batch(3, seed=9, labels=False)
    assert torch.equal(la.predict(batch), expected[0])
    assert torch.equal(la.log_marginal_likelihood(), expected[1])


@pytest.mark.parametrize(
    ("flips", "blocks"), [(60, 20), pytest.param(1000, 300, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("name", ["dense", "rows"])
def test_no_damage_goes_unnoticed(name, flips, blocks, tmp_path):
    """Flipped bits, half of them in the file's own header, and blocks of zeros."""
    la, model = build(name)
    la.save(tmp_path)
    expected = la.predict(tiny.batch(3, seed=9, labels=False)), la.log_marginal_likelihood()
    good = (tmp_path / "posterior.safetensors").read_bytes()
    start, draw = 8 + int.from_bytes(good[:8], "little"), random.Random(0)
    for index in range(flips):
        raw = bytearray(good)
        raw[draw.randrange(start) if index % 2 else draw.randrange(start, len(raw))] ^= 1 << draw.randrange(8)
        write(tmp_path, bytes(raw))
        attempt(tmp_path, model, expected)
    for _ in range(blocks):
        raw, at = bytearray(good), draw.randrange(len(good) - 512)
        raw[at : at + 512] = bytes(512)
        write(tmp_path, bytes(raw))
        attempt(tmp_path, model, expected)


def test_a_changed_value_is_noticed(saved, tmp_path):
    """Which would load and predict something else."""
    with safe_open_bytes(saved, tmp_path) as (metadata, tensors):
        tensors["spectrum.1.values"] = tensors["spectrum.1.values"] * 1.5
        safetensors.torch.save_file(tensors, tmp_path / "posterior.safetensors", metadata)
    with pytest.raises(StateError, match="does not match its checksum"):
        LaplaceLoRA.load(tmp_path, build_model())


@contextlib.contextmanager
def safe_open_bytes(data, folder):
    write(folder, data)
    with safe_open(folder / "posterior.safetensors", "pt") as file:
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        yield file.metadata(), content


VALUES = [
    None,
    -1,
    0,
    1e308,
    10**400,
    "x",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    {"KFAC": None},
    float("nan"),
    True,
]


def fields(header):
    yield from ([key] for key in header)
    yield from (["settings", key] for key in header["settings"])
    yield from (["surroundings", key] for key in header["surroundings"])
    yield ["surroundings", "tensors", next(iter(header["surroundings"]["tensors"]))]
    yield ["surroundings", "tensors", next(iter(header["surroundings"]["tensors"])), 0]


def test_headers_of_other_kinds_are_state_errors_or_load(saved, tmp_path):
    """With a checksum that fits, so that what reads them is tried. A task may be asked for, weights not be there."""
    others = {"task": ValueError, "layers": UnsupportedAdapterError, "trained": UnsupportedAdapterError}
    write(tmp_path, saved)
    with safe_open(tmp_path / "posterior.safetensors", "pt") as file:
        header = json.loads(file.metadata()["header"])
    model, refused = build_model(), 0
    for path in fields(header):
        for value in VALUES:
            changed = copy.deepcopy(header)
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            rewrite(tmp_path, saved, header=lambda _, changed=changed: changed)
            try:
                LaplaceLoRA.load(tmp_path, model)
            except (StateError, others.get(path[-1], StateError)):
                refused += 1
    assert refused > 250
