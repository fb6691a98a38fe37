"""A sequence classifier with a trained head: the classes are its labels."""

import toy

from laplace_lora_fast import Classes, HeldOut, LaplaceLoRA

train, held_out, test = toy.texts(128, seed=0), toy.texts(64, seed=1), toy.texts(256, seed=2)
model = toy.train(toy.encoder(), train)

la = LaplaceLoRA(model, Classes()).fit(train)
la.optimize_prior_precision(HeldOut(held_out))
print(la.predictions(test).metrics())

# PEFT trains the head of a classifier too (`modules_to_save`): its weight has a posterior like any other, and may have
# a prior of its own.
la.optimize_prior_precision(HeldOut(held_out, per="head", grid=[10.0**e for e in range(-3, 5)]))
print(la.prior_precision)
print(la.predictions(test).metrics())

# To leave it at its trained value: LaplaceLoRA(.., layers=lambda name: "modules_to_save" not in name)

# What was fitted, in which form, and what the data determine:
print(la.summary())
