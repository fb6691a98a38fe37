"""Wrong input raises a typed error that names the layer or the argument, and leaves everything as it was."""

from __future__ import annotations

import contextlib
import math

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn

from laplace_lora_fast import (
    InvalidBatchError,
    LaplaceError,
    LaplaceLoRA,
    LaplaceWarning,
    NotFittedError,
    NumericalError,
    UnsupportedAdapterError,
)
from laplace_lora_fast.errors import DeferredChecks
from tests import tiny

ANSWERS = {"answer_token_ids": tiny.ANSWERS}
DTYPE = torch.float64


def add_other(model, targets=("q_proj", "v_proj")):
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=list(targets)))
    tiny.randomise(model, 3)
    return model


# Models


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(2, 2)

    def forward(self, pixels):
        return self.head(self.conv(pixels).mean((-1, -2)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.mix(x, x, x)[0].mean(1))


def with_two_adapters():
    model = add_other(tiny.tiny_llama())
    model.base_model.set_adapter(["default", "other"])
    return model


def merged():
    model = tiny.tiny_llama()
    model.merge_adapter()
    return model


def disabled():
    model = tiny.tiny_llama()
    model.disable_adapter_layers()
    return model


def with_ia3():
    base = tiny.tiny_llama().get_base_model()
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    return peft.get_peft_model(tiny.transformers.LlamaForCausalLM(base.config), config)


def with_adalora():
    base = tiny.tiny_llama().get_base_model()
    config = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    return peft.get_peft_model(tiny.transformers.LlamaForCausalLM(base.config), config)


MODELS = {
    "plain model": (lambda: tiny.transformers.LlamaForCausalLM(tiny.tiny_llama().config), "no LoRA layer"),
    "unadapted torch module": (Images, "no LoRA layer"),
    "IA3": (with_ia3, "no LoRA layer"),
    "AdaLoRA": (with_adalora, r"'[\w.]+q_proj'.*SVDLinear"),
    "DoRA": (
        lambda: tiny.tiny_llama(use_dora=True),
        r"'base_model.model.model.layers.0.self_attn.q_proj'.*DoRA",
    ),
    "DoRA in one layer": (
        lambda: tiny.tiny_llama(use_dora=True, targets=["layers.1.self_attn.v_proj"]),
        r"'[\w.]+layers.1.self_attn.v_proj'.*DoRA",
    ),
    "embedding": (
        lambda: tiny.tiny_llama(targets=("q_proj", "embed_tokens")),
        r"'[\w.]+embed_tokens'.*linear",
    ),
    "convolution": (
        lambda: tiny.adapt(Images(), targets=("conv", "head")),
        r"'base_model.model.conv'.*linear",
    ),
    "fused attention": (lambda: tiny.adapt(Attention(), targets=("mix",)), r"'base_model.model.mix'.*linear"),
    "merged": (merged, r"'[\w.]+layers.0.self_attn.q_proj'.*unmerge_adapter"),
    "disabled": (disabled, r"'[\w.]+layers.0.self_attn.q_proj'.*disabled"),
    "two active": (with_two_adapters, r"'[\w.]+q_proj'.*\['default', 'other'\].*set_adapter"),
    "parameters": (
        lambda: tiny.tiny_llama(targets=[], target_parameters=["q_proj.weight"]),
        r"'[\w.]+q_proj'.*linear",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_not_covered(name):
    build, match = MODELS[name]
    with pytest.raises(UnsupportedAdapterError, match=match):
        LaplaceLoRA(build())


CONSTRUCTOR = {
    "likelihood": ({"likelihood": "softmax"}, "likelihood must be one of .*'softmax'"),
    "structure": ({"structure": "full"}, "structure must be one of .*'full'"),
    "kfac": ({"kfac": "sum"}, "kfac must be one of .*'sum'"),
    "fisher": ({"fisher": "ggn"}, "fisher must be one of .*'ggn'"),
    "factor": ({"factor": "lowrank"}, "factor must be one of .*'lowrank'"),
    "rank": ({"rank": 0}, "rank"),
    "mc_samples": ({"mc_samples": 0}, "mc_samples"),
    "sketch_size": ({"sketch_size": -1}, "sketch_size"),
    "sigma_noise zero": ({"sigma_noise": 0.0}, "sigma_noise"),
    "sigma_noise NaN": ({"sigma_noise": math.nan}, "sigma_noise"),
    "sigma_noise infinite": ({"sigma_noise": math.inf}, "sigma_noise"),
    "one answer": ({"answer_token_ids": [3]}, "answer_token_ids"),
    "no answers": ({"answer_token_ids": []}, "answer_token_ids"),
    "answer twice": ({"answer_token_ids": [3, 5, 3]}, r"answer_token_ids repeats.*\[3, 5, 3\]"),
    "answer beyond the vocabulary": ({"answer_token_ids": [3, tiny.VOCAB]}, r"answer_token_ids.*48"),
    "negative answer": ({"answer_token_ids": [3, -1]}, "answer_token_ids"),
    "answers as strings": ({"answer_token_ids": ["yes", "no"]}, "answer_token_ids"),
    "answers as lists": ({"answer_token_ids": [[3], [5]]}, "answer_token_ids"),
    "answers of several tokens": ({"answer_token_ids": [[3, 4], [5]]}, "answer_token_ids"),
    "answers as floats": ({"answer_token_ids": [3.0, 5.0]}, "answer_token_ids"),
    "answer and output_fn": ({**ANSWERS, "output_fn": lambda out, batch: out.logits[:, -1]}, "output_fn"),
}
PRECISIONS = {
    "zero": 0.0,
    "negative": -1.0,
    "NaN": math.nan,
    "infinite": math.inf,
    "missing B": {"A": 1.0},
    "empty": {},
    "unknown key": {"A": 1.0, "B": 1.0, "C": 1.0},
    "unknown layers": {"layer": 1.0},
    "missing layers": {"base_model.model.model.layers.0.self_attn.q_proj": 1.0},
    "negative B": {"A": 1.0, "B": -2.0},
    "text": "high",
    "none in a dict": {"A": 1.0, "B": None},
    "digits": "12",
    "digits in a dict": {"A": 1.0, "B": "2"},
    "below what fp64 can divide by": 1e-310,
}


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_constructor_arguments(name):
    arguments, match = CONSTRUCTOR[name]
    with pytest.raises(ValueError, match=match):
        LaplaceLoRA(tiny.tiny_llama(), **arguments)


@pytest.mark.parametrize("name", PRECISIONS)
def test_prior_precisions(name):
    model = tiny.tiny_llama()
    with pytest.raises(ValueError, match="prior_precision"):
        LaplaceLoRA(model, prior_precision=PRECISIONS[name])
    la = LaplaceLoRA(model, prior_precision=2.0, **ANSWERS).fit([tiny.batch(3)], progress=False)
    with pytest.raises(ValueError, match="prior_precision"):
        la.prior_precision = PRECISIONS[name]
    for call in (
        lambda: la.predict(tiny.batch(2), prior_precision=PRECISIONS[name]),
        lambda: la.logit_distribution(tiny.batch(2), prior_precision=[1.0, PRECISIONS[name]]),
        lambda: la.log_marginal_likelihood(PRECISIONS[name]),
    ):
        with pytest.raises(ValueError, match="prior_precision"):
            call()
    assert la.prior_precision == 2.0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_noise_is_checked_when_assigned(value):
    la = LaplaceLoRA(tiny.tiny_llama_classifier(1), "regression", sigma_noise=0.5)
    with pytest.raises(ValueError, match="sigma_noise"):
        la.sigma_noise = value
    assert la.sigma_noise == 0.5


def test_answers_need_a_language_model():
    for model in (
        tiny.tiny_llama_classifier(2),
        tiny.tiny_bert_classifier(2),
        tiny.adapt(Images(), targets=("head",)),
    ):
        with pytest.raises(ValueError, match=r"answer_token_ids.*causal language model"):
            LaplaceLoRA(model, answer_token_ids=[0, 1])


SMALL = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
NOT_CAUSAL = {
    "T5ForConditionalGeneration": lambda: tiny.adapt(tiny_t5(), targets=("q", "v")),
    "BertForMaskedLM": lambda: tiny.adapt(
        transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, num_attention_heads=2)),
        targets=("query", "value"),
    ),
    "RobertaForMaskedLM": lambda: tiny.adapt(
        transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL, num_attention_heads=2)),
        targets=("query", "value"),
    ),
}


def tiny_t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_answers_are_not_at_the_last_position_of_other_language_models(name):
    with pytest.raises(ValueError, match=rf"causal language model, {name} answers at .*output_fn"):
        LaplaceLoRA(NOT_CAUSAL[name](), **ANSWERS)


def test_prior_mean_of_another_shape_or_without_a_layer():
    model = tiny.tiny_llama()
    state = {k: v for k, v in model.state_dict().items() if "lora" in k}
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"
    for broken in ({k: v for k, v in state.items() if k != key}, state | {key: state[key][:2]}):
        with pytest.raises(UnsupportedAdapterError, match=key):
            LaplaceLoRA(model, prior_mean=broken)


# Batches


def change(**changes):
    def changed(batch):
        new = {**batch, **{k: f(batch) for k, f in changes.items()}}
        return {k: v for k, v in new.items() if v is not None}

    return changed


def poisoned(batch):
    embeds = torch.randn(*batch["input_ids"].shape, 16, dtype=DTYPE)
    embeds[1, -1] = torch.nan
    return {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}


def zero_row(batch):
    mask = batch["attention_mask"].clone()
    mask[1] = 0
    return mask


BATCHES = {
    "tuple": (lambda b: (b["input_ids"], b["labels"]), "dict"),
    "tensor": (lambda b: b["input_ids"], "dict"),
    "empty dict": (lambda b: {}, "no input"),
    "lists": (lambda b: {k: v.tolist() for k, v in b.items()}, "no input"),
    "labels only": (lambda b: {"labels": b["labels"]}, "no input"),
    "no examples": (lambda b: {k: v[:0] for k, v in b.items()}, "no examples"),
    "one example without batch axis": (lambda b: {k: v[0] for k, v in b.items()}, r"input_ids.*\[N, T\]"),
    "no tokens": (lambda b: {"input_ids": b["input_ids"][:, :0]}, "at least one token"),
    "adapter names": (change(adapter_names=lambda b: ["default"] * 3), "adapter_names"),
    "labels too large": (change(labels=lambda b: b["labels"] + 3), r"'labels' must lie in \[0, 3\)"),
    "labels negative": (change(labels=lambda b: b["labels"] * 0 - 100), r"'labels' must lie in \[0, 3\)"),
    "labels of another size": (change(labels=lambda b: b["labels"][:-1]), "'labels'.* 3 class indices"),
    "labels as column": (change(labels=lambda b: b["labels"][:, None]), "'labels'.* 3 class indices"),
    "labels of tokens": (change(labels=lambda b: b["input_ids"]), "'labels'.* 3 class indices"),
    "labels real": (change(labels=lambda b: b["labels"].double()), "'labels'.* 3 class indices"),
    "mask too long": (change(attention_mask=lambda b: torch.ones(3, 9)), "attention_mask has shape"),
    "mask of another batch": (change(attention_mask=lambda b: torch.ones(2, 7)), "attention_mask has shape"),
    "mask of pairs": (change(attention_mask=lambda b: torch.ones(3, 1, 7, 7)), "attention_mask has shape"),
    "mask with an empty row": (change(attention_mask=zero_row), "all-zero row"),
    "NaN": (poisoned, "not finite"),
}


def snapshot(model):
    """Everything that tapping touches, and the weights."""
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: (p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()},
        {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
    )


@contextlib.contextmanager
def nothing_changes(la, batch):
    """The model and the earlier fit are the same afterwards, bit by bit."""
    before, probs, evidence = snapshot(la.model), la.predict(batch), la.log_marginal_likelihood()
    fit, precision = la._fit, la.prior_precision
    yield
    assert snapshot(la.model) == before
    assert la._fit is fit
    assert la.prior_precision == precision
    assert torch.equal(la.predict(batch), probs)
    assert torch.equal(la.log_marginal_likelihood(), evidence)


LABELS_IGNORED = {name for name in BATCHES if name.startswith("labels") and name != "labels only"}


@pytest.fixture(scope="module")
def fitted():
    model = tiny.tiny_llama(targets=("q_proj", "lm_head")).train()
    return LaplaceLoRA(model, **ANSWERS).fit([tiny.batch(6, seed=4)], progress=False)


@pytest.mark.parametrize("name", BATCHES)
def test_batches(fitted, name):
    make, match = BATCHES[name]
    good, bad = tiny.batch(3), make(tiny.batch(3))
    calls = [
        lambda: fitted.fit([good, bad], progress=False),
        lambda: fitted.fit([bad], progress=False),
        lambda: fitted.predict_loader([good, bad], progress=False),
        lambda: fitted.optimize_prior_precision("val_nll", val_loader=[good, bad], progress=False),
    ]
    without_labels = [
        lambda: fitted.predict(bad),
        lambda: fitted.predict(bad, link_approx="map"),
        lambda: fitted.logit_distribution(bad),
    ]
    if name not in LABELS_IGNORED:
        calls += without_labels
    with nothing_changes(fitted, good):
        for call in calls:
            with pytest.raises(InvalidBatchError, match=match):
                call()


STRUCTURES = ["ekfac", "diag", "dual", "auto"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batches_of_other_structures(structure):
    model, good = tiny.tiny_llama(targets=("q_proj", "lm_head")).train(), tiny.batch(3)
    la = LaplaceLoRA(model, structure=structure, **ANSWERS).fit([tiny.batch(6, seed=4)], progress=False)
    with nothing_changes(la, good):
        for name in ("tuple", "no examples", "labels too large", "mask with an empty row", "NaN"):
            make, match = BATCHES[name]
            bad = make(tiny.batch(3))
            for loader in ([bad], [good, bad], [bad, good]):
                with pytest.raises(InvalidBatchError, match=match):
                    la.fit(loader, progress=False)
            if name not in LABELS_IGNORED:
                with pytest.raises(InvalidBatchError, match=match):
                    la.predict(bad)
        with pytest.raises(InvalidBatchError, match="train_loader yielded no batch"):
            la.fit([], progress=False)
        with pytest.raises(InvalidBatchError, match="at least 2 logits"):
            LaplaceLoRA(tiny.tiny_llama_classifier(1), structure=structure).fit([good], progress=False)


@pytest.mark.parametrize(
    ("structure", "factor"),
    [("kfac", "dense"), ("kfac", "sketch"), ("ekfac", "dense"), ("diag", "auto"), ("dual", "auto")],
)
def test_conditions_that_wait_for_the_device(structure, factor, monkeypatch):
    model, good = tiny.tiny_llama(targets=("q_proj", "lm_head")), tiny.batch(3)
    la = LaplaceLoRA(model, structure=structure, factor=factor, sketch_size=4, **ANSWERS)
    la.fit([tiny.batch(6, seed=4)], progress=False)
    with nothing_changes(la, good), monkeypatch.context() as patch:
        patch.setattr(DeferredChecks, "require", DeferredChecks._pend)
        for name in ("labels too large", "labels negative", "mask with an empty row", "NaN"):
            make, match = BATCHES[name]
            bad = make(tiny.batch(3))
            calls = [
                lambda: la.fit([bad, good], progress=False),  # noqa: B023
                lambda: la.fit([good, bad], progress=False),  # noqa: B023
                lambda: la.predict_loader([bad, good], link_approx="map", progress=False),  # noqa: B023
                lambda: la.optimize_prior_precision("val_nll", val_loader=[bad], progress=False),  # noqa: B023
            ]
            if name not in LABELS_IGNORED:
                calls += [
                    lambda: la.predict(bad),  # noqa: B023
                    lambda: la.predict(bad, link_approx="mc"),  # noqa: B023
                    lambda: la.logit_distribution(bad),  # noqa: B023
                ]
            for call in calls:
                with pytest.raises(InvalidBatchError, match=match):
                    call()


def test_a_failed_first_fit_is_no_fit():
    la = LaplaceLoRA(tiny.tiny_llama(), **ANSWERS)
    with pytest.raises(InvalidBatchError):
        la.fit([tiny.batch(3), {}], progress=False)
    with pytest.raises(NotFittedError):
        la.predict(tiny.batch(3))


def test_empty_loaders(fitted):
    with nothing_changes(fitted, tiny.batch(3)):
        used = iter([])
        for loader in ([], (), used):
            for call in (
                lambda: fitted.fit(loader, progress=False),  # noqa: B023
                lambda: fitted.predict_loader(loader, progress=False),  # noqa: B023
                lambda: fitted.optimize_prior_precision("val_nll", val_loader=loader, progress=False),  # noqa: B023
            ):
                with pytest.raises(InvalidBatchError, match="loader"):
                    call()


def test_a_loader_that_fails(fitted):
    def loader():
        yield tiny.batch(2)
        raise OSError("disk gone")

    with nothing_changes(fitted, tiny.batch(3)):
        for call in (
            lambda: fitted.fit(loader(), progress=False),
            lambda: fitted.predict_loader(loader(), progress=False),
            lambda: fitted.optimize_prior_precision("val_nll", val_loader=loader(), progress=False),
        ):
            with pytest.raises(OSError, match="disk gone"):
                call()


def test_one_batch_where_a_loader_belongs(fitted):
    with nothing_changes(fitted, tiny.batch(3)), pytest.raises(InvalidBatchError, match="dict"):
        fitted.fit(tiny.batch(3), progress=False)


def test_causal_model_without_answers():
    with pytest.raises(InvalidBatchError, match=r"\(3, 7, 48\).*answer_token_ids"):
        LaplaceLoRA(tiny.tiny_llama()).fit([tiny.batch(3)], progress=False)


def test_output_fn_of_a_wrong_shape():
    for output_fn in (lambda out, _: out.logits, lambda out, _: out.logits[:, -1, 0], lambda out, _: out):
        with pytest.raises(InvalidBatchError, match="output_fn"):
            LaplaceLoRA(tiny.tiny_llama(), output_fn=output_fn).fit([tiny.batch(3)], progress=False)


def test_classification_with_one_logit():
    la = LaplaceLoRA(tiny.tiny_llama_classifier(1))
    with pytest.raises(InvalidBatchError, match=r"at least 2 logits.*regression"):
        la.fit([tiny.batch(3, classes=1)], progress=False)


def test_number_of_classes_that_changes():
    def output_fn(out, batch):
        return out.logits[:, -1, : batch["input_ids"].shape[1]]

    la = LaplaceLoRA(tiny.tiny_llama(), output_fn=output_fn).fit(
        [tiny.batch(2, 4, padding=None)], progress=False
    )
    with pytest.raises(InvalidBatchError, match="5"):
        la.fit([tiny.batch(2, 4, padding=None), tiny.batch(2, 5, padding=None)], progress=False)
    for link in ("probit", "map"):
        with pytest.raises(InvalidBatchError, match="5"):
            la.predict(tiny.batch(2, 5, padding=None), link_approx=link)
    with pytest.raises(InvalidBatchError, match="5"):
        la.logit_distribution(tiny.batch(2, 5, padding=None))


@pytest.mark.parametrize("where", ["base", "lora"])
def test_weights_that_are_not_finite(where):
    model = tiny.tiny_llama(targets=("q_proj",))
    name = "lora_A.default.weight" if where == "lora" else "o_proj.weight"
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith(name))[0, 0] = torch.nan
    with pytest.raises(InvalidBatchError, match=r"batch 0 .*not finite"):
        LaplaceLoRA(model, **ANSWERS).fit([tiny.batch(3)], progress=False)


class Huge(nn.Module):
    """Finite logits whose curvature overflows."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.inner(1e30 * x) * 1e-30)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kfac": kfac, "factor": factor, "structure": structure}
        for kfac in ("expand", "reduce")
        for factor in ("dense", "sketch")
        for structure in ("kfac", "ekfac")
    ],
    ids=str,
)
def test_curvature_that_overflows(kwargs):
    model = tiny.adapt(Huge(), dtype=torch.float32, targets=("head", "inner"), r=2)
    la = LaplaceLoRA(model, sketch_size=2, **kwargs)
    with pytest.raises(NumericalError, match=r"'base_model.model.inner'.*not finite"):
        la.fit([{"x": torch.randn(5, 4)}], progress=False)
    with pytest.raises(NotFittedError):
        _ = la.posterior


def test_regression_labels():
    model = tiny.tiny_llama_classifier(1)
    la, batch = LaplaceLoRA(model, "regression"), tiny.batch(3, classes=0)
    for labels in (batch["labels"][:2], batch["labels"][None], torch.zeros(3, 2)):
        with pytest.raises(InvalidBatchError, match="'labels' have shape"):
            la.fit([{**batch, "labels": labels}], progress=False)
    with pytest.raises(InvalidBatchError, match=r"'labels'.*not finite"):
        la.fit([{**batch, "labels": batch["labels"] * torch.nan}], progress=False)


class Twice(nn.Module):
    def __init__(self, shapes=False):
        super().__init__()
        self.shared, self.head, self.shapes = nn.Linear(4, 4), nn.Linear(4, 2), shapes

    def forward(self, x, attention_mask=None):
        if self.shapes:
            return self.head(self.shared(x[:, 1:]).mean(1))
        return self.head(self.shared(self.shared(x)))


def test_a_layer_that_runs_twice():
    la = LaplaceLoRA(tiny.adapt(Twice(), targets=("head", "shared"), r=2))
    with pytest.raises(UnsupportedAdapterError, match=r"'base_model.model.shared' ran twice"):
        la.fit([{"x": torch.randn(3, 4, dtype=DTYPE)}], progress=False)


def test_a_layer_whose_tokens_are_not_those_of_the_mask():
    la = LaplaceLoRA(tiny.adapt(Twice(shapes=True), targets=("shared",), r=2))
    batch = {"x": torch.randn(3, 5, 4, dtype=DTYPE), "attention_mask": torch.ones(3, 5)}
    with pytest.raises(InvalidBatchError, match=r"'base_model.model.shared'.*\(3, 4, 4\)"):
        la.fit([batch], progress=False)


class ChangesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = 2 * x
        first = self.first(hidden)
        hidden += 1
        return self.head(first * self.second(hidden))


@pytest.mark.parametrize("targets", [("first",), ("first", "second")])
def test_an_input_that_is_changed_in_place_after_its_layer(targets):
    """Training such a model is legal when dropout or a cast makes PEFT work on a copy."""
    model, batch = tiny.adapt(ChangesItsInput(), targets=targets, r=2), {"x": torch.randn(3, 4, dtype=DTYPE)}
    with pytest.raises(
        UnsupportedAdapterError, match=r"input of layer 'base_model.model.first' is changed in place"
    ):
        LaplaceLoRA(model).fit([batch], progress=False)


def test_detached_logits():
    la = LaplaceLoRA(tiny.tiny_llama(), output_fn=lambda out, _: out.logits[:, -1, :3].detach())
    with pytest.raises(UnsupportedAdapterError, match="do not depend on any LoRA layer"):
        la.fit([tiny.batch(3)], progress=False)


# Labels that are needed


def test_labels_needed_for_the_empirical_fisher_and_the_evidence():
    model, unlabelled = tiny.tiny_llama(), tiny.batch(3, labels=False)
    with pytest.raises(InvalidBatchError, match=r"empirical.*'labels'"):
        LaplaceLoRA(model, fisher="empirical", **ANSWERS).fit([tiny.batch(3), unlabelled], progress=False)
    for loader in ([unlabelled], [tiny.batch(3), unlabelled], [unlabelled, tiny.batch(3)]):
        la = LaplaceLoRA(model, **ANSWERS).fit(loader, progress=False)
        with pytest.raises(NotFittedError, match="'labels'"):
            la.log_marginal_likelihood()
        assert la.optimize_prior_precision() > 0  # where it is largest does not depend on them
        assert la.predict(unlabelled).isfinite().all()
        with pytest.raises(InvalidBatchError, match=r"val_nll.*'labels'"):
            la.optimize_prior_precision("val_nll", val_loader=loader, progress=False)


# Tuning

TUNING = {
    "method": ({"method": "cv"}, "method must be one of .*'cv'"),
    "prior_structure": ({"prior_structure": "all"}, "prior_structure must be one of .*'all'"),
    "val_nll without loader": ({"method": "val_nll"}, "val_loader"),
    "val_nll by layer": ({"method": "val_nll", "prior_structure": "layerwise"}, "layerwise|'scalar' or 'ab'"),
    "link": ({"method": "val_nll", "link_approx": "softmax"}, "link_approx must be one of .*'softmax'"),
    "link without a posterior": ({"method": "val_nll", "link_approx": "map"}, "link_approx must be one of"),
    "noise of a classifier": ({"tune_sigma_noise": True}, "tune_sigma_noise"),
    "grid of one": ({"method": "val_nll", "grid": [1.0]}, "grid"),
    "empty grid": ({"method": "val_nll", "grid": []}, "grid"),
    "grid descending": ({"method": "val_nll", "grid": [2.0, 1.0]}, "grid"),
    "grid with a repeat": ({"method": "val_nll", "grid": [1.0, 1.0]}, "grid"),
    "grid from zero": ({"method": "val_nll", "grid": [0.0, 1.0]}, "grid"),
    "grid with NaN": ({"method": "val_nll", "grid": [1.0, math.nan]}, "grid"),
    "grid with NaN inside": ({"method": "val_nll", "grid": [0.1, math.nan, 10.0]}, "grid"),
    "grid to infinity": ({"method": "val_nll", "grid": [1.0, math.inf]}, "grid"),
}


@pytest.mark.parametrize("name", TUNING)
def test_tuning_arguments(fitted, name):
    arguments, match = TUNING[name]
    held_out = arguments.get("method") == "val_nll" and name != "val_nll without loader"
    loader = {"val_loader": [tiny.batch(3)]} if held_out else {}
    with nothing_changes(fitted, tiny.batch(3)), pytest.raises(ValueError, match=match):
        fitted.optimize_prior_precision(**loader, **arguments, progress=False)


def test_val_nll_at_the_edge_of_its_grid_warns(fitted):
    with pytest.warns(LaplaceWarning, match="edge of the grid"):
        fitted.optimize_prior_precision(
            "val_nll", val_loader=[tiny.batch(4)], grid=[1e-30, 1e-29], progress=False
        )
    fitted.prior_precision = 1.0


def test_evidence_without_a_maximum():
    model, train = tiny.tiny_llama(), [tiny.batch(4)]
    la = LaplaceLoRA(model, prior_mean=model.state_dict(), **ANSWERS).fit(train, progress=False)
    with pytest.raises(NumericalError, match="equal the prior mean"):
        la.optimize_prior_precision()
    flat = LaplaceLoRA(model, output_fn=lambda out, _: 0 * out.logits[:, -1, :3]).fit(train, progress=False)
    with pytest.raises(NumericalError, match="curvature is zero"):
        flat.optimize_prior_precision()
    assert la.prior_precision == flat.prior_precision == 1.0


def test_link_and_predict_arguments(fitted):
    for call in (fitted.predict, fitted.logit_distribution):
        with pytest.raises(ValueError, match="prior_precision is an empty list"):
            call(tiny.batch(2), prior_precision=[])
    for link in ("softmax", "", None):
        with pytest.raises(ValueError, match="link_approx must be one of"):
            fitted.predict(tiny.batch(2), link_approx=link)
    for n_samples in (0, -1):
        with pytest.raises(ValueError, match="n_samples"):
            fitted.predict(tiny.batch(2), link_approx="mc", n_samples=n_samples)


def test_prior_precisions_that_underflow_are_refused_or_used(fitted):
    model = tiny.tiny_llama(torch.float32)
    la = LaplaceLoRA(model, **ANSWERS).fit([tiny.batch(3)], progress=False)
    for call in (
        lambda: la.predict(tiny.batch(2), prior_precision=1e-39),
        lambda: LaplaceLoRA(model, prior_precision={"A": 1.0, "B": 1e-39}),
        lambda: la.optimize_prior_precision("val_nll", val_loader=[tiny.batch(2)], grid=[1e-45, 1.0]),
    ):
        with pytest.raises(ValueError, match=r"prior_precision must be at least 1\.18e-38"):
            call()
    assert fitted.predict(tiny.batch(2), prior_precision=1e-39).isfinite().all()
    with torch.no_grad():
        for site in la.sites:
            site.module.lora_B["default"].weight.mul_(1e6)
    la.fit([tiny.batch(3)], progress=False)
    with pytest.raises(NumericalError, match=r"covariance is not finite in torch.float32: use a larger"):
        la.predict(tiny.batch(2, seed=9), prior_precision=1e-37)


# Before the fit, and after the model changed


def test_before_fit(tmp_path):
    la = LaplaceLoRA(tiny.tiny_llama(), **ANSWERS)
    for call in (
        lambda: la.predict(tiny.batch(2)),
        lambda: la.predict(tiny.batch(2), link_approx="map"),
        lambda: la.predict_loader([tiny.batch(2)]),
        lambda: la.logit_distribution(tiny.batch(2)),
        lambda: la.log_marginal_likelihood(),
        lambda: la.optimize_prior_precision(),
        lambda: la.optimize_prior_precision("val_nll", val_loader=[tiny.batch(2)]),
        lambda: la.posterior,
        lambda: la.factors,
        lambda: la.summary(),
        lambda: la.sample_adapters(tmp_path / "samples", 1),
        lambda: la.save(tmp_path / "posterior"),
    ):
        with pytest.raises(NotFittedError, match="fit"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_adapter_switched_merged_or_disabled_after_fit():
    model = add_other(tiny.tiny_llama())
    la = LaplaceLoRA(model, **ANSWERS).fit([tiny.batch(3)], progress=False)
    expected = la.predict(tiny.batch(2))

    def refused(match):
        for link in ("probit", "map"):
            with pytest.raises(UnsupportedAdapterError, match=match):
                la.predict(tiny.batch(2), link_approx=link)

    model.set_adapter("other")
    refused(r"'[\w.]+q_proj' has adapter 'other' active, expected 'default'")
    model.set_adapter("default")
    with model.disable_adapter():
        refused(r"'[\w.]+q_proj'.*disabled")
    model.merge_adapter()
    refused(r"'[\w.]+q_proj'.*merged")
    model.unmerge_adapter()
    torch.testing.assert_close(la.predict(tiny.batch(2)), expected)


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.disk_offload])
def test_offloaded_weights(offload, tmp_path):
    model = tiny.tiny_llama(torch.float32)
    folder = {"offload_dir": tmp_path} if offload is accelerate.disk_offload else {}
    la = LaplaceLoRA(model, **ANSWERS)
    offload(model, execution_device=torch.device("cpu"), **folder)
    for call in (lambda: LaplaceLoRA(model, **ANSWERS), lambda: la.fit([tiny.batch(2)], progress=False)):
        with pytest.raises(
            UnsupportedAdapterError, match=r"layer '[\w.]+q_proj' is offloaded: load the model"
        ):
            call()


def test_model_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny.tiny_llama()
    with pytest.raises(UnsupportedAdapterError, match=r"'[\w.]+weight' was made in torch.inference_mode"):
        LaplaceLoRA(model, **ANSWERS)


def test_mask_that_is_no_tensor():
    batch = tiny.batch(3)
    batch["attention_mask"] = batch["attention_mask"].tolist()
    with pytest.raises(InvalidBatchError, match=r"attention_mask must be a tensor .*list"):
        LaplaceLoRA(tiny.tiny_llama_classifier(3)).fit([batch], progress=False)


@pytest.mark.parametrize("length", [1, 9])
def test_decoder_of_another_length_than_its_encoder(length):
    def output_fn(output, batch):
        return output.logits[:, -1, :3]

    batch = tiny.batch(4, padding="right") | {"decoder_input_ids": torch.full((4, length), 7)}
    model = tiny.adapt(tiny_t5(), targets=("q", "v"))
    la = LaplaceLoRA(model, output_fn=output_fn)
    with pytest.raises(
        InvalidBatchError, match=rf"'[\w.]+decoder[\w.]+' sees {length} tokens of the decoder"
    ):
        la.fit([batch], progress=False)
    la = LaplaceLoRA(model, output_fn=output_fn, layers=lambda name: ".encoder." in name)
    assert la.fit([batch], progress=False).predict(batch).isfinite().all()


def test_another_adapter_fitted_with_the_prior_of_the_first():
    model = add_other(tiny.tiny_llama(), ("k_proj",))
    layers = {site.name: 2.0 for site in LaplaceLoRA(model).sites}
    kfac = ANSWERS | {"structure": "kfac"}
    centred = LaplaceLoRA(model, prior_mean=model.state_dict(), **kfac).fit([tiny.batch(3)], progress=False)
    by_layer = LaplaceLoRA(model, prior_precision=layers, **kfac).fit([tiny.batch(3)], progress=False)
    expected = [la.predict(tiny.batch(2)) for la in (centred, by_layer)]
    model.set_adapter("other")
    with pytest.raises(UnsupportedAdapterError, match="prior_mean belongs to adapter 'default'"):
        centred.fit([tiny.batch(3)], progress=False)
    with pytest.raises(ValueError, match="prior_precision"):
        by_layer.fit([tiny.batch(3)], progress=False)
    model.set_adapter("default")
    for la, probs in zip((centred, by_layer), expected, strict=True):
        assert torch.equal(la.predict(tiny.batch(2)), probs)
    model.set_adapter("other")
    other = LaplaceLoRA(model, **kfac).fit([tiny.batch(3)], progress=False)
    model.set_adapter("default")
    other.fit([tiny.batch(3)], progress=False)  # a scalar prior fits any adapter
    assert set(other.factors) == set(layers)


def test_every_error_is_a_laplace_error_and_of_its_builtin_kind():
    kinds = {
        InvalidBatchError: ValueError,
        UnsupportedAdapterError: ValueError,
        NotFittedError: RuntimeError,
        NumericalError: ArithmeticError,
    }
    for error, builtin in kinds.items():
        assert issubclass(error, LaplaceError)
        assert issubclass(error, builtin)
