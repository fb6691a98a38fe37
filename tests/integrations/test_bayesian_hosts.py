"""BayesAdapt and bayesian-peft, run from checkouts: with them where they can be imported, else with stand-ins.

The stand-ins have what the hosts' classes do around the methods that the integrations override: a model, loaders of
(inputs, labels, ..), inference mode around an evaluation, scores of the mean over samples.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from laplace_lora_fast import Answers, Evidence, LaplaceLoRA
from tests import tiny
from tests.integrations.test_hosts import stand_in

PACKAGE = "laplace_lora_fast.integrations"
CLASSES = [5, 11, 7]
PAGES = Path(__file__).parents[2] / "docs" / "guide"


def triples(seed: int, n: int = 8) -> list[tuple[Any, Any, Any]]:
    """The hosts' batches."""
    found = []
    for batch in tiny.split(tiny.batch(n, length=6, seed=seed), 4):
        labels = batch.pop("labels")
        found.append((batch, labels, [str(row) for row in range(len(labels))]))
    return found


def labelled(loader: list[tuple[Any, Any, Any]]) -> list[dict[str, torch.Tensor]]:
    return [{**inputs, "labels": labels} for inputs, labels, _ in loader]


@pytest.fixture
def bayesadapt(monkeypatch):
    monkeypatch.delitem(sys.modules, f"{PACKAGE}.bayesadapt", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace())
    try:
        importlib.import_module("bayesadapt.trainers.trainer")
    except ImportError:

        class Trainer:
            expdir = wrapper_name = load_dataloaders = load_lora = None

            @property
            def model(self):
                return self._model

            def compute_logits(self, inputs):
                return self.model(**inputs).logits[:, -1:]

            def evaluate_step(self, batch):
                raise AssertionError("needs a GPU")

            def evaluate(self, use_train=False, save=True, verbose=True):
                self.model.eval()
                logits = [self.evaluate_step(batch)["logits"] for batch in self.testloader]
                return [], torch.cat(logits)

        stand_in(monkeypatch, bayesadapt__trainers__trainer={"Trainer": Trainer})
    return importlib.import_module(f"{PACKAGE}.bayesadapt")


def trainer(own, **options) -> Any:
    """As the host leaves it when it has loaded everything."""
    made = object.__new__(own.LaplaceTrainer)
    once = Config(backbone=1, last_layer=1)
    made.cfg = Config(seed=3, laplace=options, samples=Config(train=once, test=once))
    made.device, made.class_ids = torch.device("cpu"), CLASSES
    made.trainloader, made.testloader = triples(0), triples(1)
    made._model = tiny.tiny_llama(targets=("q_proj", "v_proj"), config={"vocab_size": tiny.VOCAB})
    made._model.eval()
    return made


class Config(dict):
    __getattr__ = dict.__getitem__


def test_bayesadapt_scores_the_predictive_probabilities(bayesadapt) -> None:
    made = trainer(bayesadapt, structure="kfac")
    la = LaplaceLoRA(made.model, Answers(range(3)), structure="kfac", seed=3)
    la.fit(labelled(made.trainloader), progress=False).optimize_prior_precision(Evidence(), progress=False)
    step = made.evaluate_step(made.testloader[0])
    expected = la.predict(made.testloader[0][0])
    torch.testing.assert_close(step["logits"].softmax(-1).mean(1), expected)
    assert step["elapsed_time"] > 0
    assert step["peak_memory"] == 0
    assert made.wrapper_name == "laplace_fast"
    fixed = trainer(bayesadapt, prior_precision=7)
    assert fixed.posterior().prior_precision == 7
    made.model.train()
    plain = made.compute_logits(made.testloader[0][0])
    assert plain.shape[:2] == (4, 1)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rank": 3}, "laplace.rank is no option"),
        ({"tuning": "held_out"}, "must be evidence"),
        ({"tuning": "evidence", "prior_precision": 1}, "leave laplace.prior_precision out"),
    ],
)
def test_options_of_bayesadapt(bayesadapt, options, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        trainer(bayesadapt, **options).posterior()


@pytest.fixture
def bayesian_peft(monkeypatch):
    monkeypatch.delitem(sys.modules, f"{PACKAGE}.bayesian_peft", raising=False)
    monkeypatch.setitem(sys.modules, "ipdb", types.SimpleNamespace())
    try:
        importlib.import_module("modelwrappers.wrapperbase")
    except ImportError:

        class WrapperBase(peft.PeftModel):
            def __init__(self, model, peft_config, args, accelerator, adapter_name="default"):
                super().__init__(model, peft_config, adapter_name)
                self.args, self.accelerator, self.target_ids = args, accelerator, None
                self.seen = []

            def forward_logits(self, *args, **kwargs):
                raise NotImplementedError

            def fit(self, train_loader, eval_loader):
                self.seen.append(self.forward_logits(train_loader[0]).detach())
                self.evaluate(eval_loader)

            def evaluate(self, eval_loader):
                logits = []
                for batch in eval_loader:
                    with torch.inference_mode():
                        logits.append(self.forward_logits(batch, sample=True, n_samples=1).detach())
                return torch.cat(logits).softmax(-1).mean(1)

            def prepare_for_fit_evaluate(self, dataset, wandb_logger=None):
                self.train_loader, self.test_loader = dataset.train_dataloader, dataset.test_dataloader
                self.target_ids = dataset.target_ids.squeeze(-1)

        def nothing(parser):
            return None

        arguments = {"ArgumentParser": argparse.ArgumentParser}
        arguments |= {"add_experiment_args": nothing, "add_management_args": nothing}
        stand_in(monkeypatch, modelwrappers__wrapperbase={"WrapperBase": WrapperBase}, utils__args=arguments)
    return importlib.import_module(f"{PACKAGE}.bayesian_peft")


def wrapper(own, folder=None, **more) -> Any:
    """As the host's script makes it."""
    settings = {
        "batch_size": 4,
        "n_epochs": 1,
        "max_train_steps": 2,
        "outdim": 3,
        "num_samples": 8,
        "opt": "adamw",
    }
    settings |= {
        "warmup_ratio": 0.06,
        "opt_wd": 0.0,
        "lr": 1e-3,
        "adam_epsilon": 1e-6,
        "load_lora_path": None,
    }
    settings |= {
        "dataset_type": "mcdataset",
        "eval_per_steps": 1,
        "num_bins": 15,
        "early_stop_steps": 0,
        "seed": 3,
    }
    settings |= {
        "laplace_structure": "kfac",
        "laplace_posterior": folder,
        "testing_set": "",
        "epoch": 0,
    } | more
    accelerator = __import__("accelerate").Accelerator(cpu=True)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    inner = peft.get_peft_model(tiny.tiny_llama(torch.float32).unload(), config)
    made = own.LaplaceFast(inner, config, types.SimpleNamespace(**settings), accelerator)
    tiny.randomise(made, seed=1)
    data = types.SimpleNamespace(
        train_dataloader=triples(0),
        test_dataloader=triples(1),
        target_ids=torch.tensor(CLASSES)[:, None],
        tokenizer=None,
    )
    made.prepare_for_fit_evaluate(data)
    made.wandb_logger = None
    return made


def test_bayesian_peft_scores_the_predictive_probabilities(bayesian_peft, tmp_path) -> None:
    made = wrapper(bayesian_peft, tmp_path / "posterior")
    assert isinstance(made, nn.Module)
    made.evaluate(made.test_loader)
    batch = triples(1)[0]
    la = LaplaceLoRA(made, Answers(CLASSES), structure="kfac", seed=3)
    la.fit(labelled(triples(0)), progress=False).optimize_prior_precision(Evidence(), progress=False)
    with torch.inference_mode():
        found = made.forward_logits(batch, sample=True, n_samples=4)
    assert found.shape == (4, 1, 3)
    torch.testing.assert_close(found.softmax(-1).mean(1), la.predict(batch[0]), rtol=1e-4, atol=1e-5)
    again = wrapper(bayesian_peft, tmp_path / "posterior")
    again.train_loader = None  # out of distribution the posterior is loaded, not fitted
    again.evaluate(again.test_loader)
    with torch.inference_mode():
        torch.testing.assert_close(again.forward_logits(batch), found)


def test_bayesian_peft_trains_as_before(bayesian_peft) -> None:
    """Evaluations amid training are of the model; behind it a posterior is fitted afresh."""
    made = wrapper(bayesian_peft)
    made.evaluate(made.test_loader)
    before = made._laplace
    made.fit(made.train_loader, made.test_loader)
    assert made._laplace is None
    made.evaluate(made.test_loader)
    assert made._laplace is not before
    with pytest.raises(ValueError, match="multiple choice"):
        wrapper(bayesian_peft, dataset_type="bertds")
    parser = bayesian_peft.get_parser()
    assert parser.get_default("laplace_structure") == "auto"


def test_hosts_with_another_interface_are_refused(monkeypatch) -> None:
    for name, modules in (
        ("bayesadapt", {"bayesadapt__trainers__trainer": {"Trainer": type("Trainer", (), {})}}),
        (
            "bayesian_peft",
            {
                "modelwrappers__wrapperbase": {"WrapperBase": type("WrapperBase", (), {})},
                "utils__args": dict.fromkeys(
                    ["ArgumentParser", "add_experiment_args", "add_management_args"]
                ),
            },
        ),
    ):
        monkeypatch.delitem(sys.modules, f"{PACKAGE}.{name}", raising=False)
        stand_in(monkeypatch, **modules)
        with pytest.raises(ImportError, match=r"was written for .* its interface is another one"):
            importlib.import_module(f"{PACKAGE}.{name}")


@pytest.mark.parametrize("name", ["bayesadapt", "bayesian_peft"])
def test_hosts_that_are_not_there(monkeypatch, name) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] in ("bayesadapt", "modelwrappers")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, f"{PACKAGE}.{name}", raising=False)
    for module in ("bayesadapt", "modelwrappers"):
        monkeypatch.setitem(sys.modules, module, None)  # as if there were none
    with pytest.raises(ImportError, match=r"run from a checkout of github\.com"):
        importlib.import_module(f"{PACKAGE}.{name}")


def test_what_the_pages_name_is_there(bayesadapt, bayesian_peft) -> None:
    page = (PAGES / "bayesadapt.md").read_text(encoding="utf-8")
    (target,) = re.findall(r"trainer\._target_=(\S+)", page)
    module, _, name = target.rpartition(".")
    assert getattr(importlib.import_module(module), name) is bayesadapt.LaplaceTrainer
    page = (PAGES / "bayesian_peft.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.split("```python")[1].split("```")[0], names)
    assert (
        names["LaplaceFast"] is bayesian_peft.LaplaceFast
    )  # the host looks for the file's name in small letters
    known = {action.dest for action in names["get_parser"]()._actions}
    assert known >= {"laplace_posterior", "laplace_structure"}
