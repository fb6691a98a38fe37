"""What a first batch proves: a number is right, or a typed error says which layer, why, and what to do."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from laplace_lora_fast import KFAC, Answers, Classes, LaplaceLoRA, Outputs, Rows, UnsupportedAdapterError
from tests import tiny

ANSWERS = Answers(tiny.ANSWERS)
TRAIN, TEST = tiny.split(tiny.batch(8, seed=1), 4), tiny.batch(3, seed=2)
Change = Callable[[nn.Module], None]


def modules(model: nn.Module, suffix: str) -> list[nn.Module]:
    found = [module for name, module in model.named_modules() if name.endswith(suffix)]
    assert found
    return found


def on(suffix: str, hook: Callable, kind: str = "register_forward_hook", **options: bool) -> Change:
    def change(model: nn.Module) -> None:
        for module in modules(model, suffix):
            getattr(module, kind)(hook, **options)

    return change


class Scaling(nn.Module):
    def forward(self, x):
        return 1.7 * x


def scale_dropout(model: nn.Module) -> None:
    for module in modules(model, "q_proj"):
        module.lora_dropout["default"] = Scaling()


def normalise_a(model: nn.Module) -> None:
    for module in modules(model, "lora_A.default"):
        nn.utils.parametrizations.weight_norm(module)
        module.parametrizations.weight.original0.data.mul_(1.7)


def fuse(model: nn.Module, suffix: str = "q_proj", parts: bool = False) -> None:
    """The parent computes the layer itself, as fused kernels do."""
    for parent in list(model.modules()):
        layer = getattr(parent, suffix, None)
        if isinstance(layer, nn.Module) and hasattr(layer, "lora_A"):

            class Around(nn.Module):
                def __init__(self, inner: nn.Module) -> None:
                    super().__init__()
                    self.inner = inner

                def forward(self, x):
                    layer = self.inner
                    if parts:
                        return layer.forward(x)
                    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                    return layer.base_layer(x) + layer.scaling["default"] * (x @ a.mT @ b.mT)

            setattr(parent, suffix, Around(layer))


def replace_forward(model: nn.Module) -> None:
    for layer in modules(model, "q_proj"):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer.forward = lambda x, layer=layer, a=a, b=b: layer.base_layer(x) + 3 * (x @ a.mT @ b.mT)


class InferenceLinear(nn.Module):
    """As quantisers make them: buffers, and a kernel that autograd does not know."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().clone())

    @torch.no_grad()
    def forward(self, x):
        return x @ self.qweight.mT


def for_inference(model: nn.Module) -> None:
    mlp = model.get_submodule("base_model.model.model.layers.1.mlp")
    mlp.down_proj = InferenceLinear(mlp.down_proj)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (on("lora_A.default", lambda m, a, o: 1.7 * o), "lora_A gives"),
        (on("lora_B.default", lambda m, a, o: 1.7 * o), "lora_B gives"),
        (on("lora_A.default", lambda m, a: (1.7 * a[0],), "register_forward_pre_hook"), "lora_A gives"),
        (scale_dropout, "lora_dropout gives"),
        (fuse, "went around the layer"),
        (lambda model: fuse(model, parts=True), r"calls layer.forward\(x\)"),
        (replace_forward, "without its lora_A and lora_B"),
        (on("v_proj", lambda m, a, o: o.detach()), "v_proj.* lets no gradient through"),
        (on("layers.0.mlp", lambda m, a, o: o + torch.rand(()).double()), "two forward passes"),
        (on("layers.1.mlp.down_proj", lambda m, a, o: o.detach()), "down_proj.* lets no gradient through"),
        (on("layers.1.mlp", lambda m, a, o: o.detach()), "layers.1.mlp.* lets no gradient through"),
        (
            on("layers.1.self_attn", lambda m, a, o: (o[0].detach(), *o[1:])),
            "self_attn.* lets no gradient through",
        ),
        (for_inference, "down_proj.* lets no gradient through"),
    ],
)
@pytest.mark.parametrize("structure", [Rows(), KFAC()], ids=["rows", "kfac"])
def test_what_changes_a_number_in_silence_is_an_error(change: Change, match: str, structure: object) -> None:
    model = tiny.tiny_llama()
    change(model)
    with pytest.raises(UnsupportedAdapterError, match=match):
        LaplaceLoRA(model, ANSWERS, structure=structure).fit(TRAIN, progress=False)
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        on("q_proj", lambda m, a, o: 1.7 * o),
        on("q_proj", lambda m, a: (1.7 * a[0],), "register_forward_pre_hook"),
        on("q_proj.base_layer", lambda m, a, o: 1.7 * o),
        on("layers.0", lambda m, a, o: o + 0.3 if torch.is_tensor(o) else (o[0] + 0.3, *o[1:])),
    ],
)
def test_hooks_of_others_that_the_jacobian_goes_through(change: Change) -> None:
    model = tiny.tiny_llama()
    change(model)
    single = {"input_ids": torch.tensor([[3, 9, 4, 17]])}
    la = LaplaceLoRA(model, ANSWERS, structure=Rows(columns=64), prior_precision=2e9)
    la.fit([single], progress=False)
    _, cov = la.logit_distribution(single, prior_precision=1e-9)
    _, prior = la.logit_distribution(single, prior_precision=1e9)
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    for weight in weights:
        weight.requires_grad_(True)
    logits = model(**single).logits[0, -1, list(tiny.ANSWERS)]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(f, weights, retain_graph=True)]) for f in logits
    ]
    J = torch.stack(rows)
    assert torch.allclose(prior[0] * 1e9, J @ J.mT, rtol=1e-5)
    assert cov.isfinite().all()


def test_layers_left_out_may_do_what_they_like() -> None:
    model = tiny.tiny_llama()
    fuse(model, "q_proj")
    la = LaplaceLoRA(model, ANSWERS, layers=lambda name: "v_proj" in name)
    assert la.fit(TRAIN, progress=False).predict(TEST).isfinite().all()


def test_nothing_is_left_in_modules_of_an_output_function() -> None:
    model, head = tiny.tiny_llama(), nn.Linear(16, 3).double()
    batches = [batch | {"output_hidden_states": True} for batch in TRAIN]
    embeddings = model.get_input_embeddings()(TRAIN[0]["input_ids"]).detach().requires_grad_(True)
    la = LaplaceLoRA(model, Outputs(lambda out, batch: head(out.hidden_states[-1][:, -1])))
    la.fit(batches, progress=False)
    la.predict(
        {key: value for key, value in batches[0].items() if key != "input_ids"}
        | {"inputs_embeds": embeddings}
    )
    assert all(parameter.grad is None for parameter in [*head.parameters(), *model.parameters(), embeddings])


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_same_under_checkpointing(reentrant: bool) -> None:
    model, head = tiny.tiny_llama(), nn.Linear(16, 3).double()
    head.weight.grad = torch.ones_like(head.weight)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    batches = [batch | {"output_hidden_states": True} for batch in TRAIN]
    LaplaceLoRA(model, Outputs(lambda out, b: head(out.hidden_states[-1][:, -1]))).fit(
        batches, progress=False
    )
    assert torch.equal(head.weight.grad, torch.ones_like(head.weight))
    assert head.bias.grad is None


@pytest.mark.parametrize("structure", [Rows(), KFAC()], ids=["rows", "kfac"])
def test_threads_wait_for_each_other_and_others_see_nothing(structure: object) -> None:
    model = tiny.tiny_llama(dtype=torch.float32, layers=2)
    la = LaplaceLoRA(model, ANSWERS, structure=structure).fit(TRAIN, progress=False)
    model.eval()
    batches = [tiny.batch(3, seed=10 + i, length=5 + i, labels=False) for i in range(4)]
    expected = [la.predict(batch) for batch in batches]
    plain_input = {key: batches[0][key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        plain = model(**plain_input).logits
    wrong, errors, stop = [], [], threading.Event()

    def predict(index: int) -> None:
        try:
            found = [la.predict(batches[index]) for _ in range(10)]
            wrong.extend(index for each in found if not torch.allclose(each, expected[index], atol=1e-5))
        except Exception as error:
            errors.append(error)

    def forward() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    if not torch.equal(model(**plain_input).logits, plain):
                        wrong.append("plain")
        except Exception as error:
            errors.append(error)

    user = threading.Thread(target=forward)
    user.start()
    threads = [threading.Thread(target=predict, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    user.join()
    assert not wrong
    assert not errors
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(backend: str) -> None:
    model = tiny.tiny_llama_classifier(3)
    data = tiny.split(tiny.batch(6, seed=1, padding="right"), 3)
    expected = LaplaceLoRA(model, Classes()).fit(data, progress=False).logit_distribution(data[0])
    compiled = torch.compile(model, backend=backend)
    compiled(input_ids=data[0]["input_ids"], attention_mask=data[0]["attention_mask"])
    found = LaplaceLoRA(compiled, Classes()).fit(data, progress=False).logit_distribution(data[0])
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9)
