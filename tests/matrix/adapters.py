"""Ways to make a PEFT adapter: plain LoRA in all its forms is right, anything else is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
import transformers
from peft import TaskType
from torch import nn

from laplace_lora_fast import Answers
from tests.dora import through_the_norm
from tests.matrix import models, oracle
from tests.matrix.cells import Cell, Skip

GROUP = "Adapters"
QKV = ["q_proj", "k_proj", "v_proj"]
Make = Callable[[nn.Module], nn.Module]


def base(**own: Any) -> nn.Module:
    """A tiny decoder."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(models.config("llama", **own)).double()


def error(make: Make) -> float:
    """Of the posterior over the adapter that `make` puts on the decoder."""
    model = make(base())
    return models.text_error(model.eval(), Answers(models.ANSWERS), models.sequences(), "left")


def error_of_dora(make: Make) -> float:
    """Of DoRA: the oracle is autograd through its norm, which PEFT's own forward pass detaches."""
    with through_the_norm():
        return error(make)


def accepted(make: Make) -> float:
    """Infinity for a fit that should have been refused."""
    model = make(base()).eval()
    batch = models.padded(models.sequences()[: models.TRAIN], "left")
    models.fitted(model, Answers(models.ANSWERS), batch, models.labels()).logit_distribution(batch)
    return float("inf")


def error_of_trained(make: Make) -> float:
    """Of an adapter of which some weights were not trained: the oracle is over those that were."""
    model = make(base()).eval()
    weights = [weight for weight in oracle.lora_weights(model) if weight.requires_grad]
    tokens = models.sequences()
    rows = [{"input_ids": ids[None]} for ids in tokens]
    expected = oracle.posterior(model, models.answers_of, rows[: models.TRAIN], rows[models.TRAIN :], weights)
    batches = [models.padded(part, "left") for part in (tokens[: models.TRAIN], tokens[models.TRAIN :])]
    return models.compared(model, Answers(models.ANSWERS), *batches, expected)


def lora(before: nn.Module, **options: Any) -> nn.Module:
    """A LoRA adapter with a random B."""
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": QKV} | options
    model = peft.get_peft_model(before, peft.LoraConfig(**settings), autocast_adapter_dtype=False).double()
    return models.randomised(model)


def other(kind: str, before: nn.Module, **options: Any) -> nn.Module:
    """An adapter of another kind, as far as this version of PEFT has it, with random weights."""
    cls = getattr(peft, kind, None)
    if cls is None:
        raise Skip(f"this version of PEFT has no {kind}")
    model = peft.get_peft_model(before, cls(**options), autocast_adapter_dtype=False).double()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.1 * noise)
    return model


def two_adapters(before: nn.Module) -> nn.Module:
    """A second adapter beside the active one."""
    model = lora(before)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    model.set_adapter("default")
    return model.double()


def mixed(before: nn.Module) -> nn.Module:
    """Two active adapters."""
    model = lora(before)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=QKV))
    model.base_model.set_adapter(["default", "second"])
    return model.double()


def weighted(before: nn.Module) -> nn.Module:
    """A combination of two adapters by `add_weighted_adapter`."""
    model = lora(before)
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=6, target_modules=QKV))
    model.double()
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type="svd")
    model.set_adapter("both")
    return model


def merged(before: nn.Module) -> nn.Module:
    """Merged into the base weights, LoRA layers still there."""
    model = lora(before)
    model.merge_adapter()
    return model


def unloaded(before: nn.Module) -> nn.Module:
    """Merged into the base weights for good."""
    return lora(before).merge_and_unload()


def disabled(before: nn.Module) -> nn.Module:
    """Switched off."""
    model = lora(before)
    model.base_model.disable_adapter_layers()
    return model


def injected(before: nn.Module) -> nn.Module:
    """Without the wrapper of PEFT's."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=QKV)
    return models.randomised(peft.inject_adapter_in_model(config, before).double())


def from_weights(before: nn.Module, **options: Any) -> nn.Module:
    """Initialised from a decomposition of the base weights, which PEFT does in fp32."""
    return lora(before.float(), **options).double()


def fp32_in_fp64(before: nn.Module) -> nn.Module:
    """Adapter weights in another precision than the base model's."""
    model = lora(before)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def frozen_a(before: nn.Module) -> nn.Module:
    """As LoRA-FA leaves it: lora_A was not trained."""
    model = lora(before)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def trainable_biases(before: nn.Module) -> nn.Module:
    """bias="all" of a model whose layers have biases."""
    own = copy.deepcopy(before.config)
    own.attention_bias = True
    torch.manual_seed(0)
    return lora(transformers.LlamaForCausalLM(own).double(), bias="all")


CAUSAL = {"task_type": TaskType.CAUSAL_LM}
RIGHT: dict[str, Make] = {
    "LoRA": lora,
    "LoRA on all linear layers": partial(lora, target_modules="all-linear"),
    "LoRA on a pattern of names": partial(lora, target_modules=r".*layers\.1\..*(q|down)_proj"),
    "LoRA with the task's type": partial(lora, **CAUSAL),
    "LoRA with dropout": partial(lora, lora_dropout=0.5),
    "LoRA of rank 1": partial(lora, r=1),
    "LoRA of full rank": partial(lora, r=16),
    "QALoRA on a base that is not quantised": partial(lora, use_qalora=True, qalora_group_size=4),
    "rsLoRA": partial(lora, use_rslora=True),
    "r and alpha by pattern": partial(
        lora, rank_pattern={"q_proj": 2, "v_proj": 5}, alpha_pattern={"k_proj": 1}
    ),
    "layers_to_transform": partial(lora, layers_to_transform=[1]),
    "layer_replication": partial(lora, layer_replication=[(0, 2), (0, 2)]),
    "modules_to_save": partial(lora, modules_to_save=["lm_head"]),
    "LoRA on the head": partial(lora, target_modules=[*QKV, "lm_head"]),
    "lora_bias": partial(lora, lora_bias=True, target_modules=["q_proj"]),
    "bias='all'": trainable_biases,
    "gaussian start": partial(lora, init_lora_weights="gaussian"),
    "PiSSA": partial(from_weights, init_lora_weights="pissa"),
    "PiSSA by iterations": partial(from_weights, init_lora_weights="pissa_niter_4"),
    "OLoRA": partial(from_weights, init_lora_weights="olora"),
    "orthogonal start": partial(lora, r=4, init_lora_weights="orthogonal"),
    "trainable_token_indices": partial(lora, trainable_token_indices=[5, 6]),
    "exclude_modules": partial(lora, target_modules="all-linear", exclude_modules=["down_proj"]),
    "LoRA on parameters": partial(lora, target_parameters=["q_proj.weight"], target_modules=[]),
    "ensure_weight_tying": partial(lora, ensure_weight_tying=True),
    "a second adapter beside it": two_adapters,
    "add_weighted_adapter": weighted,
    "inject_adapter_in_model": injected,
    "fp32 adapter in an fp64 model": fp32_in_fp64,
}
REFUSED: dict[str, tuple[Make, str]] = {
    "aLoRA": (partial(lora, alora_invocation_tokens=[5]), "ALora"),
    "LoRA on an embedding": (partial(lora, target_modules=["q_proj", "embed_tokens"]), "embed_tokens"),
    "two active adapters": (mixed, "set_adapter"),
    "merged": (merged, "unmerge_adapter"),
    "merge_and_unload": (unloaded, "no LoRA layer"),
    "disabled": (disabled, "disabled"),
    "no adapter": (lambda before: before, "no LoRA layer"),
    "LoHa": (partial(other, "LoHaConfig", target_modules=QKV), "loha"),
    "LoKr": (partial(other, "LoKrConfig", target_modules=QKV), "lokr"),
    "VeRA": (partial(other, "VeraConfig", target_modules=["q_proj"]), "vera"),
    "IA3": (
        partial(
            other, "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "ia3",
    ),
    "AdaLoRA": (partial(other, "AdaLoraConfig", target_modules=QKV, total_step=10), "adalora"),
    "BOFT": (partial(other, "BOFTConfig", target_modules=["q_proj"], boft_block_size=4), "boft"),
    "OFT": (
        partial(other, "OFTConfig", target_modules=["q_proj"], oft_block_size=4, use_cayley_neumann=False),
        "oft",
    ),
    "HRA": (partial(other, "HRAConfig", target_modules=QKV), "hra"),
    "FourierFT": (partial(other, "FourierFTConfig", target_modules=["q_proj"], n_frequency=8), "fourierft"),
    "VBLoRA": (
        partial(other, "VBLoRAConfig", target_modules=["q_proj"], num_vectors=4, vector_length=4, topk=2),
        "vblora",
    ),
    "LN tuning": (partial(other, "LNTuningConfig", target_modules=["input_layernorm"]), "ln_tuning"),
    "X-LoRA": (partial(other, "XLoraConfig", **CAUSAL, hidden_size=16, adapters={}), "xlora"),
    "prefix tuning": (partial(other, "PrefixTuningConfig", **CAUSAL, num_virtual_tokens=2), "prefix_tuning"),
    "prompt tuning": (partial(other, "PromptTuningConfig", **CAUSAL, num_virtual_tokens=2), "prompt_tuning"),
    "p-tuning": (partial(other, "PromptEncoderConfig", **CAUSAL, num_virtual_tokens=2), "p_tuning"),
    "RandLoRA": (partial(other, "RandLoraConfig", target_modules=["q_proj"]), "randlora"),
    "C3A": (partial(other, "C3AConfig", target_modules=["q_proj"], block_size=4), "c3a"),
    "MiSS": (partial(other, "MissConfig", target_modules=["q_proj"], r=4), "miss"),
    "SHiRA": (partial(other, "ShiraConfig", target_modules=["q_proj"], r=2), "shira"),
    "trainable tokens": (partial(other, "TrainableTokensConfig", token_indices=[5]), "trainable_tokens"),
}


def cells() -> list[Cell]:
    """All of them."""
    right = [Cell(GROUP, name, "decoder", partial(error, make), quick=True) for name, make in RIGHT.items()]
    refused = [
        Cell(GROUP, name, "decoder", partial(accepted, make), refused=words or "LoRA", quick=True)
        for name, (make, words) in REFUSED.items()
    ]
    frozen = Cell(
        GROUP,
        "LoRA-FA: lora_A frozen",
        "decoder",
        partial(error_of_trained, frozen_a),
        quick=True,
        note="a posterior over lora_B",
    )
    dora = {"DoRA": partial(lora, use_dora=True), "rsDoRA": partial(lora, use_dora=True, use_rslora=True)}
    exact = [
        Cell(GROUP, name, "decoder", partial(error_of_dora, make), quick=True, note="rows and diagonal")
        for name, make in dora.items()
    ]
    return [*right, *exact, frozen, *refused]
