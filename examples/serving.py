"""Save the posterior beside the adapter, load both in another process, and predict."""

import subprocess
import sys
import tempfile

import peft
import toy

from laplace_lora_fast import Answers, HeldOut, LaplaceLoRA


def prepare(folder):
    """Once, after training."""
    train, held_out = toy.texts(128, seed=0), toy.texts(64, seed=1)
    model = toy.train(toy.causal_model(), train, toy.answer_logits)
    model.save_pretrained(folder)  # the adapter is PEFT's to save
    la = LaplaceLoRA(model, Answers(toy.ANSWERS)).fit(train)
    la.optimize_prior_precision(HeldOut(held_out))
    la.save(folder)  # posterior.safetensors: curvature, task, prior precision


def serve(folder):
    """Wherever predictions are wanted. Another base model, adapter or posterior than those of the fit is an error."""
    model = peft.PeftModel.from_pretrained(toy.causal_model().unload(), folder)
    la = LaplaceLoRA.load(folder, model)
    print(la)
    print(la.predict(toy.texts(3, seed=2)[0]))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            prepare(folder)
            subprocess.run([sys.executable, __file__, folder], check=True)
