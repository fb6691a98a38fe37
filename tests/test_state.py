from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from laplace_lora_fast import LaplaceLoRA, StateError, UnsupportedAdapterError
from laplace_lora_fast import state as state_module
from tests import tiny

ANSWERS = {"answer_token_ids": tiny.ANSWERS}
QKV = ("q_proj", "k_proj", "v_proj")


def ends(out, batch):
    return out.logits[:, 1, :3] - out.logits[:, 0, 3:6]  # real positions: the pads are on the right


def initial(model):
    return {k: 0.5 * v for k, v in model.state_dict().items() if "lora" in k}


CASES = {
    "ekfac": (
        lambda: tiny.tiny_llama(targets=(*QKV, "lm_head")),
        ANSWERS | {"structure": "ekfac", "rank": 3},
    ),
    "diag": (lambda: tiny.tiny_llama(targets=("v_proj", "lm_head")), ANSWERS | {"structure": "diag"}),
    "dual": (lambda: tiny.tiny_llama(targets=("v_proj", "lm_head")), ANSWERS | {"structure": "dual"}),
    "dual sketched": (
        lambda: tiny.tiny_llama(dtype=torch.bfloat16),
        ANSWERS
        | {"structure": "dual", "row_sketch_size": 5, "seed": 3, "prior_precision": {"A": 0.3, "B": 2}},
    ),
    "dual regression": (
        lambda: tiny.tiny_bert_classifier(1),
        {"likelihood": "regression", "structure": "dual", "sigma_noise": 0.4, "prior_mean": initial},
    ),
    "dense": (lambda: tiny.tiny_llama(targets=(*QKV, "lm_head")), ANSWERS),
    "expand": (lambda: tiny.tiny_llama(targets=QKV), ANSWERS | {"kfac": "expand", "fisher": "empirical"}),
    "rank": (
        lambda: tiny.tiny_llama(targets=QKV),
        ANSWERS | {"rank": 3, "fisher": "mc", "mc_samples": 2, "seed": 7},
    ),
    "sketch": (
        lambda: tiny.tiny_llama(targets=QKV),
        ANSWERS | {"factor": "sketch", "sketch_size": 6, "rank": 2},
    ),
    "fp32": (lambda: tiny.tiny_llama(dtype=torch.float32), ANSWERS),
    "low precision": (lambda: tiny.tiny_llama(dtype=torch.bfloat16), ANSWERS),
    "precision by side": (lambda: tiny.tiny_llama(), ANSWERS | {"prior_precision": {"A": 0.3, "B": 1e-7}}),
    "prior mean": (lambda: tiny.tiny_llama(targets=("v_proj", "lm_head")), ANSWERS | {"prior_mean": initial}),
    "regression": (
        lambda: tiny.tiny_llama_classifier(1, targets=("q_proj", "score")),
        {"likelihood": "regression", "sigma_noise": 0.37},
    ),
    "classifier": (lambda: tiny.tiny_bert_classifier(3), {}),
    "output_fn": (lambda: tiny.tiny_llama(), {"output_fn": ends}),
}


def build(name):
    make, arguments = CASES[name]
    model, arguments = make(), {"structure": "kfac", **arguments}
    if "prior_mean" in arguments:
        arguments["prior_mean"] = arguments["prior_mean"](model)
    classes = 0 if "regression" in name else 3
    batches = [tiny.batch(4, 5, seed=s, padding="right", classes=classes) for s in (1, 2)]
    return LaplaceLoRA(model, **arguments).fit(batches, progress=False), model, arguments.get("output_fn")


def everything(la):
    batch = tiny.batch(3, 5, seed=3, padding="right", labels=False)
    out = {"evidence": la.log_marginal_likelihood(), "precision": la.posterior.prior_precision}
    out["mean"], out["covariance"] = la.logit_distribution(batch)
    for link in ("probit", "mc", "bridge", "map"):
        predicted = la.predict(batch, link_approx=link)
        out[link] = torch.stack(predicted) if isinstance(predicted, tuple) else predicted
    for name, layer in la.factors.items() if la.options.structure == "kfac" else ():
        for side, weight in (("A", layer.A), ("B", layer.B)):
            out[name, side, "input"], out[name, side, "gradient"] = (
                weight.input_factor,
                weight.gradient_factor,
            )
    for index, sample in enumerate(la.posterior.sample(2, torch.Generator().manual_seed(1))):
        out["sample", index] = sample
    return out


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bitwise(name, tmp_path):
    la, model, output_fn = build(name)
    expected, summary = everything(la), la.summary()
    la.save(tmp_path / "new" / "folder")
    again = LaplaceLoRA.load(tmp_path / "new" / "folder", model, output_fn=output_fn)
    assert_equal(everything(again), expected)
    assert again.summary() == summary
    assert again.prior_precision == la.prior_precision
    fresh = LaplaceLoRA.load(str(tmp_path / "new" / "folder"), CASES[name][0](), output_fn=output_fn)
    assert_equal(everything(fresh), expected)


@pytest.mark.parametrize(
    "name",
    ["rank", "sketch", "regression", "prior mean", "ekfac", "diag", "dual sketched", "dual regression"],
)
def test_settings_survive(name, tmp_path):
    """A fit and a tuning after loading are those of the original."""
    la, model, _ = build(name)
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, model)
    loader = [tiny.batch(4, 5, seed=5, padding="right", classes=0 if "regression" in name else 3)]
    for one in (la, again):
        one.fit(loader, progress=False)
        one.optimize_prior_precision(prior_structure="ab")
    assert_equal(everything(again), everything(la))


def test_tuned_precisions_survive(tmp_path):
    for structure in ("scalar", "ab", "layerwise"):
        la, model, _ = build("dense")
        tuned = la.optimize_prior_precision(prior_structure=structure)
        la.save(tmp_path)
        assert LaplaceLoRA.load(tmp_path, model).prior_precision == tuned


@pytest.mark.parametrize("value", [np.float32(2.5), torch.tensor(2.5), {"A": np.float64(2.5), "B": 3}])
def test_precisions_of_other_number_types_can_be_saved(value, tmp_path):
    la, model, _ = build("dense")
    la.prior_precision = value
    la.save(tmp_path)
    expected = {"A": 2.5, "B": 3.0} if isinstance(value, dict) else 2.5
    assert LaplaceLoRA.load(tmp_path, model).prior_precision == expected


def test_through_peft_on_disk(tmp_path):
    """The adapter as PEFT saves and loads it, the posterior as this package does."""
    la, model, _ = build("dense")
    expected = everything(la)
    model.save_pretrained(tmp_path / "adapter")
    la.save(tmp_path / "adapter")
    base = tiny.tiny_llama(targets=QKV).unload()
    base = tiny.peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_equal(everything(LaplaceLoRA.load(tmp_path / "adapter", base)), expected)


def test_file_is_plain_safetensors_and_shared_spectra_are_stored_once(tmp_path):
    la, model, _ = build("dense")
    la.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["posterior.safetensors"]
    tensors = safetensors.torch.load_file(tmp_path / "posterior.safetensors")
    bases = [name for name in tensors if name.startswith("spectrum.") and name.endswith(".vectors")]
    assert (
        len(bases) == 2 * (1 + 3) + 2
    )  # per layer one input and three outputs; the input and output of lm_head
    with safe_open(tmp_path / "posterior.safetensors", "pt") as file:
        header = json.loads(file.metadata()["header"])
    assert header["settings"]["answer_token_ids"] == list(tiny.ANSWERS)
    assert header["n_examples"] == 8
    again = LaplaceLoRA.load(tmp_path, model)
    for one in (la, again):
        curvature = one.posterior.curvature
        blocks = dict(zip(curvature.names, curvature.blocks, strict=True))
        q, k, v = (f"base_model.model.model.layers.0.self_attn.{name}" for name in QKV)
        assert blocks[q, "A"].large is blocks[k, "A"].large is blocks[v, "A"].large
        assert blocks[q, "B"].large is not blocks[k, "B"].large


def test_saving_again_replaces_and_a_failed_save_keeps_what_was_there(tmp_path, monkeypatch):
    la, model, _ = build("dense")
    la.save(tmp_path)
    la.prior_precision = 5.0
    la.save(tmp_path)
    assert LaplaceLoRA.load(tmp_path, model).prior_precision == 5.0

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("no space left")

    monkeypatch.setattr(state_module, "save_file", full_disk)
    la.prior_precision = 6.0
    with pytest.raises(OSError, match="no space"):
        la.save(tmp_path)
    assert LaplaceLoRA.load(tmp_path, model).prior_precision == 5.0


def test_missing_file(tmp_path):
    model = tiny.tiny_llama()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StateError, match=r"posterior.safetensors does not exist"):
            LaplaceLoRA.load(folder, model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    la, _, _ = build("dense")
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
    new = metadata({**old, "header": json.dumps(header(json.loads(old["header"])))})
    safetensors.torch.save_file(tensors(content), path, new)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.1, 0.5, -1])
def test_truncated_file(saved, tmp_path, kept):
    write(tmp_path, saved[: int(kept * len(saved)) if isinstance(kept, float) else kept])
    with pytest.raises(StateError, match=r"posterior.safetensors is truncated or damaged"):
        LaplaceLoRA.load(tmp_path, build_model())


def build_model():
    return CASES["dense"][0]()


def test_damaged_file(saved, tmp_path):
    for damaged in (b"\0" * 500, b"not a state at all, " * 30, saved[:8] + b"#" + saved[9:]):
        write(tmp_path, damaged)
        with pytest.raises(StateError, match=r"truncated or damaged"):
            LaplaceLoRA.load(tmp_path, build_model())


def without(key):
    return lambda entries: {k: v for k, v in entries.items() if k != key}


REWRITES = {
    "other format": (
        {"metadata": lambda m: m | {"format": "laplace-lora-fast/99"}},
        "format 'laplace-lora-fast/99'",
    ),
    "no format": ({"metadata": without("format")}, "format None"),
    "a file of something else": ({"metadata": lambda m: None}, "format None"),
    "no header": ({"metadata": without("header")}, "header"),
    "header is not JSON": ({"metadata": lambda m: m | {"header": m["header"][:50]}}, "header"),
    "header is another JSON": ({"metadata": lambda m: m | {"header": "[]"}}, "header"),
    "no settings": ({"header": without("settings")}, "settings"),
    "no groups": ({"header": without("groups")}, "groups"),
    "no scalings": ({"header": without("scalings")}, "scalings"),
    "no frozen weights": ({"header": without("frozen")}, "frozen"),
    "the format before this one": (
        {"metadata": lambda m: m | {"format": "laplace-lora-fast/2"}},
        "format 'laplace-lora-fast/2'",
    ),
    "unknown setting": ({"header": lambda h: h | {"settings": h["settings"] | {"new": 1}}}, "new"),
    "setting of a wrong kind": (
        {"header": lambda h: h | {"settings": h["settings"] | {"kfac": "none"}}},
        "kfac",
    ),
    "lacks a tensor": ({"tensors": without("block.3.mean")}, "block.3.mean"),
    "lacks a spectrum": ({"tensors": without("spectrum.1.values")}, "spectrum.1.values"),
    "lacks a block": ({"header": lambda h: h | {"names": h["names"][:-2]}}, "lm_head"),
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


def test_loading_without_the_output_fn_of_the_fit(tmp_path):
    la, model, _ = build("output_fn")
    la.save(tmp_path)
    with pytest.raises(ValueError, match="output_fn"):
        LaplaceLoRA.load(tmp_path, model)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diag", "dual"])
@pytest.mark.parametrize(
    ("fitted", "used"), [("float32", "float64"), ("float64", "float32"), ("float32", "bfloat16")]
)
def test_model_held_in_another_precision(fitted, used, structure, tmp_path):
    fitted, used = getattr(torch, fitted), getattr(torch, used)
    batch = tiny.batch(3, labels=False)
    la = LaplaceLoRA(tiny.tiny_llama(fitted), structure=structure, **ANSWERS).fit(
        [tiny.batch(5)], progress=False
    )
    expected = la.predict(batch)
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, tiny.tiny_llama(fitted).to(used))
    tolerance = 2e-2 if used == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        again.predict(batch).double(), expected.double(), rtol=tolerance, atol=tolerance
    )
    assert all(w.isfinite().all() for w in again.posterior.sample(1, torch.Generator()))
