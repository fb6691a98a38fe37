"""What a protocol would take of a machine, from its configuration alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.protocols.config import Protocol
from laplace_lora_fast.cli.plan import Setting, on_meta, plan
from laplace_lora_fast.fitting.planner import Rates
from laplace_lora_fast.progress import duration


def lines(protocol: Protocol, model: str | None, budget: int, rates: Rates) -> Iterator[str]:
    """The plan as Markdown: trainings, fits by structure, predictions.

    Args:
        protocol: the configuration.
        model: a folder with another model's configuration than the protocol's shape.
        budget: bytes for the posterior on the device.
        rates: of the machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "config.json"
        place.write_text(json.dumps(protocol.shape))
        config = place if model is None else Path(model)
        weights = sum(parameter.numel() for parameter in on_meta(config).parameters())
        tokens, classes = protocol.prompt.max_length, len(protocol.prompt.answers)
        examples = round(protocol.train_set.examples * (1 - protocol.held_out))
        targets = ",".join(target for target in protocol.lora.targets if target != "lm_head")
        found = plan(Setting(config, targets, protocol.lora.r, examples, classes, tokens, budget), rates)
    train = protocol.train
    n_trained = train.steps * train.batch_size * train.accumulate
    passes = 2.0 * weights * tokens / rates.passes  # of one example
    n_tests = sum(source.examples for source in protocol.test_sets)
    members = protocol.methods.members
    yield f"{protocol.name}, {protocol.model if model is None else model}: {found.title}."
    yield ""
    for place_of_row, row in enumerate(found.rows):
        yield f"| {' | '.join(row)} |"
        if not place_of_row:
            yield f"|{'---|' * len(row)}"
    yield ""
    yield found.advice
    yield (
        f"A training: {n_trained:,} examples, {duration(2 * n_trained * passes)}; {members} a seed for the deep "
        f"ensemble, {len(protocol.seeds)} seeds. Predictions of a posterior: {n_tests:,} examples, "
        f"{duration(classes * n_tests * passes)}; of a plain pass, {duration(n_tests * passes)}."
    )
    yield (
        f"All examples are counted at {tokens} tokens, the most that a prompt may have; the adapter of the answers' "
        f"rows is left out. Seconds at {rates.passes:.3g} operations a second in the passes and {rates.fp64:.3g} in "
        "fp64, as stated: not measured."
    )
