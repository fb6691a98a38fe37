"""The posterior over LoRA weights and trained heads together, against brute force: autograd, one example at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from laplace_lora_fast import EKFAC, KFAC, Answers, Classes, Diagonal, LaplaceLoRA, Options, Rows
from laplace_lora_fast.errors import StateError, UnsupportedAdapterError
from laplace_lora_fast.weights import by_layer, weight_names
from tests import tiny
from tests.oracle import Logits, answer_logits, assert_close, class_logits, examples, softmax_hessian

EXACT = Rows(columns=64)
PRIOR = {"A": 0.5, "B": 2.0, "head": 0.3}


def roberta(num_labels: int = 3, **lora: Any) -> nn.Module:
    """An encoder whose head has two linear layers."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=num_labels,
        initializer_range=0.3,
        pad_token_id=0,
        max_position_embeddings=64,
    )
    base = transformers.RobertaForSequenceClassification(config)
    return tiny.adapt(base, targets=("query", "value"), task_type="SEQ_CLS", **lora)


def trained(model: nn.Module) -> nn.Module:
    """Moves the heads away from where they started."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.3 * noise)
    return model.eval()


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    task: Any
    logits: Logits
    heads: int
    padding: str | None = "right"

    def data(self, n: int, seed: int) -> tiny.Batch:
        return tiny.batch(n, seed=seed, padding=self.padding)


ANSWERS = Answers(tiny.ANSWERS)
CASES = {
    "score without bias": Case(
        lambda: tiny.tiny_llama_classifier(3, task_type="SEQ_CLS"), Classes(), class_logits, 1
    ),
    "classifier with bias": Case(
        lambda: tiny.tiny_bert_classifier(3, task_type="SEQ_CLS"), Classes(), class_logits, 1
    ),
    "two linear layers": Case(roberta, Classes(), class_logits, 2),
    "language-model head": Case(
        lambda: tiny.tiny_llama(modules_to_save=["lm_head"]), ANSWERS, answer_logits, 1, "left"
    ),
}


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(part in name for part in ("lora_A", "lora_B", "modules_to_save"))
    }


def rows(model: nn.Module, batch: tiny.Batch, logits_of: Logits) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and their Jacobian [N, C, P] in all trained weights, by autograd."""
    for parameter in weights(model).values():
        parameter.requires_grad_(True)
    parameters, logits, jacobians = list(weights(model).values()), [], []
    for single in examples(batch):
        outputs = logits_of(model, single)
        found = [
            torch.autograd.grad(each, parameters, retain_graph=True, allow_unused=True) for each in outputs
        ]
        jacobians.append(
            torch.stack(
                [
                    torch.cat(
                        [
                            (torch.zeros_like(p) if g is None else g).flatten()
                            for g, p in zip(each, parameters, strict=True)
                        ]
                    )
                    for each in found
                ]
            )
        )
        logits.append(outputs.detach())
    return torch.stack(logits), torch.stack(jacobians)


def precision(model: nn.Module, prior: dict[str, float]) -> Tensor:
    def of(name: str) -> float:
        return prior["A" if "lora_A" in name else "B" if "lora_B" in name else "head"]

    parts = [torch.full((p.numel(),), of(name), dtype=torch.float64) for name, p in weights(model).items()]
    return torch.cat(parts)


def brute_force(model: nn.Module, case: Case, train: tiny.Batch, test: tiny.Batch) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the test logits."""
    logits, jacobian = rows(model, train, case.logits)
    hessian = sum(j.mT @ softmax_hessian(f) @ j for f, j in zip(logits, jacobian, strict=True))
    mean, jacobian = rows(model, test, case.logits)
    covariance = torch.linalg.inv(hessian + precision(model, PRIOR).diag())
    return mean, jacobian @ covariance @ jacobian.mT


@pytest.mark.parametrize("name", CASES)
def test_the_exact_posterior_is_that_of_brute_force(name):
    case = CASES[name]
    model = trained(case.model())
    train, test = case.data(5, 1), case.data(3, 2)
    la = LaplaceLoRA(model, case.task, structure=EXACT, prior_precision=PRIOR)
    assert sum(name.side == "head" for name in la.fit([train], progress=False).posterior.curvature.names) == (
        case.heads
    )
    mean, covariance = la.logit_distribution(test)
    expected = brute_force(model, case, train, test)
    assert_close(mean, expected[0], 1e-9)
    assert_close(covariance, expected[1], 1e-9)
    assert la.parameters_left_alone == []


@pytest.mark.parametrize("name", ["score without bias", "classifier with bias"])
def test_a_headless_choice_leaves_the_rest_as_it_was(name):
    case = CASES[name]
    model = trained(case.model())
    train, test = [case.data(5, 1)], case.data(3, 2)
    la = LaplaceLoRA(model, case.task, structure=EXACT, layers=lambda name: "modules_to_save" not in name)
    la.fit(train, progress=False)
    assert {name.side for name in la.posterior.curvature.names} == {"A", "B"}
    assert all("modules_to_save" in name for name in la.parameters_left_alone)
    assert str(len(la.parameters_left_alone)) in la.summary().splitlines()[-1]
    whole = LaplaceLoRA(model, case.task, structure=EXACT).fit(train, progress=False)
    more, less = (each.logit_distribution(test)[1] for each in (whole, la))
    assert torch.linalg.eigvalsh(more - less).min() > 0
    fixed = whole.logit_distribution(test, prior_precision={"lora": 1.0, "head": 1e12})[1]
    assert_close(fixed, less, 1e-8)


@pytest.mark.parametrize("tokens", ["reduce", "expand", "paper"])
@pytest.mark.parametrize("name", ["score without bias", "classifier with bias"])
def test_kfac_of_a_head_is_the_factors_of_its_own_tokens(name, tokens):
    """X = 1/N sum x x^T over the tokens that are read, G = sum over examples of the Hessian in the logits."""
    case = CASES[name]
    model, data = trained(case.model()), case.data(6, 1)
    la = LaplaceLoRA(model, case.task, structure=KFAC(tokens=tokens, factors="dense"))
    la.fit(tiny.split(data, 4), progress=False)
    (found,) = (each.head for each in la.factors.values() if hasattr(each, "head"))
    (layer,) = (module for each, module in model.named_modules() if each.endswith("modules_to_save.default"))
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 16)[-1]))
    logits = torch.stack([case.logits(model, single).detach() for single in examples(data)])
    handle.remove()
    x = torch.stack(seen).detach()
    x = x if layer.bias is None else torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    assert_close(found.input_factor, x.mT @ x / len(x), 1e-8)
    assert_close(found.gradient_factor, sum(softmax_hessian(f) for f in logits), 1e-8)


@pytest.mark.parametrize(
    "structure", [KFAC(factors="dense"), KFAC(factors="sketch"), EKFAC(), Diagonal()], ids=str
)
def test_batches_do_not_matter_and_the_file_has_the_head(structure, tmp_path):
    case = CASES["two linear layers"]
    model, data, test = trained(case.model()), case.data(6, 1), case.data(2, 2)
    kinds = {"structure": structure, "prior_precision": PRIOR}
    la = LaplaceLoRA(model, case.task, **kinds).fit(tiny.split(data, 6), progress=False)
    pieces = LaplaceLoRA(model, case.task, **kinds).fit(tiny.split(data, 4), progress=False)
    tolerance = 2e-2 if "sketch" in str(structure) else 1e-8  # a sketch starts from its first batch
    assert_close(pieces.logit_distribution(test)[1], la.logit_distribution(test)[1], tolerance)
    la.save(tmp_path)
    loaded = LaplaceLoRA.load(tmp_path, trained(case.model()))
    assert torch.equal(loaded.predict(test), la.predict(test))
    assert loaded.prior_precision == PRIOR


def test_diagonal_is_that_of_brute_force():
    case = CASES["classifier with bias"]
    model, train, test = trained(case.model()), case.data(5, 1), case.data(3, 2)
    la = LaplaceLoRA(model, case.task, structure=Diagonal(), prior_precision=PRIOR)
    found = la.fit([train], progress=False).logit_distribution(test)[1]
    logits, jacobian = rows(model, train, case.logits)
    hessian = sum(j.mT @ softmax_hessian(f) @ j for f, j in zip(logits, jacobian, strict=True))
    _, jacobian = rows(model, test, case.logits)
    variance = 1 / (hessian.diagonal() + precision(model, PRIOR))
    assert_close(found, (jacobian * variance) @ jacobian.mT, 1e-8)


def test_samples_have_the_heads_covariance_and_are_written(tmp_path):
    import peft

    case = CASES["classifier with bias"]
    model = trained(case.model())
    la = LaplaceLoRA(model, case.task, structure=EXACT, prior_precision=PRIOR)
    la.fit([case.data(5, 1)], progress=False)
    (head,) = (name for name in la.posterior.curvature.names if name.side == "head")
    drawn = la.posterior.sample(4000, torch.Generator().manual_seed(0))[-1]
    covariance = la.posterior.covariance(*head)
    assert_close(torch.cov(drawn.flatten(1).mT), covariance, 0.15)
    (folder,) = la.sample_adapters(tmp_path, 1, force=True)
    state = peft.utils.load_peft_weights(str(folder), device="cpu")
    draw = la.posterior.sample(1, torch.Generator().manual_seed(0))[-1][0]
    weight, bias = (
        next(value for key, value in state.items() if key.endswith(f"classifier.{part}"))
        for part in ("weight", "bias")
    )
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], 1), draw)


def test_a_refit_starts_from_the_model_before_training(tmp_path):
    """Mean and covariance against Newton's method on the dense kernel of all trained weights."""
    case = CASES["two linear layers"]
    model, train, test = trained(case.model()), case.data(6, 1), case.data(3, 2)
    la = LaplaceLoRA(model, case.task, structure=Rows(columns=64, refit=True), prior_precision=PRIOR)
    la.fit([train], progress=False)

    def before(batch: tiny.Batch) -> Tensor:
        with model.disable_adapter(), torch.no_grad():
            return torch.stack([case.logits(model, single) for single in examples(batch)])

    _, j = rows(model, train, case.logits)
    _, j_test = rows(model, test, case.logits)
    scaled = j.flatten(0, 1) / precision(model, PRIOR)
    kernel, cross = scaled @ j.flatten(0, 1).mT, j_test.flatten(0, 1) @ scaled.mT
    m, f = before(train), before(train)
    one_hot = torch.nn.functional.one_hot(train["labels"], 3).double()
    for _ in range(60):  # f = m + K (y - p(f)), by Newton's method on the residual
        p = f.softmax(-1)
        w = torch.block_diag(*[softmax_hessian(each) for each in f])
        residual = f.flatten() - m.flatten() - kernel @ (one_hot - p).flatten()
        f = f - torch.linalg.solve(torch.eye(len(w)).double() + kernel @ w, residual).view_as(f)
    alpha = (one_hot - f.softmax(-1)).flatten()
    mean, covariance = la.logit_distribution(test)
    assert_close(mean, before(test) + (cross @ alpha).view_as(mean), 1e-7)
    w = torch.block_diag(*[softmax_hessian(each) for each in f])
    inner = torch.linalg.solve(torch.eye(len(w)).double() + w @ kernel, w)
    for n in range(3):
        rows_of = slice(3 * n, 3 * n + 3)
        prior = (j_test[n] / precision(model, PRIOR)) @ j_test[n].mT
        assert_close(covariance[n], prior - cross[rows_of] @ inner @ cross[rows_of].mT, 1e-7)
    # A freshly drawn head is another one each time the model is loaded: the file has the one of the fit.
    la.save(tmp_path)
    nn.init.normal_(model.base_model.model.classifier.original_module.dense.weight)
    assert torch.equal(LaplaceLoRA.load(tmp_path, model).predict(test), la.predict(test))


def test_a_given_start_is_the_mean(tmp_path):
    """In the evidence, by its distance to the trained weights."""
    case = CASES["classifier with bias"]
    start, model = case.model(), trained(case.model())
    train = [case.data(5, 1)]
    evidence = {}
    for name, mean in (("zero", None), ("start", start.state_dict())):
        la = LaplaceLoRA(model, case.task, structure=EXACT, prior_mean=mean).fit(train, progress=False)
        evidence[name] = la.log_marginal_likelihood()
    parameters, means = weights(model), weights(start)
    distances = [
        sum(
            (p.detach() - (0 if origin is None else origin[name].detach())).square().sum()
            for name, p in parameters.items()
        )
        for origin in (None, means)
    ]
    difference = evidence["start"] - evidence["zero"]
    torch.testing.assert_close(difference, 0.5 * (distances[0] - distances[1]), rtol=1e-9, atol=1e-12)
    # An adapter without the head: what PEFT has kept of it.
    without = {name: value for name, value in start.state_dict().items() if "lora" in name}
    la = LaplaceLoRA(model, case.task, structure=EXACT, prior_mean=without).fit(train, progress=False)
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence["start"], rtol=1e-12, atol=1e-12)


def test_what_is_left_alone_is_named():
    """A head of all tokens of a large vocabulary, and one that shares its weight with the embedding."""
    model = tiny.tiny_llama(modules_to_save=["lm_head", "model.norm"])
    names = LaplaceLoRA(model, ANSWERS).parameters_left_alone
    assert [name.split(".")[-4] for name in names] == ["norm"]
    tied = tiny.tiny_llama(
        config={"tie_word_embeddings": True}, modules_to_save=["lm_head"], ensure_weight_tying=True
    )
    assert all(name.side != "head" for name in _names(LaplaceLoRA(tied, ANSWERS)))
    large = tiny.tiny_llama(
        config={"vocab_size": 2**14, "hidden_size": 1032},
        layers=1,
        dtype=torch.float32,
        modules_to_save=["lm_head"],
    )
    assert all(name.side != "head" for name in _names(LaplaceLoRA(large, Options())))
    assert any(name.side == "head" for name in _names(LaplaceLoRA(large, ANSWERS)))


def _names(la: LaplaceLoRA) -> list[Any]:
    return weight_names(la.layers)


def test_another_head_at_load_is_refused(tmp_path):
    case = CASES["classifier with bias"]
    model = trained(case.model())
    LaplaceLoRA(model, case.task).fit([case.data(4, 1)], progress=False).save(tmp_path)
    model.base_model.model.classifier.modules_to_save["default"].bias.data[0] += 1
    with pytest.raises(StateError, match="classifier"):
        LaplaceLoRA.load(tmp_path, model)


def test_a_hooked_head_is_refused():
    case = CASES["classifier with bias"]
    model = trained(case.model())
    model.base_model.model.classifier.modules_to_save["default"].register_forward_hook(
        lambda module, args, output: 2 * output
    )
    la = LaplaceLoRA(model, case.task)
    la.fit([case.data(4, 1)], progress=False)  # behind the layer: part of the model
    model.base_model.model.classifier.modules_to_save["default"].forward = lambda x: x[:, :3]
    with pytest.raises(UnsupportedAdapterError, match="W x"):
        LaplaceLoRA(model, case.task).fit([case.data(4, 1)], progress=False)


@pytest.mark.parametrize("name", ["classifier with bias", "language-model head"])
def test_linearised_samples_step_along_the_head(name):
    """The outputs move by the Jacobian times the step; with the weights themselves, by what the model then gives."""
    case = CASES[name]
    model, test = trained(case.model()), case.data(2, 2)
    la = LaplaceLoRA(model, case.task, structure=EXACT, prior_precision=30.0)
    drawn = la.fit([case.data(5, 1)], progress=False).sample(2)
    found, moved = drawn.outputs(test), drawn.outputs(test, linearised=False)
    logits, jacobian = rows(model, test, case.logits)
    for sample in range(2):
        steps: dict[str, Tensor] = {}
        for layer, values in zip(
            la.layers, by_layer([d[sample] for d in drawn.deltas], la.layers), strict=True
        ):
            for parameter, (value, features) in layer.of_parameters(values).items():
                whole = torch.zeros_like(model.get_parameter(parameter))
                whole[slice(None) if features is None else features] = value
                steps[parameter] = whole
        flat = torch.cat([steps[parameter].flatten() for parameter in weights(model)])
        assert_close(found[sample] - logits, jacobian @ flat, 1e-8)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, step in steps.items():
                other.get_parameter(parameter).add_(step)
        there = torch.stack([case.logits(other, single).detach() for single in examples(test)])
        assert_close(moved[sample], there, 1e-8)
