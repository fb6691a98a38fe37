"""A language model answers with one of several tokens: from an adapter to calibrated probabilities."""

import toy

from laplace_lora_fast import Answers, HeldOut, LaplaceLoRA

train, held_out, test = toy.texts(128, seed=0), toy.texts(64, seed=1), toy.texts(256, seed=2)
model = toy.train(
    toy.causal_model(), train, toy.answer_logits
)  # yours: PeftModel.from_pretrained(base, "adapter")

la = LaplaceLoRA(model, Answers(toy.ANSWERS))  # the classes are these tokens, read at the end of the prompt
la.fit(train)  # one pass over the training data
la.optimize_prior_precision(HeldOut(held_out))  # one pass over data that were not trained on
print(la.predict(test[0])[:3])  # probabilities [N, 2]; a batch needs no labels

plain = la.predictions(test, link_approx="map").metrics()  # the adapter as it is
laplace = la.predictions(test).metrics()
print(f"NLL {plain.nll:.3f} -> {laplace.nll:.3f}, calibration error {plain.ece:.3f} -> {laplace.ece:.3f}")
assert laplace.nll < plain.nll
