"""Published protocols of evaluation, one configuration a trained set: `python -m bench.protocols.run CONFIG`."""
