"""A regression head: a mean, and a variance that grows where the training data say little."""

import torch
import toy

from laplace_lora_fast import HeldOut, LaplaceLoRA, Regression

train, held_out, test = (toy.texts(n, seed, real=True) for seed, n in enumerate((128, 64, 128)))
model = toy.train(toy.encoder(outputs=1), train)

la = LaplaceLoRA(model, Regression())  # Regression(noise=0.1) where the noise is known
la.fit(train)
la.optimize_prior_precision(HeldOut(held_out))  # and the noise with it
print(f"prior precision {la.prior_precision:.3g}, noise {la.sigma_noise:.3g}")

mean = la.predict(test[0])  # [N, 1]
variance = la.predictive_variance(test[0])  # [N, 1], with the noise in it
assert (variance > la.sigma_noise**2).all()
print(torch.cat([mean, variance.sqrt()], 1)[:3])

print(la.predictions(test).metrics())  # RMSE, NLL, and how many targets lie in the 68 % and 95 % intervals
