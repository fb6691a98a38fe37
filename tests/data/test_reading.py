"""What a JSON-lines file of prompts may look like, and that everything else is refused by line and field."""

from __future__ import annotations

import json
import math
import random

import pytest

from laplace_lora_fast.data.prompts import PromptRow, read_rows
from laplace_lora_fast.errors import InvalidBatchError
from tests import words


def test_rows_come_back_as_written(tmp_path):
    records = words.rows(5)
    path = words.write_rows(tmp_path / "rows.jsonl", records)
    path.write_text(path.read_text().replace("\n", "\n\n", 1))  # an empty line does no harm
    expected = [PromptRow(r["prompt"], tuple(r["choices"]), r["label"]) for r in records]
    assert read_rows(path) == expected


def test_rows_may_have_choices_of_their_own_and_chats(tmp_path):
    chat = [{"role": "system", "content": "short"}, {"role": "user", "content": "a film"}]
    records = [GOOD, GOOD | {"choices": ["very good", "bad", "so so"]}, GOOD | {"prompt": chat}]
    rows = read_rows(words.write_rows(tmp_path / "rows.jsonl", records))
    assert [row.choices for row in rows] == [("A", "B"), ("very good", "bad", "so so"), ("A", "B")]
    assert rows[2].prompt == tuple(chat)


GOOD = {"prompt": "a film", "choices": ["A", "B"], "label": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "label"}), "line 2: field 'label' is missing"),
        (json.dumps(GOOD | {"prompt": " "}), "line 2: field 'prompt'"),
        (json.dumps(GOOD | {"prompt": 3}), "line 2: field 'prompt'"),
        (json.dumps(GOOD | {"choices": ["A"]}), "line 2: field 'choices'"),
        (json.dumps(GOOD | {"choices": "AB"}), "line 2: field 'choices'"),
        (json.dumps(GOOD | {"label": 2}), r"line 2: field 'label' must be an integer in \[0, 2\).*, got 2"),
        (json.dumps(GOOD | {"label": True}), "line 2: field 'label'"),
        (json.dumps(GOOD | {"label": "C"}), r"line 2: field 'label'.* \['A', 'B'\], got 'C'$"),
        (json.dumps(GOOD | {"label": "B"}), "got 'B': write 1 for 'B'"),
        (json.dumps(GOOD | {"label": "0"}), "got '0'$"),
        (json.dumps(GOOD | {"label": -1}), "got -1"),
        (json.dumps(GOOD | {"label": None}), "got None"),
        (json.dumps(GOOD | {"label": math.nan}), "got nan"),
        (json.dumps(GOOD).replace("0", "1e0"), "got 1.0"),
        (json.dumps(GOOD).replace("0", "1" * 5000), "line 2: not read: Exceeds the limit"),
        (json.dumps(GOOD | {"choices": ["A", "A"]}), "line 2: field 'choices' repeats an answer"),
        (json.dumps(GOOD) + "}", "line 2: not JSON: Extra data, column 56"),
        (json.dumps(GOOD) * 2, "line 2: not JSON: Extra data"),
        (json.dumps(GOOD)[:20], "line 2: not JSON"),
        ("\0", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not read: nested too deeply"),
        (json.dumps(GOOD)[:-1] + ', "label": 1}', "line 2: field 'label' stands there twice"),
        ('{"prompt": "b", ' + json.dumps(GOOD)[1:], "line 2: field 'prompt' stands there twice"),
        (json.dumps(GOOD | {"prompt": "a \ud800 film"}), "line 2: field 'prompt' holds half a surrogate"),
        (json.dumps(GOOD | {"choices": ["A", "\udc00"]}), "line 2: field 'choices' holds half a surrogate"),
        (json.dumps(GOOD | {"prompt": []}), "line 2: field 'prompt'"),
        (json.dumps(GOOD | {"prompt": ["a film"]}), "line 2: field 'prompt'"),
        (json.dumps(GOOD | {"prompt": [{"role": "user"}]}), "'role' and a 'content'"),
        (
            json.dumps(GOOD | {"prompt": [{"role": "user", "content": "\ud800"}]}),
            "line 2: field 'prompt' holds half a surrogate",
        ),
    ],
    ids=lambda value: value[-30:],
)
def test_bad_rows_name_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(InvalidBatchError, match=message) as caught:
        read_rows(path)
    assert "rows.jsonl" in str(caught.value)


def test_missing_empty_and_binary_files_are_refused(tmp_path):
    with pytest.raises(InvalidBatchError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidBatchError, match="holds no rows"):
        read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidBatchError, match="cannot be read"):
        read_rows(tmp_path / "binary.jsonl")


def test_labels_can_be_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a film", "choices": ["A", "B"]}) + "\n")
    assert read_rows(path, labelled=False) == [PromptRow("a film", ("A", "B"), 0)]
    with pytest.raises(InvalidBatchError, match="'label' is missing"):
        read_rows(path)
    path.write_text(json.dumps({"prompt": "a film", "label": 0}) + "\n")
    with pytest.raises(InvalidBatchError, match="'choices' is missing"):
        read_rows(path, labelled=False)


@pytest.mark.parametrize(
    "character", ["\u2028", "\u2029", "\x85", "\xa0", "\x1c", "\x0b", "\x0c", "\U0001f3ac"]
)
def test_only_a_newline_ends_a_line(tmp_path, character):
    prompt = f"a{character}film"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD | {"prompt": prompt}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(path) == [PromptRow(prompt, ("A", "B"), 0)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_files_of_other_systems(tmp_path, end, mark, last):
    """Carriage returns, a byte-order mark, and a last line without an end."""
    text = mark + end.join([json.dumps(GOOD), json.dumps(GOOD | {"label": 1})]) + end * last
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text.encode())
    assert [row.label for row in read_rows(path)] == [0, 1]


def test_other_encodings_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        path.write_bytes(json.dumps(GOOD).encode(encoding))
        with pytest.raises(InvalidBatchError, match=r"rows\.jsonl.* not"):
            read_rows(path)


def test_damaged_files_are_read_or_refused(tmp_path):
    """Flipped, lost and inserted bytes: never another error, and what is read is what is there."""
    rng, path = random.Random(0), tmp_path / "rows.jsonl"
    whole = "".join(json.dumps(GOOD | {"label": label}) + "\n" for label in (0, 1)).encode()
    read = 0
    for _ in range(1000):
        raw = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(raw))
            match rng.choice(["flip", "lose", "insert"]):
                case "flip":
                    raw[place] ^= 1 << rng.randrange(8)
                case "lose":
                    del raw[place]
                case "insert":
                    raw.insert(place, rng.randrange(256))
        path.write_bytes(raw)
        try:
            rows = read_rows(path)
        except InvalidBatchError:
            continue
        read += 1
        lines = [json.loads(line) for line in raw.decode("utf-8-sig").split("\n") if line.strip()]
        assert rows == [PromptRow(row["prompt"], tuple(row["choices"]), row["label"]) for row in lines]
    assert 0 < read < 1000
