"""Is it better than temperature scaling? Several methods on one test set, with intervals; and no held-out data."""

import toy

from laplace_lora_fast import KFAC, Classes, CrossFit, LaplaceLoRA
from laplace_lora_fast.baselines import MAP, Case, CrossFittedTemperature, Laplace, Temperature, TrainingFree
from laplace_lora_fast.evaluation.calibration import calibration
from laplace_lora_fast.evaluation.intervals import difference, interval

train, held_out, test = toy.texts(128, seed=0), toy.texts(64, seed=1), toy.texts(128, seed=2)


def fine_tuned(batches):
    """Your training function: it starts where the model in question started."""
    return toy.train(toy.encoder(), batches, epochs=15)


def nll(predictions):
    """The score that is compared."""
    return predictions.metrics().nll


case = Case(fine_tuned(train), Classes(), train, held_out)

# Without held-out data: folds are trained again, and each example is predicted by a model that has not seen it.
la = LaplaceLoRA(case.model, Classes(), structure="rows").fit(train)
la.optimize_prior_precision(CrossFit(fine_tuned, train, folds=4))
answers = {"cross-fitted Laplace": la.predictions(test)}

methods = {
    "MAP": MAP(),
    "temperature": Temperature(),
    "cross-fitted temperature": CrossFittedTemperature(fine_tuned, train),
    "Laplace, KFAC": Laplace(KFAC()),
    "Laplace, last layer": Laplace(layers="last"),
    "training-free": TrainingFree(samples=5),
}
answers |= {name: method.fit(case)(test) for name, method in methods.items()}
for name, predictions in answers.items():
    against = difference(predictions, answers["temperature"], nll)
    print(f"{name:25} NLL {interval(predictions, nll)}, minus temperature {against}")
print(calibration(answers["cross-fitted Laplace"]))
