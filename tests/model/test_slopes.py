"""Gradients are those of what the model computes: whatever changes them alone is without effect, or an error."""

from __future__ import annotations

import warnings

import accelerate
import pytest
import torch

from laplace_lora_fast import (
    KFAC,
    Answers,
    Classes,
    Diagonal,
    LaplaceLoRA,
    LaplaceWarning,
    LowRank,
    Options,
    Rows,
    UnsupportedAdapterError,
)
from laplace_lora_fast.data import option_batches_from_ids
from laplace_lora_fast.model.proofs import widened
from laplace_lora_fast.model.proofs.slopes import Slopes
from tests import tiny
from tests.model.test_alone import mixture
from tests.model.test_behaviour import part

ANSWERS = Answers(tiny.ANSWERS)
TRAIN, TEST = tiny.split(tiny.batch(6, seed=1), 3), tiny.batch(3, seed=2)


def fitted(model, train=TRAIN, task=ANSWERS, structure=None):
    structure = structure or Rows(columns=1 << 20)
    return LaplaceLoRA(model, task, structure=structure).fit(train, progress=False)


def assert_same(found, expected, rtol=1e-12):
    for one, other in zip(found.logit_distribution(TEST), expected.logit_distribution(TEST), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=0)


# Hooks on gradients: those that look on are not called in passes that count


def halved(g):
    return g * 0.5


def void(anything):
    """What hooks of this kind have to return."""


def hooks_on_tensors(change):
    def on_output(module, args, output):
        if output.requires_grad:
            output.register_hook(change)

    def on_input(module, args):
        if args[0].requires_grad:
            args[0].register_hook(change)

    def on_several(module, args, output):
        if output.requires_grad:
            torch.autograd.graph.register_multi_grad_hook([output], lambda grads: void(change(grads[0])))

    return {
        "output": lambda mlp: mlp.register_forward_hook(on_output),
        "input": lambda mlp: mlp.register_forward_pre_hook(on_input),
        "multi-grad": lambda mlp: mlp.register_forward_hook(on_several),
    }


def hooks_on_modules(change):
    def full(module, into, out):
        return tuple(None if g is None else change(g) for g in into)

    def pre(module, out):
        return tuple(None if g is None else change(g) for g in out)

    return {
        "full": lambda mlp: mlp.register_full_backward_hook(full),
        "pre": lambda mlp: mlp.register_full_backward_pre_hook(pre),
    }


def hooks(change):
    return hooks_on_tensors(change) | hooks_on_modules(change)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", hooks(halved))
def test_hooks_that_look_on_change_nothing(kind, checkpointed, dtype):
    """They are called in the proof alone, once a model."""
    called = []
    models = [tiny.tiny_llama(dtype=dtype) for _ in range(2)]
    hooks(lambda g: called.append(g) or g)[kind](part(models[1], "layers.1.mlp"))
    for model in models:
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = fitted(models[0])
    found = fitted(models[1])
    in_the_fit = len(called)
    assert_same(found, expected)
    assert len(called) == in_the_fit <= 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in hooks(halved) if kind != "multi-grad"])
def test_hooks_that_change_gradients_are_refused(kind, dtype):
    model = tiny.tiny_llama(dtype=dtype)
    hooks(halved)[kind](part(model, "layers.1.mlp"))
    with pytest.raises(UnsupportedAdapterError, match=r"not those .* a hook that changes gradients"):
        fitted(model)


@pytest.mark.parametrize("kind", [kind for kind in hooks(halved) if kind != "multi-grad"])
def test_and_those_that_come_after_the_fit(kind):
    model = tiny.tiny_llama()
    la = fitted(model)
    hooks(halved)[kind](part(model, "layers.1.mlp"))
    with pytest.raises(UnsupportedAdapterError, match="a hook that changes gradients"):
        la.predict(TEST)


def test_under_a_mode_of_torchs_functions():
    """It looks functions up anew, `Tensor.register_hook` too."""
    called = []
    model = tiny.tiny_llama()
    hooks(lambda g: called.append(g) or g)["output"](part(model, "layers.1.mlp"))
    with torch.device("cpu"):
        la = fitted(model)
        n = len(called)
        la.predict(TEST)
    assert len(called) == n == 1


def test_tensor_hooks_are_called_again_afterwards():
    model, called = tiny.tiny_llama(), []
    hooks(lambda g: called.append(g) or g)["output"](part(model, "layers.1.mlp"))
    fitted(model)
    called.clear()
    embeddings = model.get_input_embeddings()(TEST["input_ids"])
    model(inputs_embeds=embeddings, attention_mask=TEST["attention_mask"]).logits.sum().backward()
    assert len(called) == 1


def test_hooks_on_weights_whose_gradients_are_taken_one_sequence_at_a_time():
    """Experts' LoRA: masks and scales of gradients in training are no part of a Jacobian."""
    models = [mixture() for _ in range(2)]
    for name, weight in models[1].named_parameters():
        if "lora_" in name:
            weight.requires_grad_(True)
            weight.register_hook(halved)
    expected, found = (
        LaplaceLoRA(model, ANSWERS, structure=Rows()).fit(TRAIN, progress=False) for model in models
    )
    assert_same(found, expected)


# What else changes gradients alone is refused


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 0.5 * g


def on_node(mlp):
    def hook(module, args, output):
        if output.requires_grad:
            output.grad_fn.register_hook(lambda grads, _: tuple(g if g is None else 0.5 * g for g in grads))

    mlp.register_forward_hook(hook)


def own_code(function):
    """The module's own forward does it, so that no hook is there to be watched."""

    def change(mlp):
        former = mlp.forward
        mlp.forward = lambda x: function(former(x), x)

    return change


CHANGES = {
    "node": on_node,
    "half detached": own_code(lambda y, x: 0.5 * y + 0.5 * y.detach()),
    "some features": own_code(lambda y, x: torch.cat([y[..., :4].detach(), y[..., 4:]], -1)),
    "scaled": own_code(lambda y, x: Scaled.apply(y)),
    "straight through": own_code(lambda y, x: x + (y - x).detach()),
    "norm": own_code(lambda y, x: y / (1e-3 + y.detach().norm(dim=-1, keepdim=True))),
    "clamped": own_code(lambda y, x: y + (0.1 * y.square()).detach()),
    "no_grad": own_code(lambda y, x: y + torch.no_grad()(lambda: 0.3 * y)()),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", CHANGES)
def test_gradients_that_are_not_the_functions_are_refused(kind, dtype):
    model = tiny.tiny_llama(dtype=dtype)
    CHANGES[kind](part(model, "layers.1.mlp"))
    with pytest.raises(
        UnsupportedAdapterError, match=r"gradients behind layer .*layers\.1\.self_attn.*not those"
    ):
        fitted(model)


@pytest.mark.parametrize("structure", [Rows(), KFAC(), Diagonal(), LowRank()], ids=repr)
@pytest.mark.parametrize("n", [1, 3])
def test_whatever_the_structure_and_the_size_of_batches(structure, n):
    model = tiny.tiny_llama_classifier(3)
    CHANGES["half detached"](part(model, "layers.1.mlp"))
    with pytest.raises(UnsupportedAdapterError, match="not those of what the model computes"):
        fitted(model, tiny.split(tiny.batch(6, seed=1, padding="right"), n), Classes(), structure)


def test_options_too():
    model = tiny.tiny_llama()
    CHANGES["half detached"](part(model, "layers.1.mlp"))
    batches = list(option_batches_from_ids([([3, 4, 5], [[6], [7, 8]], 1), ([5, 4], [[9, 3], [2]], 0)], 2))
    with pytest.raises(UnsupportedAdapterError, match="not those of what the model computes"):
        fitted(model, batches, Options())


def bfloat16(model):
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("cast", [bfloat16, torch.nn.Module.half], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", CHANGES)
def test_in_16_bits_the_model_is_run_in_fp32_for_it(kind, cast):
    model = tiny.tiny_llama(dtype=torch.float32)
    CHANGES[kind](part(model, "layers.1.mlp"))
    with pytest.raises(UnsupportedAdapterError, match=r"behind layer .*layers\.1\.self_attn.*not those"):
        fitted(cast(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_under_autocast_and_checkpointing_as_well(reentrant, dtype):
    model = tiny.tiny_llama(dtype=dtype)
    CHANGES["half detached"](part(model, "layers.1.mlp"))
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UnsupportedAdapterError, match="not those"):
        fitted(model)


def test_where_fp32_is_multiplied_in_16_bits():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for seed in range(3):
            fitted(
                tiny.tiny_llama(seed=seed, dtype=torch.float32, config={"hidden_size": 256}),
                [tiny.batch(3, seed=seed)],
            )
        model = tiny.tiny_llama(dtype=torch.float32)
        CHANGES["half detached"](part(model, "layers.1.mlp"))
        with pytest.raises(UnsupportedAdapterError, match="not those"):
            fitted(model)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["layers.1.mlp", "lm_head", "embed_tokens"])
def test_weights_that_are_fetched_stay_what_they_are(name):
    """Accelerate keeps what a forward pass made of them: the proof is left out, and said to be."""
    expected = fitted(tiny.tiny_llama(dtype=torch.float32))
    model = tiny.tiny_llama(dtype=torch.float32)
    accelerate.cpu_offload(part(model, name), torch.device("cpu"))
    with pytest.warns(LaplaceWarning, match=r"could not be proved .*\(part of its weights is offloaded\)"):
        found = fitted(model)
    assert_same(found, expected, rtol=1e-5)


class OfSixteenBits(torch.autograd.Function):
    """A kernel that takes nothing else."""

    @staticmethod
    def forward(ctx, x):
        if x.dtype != torch.bfloat16:
            raise RuntimeError("expected bfloat16")
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def test_what_cannot_be_run_in_fp32_is_said_once():
    model = tiny.tiny_llama(dtype=torch.bfloat16)
    own_code(lambda y, x: OfSixteenBits.apply(y))(part(model, "layers.1.mlp"))
    with pytest.warns(LaplaceWarning, match=r"could not be proved .*RuntimeError: expected bfloat16"):
        la = fitted(model)
    la.predict(TEST)


def test_what_rounds_all_the_same_is_not_refused():
    """An operator of others, that gives 16 bits whatever it takes: rounding is not held against the gradients."""

    def rounded(y, x):
        return rounds_itself(y).to(y.dtype)

    model = tiny.tiny_llama(dtype=torch.bfloat16)
    own_code(rounded)(part(model, "layers.1.mlp"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LaplaceWarning)
        assert torch.isfinite(fitted(model).predict(TEST)).all()


@torch.library.custom_op("laplace_tests::rounds_itself", mutates_args=())
def rounds_itself(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().clone()


rounds_itself.register_autograd(lambda ctx, g: g.float())


@pytest.mark.parametrize("kind", ["kinks", "top two", "steep", "tiny", "huge"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rough_functions_of_16_bits_are_not_refused(kind, dtype):
    for seed in range(3):
        model = tiny.tiny_llama(seed=seed, dtype=dtype)
        SOUND[kind](part(model, "layers.1.mlp"))
        fitted(model, [tiny.batch(3, seed=seed)])


# What must not be refused


def quantised(y, x):
    """Rounded, and differentiated as it is: zero almost everywhere, but for the residual stream beside."""
    return y + 0 * torch.round(y * 3)


SOUND = {
    "kinks": own_code(lambda y, x: y.relu() - 0.3 * (-y).relu() + y.clamp(-0.05, 0.05)),
    "top two": own_code(lambda y, x: y * (y >= y.topk(2, -1).values[..., -1:]).to(y)),
    "clone": own_code(lambda y, x: y.clone()),
    "detached elsewhere": own_code(lambda y, x: y + 0 * x.detach()),
    "rounded": own_code(quantised),
    "steep": own_code(lambda y, x: torch.sin(40 * y)),
    "tiny": own_code(lambda y, x: 1e-6 * y),
    "huge": own_code(lambda y, x: 1e4 * y),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", SOUND)
def test_rough_functions_are_not_refused(kind, dtype):
    for seed in range(3):
        model = tiny.tiny_llama(seed=seed, dtype=dtype)
        SOUND[kind](part(model, "layers.1.mlp"))
        fitted(model, [tiny.batch(3, seed=seed)])


def quantised_to(levels):
    def fake(y, x):
        scale = y.detach().abs().amax() / levels
        return y + (torch.round(y / scale) * scale - y).detach()

    return own_code(fake)


def test_fine_quantisation_may_be_differentiated_straight_through():
    """As training does it: steps that are small beside a hundredth of what a layer gives."""
    for seed in range(3):
        model = tiny.tiny_llama(dtype=torch.float32, seed=seed)
        quantised_to(10_000)(part(model, "layers.1.mlp"))
        assert torch.isfinite(fitted(model).predict(TEST)).all()


def test_coarser_quantisation_is_warned_of():
    """There is no derivative that could be compared; the code's gradients are taken."""
    model = tiny.tiny_llama(dtype=torch.float32)
    quantised_to(127)(part(model, "layers.1.mlp"))
    with pytest.warns(LaplaceWarning, match=r"could not be proved .*\(its outputs change in steps\)"):
        assert torch.isfinite(fitted(model).predict(TEST)).all()


@pytest.mark.parametrize("share", [0.3, 0.1, 0.03, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_small_parts_are_missed_as_well(share, dtype):
    """Of the MLP's gradients, and the model's code is smooth."""
    for seed in range(2):
        model = tiny.tiny_llama(dtype=dtype, seed=seed)
        own_code(lambda y, x: (1 - share) * y + share * y.detach())(part(model, "layers.1.mlp"))
        with pytest.raises(UnsupportedAdapterError, match="not those of what the model computes"):
            fitted(model)


@pytest.mark.parametrize("kind", ["half detached", "some features", "clamped", "norm"])
def test_adapters_that_bend_the_outputs_much(kind):
    """Weights of LoRA as they are before training, but for B: what moves is no longer small beside curvature."""
    for seed in (0, 2):  # the second's missing part comes to a ten-thousandth
        model = tiny.tiny_llama(dtype=torch.float32, seed=seed, targets="all-linear")
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.mul_(4 if "lora_B" in name else 1)
        fitted(model)
        CHANGES[kind](part(model, "layers.1.mlp"))
        with pytest.raises(UnsupportedAdapterError, match="not those of what the model computes"):
            fitted(model)


@pytest.fixture
def slow_in_fp64(monkeypatch):
    """As a consumer's GPU is."""
    monkeypatch.setattr(widened, "_dtypes", lambda u: [torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CHANGES)
def test_in_fp32_what_changes_gradients_is_refused(kind, dtype, slow_in_fp64):
    model = tiny.tiny_llama(dtype=dtype)
    CHANGES[kind](part(model, "layers.1.mlp"))
    with pytest.raises(UnsupportedAdapterError, match=r"behind layer .*layers\.1\.self_attn.*not those"):
        fitted(model)


@pytest.mark.parametrize("kind", ["top two", "tiny", "huge", "clone"])
def test_in_fp32_what_is_sound_is_not(kind, slow_in_fp64):
    for seed in range(3):
        model = tiny.tiny_llama(seed=seed, dtype=torch.bfloat16, targets="all-linear")
        fitted(model, [tiny.batch(3, seed=seed)])
        SOUND[kind](part(model, "layers.1.mlp"))
        fitted(model, [tiny.batch(3, seed=seed)])


def relu(mlp):
    """As many kinks as there are features; wide, so that some are near."""
    former, wide = mlp.forward, torch.nn.Linear(16, 4096).to(next(mlp.parameters()))
    mlp.forward = lambda x: former(x) + wide(x).relu() @ wide.weight / 64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_kinks_close_by_are_not_held_against_the_gradients(dtype):
    for seed in range(2):
        model = tiny.tiny_llama(dtype=dtype, seed=seed)
        for name in ("layers.0.mlp", "layers.1.mlp"):
            relu(part(model, name))
        fitted(model, [tiny.batch(3, seed=seed)])


def test_directions_are_the_same_in_every_pass_and_use():
    slopes, y = Slopes(["one", "two"]), torch.randn(3, 4, 5, dtype=torch.float64)

    def moved(index, y, step):
        return slopes.u_moved(lambda: slopes.passed(index, y) - y, step, 0)

    with torch.no_grad():
        for index in range(2):
            slopes.passed(index, y)  # sets the scale
    first = moved(0, y, 0.5)
    torch.testing.assert_close(moved(0, 2 * y, 0.5), first)
    torch.testing.assert_close(moved(0, y, -0.5), -first)
    assert not torch.allclose(moved(1, y, 0.5), first)


def test_random_numbers_of_the_caller_are_left_alone():
    model = tiny.tiny_llama()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fitted(model)
    assert torch.equal(torch.rand(4), expected)
