"""A fit that may be killed: the same call goes on where the last one was. A batch that is not finite is left out."""

import tempfile
import warnings
from pathlib import Path

import torch
import toy

from laplace_lora_fast import Answers, Checkpoint, LaplaceLoRA, LaplaceWarning

model, batches = toy.causal_model(), toy.texts(64, seed=0)
folder = Path(tempfile.mkdtemp()) / "checkpoint"


class Killed(Exception):
    """Stands for a machine that goes away."""


def interrupted():
    yield from batches[:3]
    raise Killed


try:
    # seconds=0 writes after each batch; as a rule minutes are right, and checkpoint=folder is short for 300 seconds
    LaplaceLoRA(model, Answers(toy.ANSWERS), structure="rows").fit(
        interrupted(), checkpoint=Checkpoint(folder, 0)
    )
except Killed:
    print("killed; written:", sorted(path.name for path in folder.iterdir()))

la = LaplaceLoRA(model, Answers(toy.ANSWERS), structure="rows").fit(batches, checkpoint=folder)
alone = LaplaceLoRA(model, Answers(toy.ANSWERS), structure="rows").fit(batches)
assert torch.equal(la.predict(batches[0]), alone.predict(batches[0]))  # bit for bit
assert not folder.exists()  # removed: the fit has succeeded

embedding = model.get_input_embeddings()
batch = {key: value.clone() for key, value in batches[0].items() if key != "input_ids"}
batch["inputs_embeds"] = torch.full((*batches[0]["input_ids"].shape, embedding.weight.shape[1]), torch.inf)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", LaplaceWarning)
    la.fit([batch, *batches], non_finite="skip")
print(la.summary().splitlines()[-1])
