"""Factors against an explicit computation through lora_A and lora_B separately."""

from __future__ import annotations

import pytest
import torch

from laplace_lora_fast import KFAC, Answers, Classes, LaplaceLoRA, MonteCarlo
from laplace_lora_fast.fitting.passes import Subject, run
from laplace_lora_fast.structures.blocks.kfac import FactorKind, FactorPlan, KfacAccumulator, TokenSharing
from tests import oracle, tiny
from tests.oracle import assert_close

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COTANGENTS = {"exact": oracle.exact_cotangents, "empirical": oracle.empirical_cotangents}


def fitted(
    model: torch.nn.Module,
    batches: list[tiny.Batch],
    structure: KFAC | str = "kfac",
    **options: object,
) -> LaplaceLoRA:
    causal = "CausalLM" in type(model.get_base_model()).__name__
    task = Answers(tiny.ANSWERS) if causal else Classes()
    return LaplaceLoRA(model, task, structure=structure, **options).fit(batches, progress=False)


@pytest.mark.parametrize("mode", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("factor", ["dense", "sketch"])
def test_factors_equal_autograd_through_lora_a_and_lora_b(mode: str, fisher: str, factor: str) -> None:
    """A complete sketch (as many columns as dimensions) is exact too."""
    model = tiny.tiny_llama(targets=(*ALL_LINEAR,), r=3)
    data = tiny.batch(11, length=6, seed=4)
    columns = None if factor == "dense" else 64
    structure = KFAC(tokens=mode, fisher=fisher, factors=factor, columns=columns, rank=64)
    la = fitted(model, tiny.split(data, 4), structure)
    expected = oracle.streams(model, data, oracle.answer_logits, COTANGENTS[fisher])
    assert set(la.factors) == set(expected)
    for name, stream in expected.items():
        for weight, (inputs, gradients) in ("A", (stream.x, stream.g_a)), ("B", (stream.z, stream.g_b)):
            x, g = oracle.kfac(inputs, gradients, mode)
            found = getattr(la.factors[name], weight)
            tolerance = 1e-10
            assert_close(found.input_factor, x, tolerance)
            assert_close(found.gradient_factor, g, tolerance)


@pytest.mark.parametrize(("sketch_size", "columns"), [(10, {10, 11}), (8, {8, 10}), (4, {5, 8})])
def test_the_columns_that_keep_the_lora_side_exact_count(sketch_size: int, columns: set[int]) -> None:
    """An input shared by two layers has 2 x 3 of them, an output 3; never more than half of the others give way."""
    model = tiny.tiny_llama(targets=("q_proj", "v_proj"), r=3)
    la = LaplaceLoRA(model, Answers(tiny.ANSWERS))
    plan = FactorPlan(FactorKind.SKETCH, sketch_size=sketch_size)
    weights = [layer.weights for layer in la.layers]
    accumulator = KfacAccumulator(weights, "exact", TokenSharing.EXPAND, plan, None)
    subject = Subject(model, la.task.head(model), la.layers, la.likelihood)
    run(subject, [tiny.batch(4)], accumulator, lambda step: None, generator=torch.Generator())
    assert {omega.shape[1] for omega in accumulator.omegas().values()} == columns


@pytest.mark.parametrize("mode", ["expand", "reduce"])
def test_adapted_head_keeps_the_answer_rows_only(mode: str) -> None:
    model = tiny.tiny_llama(targets=("v_proj", "lm_head"))
    data = tiny.batch(6, length=5, seed=2)
    la = fitted(model, [data], KFAC(tokens=mode))
    name = "base_model.model.lm_head"
    expected = oracle.streams(model, data, oracle.answer_logits, oracle.exact_cotangents)[name]
    # Only the last position feeds the answers, so it is the head's only token.
    last = oracle.Stream(*([v[..., -1:, :] for v in getattr(expected, f)] for f in ("x", "z", "g_a", "g_b")))
    rows = list(tiny.ANSWERS)
    x, g = oracle.kfac(last.z, [g[..., rows] for g in last.g_b], mode)
    assert_close(la.factors[name].B.input_factor, x, 1e-10)
    assert_close(la.factors[name].B.gradient_factor, g, 1e-10)
    x, g = oracle.kfac(last.x, last.g_a, mode)
    assert_close(la.factors[name].A.input_factor, x, 1e-10)
    assert_close(la.factors[name].A.gradient_factor, g, 1e-10)


def test_exact_fisher_of_one_linear_layer_and_token_is_the_ggn() -> None:
    """One example of one token: KFAC of each weight is exactly J^T Lambda J."""
    model = tiny.tiny_llama(layers=1, targets=("down_proj",))
    data = {"input_ids": torch.tensor([[9]]), "labels": torch.tensor([1])}
    la = fitted(model, [data])
    jacobian = oracle.jacobians(model, data, oracle.answer_logits)
    hessian = oracle.softmax_hessian(oracle.answer_logits(model, oracle.examples(data)[0]).detach())
    for (name, side), rows in jacobian.items():
        ggn = rows[0].mT @ hessian @ rows[0]
        factors = getattr(la.factors[name], side)
        assert_close(torch.kron(factors.gradient_factor, factors.input_factor), ggn, 1e-10)


def test_sampled_fisher_converges_to_exact() -> None:
    model = tiny.tiny_llama(layers=1)
    data = tiny.batch(5, length=4, seed=3)
    exact = fitted(model, [data]).factors
    errors = []
    for samples in (8, 512):
        sampled = fitted(model, [data], KFAC(fisher=MonteCarlo(samples)), seed=1).factors
        errors.append(
            max(
                float(
                    (sampled[n].B.gradient_factor - f.B.gradient_factor).norm() / f.B.gradient_factor.norm()
                )
                for n, f in exact.items()
            )
        )
    assert errors[1] < 0.1  # 1 / sqrt(5 * 512) = 0.02 per entry
    assert errors[1] < errors[0] / 3


def test_sampled_fisher_is_seeded_and_fresh_per_batch() -> None:
    model, data = tiny.tiny_llama(layers=1), tiny.batch(4, seed=3)
    name = "base_model.model.model.layers.0.self_attn.q_proj"

    def gradient_factor(batches: list[tiny.Batch], seed: int) -> torch.Tensor:
        return fitted(model, batches, KFAC(fisher="mc"), seed=seed).factors[name].B.gradient_factor

    assert torch.equal(gradient_factor([data], 1), gradient_factor([data], 1))
    assert not torch.allclose(gradient_factor([data], 1), gradient_factor([data], 2))
    assert not torch.allclose(gradient_factor([data] * 8, 1), 8 * gradient_factor([data], 1))


def test_inputs_of_one_tensor_are_accumulated_once() -> None:
    model = tiny.tiny_llama(targets=ALL_LINEAR, layers=1)
    la = fitted(model, [tiny.batch(4)])
    spectra = {id(block.large) for block in la.posterior.curvature.blocks[0::2]}  # of lora_A
    assert len(spectra) == 4  # q, k, v | o | gate, up | down


def test_auto_keeps_the_smallest_factors_dense_within_the_budget() -> None:
    model = tiny.tiny_llama(targets=("q_proj", "v_proj"), layers=1)  # d_in 16, d_out 16 and 8
    few = KFAC(columns=4, tokens="expand")
    data = [tiny.batch(9, seed=s) for s in range(3)]
    everything = fitted(model, data, few).posterior.curvature.blocks
    assert all(block.large.rank == block.large.dim for block in everything)
    budget = (8 * 8 + 16 * 16) * 8 * 3 // 2  # with the rows that wait
    mixed = fitted(model, data, few, budget=budget).posterior.curvature
    assert [block.large.rank for block in mixed.blocks] == [16, 1, 16, 8]  # q.A, q.B (sketched), v.A, v.B
