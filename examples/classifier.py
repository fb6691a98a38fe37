"""A sequence classifier with a trained head: the classes are its labels."""

import toy

from laplace_lora_fast import Classes, HeldOut, LaplaceLoRA

train, held_out, test = toy.texts(128, seed=0), toy.texts(64, seed=1), toy.texts(256, seed=2)
model = toy.train(toy.encoder(), train)

la = LaplaceLoRA(model, Classes()).fit(train)
la.optimize_prior_precision(HeldOut(held_out))
print(la.predictions(test).metrics())

# PEFT trains the head of a classifier too (`modules_to_save`). It keeps its value, without uncertainty:
print(la.parameters_left_alone)

# What was fitted, in which form, and what the data determine:
print(la.summary())
