"""The prior precision: the one number that has to be chosen, and what to choose it by."""

import toy

from laplace_lora_fast import Answers, Evidence, HeldOut, LaplaceLoRA, LeaveOneOut, Rows
from laplace_lora_fast.evaluation.metrics import temperature_scale
from laplace_lora_fast.evaluation.predictions import Predictions

train, held_out, test = toy.texts(128, seed=0), toy.texts(64, seed=1), toy.texts(256, seed=2)
model = toy.train(toy.causal_model(), train, toy.answer_logits)
task = Answers(toy.ANSWERS)


def report(name, la):
    print(f"{name:28} NLL {la.predictions(test, progress=False).metrics().nll:.3f}  at {la.prior_precision}")


la = LaplaceLoRA(model, task, prior_precision=1.0).fit(train, progress=False)
held, plain = (la.predictions(data, link_approx="map", progress=False) for data in (held_out, test))
temperature = temperature_scale(held.probs.log(), held.labels)  # what to compare with
scaled = Predictions((plain.probs.log() / temperature).softmax(1), plain.labels)
print(f"{'plain model':28} NLL {plain.metrics().nll:.3f}")
print(f"{'temperature':28} NLL {scaled.metrics().nll:.3f}  at {temperature:.3g}")

report("given", la)
la.optimize_prior_precision(HeldOut(held_out), progress=False)  # the way to take where there are such data
report("held out", la)
la.optimize_prior_precision(HeldOut(held_out, per="side", grid=(0.1, 1, 10, 100)), progress=False)
report("one for lora_A, one for _B", la)
la.optimize_prior_precision(Evidence(), progress=False)  # no data needed; poor once an adapter interpolates
report("evidence", la)
la.prior_precision = 5.0  # one fit serves any prior
report("another one", la)

refit = LaplaceLoRA(model, task, structure=Rows(refit=True)).fit(train, progress=False)
refit.optimize_prior_precision(Evidence(), progress=False)  # the way to take without held-out data
report("refit, evidence", refit)
refit.optimize_prior_precision(LeaveOneOut(), progress=False)  # no data either; did not hold on every model
report("refit, leave one out", refit)
