"""Models that see images or hear sound: LoRA on the part that answers, on all of it, and `layers` as the way out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from laplace_lora_fast import Answers, Classes
from tests.matrix import models, oracle
from tests.matrix.cells import Cell

IMAGES, SOUND = "Models with images", "Models of sound and images alone"
IMAGE = 40  # the token that stands for an image's patches
LANGUAGE = r".*language_model.*(q_proj|v_proj|down_proj)"
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 2, "vocab_size": models.VOCAB, "pad_token_id": 0, "initializer_range": 0.3}
AUDIO = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
AUDIO |= {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 4}
AUDIO |= {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "num_labels": 3, "layerdrop": 0.5}
AUDIO |= {"hidden_dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3, "mask_time_prob": 0.0}


def llava() -> Any:
    """CLIP and Llama."""
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=16),
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
        )
    )


def vip_llava() -> Any:
    """Several layers of CLIP, and Llama."""
    return transformers.VipLlavaForConditionalGeneration(
        transformers.VipLlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=16),
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            vision_feature_layers=[-1, -2],
        )
    )


def paligemma() -> Any:
    """SigLIP and Gemma, whose prefix sees itself in both directions."""
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config=transformers.SiglipVisionConfig(**VISION, projection_dim=16, vision_use_head=False),
            text_config=transformers.GemmaConfig(**TEXT, head_dim=8),
            image_token_id=IMAGE,
            projection_dim=16,
        )
    )


VLMS = {"LLaVA": llava, "VipLLaVA": vip_llava, "PaliGemma": paligemma}


def _language(name: str) -> bool:
    return "language_model" in name


def typed(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the types of tokens where PaliGemma's processor gives them: all of the prefix."""
    if model.config.model_type != "paligemma":
        return batch
    return batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}


def image_error(make: Callable[[], Any], targets: str, language_only: bool = False, **options: Any) -> float:
    """Of a posterior from images with texts of several lengths, pads on the left."""
    torch.manual_seed(0)
    model = models.adapted(make(), targets)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    tokens = [torch.cat([torch.full((4,), IMAGE), words]) for words in models.sequences(high=IMAGE)]
    alone = [
        typed(model, {"input_ids": sequence[None], "pixel_values": pixels[n : n + 1]})
        for n, sequence in enumerate(tokens)
    ]
    layers = _language if language_only else None
    weights = oracle.lora_weights(model, layers or (lambda name: True))
    expected = oracle.posterior(
        model, models.answers_of, alone[: models.TRAIN], alone[models.TRAIN :], weights
    )
    parts = slice(models.TRAIN), slice(models.TRAIN, None)
    batches = [
        typed(model, models.padded(tokens[part], "left") | {"pixel_values": pixels[part]}) for part in parts
    ]
    return models.compared(model, Answers(models.ANSWERS), *batches, expected, layers=layers, **options)


def alone_error(
    make: Callable[[], nn.Module], targets: Any, key: str, shape: tuple[int, ...], prepare: Any
) -> float:
    """Of a posterior of a classifier whose input is one tensor of reals, with no pads."""
    torch.manual_seed(0)
    model = models.adapted(make(), targets)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(6, *shape, generator=generator, dtype=torch.float64)
    rows = [{key: inputs[n : n + 1]} for n in range(6)]
    expected = oracle.posterior(model, models.classes_of, rows[: models.TRAIN], rows[models.TRAIN :])
    prepare(model)
    batches = [{key: part} for part in (inputs[: models.TRAIN], inputs[models.TRAIN :])]
    return models.compared(model, Classes(), *batches, expected)


def _as_made(model: Any) -> None:
    """Nothing."""


def _trained_with_checkpoints(model: Any) -> None:
    """Training mode with gradient checkpointing, as a trainer leaves it."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def _made(name: str, kind: str, **own: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**own)
    return getattr(transformers, name)(config)


def _vision(kind: str) -> dict[str, Any]:
    own: dict[str, Any] = {"num_labels": 3, "initializer_range": 0.3}
    if kind == "ConvNext":
        return own | {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    if kind == "Swin":
        return own | {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
        }
    return own | VISION


SOUNDS: dict[str, list[str]] = {
    "Wav2Vec2": ["q_proj", "v_proj", "intermediate_dense", "projector", "classifier"],
    "Hubert": ["q_proj", "v_proj", "output_dense"],
    "WavLM": ["intermediate_dense", "output_dense"],
    "UniSpeech": ["q_proj", "v_proj"],
    "UniSpeechSat": ["q_proj", "v_proj"],
    "Data2VecAudio": ["q_proj", "v_proj"],
    "SEW": ["q_proj", "v_proj"],
}
PICTURES: dict[str, Any] = {"ViT": "all-linear", "DeiT": "all-linear", "Beit": ["q_proj", "v_proj", "fc1"]}
PICTURES |= {
    "Dinov2": ["query", "value", "fc1"],
    "Swin": ["q_proj", "v_proj", "reduction"],
    "ConvNext": ["pwconv1"],
}


def cells() -> list[Cell]:
    """All of them."""
    found = []
    for name, make in VLMS.items():
        cell = partial(Cell, IMAGES, name)
        found += [
            cell("LoRA on the language model", partial(image_error, make, LANGUAGE), quick=name == "LLaVA"),
            cell("all linear layers", partial(image_error, make, "all-linear"), quick=name == "LLaVA"),
            cell(
                "all linear layers, `layers` of the language model",
                partial(image_error, make, "all-linear", True),
            ),
            cell("vision only", partial(image_error, make, r".*vision.*q_proj"), quick=name == "LLaVA"),
        ]
    for name, targets in SOUNDS.items():
        own = AUDIO | ({"squeeze_factor": 1} if name == "SEW" else {})
        if name == "Data2VecAudio":
            own |= {"conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2}
        make = partial(_made, f"{name}ForSequenceClassification", name, **own)
        for column, prepare in (
            ("as it is", _as_made),
            ("training mode, checkpointing", _trained_with_checkpoints),
        ):
            run = partial(alone_error, make, targets, "input_values", (320,), prepare)
            found.append(Cell(SOUND, name, column, run, quick=name in ("Wav2Vec2", "WavLM")))
    for name, targets in PICTURES.items():
        make = partial(_made, f"{name}ForImageClassification", name, **_vision(name))
        size = {"Swin": 16, "ConvNext": 32}.get(name, 8)
        run = partial(alone_error, make, targets, "pixel_values", (3, size, size), _as_made)
        found.append(Cell(SOUND, name, "as it is", run, quick=name in ("ViT", "Swin")))
    return found
