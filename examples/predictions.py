"""Predictions: links, several priors at once, the covariance of the logits, whole loaders, weight samples."""

import tempfile

import torch
import toy

from laplace_lora_fast import Answers, HeldOut, LaplaceLoRA

train, held_out, test = toy.texts(128, seed=0), toy.texts(64, seed=1), toy.texts(256, seed=2)
model = toy.train(toy.causal_model(), train, toy.answer_logits)
la = LaplaceLoRA(model, Answers(toy.ANSWERS)).fit(train)
la.optimize_prior_precision(HeldOut(held_out))
batch = test[0]

la.predict(batch)  # "probit": closed form
la.predict(batch, link_approx="mc", n_samples=10_000)  # exact up to sampling
la.predict(batch, link_approx="bridge")  # Laplace bridge
la.predict(batch, link_approx="map")  # the plain model
assert la.predict(batch, prior_precision=[1.0, 10.0]).shape == (2, 16, 2)  # several priors in one pass

mean, covariance = la.logit_distribution(batch)  # [N, C], [N, C, C]: what the probabilities come from
contrast = torch.tensor([-1.0, 1.0])
deviation = (contrast @ covariance @ contrast).sqrt()  # of the difference of the two logits
print(f"logit difference {mean[0] @ contrast:.2f} +- {deviation[0]:.2f}")

result = la.predictions(test)  # a whole loader: .probs, .labels, .metrics(), .plot("reliability.png")
sure = result.confidence > 0.8
print(f"sure of {sure.float().mean():.0%}, of those right {result.correct[sure].double().mean():.0%}")

with tempfile.TemporaryDirectory() as folder:  # ordinary PEFT adapters; see the limits in the guide
    la.sample_adapters(folder, n=2, directions="data", check=test[:1], force=True)  # prints how good they are
