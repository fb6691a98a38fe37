"""laplace-torch's backends against curvlinops and against torch.func."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests import oracle, tiny
from tests.integrations import batched
from tests.oracle import assert_close

pytest.importorskip("laplace", reason="needs laplace-torch")
pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch")

from laplace import Laplace
from laplace.curvature import CurvatureInterface, CurvlinopsEF, CurvlinopsGGN, EFInterface, GGNInterface
from laplace.utils import Kron

from laplace_lora_fast.errors import InvalidBatchError, UnsupportedAdapterError
from laplace_lora_fast.integrations.laplace_torch import FastEF, FastGGN

PAIRS = [(FastGGN, CurvlinopsGGN), (FastEF, CurvlinopsEF)]
MODES = ["expand", "reduce"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _fp64():
    """Curvlinops makes tensors of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def unpadded(n: int = 6) -> tiny.Batch:
    return tiny.batch(n, length=5, padding=None, seed=4)


def points(n: int = 7, outputs: int = 3, regression: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator)
    y = torch.randn(n, outputs, generator=generator) if regression else torch.arange(n) % outputs
    return x, y


def assert_same_factors(found: Kron, expected: Kron, relative: float = 1e-6) -> None:
    assert [len(f) for f in found.kfacs] == [len(f) for f in expected.kfacs]
    for ours, theirs in zip(found.kfacs, expected.kfacs, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, relative)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_factors_are_curvlinops_without_padding(ours, theirs, mode: str) -> None:
    model, data = batched.decoder(targets=("q_proj", "v_proj", "down_proj")), unpadded()
    loss, kron = ours(model, "classification").kron(data, data["labels"], 20, kfac_approx=mode)
    expected_loss, expected = theirs(model, "classification").kron(data, data["labels"], 20, kfac_approx=mode)
    assert_close(loss, expected_loss, 1e-12)
    assert_same_factors(kron, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_padded_examples_count_as_curvlinops_counts_them_alone(ours, theirs, mode: str) -> None:
    model, data = batched.decoder(), tiny.batch(6, length=7, seed=4)
    alone = [
        theirs(model, "classification").kron(single, single["labels"], 6, kfac_approx=mode)[1]
        for single in oracle.examples(data)
    ]
    expected = sum(alone[1:], start=alone[0])
    parts = [
        ours(model, "classification", kfac_approx=mode).kron(part, part["labels"], 6)[1]
        for part in tiny.split(data, 4)
    ]
    assert_same_factors(sum(parts[1:], start=parts[0]), expected)
    right = tiny.repad(data, "right", 9)
    assert_same_factors(ours(model, "classification").kron(right, right["labels"], 6, mode)[1], expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_no_input_twice(reentrant: bool) -> None:
    model, data = batched.decoder(), unpadded()
    _, expected = FastGGN(model, "classification").kron(data, data["labels"], 6)
    model.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    _, kron = FastGGN(model, "classification").kron(data, data["labels"], 6)
    assert model.training
    assert_same_factors(kron, expected, 1e-9)
    if not reentrant:
        _, wrong = CurvlinopsGGN(model, "classification").kron(data, data["labels"], 6)
        assert_close(
            wrong.kfacs[0][1], 4 * expected.kfacs[0][1], 1e-6
        )  # again with each of 3 backward passes


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_network_with_biases(ours, theirs) -> None:
    model, (x, y) = batched.network(), points()
    _, kron = ours(model, "classification").kron(x, y, 7)
    assert_same_factors(kron, theirs(model, "classification").kron(x, y, 7)[1])


def test_regression_is_curvlinops_up_to_a_constant_between_the_factors() -> None:
    model, (x, y) = batched.network(2), points(outputs=2, regression=True)
    loss, kron = FastGGN(model, "regression").kron(x, y, 7)
    expected_loss, expected = CurvlinopsGGN(model, "regression").kron(x, y, 7)
    assert_close(loss, expected_loss, 1e-12)
    assert_close(kron.to_matrix(), expected.to_matrix(), 1e-6)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_jacobians_gradients_full_and_diag_are_torch_funcs(likelihood: str) -> None:
    model, (x, y) = batched.network(), points(regression=likelihood == "regression")
    ggn, reference = FastGGN(model, likelihood), GGNInterface(model, likelihood)
    for method in ("jacobians", "full", "diag", "gradients"):
        arguments = (x,) if method == "jacobians" else (x, y)
        for found, expected in zip(
            getattr(ggn, method)(*arguments), getattr(reference, method)(*arguments), strict=True
        ):
            assert_close(found, expected, 1e-10)
    outputs = torch.tensor([[0, 2], [1, 1]] * 3 + [[2, 0]])
    for found, expected in zip(
        ggn.selected_output_jacobians(x, outputs),
        reference.selected_output_jacobians(x, outputs),
        strict=True,
    ):
        assert_close(found, expected, 1e-10)


def test_a_decoders_jacobians_full_and_diag_do_not_see_pads() -> None:
    model, data = batched.decoder(), tiny.batch(5, length=6, seed=2)
    jacobians, f = FastGGN(model, "classification").jacobians(data)
    alone = [CurvatureInterface(model, "classification").jacobians(s) for s in oracle.examples(data)]
    assert_close(jacobians, torch.cat([j for j, _ in alone]), 1e-6)
    assert_close(f, torch.cat([f for _, f in alone]), 1e-6)
    _, full = FastGGN(model, "classification").full(data, data["labels"])
    _, diag = FastGGN(model, "classification").diag(data, data["labels"])
    hessians = torch.stack([oracle.softmax_hessian(row) for row in f])
    assert_close(full, torch.einsum("ncp,nck,nkq->pq", jacobians, hessians, jacobians), 1e-10)
    assert_close(diag, full.diagonal(), 1e-10)


def test_empirical_fisher() -> None:
    """Regression: laplace-torch's is twice the empirical Fisher of its own likelihood."""
    model, (x, y) = batched.network(), points()
    for method in ("full", "diag"):
        found = getattr(FastEF(model, "classification"), method)(x, y)[1]
        assert_close(found, getattr(EFInterface(model, "classification"), method)(x, y)[1], 1e-10)
    y = points(regression=True)[1]
    jacobians, f = FastEF(model, "regression").jacobians(x)
    gradients = torch.einsum("nc,ncp->np", f - y, jacobians)
    _, full = FastEF(model, "regression").full(x, y)
    assert_close(full, gradients.mT @ gradients, 1e-10)
    assert_close(EFInterface(model, "regression").full(x, y)[1], 2 * full, 1e-10)


def test_sampled_fisher_converges_and_is_fresh_per_batch() -> None:
    model, (x, y) = batched.network(), points()
    exact = FastGGN(model, "classification").full(x, y)[1]
    sampled = FastGGN(model, "classification", stochastic=True, num_samples=4000)
    assert (sampled.full(x, y)[1] - exact).norm() / exact.norm() < 0.05
    once = FastGGN(model, "classification", stochastic=True)
    assert not torch.allclose(once.kron(x, y, 7)[1].kfacs[0][0], once.kron(x, y, 7)[1].kfacs[0][0])


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_last_layer(structure: str) -> None:
    model, (x, y) = batched.network(), points()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    found, expected = (
        Laplace(model, "classification", "last_layer", structure, prior_precision=0.7, backend=backend)
        for backend in (FastGGN, CurvlinopsGGN)
    )
    for la in (found, expected):
        la.fit(loader)
    assert_close(found.log_marginal_likelihood(), expected.log_marginal_likelihood(), 1e-6)
    assert_close(found(x), expected(x), 1e-6)


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_subnetwork(structure: str) -> None:
    model, (x, y) = batched.network(), points()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    chosen = torch.tensor([0, 3, 17, 30, 40])
    found, expected = (
        Laplace(model, "classification", "subnetwork", structure, subnetwork_indices=chosen, backend=backend)
        for backend in (FastGGN, CurvlinopsGGN)
    )
    for la in (found, expected):
        la.fit(loader)
    assert_close(found.log_marginal_likelihood(), expected.log_marginal_likelihood(), 1e-6)
    assert_close(found(x), expected(x), 1e-6)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_laplace_of_a_decoder(structure: str) -> None:
    """From `Laplace(...)` to predictions, on data that curvlinops and torch.func treat rightly."""
    model, data = batched.decoder(batched.EAGER, layers=1), unpadded(7)
    found, expected = (
        Laplace(model, "classification", "all", structure, prior_precision=0.7, backend=backend)
        for backend in (FastGGN, CurvlinopsGGN)
    )
    for la in (found, expected):
        la.fit(batched.loader(data, 3))
    assert_close(found.log_marginal_likelihood(), expected.log_marginal_likelihood(), 1e-6)
    for link in ("probit", "bridge"):
        assert_close(found(data, link_approx=link), expected(data, link_approx=link), 1e-6)


def test_backprop_through_the_jacobians_is_laplace_torchs_own() -> None:
    model, (x, _) = batched.network(), points()
    jacobians, f = FastGGN(model, "classification").jacobians(x.requires_grad_(), enable_backprop=True)
    (jacobians.square().sum() + f.sum()).backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_parameters_outside_linear_layers_are_named() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    with pytest.raises(UnsupportedAdapterError, match=r"'1\.weight' belongs to a LayerNorm"):
        FastGGN(model, "classification")
    with pytest.raises(ValueError, match="paper"):
        FastGGN(batched.network(), "classification").kron(*points(), 7, kfac_approx="paper")


class Attention(nn.Module):
    """nn.MultiheadAttention hands its out_proj's weight on, and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
        self.attention.in_proj_weight.requires_grad_(False)
        self.attention.in_proj_bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))


class UsedTwice(nn.Module):
    """One use of the weight is the layer's own, the other is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.linear(torch.tanh(self.first(x)), self.first.weight)).mean(1)


@pytest.mark.parametrize("ours", [FastGGN, FastEF])
@pytest.mark.parametrize("use", ["jacobians", "kron", "diag", "full", "gradients"])
@pytest.mark.parametrize(("model", "name"), [(Attention, "attention.out_proj"), (UsedTwice, "first")])
def test_weights_used_outside_their_layer_are_refused(ours, use, model, name) -> None:
    torch.manual_seed(0)
    module, x, y = model(), torch.randn(4, 5, 8), torch.tensor([0, 1, 2, 0])
    arguments = {"jacobians": (x,), "kron": (x, y, 4)}.get(use, (x, y))
    for _ in range(2):  # a refusal is no pass
        backend = ours(module, "classification")
        with pytest.raises(UnsupportedAdapterError, match=rf"'{name}.weight' is used outside its layer"):
            getattr(backend, use)(*arguments)
    module.get_submodule(name).requires_grad_(False)
    getattr(ours(module, "classification"), use)(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_use_outside_a_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).to(dtype)
    FastGGN(model, "classification").jacobians(torch.randn(200, 64, dtype=dtype))


def test_a_layer_that_takes_no_part_has_no_curvature() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.head = nn.Linear(4, 4), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    x, y = points()
    _, kron = FastGGN(Idle(), "classification").kron(x, y, len(y))
    assert [bool(factor.any()) for factors in kron.kfacs for factor in factors] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("ours", [FastGGN, FastEF])
@pytest.mark.parametrize("use", ["kron", "diag", "full", "gradients"])
def test_batches_that_would_give_wrong_numbers_are_refused(ours, use) -> None:
    x, y = points()
    backend = ours(nn.Linear(5, 3), "classification")
    for x_bad, y_bad, match in (
        (x * torch.nan, y, "not finite"),
        (x, y * 0 - 100, r"'labels' must lie in \[0, 3\)"),
        (x, y + 3, r"'labels' must lie in \[0, 3\)"),
        (x, y[:-1], "7 class indices"),
    ):
        with pytest.raises(InvalidBatchError, match=match):
            getattr(backend, use)(x_bad, y_bad, **({"N": 7} if use == "kron" else {}))
    with pytest.raises(InvalidBatchError, match="at least 2 logits"):
        getattr(ours(nn.Linear(5, 1), "classification"), use)(x, y, **({"N": 7} if use == "kron" else {}))
    with pytest.raises(InvalidBatchError, match="not finite"):
        backend.jacobians(x * torch.nan)


def test_logits_that_depend_on_pads_are_refused() -> None:
    """BERT pools position 0; transformers masks a pad's key, not its query."""
    model = batched.Batched(tiny.tiny_bert_classifier(3))
    backend, right = FastGGN(model, "classification"), tiny.batch(4, padding="right")
    backend.jacobians(right)
    for one in (backend, FastGGN(model, "classification")):
        with pytest.raises(InvalidBatchError, match="depend on padded positions"):
            one.jacobians(tiny.batch(4, padding="left"))


def test_rows_that_are_not_examples_are_refused() -> None:
    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.layer(x.transpose(0, 1))).cumsum(0)[-1])

    backend = FastGGN(TokensFirst(), "classification")
    backend.jacobians(torch.randn(1, 1, 8))
    with pytest.raises(UnsupportedAdapterError, match="row n of what layer 'layer' sees is not example n"):
        backend.jacobians(torch.randn(5, 5, 8))


def test_a_fit_repeats_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches of four classes: one forward and three backward passes each.

    The proofs of a first batch ride on its own passes, but for a forward pass that has to agree, a backward pass that
    tells whose rows are whose, and one sequence's passes for difference quotients: a forward and a backward one, and
    two moved ones.
    """
    from laplace_lora_fast.model import tap

    backward = []
    send = tap.send_back
    monkeypatch.setattr(tap, "send_back", lambda *args: backward.append(1) or send(*args))
    model = batched.Batched(tiny.tiny_llama_classifier(4))
    forward = []
    model.model.register_forward_pre_hook(lambda *args: forward.append(1))
    data = tiny.batch(8, classes=4, padding="right", seed=1)
    backend = FastGGN(model, "classification")
    for part in tiny.split(data, 2):
        backend.kron(part, part["labels"], 8)
    assert len(backward) == 4 * 3 + 1
    assert len(forward) == 4 + 1 + 3


def test_factors_of_one_input_are_one_tensor_to_the_end() -> None:
    """q, k and v: added up, scaled and decomposed once."""
    from laplace import Laplace

    model = batched.Batched(tiny.tiny_llama_classifier(3, targets=("q_proj", "k_proj", "v_proj"), layers=1))
    la = Laplace(model, "classification", "all", "kron", backend=FastGGN)
    la.fit(batched.loader(tiny.batch(8, padding="right", seed=1), 4))
    inputs = [vectors[1] for vectors in la.H.eigenvectors[0::2]]  # of lora_A, layer by layer
    assert len(inputs) == 3
    assert len({vectors.data_ptr() for vectors in inputs}) == 1
