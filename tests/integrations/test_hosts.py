"""Small integrations: with a host where it is installed, else with a stand-in of its documented interface."""

from __future__ import annotations

import asyncio
import importlib
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from laplace_lora_fast import Answers, Evidence, LaplaceLoRA, Options, Preference, Rows, Tokens
from laplace_lora_fast.data import preference_batches
from laplace_lora_fast.integrations import hosts
from laplace_lora_fast.integrations.trainer import LaplaceCallback
from laplace_lora_fast.integrations.trl import LaplaceReward
from tests import tiny
from tests.contracts.test_tasks import TASKS, data
from tests.oracle import assert_close
from tests.tasks.test_options import Words

PACKAGE = "laplace_lora_fast.integrations"


def versions(monkeypatch, **installed: str) -> None:
    """As if these were installed in these versions, and nothing else."""

    def version(name: str) -> str:
        if name not in installed:
            raise hosts.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(hosts, "version", version)


def stand_in(monkeypatch, **modules: dict) -> None:
    """Modules with these members; an integration is imported anew."""
    for name, members in modules.items():
        parts = name.split("__")
        for count in range(1, len(parts) + 1):
            full = ".".join(parts[:count])
            if full not in sys.modules or count == len(parts):
                monkeypatch.setitem(sys.modules, full, types.ModuleType(full))
        for key, value in members.items():
            setattr(sys.modules[".".join(parts)], key, value)
    for own in ("vllm", "axolotl", "lm_polygraph"):
        monkeypatch.delitem(sys.modules, f"{PACKAGE}.{own}", raising=False)


@pytest.mark.parametrize(
    ("own", "host", "other"),
    [("lm_eval", "lm-eval", "0.5.1"), ("lm_polygraph", "lm-polygraph", "1.0"), ("vllm", "vllm", "0.34.0"),
     ("axolotl", "axolotl", "1.2")],
)  # fmt: skip
def test_hosts_of_other_versions_are_refused(monkeypatch, own: str, host: str, other: str) -> None:
    monkeypatch.delitem(sys.modules, f"{PACKAGE}.{own}", raising=False)
    versions(monkeypatch)
    with pytest.raises(ImportError, match=f"{host} is not installed: pip install '{host}=="):
        importlib.import_module(f"{PACKAGE}.{own}")
    versions(monkeypatch, **{host: other})
    with pytest.raises(ImportError, match=f"written for {host} .*, installed is {other}"):
        importlib.import_module(f"{PACKAGE}.{own}")


def test_versions() -> None:
    with pytest.raises(ImportError, match=r"torch 0\.1\.\* or 0\.2\.\*"):
        hosts.require("torch", ["0.1", "0.2"])
    hosts.require("torch", [torch.__version__.split(".")[0]])


@pytest.fixture(scope="module")
def reward_model() -> LaplaceLoRA:
    rows = [{"prompt": f"q{i}", "chosen": " a b", "rejected": f" c{i}"} for i in range(4)]
    la = LaplaceLoRA(
        tiny.tiny_llama_classifier(1), Preference(), structure=Rows(columns=64), prior_precision=0.3
    )
    return la.fit(preference_batches(Words(), rows, 4), progress=False)


def test_a_reward_function_of_trl(reward_model: LaplaceLoRA) -> None:
    """Against the joint Gaussian by hand: the sd is that of a reward against its group's mean."""
    prompts, completions = ["p q", "x", "p q", "p q"], [" a", " b c", " d e f", " g"]
    found = LaplaceReward(reward_model, Words(), k=1.5)(
        prompts=prompts, completions=completions, extra=[1] * 4
    )
    (batch,) = preference_batches(Words(), [{"prompt": "p q", "candidates": [" a", " d e f", " g"]}], 1)
    rewards = reward_model.reward(batch)
    mean, cov = rewards.mean[0], rewards.covariance[0]
    for place, index in ((0, 0), (2, 1), (3, 2)):
        weights = -torch.ones(3, dtype=torch.float64) / 3
        weights[index] += 1
        sd = (weights @ cov @ weights).sqrt()
        assert found[place] == pytest.approx(float(mean[index] - 1.5 * sd), rel=1e-9)
    (alone,) = preference_batches(Words(), [{"prompt": "x", "candidates": [" b c", " b c"]}], 1)
    single = reward_model.reward(alone)
    assert found[1] == pytest.approx(float(single.mean[0][0] - 1.5 * single.sd[0][0]), rel=1e-9)
    assert LaplaceReward.__name__ == "LaplaceReward"
    assert LaplaceReward(reward_model, Words()).__name__ == "laplace_reward"
    shifted = LaplaceReward(reward_model, Words(), k=0)(prompts=prompts, completions=completions)
    assert shifted[0] == pytest.approx(float(mean[0]), rel=1e-9)


def test_what_a_reward_function_refuses(reward_model: LaplaceLoRA) -> None:
    with pytest.raises(ValueError, match="k must be at least 0"):
        LaplaceReward(reward_model, Words(), k=-1.0)
    with pytest.raises(ValueError, match="needs a posterior of Preference"):
        LaplaceReward(LaplaceLoRA(tiny.tiny_llama(), Options()), Words())


def test_grpo_trains_on_it(reward_model: LaplaceLoRA, tmp_path: Path) -> None:
    """TRL's own trainer, where it is installed."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tests import words

    tokenizer = words.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "[END]", "pad_token": "[PAD]"})
    seen = []

    class Seen(LaplaceReward):
        def __call__(self, *args, **kwargs):
            seen.append(super().__call__(*args, **kwargs))
            return seen[-1]

    trainer = trl.GRPOTrainer(
        model=words.base_model(),
        reward_funcs=Seen(reward_model, Words()),
        args=trl.GRPOConfig(
            str(tmp_path),
            max_steps=1,
            num_generations=2,
            per_device_train_batch_size=2,
            max_completion_length=4,
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "the film"}, {"prompt": "a plot"}]),
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(seen[0]) == 2


def test_samples_for_vllm(monkeypatch, tmp_path: Path) -> None:
    """A stand-in: a request class, the abstract resolver, and the registry."""

    @dataclass
    class LoRARequest:
        lora_name: str
        lora_int_id: int
        lora_path: str

    registered = {}
    Registry = types.SimpleNamespace(register_resolver=registered.__setitem__)
    versions(monkeypatch, vllm="0.33.0")
    stand_in(
        monkeypatch,
        vllm__lora__request={"LoRARequest": LoRARequest},
        vllm__lora__resolver={"LoRAResolver": object, "LoRAResolverRegistry": Registry},
    )
    own = importlib.import_module(f"{PACKAGE}.vllm")
    la = LaplaceLoRA(tiny.tiny_llama(), Answers(tiny.ANSWERS)).fit([tiny.batch(4)], progress=False)
    folders = la.sample_adapters(tmp_path / "samples", 2, force=True)
    resolver = own.register(tmp_path / "samples", base_model="base")
    assert registered == {"laplace": resolver}

    def ask(base: str, name: str):
        return asyncio.run(resolver.resolve_lora(base, name))

    found = [ask("base", path.name) for path in folders]
    assert [request.lora_path for request in found] == [str(path.resolve()) for path in folders]
    assert len({request.lora_int_id for request in found}) == 2
    assert min(request.lora_int_id for request in found) > 0
    assert ask("base", folders[0].name) == found[0]
    assert ask("base", "other") is None
    assert ask("another", folders[0].name) is None
    with pytest.raises(FileNotFoundError, match="holds no sample"):
        own.SampleResolver(tmp_path / "nowhere")


def test_a_plugin_of_axolotl(monkeypatch) -> None:
    """A stand-in: the base class of plugins; a configuration is a dict whose missing fields are None."""
    pytest.importorskip("pydantic")
    versions(monkeypatch, axolotl="0.21.0")
    stand_in(monkeypatch, axolotl__integrations__base={"BasePlugin": object})
    own = importlib.import_module(f"{PACKAGE}.axolotl")
    plugin = own.LaplacePlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    args = getattr(importlib.import_module(module), name)
    given = {"laplace_task": {"Answers": {"token_ids": [5, 11, 7]}}, "laplace_options": {"structure": "kfac"}}
    cfg = args(**given, laplace_tuning={"Evidence": {"per": "side"}}).model_dump(exclude_none=True)
    (callback,) = plugin.add_callbacks_post_trainer(cfg, trainer=None)
    assert isinstance(callback, LaplaceCallback)
    assert callback._task == Answers([5, 11, 7])
    assert callback._tuning == Evidence(per="side")
    assert callback._options == {"structure": "kfac"}
    (by_default,) = plugin.add_callbacks_post_trainer(
        args(laplace_task="tokens").model_dump(exclude_none=True), None
    )
    assert by_default._task == Tokens()
    assert by_default._holds_out
    page = (Path(__file__).parents[2] / "docs" / "guide" / "axolotl.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(page.split("```yaml")[1].split("```")[0])
    assert shown.pop("plugins") == [f"{own.__name__}.LaplacePlugin"]
    (of_page,) = plugin.add_callbacks_post_trainer(args(**shown).model_dump(exclude_none=True), None)
    assert of_page._task == Tokens()
    with pytest.raises(ValueError, match="needs laplace_task"):
        plugin.pre_model_load({})
    with pytest.raises(ValueError, match="lora_qkv_kernel: true replaces"):
        plugin.pre_model_load(cfg | {"lora_qkv_kernel": True})


def test_statistics_for_lm_polygraph(monkeypatch) -> None:
    """The library's own numbers, for prompts padded on the left; with its base classes where they can be imported."""
    try:
        importlib.import_module("lm_polygraph.stat_calculators.stat_calculator")
    except ImportError:

        class Estimator:
            def __init__(self, stats_dependencies, level):
                self.stats_dependencies, self.level = stats_dependencies, level

        class StatCalculator:
            def __init__(self):
                self._stats, self._stat_dependencies = self.__class__.meta_info()

        versions(monkeypatch, **{"lm-polygraph": "0.7.0"})
        stand_in(
            monkeypatch,
            lm_polygraph__estimators__estimator={"Estimator": Estimator},
            lm_polygraph__stat_calculators__stat_calculator={"StatCalculator": StatCalculator},
            lm_polygraph__utils__factory_stat_calculator={"StatCalculatorContainer": types.SimpleNamespace},
        )
    own = importlib.import_module(f"{PACKAGE}.lm_polygraph")
    la = LaplaceLoRA(TASKS["Tokens"][0](), Tokens()).fit([data(Tokens())], progress=False)
    calculator = own.LaplaceCalculator(la, n_samples=4)
    model = types.SimpleNamespace(tokenizer=types.SimpleNamespace(pad_token_id=0))
    stats = {"input_tokens": [[3, 4, 5], [0, 0, 7]], "greedy_tokens": [[8, 9], [10, 11, 12]]}
    assert calculator.meta_info()[1] == list(stats)
    stats |= calculator(stats, ["a", "b"], model)
    assert sorted(calculator.meta_info()[0]) == sorted(stats.keys() - {"input_tokens", "greedy_tokens"})
    batch = {"input_ids": torch.tensor([[7, 10, 11, 12]]), "labels": torch.tensor([[-100, 10, 11, 12]])}
    mean, variance = la.sequence_log_prob(batch)
    assert stats["laplace_log_probs"][1] == pytest.approx(float(mean))
    assert own.LaplaceVariance()(stats)[1] == pytest.approx(float(variance.sqrt()))
    tokens = la.token_uncertainty(batch, n_samples=4)
    assert_close(torch.tensor(stats["laplace_mutual_information"][1]), tokens.epistemic[0, 1:], 1e-9)
    assert own.LaplaceMutualInformation()(stats)[1] == pytest.approx(float(tokens.epistemic[0, 1:].mean()))
    assert str(own.LaplaceVariance()) == "LaplaceVariance"
