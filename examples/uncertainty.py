"""How unsure an answer is, how much of that is the model's own not knowing, and what to do with it."""

import toy

from laplace_lora_fast import Answers, HeldOut, LaplaceLoRA
from laplace_lora_fast.evaluation.selective import abstention_curve, conformal_sets

train, held_out = toy.texts(128, seed=0), toy.texts(64, seed=1)
calibration, test = toy.texts(200, seed=2), toy.texts(200, seed=3)
model = toy.train(toy.causal_model(), train, toy.answer_logits)
la = LaplaceLoRA(model, Answers(toy.ANSWERS)).fit(train)
la.optimize_prior_precision(HeldOut(held_out))

found = la.uncertainty(test[0])
print("total", found.total[:4], "of it the model's own", found.epistemic[:4])

# Answer the surest only: the share of errors that leaves.
predictions = la.predictions(test)
curve = abstention_curve(predictions)
print(f"errors: {curve.risk_at(1.0):.3f} of all, {curve.risk_at(0.7):.3f} of the surest 70 %")
assert curve.risk_at(0.7) < curve.risk_at(1.0)

# Sets that hold the label in nine of ten cases, by examples that neither trained nor tuned anything.
sets = conformal_sets(la.predictions(calibration), predictions, alpha=0.1)
print(
    f"sets hold the label in {sets.coverage:.3f} of cases, with {sets.size.double().mean():.2f} answers on average"
)
assert sets.coverage > 0.85
