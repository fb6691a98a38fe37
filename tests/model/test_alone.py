"""Layers without streams of tokens: their rows by autograd, one sequence at a time, against plain autograd."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Answers,
    Classes,
    Diagonal,
    InvalidBatchError,
    LaplaceLoRA,
    LowRank,
    NotFittedError,
    Options,
    Outputs,
    Rows,
    StateError,
    UnsupportedAdapterError,
)
from laplace_lora_fast.weights import stored
from tests import tiny
from tests.matrix import models, oracle
from tests.model.test_unsupported import tiny_t5

ANSWERS = Answers(models.ANSWERS)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOKENS = models.sequences()
ALONE = [{"input_ids": ids[None]} for ids in TOKENS]


def mixture(kind="mixtral", targets=("q_proj",), parameters=EXPERTS, **lora):
    """A mixture of experts with LoRA on their weights, which a router gives tokens to."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(models.config(kind)).double()
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=list(targets), target_parameters=parameters, **lora
    )
    return models.randomised(peft.get_peft_model(base, config, autocast_adapter_dtype=False).double()).eval()


def batches(side="left", size=4, order=(0, 1, 2, 3)):
    """Training batches: the same four sequences."""
    rows = [(TOKENS[n], models.labels()[n]) for n in order]
    parts = [rows[start : start + size] for start in range(0, 4, size)]
    return [
        models.padded([ids for ids, _ in part], side) | {"labels": torch.stack([label for _, label in part])}
        for part in parts
    ]


def fitted(model, train=None, task=ANSWERS, **options):
    options = {"structure": models.EXACT} | options
    return LaplaceLoRA(model, task, **options).fit(batches() if train is None else train, progress=False)


TEST = models.padded(TOKENS[4:], "left")


def close(found, wanted, tolerance=1e-6):
    for ours, theirs in zip(found, wanted, strict=True):
        assert oracle.error(ours, theirs) < tolerance


@pytest.mark.parametrize(
    ("kind", "targets", "parameters"),
    [
        ("mixtral", ("q_proj",), EXPERTS),
        ("qwen2_moe", (), EXPERTS[1:]),
        ("qwen3_moe", ("v_proj",), EXPERTS[:1]),
        ("gpt_oss", ("q_proj",), EXPERTS),
    ],
)
def test_experts(kind, targets, parameters):
    """Whatever the batches: their size, order and the side of the pads. Pads are routed too, and change nothing."""
    model = mixture(kind, targets, parameters)
    wanted = oracle.posterior(model, models.answers_of, ALONE[:4], ALONE[4:])
    for train in (batches(), batches("right", 1), batches("right", 2, (3, 0, 2, 1))):
        close(fitted(model, train).logit_distribution(TEST), wanted)


def test_low_rank_and_a_refit():
    model = mixture()
    wanted = oracle.posterior(model, models.answers_of, ALONE[:4], ALONE[4:])
    close(fitted(model, structure=LowRank(rank=64, columns=64)).logit_distribution(TEST), wanted)
    refit = fitted(model, structure=Rows(columns=64, refit=True))
    close([refit.logit_distribution(TEST)[1]], [wanted[1]], 0.5)  # at another optimum
    with torch.no_grad(), model.disable_adapter():
        before = torch.stack([models.answers_of(model, each) for each in ALONE[:4]])
    contrasts = before[:, 1:] - before[:, :1]
    close([torch.cat(refit.snapshot()[0].curvature.observed.prior)], [contrasts], 1e-6)


def test_the_diagonal():
    model = mixture()
    found = fitted(model, structure=Diagonal()).posterior.curvature
    weights = oracle.lora_weights(model)
    rows = [oracle.jacobian(model, models.answers_of, each, weights) for each in ALONE[:4]]
    squares = sum(
        (jac.mT @ (torch.diag(u.softmax(-1)) - torch.outer(u.softmax(-1), u.softmax(-1))) * jac.mT).sum(1)
        for u, jac in rows
    )
    parts = squares.split([weight.numel() for weight in weights])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wanted = {
        names[id(weight)].replace(".default.weight", ""): part.view_as(weight)
        for weight, part in zip(weights, parts, strict=True)
    }
    for name, block in zip(found.names, found.blocks, strict=True):
        assert oracle.error(stored(name.side, block.values), wanted[str(name)]) < 1e-6


def test_groups_of_sequences():
    """Options: rows of sequences add up to those of examples."""
    model = mixture()
    ids, labels = torch.stack([each[-3:] for each in TOKENS]), torch.full((6, 3), -100)
    labels[:, -1] = ids[:, -1]
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 0]), "group": torch.tensor([0, 0, 1, 1, 2, 2])}
    batch |= {"option_mask": labels != -100}
    one = [
        {
            key: value[n : n + 1] if key == "labels" else value[2 * n : 2 * n + 2]
            for key, value in batch.items()
        }
        | {"group": torch.tensor([0, 0])}
        for n in range(3)
    ]
    together, apart = (fitted(model, each, Options()) for each in ([batch], one))
    close(together.logit_distribution(batch), apart.logit_distribution(batch), 1e-8)


@pytest.mark.parametrize("structure", [KFAC(), EKFAC()], ids=str)
def test_kronecker_factors_are_refused(structure):
    with pytest.raises(UnsupportedAdapterError, match=r"mlp\.experts' has no streams.*Rows\(\)"):
        fitted(mixture(), structure=structure)
    la = fitted(mixture(), structure=structure, layers=lambda name: "experts" not in name)
    assert la.predict(TEST).isfinite().all()


def test_samples():
    """J delta by forward mode, and the model with moved weights, against autograd."""
    model = mixture()
    la = fitted(model)
    draws, curvature = la.sample(2), la.posterior.curvature
    weights = {name.replace(".default.weight", ""): p for name, p in model.named_parameters()}
    steps = [stored(name.side, step) for name, step in zip(curvature.names, draws.deltas, strict=True)]
    chosen = [weights[str(name)] for name in curvature.names]
    linear = []
    for each in ALONE[4:]:
        u, jac = oracle.jacobian(model, models.answers_of, each, chosen)
        linear.append(u + torch.cat([step.flatten(1) for step in steps], 1) @ jac.mT)
    close([draws.outputs(TEST)], [torch.stack(linear, 1)], 1e-5)
    found = draws.outputs(TEST, linearised=False)
    for sample in range(2):
        for weight, step in zip(chosen, steps, strict=True):
            weight.data.add_(step[sample])
        with torch.no_grad():
            moved = torch.stack([models.answers_of(model, each) for each in ALONE[4:]])
        close([found[sample]], [moved], 1e-8)
        for weight, step in zip(chosen, steps, strict=True):
            weight.data.sub_(step[sample])


def test_saved_and_written(tmp_path):
    la = fitted(mixture())
    la.save(tmp_path / "posterior")
    again = LaplaceLoRA.load(tmp_path / "posterior", mixture())
    close(again.logit_distribution(TEST), la.logit_distribution(TEST), 1e-12)
    assert "4 layers have no streams of tokens" in again.summary()
    (folder,) = la.sample_adapters(tmp_path / "samples", 1, force=True)
    assert len(peft.utils.load_peft_weights(str(folder), device="cpu")) == len(la.posterior.curvature.names)


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_checkpointing_in_training_mode(reentrant):
    model = mixture()
    wanted = oracle.posterior(model, models.answers_of, ALONE[:4], ALONE[4:])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    close(fitted(model.train()).logit_distribution(TEST), wanted)


def test_nothing_is_left_behind():
    model = mixture().requires_grad_(False)
    before = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    la = fitted(model)
    la.sample(1).outputs(TEST)
    with pytest.raises(UnsupportedAdapterError):
        fitted(model, structure=KFAC())
    assert before == [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("_activate_lora" in vars(module) for module in model.modules())


def test_a_sequence_that_sees_others_is_refused():
    """Where every layer is of this kind, no stream would tell."""
    model = mixture(targets=(), parameters=EXPERTS[1:])

    def mean(module, args, output):
        return output + output.mean(0, keepdim=True)

    model.get_input_embeddings().register_forward_hook(
        lambda m, a, o: o
    )  # hooks before ours see nothing of it
    handle = model.base_model.model.model.layers[0].self_attn.o_proj.register_forward_hook(mean)
    with pytest.raises(UnsupportedAdapterError, match="depend on other sequences of its batch"):
        fitted(model)
    handle.remove()
    fitted(model)


def test_of_a_decoder_of_another_length_than_its_encoder():
    task = Outputs(lambda output, _: output.logits[:, -1, :3])
    model = tiny_t5()
    batch = tiny.batch(6, padding="right") | {"decoder_input_ids": torch.randint(3, 40, (6, 4))}
    rows = [{key: value[n : n + 1] for key, value in batch.items() if key != "labels"} for n in range(6)]
    wanted = oracle.posterior(model, lambda m, row: m(**row).logits[0, -1, :3], rows[:4], rows[4:])
    train, test = ({key: value[part] for key, value in batch.items()} for part in (slice(4), slice(4, 6)))
    close(fitted(model, [train], task).logit_distribution(test), wanted)


def test_shared_keys_of_deberta_in_a_batch():
    """Seen first in a batch of one, where its streams can be read, and then of several."""
    config = models.config(
        "deberta-v2",
        num_labels=3,
        is_decoder=False,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=8,
        position_buckets=4,
        share_att_key=True,
    )
    torch.manual_seed(0)
    model = models.adapted(
        transformers.DebertaV2ForSequenceClassification(config), ["query_proj", "key_proj", "value_proj"]
    )
    wanted = oracle.posterior(model, models.classes_of, ALONE[:4], ALONE[4:])
    test = models.padded(TOKENS[4:], "right")
    first, *_ = batches("right", 1)
    rest = models.padded(TOKENS[1:4], "right") | {"labels": models.labels()[1:4]}
    la = fitted(model, [first, rest], Classes())
    close(la.logit_distribution(test), wanted)
    assert "key_proj" in la.summary()


class Chosen(torch.nn.Module):
    """A layer that sees the tokens below 10 only."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = torch.nn.Embedding(tiny.VOCAB, 8), torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, input_ids):
        hidden, chosen = self.embed(input_ids).clone(), input_ids < 10
        hidden[chosen] = self.layer(hidden[chosen]).tanh()
        return self.head(hidden.mean(1))


def test_as_many_tokens_as_sequences_by_chance():
    """Streams that could be read in one batch of several sequences and cannot in the next: both are in doubt."""
    torch.manual_seed(0)
    model = tiny.adapt(Chosen(), targets=("layer",))
    ids = torch.full((2, 4), 20)
    by_chance, others = ids.clone(), ids.clone()
    by_chance[:, 1], others[:, 1:3] = 3, 3
    batches = [{"input_ids": each, "labels": torch.tensor([0, 1])} for each in (others, by_chance)]
    la = fitted(model, batches, Classes())
    rows = [{"input_ids": each["input_ids"][n : n + 1]} for each in batches for n in range(2)]
    wanted = oracle.posterior(model, lambda m, row: m(**row)[0], rows, rows[:2])
    close(la.logit_distribution(batches[0]), wanted)
    with pytest.raises(InvalidBatchError, match="cannot be matched"):
        fitted(tiny.adapt(Chosen(), targets=("layer",)), batches[::-1], Classes())


class OutOfSight(Chosen):
    """Tokens are embedded by no module."""

    def forward(self, input_ids):
        hidden, chosen = self.embed.weight[input_ids].clone(), input_ids < 10
        hidden[chosen] = self.layer(hidden[chosen]).tanh()
        return self.head(hidden.mean(1))


def test_what_cannot_be_told_apart_says_so():
    batch = {"input_ids": torch.full((2, 4), 20)}
    batch["input_ids"][:, 1:3] = 3
    with pytest.raises(InvalidBatchError, match="batches of one sequence without pads"):
        fitted(tiny.adapt(OutOfSight(), targets=("layer",)), [batch], Classes())


def embedded(model, batch):
    """The batch by what its tokens are embedded as."""
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    return rest | {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach()}


def test_surroundings():
    """Compiled, in inference mode, with hooks on experts, by embeddings in some batches."""
    model = mixture()
    model.base_model.model.model.layers[0].mlp.experts.register_forward_hook(
        lambda m, a, output: output * 1.5
    )
    wanted = oracle.posterior(model, models.answers_of, ALONE[:4], ALONE[4:])
    first, second = batches(size=2)
    with torch.inference_mode():
        la = fitted(model, [first, embedded(model, second)])
        close(la.logit_distribution(embedded(model, TEST)), wanted)
    close(fitted(torch.compile(model, backend="aot_eager")).logit_distribution(TEST), wanted)


@pytest.mark.parametrize("where", ["mlp.gate.weight", "mlp.experts.lora_A.default.weight", "down_proj"])
def test_another_mixture_is_noticed(where, tmp_path):
    model = mixture()
    la = fitted(model)
    la.save(tmp_path)
    parameter = next(p for name, p in model.named_parameters() if name.endswith(where))
    with torch.no_grad():
        parameter[(0,) * parameter.dim()] += 1e-3
    with pytest.raises(NotFittedError, match="changed since fit"):
        la.predict(TEST)
    with pytest.raises(StateError):
        LaplaceLoRA.load(tmp_path, model)


def test_a_merged_mixture_is_refused():
    model = mixture()
    la = fitted(model)
    model.merge_adapter()
    with pytest.raises(UnsupportedAdapterError, match="unmerge_adapter"):
        la.predict(TEST)
    with pytest.raises(UnsupportedAdapterError, match="unmerge_adapter"):
        LaplaceLoRA(model, ANSWERS)
