"""Quantised base models on a CPU, each against an fp32 copy with the weights that its layers stand for."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
import transformers
from torch import nn

from laplace_lora_fast import Answers
from tests.matrix import models, oracle
from tests.matrix.cells import Cell, Skip

GROUP = "Quantised base models"
TARGETS = {
    "q and v": ["q_proj", "v_proj"],
    "o and down": ["o_proj", "down_proj"],
    "all linear layers": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
COARSE = 0.1  # computed in bf16, or with activations in 8 bits


def need(module: str) -> None:
    """Skips where a library is not installed."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise Skip(f"needs {module}")


def plain() -> Any:
    """The model before quantisation."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=models.VOCAB,
        pad_token_id=0,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config)


def loaded(config: Any, dtype: torch.dtype) -> Any:
    """As a user loads a quantised model."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        plain().save_pretrained(folder)
        try:
            return transformers.AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=config, device_map="cpu", dtype=dtype
            )
        except Exception as error:  # of transformers or the library, before anything of ours runs
            raise Skip(f"transformers cannot load it here: {str(error)[:80]}") from error


def bitsandbytes(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """4 or 8 bits of bitsandbytes."""
    need("bitsandbytes")
    if "load_in_4bit" in options:
        options["bnb_4bit_compute_dtype"] = dtype
    return loaded(transformers.BitsAndBytesConfig(**options), dtype)


def torchao(kind: str, **options: Any) -> Any:
    """int8 or int4 of torchao."""
    need("torchao")
    from torchao import quantization

    if not hasattr(quantization, kind):
        raise Skip(f"this torchao has no {kind}")
    return loaded(transformers.TorchAoConfig(getattr(quantization, kind)(**options)), torch.float32)


def quanto(weights: str) -> Any:
    """optimum-quanto."""
    need("optimum")
    if importlib.util.find_spec("optimum.quanto") is None:
        raise Skip("needs optimum-quanto")
    return loaded(transformers.QuantoConfig(weights=weights), torch.float32)


def hqq(bits: int) -> Any:
    """HQQ by its own library: this transformers loads none."""
    need("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = plain()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            config = BaseQuantizeConfig(nbits=bits, group_size=64)
            parent, _, own = name.rpartition(".")
            made = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")
            setattr(model.get_submodule(parent), own, made)
    return model


def error(
    load: Callable[[], Any], targets: list[str], prepared: bool = False, evaluated: bool = False
) -> float:
    """Of a posterior on a quantised base.

    Args:
        load: gives the base model.
        targets: of LoRA.
        prepared: with `prepare_model_for_kbit_training`.
        evaluated: after a plain evaluation pass, on which some kernels repack their weights.
    """
    base = load()
    exact_base = stands_for(base)
    if evaluated:
        with torch.no_grad():
            base.eval()(torch.ones(2, 5, dtype=torch.long))
    if prepared:
        base = peft.prepare_model_for_kbit_training(base)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    model = models.randomised(peft.get_peft_model(base, config)).eval()
    exact = peft.get_peft_model(exact_base, config)
    adapter = {name: value for name, value in model.named_parameters() if "lora_" in name}
    exact.load_state_dict(adapter, strict=False)
    exact = exact.eval()
    tokens = models.sequences()
    alone = [{"input_ids": sequence[None]} for sequence in tokens]
    expected = oracle.posterior(exact, models.answers_of, alone[: models.TRAIN], alone[models.TRAIN :])
    batches = [models.padded(part, "left") for part in (tokens[: models.TRAIN], tokens[models.TRAIN :])]
    return models.compared(model, Answers(models.ANSWERS), *batches, expected)


def stands_for(model: nn.Module) -> Any:
    """An fp32 model with the weights that quantised layers multiply by: what they give for the unit vectors.

    In training mode and with autograd, where no kernel for inference takes over.
    """
    exact = plain()
    quantised = dict(model.train().named_modules())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name, layer in exact.named_modules():
        if isinstance(layer, nn.Linear):
            units = torch.eye(layer.in_features, dtype=dtype, requires_grad=True)
            layer.weight.data.copy_(quantised[name](units).detach().float().T)
        else:
            for key, value in layer.named_parameters(recurse=False):
                value.data.copy_(getattr(quantised[name], key).detach().float())
    model.eval()
    return exact


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BASES: dict[str, tuple[Callable[[], Any], float]] = {
    "bitsandbytes NF4": (partial(bitsandbytes, **NF4), oracle.FP32),
    "bitsandbytes FP4": (partial(bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="fp4"), oracle.FP32),
    "bitsandbytes NF4 in bf16, double quantisation": (
        partial(bitsandbytes, torch.bfloat16, **NF4, bnb_4bit_use_double_quant=True),
        COARSE,
    ),
    "bitsandbytes int8": (partial(bitsandbytes, load_in_8bit=True), COARSE),
    "torchao int8": (partial(torchao, "Int8WeightOnlyConfig"), oracle.FP32),
    "torchao int8, dynamic activations": (partial(torchao, "Int8DynamicActivationInt8WeightConfig"), COARSE),
    "torchao int4": (partial(torchao, "Int4WeightOnlyConfig", group_size=32), COARSE),
    "torchao int4, codes in int8": (
        partial(torchao, "IntxWeightOnlyConfig", weight_dtype=torch.int4),
        COARSE,
    ),
    "quanto int8": (partial(quanto, "int8"), oracle.FP32),
    "quanto int4": (partial(quanto, "int4"), oracle.FP32),
    "HQQ 4 bits": (partial(hqq, 4), oracle.FP32),
    "HQQ 8 bits": (partial(hqq, 8), oracle.FP32),
}
QUICK = {"bitsandbytes NF4"}
INFERENCE = "lets no gradient through"
REFUSED = {"torchao int8, dynamic activations": INFERENCE}


def cells() -> list[Cell]:
    """All of them."""
    found = []
    for name, (load, tolerance) in BASES.items():
        for column, targets in TARGETS.items():
            ways: dict[str, dict[str, bool]] = {column: {}}
            if column == "all linear layers":
                ways |= {
                    f"{column}, prepared": {"prepared": True},
                    f"{column}, evaluated before": {"evaluated": True},
                }
            for way, options in ways.items():
                run = partial(error, load, targets, **options)
                # bitsandbytes rounds the scales to bf16 when it packs its weights on an evaluation pass, for good
                within = max(tolerance, COARSE / 2) if options.get("evaluated") else tolerance
                found.append(Cell(GROUP, name, way, run, within, REFUSED.get(name, ""), quick=name in QUICK))
    return found
