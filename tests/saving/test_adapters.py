"""Posterior samples as PEFT adapters, and adapters as prior means."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from torch import nn

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Answers,
    Classes,
    Diagonal,
    LaplaceLoRA,
    Rows,
    UnsupportedAdapterError,
)
from tests import tiny

ANSWERS = Answers(tiny.ANSWERS)


def adapter_weights(folder, layer, side):
    state = peft.utils.load_peft_weights(str(folder), device="cpu")
    return state[f"{layer}.lora_{side}.weight"]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def small_fit(structure="auto"):
    torch.manual_seed(0)
    model = tiny.adapt(Small(), targets=("first", "second"), r=2)
    la = LaplaceLoRA(model, Classes(), structure=structure, prior_precision={"A": 0.5, "B": 2.0})
    return la.fit([{"x": torch.randn(30, 5, dtype=torch.float64)}], progress=False)


def vectors(la, n, seed):
    """Draws of vec(weight), row-major in the weight's own orientation, by (layer, side)."""
    draws = la.posterior.sample(n, torch.Generator().manual_seed(seed))
    keys = [(layer.name, side) for layer in la.layers for side in "AB"]
    return {
        key: (draw if key[1] == "A" else draw.mT).reshape(n, -1)
        for key, draw in zip(keys, draws, strict=True)
    }


@pytest.mark.parametrize(
    "structure",
    [
        KFAC(),
        KFAC(rank=2),
        KFAC(factors="sketch", columns=3, rank=1),
        EKFAC(),
        EKFAC(rank=2),
        Diagonal(),
        Rows(),
    ],
    ids=str,
)
def test_samples_have_the_mean_and_covariance_of_the_posterior(structure):
    la, n = small_fit(structure), 40_000
    for (layer, side), draw in vectors(la, n, 3).items():
        weight = la.model.get_parameter(f"{layer}.lora_{side}.default.weight").detach()
        covariance = la.posterior.covariance(layer, side)
        variance = covariance.diagonal()
        error = (draw.mean(0) - weight.flatten()) / (variance / n).sqrt()
        assert error.abs().max() < 4.5  # standard deviations, of at most 20 entries
        spread = ((torch.outer(variance, variance) + covariance.square()) / n).sqrt()
        assert ((draw.mT.cov() - covariance) / spread).abs().max() < 4.5
        # One number that any wrong eigenvalue moves: the mean squared Mahalanobis length is P.
        centred = draw - weight.flatten()
        length = (centred @ torch.linalg.inv(covariance) * centred).sum(1).mean()
        assert abs(length / len(variance) - 1) < 4.5 * math.sqrt(2 / (n * len(variance)))


def test_weights_of_different_blocks_are_independent():
    draws, n = vectors(small_fit("kfac"), 40_000, 5), 40_000
    joint = torch.cat([(d - d.mean(0)) / d.std(0) for d in draws.values()], 1)
    correlation = joint.mT @ joint / n
    sizes, start = [d.shape[1] for d in draws.values()], 0
    for size in sizes:
        correlation[start : start + size, start : start + size] = 0
        start += size
    assert correlation.abs().max() < 5 / math.sqrt(n)


def test_folders_hold_the_samples_and_load_with_peft(tmp_path):
    model = tiny.tiny_llama(targets=("q_proj", "v_proj"))
    la = LaplaceLoRA(model, ANSWERS, seed=11).fit([tiny.batch(5)], progress=False)
    folders = la.sample_adapters(tmp_path / "samples", n=3, force=True)
    assert [folder.relative_to(tmp_path).as_posix() for folder in folders] == [
        f"samples/sample-00{i}" for i in range(3)
    ]
    draws = la.posterior.sample(3, torch.Generator().manual_seed(11))
    seen = set()
    for index, folder in enumerate(folders):
        base = tiny.tiny_llama().unload()
        loaded = peft.PeftModel.from_pretrained(base, folder).eval()
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (
            4,
            8,
            ["q_proj", "v_proj"],
        )
        for layer, a, b in zip(la.layers, draws[0::2], draws[1::2], strict=True):
            torch.testing.assert_close(
                loaded.get_parameter(layer.parameter_names["A"]), nn.Parameter(a[index])
            )
            torch.testing.assert_close(
                loaded.get_parameter(layer.parameter_names["B"]), nn.Parameter(b[index].mT)
            )
        logits = loaded(**tiny.batch(2, labels=False)).logits
        seen.add(float(logits.sum()))
    assert len(seen) == 3


def test_sampling_is_seeded_and_leaves_the_model(tmp_path):
    model = tiny.tiny_llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(5)], progress=False)
    first, again = (
        la.sample_adapters(tmp_path / "a", 2, force=True),
        la.sample_adapters(tmp_path / "b", 2, force=True),
    )
    for one, other in zip(first, again, strict=True):
        assert (one / "adapter_model.safetensors").read_bytes() == (
            other / "adapter_model.safetensors"
        ).read_bytes()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert la.predict(tiny.batch(2)).isfinite().all()


def test_rows_of_lm_head_that_no_answer_uses_keep_their_value(tmp_path):
    model = tiny.tiny_llama(targets=("v_proj", "lm_head"))
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(5)], progress=False)
    name = "base_model.model.lm_head"
    mean = model.get_parameter(f"{name}.lora_B.default.weight").detach()
    others = torch.ones(len(mean), dtype=torch.bool).index_fill(0, torch.tensor(tiny.ANSWERS), False)
    draw = la.posterior.sample(1, torch.Generator().manual_seed(0))[-1][
        0
    ].mT  # rows in the order of the answers
    (folder,) = la.sample_adapters(tmp_path, 1, force=True)
    sampled = adapter_weights(folder, name, "B")
    assert torch.equal(sampled[others], mean[others])
    torch.testing.assert_close(sampled[list(tiny.ANSWERS)], draw)
    assert (sampled[list(tiny.ANSWERS)] - mean[list(tiny.ANSWERS)]).abs().min() > 0


@pytest.mark.parametrize("structure", ["kfac", "diagonal", "rows"])
def test_spread_of_sampled_predictions_is_that_of_the_linearised_model(structure):
    """With a strong prior the model is linear over the posterior: sampled logits have the predicted covariance."""
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS, structure=structure, prior_precision=1e6)
    la.fit([tiny.batch(5)], progress=False)
    test = tiny.batch(1, padding=None)
    mean, cov = la.logit_distribution(test)
    n, logits = 800, []
    draws = la.posterior.sample(n, torch.Generator().manual_seed(2))
    weights = [la.model.get_parameter(name) for layer in la.layers for name in layer.parameter_names.values()]
    la.model.eval()
    with torch.no_grad():
        for index in range(n):
            for weight, draw, side in zip(weights, draws, "AB" * len(la.layers), strict=True):
                weight.copy_(draw[index] if side == "A" else draw[index].mT)
            logits.append(la.model(input_ids=test["input_ids"]).logits[0, -1, list(tiny.ANSWERS)])
    sampled = torch.stack(logits)
    spread = ((torch.outer(cov[0].diagonal(), cov[0].diagonal()) + cov[0].square()) / n).sqrt()
    assert ((sampled.mT.cov() - cov[0]) / spread).abs().max() < 4.5
    assert ((sampled.mean(0) - mean[0]) / (cov[0].diagonal() / n).sqrt()).abs().max() < 4.5


def test_an_active_adapter_that_is_not_default(tmp_path):
    model = tiny.tiny_llama()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj"]))
    tiny.randomise(model, 4)
    model.set_adapter("other")
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(4)], progress=False)
    (folder,) = la.sample_adapters(tmp_path, 1, force=True)
    loaded = peft.PeftModel.from_pretrained(tiny.tiny_llama().unload(), folder)
    assert loaded.peft_config["default"].r == 2
    draw = la.posterior.sample(1, torch.Generator().manual_seed(0))[0][0]
    name = la.layers[0].parameter_names["A"].replace("other", "default")
    torch.testing.assert_close(loaded.get_parameter(name).detach(), draw)
    assert not list(tmp_path.rglob("sample-000/default"))


def test_saved_modules_and_dtypes_are_kept(tmp_path):
    model = tiny.tiny_llama_classifier(2, dtype=torch.float32, task_type="SEQ_CLS")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    la = LaplaceLoRA(model, Classes()).fit([tiny.batch(4, classes=2)], progress=False)
    (folder,) = la.sample_adapters(tmp_path, 1, force=True)
    state = peft.utils.load_peft_weights(str(folder), device="cpu")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    (head,) = (value for name, value in state.items() if "score" in name)
    saved = model.get_parameter("base_model.model.score.modules_to_save.default.weight")
    assert not torch.equal(head, saved)  # drawn, as the others are
    la = LaplaceLoRA(model, Classes(), layers=lambda name: "modules_to_save" not in name)
    (folder,) = la.fit([tiny.batch(4, classes=2)], progress=False).sample_adapters(
        tmp_path / "lora", 1, force=True
    )
    (head,) = (v for k, v in peft.utils.load_peft_weights(str(folder), device="cpu").items() if "score" in k)
    assert torch.equal(head, saved)


@pytest.mark.parametrize("kind", ["state dict", "adapter state dict", "folder", "path as text"])
def test_prior_mean_from_any_form_of_an_adapter(kind, tmp_path):
    """The evidence differs from that of a zero mean by the difference in squared distance alone."""
    start = tiny.tiny_llama(targets=("v_proj", "lm_head"), seed=5)
    model = tiny.tiny_llama(targets=("v_proj", "lm_head"))
    if kind == "state dict":
        mean = start.state_dict()
    elif kind == "adapter state dict":
        mean = peft.get_peft_model_state_dict(start)
    else:
        start.save_pretrained(tmp_path)
        mean = tmp_path if kind == "folder" else str(tmp_path)
    lam = {"A": 0.4, "B": 3.0}
    zero = LaplaceLoRA(model, ANSWERS, prior_precision=lam).fit([tiny.batch(4)], progress=False)
    centred = LaplaceLoRA(model, ANSWERS, prior_precision=lam, prior_mean=mean).fit(
        [tiny.batch(4)], progress=False
    )
    expected, rows = 0.0, list(tiny.ANSWERS)
    for name, weight in model.state_dict().items():
        if "lora" in name:
            other = start.state_dict()[name]
            if "lm_head.lora_B" in name:
                weight, other = weight[rows], other[rows]  # no other row sees the data or has a posterior
            gain = weight.square().sum() - (weight - other).square().sum()
            expected += 0.5 * lam["A" if "lora_A" in name else "B"] * float(gain)
    difference = centred.log_marginal_likelihood() - zero.log_marginal_likelihood()
    assert float(difference) == pytest.approx(expected, rel=1e-10)


def test_samples_of_a_compiled_model(tmp_path):
    """torch.compile prefixes every name; what is written and saved has the plain ones."""
    model = tiny.tiny_llama()
    plain = LaplaceLoRA(model, ANSWERS, structure="kfac").fit([tiny.batch(5)], progress=False)
    compiled = torch.compile(model, backend="eager")
    la = LaplaceLoRA(compiled, ANSWERS, structure="kfac", prior_mean=compiled.state_dict())
    la.fit([tiny.batch(5)], progress=False)
    for one, other in zip(
        la.sample_adapters(tmp_path / "a", 2, force=True),
        plain.sample_adapters(tmp_path / "b", 2, force=True),
        strict=True,
    ):
        weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (one, other)]
        assert weights[0] == weights[1]
    la.save(tmp_path)
    assert torch.equal(LaplaceLoRA.load(tmp_path, model).predict(tiny.batch(2)), plain.predict(tiny.batch(2)))
    assert list(la.factors) == list(plain.factors)


def test_samples_of_a_data_parallel_model(tmp_path):
    la = LaplaceLoRA(nn.DataParallel(tiny.tiny_llama_classifier(3)), Classes()).fit(
        [tiny.batch(4)], progress=False
    )
    (folder,) = la.sample_adapters(tmp_path, 1, force=True)
    draw = la.posterior.sample(1, torch.Generator().manual_seed(0))[0][0]
    torch.testing.assert_close(adapter_weights(folder, la.layers[0].name, "A"), draw)


def two_active():
    model = tiny.tiny_llama(targets=("q_proj",))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def injected():
    base = tiny.tiny_llama().unload()
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), base)


def mixed():
    base = tiny.tiny_llama().unload()
    return peft.PeftMixedModel(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (two_active, r"adapters \['default', 'other'\] active"),
        (injected, "needs a peft.PeftModel.*LlamaForCausalLM"),
        (mixed, "needs a peft.PeftModel.*PeftMixedModel"),
    ],
)
def test_what_peft_cannot_write_as_one_adapter(make, match, tmp_path):
    la = LaplaceLoRA(make(), ANSWERS).fit([tiny.batch(4)], progress=False)
    with pytest.raises(UnsupportedAdapterError, match=match):
        la.sample_adapters(tmp_path / "samples", 1, force=True)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_peft_does_not_write(tmp_path, monkeypatch):
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS).fit([tiny.batch(4)], progress=False)
    save, missing = la.model.save_pretrained, la.layers[-1].parameter_names["B"]

    def partly(folder, state_dict, **kwargs):
        return save(folder, state_dict={k: v for k, v in state_dict.items() if k != missing}, **kwargs)

    monkeypatch.setattr(la.model, "save_pretrained", partly)
    with pytest.raises(UnsupportedAdapterError, match=r"did not write '[\w.]+v_proj.lora_B.weight'"):
        la.sample_adapters(tmp_path, 1, force=True)


def test_a_folder_that_holds_something_is_refused(tmp_path):
    """Samples of an earlier call would pass for the same, and could not be replaced all at once."""
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS).fit([tiny.batch(4)], progress=False)
    la.sample_adapters(tmp_path / "samples", 3, force=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    la.prior_precision = 10.0
    for n in (2, 3, 4):
        with pytest.raises(FileExistsError, match=r"samples' holds sample-00\d: pass a new or an empty one"):
            la.sample_adapters(tmp_path / "samples", n, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        la.sample_adapters(tmp_path / "file", 1, force=True)


@pytest.mark.parametrize("there", [True, False])
def test_a_disk_that_is_full_at_the_third_sample_leaves_none(there, tmp_path, monkeypatch):
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS).fit([tiny.batch(4)], progress=False)
    save, calls = peft.peft_model.safe_save_file, []

    def full(tensors, path, *args, **kwargs):
        save(tensors, path, *args, **kwargs)
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft.peft_model, "safe_save_file", full)
    folder = tmp_path / "samples"
    if there:
        folder.mkdir()
    with pytest.raises(OSError, match=r"No space left.*samples"):
        la.sample_adapters(folder, 5, force=True)
    assert [path.name for path in tmp_path.rglob("*")] == (["samples"] if there else [])
    assert len(la.sample_adapters(folder, 2, force=True)) == 2


class Code:
    def __reduce__(self):
        return print, ("this is code",)


@pytest.mark.parametrize("what", ["code", "half", "half of safetensors"])
def test_a_prior_mean_that_cannot_be_read(what, tmp_path, capsys):
    model = tiny.tiny_llama()
    path = tmp_path / ("adapter_model.safetensors" if "safetensors" in what else "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    if what == "code":
        torch.save({"x": Code()}, path)
    else:
        model.save_pretrained(tmp_path / "good", safe_serialization="safetensors" in what)
        good = (tmp_path / "good" / path.name).read_bytes()
        path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"prior_mean: the adapter in .* is damaged, or holds objects"):
        LaplaceLoRA(model, ANSWERS, prior_mean=tmp_path)
    assert "this is code" not in capsys.readouterr().out


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", None])
@pytest.mark.parametrize("structure", ["rows", "kfac"])
def test_numbers_of_samples_that_are_none(n, structure, tmp_path):
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS, structure=structure).fit([tiny.batch(4)], progress=False)
    with pytest.raises(ValueError, match="n must be"):
        la.sample_adapters(tmp_path, n, force=True)


@pytest.mark.parametrize("path", ["typo/path", "owner/name", "."])
def test_prior_mean_from_a_folder_that_is_none(path, tmp_path, monkeypatch):
    """It is not looked up anywhere else."""
    monkeypatch.chdir(tmp_path)
    for source in (path, tmp_path / path):
        with pytest.raises(ValueError, match=r"prior_mean: .* has no adapter_model.safetensors"):
            LaplaceLoRA(tiny.tiny_llama(), ANSWERS, prior_mean=source)
