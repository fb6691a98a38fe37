"""Structures of the curvature: what is kept of it, from exact to coarse."""

import toy

from laplace_lora_fast import EKFAC, KFAC, Answers, Diagonal, HeldOut, LaplaceLoRA, MonteCarlo, Rows

train, held_out, test = toy.texts(128, seed=0), toy.texts(64, seed=1), toy.texts(256, seed=2)
model = toy.train(toy.causal_model(), train, toy.answer_logits)

structures = [
    "auto",  # exact rows where they are few, else KFAC; la.summary() says why
    Rows(),  # the Gauss-Newton matrix of all LoRA weights together, by its rows
    Rows(columns=16),  # less memory: each row is a narrower sketch
    KFAC(),  # a Kronecker product a weight: any number of examples
    KFAC(tokens="expand", factors="sketch", columns=16),
    KFAC(fisher=MonteCarlo(samples=4)),  # sampled labels: for very many classes
    EKFAC(),  # KFAC with measured eigenvalues: a second pass
    Diagonal(),  # a baseline
]
for structure in structures:
    la = LaplaceLoRA(model, Answers(toy.ANSWERS), structure=structure).fit(train, progress=False)
    la.optimize_prior_precision(HeldOut(held_out), progress=False)
    nll = la.predictions(test, progress=False).metrics().nll
    print(f"{structure!r:80} prior precision {la.prior_precision:7.3g}  NLL {nll:.3f}")
