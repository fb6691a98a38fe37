"""Samples of the weights: J delta against autograd, their covariance against the closed form, hygiene of the hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

from laplace_lora_fast import (
    KFAC,
    Answers,
    Classes,
    LaplaceLoRA,
    NotFittedError,
    Rows,
    Tokens,
    UnsupportedAdapterError,
)
from laplace_lora_fast.structures import Structure
from laplace_lora_fast.weights import WeightName, to_flat
from tests import oracle, tiny
from tests.oracle import assert_close

BATCH = tiny.batch(3, length=6, labels=False, padding="right")


def tiny_mistral() -> nn.Module:
    """Attention in a window of three tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(
        vocab_size=tiny.VOCAB, num_key_value_heads=2, sliding_window=3, initializer_range=0.3, **sizes
    )
    return tiny.adapt(transformers.MistralForCausalLM(config))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny.tiny_llama(targets=("q_proj", "v_proj", "gate_proj", "down_proj", "lm_head")),
    "gpt2": lambda: tiny.tiny_gpt2(targets=("c_attn", "c_fc")),
    "mistral": tiny_mistral,
}


def fitted(model: nn.Module, task: object = None, structure: Structure | str = "auto") -> LaplaceLoRA:
    task = Answers(tiny.ANSWERS) if task is None else task
    batch = tiny.batch(6, length=6, padding="right")
    if isinstance(task, Tokens):
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    la = LaplaceLoRA(model, task, structure=structure, prior_precision=2.0)  # type: ignore[arg-type]
    return la.fit([batch], progress=False)


def flat(la: LaplaceLoRA, deltas: list[Tensor]) -> dict[WeightName, Tensor]:
    names = la.snapshot()[0].curvature.names
    return {name: to_flat(name.side, delta) for name, delta in zip(names, deltas, strict=True)}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_linearised_samples_are_f_plus_j_delta(name: str, attention: str) -> None:
    model = MODELS[name]()
    la = fitted(model, Tokens(samples=2))
    model.set_attn_implementation(attention)
    samples = la.sample(3)
    found = samples.apply(lambda: model(**BATCH).logits)
    single = {"input_ids": BATCH["input_ids"][:1]}  # without pads
    J = oracle.jacobians(model, single, lambda m, s: m(**s).logits.flatten())
    change = sum(J[tuple(key)][0] @ step.mT for key, step in flat(la, samples.deltas).items())
    with torch.no_grad():
        value = model(**single).logits[0]
    rounds = attention == "eager" or name == "mistral"  # to fp32, in the softmax and in norms
    exact = 1e-6 if rounds else 1e-10
    assert_close(found[:, 0] - value, change.mT.view(3, *value.shape), exact)
    assert_close(samples.apply(lambda: model(**single).logits)[:, 0], found[:, 0], exact)


@pytest.mark.parametrize(
    "structure", [Rows(columns=64), KFAC(factors="dense")], ids=lambda s: type(s).__name__
)
def test_the_covariance_of_many_samples_is_the_closed_form(structure: Structure) -> None:
    la = fitted(tiny.tiny_llama(r=2), structure=structure)
    mean, cov = la.logit_distribution(BATCH)
    outputs = la.sample(4000).outputs(BATCH, at_a_time=500)  # [n, N, C]
    centred = outputs - outputs.mean(0)
    found = torch.einsum("snc,snd->ncd", centred, centred) / 3999
    assert (found - cov).norm() < 0.05 * cov.norm()
    assert (outputs.mean(0) - mean).abs().max() < 0.1 * cov.diagonal(dim1=1, dim2=2).max().sqrt()


def test_a_restricted_head_moves_the_answers_alone() -> None:
    la = fitted(tiny.tiny_llama(targets=("lm_head",)))
    samples = la.sample(2)
    batch = tiny.batch(3, length=6, padding=None, labels=False)
    outputs = samples.outputs(batch)
    whole = samples.apply(lambda: la.model(**batch).logits[:, -1])
    assert_close(whole[:, :, list(tiny.ANSWERS)], outputs, 1e-10)


def test_as_weights_is_the_model_with_these_weights() -> None:
    la = fitted(tiny.tiny_llama())
    samples = la.sample(2)
    found = samples.apply(lambda: la.model(**BATCH).logits, linearised=False)
    parameters = dict(la.model.named_parameters())
    for sample in range(2):
        moved = {}
        for (layer, side), step in flat(la, samples.deltas).items():
            name = f"{layer}.lora_{side}.default.weight"
            moved[name] = parameters[name] + step[sample].view_as(parameters[name])
        expected = torch.func.functional_call(la.model, moved, (), BATCH).logits
        assert_close(found[sample], expected.detach(), 1e-10)


def test_a_small_step_is_linear() -> None:
    """Where weights hardly move, both ways agree."""
    la = fitted(tiny.tiny_llama())
    samples = la.sample(2, prior_precision=1e12)
    linear = samples.outputs(BATCH)
    assert_close(samples.outputs(BATCH, linearised=False), linear, 1e-8)


def test_seeds_and_repr() -> None:
    la = fitted(tiny.tiny_llama())
    one, other, again = la.sample(2), la.sample(2, seed=1), la.sample(2)
    assert torch.equal(one.deltas[0], again.deltas[0])
    assert not torch.equal(one.deltas[0], other.deltas[0])
    assert repr(other) == "PosteriorSamples(n=2, prior_precision=2.0, seed=1)"
    assert len(one) == 2
    assert torch.allclose(one.norms**2, sum(d.square().sum((1, 2)) for d in one.deltas))


def test_structures_of_tensors_come_back_as_they_are() -> None:
    la = fitted(tiny.tiny_llama())
    found = la.sample(2).apply(lambda: {"last": la.model(**BATCH).logits[:, -1]})
    assert found["last"].shape == (2, 3, tiny.VOCAB)


def test_bfloat16_is_near() -> None:
    exact = fitted(tiny.tiny_llama(torch.float32)).sample(3, prior_precision=50.0)
    la = fitted(tiny.tiny_llama(torch.bfloat16))
    coarse = la.sample(3, prior_precision=50.0)
    coarse.deltas = [d.float() for d in exact.deltas]
    expected = exact.outputs(BATCH)
    assert (coarse.outputs(BATCH).float() - expected).norm() < 0.1 * expected.norm()


def test_nothing_is_left_on_the_model() -> None:
    model = tiny.tiny_llama().train()
    la = fitted(model)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fails() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        la.sample(2).apply(fails)
    la.sample(2).outputs(BATCH)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_plain_forward_beside_it_does_not_change() -> None:
    model = tiny.tiny_llama().eval()
    la = fitted(model)
    with torch.no_grad():
        expected = model(**BATCH).logits
    found: list[Tensor] = []

    def plain() -> None:
        with torch.no_grad():
            found.append(model(**BATCH).logits)

    def function() -> Tensor:
        thread = threading.Thread(target=plain)
        thread.start()
        thread.join()
        return model(**BATCH).logits

    la.sample(2).apply(function)
    assert found
    assert all(torch.equal(each, expected) for each in found)


def test_classifiers_have_samples_too() -> None:
    la = fitted(tiny.tiny_bert_classifier(3), Classes())
    mean, _ = la.logit_distribution(BATCH)
    assert la.sample(2).outputs(BATCH).shape == (2, *mean.shape)


def test_a_refit_has_none() -> None:
    with pytest.raises(ValueError, match="no weights to sample around"):
        fitted(tiny.tiny_llama(), structure=Rows(refit=True)).sample(2)


class _Backward(torch.autograd.Function):
    """Identity with a backward pass alone."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g


def test_a_kernel_without_forward_mode_is_refused_by_name() -> None:
    model = tiny.tiny_llama()
    norm = model.get_base_model().model.norm
    norm.register_forward_hook(lambda module, args, output: _Backward.apply(output))
    la = fitted(model)
    with pytest.raises(UnsupportedAdapterError, match="no forward-mode derivative"):
        la.sample(2).outputs(BATCH)
    assert la.sample(2).outputs(BATCH, linearised=False).isfinite().all()


def test_another_model_is_refused() -> None:
    la = fitted(tiny.tiny_llama())
    samples = la.sample(2)
    with torch.no_grad():
        la.layers[0].adapter_parts[0].weight.add_(1.0)
    with pytest.raises(NotFittedError, match="changed since fit"):
        samples.outputs(BATCH)


class _Silent(torch.autograd.Function):
    """Twice its input, whose forward-mode derivative is said to be zero."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return 2 * g

    @staticmethod
    def jvp(ctx: object, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def vmap(info: object, in_dims: tuple[int, ...], x: Tensor) -> tuple[Tensor, int]:
        return _Silent.apply(x), in_dims[0]


def test_a_kernel_that_drops_derivatives_is_found() -> None:
    model = tiny.tiny_llama()
    layer = model.get_base_model().model.layers[1].mlp
    layer.register_forward_hook(lambda module, args, output: _Silent.apply(output))
    la = fitted(model)
    with pytest.raises(UnsupportedAdapterError, match="differ from those of its backward pass"):
        la.token_uncertainty(BATCH, n_samples=2)
    with pytest.raises(UnsupportedAdapterError, match="differ from those of its backward pass"):
        la.generate({"input_ids": BATCH["input_ids"][:1]}, n_samples=2, max_new_tokens=2)
    samples = la.sample(2)
    for act in (lambda: samples.outputs(BATCH), lambda: samples.apply(lambda: model(**BATCH).logits)):
        with pytest.raises(UnsupportedAdapterError, match="differ from those of its backward pass"):
            act()
    assert samples.outputs(BATCH, linearised=False).isfinite().all()


def test_what_hides_its_graph_is_evaluated_nevertheless() -> None:
    model = tiny.tiny_llama()
    samples = fitted(model).sample(2)

    def silent() -> Tensor:
        with torch.no_grad():
            return model(**BATCH).logits

    found = samples.apply(silent)
    assert_close(found, samples.apply(lambda: model(**BATCH).logits), 1e-12)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny.tiny_llama()
    samples = fitted(model).sample(2)
    expected = samples.outputs(BATCH)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(samples.outputs(BATCH), expected)
    assert model.training


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sound_models_pass(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    la = fitted(make(dtype))
    assert la.token_uncertainty(BATCH, n_samples=2).total.nan_to_num().isfinite().all()
    assert la._head.forward_mode_is_exact
