"""A batch that would give a wrong number raises a typed error; the model and the earlier fit stay as they were."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Classes,
    Diagonal,
    HeldOut,
    InvalidBatchError,
    LaplaceLoRA,
    NotFittedError,
    Outputs,
    Regression,
    Rows,
    UnsupportedAdapterError,
)
from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.model.batches import read_batch
from tests import tiny
from tests.model.taps import ANSWERS, CPU


def change(**changes):
    def changed(batch):
        new = {**batch, **{k: f(batch) for k, f in changes.items()}}
        return {k: v for k, v in new.items() if v is not None}

    return changed


def poisoned(batch):
    embeds = torch.randn(*batch["input_ids"].shape, 16, dtype=torch.float64)
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
    "group": (change(group=lambda b: torch.arange(3)), "'group'.* each sequence is an example"),
    "labels too large": (change(labels=lambda b: b["labels"] + 3), r"'labels' must lie in \[0, 3\)"),
    "labels negative": (change(labels=lambda b: b["labels"] * 0 - 100), r"'labels' must lie in \[0, 3\)"),
    "labels of another size": (change(labels=lambda b: b["labels"][:-1]), "'labels'.* 3 class indices"),
    "labels as column": (change(labels=lambda b: b["labels"][:, None]), "'labels'.* 3 class indices"),
    "labels of tokens": (change(labels=lambda b: b["input_ids"]), "'labels'.* 3 class indices"),
    "labels real": (change(labels=lambda b: b["labels"].double()), "'labels'.* 3 class indices"),
    "mask too long": (change(attention_mask=lambda b: torch.ones(3, 9)), "attention_mask has shape"),
    "mask of another batch": (change(attention_mask=lambda b: torch.ones(2, 7)), "attention_mask has shape"),
    "mask of pairs": (change(attention_mask=lambda b: torch.ones(3, 1, 7, 7)), "attention_mask has shape"),
    "mask as lists": (
        change(attention_mask=lambda b: b["attention_mask"].tolist()),
        "attention_mask must be a tensor .*list",
    ),
    "mask with an empty row": (change(attention_mask=zero_row), "all-zero row"),
    "NaN": (poisoned, "not finite"),
}
LABELS_IGNORED = {name for name in BATCHES if name.startswith("labels") and name != "labels only"}


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
    (fit, _), precision = la.snapshot(), la.prior_precision
    yield
    assert snapshot(la.model) == before
    assert la.snapshot()[0] is fit
    assert la.prior_precision == precision
    assert torch.equal(la.predict(batch), probs)
    assert torch.equal(la.log_marginal_likelihood(), evidence)


@pytest.fixture(scope="module")
def fitted():
    model = tiny.tiny_llama(targets=("q_proj", "lm_head")).train()
    return LaplaceLoRA(model, ANSWERS).fit([tiny.batch(6, seed=4)], progress=False)


def passes_over(la, loader):
    """Everything that runs over a loader; `loader` makes one."""
    return [
        lambda: la.fit(loader(), progress=False),
        lambda: la.predictions(loader(), progress=False),
        lambda: la.predictions(loader(), link_approx="map", progress=False),
        lambda: la.optimize_prior_precision(HeldOut(loader()), progress=False),
    ]


@pytest.mark.parametrize("name", BATCHES)
def test_batches(fitted, name):
    make, match = BATCHES[name]
    good, bad = tiny.batch(3), make(tiny.batch(3))
    calls = [*passes_over(fitted, lambda: [good, bad]), lambda: fitted.fit([bad], progress=False)]
    if name not in LABELS_IGNORED:
        calls += [
            lambda: fitted.predict(bad),
            lambda: fitted.predict(bad, link_approx="map"),
            lambda: fitted.logit_distribution(bad),
        ]
    with nothing_changes(fitted, good):
        for call in calls:
            with pytest.raises(InvalidBatchError, match=match):
                call()


@pytest.mark.parametrize("structure", ["ekfac", "diagonal", "rows", "auto"])
def test_batches_of_other_structures(structure):
    model, good = tiny.tiny_llama(targets=("q_proj", "lm_head")).train(), tiny.batch(3)
    la = LaplaceLoRA(model, ANSWERS, structure=structure).fit([tiny.batch(6, seed=4)], progress=False)
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
        with pytest.raises(InvalidBatchError, match="loader yielded no batch"):
            la.fit([], progress=False)
    one_logit = LaplaceLoRA(tiny.tiny_llama_classifier(1), Classes(), structure=structure)
    with pytest.raises(InvalidBatchError, match="at least 2 logits"):
        one_logit.fit([good], progress=False)


STRUCTURES = [
    KFAC(factors="dense"),
    KFAC(factors="sketch", columns=4),
    EKFAC(factors="dense"),
    Diagonal(),
    Rows(),
    Rows(refit=True),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_conditions_that_wait_for_the_device(structure, monkeypatch):
    model, good = tiny.tiny_llama(targets=("q_proj", "lm_head")), tiny.batch(3)
    la = LaplaceLoRA(model, ANSWERS, structure=structure).fit([tiny.batch(6, seed=4)], progress=False)
    with nothing_changes(la, good), monkeypatch.context() as patch:
        patch.setattr(DeferredChecks, "require", DeferredChecks._pend)
        for name in ("labels too large", "labels negative", "mask with an empty row", "NaN"):
            make, match = BATCHES[name]
            bad = make(tiny.batch(3))
            calls = passes_over(la, lambda: [bad])  # noqa: B023
            if name != "NaN" or structure != Rows(refit=True):  # the poisoned batch has no labels
                calls += [*passes_over(la, lambda: [bad, good]), *passes_over(la, lambda: [good, bad])]  # noqa: B023
            else:
                calls = calls[1:]
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
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS)
    with pytest.raises(InvalidBatchError):
        la.fit([tiny.batch(3), {}], progress=False)
    with pytest.raises(NotFittedError):
        la.predict(tiny.batch(3))


@pytest.mark.parametrize("empty", [list, tuple, lambda: iter([])])
def test_empty_loaders(fitted, empty):
    with nothing_changes(fitted, tiny.batch(3)):
        for call in passes_over(fitted, empty):
            with pytest.raises(InvalidBatchError, match="loader yielded no batch"):
                call()


def test_a_loader_that_fails(fitted):
    def loader():
        yield tiny.batch(2)
        raise OSError("disk gone")

    with nothing_changes(fitted, tiny.batch(3)):
        for call in passes_over(fitted, loader):
            with pytest.raises(OSError, match="disk gone"):
                call()


def test_one_batch_where_a_loader_belongs(fitted):
    with nothing_changes(fitted, tiny.batch(3)), pytest.raises(InvalidBatchError, match="dict"):
        fitted.fit(tiny.batch(3), progress=False)


# Outputs


def test_causal_model_without_answers():
    with pytest.raises(InvalidBatchError, match=r"\(3, 7, 48\).*Answers\(token_ids\)"):
        LaplaceLoRA(tiny.tiny_llama(), Classes()).fit([tiny.batch(3)], progress=False)


@pytest.mark.parametrize(
    "fn", [lambda out, _: out.logits, lambda out, _: out.logits[:, -1, 0], lambda out, _: out]
)
def test_outputs_of_a_wrong_shape(fn):
    with pytest.raises(InvalidBatchError, match=r"Outputs\(function\)"):
        LaplaceLoRA(tiny.tiny_llama(), Outputs(fn)).fit([tiny.batch(3)], progress=False)


def test_classification_with_one_logit():
    la = LaplaceLoRA(tiny.tiny_llama_classifier(1), Classes())
    with pytest.raises(InvalidBatchError, match=r"at least 2 logits.*Regression"):
        la.fit([tiny.batch(3, classes=1)], progress=False)


def test_number_of_classes_that_changes():
    def as_many_as_tokens(out, batch):
        return out.logits[:, -1, : batch["input_ids"].shape[1]]

    four, five = (tiny.batch(2, length, padding=None) for length in (4, 5))
    la = LaplaceLoRA(tiny.tiny_llama(), Outputs(as_many_as_tokens)).fit([four], progress=False)
    match = "a batch gives 5 logits per example, earlier ones gave 4"
    with pytest.raises(InvalidBatchError, match=match):
        la.fit([four, five], progress=False)
    for link in ("probit", "map"):
        with pytest.raises(InvalidBatchError, match=match):
            la.predict(five, link_approx=link)
    with pytest.raises(InvalidBatchError, match=match):
        la.logit_distribution(five)


# Labels


def test_regression_labels():
    la, batch = LaplaceLoRA(tiny.tiny_llama_classifier(1), Regression()), tiny.batch(3, classes=0)
    for labels in (batch["labels"][:2], batch["labels"][None], torch.zeros(3, 2)):
        with pytest.raises(InvalidBatchError, match="'labels' have shape"):
            la.fit([{**batch, "labels": labels}], progress=False)
    with pytest.raises(InvalidBatchError, match=r"'labels'.*not finite"):
        la.fit([{**batch, "labels": batch["labels"] * torch.nan}], progress=False)


@pytest.mark.parametrize("structure", [KFAC, EKFAC, Diagonal, Rows])
def test_labels_needed_for_the_empirical_fisher(structure):
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS, structure=structure(fisher="empirical"))
    with pytest.raises(InvalidBatchError, match=r"empirical.*'labels'"):
        la.fit([tiny.batch(3), tiny.batch(3, labels=False)], progress=False)


def test_labels_needed_for_the_evidence_and_held_out_data():
    model, unlabelled = tiny.tiny_llama(), tiny.batch(3, labels=False)
    for loader in ([unlabelled], [tiny.batch(3), unlabelled], [unlabelled, tiny.batch(3)]):
        la = LaplaceLoRA(model, ANSWERS).fit(loader, progress=False)
        with pytest.raises(NotFittedError, match="'labels'"):
            la.log_marginal_likelihood()
        assert la.optimize_prior_precision() > 0  # where it is largest does not depend on them
        assert la.predict(unlabelled).isfinite().all()
        assert la.predictions(loader, progress=False).labels is None
        with pytest.raises(InvalidBatchError, match=r"HeldOut.*'labels'"):
            la.optimize_prior_precision(HeldOut(loader), progress=False)


# Tokens


class OneTokenLess(nn.Module):
    """A layer that does not see the first token, in a model without embeddings."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, attention_mask):
        return self.head(self.shared(x[:, 1:]).mean(1))


class Mixed(OneTokenLess):
    """Each sequence's output depends on all of them."""

    def forward(self, x, attention_mask):
        hidden = self.shared(x[:, 1:])
        return self.head((hidden - hidden.mean(0)).mean(1).tanh())


@pytest.mark.parametrize(
    ("kind", "pads", "why"),
    [(OneTokenLess, 2, "depend on padded positions"), (Mixed, 0, "depend on other sequences")],
)
def test_what_its_jacobians_would_hide_is_refused(kind, pads, why):
    """Gradients at the batch's own numbers tell."""
    la = LaplaceLoRA(tiny.adapt(kind(), targets=("shared",), r=2), Classes())
    batch = {"x": torch.randn(3, 5, 4, dtype=torch.float64), "attention_mask": torch.ones(3, 5)}
    batch["attention_mask"][1, 5 - pads :] = 0
    with pytest.raises((InvalidBatchError, UnsupportedAdapterError), match=why):
        la.fit([batch], progress=False)


def test_a_layer_whose_tokens_are_not_those_of_the_mask():
    """Its streams cannot be told apart by the mask: its Jacobians come from autograd, a sequence at a time."""
    model = tiny.adapt(OneTokenLess(), targets=("shared",), r=2)
    x, mask = torch.randn(5, 5, 4, dtype=torch.float64), torch.ones(5, 5)
    la = LaplaceLoRA(model, Classes(), structure=Rows(columns=64), prior_precision=0.5)
    la.fit([{"x": x[:3], "attention_mask": mask[:3]}], progress=False)
    found = la.logit_distribution({"x": x[3:], "attention_mask": mask[3:]})[1]

    weights = [p for name, p in model.named_parameters() if "lora_" in name]

    def jacobian(each):
        logits = model(x=each[None], attention_mask=mask[:1])[0]
        grads = [torch.autograd.grad(f, weights, retain_graph=True) for f in logits]
        return logits.softmax(0).detach(), torch.stack(
            [torch.cat([g.flatten() for g in own]) for own in grads]
        )

    for weight in weights:
        weight.requires_grad_(True)
    hessian = 0.5 * torch.eye(sum(w.numel() for w in weights), dtype=torch.float64)
    for each in x[:3]:
        p, j = jacobian(each)
        hessian += j.mT @ (torch.diag(p) - torch.outer(p, p)) @ j
    for each, own in zip(x[3:], found, strict=True):
        j = jacobian(each)[1]
        torch.testing.assert_close(own, j @ torch.linalg.solve(hessian, j.mT))


# Groups: several sequences an example


def test_groups_of_sequences():
    batch = tiny.batch(5) | {"group": torch.tensor([0, 2, 1, 0, 2])}
    inputs = read_batch(batch, CPU, DeferredChecks(), grouped=True)
    assert (inputs.n_sequences, inputs.n_examples) == (5, 3)
    assert inputs.group.tolist() == [0, 2, 1, 0, 2]
    assert "group" not in inputs.model
    alone = read_batch(tiny.batch(5), CPU, DeferredChecks(), grouped=False)
    assert (alone.n_sequences, alone.n_examples, alone.group) == (5, 5, None)


GROUPS = {
    "missing": (None, "needs 'group'"),
    "too short": (torch.tensor([0, 0, 1]), "5 indices"),
    "real": (torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0]), "5 indices"),
    "negative": (torch.tensor([-1, 0, 0, 1, 1]), "5 indices"),
    "an example without a sequence": (torch.tensor([0, 0, 2, 2, 2]), "example 1 .*whole examples"),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_that_are_not_whole_examples(name):
    group, match = GROUPS[name]
    batch = tiny.batch(5) | ({} if group is None else {"group": group})
    with pytest.raises(InvalidBatchError, match=match):
        read_batch(batch, CPU, DeferredChecks(), grouped=True)
