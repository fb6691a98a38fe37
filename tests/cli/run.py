"""The command line, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from click.testing import Result
from peft import PeftModel
from typer.testing import CliRunner

from laplace_lora_fast.cli import main
from laplace_lora_fast.data.prompts import answer_token_ids, load_causal_lm, make_batches, read_rows


def invoke(*args: Any) -> Result:
    """Runs `laplace-lora` with these arguments."""
    return CliRunner().invoke(main.app, [str(arg) for arg in args])


def refused(*args: Any) -> str:
    """The one line that a command ends with, which has to be about the user's input."""
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    (complaint,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in result.output
    return complaint


def api(folder: Path) -> tuple[Any, list[int], Any]:
    """Model, answers and a loader for rows, by the Python API."""
    base, tokenizer = load_causal_lm(str(folder / "base"))
    model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    answers = answer_token_ids(tokenizer, read_rows(folder / "train.jsonl"))
    return model, answers, lambda name: make_batches(tokenizer, read_rows(folder / f"{name}.jsonl"), 4)
